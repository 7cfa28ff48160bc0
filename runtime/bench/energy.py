"""Joules of a prompt and of a token, for each engine of an interleaved benchmark.

A counter is read before an engine's turn, between its prompt and its decoding, and after it: the differences belong to
that engine. They hold everything that the counter counts (a whole processor package, a GPU's board, a Jetson's board),
what it takes when idle and what other programs do included. Where no counter is, the entry says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moedge.runtime.bench.stats import mean_ends
from moedge.runtime.bench.watched import Energy

Turn = tuple[float | None, float | None, float | None]
"""Joules before an engine's turn, between its prompt and its decoding, and after it."""


def energy(
    turns: Sequence[Turn],
    seconds: Sequence[float],
    *,
    source: str | None,
    reason: str | None,
    tokens: int,
    batch: int,
) -> Energy:
    """Sum up the turns of one engine.

    Args:
        turns: of the rounds that count.
        seconds: that each round's decoding took.
        source: name of the counter.
        reason: why there is none.
        tokens: decoded in each round, by each row.
        batch: rows.
    """
    told = [(before, between, after) for before, between, after in turns if None not in (before, between, after)]
    if source is None or len(told) < len(turns) or not told:
        unknown = reason or "the counter stopped"
        return Energy(
            source=source, reason=unknown, joules_per_prompt=None, joules_per_token=None, ci95=None, watts=None
        )
    counted = np.diff(np.asarray(told, np.float64), axis=1)  # [rounds, 2]: joules of the prompt, of decoding
    each = counted[:, 1] / (tokens * batch)
    low, high = mean_ends(each)
    return Energy(
        source=source,
        reason=None,
        joules_per_prompt=float(counted[:, 0].mean()) / batch,
        joules_per_token=float(each.mean()),
        ci95=None if low is None or high is None else [low, high],
        watts=float(counted[:, 1].sum() / sum(seconds)),
    )
