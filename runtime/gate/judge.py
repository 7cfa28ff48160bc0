"""Judge a benchmark: against an older result, against an older engine in the same run, against limits of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.bench.points import Point
from moedge.runtime.bench.results import METRICS, Bench, EngineEntry, Gate, GateCheck, Metric, PointResult, Row
from moedge.runtime.bench.stats import between
from moedge.runtime.gate.limits import Limit, Measured
from moedge.runtime.gate.slowdown import CONFIDENCE, Slowdown, slowdown
from moedge.runtime.parity.verdict import Outcome

_TIMES = {"ttft_ms": "time to first token", "tpot_ms": "time per token"}


@dataclass(frozen=True)
class _Pair:
    """One time of one engine at one point, now and before. ``old`` is None where both are in the same rounds."""

    label: str
    point: PointResult
    metric: Metric
    new: np.ndarray
    old: np.ndarray | None
    control: str | None


def judge(
    result: Bench,
    *,
    baseline: Bench | None = None,
    against: Mapping[str, str] | None = None,
    max_slowdown: float = 0.05,
    limits: Sequence[Limit] = (),
) -> Gate:
    """Judge a benchmark.

    Args:
        result: the new one.
        baseline: an older one: engines of the same label at the same points are compared.
        against: label -> label of the older engine that was timed beside it.
        max_slowdown: share of the time; a slow-down as large as this must not pass.
        limits: that no engine may break.

    Raises:
        MoEdgeError: the baseline is from another machine or has nothing in common with the result, or a limit names an
            engine that is not there.
    """
    pairs = list(_beside(result, against or {}))
    notes: list[str] = []
    if baseline is not None:
        found, notes = _compared(result, baseline)
        pairs += found
    checks = [_slow(pair, max_slowdown, len(pairs)) for pair in pairs]
    checks += [check for limit in limits for check in _beyond(result, limit)]
    outcome = Outcome.over(Outcome(check["outcome"]) for check in checks)
    return {"outcome": outcome.value, "confidence": CONFIDENCE, "checks": checks, "notes": notes}


def _beside(result: Bench, against: Mapping[str, str]) -> Iterator[_Pair]:
    """Engines that were timed in the same rounds as their older ones."""
    for point in result["points"]:
        rows = {row["label"]: row for row in point["rows"]}
        for label, old in against.items():
            for metric in METRICS:
                yield _Pair(label, point, metric, _logs(rows[label], metric, rows[old]), None, None)


def _compared(result: Bench, baseline: Bench) -> tuple[list[_Pair], list[str]]:
    """The engines that two runs have in common, and what must be said of the rest.

    An engine that others are compared by, and that has none to be compared by itself, is not judged: it did not change.
    """
    _same_machine(result, baseline)
    check_common(result["engines"], baseline)
    both = [label for label in result["engines"] if label in baseline["engines"]]
    otherwise = {label: words for label in both if (words := _otherwise(label, result, baseline))}
    both = [label for label in both if label not in otherwise]
    controls = {label: _control(label, result, baseline) for label in both}
    only = [label for label, control in controls.items() if control is None and label in controls.values()]
    pairs = list(_since(result, baseline, {label: controls[label] for label in both if label not in only}))
    if not pairs:
        raise MoEdgeError(next(iter(otherwise.values()), None) or _nothing_common(baseline))
    notes = list(otherwise.values())
    notes += [f"{label} did not change; others are compared by it, and it is not judged" for label in only]
    return pairs, [*_left_out(result, baseline), *notes]


def _since(result: Bench, baseline: Bench, controls: Mapping[str, str | None]) -> Iterator[_Pair]:
    """Engines of two runs, each over its control in its run where there is one."""
    before = {_key(point): point for point in baseline["points"]}
    for point in result["points"]:
        if (then := before.get(_key(point))) is None:
            continue
        new, old = ({row["label"]: row for row in one["rows"]} for one in (point, then))
        for label, control in controls.items():
            for metric in METRICS:
                samples = [_logs(rows[label], metric, rows[control] if control else None) for rows in (new, old)]
                yield _Pair(label, point, metric, samples[0], samples[1], control)


def _key(point: PointResult) -> tuple[int | None, ...]:
    return point["prompt"], point["decode"], point["batch"], point["depth"], point["threads"]


def _logs(row: Row, metric: Metric, control: Row | None) -> np.ndarray:
    """Log of the time of each round, over the control's in the same round."""
    logs = np.log(np.array(row["rounds"][metric]))
    return np.asarray(logs - np.log(np.array(control["rounds"][metric])) if control else logs)


