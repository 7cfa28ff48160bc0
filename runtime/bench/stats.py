"""Percentiles and bootstrap confidence intervals, shared by parity and benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
_BLOCK = 100  # drawings at a time: few megabytes, however many samples a round has


def percentiles(values: np.ndarray, at: Sequence[float]) -> dict[str, float]:
    """Return ``{"p50": ..., "p99.9": ...}`` for ``values`` [n], linearly interpolated; NaN when there are none."""
    if not len(values):
        return {f"p{q:g}": float("nan") for q in at}
    return {f"p{q:g}": float(value) for q, value in zip(at, np.percentile(values, at), strict=True)}


def bootstrap_ci(
    rounds: int, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[float]:
    """95% percentile-bootstrap interval of a statistic of ``rounds`` independent rounds.

    Whole rounds are drawn with replacement, never single samples: samples of one round share the machine's mood, and
    an interval from single samples would be too narrow. A ratio of two engines measured in the same rounds stays paired
    because ``statistic`` receives the drawn round numbers.

    Args:
        rounds: how many rounds were measured.
        statistic: int64 [N, rounds] round numbers, one drawing a row -> float64 [N], a value of each drawing.
        seed: of the drawing; equal data give equal intervals.
        resamples: number of drawings.

    Returns:
        ``[low, high]``; both are the plain statistic when there is one round only (no interval can be known).
    """
    return bootstrap_cis(rounds, lambda drawn: statistic(drawn)[None], seed=seed, resamples=resamples)[0]


def bootstrap_cis(
    rounds: int, statistics: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[list[float]]:
    """:func:`bootstrap_ci` of K statistics of the same drawings: ``statistics`` gives float64 [K, N]."""
    draws = np.random.default_rng(seed).integers(0, rounds, (resamples, rounds))
    values = [statistics(draws[start : start + _BLOCK]) for start in range(0, resamples, _BLOCK)]
    ends = np.percentile(np.concatenate(values, axis=1), [2.5, 97.5], axis=1)
    return [[float(low), float(high)] for low, high in ends.T]


def t_quantile(p: float, df: float) -> float:
    """Return the ``p`` quantile (0.5 <= p < 1) of Student's t with ``df`` degrees of freedom, to six digits.

    With ``t = sqrt(df) tan(a)`` the density becomes ``cos(a)^(df - 1)`` on 0 to pi/2, which a sum over a grid
    integrates; SciPy, which knows this too, is not among what the runtime needs.
    """
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(df) * np.tan(np.interp(p - 0.5, area / (2 * area[-1]), angle)))
