"""One runtime per file behind one small protocol.

Parity, benchmark and generation know only :class:`Engine`, so PyTorch, ONNX Runtime and TensorRT compare like with
like.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moedge import MoEdgeError
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.export.manifest import MANIFEST
from moedge.runtime.engines.info import EngineInfo


@dataclass
class Step:
    """Result of one forward call.

    ``logits`` float32 [B, S, V] for the S positions that were fed, or [B, 1, V] for the last of them when opened with
    ``last_logits=True``; ``cache`` to pass on; ``routes`` per layer the
    selected experts, int32 [B*S, k] sorted by decreasing score, when the engine was opened with ``taps=True``;
    ``router_inputs`` per layer what its router read, float32 [B*S, H], when opened with ``router_inputs=True``;
    ``scores`` with them, per layer, what the engine ranked its experts by (selection bias included), float32 [B*S, E],
    or None where the runtime does not show it.
    """

    logits: np.ndarray
    cache: Any
    routes: dict[int, np.ndarray] | None = None
    router_inputs: dict[int, np.ndarray] | None = None
    scores: dict[int, np.ndarray] | None = None


class Engine(Protocol):
    """A loaded model that runs prefill and decode. A cache belongs to the engine that made it and is used once."""

    info: EngineInfo

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache. ``attention_mask`` int64 [B, S], 0 for (left) padding."""
        ...

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] (S is 1 when generating) after what ``cache`` holds.

        The result is that of one reading of the whole text, also where longrope changes its factors: that step then
        takes as long as a prefill.
        """
        ...

    def close(self) -> None:
        """Free the runtime's memory."""
        ...


@runtime_checkable
class ReplayEngine(Protocol):
    """An engine, opened with ``replay=True``, that can be told which experts to run: the reference of route replay.

    The weight of a forced expert follows the layer's rule from the engine's own scores. With ``taps=True`` its steps
    hold ``router_inputs``, too.
    """

    info: EngineInfo

    def prefill(
        self,
        ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        experts: dict[int, np.ndarray] | None = None,
    ) -> Step:
        """As :meth:`Engine.prefill` with ``experts`` int [B*S, k] per layer instead of the router's choice."""
        ...

    def decode(self, ids: np.ndarray, cache: Any, *, experts: dict[int, np.ndarray] | None = None) -> Step:
        """As :meth:`Engine.decode`, with ``experts`` as in :meth:`prefill`."""
        ...

    def scores(self, router_inputs: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What each layer ranks its experts by, float32 [T, E], when its router reads float32 [T, H].

        The selection bias is included: the k best are selected, ties to the lower index.
        """
        ...

    def close(self) -> None:
        """Free the runtime's memory."""
        ...


def open_engine(path: str | Path, *, pytorch: Mapping[str, Any] | None = None, **options: Any) -> Engine:
    """Open a bundle folder (ONNX) or a checkpoint folder (PyTorch, dense or MoE) by what the folder holds.

    Args:
        path: folder with ``manifest.json`` (bundle) or ``config.json`` (checkpoint).
        pytorch: ``device`` and ``dtype`` of a checkpoint that runs in PyTorch. A bundle's own target says both.
        options: passed to the engine: ``threads``, ``taps``, ``top_k``, ...

    Raises:
        MoEdgeError: the folder is neither, or its target has no engine in this release.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        manifest = manifests.load(folder)
        if isinstance(manifest, dict) and str(manifest.get("schema", "")).startswith("moedge.engine/"):
            from moedge.runtime.engines.trt import TensorRTEngine

            return TensorRTEngine(folder, **options)
        if not isinstance(manifest, dict) or not str(manifest.get("schema", "")).startswith("moedge.bundle/"):
            raise MoEdgeError(f"{folder} is not a bundle (its manifest.json has another schema); give a bundle folder.")
        target = manifest.get("target")
        if targets.known(str(target)) is None:
            raise MoEdgeError(f"Bundle {folder} is for target {target!r}, which this release cannot run.")
        from moedge.runtime.engines.ort import OrtEngine

        return OrtEngine(folder, **options)
    if (folder / "config.json").is_file():
        from moedge.runtime.engines.pytorch import TorchEngine

        return TorchEngine(folder, **{**(pytorch or {}), **options})
    if not folder.exists():
        raise MoEdgeError(f"No model at {folder}: the folder does not exist.")
    raise MoEdgeError(f"{folder} holds neither a bundle (manifest.json) nor a checkpoint (config.json).")


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
