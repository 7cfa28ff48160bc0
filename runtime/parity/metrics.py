"""What parity keeps of two engines' answers: a few numbers a token (of their choices of experts: :mod:`.routing`).

Symbols: a reference logits, b test logits, p = softmax(a), q = softmax(b), V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from moedge.configs.tolerances import Profile
from moedge.runtime.bench.stats import percentiles
from moedge.runtime.parity.figures import Agreement, Distribution, Phase

_ROWS = 16  # tokens reduced at once: 16 x 49152 float64 is 6 MB per temporary
_PERCENTILES = (50, 90, 99, 99.9)


_VALUES = (
    *("abs_max", "abs_mean", "scale", "rel", "cosine", "kl", "kl_back"),
    *("gap1", "gap5", "top1", "top5", "nll", "nll_test", "changed", "window", "position"),
)


def text_sha256(windows: Iterable[np.ndarray]) -> str:
    """Hash the token ids of windows int64 [L]: two results of equal hashes are of the same text, cut alike."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(len(window).to_bytes(8, "little") + np.ascontiguousarray(window, dtype="<i8").tobytes())
    return digest.hexdigest()


At = tuple[int, int]
"""Number of a window, position of a token in it."""


class Cursor:
    """Counts windows and positions along the steps of an engine.

    Args:
        prefill: tokens with which each window begins; a longer prefill reads the same window again (longrope). None:
            every prefill begins a window.
        window: number of the first.
    """

    def __init__(self, prefill: int | None = None, window: int = 0) -> None:
        self._prefill, self._window, self._position = prefill, window - 1, 0

    def at(self, phase: str, ids: np.ndarray) -> At:
        """Return where the first token of a step stands, of which ``ids`` int64 [1, S] were fed."""
        if phase == "prefill":
            self._window += self._prefill in (None, ids.size)
            self._position = 0
        start = self._position
        self._position += ids.size
        return self._window, start


