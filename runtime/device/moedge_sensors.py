"""What Linux tells of the machine while something is timed: other programs, clocks, heat, a container's quota.

Everything is read from ``/proc`` and ``/sys`` in well under a millisecond and without privileges. What a machine does
not tell (a virtual machine has no clocks, macOS has neither folder) is None or empty: "not told", never zero.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path("/")
_TICKS = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0
_PASSIVE = ("passive", "active_passive")
_JETSON_GPUS = ("*.g*", "gpu-gpc-*")
"""Names under devfreq: ``17000000.gpu`` or ``.ga10b`` (Orin and older), ``gpu-gpc-0`` (Thor)."""


@dataclass(frozen=True)
class Gpu:
    """What NVML, or a Jetson's ``/sys``, tells of the GPU at one moment."""

    mhz: float | None = None
    """Of the multiprocessors."""
    memory_mhz: float | None = None
    celsius: float | None = None
    reasons: tuple[str, ...] = ()
    """Why its clocks are lower than they could be (:data:`moedge_nvml.REASONS`)."""


@dataclass(frozen=True)
class Reading:
    """The machine at one moment. Counters grow from boot; only their differences mean something."""

    at: float
    """Seconds of a clock that never goes back."""
    own_s: float
    """Core-seconds of this process."""
    busy_s: float | None = None
    """Core-seconds of all programs, the kernel included."""
    stolen_s: float | None = None
    """Core-seconds that a virtual machine wanted and its host gave to others."""
    mhz: tuple[float, ...] = ()
    """Clock of each core now."""
    throttled: int | None = None
    """Times that cores were slowed down by heat or power (x86)."""
    held_back_s: float | None = None
    """Seconds in which a container's quota was used up."""
    celsius: dict[str, float] = field(default_factory=dict)
    """By thermal zone."""
    slowed: tuple[str, ...] = ()
    """Thermal zones at or above the point where the system slows down, and alarms that say so (Jetson)."""
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Settings:
    """How the machine is set up. Equal from the first round to the last."""

    cores: int
    """That this process may run on."""
    physical_cores: int | None = None
    """Of those, without the second threads of a core."""
    quota_cores: float | None = None
    """Cores' worth of time that a container may use; None: no limit, or not told."""
    governors: tuple[str, ...] = ()
    max_mhz: float | None = None
    boost: bool | None = None
    """Whether clocks above the nominal one are allowed."""
    virtual: bool | None = None
    """Whether this is a virtual machine, whose host may give its cores to others."""
    load_average: float | None = None
    """Programs that ran or waited, mean of the last minute, before the measurement."""
    power_mode: str | None = None
    """A Jetson's (``nvpmodel``), elsewhere the firmware's platform profile (ACPI)."""
    clocks_locked: bool | None = None
    """Whether least and greatest clock are set equal (``jetson_clocks``)."""

    @property
    def usable_cores(self) -> float:
        """Cores' worth of time that this process can get at most."""
        return min(float(self.cores), self.quota_cores or float(self.cores))


def cpu_seconds(stat: str, cores: Collection[int], ticks: float = _TICKS) -> tuple[float, float] | None:
    """Busy and stolen seconds of ``cores`` from the text of ``/proc/stat`` (proc(5)); None where none of them is in it.

    Only of the cores that this process may use: in a container the file shows those of the whole machine. Guests' time
    is part of user's. Waiting for a disk is idle.
    """
    found = []
    for line in stat.splitlines():
        name, *fields = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores and len(fields) >= 8:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) / ticks for value in fields[:8])
            found.append((user + nice + system + irq + softirq, steal))
    return (sum(busy for busy, _ in found), sum(stolen for _, stolen in found)) if found else None


