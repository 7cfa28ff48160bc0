"""Energy counters of a machine: RAPL (processor and memory), NVML (a GPU's board), INA sensors (a Jetson's board).

A source tells joules since it was opened. RAPL and NVML count by themselves; a sensor of power is read ten times a
second by a thread and summed up. Nothing is subtracted: what the machine takes when idle is in every figure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING or __package__:
    from moedge.runtime.device.moedge_nvml import NoNvml, Nvml
else:  # in an archive the files lie side by side
    from moedge_nvml import NoNvml, Nvml

ROOT = Path("/")
_INTERVAL = 0.1  # seconds between readings of a sensor of power
_WHOLE = (("VIN",), ("VDD_IN",), ("POM_5V_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
"""Rails whose sum is what a Jetson takes, the best known first: Thor; Orin NX and Nano, Xavier NX; Nano; AGX Orin."""


class NotTold(Exception):
    """A machine does not tell its energy; says why, and what would help."""


class Source(Protocol):
    """Something that counts energy."""

    name: str
    """What it counts, for people."""

    def joules(self) -> float:
        """Joules since the source was opened.

        Raises:
            NotTold: it has stopped.
        """
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


class Rapl:
    """Processor packages, and memory where it is counted apart (``/sys/class/powercap``, Intel and AMD).

    Counters are microjoules up to ``max_energy_range_uj`` and then begin again with 0. That takes minutes (262 kJ at
    200 W: 22), so a counter that is read more often than that loses nothing.

    Raises:
        NotTold: there is none, or it may not be read.
    """

    def __init__(self, root: Path = ROOT) -> None:
        zones = [path for path in sorted((root / "sys/class/powercap").glob("intel-rapl:*")) if _counted(path)]
        if not zones:
            raise NotTold("this machine has no RAPL counters (/sys/class/powercap; virtual machines seldom have)")
        self._zones = {path: (_read(path / "energy_uj"), _read(path / "max_energy_range_uj")) for path in zones}
        names = sorted({(path / "name").read_text(encoding="utf-8").strip() for path in zones})
        self.name = f"RAPL ({', '.join(names)})"
        self._total = 0.0

    def joules(self) -> float:
        """Joules since the source was opened."""
        for path, (before, span) in self._zones.items():
            now = _read(path / "energy_uj")
            self._total += grown(before, now, span) / 1e6
            self._zones[path] = (now, span)
        return self._total

    def close(self) -> None:
        """Nothing to stop."""


def grown(before: int, now: int, span: int) -> int:
    """How far a counter came that begins again with 0 after ``span``."""
    return now - before if now >= before else now - before + span + 1


def _counted(zone: Path) -> bool:
    """Packages and their memory. ``core`` and ``uncore`` are parts of a package, ``psys`` holds packages."""
    try:
        name = (zone / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return name.startswith("package-") or name == "dram"


def _read(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise NotTold(f"{path} is for root only; allow it with: sudo chmod a+r {path}") from None
    except (OSError, ValueError) as error:
        raise NotTold(f"{path} cannot be read ({error})") from None


class Board:
    """A GPU's board by NVML, which renews its counter about ten times a second (Volta and newer).

    Raises:
        NotTold: there is no GPU, or it does not count.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        try:
            self._nvml = nvml or Nvml()
        except NoNvml as error:
            raise NotTold(str(error)) from None
        start = self._nvml.joules()
        if start is None:
            raise NotTold("this GPU has no energy counter (Volta and newer have)")
        self._start = start
        self.name = "NVML (GPU board)"

    def joules(self) -> float:
        """Joules since the source was opened."""
        now = self._nvml.joules()
        if now is None:
            raise NotTold("this GPU does not tell its energy any more")
        return now - self._start

    def close(self) -> None:
        """Let NVML go."""
        self._nvml.close()


class Sensor:
    """Power in watts, read by a thread and summed up; what lies between two readings is a trapezium."""

    def __init__(self, name: str, watts: Callable[[], float], interval: float = _INTERVAL) -> None:
        self.name, self._watts = name, watts
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._last, self._total = (time.monotonic(), watts()), 0.0
        self._thread = threading.Thread(target=self._sum, args=(interval,), daemon=True)
        self._thread.start()

    def _sum(self, interval: float) -> None:
        while not self._ended.wait(interval):
            self.joules()

    def joules(self) -> float:
        """Joules since the source was opened, up to now."""
        with self._lock:
            now, power = time.monotonic(), self._watts()
            before, last = self._last
            self._total += (now - before) * (last + power) / 2
            self._last = (now, power)
            return self._total

    def close(self) -> None:
        """Stop the thread."""
        self._ended.set()
        self._thread.join()


def rails(root: Path = ROOT) -> dict[str, tuple[Path, Path]]:
    """Return the power rails that a Jetson's INA3221 sensors measure: label -> files of millivolts and milliamperes.

    Their channels from 4 on are sums and voltages over shunts, no rails.
    """
    found = {}
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        number = label.name[len("in") : -len("_label")]
        volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        try:
            name = label.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if volts.is_file() and amperes.is_file() and "sum" not in name.lower():
            found[name] = (volts, amperes)
    return found


def whole_board(names: Mapping[str, object]) -> tuple[str, ...]:
    """Choose the rails whose sum is what the board takes, or as much of it as is measured; () where none is known."""
    for wanted in _WHOLE:
        if all(name in names for name in wanted):
            return wanted
    return tuple(name for name in ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0") if name in names)


def jetson(root: Path = ROOT) -> Sensor:
    """Open the INA sensors of a Jetson.

    Raises:
        NotTold: this is none, or they may not be read.
    """
    found = rails(root)
    chosen = whole_board(found)
    if not chosen:
        raise NotTold("this machine has no INA power sensors (/sys/class/hwmon)")

    def watts() -> float:
        return sum(_read(found[name][0]) * _read(found[name][1]) for name in chosen) / 1e6

    return Sensor(f"INA ({' + '.join(chosen)})", watts)


def open_source(*, gpu: bool, root: Path = ROOT) -> Source:
    """Open what counts the energy of engines on the GPU, or on the CPU.

    Raises:
        NotTold: nothing does; with every reason.
    """
    tries: list[Callable[[], Source]] = [lambda: jetson(root), lambda: Board() if gpu else Rapl(root)]
    said = []
    for attempt in tries:
        try:
            return attempt()
        except NotTold as error:
            said.append(str(error))
    raise NotTold("; ".join(reversed(said)))


class Meter:
    """The counter of one kind of engine (on the CPU, or on the GPU), or the reason why there is none."""

    def __init__(self, *, gpu: bool, opener: Callable[..., Source] = open_source) -> None:
        self.name: str | None = None
        """Of the counter, also after it has stopped; None where there was none."""
        self.reason: str | None = None
        self._source: Source | None = None
        try:
            self._source = opener(gpu=gpu)
        except NotTold as error:
            self.reason = str(error)
        else:
            self.name = self._source.name

    def joules(self) -> float | None:
        """Joules until now; None where the machine does not tell (any more)."""
        if self._source is None:
            return None
        try:
            return self._source.joules()
        except NotTold as error:
            self.close()
            self.reason = str(error)
            return None

    def close(self) -> None:
        """Stop counting."""
        if self._source is not None:
            self._source.close()
        self._source = None
