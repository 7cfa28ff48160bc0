"""When does a warm-up end? A criterion instead of a guess.

The later half of the rounds is taken as settled. A round before them belongs to the warm-up while its time lies above
what one more settled round would take: above the upper limit of the prediction interval of a normal sample,
``mean + t(1 - 0.001; h - 1) s sqrt(1 + 1/h)`` for h settled rounds with standard deviation s (on logarithms of times).
A settled engine loses a round by chance once in a thousand; what an outlier in the later half does is to widen s, so
that less is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moedge.runtime.bench.stats import t_quantile

_CHANCE = 1e-3

STEADY = (
    "rounds are dropped from the start while one of them is slower than the prediction interval of the later half "
    "(one-sided, 99.9 %), for any engine and time"
)
"""The criterion in words."""


def unsettled(series: Iterable[np.ndarray]) -> int:
    """Rounds at the start that belong to the warm-up, of several engines and times measured in the same rounds.

    Args:
        series: milliseconds float64 [rounds] each, all of equal length.

    Returns:
        The largest number over the series, at most half of the rounds; 0 below four rounds, which tell nothing.
    """
    return max((_unsettled(np.log(np.asarray(times, dtype=float))) for times in series), default=0)


def _unsettled(logs: np.ndarray) -> int:
    first = len(logs) // 2
    late = logs[first:]
    if len(logs) < 4:
        return 0
    limit = late.mean() + t_quantile(1 - _CHANCE, len(late) - 1) * late.std(ddof=1) * np.sqrt(1 + 1 / len(late))
    # Equal times (a scripted clock) leave no spread: what rounding does must not count as warm-up.
    slow = logs[:first] > limit + 1e-9
    return first if slow.all() else int(np.argmin(slow))
