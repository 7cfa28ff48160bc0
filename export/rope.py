"""Longrope, as a fact of a model: the length at which its rotary frequencies change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedge.export.manifest import ModelFacts

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
