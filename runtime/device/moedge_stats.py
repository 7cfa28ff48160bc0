"""95 % intervals of times: of quantiles from ranks, of means and ratios by Student's t. NumPy alone.

A round is what is independent: samples of one round share the machine's mood. An end that the rounds cannot tell is
None, never the largest sample that there happens to be. Ten rounds say nothing of what the 99th percentile is at most,
whatever is resampled; a bootstrap of three rounds calls equal engines different in a quarter of all cases.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

Ends = list[float | None]
"""``[low, high]``; None where it is not known."""
TAIL = 0.025
"""Chance that the truth lies beyond one end."""


def quantile_ends(rounds: np.ndarray, q: float) -> Ends:
    """Return the interval of the ``q`` quantile of all samples; of whatever distribution they are.

    The number of samples below the true quantile is binomial, so two of the sorted samples hold it between them. Where
    a round has many samples they count as fewer, for they are alike: by the design effect of "below the quantile" over
    rounds, with Student's factor for few rounds (Korn and Graubard 1998), and as one a round at least. An end is None
    where all rounds could lie on one side of the quantile by chance, however many samples each has: the upper one of
    fewer than :func:`rounds_needed` rounds, for a mood that one round in a hundred has may not have been seen.

    Args:
        rounds: float64 [rounds, samples].
    """
    samples = np.sort(rounds, axis=None)
    total, size = len(samples), _independent(rounds, q)
    below = binomial_cdf(size, q)
    low = int(np.searchsorted(below, TAIL, side="right"))
    high = int(np.searchsorted(below, 1 - TAIL)) + 1
    return [  # ranks of those that count, as ranks of all
        float(samples[low * total // size - 1]) if len(rounds) >= rounds_needed(1 - q) else None,
        float(samples[-(-high * total // size) - 1]) if len(rounds) >= rounds_needed(q) else None,
    ]


def rounds_needed(q: float) -> int:
    """Return the rounds from which on the upper end of the ``q`` quantile is known."""
    return math.ceil(math.log(TAIL) / math.log(q))


def _independent(rounds: np.ndarray, q: float) -> int:
    """How many independent samples would tell as much of the ``q`` quantile as ``rounds`` [rounds, samples]."""
    count, total = len(rounds), rounds.size
    if count == 1 or total == count:
        return count
    shares = (rounds <= np.quantile(rounds, q)).mean(axis=1)
    effect = float(shares.var(ddof=1)) / count / (q * (1 - q) / total)
    factor = (t_quantile(1 - TAIL, total - 1) / t_quantile(1 - TAIL, count - 1)) ** 2
    return int(np.clip(total / max(effect, 1.0) * factor, count, total))


def mean_ends(values: np.ndarray, less: np.ndarray | None = None) -> Ends:
    """Return Student's interval of the mean of independent ``values`` [n]; of one value nothing is known.

    Args:
        less: float64 [m], not paired with the values: of the difference of both means then (Welch).
    """
    parts = [values] if less is None else [values, less]
    if min(map(len, parts)) < 2:
        return [None, None]
    middle = float(values.mean()) - (float(less.mean()) if less is not None else 0.0)
    squares = np.array([part.var(ddof=1) / len(part) for part in parts])
    if not squares.any():  # a scripted clock
        return [middle, middle]
    counts = np.array([len(part) for part in parts])
    freedom = float(squares.sum() ** 2 / (squares**2 / (counts - 1)).sum())
    half = t_quantile(1 - TAIL, freedom) * math.sqrt(squares.sum())
    return [middle - half, middle + half]


def speedup(slow: np.ndarray, fast: np.ndarray) -> tuple[float, Ends, str]:
    """Compare two engines that were timed in the same rounds, [rounds, samples] each.

    Returns:
        How many times as fast ``fast`` is: the geometric mean over rounds of the ratio of a round's medians, its
        interval, and what that allows to say: nothing where it holds 1 or is not known.
    """
    logs = np.log(np.median(slow, axis=1)) - np.log(np.median(fast, axis=1))
    low, high = (None if end is None else math.exp(end) for end in mean_ends(logs))
    if low is not None and low > 1:
        verdict = "faster"
    else:
        verdict = "slower" if high is not None and high < 1 else "no difference shown"
    return math.exp(float(logs.mean())), [low, high], verdict


def binomial_cdf(count: int, p: float) -> np.ndarray:
    """Return the probability of at most 0, 1, ... ``count`` hits of ``count``, float64 [count + 1]."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, count + 1)))])  # of factorials
    hits = np.arange(count + 1)
    chances = logs[-1] - logs - logs[::-1] + hits * math.log(p) + (count - hits) * math.log1p(-p)
    return np.asarray(np.cumsum(np.exp(chances)))


@lru_cache
def t_quantile(p: float, df: float) -> float:
    """Return the ``p`` quantile (0.5 <= p < 1) of Student's t with ``df`` degrees of freedom, to six digits.

    With ``t = sqrt(df) tan(a)`` the density becomes ``cos(a)^(df - 1)`` on 0 to pi/2, which a sum over a grid
    integrates; SciPy, which knows this too, is not among what the runtime needs.
    """
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(df) * np.tan(np.interp(p - 0.5, area / (2 * area[-1]), angle)))
