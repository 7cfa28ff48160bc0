"""The output of a Jetson's tools is read as the tools write it.

The lines were recorded on devices and published by their owners (found through the reference search: tests of
tegrastats readers, forum logs); numbers are theirs, cores are left out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moedge.runtime.device.moedge_jetson import Tegrastats, clocks_locked, power_mode, said_by, summary, tegrastats

AGX_ORIN_JETPACK_7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201,4%@2201,off] "
    "EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1290] NVENC0 off NVDEC0 off PVA0_FREQ off APE 174 "
    "cpu@52.968C/52.968C soc2@48.406C/48.406C gpu@47.625C/47.625C "
    "VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
)
AGX_ORIN_JETPACK_6 = (
    "04-18-2026 09:08:28 RAM 4093/30596MB (lfb 7x4MB) SWAP 0/15298MB (cached 0MB) CPU [9%@2188,4%@2188] "
    "EMC_FREQ 2%@2133 GR3D_FREQ 25%@[1377] CPU@49C GPU@48.281C VDD_GPU_SOC 6429mW/6429mW VDD_CPU_CV 1235mW/1235mW"
)
ORIN_NANO = (
    "RAM 3347/7467MB (lfb 896x4MB) SWAP 0/3733MB (cached 0MB) CPU [21%@1190,19%@1190] EMC_FREQ 13%@2133 "
    "GR3D_FREQ 61% APE 150 MTS fg 0% bg 0% NVDLA0 OFF VIC 0%@115 MSENC OFF OFA OFF "
    "VDD_IN 5336/4970 VDD_CPU_GPU_CV 2617/2336 VDD_SOC 1478/1318 CV0@-256C GPU@49.2C thermal@50.187C"
)
THOR = (
    "07-31-2026 14:45:55 RAM 86905/125772MB (lfb 368x4MB) CPU [12%@972,10%@972,off,33%@1890] cpu@39.812C tj@39.906C "
    "soc012@38.812C gpu@39.906C VDD_GPU 3561mW/3561mW VDD_CPU_SOC_MSS 7910mW/7910mW VIN_SYS_5V0 7620mW/7620mW "
    "VIN 26686mW/26686mW"
)
NOT_LOCKED = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
Online CPUs: 0-1
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=729600 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=1190400 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=69
NV Power Mode: 25W
"""
LOCKED = """cpu0: Online=1 Governor=schedutil MinFreq=1479000 MaxFreq=1479000 CurrentFreq=1479000 IdleStates: WFI=0 c7=0
cpu3: Online=0 Governor=schedutil MinFreq=921600 MaxFreq=1479000 CurrentFreq=921600 IdleStates: WFI=0 c7=0
GPU MinFreq=921600000 MaxFreq=921600000 CurrentFreq=921600000
EMC MinFreq=204000000 MaxFreq=1600000000 CurrentFreq=1600000000 FreqOverride=1
Fan: PWM=0
NV Power Mode: MAXN
"""
ACCELERATORS = """DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1369600000 CurrentFreq=1369600000
DLA0_FALCON: Online=1 MinFreq=0 MaxFreq=729600000 CurrentFreq=729600000
DLA1_CORE:   Online=1 MinFreq=0 MaxFreq=1369600000 CurrentFreq=1369600000
DLA1_FALCON: Online=1 MinFreq=0 MaxFreq=729600000 CurrentFreq=729600000
PVA0_VPS0: Online=1 MinFreq=0 MaxFreq=512000000 CurrentFreq=512000000
PVA0_AXI:  Online=1 MinFreq=0 MaxFreq=358400000 CurrentFreq=358400000
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=48
NV Power Mode: MODE_30W
"""
AGX_ORIN_NOT_LOCKED = f"""SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
Online CPUs: 0-7
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1420800 IdleStates: WFI=1 c7=1
cpu8:  Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=612000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=0
{ACCELERATORS}"""
AGX_ORIN_LOCKED = f"""SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
Online CPUs: 0-7
cpu0:  Online=1 Governor=schedutil MinFreq=1728000 MaxFreq=1728000 CurrentFreq=1728000 IdleStates: WFI=0 c7=0
cpu8:  Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 IdleStates: WFI=0 c7=0
GPU MinFreq=612000000 MaxFreq=612000000 CurrentFreq=612000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1
{ACCELERATORS}"""
"""The same board, a moment later: what it says of DLA and PVA has not changed."""
THOR_LOCKED = """cpu13: Governor=schedutil MinFreq=2601000 MaxFreq=2601000 CurrentFreq=2601000 IdleStates: WFI=0 cc7=0
gpu-gpc-0 MinFreq=1575000000 MaxFreq=1575000000 CurrentFreq=1575000000
gpu-nvd-0 MinFreq=1692000000 MaxFreq=1692000000 CurrentFreq=1692000000
EMC MinFreq=665600000 MaxFreq=4266000000 CurrentFreq=4266000000 FreqOverride=1
PVA0_VPS0: Online=0 MinFreq=0 MaxFreq=1215000000 CurrentFreq=1215000000
"""


