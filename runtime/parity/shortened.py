"""Logits that are kept for later: the largest of a token, what all others add up to, and a sketch of all of them.

Of V logits a token, the N largest are kept as they are, the logarithm of the sum of all exponentials, and the logit of
the token that follows. That gives, exactly: each kept probability, the best tokens and their gaps, perplexity.

**KL.** Let S be the kept tokens, p the reference's probabilities, q the engine's, p_T = 1 - p(S) and q_T = 1 - q(S)
what the others have together. Then (chain rule of KL)

    KL(p || q) = sum over S of p log(p / q)  +  p_T log(p_T / q_T)  +  p_T KL(p given T || q given T).

The first two terms are known. The last one is hidden by what was not kept, and no more than p_T r^2 / 8, where r is the
range of the errors (reference less engine) of the logits in T: with d the error, KL(p given T || q given T) is the mean
of d plus log of the mean of exp(-d), and Hoeffding's lemma bounds the latter for a variable of range r. r is taken as
twice the largest error that was seen, among the kept logits and by the sketch. ``kl_ref_test`` is the sum of all three,
so it never flatters; its last term stands beside it.

**Sketch.** Numbers of the logits that were not kept are in :func:`sketch`: V signed logits in M buckets (count sketch,
Charikar, Chen, Farach-Colton 2002). It is linear, so the sketches of two engines differ by the sketch of their errors.
The sum of its squares estimates the squared length of the error over the whole vocabulary (relative standard deviation
sqrt(2 / M), 9 %), and a single wrong logit, a head with two rows exchanged, stands out in its bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from moedge.runtime.parity.metrics import At, TokenErrors, best, log_sum_exp

LARGEST = 256
"""Logits of a token that are kept: on SmolLM2-135M and wiki text the others have 6 % of the probability together."""
BUCKETS = 256
_ROWS = 16


@dataclass(frozen=True)
class Shortened:
    """What is kept of the logits of T tokens."""

    tokens: np.ndarray
    """int32 [T, N], the best first."""
    logits: np.ndarray
    """float32 [T, N], theirs."""
    log_sum: np.ndarray
    """float64 [T], log of the sum of the exponentials of all logits; NaN where one is no finite number."""
    following: np.ndarray
    """float32 [T], the logit of the token that follows; NaN after the last one of a window."""
    scale: np.ndarray
    """float32 [T], the largest absolute logit."""
    squares: np.ndarray
    """float64 [T], the sum of the squares of all logits."""
    sketch: np.ndarray
    """float32 [T, M]."""

    def rows(self, at: slice | np.ndarray) -> Shortened:
        """Return some of the tokens: a slice, or bool [T]."""
        return Shortened(*(getattr(self, each.name)[at] for each in fields(self)))


def shortened(logits: np.ndarray, targets: np.ndarray, largest: int = LARGEST) -> Shortened:
    """Keep of logits float32 [T, V] what this module says; ``targets`` int64 [T], -1 where no token follows."""
    wide = logits.astype(np.float64)
    chosen = best(logits, min(largest, logits.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        log_sum = np.where(np.isfinite(logits).all(1), log_sum_exp(wide), np.nan)
        return Shortened(
            tokens=chosen.astype(np.int32),
            logits=np.take_along_axis(logits, chosen, 1),
            log_sum=log_sum,
            following=np.where(targets >= 0, _at(logits, targets), np.float32(np.nan)).astype(np.float32),
            scale=np.abs(logits).max(1),
            squares=(wide * wide).sum(1),
            sketch=sketch(wide).astype(np.float32),
        )


def joined(parts: list[Shortened]) -> Shortened:
    """Return the tokens of all parts."""
    return Shortened(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Shortened)))


@lru_cache(maxsize=4)
def _places(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed order of the vocabulary, int64 [V], and signs float64 [V]; equal on every machine and numpy."""
    bits = np.random.Philox(key=vocabulary).random_raw(vocabulary)
    return np.argsort(bits, kind="stable"), np.where(bits & 1, 1.0, -1.0)