def _control(label: str, result: Bench, baseline: Bench) -> str | None:
    """The engine that did not change between two runs and is most like ``label``: the dense parent before any other."""

    def same(other: str) -> bool:
        one, two = result["engines"][other], baseline["engines"].get(other)
        if other == label or two is None or one["sha256"] is None or one["sha256"] != two["sha256"]:
            return False
        return all(one["info"][fact] == two["info"][fact] for fact in ("runtime", "device", "dtype", "threads"))

    def likeness(other: str) -> tuple[bool, bool, bool]:
        mine, its = result["engines"][label]["info"], result["engines"][other]["info"]
        dense = not (its["model"].get("moe") or its["model"].get("gathered"))
        return (
            mine["device"] == its["device"] and mine["runtime"] == its["runtime"],
            dense,
            mine["dtype"] == its["dtype"],
        )

    return max((other for other in result["engines"] if same(other)), key=likeness, default=None)


def _slow(pair: _Pair, limit: float, checks: int) -> GateCheck:
    """Judge one pair. Without a control a slow-down of the build looks like one of the machine: it is not decided."""
    found = slowdown(pair.new, pair.old, checks)
    outcome = found.outcome(limit)
    uncontrolled = pair.old is not None and pair.control is None
    if uncontrolled and outcome is Outcome.FAILED:
        outcome = Outcome.NOT_DECIDED
    return {
        "kind": "slow-down",
        "label": pair.label,
        "point": words(pair.point),
        "what": pair.metric,
        "value": found.value,
        "interval": [found.low, found.high] if np.isfinite(found.high) else None,
        "limit": limit,
        "control": pair.control,
        "outcome": outcome.value,
        "sentence": _said(pair, found, limit, outcome, uncontrolled),
    }


def words(point: PointResult) -> str:
    """The point in words."""
    return Point(*_key(point)).words()  # type: ignore[arg-type]  # the fields of a point, in their order


def _said(pair: _Pair, found: Slowdown, limit: float, outcome: Outcome, uncontrolled: bool) -> str:
    """What came out, and where nothing was decided what to do."""
    way = "slower" if found.value >= 0 else "faster"
    how = "paired by round" if pair.old is None else f"beside {pair.control}" if pair.control else "no control"
    ends = "no interval from so few rounds" if not np.isfinite(found.high) else f"{found.low:+.1%} to {found.high:+.1%}"
    amount = f"{_TIMES[pair.metric]} {abs(found.value):.1%} {way} ({ends}, {how})"
    if outcome is Outcome.PASSED:
        return f"no regression: {amount}; {limit:.1%} or more is excluded"
    if outcome is Outcome.FAILED:
        return f"regression: {amount}; {limit:.1%} is not excluded"
    if uncontrolled and found.low > 0:
        return (
            f"cannot tell: {amount}, but nothing unchanged is in both runs, so the machine may be what is slower; time "
            "an unchanged engine beside it (the dense parent), or both builds in one run with --against"
        )
    return (
        f"cannot tell: {amount}; no change and {limit:.1%} are both possible, about {found.rounds_needed(limit)} "
        "rounds (--repeats) would tell"
    )


def check_label(limit: Limit, labels: Sequence[str]) -> None:
    """Refuse a limit of an engine that is not among those that are timed.

    Raises:
        MoEdgeError: it is not.
    """
    if limit.label is not None and limit.label not in labels:
        raise MoEdgeError(
            f"--fail-if {limit.text!r} names an engine that is not timed; there are: {', '.join(labels)}."
        )


def _beyond(result: Bench, limit: Limit) -> Iterator[GateCheck]:
    """Judge one limit at every point of every engine that it names."""
    labels = list(result["engines"])
    check_label(limit, labels)
    once = limit.metric in ("peak_rss", "load")  # measured at the first point alone
    for point in result["points"][: 1 if once else None]:
        for row in point["rows"]:
            if limit.label in (None, row["label"]):
                yield _within(row, point, result["engines"][row["label"]], limit)