def test_tegrastats_of_orin_and_thor() -> None:
    seven, six, nano, thor = map(tegrastats, (AGX_ORIN_JETPACK_7, AGX_ORIN_JETPACK_6, ORIN_NANO, THOR))
    assert seven is not None
    assert (seven.gpu_percent, seven.gpu_mhz) == (12, (1300, 1290))
    assert (seven.memory_percent, seven.memory_mhz) == (3, 3199)
    assert (seven.cpu_percent, seven.cpu_mhz) == ((23, 10, 4), (2201, 2201, 2201))
    assert seven.celsius == {"cpu": 52.968, "soc2": 48.406, "gpu": 47.625}
    assert seven.milliwatts == {"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500}
    assert six is not None
    assert (six.gpu_mhz, six.celsius["gpu"], six.milliwatts["VDD_CPU_CV"]) == ((1377,), 48.281, 1235)
    assert nano is not None
    assert (nano.gpu_percent, nano.gpu_mhz) == (61, ())
    assert nano.milliwatts == {"VDD_IN": 5336, "VDD_CPU_GPU_CV": 2617, "VDD_SOC": 1478}
    assert "cv0" not in nano.celsius, "-256 C is a sensor that sleeps"
    assert thor is not None
    assert (thor.gpu_percent, thor.gpu_mhz, thor.memory_mhz) == (None, (), None)
    assert thor.milliwatts["VIN"] == 26686
    assert tegrastats("sh: tegrastats: not found") is None


def test_gpu_clocks_without_a_load_and_without_a_list() -> None:
    thor, old = (tegrastats(f"RAM 1/2MB {gpu} APE 150") for gpu in ("GR3D_FREQ @[1000,990]", "GR3D_FREQ 10%@1300"))
    assert thor is not None
    assert old is not None
    assert (thor.gpu_percent, thor.gpu_mhz) == (None, (1000, 990))
    assert (old.gpu_percent, old.gpu_mhz) == (10, (1300,))


def test_many_lines_are_summed_up() -> None:
    found = summary([AGX_ORIN_JETPACK_7, "", AGX_ORIN_JETPACK_6])
    assert found.lines == 2
    assert found.gpu_mhz == (1300, 1377)
    assert found.memory_mhz == (2133, 3199)
    assert found.cpu_mhz == (2188, 2201)
    assert found.hottest_c == 52.968
    assert found.mean_watts["VDD_GPU_SOC"] == pytest.approx((5.139 + 6.429) / 2)
    nothing = summary([])
    assert (nothing.lines, nothing.gpu_mhz, nothing.hottest_c, nothing.mean_watts) == (0, None, None, {})


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", "MAXN"),
        ("NVPM VERB: Current mode: NV Power Mode: MODE_15W_6CORE\n2\n", "MODE_15W_6CORE"),
        ("NV Fan Mode:quiet\nNV Power Mode: MAXN_SUPER\n2", "MAXN_SUPER"),
        ("", None),
    ],
)
def test_power_modes(text: str, mode: str | None) -> None:
    assert power_mode(text) == mode


def test_locked_clocks() -> None:
    assert clocks_locked(NOT_LOCKED) is False
    assert clocks_locked(LOCKED) is True
    assert clocks_locked(LOCKED.replace("FreqOverride=1", "FreqOverride=0")) is False, "the memory's clock moves"
    assert clocks_locked(LOCKED.replace("Online=0", "Online=1")) is False, "only a core that is off may differ"
    assert clocks_locked("gpu-gpc-0 MinFreq=1575000000 MaxFreq=1575000000 CurrentFreq=1575000000") is True
    assert clocks_locked("Error: Run this script as a root user") is None


def test_accelerators_that_no_engine_uses_do_not_unlock_a_locked_board() -> None:
    assert clocks_locked(AGX_ORIN_LOCKED) is True
    assert clocks_locked(AGX_ORIN_NOT_LOCKED) is False
    assert clocks_locked(THOR_LOCKED) is True
    for held, free in (("=1728000 Max", "=729600 Max"), ("=612000000 Max", "=306000000 Max"), ("ride=1", "ride=0")):
        assert clocks_locked(AGX_ORIN_LOCKED.replace(held, free)) is False, held
    assert clocks_locked(THOR_LOCKED.replace("MinFreq=1575000000", "MinFreq=315000000")) is False
    assert clocks_locked(ACCELERATORS) is None


def test_tools_that_are_not_there_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert said_by("nvpmodel", "-q") == ""
    with Tegrastats() as watch:
        pass
    assert watch.summary is None


def test_tegrastats_runs_beside_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that prints a recorded line ten times a second until it is ended, as the tool does."""
    tool = tmp_path / "tegrastats"
    tool.write_text(f'#!/bin/sh\ntest "$1" = --interval || exit 1\nwhile true; do echo "{THOR}"; sleep 0.05; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with Tegrastats(50) as watch:
        pass
    assert watch.summary is not None
    assert watch.summary.lines >= 1
    assert watch.summary.mean_watts["VIN"] == pytest.approx(26.686)
