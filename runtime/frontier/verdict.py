"""The verdict of a frontier: which variant has the lowest KL at equal measured decode speed, if that can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moedge.runtime.bench.stats import between
from moedge.runtime.frontier.schema import Estimate, Verdict

Compared = Callable[[str, str], bool]


def judge(
    where: str,
    level: float,
    kl: Mapping[str, Estimate],
    speed: Mapping[str, Estimate],
    *,
    as_fast: Compared,
    lower: Compared,
) -> Verdict:
    """Compare the variants that decode at least ``level`` times as fast as the dense parent.

    Where none does, the fastest variant is compared with those that are not shown to be slower than it.

    Args:
        where: the target, which starts the sentence.
        kl: to the dense parent; speed: of decoding, over the dense parent; both by label.
        as_fast: whether the first variant is not shown to be slower than the second.
        lower: whether the first one's KL is shown to be lower than the second's.
    """
    there = [label for label in speed if speed[label]["value"] >= level]
    reached = bool(there)
    fastest = max(speed, key=lambda label: speed[label]["value"])
    if not reached:
        there = [label for label in speed if as_fast(label, fastest)]
    there.sort(key=lambda label: kl[label]["value"])
    best, *others = there
    open_ones = [label for label in others if not lower(best, label)]

    def said(label: str) -> str:
        return f"{label} with {_words(kl[label], 3)} at {_words(speed[label], 2)} times"

    if reached:
        start = f"{where}: of what decodes at least {level:g} times as fast as the dense parent,"
    else:
        start = (
            f"{where}: nothing decodes {level:g} times as fast as the dense parent, the fastest is {fastest} at "
            f"{_words(speed[fastest], 2)} times; of what is as fast,"
        )
    if open_ones:
        end = f" it cannot be told which has the lowest KL: {', or '.join(map(said, (best, *open_ones)))}"
    elif others:
        end = f" the lowest KL has {said(best)}; next is {said(others[0])}"
    else:
        end = f" there is one alone: KL of {said(best)}"
    return {
        "speedup": level,
        "reached": reached,
        "winner": None if open_ones else best,
        "candidates": there,
        "sentence": f"{start}{end} (in brackets 95 % intervals).",
    }


def _words(found: Estimate, digits: int) -> str:
    """The value and its interval."""
    form = f"{{:.{digits}f}}"
    return f"{form.format(found['value'])} ({between(found['ci95'], form)})"