def quota(group: str, root: Path = ROOT) -> tuple[float | None, float | None]:
    """Cores' worth of time that control groups allow, and seconds held back so far, of ``/proc/self/cgroup``'s text.

    The tightest limit on the way up counts (``cpu.max``; version 1: ``cpu.cfs_quota_us``), and what it held back.
    """
    cores: float | None = None
    held: float | None = None
    for folder in _groups(group, root):
        found = _limit(folder)
        seconds = _held_back(folder)
        if found is not None and (cores is None or found < cores):
            cores, held = found, seconds
        elif cores is None and held is None:
            held = seconds
    return cores, held


def memory_left(root: Path = ROOT) -> float | None:
    """Bytes that control groups leave to this process; None: no limit, or not told.

    The tightest limit on the way up counts (``memory.max``; version 1: ``memory.limit_in_bytes``). What the kernel
    keeps of files is given back when it is needed, so it counts as left.
    """
    left = []
    for folder in _groups(_text(root / "proc/self/cgroup") or "", root, "memory"):
        for limit, usage, of_all in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
            most, used = _number(folder / f"memory.{limit}"), _number(folder / f"memory.{usage}")
            if most is not None and used is not None:
                stat = dict(line.partition(" ")[::2] for line in (_text(folder / "memory.stat") or "").splitlines())
                files = (stat.get(f"{of_all}{kind}_file", "0") for kind in ("active", "inactive"))
                left.append(most - used + sum(map(float, files)))
    return min(left, default=None)


def _groups(group: str, root: Path, controller: str = "cpu") -> Iterator[Path]:
    """Folders of the control groups that this process is in, up to the top."""
    top = root / "sys/fs/cgroup"
    for line in group.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = top / controllers if controllers else top
        if controllers and not base.is_dir():
            base = top / controller
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:length])


def _limit(folder: Path) -> float | None:
    if text := _text(folder / "cpu.max"):
        most, period = (*text.split(), "100000")[:2]
        return None if most == "max" else int(most) / int(period)
    most_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return most_us / period_us if most_us and period_us and most_us > 0 else None


