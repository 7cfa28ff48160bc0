"""Says whether a measurement is to be trusted, and what to do if not: from readings of the machine between its rounds.

One number decides: :data:`WANTED`, the smallest difference that one wants to see. What can move a time by more than
that is a *concern*, and the measurement is not to be trusted; what only makes it hard to repeat is a *note*.

The readings are taken between timed parts, never inside (:class:`Watch`), so they cannot disturb them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device.moedge_sensors import Gpu, Machine, Reading, Settings
else:  # in an archive the files lie side by side
    from moedge_sensors import Gpu, Machine, Reading, Settings

WANTED = 0.05
"""The smallest difference that one wants to see, as a share: what a gate on slow-downs usually asks for."""
_Z95 = 1.96
_MEDIAN = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, for normal errors and many rounds."""
_TREND_Z = 2.576
"""Normal quantile of 99 %, two-sided: a trend of rounds that chance shows once in a hundred runs is no trend."""
_ROUNDS_FOR_A_TREND = 8
_JETSON_CLOCKS = "sudo jetson_clocks"


@dataclass(frozen=True)
class Spread:
    """How much the rounds of one engine differ."""

    label: str
    metric: str
    cv: float
    """Coefficient of variation of the rounds' medians."""
    resolution: float
    """Smallest difference to another run that can be told, as a share; see :func:`resolution`."""


@dataclass(frozen=True)
class Concern:
    """Something that can move the times by more than :data:`WANTED`."""

    kind: str
    says: str
    """What was seen, how much of it, and what to do: whole sentences."""


