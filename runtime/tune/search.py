"""Which share of the FFN weights to read: predicted by a model of one number, tried, and predicted again.

Speed. A decode step of the dense parent takes the time T, of which its FFNs take the part f (profiled). Reading the
share s of their weights saves ``f e (1 - s)`` of it, where e is how much of the saved bytes becomes saved time: 1 for
the first prediction, then what the nearest try gave. So the speed-up is ``1 / (1 - f e (1 - s))``.

Loss. KL to the dense parent (and the logarithm of the perplexity ratio) grows as ``c (1 - s)^p``: c from the nearest
try, p from the two nearest ones, and :data:`POWER` while there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moedge import MoEdgeError

Kind = Literal["speedup", "kl", "ratio"]
LEAST, MOST = 0.2, 0.98
"""Shares that are tried: below, this method is no longer the one to take; above, there is nothing to win."""
POWER = 2.5
"""Growth of the loss in what is left out, before two tries say otherwise: between .85 and .5 on SmolLM2-135M."""
SPEED_SLACK, LOSS_SLACK = 0.03, 0.1
"""A try ends the search when it reaches the goal and is beyond it by no more than this part."""
_SMALL = 1e-5


@dataclass(frozen=True)
class Goal:
    """What is asked for: at least a ``speedup`` of decoding, or at most a ``kl`` or perplexity ``ratio``."""

    kind: Kind
    limit: float

    def __post_init__(self) -> None:
        least = {"speedup": 1.0, "kl": 0.0, "ratio": 1.0}[self.kind]
        if not (self.limit > least and math.isfinite(self.limit)):
            words = {"speedup": "--speedup", "kl": "--max-kl", "ratio": "--max-ratio"}[self.kind]
            raise MoEdgeError(f"{words} {self.limit:g} asks for nothing; give a number above {least:g}.")

    def reached(self, value: float) -> bool:
        """Whether a measured value is what was asked for."""
        return value >= self.limit if self.kind == "speedup" else value <= self.limit

    def close(self, value: float) -> bool:
        """Whether it is reached, with so little to spare that another try is not worth its time."""
        if self.kind == "speedup":
            return self.limit <= value <= self.limit * (1 + SPEED_SLACK)
        loss, limit = self.loss(value), self.loss(self.limit)
        return (1 - LOSS_SLACK) * limit <= loss <= limit

    def loss(self, value: float) -> float:
        """The value as a loss in nats, which grows as a power of what is left out; never 0."""
        return max(math.log(value) if self.kind == "ratio" else value, _SMALL)


@dataclass(frozen=True)
class Try:
    """One share, and what was predicted and measured of the goal."""

    share: float
    predicted: float | None
    value: float


def first_speed_share(goal: Goal, part: float) -> float:
    """Return the share that the profile predicts for a wanted speed-up; ``part``: of a step that the FFNs take.

    Raises:
        MoEdgeError: not even reading :data:`LEAST` of the weights would do.
    """
    most = speed_at(LEAST, part, 1.0)
    if goal.limit > most:
        raise MoEdgeError(
            f"--speedup {goal.limit:g} is out of reach: the FFNs take {part:.0%} of a decode step on this target, "
            f"so reading {LEAST:.0%} of their weights gives {most:.2f} times at best; ask for less."
        )
    return _speed_share(goal.limit, part, 1.0)


def speed_at(share: float, part: float, kept: float) -> float:
    """Return the speed-up at a share where ``kept`` of the saved bytes becomes saved time."""
    return 1 / (1 - min(part * kept * (1 - share), 0.95))


def _speed_share(limit: float, part: float, kept: float) -> float:
    return _within(1 - (1 - 1 / limit) / (part * kept))


def next_share(goal: Goal, tries: list[Try], part: float) -> tuple[float, float]:
    """Return the share to try next and the value that is predicted there.

    Args:
        goal: what is asked for.
        tries: at least one.
        part: of a decode step that the FFNs take; only a speed-up reads it.
    """
    if goal.kind == "speedup":
        nearest = min(tries, key=lambda one: abs(one.value - goal.limit))
        saved = 1 - 1 / nearest.value
        kept = min(max(saved / (part * (1 - nearest.share)), 0.1), 2.0)
        # Aimed at the middle of what ends the search.
        share = _speed_share(goal.limit * (1 + SPEED_SLACK / 2), part, kept)
        return share, speed_at(share, part, kept)
    near = sorted(tries, key=lambda one: abs(math.log(goal.loss(one.value) / goal.loss(goal.limit))))
    power = POWER
    if len(near) > 1 and near[0].share != near[1].share:
        up = math.log(goal.loss(near[0].value) / goal.loss(near[1].value))
        power = min(max(up / math.log((1 - near[0].share) / (1 - near[1].share)), 0.5), 6.0)
    wanted = goal.loss(goal.limit) * (1 - LOSS_SLACK / 2)
    left_out = (1 - near[0].share) * (wanted / goal.loss(near[0].value)) ** (1 / power)
    share = _within(1 - left_out)
    loss = goal.loss(near[0].value) * ((1 - share) / (1 - near[0].share)) ** power
    return share, math.exp(loss) if goal.kind == "ratio" else loss


def _within(share: float) -> float:
    return round(min(max(share, LEAST), MOST), 3)


def search(
    goal: Goal, first: tuple[float, float | None], measure: Callable[[float], float], part: float, tries: int
) -> list[Try]:
    """Try shares until one is close to the goal, nothing new is predicted, or ``tries`` are spent.

    Args:
        goal: what is asked for.
        first: the first share, and what is predicted there if anything is.
        measure: share -> the measured value of the goal.
        part: see :func:`next_share`.
        tries: at most so many.
    """
    done: list[Try] = []
    share, predicted = first
    while len(done) < tries and share not in {one.share for one in done}:
        done.append(Try(share, predicted, measure(share)))
        if goal.close(done[-1].value):
            break
        share, predicted = next_share(goal, done, part)
    return done


def best(goal: Goal, done: list[Try]) -> Try:
    """Return the try to keep: of those that reach the goal the one that costs least, else the nearest to it."""
    there = [one for one in done if goal.reached(one.value)]
    if goal.kind == "speedup":
        return max(there, key=lambda one: one.share) if there else max(done, key=lambda one: one.value)
    return min(there, key=lambda one: one.share) if there else min(done, key=lambda one: one.value)