@dataclass
class TokenErrors:
    """Per-token numbers of one phase; each list holds float64 arrays [tokens].

    A token is a near-tie when the reference's gap is below ``margin * min(1, max|a| / scale)``: errors are relative to
    a token's largest logit, so two flat logits are told apart as well as two large ones are.
    """

    margin: float
    scale: float = 1.0
    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in _VALUES})
    tokens: int = 0
    non_finite: int = 0
    constant: int = 0
    broken: list[At] = field(default_factory=list)
    """Where logits are no numbers, or all alike."""

    def add(
        self,
        reference: np.ndarray,
        test: np.ndarray,
        targets: np.ndarray,
        changed: np.ndarray | None = None,
        at: At = (0, 0),
    ) -> None:
        """Reduce logits [T, V] of both engines; ``targets`` int64 [T], -1 where no token follows.

        ``changed`` bool [T]: some layer of the test engine chose other experts for this token; None: not known. ``at``:
        where the first token stands.
        """
        known = np.full(len(targets), np.nan) if changed is None else changed.astype(np.float64)
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add(reference[rows], test[rows], targets[rows], known[rows], at[0], at[1] + start)

    def _add(
        self, a32: np.ndarray, b32: np.ndarray, targets: np.ndarray, changed: np.ndarray, window: int, first: int
    ) -> None:
        good = np.isfinite(a32).all(1) & np.isfinite(b32).all(1)
        positions = self.count(good, b32, (window, first))
        if not good.all():
            a32, b32, targets, changed = a32[good], b32[good], targets[good], changed[good]
        if not len(targets):
            return
        a, b = a32.astype(np.float64), b32.astype(np.float64)
        error = np.abs(a - b)
        scale = np.abs(a).max(1)
        norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        difference = log_p - log_q
        k = min(5, a.shape[1] - 1)
        best_a, best_b = best(a32, k + 1), best(b32, k + 1)
        top = np.take_along_axis(a, best_a, 1)
        nll = np.full((2, len(targets)), np.nan)
        known = np.flatnonzero(targets >= 0)
        nll[0, known], nll[1, known] = -log_p[known, targets[known]], -log_q[known, targets[known]]
        tiny = np.finfo(np.float64).tiny
        values = {
            "abs_max": error.max(1),
            "abs_mean": error.mean(1),
            "scale": scale,
            "rel": error.max(1) / np.maximum(scale, tiny),
            "cosine": (a * b).sum(1) / np.maximum(norms, tiny),
            # Rounding can leave -1e-17 where the truth is 0.
            "kl": np.maximum((np.exp(log_p) * difference).sum(1), 0.0),
            "kl_back": np.maximum((np.exp(log_q) * -difference).sum(1), 0.0),
            "gap1": top[:, 0] - top[:, 1],
            "gap5": top[:, k - 1] - top[:, k],
            "top1": (best_a[:, 0] == best_b[:, 0]).astype(np.float64),
            "top5": (np.sort(best_a[:, :k], 1) == np.sort(best_b[:, :k], 1)).all(1).astype(np.float64),
            "nll": nll[0],
            "nll_test": nll[1],
            "changed": changed,
            "window": np.full(len(targets), float(window)),
            "position": positions.astype(np.float64),
        }
        self.append(values)

    def count(self, good: np.ndarray, test: np.ndarray, at: At) -> np.ndarray:
        """Count tokens, and of them those with logits that are no finite numbers, or with equal ones in the test.

        Args:
            good: bool [T], all logits of the reference and the test are finite. test: float32 [T, V]. at: of the first.

        Returns:
            Positions of the good ones.
        """
        # Kernels that fail silently return zeros: a flat row is a fault even where its error happens to be small.
        flat = good & (test.max(1) == test.min(1))
        window, first = at
        self.tokens += len(good)
        self.non_finite += int((~good).sum())
        self.constant += int(flat.sum())
        self.broken += [(window, first + int(row)) for row in np.flatnonzero(~good | flat)]
        found: np.ndarray = first + np.flatnonzero(good)
        return found

    def append(self, values: Mapping[str, np.ndarray]) -> None:
        """Take the columns float64 [n] of n tokens whose logits are finite."""
        for name, column in self.columns.items():
            column.append(values[name])

    @classmethod
    def by_phase(cls, limits: Profile) -> dict[str, TokenErrors]:
        """Nothing yet of a prefill and of decoding, with the margin of ``limits``."""
        return {phase: cls(limits.near_tie_margin, limits.near_tie_scale) for phase in ("prefill", "decode")}

    @classmethod
    def merged(cls, parts: list[TokenErrors]) -> TokenErrors:
        """All tokens of several phases."""
        whole = cls(parts[0].margin, parts[0].scale)
        for part in parts:
            whole.extend(part)
        return whole

    def extend(self, other: TokenErrors) -> None:
        """Add the tokens of ``other``, which has the same margin."""
        self.tokens += other.tokens
        self.non_finite += other.non_finite
        self.constant += other.constant
        self.broken += other.broken
        for name, values in other.columns.items():
            self.columns[name].extend(values)

    def worst(self) -> tuple[float, At] | None:
        """Return the KL of the token that is furthest off, and where: the first whose logits are no numbers at all."""
        if self.broken:
            return math.inf, min(self.broken)
        if not self.columns["kl"]:
            return None
        kl, windows, positions = (np.concatenate(self.columns[name]) for name in ("kl", "window", "position"))
        row = int(kl.argmax())
        return float(kl[row]), (int(windows[row]), int(positions[row]))

    def of(self, measure: str, at: At) -> float | None:
        """Return a measure of one token; None where it is not among these."""
        for values, windows, positions in zip(*(self.columns[n] for n in (measure, "window", "position")), strict=True):
            (rows,) = np.nonzero((windows == at[0]) & (positions == at[1]))
            if len(rows):
                return float(values[rows[0]])
        return None

    def by_window(self, windows: int, size: int) -> dict[str, list[float]]:
        """Return figures of each window, by the names that checks have; empty unless each gave ``size`` tokens.

        ``perplexity.drift`` is the logarithm of the ratio, with its sign.
        """
        if self.non_finite or self.tokens != windows * size or not size:
            return {}
        v = {name: np.concatenate(parts).reshape(windows, size) for name, parts in self.columns.items()}
        found = {
            "rel_error.median": np.median(v["rel"], axis=1),
            "rel_error.mean": v["rel"].mean(1),
            "kl_ref_test.mean": v["kl"].mean(1),
            "kl_ref_test.max": v["kl"].max(1),
            "kl_test_ref.mean": v["kl_back"].mean(1),
            "perplexity.drift": np.nanmean(v["nll_test"] - v["nll"], axis=1),
        }
        return {name: values.tolist() for name, values in found.items() if np.isfinite(values).all()}

    def summary(self) -> Phase:
        """The phase as plain numbers; NaN where nothing could be measured."""
        v = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in self.columns.items()}
        known = ~np.isnan(v["nll"])
        nll = [mean(v[name][known]) for name in ("nll", "nll_test")]
        same = v["changed"] == 0
        margin = self.margin * np.minimum(1.0, v["scale"] / self.scale)
        moved = _distribution(v["nll_test"][known] - v["nll"][known])
        return {
            "tokens": self.tokens,
            "non_finite": self.non_finite,
            "constant": self.constant,
            "abs_error": {"max": _max(v["abs_max"]), "mean": mean(v["abs_mean"])},
            "rel_error": cast(
                "Distribution",
                {"mean": mean(v["rel"]), **percentiles(v["rel"], _PERCENTILES), "max": _max(v["rel"])},
            ),
            "cosine": {"mean": mean(v["cosine"]), "min": -_max(-v["cosine"])},
            "kl_ref_test": _distribution(v["kl"]),
            "kl_test_ref": _distribution(v["kl_back"]),
            "same_choices": {  # tokens for which every layer chose the same experts; not judged, but explains
                "tokens": int(same.sum()),
                "rel_error_mean": mean(v["rel"][same]),
                "kl_max": _max(v["kl"][same]),
                "cosine_min": -_max(-v["cosine"][same]),
            },
            "top1": _agreement(v["top1"], v["gap1"], margin),
            "top5": _agreement(v["top5"], v["gap5"], margin),
            "perplexity": {
                "tokens": int(known.sum()),
                "reference": math.exp(nll[0]) if nll[0] < 700 else float("inf"),
                "test": math.exp(nll[1]) if nll[1] < 700 else float("inf"),
                "ratio": math.exp(nll[1] - nll[0]) if abs(nll[1] - nll[0]) < 700 else float("inf"),
                "standard_error": moved["standard_error"],  # of log(ratio), tokens taken as independent
            },
        }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Logarithm [T] of the sum of the exponentials of float64 [T, V]."""
    top = x.max(1)
    found: np.ndarray = top + np.log(np.exp(x - top[:, None]).sum(1))
    return found


def distance(reference: np.ndarray, test: np.ndarray) -> np.ndarray:
    """|a - b| / |a| float64 [T] of float32 [T, H], a of the reference."""
    a = reference.astype(np.float64)
    norms = np.maximum(np.linalg.norm(a, axis=1), np.finfo(np.float64).tiny)
    found: np.ndarray = np.linalg.norm(a - test, axis=1) / norms
    return found


def best(x: np.ndarray, k: int) -> np.ndarray:
    """Indices [T, k] of the k largest of each row, by decreasing value."""
    chosen = np.argpartition(x, x.shape[1] - k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(x, chosen, 1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1)


def mean(values: np.ndarray) -> float:
    """Mean of numbers [n]; NaN of none."""
    return float(values.mean()) if len(values) else float("nan")


def _max(values: np.ndarray) -> float:
    return float(values.max()) if len(values) else float("nan")


def _distribution(values: np.ndarray) -> Distribution:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")
    found = {"mean": mean(values), "standard_error": error, **percentiles(values, _PERCENTILES), "max": _max(values)}
    return cast("Distribution", found)


def _agreement(same: np.ndarray, gap: np.ndarray, margin: np.ndarray) -> Agreement:
    clear = gap >= margin
    return {
        "agreement": mean(same[clear]),
        "compared": int(clear.sum()),
        "disagreements": int((same[clear] == 0).sum()),
        "near_ties_excluded": int((~clear).sum()),
        "near_tie_share": mean((~clear).astype(np.float64)),
        "agreement_with_near_ties": mean(same),
    }