def _within(row: Row, point: PointResult, engine: EngineEntry, limit: Limit) -> GateCheck:
    found = limit.measured(row, engine, point["batch"])
    outcome = Outcome.NOT_DECIDED if found is None else limit.outcome(*found[1:])
    return {
        "kind": "limit",
        "label": row["label"],
        "point": words(point),
        "what": limit.text,
        "value": None if found is None else found[0] / limit.scale,
        "interval": None if found is None else [None if end is None else end / limit.scale for end in found[1:]],
        "limit": limit.value / limit.scale,
        "control": None,
        "outcome": outcome.value,
        "sentence": _said_of(limit, found, outcome),
    }


def _said_of(limit: Limit, found: Measured | None, outcome: Outcome) -> str:
    if found is None:
        return f"cannot tell: {limit.metric} was not measured"
    value, low, high = (None if one is None else limit.shown(one) for one in found)
    once = low is not None and low == high
    amount = value if once else f"{value} (95 % interval: {between((low, high), '{}')})"
    if outcome is Outcome.NOT_DECIDED and None in found:
        return (
            f"cannot tell: {amount}; an end is not known, about {limit.rounds_needed()} rounds (--repeats) would tell"
        )
    if outcome is Outcome.NOT_DECIDED:
        return (
            f"cannot tell: {amount}; the limit lies in the interval, more rounds (--repeats, --min-duration) would tell"
        )
    return f"{'beyond the limit' if outcome is Outcome.FAILED else 'within the limit'}: {amount}"


def _same_machine(result: Bench, baseline: Bench) -> None:
    """Refuse a baseline of another machine: two engines gain differently from another processor."""
    for fact in ("processor", "logical_cores"):
        old, new = (one["machine"].get(fact) for one in (baseline, result))
        if old != new:
            raise MoEdgeError(
                f"The baseline was measured on another machine ({fact.replace('_', ' ')}: {old}, here {new}), with "
                "which nothing here can be compared; measure it again here, or give the old engine with --against."
            )


def _otherwise(label: str, result: Bench, baseline: Bench) -> str | None:
    """Why an engine of two runs is not compared: it ran on another device or with other threads.

    Its runtime and its type may be what was changed.
    """
    new, old = (one["engines"][label]["info"] for one in (result, baseline))
    changed = [f"{fact} {old[fact]}, here {new[fact]}" for fact in ("device", "threads") if old[fact] != new[fact]]
    if not changed:
        return None
    return f"{label} ran otherwise in the baseline ({'; '.join(changed)}) and is not compared; ask for the same"


def check_common(labels: Iterable[str], baseline: Bench) -> None:
    """Refuse a baseline none of whose engines is timed again.

    Raises:
        MoEdgeError: none is.
    """
    if not set(labels) & set(baseline["engines"]):
        there = ", ".join(baseline["engines"])
        raise MoEdgeError(f"The baseline has no engine of the same name; it has: {there}. Give a name with NAME=PATH.")


def _nothing_common(baseline: Bench) -> str:
    """Why nothing of engines that both have can be compared, and what to do."""
    points = "; ".join(words(point) for point in baseline["points"])
    return f"The baseline was timed at other points: {points}. Ask for the same ones."


def _left_out(result: Bench, baseline: Bench) -> list[str]:
    """What only one of two runs has, and what differs in what both have."""
    notes = []
    if gone := [label for label in baseline["engines"] if label not in result["engines"]]:
        notes.append(f"only the baseline has {', '.join(gone)}")
    if added := [label for label in result["engines"] if label not in baseline["engines"]]:
        notes.append(f"the baseline has no {', '.join(added)}")
    if (texts := [one.get("text") for one in (baseline, result)])[0] != texts[1]:
        notes.append(f"the baseline read {texts[0]}, not {texts[1]}")
    for label, engine in result["engines"].items():
        now, before = (one["info"]["dtype"] for one in (engine, baseline["engines"].get(label, engine)))
        if now != before:
            notes.append(f"{label} was {before} in the baseline and is {now}")
    there = {_key(point) for point in baseline["points"]}
    if missing := [words(point) for point in result["points"] if _key(point) not in there]:
        notes.append(f"the baseline was not timed at {'; '.join(missing)}")
    return notes
