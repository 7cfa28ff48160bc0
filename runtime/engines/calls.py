"""One call of an engine: what it checks of its tokens, and what it derives from them."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable

import numpy as np

from moedge import MoEdgeError
from moedge.export.manifest import GatherPlace


def default_threads() -> int:
    """Physical cores that this process may use (hyper-threads slow dense matmuls down)."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def check_batch(ids: np.ndarray, attention_mask: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """Check one call's ``ids`` int64 [B, S] and return its mask int64 [B, S] (all ones when None is given).

    Raises:
        MoEdgeError: wrong shape, an id outside the vocabulary, or padding that is not on the left.
    """
    if ids.ndim != 2 or ids.size == 0:
        raise MoEdgeError(f"Token ids must be a non-empty [batch, sequence] array, not shape {ids.shape}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise MoEdgeError(f"Token id outside 0..{vocab_size - 1}: the text was tokenized for another model.")
    if attention_mask is None:
        return np.ones(ids.shape, dtype=np.int64)
    mask = np.asarray(attention_mask, dtype=np.int64)
    if mask.shape != ids.shape or (np.diff(mask, axis=1) < 0).any() or not (mask[:, -1] == 1).all():
        raise MoEdgeError(f"The attention mask must have shape {ids.shape} and hold zeros on the left only.")
    return mask


def check_cache(usable: bool) -> None:
    """Refuse a cache that is not ``usable``: of this engine and of as many rows as the call has, and not used up.

    Raises:
        MoEdgeError: it is not.
    """
    if not usable:
        raise MoEdgeError("This cache was used before or belongs to another engine or batch; prefill again.")


FORCED = np.float32(2.0**100)
"""Added to the selection score of a forced expert: far above any score, far below the largest float32."""


def forcing(experts: np.ndarray | None, tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """Return float32 [T, E] to add to selection scores so that exactly ``experts`` [T, k] are selected; zeros for None.

    Raises:
        MoEdgeError: the choice is for another number of tokens or experts.
    """
    bias = np.zeros((tokens, num_experts), dtype=np.float32)
    if experts is not None:
        if experts.shape != (tokens, top_k) or experts.min() < 0 or experts.max() >= num_experts:
            raise MoEdgeError(
                f"A choice of shape {experts.shape} cannot be replayed for {tokens} tokens and {top_k} of {num_experts}"
                " experts: these are not the same model."
            )
        np.put_along_axis(bias, experts.astype(np.int64), FORCED, axis=1)
    return bias


def factors_of(values: np.ndarray, threshold: np.ndarray, ramp: float, place: GatherPlace) -> np.ndarray:
    """Return what :mod:`moedge.convert.ops.gather` multiplies ``values`` [T, K] by: float32, 0 to 1; NaN stays NaN.

    Raises:
        MoEdgeError: there is another number of values than of thresholds.
    """
    if values.shape[1:] != threshold.shape:
        raise MoEdgeError(
            f"Layer {place[0]} leaves out of {threshold.size} values in the reference, of a shape {values.shape[1:]} "
            "in the test engine: these are not the same model."
        )
    with np.errstate(invalid="ignore"):
        part = (np.abs(values) - threshold) / (threshold * np.float32(ramp))
    return np.clip(part, np.float32(0), np.float32(1)).astype(np.float32, copy=False)


def known_places(given: Iterable[GatherPlace], known: Container[GatherPlace]) -> None:
    """Refuse values of a place at which a model leaves nothing out.

    Raises:
        MoEdgeError: there is one.
    """
    for layer, which in given:
        if (layer, which) not in known:
            raise MoEdgeError(
                f"Layer {layer} leaves small values ({which}) out in one engine only: these are not the same model."
            )


def check_length(total: int, max_length: int) -> None:
    """Refuse to run past what the model or its cache can hold.

    Raises:
        MoEdgeError: ``total`` tokens are more than ``max_length``.
    """
    if total > max_length:
        raise MoEdgeError(f"{total} tokens do not fit: this model holds at most {max_length}; ask for fewer.")


def position_ids(mask: np.ndarray, last: int) -> np.ndarray:
    """Positions int64 [B, last] of the last ``last`` columns of ``mask`` [B, P]; padding gets position 0."""
    return np.clip(np.cumsum(mask, axis=1) - 1, 0, None)[:, -last:]