def _held_back(folder: Path) -> float | None:
    for line in (_text(folder / "cpu.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("throttled_usec", "throttled_time"):
            return int(value) / (1e6 if name == "throttled_usec" else 1e9)
    return None


class Machine:
    """Reads one machine. ``root`` is ``/``; a test gives a folder with recorded files."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"), key=lambda path: int(path.name[3:]))
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self._cpus = [path for path in cpus if root != ROOT or int(path.name[3:]) in allowed]
        self._allowed = {int(path.name[3:]) for path in self._cpus} if root != ROOT and self._cpus else allowed
        self._clocks = [path / "cpufreq/scaling_cur_freq" for path in self._cpus]
        self._zones = sorted((root / "sys/class/thermal").glob("thermal_zone[0-9]*"))
        self._alarms = [
            path
            for path in sorted((root / "sys/class/thermal").glob("cooling_device[0-9]*"))
            if (_text(path / "type") or "").endswith("-throttle-alert")
        ]
        self._group = _text(root / "proc/self/cgroup") or ""
        self._names = {zone: _text(zone / "type") or zone.name for zone in self._zones}
        self._trips = {zone: _trip(zone) for zone in self._zones}
        gpus = (path for name in _JETSON_GPUS for path in sorted((root / "sys/class/devfreq").glob(name)))
        self._gpu = next(gpus, None)
        self.jetson = "nvidia,tegra" in (_text(root / "proc/device-tree/compatible") or "")
        """Whether this is a Jetson, whichever board its module is on."""

    def settings(self, power_mode: str | None = None) -> Settings:
        """Read how the machine is set up; ``power_mode`` where somebody else told it (``nvpmodel``)."""
        root, cpus = self._root, self._cpus
        siblings = {_text(path / "topology/thread_siblings_list") for path in cpus}
        flags = _text(root / "proc/cpuinfo") or ""
        clocks = [_number(path / "cpufreq/cpuinfo_max_freq") for path in cpus]
        governors = {_text(path / "cpufreq/scaling_governor") for path in cpus}
        load = (_text(root / "proc/loadavg") or "").split()
        return Settings(
            cores=len(self._allowed),
            physical_cores=len(siblings) if siblings and None not in siblings else None,
            quota_cores=quota(self._group, root)[0],
            governors=tuple(sorted(name for name in governors if name)),
            max_mhz=max((clock / 1e3 for clock in clocks if clock), default=None),
            boost=self._boost(),
            virtual=" hypervisor" in flags if flags else None,
            load_average=float(load[0]) if load else None,
            power_mode=power_mode or _text(root / "sys/firmware/acpi/platform_profile"),
            clocks_locked=self._locked(),
        )

    def read(self, gpu: Gpu | None = None) -> Reading:
        """Read everything that changes; ``gpu`` where somebody else read it (NVML), which ``/sys`` completes."""
        busy = cpu_seconds(_text(self._root / "proc/stat") or "", self._allowed)
        clocks = [_number(path) for path in self._clocks]
        counts = [
            _number(path / f"thermal_throttle/{name}_throttle_count")
            for path in self._cpus
            for name in ("core", "package")
        ]
        celsius = self._celsius()
        return Reading(
            at=time.monotonic(),
            own_s=time.process_time(),
            busy_s=busy[0] if busy else None,
            stolen_s=busy[1] if busy else None,
            mhz=tuple(clock / 1e3 for clock in clocks if clock),
            throttled=int(sum(count for count in counts if count)) if any(c is not None for c in counts) else None,
            held_back_s=quota(self._group, self._root)[1],
            celsius={self._names[zone]: value for zone, value in celsius.items()},
            slowed=self._slowed(celsius),
            gpu=_completed(gpu, self._jetson_gpu()),
        )

    def _celsius(self) -> dict[Path, float]:
        found = {zone: _number(zone / "temp") for zone in self._zones}
        return {zone: value / 1e3 for zone, value in found.items() if value is not None and value > 0}

    def _slowed(self, celsius: dict[Path, float]) -> tuple[str, ...]:
        hot = [
            f"{self._names[zone]} at {value:.0f} C"
            for zone, value in celsius.items()
            if (trip := self._trips[zone]) is not None and value >= trip
        ]
        return (*hot, *(_text(path / "type") or "" for path in self._alarms if _number(path / "cur_state")))

    def _boost(self) -> bool | None:
        if (barred := _number(self._root / "sys/devices/system/cpu/intel_pstate/no_turbo")) is not None:
            return not barred
        allowed = _number(self._root / "sys/devices/system/cpu/cpufreq/boost")
        return None if allowed is None else bool(allowed)

    def _locked(self) -> bool | None:
        limits = [
            (_number(path / "cpufreq/scaling_min_freq"), _number(path / "cpufreq/scaling_max_freq"))
            for path in self._cpus
        ]
        if self._gpu is not None:
            limits.append((_number(self._gpu / "min_freq"), _number(self._gpu / "max_freq")))
        told = [(low, high) for low, high in limits if low is not None and high is not None]
        return all(low == high for low, high in told) if told else None

    def _jetson_gpu(self) -> Gpu | None:
        clock = _number(self._gpu / "cur_freq") if self._gpu is not None else None
        return None if clock is None else Gpu(mhz=clock / 1e6)


def _completed(told: Gpu | None, own: Gpu | None) -> Gpu | None:
    """What NVML told; from ``/sys`` what it did not, for on a Jetson it starts and then answers next to nothing."""
    if told is None or own is None:
        return told or own
    return replace(told, **{name: value for name, value in vars(own).items() if getattr(told, name) is None})


def _trip(zone: Path) -> float | None:
    """Degrees Celsius from which on the system slows down on account of a thermal zone."""
    points = [
        _number(path.with_name(path.name.replace("_type", "_temp")))
        for path in zone.glob("trip_point_*_type")
        if (_text(path) or "") in _PASSIVE
    ]
    return min((point / 1e3 for point in points if point and point > 0), default=None)


def _text(path: Path) -> str | None:
    """Content of a small file; None where it is missing, locked or refuses to be read, as sleeping sensors do."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
