"""What Linux tells of a machine is read as it is written there: recorded files of a laptop, a server, containers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moedge.runtime.device import moedge_nvml
from moedge.runtime.device.moedge_guard import Watch
from moedge.runtime.device.moedge_sensors import Gpu, Machine, cpu_seconds, memory_left, quota

STAT = """cpu  27573 6 2901 48706 443 21 153 139 900 0
cpu0 7573 1 901 18706 143 20 53 39 0 0
cpu1 8000 2 1000 15000 100 1 50 29 900 0
cpu10 12000 3 1000 15000 200 0 50 71 0 0
intr 181030 0 0
"""


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def laptop(root: Path) -> Path:
    """Two cores with two threads each, the second core at 90 C."""
    files: dict[str, object] = {
        "proc/stat": STAT,
        "proc/loadavg": "1.03 0.52 0.21 2/101 6534",
        "proc/cpuinfo": "flags\t\t: fpu vme avx2\n",
        "proc/self/cgroup": "0::/user.slice/app.scope",
        "sys/fs/cgroup/user.slice/cpu.max": "150000 100000",
        "sys/fs/cgroup/user.slice/cpu.stat": "usage_usec 5\nthrottled_usec 250000",
        "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000",
        "sys/devices/system/cpu/intel_pstate/no_turbo": 1,
        "sys/firmware/acpi/platform_profile": "low-power",
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp",
        "sys/class/thermal/thermal_zone0/temp": 90000,
        "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive",
        "sys/class/thermal/thermal_zone0/trip_point_0_temp": 90000,
        "sys/class/thermal/thermal_zone1/type": "acpitz",
        "sys/class/thermal/thermal_zone1/temp": 40000,
        "sys/class/thermal/thermal_zone1/trip_point_0_type": "critical",
        "sys/class/thermal/thermal_zone1/trip_point_0_temp": 20000,
    }
    for cpu in range(4):
        at = f"sys/devices/system/cpu/cpu{cpu}"
        files |= {
            f"{at}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}",
            f"{at}/cpufreq/scaling_cur_freq": 1_000_000 + 100_000 * cpu,
            f"{at}/cpufreq/scaling_min_freq": 400_000,
            f"{at}/cpufreq/scaling_max_freq": 4_000_000,
            f"{at}/cpufreq/cpuinfo_max_freq": 4_000_000,
            f"{at}/cpufreq/scaling_governor": "powersave",
            f"{at}/thermal_throttle/core_throttle_count": cpu,
            f"{at}/thermal_throttle/package_throttle_count": 10,
        }
    return write(root, files)


def orin(root: Path) -> Path:
    """A Jetson: no throttle counters, alarms instead, a GPU under devfreq, locked clocks, a sensor that sleeps."""
    return write(
        root,
        {
            "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 1_510_400,
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": 1_510_400,
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 1_510_400,
            "sys/class/devfreq/17000000.gpu/cur_freq": 624_750_000,
            "sys/class/devfreq/17000000.gpu/min_freq": 624_750_000,
            "sys/class/devfreq/17000000.gpu/max_freq": 624_750_000,
            "sys/class/thermal/thermal_zone0/type": "gpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": -256000,
            "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
            "sys/class/thermal/cooling_device1/cur_state": 1,
            "sys/class/thermal/cooling_device2/type": "cpu-throttle-alert",
            "sys/class/thermal/cooling_device2/cur_state": 0,
            "sys/class/thermal/cooling_device3/type": "pwm-fan",
            "sys/class/thermal/cooling_device3/cur_state": 3,
        },
    )


class NotSupported:
    """An NVML that starts, and whose every query is NVML_ERROR_NOT_SUPPORTED."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 3


def test_busy_time_is_what_is_neither_idle_nor_stolen_of_the_cores_that_we_may_use() -> None:
    first, second = (7573 + 1 + 901 + 20 + 53) / 100, (8000 + 2 + 1000 + 1 + 50) / 100
    assert cpu_seconds(STAT, {0}, 100.0) == (pytest.approx(first), 0.39)
    assert cpu_seconds(STAT, {0, 1}, 100.0) == (pytest.approx(first + second), pytest.approx(0.68))
    assert cpu_seconds(STAT, {5}, 100.0) is None
    assert cpu_seconds("", {0}, 100.0) is None
    assert cpu_seconds("cpu0  1 2 3", {0}, 100.0) is None


