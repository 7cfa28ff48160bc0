"""How much slower? A slow-down with its interval from rounds, and what it allows to say.

The logarithm of a round's time, less that of what was timed beside it in the same round, is one sample: a machine that
is slower for a minute is so for both. Samples are reduced by a mean without a fifth at either end, so that single
disturbed rounds do not count; its standard error comes from a bootstrap of rounds, drawn in blocks because neighbours
are alike, and the interval is Student's with the degrees of freedom of what the mean keeps (Yuen 1974; a variance from
a bootstrap of n rounds in blocks of b is too small by the factor (n-b)/n, for b = 1 see Hesterberg 2015). A percentile
interval of ten rounds could not reach the confidence that a gate needs.

The rule tests "not slower" against "slower by the limit":

passed       a slow-down as large as the limit is excluded.
failed       a slow-down is shown, and one as large as the limit is not excluded.
not decided  the interval holds both: the measurement is too coarse for this limit, and more rounds resolve it.

A build that did not change fails with a probability below that of the interval missing it to one side, and one that is
slower by the limit passes with no larger one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moedge.runtime.bench.stats import t_quantile
from moedge.runtime.parity.verdict import Outcome

CONFIDENCE = 0.99
"""Of all intervals of one gate together, to one side: of a hundred gates over one build less than one fails."""
_RESAMPLES = 2000
_TRIM = 0.2
_LEAST = 5
"""Rounds below which nothing is said: three samples would be left."""


@dataclass(frozen=True)
class Slowdown:
    """Shares: 0.05 is 5 % slower, -0.05 is 5 % faster (of the time)."""

    value: float
    low: float
    high: float
    rounds: int

    def outcome(self, limit: float) -> Outcome:
        """Apply the rule of this module; ``limit`` is a share."""
        if self.high < limit:
            return Outcome.PASSED
        return Outcome.FAILED if self.low > 0 else Outcome.NOT_DECIDED

    def rounds_needed(self, limit: float) -> int:
        """Rounds after which the interval is too narrow to hold both 0 and the limit, widths falling as their root."""
        if not math.isfinite(self.high):
            return 2 * _LEAST
        width = (math.log1p(self.high) - math.log1p(self.low)) / math.log1p(limit)
        return max(self.rounds + 1, math.ceil(self.rounds * width**2))


def slowdown(new: np.ndarray, old: np.ndarray | None, checks: int, seed: int = 0) -> Slowdown:
    """Return the slow-down of samples ``new`` against ``old``.

    Args:
        new: log of time over time, float64 [rounds]: over the old engine's in the same round, or over the control's.
        old: the same of an earlier run, whose rounds are not paired with the new ones; None: ``new`` is over the old.
        checks: how many such comparisons the gate makes: each gets its part of what may go wrong.
        seed: of the bootstrap.
    """
    parts = [_mean(sample, seed + number) for number, sample in enumerate((new, old)) if sample is not None]
    rounds = min(len(sample) for sample in (new, old) if sample is not None)
    value = parts[0][0] - (parts[1][0] if old is not None else 0.0)
    if rounds < _LEAST:
        return Slowdown(math.expm1(value), -1.0, math.inf, rounds)
    errors = np.array([error for _, error, _ in parts])
    freedom = np.array([df for _, _, df in parts])
    squares = errors**2
    # Welch and Satterthwaite; equal times (a scripted clock) have no error.
    df = float(squares.sum() ** 2 / (squares**2 / freedom).sum()) if squares.any() else 1.0
    half = t_quantile(1 - (1 - CONFIDENCE) / checks, df) * math.sqrt(squares.sum())
    return Slowdown(math.expm1(value), math.expm1(value - half), math.expm1(value + half), rounds)


def _mean(sample: np.ndarray, seed: int) -> tuple[float, float, int]:
    """Trimmed mean of float64 [n], its standard error, and the error's degrees of freedom."""
    n = len(sample)
    block = max(1, round(n ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, -(-n // block)))
    drawn = ((starts[..., None] + np.arange(block)) % n).reshape(_RESAMPLES, -1)[:, :n]
    error = float(_trimmed(sample[drawn]).std(ddof=1)) * math.sqrt(n / max(n - block, 1))
    return float(_trimmed(sample)), error, max(n - 2 * int(_TRIM * n) - 1, 1)


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the smallest and the largest fifth."""
    cut = int(_TRIM * samples.shape[-1])
    return np.asarray(np.sort(samples, axis=-1)[..., cut : samples.shape[-1] - cut].mean(axis=-1))
