"""What a Jetson's own tools say: power mode (``nvpmodel``), locked clocks (``jetson_clocks``), ``tegrastats``.

The parsers are functions of text, tested on recorded output of Orin and Thor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

_TIMEOUT = 10.0
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW|/\d)")
_HEAT = re.compile(r"\b([A-Za-z][A-Za-z0-9_]*)@(-?[\d.]+)C")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?([\d,]+)\]?)?")
_MEMORY = re.compile(r"\bEMC_FREQ (\d+)%(?:@(\d+))?")
_CLOCK = re.compile(r"\s*(?:cpu\d+|GPU|gpu-\S+|EMC):?\s.*?MinFreq=(\d+) MaxFreq=(\d+)")
"""Those that an engine needs. DLA and PVA, where a board shows them, have MinFreq=0 however they are set."""


@dataclass(frozen=True)
class Stats:
    """One line of ``tegrastats``. What it does not hold is None or empty."""

    gpu_percent: float | None = None
    gpu_mhz: tuple[float, ...] = ()
    memory_percent: float | None = None
    """Of the memory's time that was busy (EMC)."""
    memory_mhz: float | None = None
    cpu_percent: tuple[float, ...] = ()
    cpu_mhz: tuple[float, ...] = ()
    celsius: dict[str, float] = field(default_factory=dict)
    milliwatts: dict[str, float] = field(default_factory=dict)
    """By rail, at the moment of the line; tegrastats shows rails to root only on some boards."""


def power_mode(text: str) -> str | None:
    """Return the name of the power mode from ``nvpmodel -q``, such as ``MAXN`` or ``15W``."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def l4t(text: str) -> str | None:
    """Return the version of Jetson Linux from ``/etc/nv_tegra_release``, such as ``36.4.7``."""
    found = re.search(r"# R(\d+).*?REVISION:\s*([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def clocks_locked(text: str) -> bool | None:
    """Whether the clocks of cores, GPU and memory are held at one value each, from ``jetson_clocks --show``.

    None where it prints none. The memory's (EMC) is mostly held by ``FreqOverride=1``, not by equal limits.
    """
    held = []
    for line in text.splitlines():
        if "Online=0" not in line and (found := _CLOCK.match(line)):
            held.append(found[1] == found[2] or "FreqOverride=1" in line)
    return all(held) if held else None


def tegrastats(line: str) -> Stats | None:
    """Read one line of ``tegrastats`` (JetPack 5 to 7, Orin and Thor); None where it is none."""
    if "RAM " not in line:
        return None
    cores = _CPU.search(line)
    loads = [part.split("%@") for part in cores[1].split(",") if "%@" in part] if cores else []
    gpu, memory = _GPU.search(line), _MEMORY.search(line)
    heat = {name.lower(): float(value) for name, value in _HEAT.findall(line)}
    return Stats(
        gpu_percent=_float(gpu[1]) if gpu else None,
        gpu_mhz=tuple(float(value) for value in (gpu[2] or "").split(",") if value) if gpu else (),
        memory_percent=_float(memory[1]) if memory else None,
        memory_mhz=_float(memory[2]) if memory else None,
        cpu_percent=tuple(float(load) for load, _ in loads),
        cpu_mhz=tuple(float(clock) for _, clock in loads),
        celsius={name: value for name, value in heat.items() if value > 0},  # a sensor that sleeps says -256
        milliwatts={name: float(now) for name, now in _RAIL.findall(line) if not name.endswith(("RAM", "SWAP"))},
    )


def _float(text: str | None) -> float | None:
    return float(text) if text else None


@dataclass(frozen=True)
class Summary:
    """What lines of ``tegrastats`` say together: least and greatest, and mean power of the rails."""

    lines: int
    gpu_mhz: tuple[float, float] | None
    memory_mhz: tuple[float, float] | None
    cpu_mhz: tuple[float, float] | None
    """Of the fastest core."""
    hottest_c: float | None
    mean_watts: dict[str, float]


def summary(lines: Iterable[str]) -> Summary:
    """Sum up the output of ``tegrastats``."""
    found = [stats for stats in map(tegrastats, lines) if stats is not None]
    rails: dict[str, list[float]] = {}
    for stats in found:
        for name, value in stats.milliwatts.items():
            rails.setdefault(name, []).append(value)
    return Summary(
        lines=len(found),
        gpu_mhz=_range([max(stats.gpu_mhz) for stats in found if stats.gpu_mhz]),
        memory_mhz=_range([stats.memory_mhz for stats in found if stats.memory_mhz is not None]),
        cpu_mhz=_range([max(stats.cpu_mhz) for stats in found if stats.cpu_mhz]),
        hottest_c=max((value for stats in found for value in stats.celsius.values()), default=None),
        mean_watts={name: sum(values) / len(values) / 1e3 for name, values in rails.items()},
    )


def _range(values: list[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None


def said_by(*command: str) -> str:
    """Output of a tool; empty where it is not installed, may not run or does not end."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


class Tegrastats:
    """``tegrastats`` in a process of its own while the block runs; writes to a file, so nothing waits for it."""

    def __init__(self, interval_ms: int = 100) -> None:
        self._command = ["tegrastats", "--interval", str(interval_ms)]
        self._process: subprocess.Popen[str] | None = None
        self._out: IO[str] | None = None
        self.summary: Summary | None = None
        """After the block; None where there is no ``tegrastats``."""

    def __enter__(self) -> Tegrastats:
        if shutil.which(self._command[0]) is not None:
            self._out = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            self._process = subprocess.Popen(
                self._command, stdout=self._out, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )
            time.sleep(0.2)  # its first line
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._out is None:
            return
        self._process.terminate()
        self._process.wait(_TIMEOUT)
        self._out.seek(0)
        self.summary = summary(self._out)
        self._out.close()
