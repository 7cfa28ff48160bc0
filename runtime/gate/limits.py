"""Limits of one's own: ``--fail-if "ttft.p99 > 800ms"``.

``[label:] metric[.statistic] operator value[unit]`` says when a result is a failure. Metrics are ttft, tpot (p50, p90,
p99 or mean, the median by default) and load, in us, ms or s; peak_rss in MiB, GiB, MB or GB; tokens/s of decoding.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from moedge import MoEdgeError
from moedge.runtime.bench.results import EngineEntry, Row
from moedge.runtime.bench.stats import rounds_needed
from moedge.runtime.parity.verdict import Outcome

_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"MiB": 1.0, "GiB": 1024.0, "MB": 1e6 / 2**20, "GB": 1e9 / 2**20}
_UNITS: dict[str, dict[str, float]] = {
    "ttft": _TIME,
    "tpot": _TIME,
    "load": _TIME,
    "peak_rss": _BYTES,
    "tokens/s": {"": 1.0},
}
"""Metric -> unit -> what it is of the unit that results are in (ms, MiB)."""
_STATISTICS: dict[str, tuple[str, ...]] = {
    "ttft": ("p50", "p90", "p99", "mean"),
    "tpot": ("p50", "p90", "p99", "mean"),
    "tokens/s": ("p50",),
}
_GRAMMAR = re.compile(
    r"(?:(?P<label>.+):)?\s*(?P<metric>[a-z_/]+)(?:\.(?P<statistic>\w+))?\s*(?P<operator>[<>]=?)\s*"
    r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*"
)

Measured = tuple[float, float | None, float | None]
"""A value and the ends of its interval; None where an end is not known."""
EXAMPLE = '"ttft.p99 > 800ms"'


@dataclass(frozen=True)
class Limit:
    """What makes a result a failure.

    Args:
        text: as it was given.
        label: of the engine that it holds for; None: all.
        value: in ms, MiB or tokens a second; ``unit`` is the given one, ``scale`` what it is of those.
    """

    text: str
    label: str | None
    metric: str
    statistic: Literal["p50", "p90", "p99", "mean"]
    operator: Literal["<", "<=", ">", ">="]
    value: float
    unit: str
    scale: float

    def outcome(self, low: float | None, high: float | None) -> Outcome:
        """A failure if all of the interval is beyond the limit, passed if nothing of it is; None is not known."""
        found = {self._beyond(-math.inf if low is None else low), self._beyond(math.inf if high is None else high)}
        return Outcome.NOT_DECIDED if len(found) == 2 else Outcome.FAILED if True in found else Outcome.PASSED

    def _beyond(self, value: float) -> bool:
        if self.operator.startswith(">"):
            return value > self.value or (self.operator == ">=" and value == self.value)
        return value < self.value or (self.operator == "<=" and value == self.value)

    def measured(self, row: Row, engine: EngineEntry, batch: int) -> Measured | None:
        """Return the value and its interval (equal to it where it was measured once); None where it was not."""
        if self.metric in ("ttft", "tpot"):
            times = row["ttft_ms"] if self.metric == "ttft" else row["tpot_ms"]
            low, high = times["ci95"] if self.statistic == "p50" else times["ci95_of"][self.statistic]
            return times[self.statistic], low, high
        if self.metric == "tokens/s":
            low, high = row["tpot_ms"]["ci95"]
            slowest, fastest = (None if end is None else 1e3 * batch / end for end in (high, low))
            return row["decode_tokens_per_s"], slowest, fastest
        found = engine["peak_rss_mib"] if self.metric == "peak_rss" else engine["load_s"]
        if found is None:
            return None
        once = found * (1e3 if self.metric == "load" else 1.0)
        return once, once, once

    def rounds_needed(self) -> int:
        """Rounds from which on both ends of its interval are known."""
        return 2 if self.statistic == "mean" else rounds_needed(float(self.statistic[1:]) / 100)

    def shown(self, value: float) -> str:
        """The value in the given unit."""
        digits = max(0, 3 - math.ceil(math.log10(max(abs(value / self.scale), 1e-9))))
        return f"{value / self.scale:.{min(digits, 6)}f} {self.unit or self.metric}"


def parse(text: str) -> Limit:
    """Read one expression.

    Raises:
        MoEdgeError: what is wrong with it, and what is allowed there.
    """
    found = _GRAMMAR.fullmatch(text.strip())
    if not found:
        raise MoEdgeError(
            f"--fail-if {text!r} is not [label:] metric[.statistic] operator value[unit], such as {EXAMPLE}; operators "
            f"are >, >=, <, <=, metrics are {', '.join(_UNITS)}."
        )
    metric, statistic, unit = found["metric"], found["statistic"], found["unit"]
    if metric not in _UNITS:
        raise MoEdgeError(f"--fail-if {text!r} has no metric {metric!r}; metrics are {', '.join(_UNITS)}.")
    known = _STATISTICS.get(metric, ())
    if statistic is not None and statistic not in known:
        allowed = f"{', '.join(known)} are" if known else "none is"
        raise MoEdgeError(f"--fail-if {text!r} asks for {statistic!r} of {metric}; {allowed} there.")
    units = _UNITS[metric]
    if unit not in units:
        needed = f"one of {', '.join(units)}" if units.keys() != {""} else "no unit"
        raise MoEdgeError(f"--fail-if {text!r}: {metric} takes {needed}, not {unit or 'none'!r}.")
    return Limit(
        text=text.strip(),
        label=found["label"].strip() if found["label"] else None,
        metric=metric,
        statistic=statistic or "p50",  # type: ignore[arg-type]  # one of those that are known
        operator=found["operator"],  # type: ignore[arg-type]  # the pattern allows these four
        value=float(found["value"]) * units[unit],
        unit=unit,
        scale=units[unit],
    )