def sketch(values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Add up values float64 [T, V] in ``buckets`` sums of V / M signed values each: float64 [T, M]."""
    count, vocabulary = values.shape
    order, signs = _places(vocabulary)
    rows = -(-vocabulary // buckets)
    padded = np.zeros((count, rows * buckets))
    padded[:, :vocabulary] = (values * signs)[:, order]
    found: np.ndarray = padded.reshape(count, rows, buckets).sum(1)
    return found


def largest_error(difference: np.ndarray, vocabulary: int) -> np.ndarray:
    """Estimate max |error| over the vocabulary, float64 [T], from the difference of two sketches [T, M].

    A bucket adds up V / M errors, so independent ones make it sqrt(V / M) times as large as one of them. The largest of
    n normal numbers is about sqrt(2 ln n) standard deviations: of M buckets less than of V errors.
    """
    buckets = min(difference.shape[1], vocabulary)
    spread = math.sqrt(vocabulary / buckets) * math.sqrt(math.log(buckets) / math.log(vocabulary))
    found: np.ndarray = np.abs(difference).max(1) / spread
    return found


def add(
    errors: TokenErrors,
    kept: Shortened,
    test: np.ndarray,
    targets: np.ndarray,
    changed: np.ndarray | None = None,
    at: At = (0, 0),
) -> np.ndarray:
    """Compare logits float32 [T, V] with what was kept of the reference's, and add the tokens to ``errors``.

    Args:
        targets, changed, at: as in :meth:`moedge.runtime.parity.metrics.TokenErrors.add`.

    Returns:
        float64 [n, 2] of the n tokens whose logits are finite: the probability of what was not kept, and the KL that it
        may hide (in nats; it is in ``errors``).
    """
    known = np.full(len(targets), np.nan) if changed is None else changed.astype(np.float64)
    parts = [
        _add(errors, kept.rows(rows), test[rows], targets[rows], known[rows], at[0], at[1] + rows.start)
        for rows in (slice(start, start + _ROWS) for start in range(0, len(targets), _ROWS))
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 2))


def _add(
    errors: TokenErrors,
    kept: Shortened,
    b32: np.ndarray,
    targets: np.ndarray,
    changed: np.ndarray,
    window: int,
    first: int,
) -> np.ndarray:
    good = np.isfinite(kept.log_sum) & np.isfinite(b32).all(1)
    positions = errors.count(good, b32, (window, first))
    kept, b32, targets, changed = kept.rows(good), b32[good], targets[good], changed[good]
    if not len(targets):
        return np.zeros((0, 2))
    vocabulary, n = b32.shape[1], kept.tokens.shape[1]
    a, b = kept.logits.astype(np.float64), b32.astype(np.float64)
    at = np.take_along_axis(b, kept.tokens.astype(np.int64), 1)
    log_q = log_sum_exp(b)
    error, difference = np.abs(a - at), kept.sketch - sketch(b)
    worst = error.max(1) if n == vocabulary else np.maximum(error.max(1), largest_error(difference, vocabulary))
    log_p_at, log_q_at = a - kept.log_sum[:, None], at - log_q[:, None]
    forth, back, tail, hidden = _divergences(log_p_at, log_q_at, worst, whole=n == vocabulary)
    length = np.sqrt(np.maximum(kept.squares * (b * b).sum(1), np.finfo(np.float64).tiny))
    k = min(5, vocabulary - 1)
    best_b = best(b32, k + 1)
    follows = targets >= 0
    errors.append(
        {
            "abs_max": worst,
            "abs_mean": error.mean(1),
            "scale": kept.scale.astype(np.float64),
            "rel": worst / np.maximum(kept.scale, np.finfo(np.float32).tiny),
            # |a - b|^2 = |a|^2 + |b|^2 - 2 ab, and the sketch knows the left side.
            "cosine": (kept.squares + (b * b).sum(1) - (difference**2).sum(1)) / 2 / length,
            "kl": forth,
            "kl_back": back,
            "gap1": a[:, 0] - a[:, 1],
            "gap5": a[:, k - 1] - a[:, k] if n > k else np.full(len(a), np.inf),
            "top1": (kept.tokens[:, 0] == best_b[:, 0]).astype(np.float64),
            "top5": (np.sort(kept.tokens[:, :k], 1) == np.sort(best_b[:, :k], 1)).all(1).astype(np.float64),
            "nll": np.where(follows, kept.log_sum - kept.following, np.nan),
            "nll_test": np.where(follows, log_q - _at(b, targets), np.nan),
            "changed": changed,
            "window": np.full(len(targets), float(window)),
            "position": positions.astype(np.float64),
        }
    )
    return np.stack([tail, hidden], axis=1)


def _divergences(
    log_p: np.ndarray, log_q: np.ndarray, worst: np.ndarray, *, whole: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """KL both ways from log probabilities [T, N] of what was kept; probability of the rest, and what that may hide."""
    tiny = np.finfo(np.float64).tiny
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p, rest_q = (np.zeros(len(p)) if whole else np.clip(1 - each.sum(1), 0, 1) for each in (p, q))
    ratio = np.log(np.maximum(rest_p, tiny)) - np.log(np.maximum(rest_q, tiny))
    most = (2 * worst) ** 2 / 8
    forth = (p * (log_p - log_q)).sum(1) + rest_p * ratio
    back = (q * (log_q - log_p)).sum(1) - rest_q * ratio
    # Rounding can leave -1e-17 where the truth is 0.
    return np.maximum(forth, 0) + rest_p * most, np.maximum(back, 0) + rest_q * most, rest_p, rest_p * most


def _at(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The logit [T] of each target; of any token where none follows."""
    found: np.ndarray = np.take_along_axis(logits, np.maximum(targets, 0)[:, None], 1)[:, 0]
    return found
