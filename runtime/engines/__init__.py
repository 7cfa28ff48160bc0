"""One runtime per file behind one small protocol.

Parity, benchmark and generation know only :class:`Engine`, so PyTorch, ONNX Runtime and TensorRT compare like with
like.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moedge import MoEdgeError
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.export.manifest import MANIFEST
from moedge.runtime.engines.protocol import BranchingEngine as BranchingEngine
from moedge.runtime.engines.protocol import Engine as Engine
from moedge.runtime.engines.protocol import LayerEngine as LayerEngine
from moedge.runtime.engines.protocol import LayerMode as LayerMode
from moedge.runtime.engines.protocol import ReplayEngine as ReplayEngine
from moedge.runtime.engines.protocol import Step as Step

_CLASSES = {
    "checkpoint": "moedge.runtime.engines.pytorch:TorchEngine",
    "bundle": "moedge.runtime.engines.ort:OrtEngine",
    "engine": "moedge.runtime.engines.trt:TensorRTEngine",
}
"""What a folder may hold -> ``module:class`` that runs it, imported when one is opened."""


def open_engine(
    path: str | Path, *, pytorch: Mapping[str, Any] | None = None, peer: str | None = None, **options: Any
) -> Engine:
    """Open a bundle folder (ONNX) or a checkpoint folder (PyTorch, dense or MoE) by what the folder holds.

    Args:
        path: folder with ``manifest.json`` (bundle) or ``config.json`` (checkpoint).
        pytorch: ``device`` and ``dtype`` of a checkpoint that runs in PyTorch. A bundle's own target says both.
        peer: another program that runs it, and what ``path`` then is: :mod:`moedge.runtime.peers`.
        options: passed to the engine: ``threads``, ``taps``, ``top_k``, ...

    Raises:
        MoEdgeError: the folder is neither, or its target has no engine in this release.
    """
    folder = Path(path)
    if peer is not None:
        from moedge.runtime import peers

        row = peers.find(peer)
        other: Engine = row.engine(folder, **(pytorch or {} if row.pytorch else {}), **options)
        return other
    kind = _kind(folder)
    if kind == "checkpoint":
        options = {**(pytorch or {}), **options}
    module, _, name = _CLASSES[kind].partition(":")
    opened: Engine = getattr(importlib.import_module(module), name)(folder, **options)
    return opened


def check_model(folder: Path) -> None:
    """Refuse what :func:`open_engine` has no engine for, without opening it.

    Raises:
        MoEdgeError: as there.
    """
    _kind(folder)


def _kind(folder: Path) -> Literal["checkpoint", "bundle", "engine"]:
    """What the folder holds that can be run; anything else is refused."""
    if (folder / MANIFEST).is_file():
        manifest = manifests.load(folder)
        schema = str(manifest.get("schema", "")) if isinstance(manifest, dict) else ""
        if schema.startswith("moedge.engine/"):
            return "engine"
        if not isinstance(manifest, dict) or not schema.startswith("moedge.bundle/"):
            raise MoEdgeError(f"{folder} is not a bundle (its manifest.json has another schema); give a bundle folder.")
        target = manifest.get("target")
        if targets.known(str(target)) is None:
            raise MoEdgeError(f"Bundle {folder} is for target {target!r}, which this release cannot run.")
        return "bundle"
    if (folder / "config.json").is_file():
        return "checkpoint"
    if not folder.exists():
        raise MoEdgeError(f"No model at {folder}: the folder does not exist.")
    raise MoEdgeError(f"{folder} holds neither a bundle (manifest.json) nor a checkpoint (config.json).")
