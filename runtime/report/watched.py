"""What a benchmark found beside its times, in sentences: for a terminal, reports and devices alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moedge.runtime.bench.stats import rounds_needed

if TYPE_CHECKING:
    from moedge.runtime.bench.results import PointResult


class Sentence(NamedTuple):
    """What is said, and whether it is a reason not to trust the times."""

    text: str
    concern: bool = False


def sentences(point: PointResult) -> list[Sentence]:
    """Say what a conversion gained of what it could, what was not told, the joules, and what the guard found."""
    said: list[str] = []
    if found := point.get("headroom"):
        for gain in found["gains"]:
            said.append(
                f"{gain['label']}, {gain['phase']}: {gain['measured']:.2f} times {gain['dense']}'s speed, "
                f"{gain['reached']:.0%} of the ideal {gain['ideal']:.2f}."
            )
        for row in found["rows"]:
            if reason := row.get("reason"):
                said.append(f"{row['label']}: headroom not told, {reason}.")
    said += [*_energy(point), *unknown_tails(point)]
    guard = point.get("guard")
    return [*map(Sentence, said), *(_guarded(guard) if guard else ())]


def unknown_tails(point: PointResult) -> list[str]:
    """Say where the rounds are too few to know what a high percentile is at most."""
    rounds, least = point["rounds"], {"p90": rounds_needed(0.9), "p99": rounds_needed(0.99)}
    few = [f"{name} (it takes {needed})" for name, needed in least.items() if rounds < needed]
    return [f"{rounds} rounds do not tell what {' and '.join(few)} may be at most."] if few else []


def _energy(point: PointResult) -> list[str]:
    told, reasons = [], []
    for row in point["rows"]:
        energy = row.get("energy")
        if energy is None:
            continue
        if energy["joules_per_token"] is None:
            reasons.append(str(energy["reason"]))
        else:
            told.append(f"{row['label']} {energy['joules_per_token']:.3f} J a token ({energy['source']})")
    return [
        *([f"Energy: {', '.join(told)}."] if told else []),
        *(f"Energy not told: {r}." for r in dict.fromkeys(reasons)),
    ]


def lines(guard: Mapping[str, Any]) -> list[str]:
    """Say what the guard found, for people: the first line is the verdict."""
    return [sentence.text for sentence in _guarded(guard)]


def _guarded(guard: Mapping[str, Any]) -> list[Sentence]:
    seen = ", ".join(_told(guard))
    if guard["trusted"]:
        said = [Sentence(f"The measurement can be trusted: {seen}.")]
    else:
        first, *others = (concern["says"] for concern in guard["concerns"])
        said = [Sentence(f"NOT TO BE TRUSTED: {first}", concern=True)]
        said += [Sentence(one, concern=True) for one in others]
        said.append(Sentence(f"Seen: {seen}."))
    return [*said, *map(Sentence, guard["notes"])]


def _told(guard: Mapping[str, Any]) -> list[str]:
    """What was seen, and what the machine does not tell."""
    worst = max((spread["cv"] for spread in guard["spread"]), default=None)
    cores, hot = guard["others_cores"], guard["hottest_c"]
    clocks = [(name, guard[key]) for name, key in (("GPU clock", "gpu_mhz"), ("clock", "mhz")) if guard[key]]
    stolen = guard["stolen_cores"]
    return [
        "spread of rounds not told" if worst is None else f"rounds vary by at most {worst:.1%}",
        "other programs not told" if cores is None else f"other programs took {cores:.2f} cores",
        *([] if not stolen else [f"the host took {stolen:.2f}"]),
        *([f"{name} {low:.0f} to {high:.0f} MHz" for name, (low, high) in clocks] or ["clock not told"]),
        "heat not told" if hot is None else f"at most {hot:.0f} C",
    ]