def test_a_laptop_is_read(tmp_path: Path) -> None:
    machine = Machine(laptop(tmp_path))
    settings, reading = machine.settings(), machine.read()
    assert (settings.cores, settings.physical_cores) == (4, 2)
    assert (settings.quota_cores, settings.usable_cores) == (1.5, 1.5)
    assert (settings.governors, settings.max_mhz, settings.boost) == (("powersave",), 4000, False)
    assert (settings.virtual, settings.load_average, settings.power_mode) == (False, 1.03, "low-power")
    assert settings.clocks_locked is False
    assert reading.mhz == (1000, 1100, 1200, 1300)
    assert reading.throttled == 0 + 1 + 2 + 3 + 4 * 10
    assert reading.held_back_s == 0.25
    assert reading.celsius == {"x86_pkg_temp": 90, "acpitz": 40}
    assert reading.slowed == ("x86_pkg_temp at 90 C",), "a critical point is where it turns off, not where it slows"
    assert reading.gpu is None


def test_a_jetson_is_read(tmp_path: Path) -> None:
    machine = Machine(orin(tmp_path))
    reading = machine.read()
    assert reading.gpu == Gpu(mhz=624.75)
    assert reading.celsius == {}
    assert reading.slowed == ("gpu-throttle-alert",)
    assert reading.throttled is None
    assert machine.settings("MAXN").power_mode == "MAXN"
    assert machine.settings().clocks_locked is True
    (tmp_path / "sys/class/devfreq/17000000.gpu/min_freq").write_text("306000000")
    assert machine.settings().clocks_locked is False


