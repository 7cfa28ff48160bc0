"""Compare an engine's answers with recorded ones: numpy only, so it runs on a device.

Symbols: a recorded float32 logits, b the engine's, p = softmax(a), q = softmax(b).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log-probabilities of each row, float64."""
    shifted = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def logits(reference: np.ndarray, test: np.ndarray, margin: float) -> dict[str, Any]:
    """Compare logits [T, V] of the same tokens.

    ``margin`` is the gap between the reference's best two logits, in units of its largest one, below which a token is a
    near-tie: counted, not judged.
    """
    a, b = reference.astype(np.float64), test.astype(np.float64)
    finite = np.isfinite(b).all(axis=1)
    scale = np.abs(a).max(axis=1)
    with np.errstate(invalid="ignore"):
        relative = np.abs(a - b).max(axis=1) / scale
    best = np.sort(a, axis=1)[:, -2:]
    clear = (best[:, 1] - best[:, 0]) > margin * scale
    log_p, log_q = log_softmax(a[finite]), log_softmax(b[finite])
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
    same = a.argmax(axis=1) == np.where(np.isfinite(b), b, -np.inf).argmax(axis=1)
    flat = b.max(axis=1) == b.min(axis=1)  # a kernel that fails silently returns zeros
    return {
        "tokens": len(a),
        "non_finite": int((~finite).sum()),
        "constant": int(flat.sum()),
        "median_rel_error": _number(np.median(relative)) if finite.all() else None,
        "max_rel_error": _number(relative.max()) if finite.all() else None,
        "mean_kl": _number(kl.mean()) if finite.all() else None,
        "max_kl": _number(kl.max()) if finite.all() else None,
        "near_ties": int((~clear).sum()),
        "top1_agreement": float(same[clear].mean()) if clear.any() else None,
    }


def least_share(limit: float, compared: int) -> float:
    """Return the share that ``limit`` asks of ``compared`` tokens: below 1 it leaves room for at least one.

    A share is of whole tokens: of fewer than 1 / (1 - limit) it would ask for each, which a limit below 1 does
    not mean, and a right engine of an integer target would fail short texts by chance.
    """
    return limit if limit == 1 or compared < 2 else min(limit, (compared - 1) / compared)


def unchanged(reference: dict[int, np.ndarray], test: dict[int, np.ndarray]) -> np.ndarray:
    """Tokens of one text, bool [L], before the first for which any layer chose other experts; layers int32 [L, k].

    Up to there both engines computed the same products, so their answers differ by rounding alone. After it every layer
    and every later token read something else, and the distance says how steady the model's routing is.
    """
    same = [(np.sort(reference[layer], axis=1) == np.sort(test[layer], axis=1)).all(axis=1) for layer in reference]
    return np.logical_and.accumulate(np.logical_and.reduce(same))


def routes(reference: dict[int, np.ndarray], test: dict[int, np.ndarray]) -> dict[str, Any]:
    """Share of (token, layer) pairs with the same set of experts; each layer int32 [T, k]."""
    if not reference or not test:
        return {"compared": False}
    same = [
        (np.sort(reference[layer], axis=1) == np.sort(test[layer], axis=1)).all(axis=1) for layer in sorted(reference)
    ]
    worst = int(np.argmin([part.mean() for part in same]))
    return {
        "compared": True,
        "decisions": int(sum(part.size for part in same)),
        "agreement": float(np.concatenate(same).mean()),
        "worst_layer": sorted(reference)[worst],
        "worst_agreement": float(same[worst].mean()),
    }


def judge(found: dict[str, Any], clean: dict[str, Any] | None, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Check values against limits; a value that could not be measured fails.

    Args:
        found: :func:`logits` of every token, for what no choice of experts excuses.
        clean: the same of the tokens before the first changed choice. None: there is none. What then has no value is
            not decided here.
        limits: of the manifest.
    """
    rows: list[tuple[str, Any, str, float]] = [
        ("non_finite", found["non_finite"], "<=", 0),
        ("constant", found["constant"], "<=", 0),
    ]
    compared = clean["tokens"] - clean["near_ties"] if clean else 0
    asked = {**limits, "top1_agreement": least_share(limits["top1_agreement"], compared)}
    for name, relation in (("median_rel_error", "<="), ("mean_kl", "<="), ("top1_agreement", ">=")):
        rows.append((name, clean[name] if clean else None, relation, asked[name]))
    share = clean["tokens"] / found["tokens"] if clean else 0.0
    rows.append(("judged_share", share, ">=", limits["judged_share"]))
    checks = []
    for number, (name, value, relation, limit) in enumerate(rows):
        passed = value is not None and (value <= limit if relation == "<=" else value >= limit)
        check = {"name": name, "value": value, "relation": relation, "limit": limit, "passed": bool(passed)}
        decided = bool(passed) or number < 2 or (value is not None and name != "judged_share")
        checks.append({**check, "decided": decided})
    return checks


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
