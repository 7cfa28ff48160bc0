"""Which share of the FFN weights to read: predicted by a model of one number, tried, and predicted again.

Speed. A decode step of the dense parent takes the time T, of which its FFNs take the part f (profiled). Reading the
share s of their weights saves ``f e (1 - s)`` of it, where e is how much of the saved bytes becomes saved time: 1 for
the first prediction, then what the nearest try gave. So the speed-up is ``1 / (1 - f e (1 - s))``. From two tries on
the part that is saved is a line through the two nearest, so that a cost that every share has is not taken for bytes. A
time for each token is the same wish in other words: the dense parent's over the speed-up.

Loss. KL to the dense parent (and the logarithm of the perplexity ratio) grows as ``c (1 - s)^p``: c from the nearest
try, p from the two nearest ones, and :data:`POWER` while there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moedge import MoEdgeError

Kind = Literal["speedup", "ms", "kl", "ratio"]
_WORDS: dict[Kind, tuple[str, float]] = {
    "speedup": ("--speedup", 1.0),
    "ms": ("--max-ms", 0.0),
    "kl": ("--max-kl", 0.0),
    "ratio": ("--max-ratio", 1.0),
}
"""How a goal is asked for, and below which number it asks for nothing."""
LEAST, MOST = 0.2, 0.98
"""Shares that are tried: below, this method is no longer the one to take; above, there is nothing to win."""
POWER = 2.5
"""Growth of the loss in what is left out, before two tries say otherwise: between .85 and .5 on SmolLM2-135M."""
SPEED_SLACK, LOSS_SLACK = 0.03, 0.1
"""A try ends the search when it reaches the goal and is beyond it by no more than this part."""
LEAST_SLOPE = 0.1
"""Of the FFNs' time that two tries differ by, the part that the saved bytes between them have to save at least."""
_SMALL = 1e-5


@dataclass(frozen=True)
class Goal:
    """What is asked for: at least a ``speedup`` of decoding, at most ``ms`` a token, ``kl`` or perplexity ``ratio``."""

    kind: Kind
    limit: float

    def __post_init__(self) -> None:
        least = _WORDS[self.kind][1]
        if not (self.limit > least and math.isfinite(self.limit)):
            raise MoEdgeError(f"{self} asks for nothing; give a number above {least:g}.")

    def __str__(self) -> str:
        return f"{_WORDS[self.kind][0]} {self.limit:g}"

    @property
    def of_speed(self) -> bool:
        """Whether it is a speed, not a loss."""
        return self.kind in ("speedup", "ms")

    def reached(self, value: float) -> bool:
        """Whether a measured value is what was asked for."""
        return value >= self.limit if self.kind == "speedup" else value <= self.limit

    def close(self, value: float) -> bool:
        """Whether it is reached, with so little to spare that another try is not worth its time."""
        if self.kind == "speedup":
            return self.limit <= value <= self.limit * (1 + SPEED_SLACK)
        if self.kind == "ms":
            return self.limit / (1 + SPEED_SLACK) <= value <= self.limit
        loss, limit = self.loss(value), self.loss(self.limit)
        return (1 - LOSS_SLACK) * limit <= loss <= limit

    def loss(self, value: float) -> float:
        """The value as a loss in nats, which grows as a power of what is left out; never 0."""
        return max(math.log(value) if self.kind == "ratio" else value, _SMALL)


@dataclass(frozen=True)
class Decode:
    """A decode step of the dense parent: milliseconds, and the part of them that its FFNs take."""

    ms: float
    part: float

    def speed(self, goal: Goal, value: float) -> float:
        """A value of a goal of speed as speed-up over the dense parent."""
        return value if goal.kind == "speedup" else self.ms / value

    def value(self, goal: Goal, speed: float) -> float:
        """A speed-up as value of a goal of speed."""
        return speed if goal.kind == "speedup" else self.ms / speed


@dataclass(frozen=True)
class Try:
    """One share, and what was predicted and measured of the goal; ``dense_ms``: a token of the parent, timed beside."""

    share: float
    predicted: float | None
    value: float
    dense_ms: float | None = None


