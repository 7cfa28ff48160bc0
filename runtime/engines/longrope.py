"""Longrope: rotary frequencies that change when a text grows longer than those of the original training.

Up to ``original_max_position_embeddings`` tokens every frequency is a short one, beyond it a long one. Keys that were
cached before are of the wrong frequency after, so the whole text has to be read again there, once (transformers'
``generate()`` does so for Phi-3). Engines do it inside :meth:`moedge.runtime.engines.Engine.decode`: what they return
is what one reading of the whole text gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export.manifest import ModelFacts
from moedge.runtime.engines import Step

FACT = "rope_boundary"
"""Key of the boundary among a model's facts (``EngineInfo.model``, the manifest of a bundle)."""


def boundary(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which the short frequencies hold, by the keys of a ``config.json``; None where none change.

    Both forms are read: ``rope_parameters`` of transformers 5, and ``rope_scaling`` with the length beside it.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return None
    # A dictionary for each kind of layer, or one for all.
    kinds = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    found = [
        part.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        for part in kinds
        if part.get("rope_type", part.get("type")) in ("longrope", "su")
    ]
    return min((int(length) for length in found if length), default=None)


def of_bundle(folder: Path, model: ModelFacts) -> int | None:
    """:func:`boundary` of a bundle or engine folder with the facts ``model``; older ones have it in ``config.json``."""
    path = folder / "config.json"
    if FACT in model.model_fields_set or not path.is_file():
        return model.rope_boundary
    return boundary(json.loads(path.read_text(encoding="utf-8")))


def crosses(limit: int | None, mask: np.ndarray, new: int) -> bool:
    """Whether the last ``new`` columns of ``mask`` int64 [B, P] take a text, whose cache is shorter, beyond ``limit``.

    The longest row decides for the batch, as it does in the model.
    """
    if limit is None or new == mask.shape[1]:
        return False
    lengths = mask.sum(axis=1)
    before = mask[:, :-new].sum(axis=1)
    return bool(lengths.max() > limit >= before.max())


def refuse_forced(limit: int | None) -> None:
    """Say that experts cannot be forced on a step that reads the whole text again.

    Raises:
        MoEdgeError: always.
    """
    raise MoEdgeError(
        f"Beyond {limit} tokens this model's rotary factors (longrope) change and the whole text is read again, so the "
        "experts of every token would have to be given; prefill the whole text with them."
    )


def last(step: Step, new: int) -> Step:
    """Cut what a whole reading gave to its last ``new`` positions."""
    batch = len(step.logits)

    def rows(found: dict[int, np.ndarray] | None) -> dict[int, np.ndarray] | None:
        if found is None:
            return None
        return {
            layer: array.reshape(batch, -1, array.shape[1])[:, -new:].reshape(-1, array.shape[1])
            for layer, array in found.items()
        }

    return Step(step.logits[:, -new:], step.cache, rows(step.routes), rows(step.router_inputs))