@dataclass(frozen=True)
class Verdict:
    """What the guard found. JSON-ready through :meth:`document`."""

    trusted: bool
    concerns: list[Concern]
    notes: list[str]
    """What makes the measurement hard to repeat elsewhere."""
    settings: Settings
    spread: list[Spread]
    drift: float | None
    """Change of the times from the first round to the last, as a share; None with fewer rounds than 8."""
    seconds: float
    """From the first reading to the last."""
    readings: int
    reading_ms: float
    """Mean cost of one reading. They are taken between timed parts."""
    own_cores: float | None
    others_cores: float | None
    """Cores' worth of time that other programs took."""
    stolen_cores: float | None
    """The same, taken by a virtual machine's host."""
    held_back_s: float | None
    mhz: tuple[float, float] | None
    """Least and greatest clock of the fastest core, right after an engine's turn."""
    throttled: int | None
    hottest_c: float | None
    gpu_mhz: tuple[float, float] | None
    gpu_reasons: list[str] = field(default_factory=list)
    wanted: float = WANTED

    def document(self) -> dict[str, Any]:
        """Return the entry of results, as JSON holds it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return found


def resolution(cv: float, rounds: int) -> float:
    """Smallest difference between the medians of two such runs that a 95 % interval excludes, as a share.

    ``1.96 * sqrt(2) * sqrt(pi/2) * cv / sqrt(rounds)``: two independent medians of ``rounds`` normal values.
    """
    return _Z95 * math.sqrt(2) * _MEDIAN * cv / math.sqrt(rounds)


def rounds_needed(cv: float, wanted: float = WANTED) -> int:
    """Rounds after which :func:`resolution` is ``wanted``."""
    return math.ceil((_Z95 * math.sqrt(2) * _MEDIAN * cv / wanted) ** 2)


def spreads(rounds: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Spread]:
    """Spread of each engine and metric; ``rounds`` label -> metric -> milliseconds of each round, at least two."""
    found = []
    for label, metrics in rounds.items():
        for metric, values in metrics.items():
            if len(values) > 1:
                cv = float(np.std(values, ddof=1) / np.mean(values))
                found.append(Spread(label, metric, cv, resolution(cv, len(values))))
    return found


def drift(rounds: Mapping[str, Mapping[str, Sequence[float]]]) -> float | None:
    """Change from the first round to the last that all engines share, as a share; 0 where there is no trend.

    A trend is a rank correlation (Spearman) of round and time that chance gives once in a hundred runs; its size is the
    median slope between any two rounds (Theil and Sen). None with fewer than 8 rounds.
    """
    series = [np.asarray(values, np.float64) for metrics in rounds.values() for values in metrics.values()]
    if not series or len(series[0]) < _ROUNDS_FOR_A_TREND:
        return None
    common = np.exp(np.mean([np.log(values / np.median(values)) for values in series], axis=0))
    count = len(common)
    rank = np.argsort(np.argsort(common, kind="stable"), kind="stable")
    correlation = np.corrcoef(rank, np.arange(count))[0, 1]
    if abs(correlation) * math.sqrt(count - 1) < _TREND_Z:
        return 0.0
    first, second = np.triu_indices(count, 1)
    return float(np.median((common[second] - common[first]) / (second - first)) * (count - 1))


def judge(
    readings: Sequence[Reading],
    settings: Settings,
    rounds: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    threads: int | None,
    jetson: bool = False,
    reading_ms: float = 0.0,
) -> Verdict:
    """Judge a measurement.

    Args:
        readings: before the first round, and after each engine's turn.
        settings: of the machine.
        rounds: label -> metric -> milliseconds of each round.
        threads: of an engine on the CPU; None: the work is on a GPU, so what cores do hardly matters.
        jetson: the machine is one, so clocks are held with its own tool.
        reading_ms: mean cost of a reading.
    """
    seen = _Seen.of(readings)
    found = spreads(rounds)
    trend = drift(rounds)
    concerns = [
        *_of_spread(found, rounds),
        *_of_drift(trend),
        *(_of_cores(seen, settings, threads) if threads else []),
        *_of_heat(seen),
        *_of_clocks(seen, settings, on_gpu=threads is None, jetson=jetson),
    ]
    return Verdict(
        trusted=not concerns,
        concerns=concerns,
        notes=_notes(settings, threads, jetson=jetson),
        settings=settings,
        spread=found,
        drift=trend,
        seconds=seen.seconds,
        readings=len(readings),
        reading_ms=reading_ms,
        own_cores=seen.own,
        others_cores=seen.others,
        stolen_cores=seen.stolen,
        held_back_s=seen.held_back,
        mhz=seen.mhz,
        throttled=seen.throttled,
        hottest_c=seen.hottest,
        gpu_mhz=seen.gpu_mhz,
        gpu_reasons=list(seen.gpu_reasons),
    )


@dataclass(frozen=True)
class _Seen:
    """Readings, summed up."""

    seconds: float
    own: float | None
    others: float | None
    stolen: float | None
    held_back: float | None
    throttled: int | None
    mhz: tuple[float, float] | None
    hottest: float | None
    slowed: tuple[str, ...]
    gpu_mhz: tuple[float, float] | None
    gpu_reasons: tuple[str, ...]

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> _Seen:
        first, last = readings[0], readings[-1]
        seconds = last.at - first.at
        busy, stolen, held, throttled = (
            _grown(getattr(first, name), getattr(last, name))
            for name in ("busy_s", "stolen_s", "held_back_s", "throttled")
        )
        own = last.own_s - first.own_s
        over = seconds or float("inf")
        turns = readings[1:]  # the first is taken before anything has run
        gpus = [reading.gpu for reading in turns if reading.gpu]
        return cls(
            seconds=seconds,
            own=own / over,
            others=None if busy is None else max(0.0, busy - own) / over,  # both are counted in steps of 10 ms
            stolen=None if stolen is None else stolen / over,
            held_back=held,
            throttled=None if throttled is None else int(throttled),
            mhz=_range([max(reading.mhz) for reading in turns if reading.mhz]),
            hottest=max(
                (
                    *(value for reading in readings for value in reading.celsius.values()),
                    *(gpu.celsius for gpu in gpus if gpu.celsius is not None),
                ),
                default=None,
            ),
            slowed=tuple(dict.fromkeys(name for reading in turns for name in reading.slowed)),
            gpu_mhz=_range([gpu.mhz for gpu in gpus if gpu.mhz]),
            gpu_reasons=tuple(dict.fromkeys(reason for gpu in gpus for reason in gpu.reasons)),
        )


def _grown(before: float | None, now: float | None) -> float | None:
    return None if before is None or now is None else now - before


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None


def _of_spread(found: list[Spread], rounds: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Concern]:
    """The least certain engine speaks for all."""
    worst = max(found, key=lambda spread: spread.resolution, default=None)
    if worst is None or worst.resolution <= WANTED:
        return []
    what = {"ttft_ms": "first token", "tpot_ms": "time per token"}.get(worst.metric, worst.metric)
    count = len(rounds[worst.label][worst.metric])
    return [
        Concern(
            "spread",
            f"The rounds of {worst.label} vary ({what}, coefficient of variation {worst.cv:.1%}): with {count} rounds "
            f"a difference to another run below {worst.resolution:.0%} cannot be told. Take {rounds_needed(worst.cv)} "
            "rounds (--repeats), or a quieter machine. Ratios within this run are paired by round and hold better.",
        )
    ]


def _of_drift(trend: float | None) -> list[Concern]:
    if trend is None or abs(trend) <= WANTED:
        return []
    way, cause = (
        ("slower", "Heat, or another program that grows: let the machine cool, and give it more warm-up rounds.")
        if trend > 0
        else ("faster", "It was not warm yet: give it more warm-up rounds.")
    )
    return [Concern("drift", f"The rounds get {way}, by {abs(trend):.0%} from the first to the last. {cause}")]


def _of_cores(seen: _Seen, settings: Settings, threads: int) -> list[Concern]:
    """Other programs, the host of a virtual machine, a container's quota.

    A step waits for its slowest thread. So what another program takes of a core that an engine needs delays, at worst,
    the whole step by that share of its time; cores that nobody needs may be taken.
    """
    found = []
    usable = settings.usable_cores
    if seen.others is not None and seen.others > WANTED and seen.others + threads > settings.cores + WANTED:
        found.append(
            Concern(
                "others",
                f"Other programs took {seen.others:.2f} cores' worth of time while the rounds ran, and the engine's "
                f"{threads} threads need {'them' if threads >= settings.cores else 'some of them'} "
                f"({settings.cores} cores): close them, or measure with fewer threads (--threads).",
            )
        )
    if seen.stolen is not None and seen.stolen > WANTED:
        found.append(
            Concern(
                "stolen",
                f"The host of this virtual machine took {seen.stolen:.2f} cores' worth of time away (steal in "
                "/proc/stat): measure on a machine of your own, or take more rounds at another hour.",
            )
        )
    if seen.held_back is not None and seen.held_back > WANTED * seen.seconds:
        found.append(
            Concern(
                "quota",
                f"The container's quota was used up and its threads were held back for {seen.held_back:.1f} of "
                f"{seen.seconds:.0f} s: give it whole cores (docker --cpuset-cpus), not a share of time (--cpus).",
            )
        )
    if threads > usable + WANTED:
        found.append(
            Concern(
                "threads",
                f"{threads} threads share {usable:g} cores, so they wait for each other: measure with --threads "
                f"{max(1, int(usable))}.",
            )
        )
    return found


def _of_heat(seen: _Seen) -> list[Concern]:
    found = []
    if seen.throttled:
        found.append(
            Concern(
                "throttled",
                f"The processor slowed itself down {seen.throttled} times for heat or power while the rounds ran: cool "
                "it, or measure at a lower fixed clock that it can hold.",
            )
        )
    if seen.slowed:
        found.append(
            Concern(
                "heat",
                f"The machine was hot enough to slow down ({', '.join(seen.slowed)}): cool it, or choose a power mode "
                "that it can hold.",
            )
        )
    hot = [reason for reason in seen.gpu_reasons if reason != "power limit"]
    if hot:
        found.append(
            Concern("gpu-slowdown", f"The GPU slowed itself down ({', '.join(hot)}): cool it, and check its supply.")
        )
    return found


def _of_clocks(seen: _Seen, settings: Settings, *, on_gpu: bool, jetson: bool) -> list[Concern]:
    found = []
    if not on_gpu and seen.mhz and _apart(seen.mhz):
        governor = f" (governor {', '.join(settings.governors)})" if settings.governors else ""
        found.append(
            Concern(
                "clock",
                f"The processor's clock moved between {seen.mhz[0]:.0f} and {seen.mhz[1]:.0f} MHz{governor}: hold it, "
                f"such as with: {_JETSON_CLOCKS if jetson else 'sudo cpupower frequency-set -g performance'}.",
            )
        )
    if on_gpu and seen.gpu_mhz and _apart(seen.gpu_mhz):
        why = f" ({', '.join(seen.gpu_reasons)})" if seen.gpu_reasons else ""
        found.append(
            Concern(
                "gpu-clock",
                f"The GPU's clock moved between {seen.gpu_mhz[0]:.0f} and {seen.gpu_mhz[1]:.0f} MHz{why}: lock it, "
                f"with: {_JETSON_CLOCKS if jetson else 'sudo nvidia-smi --lock-gpu-clocks=MHZ'}.",
            )
        )
    return found


def _apart(span: tuple[float, float]) -> bool:
    return span[1] > (1 + WANTED) * span[0]


def _notes(settings: Settings, threads: int | None, *, jetson: bool) -> list[str]:
    """What another run should know: settings that make machines differ, without harm within this run."""
    notes = []
    if settings.power_mode and not settings.power_mode.upper().startswith(("MAXN", "PERFORMANCE")):
        notes.append(f"The power mode is {settings.power_mode}; figures of others are mostly of the greatest one.")
    if jetson and settings.clocks_locked is False:  # elsewhere clocks are hardly ever locked
        notes.append(f"The clocks are not locked ({_JETSON_CLOCKS}).")
    if threads and settings.physical_cores and threads > settings.physical_cores:
        notes.append(
            f"{threads} threads on {settings.physical_cores} physical cores: two of them share a core's arithmetic."
        )
    return notes


class Watch:
    """Takes the readings of one measurement, between its timed parts.

    Args:
        machine: what to read.
        gpu: reads the GPU's clocks (:meth:`moedge_nvml.Nvml.read`), for engines that run there.
        power_mode: where a Jetson's tool told it (``nvpmodel``).
    """

    def __init__(
        self, machine: Machine | None = None, *, gpu: Callable[[], Gpu] | None = None, power_mode: str | None = None
    ) -> None:
        self._machine, self._gpu = machine or Machine(), gpu
        self.settings = self._machine.settings(power_mode)
        self._jetson = power_mode is not None or self._machine.jetson
        self.readings: list[Reading] = []
        self._spent = 0.0

    def read(self) -> None:
        """Take a reading: before the first round that counts, and after each turn of an engine."""
        start = time.perf_counter()
        self.readings.append(self._machine.read(self._gpu() if self._gpu else None))
        self._spent += time.perf_counter() - start

    def judge(
        self, rounds: Mapping[str, Mapping[str, Sequence[float]]], threads: int | None, *, since: int = 0
    ) -> Verdict:
        """Judge what was measured after the first ``since`` turns, which were warm-up; see :func:`judge`."""
        cost = 1e3 * self._spent / len(self.readings)
        readings = self.readings[since:]
        return judge(readings, self.settings, rounds, threads=threads, jetson=self._jetson, reading_ms=cost)