def first_speed_share(goal: Goal, decode: Decode) -> tuple[float, float]:
    """Return the share that the profile predicts for a wanted speed, and the value that is predicted there.

    Raises:
        MoEdgeError: not even reading :data:`LEAST` of the weights would do, or the dense parent is as fast.
    """
    wanted, most = decode.speed(goal, goal.limit), speed_at(LEAST, decode.part, 1.0)
    if wanted <= 1:
        raise MoEdgeError(f"{goal} asks for nothing: the dense parent takes {decode.ms:.3g} ms a token on this target.")
    if wanted > most:
        best_there = f"{most:.2f} times at best" if goal.kind == "speedup" else f"{decode.ms / most:.3g} ms at best"
        raise MoEdgeError(
            f"{goal} is out of reach: the FFNs take {decode.part:.0%} of a decode step on this target, so reading "
            f"{LEAST:.0%} of their weights gives {best_there}; ask for less."
        )
    return _speed_share(wanted, decode.part, 1.0), goal.limit


def speed_at(share: float, part: float, kept: float) -> float:
    """Return the speed-up at a share where ``kept`` of the saved bytes becomes saved time."""
    return 1 / (1 - min(part * kept * (1 - share), 0.95))


def _speed_share(limit: float, part: float, kept: float) -> float:
    return _within(1 - (1 - 1 / limit) / (part * kept))


def next_share(goal: Goal, tries: list[Try], decode: Decode | None) -> tuple[float, float]:
    """Return the share to try next and the value that is predicted there.

    Args:
        goal: what is asked for.
        tries: at least one.
        decode: of the dense parent, as profiled; only a goal of speed reads it.
    """
    return _next_of_speed(goal, tries, decode) if decode else _next_of_loss(goal, tries)


def _next_of_speed(goal: Goal, tries: list[Try], decode: Decode) -> tuple[float, float]:
    decode = Decode(tries[-1].dense_ms or decode.ms, decode.part)
    wanted = decode.speed(goal, goal.limit)
    speeds = {one: Decode(one.dense_ms or decode.ms, decode.part).speed(goal, one.value) for one in tries}
    near = sorted(tries, key=lambda one: abs(speeds[one] - wanted))
    aimed = wanted * (1 + SPEED_SLACK / 2)  # the middle of what ends the search
    saved = [1 - 1 / speeds[one] for one in near]
    if len(near) > 1:
        slope = (saved[0] - saved[1]) / (near[1].share - near[0].share)
        if slope >= LEAST_SLOPE * decode.part:  # else noise: reading less has to save time
            share = _within(near[0].share - (1 - 1 / aimed - saved[0]) / slope)
            part = min(saved[0] + slope * (near[0].share - share), 0.95)
            return share, decode.value(goal, 1 / (1 - part))
    kept = min(max(saved[0] / (decode.part * (1 - near[0].share)), 0.1), 2.0)
    share = _speed_share(aimed, decode.part, kept)
    return share, decode.value(goal, speed_at(share, decode.part, kept))


def _next_of_loss(goal: Goal, tries: list[Try]) -> tuple[float, float]:
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
    goal: Goal,
    first: tuple[float, float | None],
    measure: Callable[[float], tuple[float, float | None]],
    decode: Decode | None,
    tries: int,
) -> list[Try]:
    """Try shares until one is close to the goal, nothing new is predicted, or ``tries`` are spent.

    Args:
        goal: what is asked for.
        first: the first share, and what is predicted there if anything is.
        measure: share -> the measured value of the goal, and the milliseconds of the dense parent if timed beside it.
        decode: see :func:`next_share`.
        tries: at most so many.
    """
    done: list[Try] = []
    share, predicted = first
    while len(done) < tries and share not in {one.share for one in done}:
        done.append(Try(share, predicted, *measure(share)))
        if goal.close(done[-1].value):
            break
        share, predicted = next_share(goal, done, decode)
    return done


def best(goal: Goal, done: list[Try]) -> Try:
    """Return the try to keep: of those that reach the goal the one that costs least, else the nearest to it."""
    there = [one for one in done if goal.reached(one.value)]
    if goal.of_speed:
        fastest = min if goal.kind == "ms" else max
        return max(there, key=lambda one: one.share) if there else fastest(done, key=lambda one: one.value)
    return min(there, key=lambda one: one.share) if there else min(done, key=lambda one: one.value)