def test_a_jetson_whose_nvml_starts_and_answers_nothing_tells_its_clock_in_sys(tmp_path: Path) -> None:
    """As on JetPack 6 and 7; the clock moves between 306 and 1300.5 MHz, those of an AGX Orin."""
    machine = Machine(orin(tmp_path))
    nvml = object.__new__(moedge_nvml.Nvml)
    nvml._handle, nvml._lib = None, NotSupported()
    assert nvml.read() == Gpu()
    assert machine.read(nvml.read()).gpu == Gpu(mhz=624.75)
    whole = Gpu(mhz=1000, celsius=50, reasons=("power limit",))
    assert machine.read(whole).gpu == whole, "what NVML tells stays"
    assert machine.read(Gpu(celsius=50)).gpu == Gpu(mhz=624.75, celsius=50)

    watch = Watch(machine, gpu=nvml.read)
    for clock in (306_000_000, 1_300_500_000, 306_000_000):
        (tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq").write_text(str(clock))
        watch.read()
    found = watch.judge({"moe": {"tpot_ms": [10.0, 10.0]}}, None)
    assert found.gpu_mhz == (306, 1300.5)
    assert "gpu-clock" in [concern.kind for concern in found.concerns]


def test_a_laptop_with_a_platform_profile_is_told_nothing_of_a_jetsons_tools(tmp_path: Path) -> None:
    """Both have clocks that are not locked; a Jetson without nvpmodel (in a container) tells no mode, and is one."""
    freed = {"sys/class/devfreq/17000000.gpu/min_freq": 306_000_000}
    notes = []
    for machine in (Machine(laptop(tmp_path / "laptop")), Machine(write(orin(tmp_path / "orin"), freed))):
        watch = Watch(machine)
        watch.read()
        watch.read()
        notes.append(watch.judge({"moe": {"tpot_ms": [10.0, 10.0]}}, None).notes)
    assert notes == [
        ["The power mode is low-power; figures of others are mostly of the greatest one."],
        ["The clocks are not locked (sudo jetson_clocks)."],
    ]


def test_the_gpu_of_a_thor_has_another_name_in_sys(tmp_path: Path) -> None:
    """Its other clock there, ``gpu-nvd-0``, is that of the video units; names and 1575 MHz were recorded on one."""
    for name, clock in (("bwmgr", 4266), ("gpu-gpc-0", 1575), ("gpu-nvd-0", 1692)):
        freqs = {f"sys/class/devfreq/{name}/{end}_freq": clock * 10**6 for end in ("cur", "min", "max")}
        write(tmp_path, freqs)
    machine = Machine(tmp_path)
    assert machine.read(Gpu()).gpu == Gpu(mhz=1575)
    assert machine.settings().clocks_locked is True
    (tmp_path / "sys/class/devfreq/gpu-gpc-0/min_freq").write_text("315000000")
    assert machine.settings().clocks_locked is False


def test_a_machine_that_tells_nothing_is_none_not_zero(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    settings, reading = machine.settings(), machine.read()
    assert settings.cores >= 1
    told = (settings.physical_cores, settings.quota_cores, settings.max_mhz, settings.boost, settings.virtual)
    assert told == (None,) * 5
    assert (settings.load_average, settings.power_mode, settings.clocks_locked) == (None, None, None)
    assert (reading.busy_s, reading.stolen_s, reading.throttled, reading.held_back_s) == (None,) * 4
    assert (reading.mhz, reading.celsius, reading.slowed, reading.gpu) == ((), {}, (), None)


def test_this_machine_is_read_in_a_moment() -> None:
    machine = Machine()
    first, second = machine.read(), machine.read()
    assert second.at >= first.at
    assert second.at - first.at < 0.5
    assert machine.settings().cores >= 1


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {}, (None, None)),
        ("0::/", {"cpu.max": "200000 100000", "cpu.stat": "throttled_usec 7000000"}, (2.0, 7.0)),
        ("0::/", {"cpu.max": "max 100000", "cpu.stat": "throttled_usec 0"}, (None, 0.0)),
        # The tightest of nested limits, and what that one held back.
        (
            "0::/a/b",
            {"a/cpu.max": "50000 100000", "a/cpu.stat": "throttled_usec 1", "a/b/cpu.max": "80000 100000"},
            (0.5, 1e-6),
        ),
        ("0::/a/b", {"a/cpu.max": "80000 100000", "a/b/cpu.max": "50000 100000"}, (0.5, None)),
        # Version 1: microseconds of a period, nanoseconds held back.
        (
            "4:memory:/x\n3:cpu,cpuacct:/docker/1",
            {
                "cpu,cpuacct/docker/1/cpu.cfs_quota_us": 150000,
                "cpu,cpuacct/docker/1/cpu.cfs_period_us": 100000,
                "cpu,cpuacct/docker/1/cpu.stat": "nr_periods 3\nthrottled_time 2000000000",
            },
            (1.5, 2.0),
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, (None, None)),
        # A path that leads out of the folder is not followed.
        ("0::/../../etc", {"cpu.max": "100000 100000"}, (1.0, None)),
    ],
)
def test_quotas_of_containers(
    tmp_path: Path, group: str, files: dict[str, object], expected: tuple[float | None, float | None]
) -> None:
    write(tmp_path / "sys/fs/cgroup", files)
    assert quota(group, tmp_path) == expected


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {}, None),
        ("0::/a", {"a/memory.max": "max", "a/memory.current": 5}, None),
        ("0::/a", {"a/memory.max": 100, "a/memory.current": 30}, 70),
        # Of the files that are kept nothing has to stay; shared memory, which counts as one of them, has.
        (
            "0::/a",
            {
                "a/memory.max": 100,
                "a/memory.current": 30,
                "a/memory.stat": "anon 5\nfile 25\nshmem 5\ninactive_file 12\nactive_file 8",
            },
            90,
        ),
        # The tightest limit on the way up counts.
        (
            "0::/a/b",
            {"a/memory.max": 50, "a/memory.current": 30, "a/b/memory.max": 100, "a/b/memory.current": 10},
            20,
        ),
        (
            "4:memory:/x\n3:cpu,cpuacct:/y",
            {
                "memory/x/memory.limit_in_bytes": 1000,
                "memory/x/memory.usage_in_bytes": 400,
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20",
                "memory/memory.limit_in_bytes": 9223372036854771712,
                "memory/memory.usage_in_bytes": 5000,
                "cpu,cpuacct/y/memory.max": 1,
                "cpu,cpuacct/y/memory.current": 1,
            },
            650,
        ),
    ],
)
def test_memory_of_containers(tmp_path: Path, group: str, files: dict[str, object], expected: float | None) -> None:
    write(tmp_path / "sys/fs/cgroup", files)
    write(tmp_path, {"proc/self/cgroup": group})
    assert memory_left(tmp_path) == expected


@pytest.mark.parametrize(("failed", "said"), [(0, "NVIDIA L4"), (3, None)])
def test_a_gpu_has_a_name(failed: int, said: str | None) -> None:
    """Times of two GPUs of one host are not one engine's."""

    def query(handle: Any, text: Any, size: int) -> int:
        text.value = b"NVIDIA L4"
        assert size == len(text)
        return failed

    nvml = object.__new__(moedge_nvml.Nvml)
    nvml._handle, nvml._lib = None, SimpleNamespace(nvmlDeviceGetName=query)
    assert nvml.name() == said
