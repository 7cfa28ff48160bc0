"""PyTorch: from a checkpoint folder to a module, its routed layers and the facts that results name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.configs.generation_config import GenerationConfig
from moedge.convert.adapters import MOE_PREFIX
from moedge.export import rope
from moedge.export.manifest import GatherPlace
from moedge.runtime.engines.info import EngineInfo, EngineModel


def load(folder: Path, dtype: str, device: str) -> Any:
    """Load a dense or a converted checkpoint in eval mode.

    Raises:
        MoEdgeError: torch or transformers is missing, or the folder cannot be loaded.
    """
    from moedge.convert import sources
    from moedge.convert.sources import folder_check

    if not (folder / "config.json").exists():
        raise MoEdgeError(f"{folder} is not a checkpoint folder: config.json is missing.")
    if str(folder_check.read_object(folder / "config.json").get("model_type")).startswith(MOE_PREFIX):
        from moedge.convert import modeling

        return modeling.load(folder, dtype, device)[0].eval()
    return sources.load_model(folder, dtype, device).eval()


def routed_layers(module: Any) -> dict[int, Any]:
    """Return the layers that choose experts, by index."""
    return {part.layer_index: part for part in module.modules() if hasattr(part, "record_routes") and part.num_experts}


def gathered_layers(module: Any) -> list[Any]:
    """Return the parts that leave small values out: FFNs, attention, output projections."""
    from moedge.convert.kept_inputs import KeepsLarge

    return [part for part in module.modules() if isinstance(part, KeepsLarge) and part.thresholds()]


def thresholds(module: Any) -> dict[GatherPlace, tuple[np.ndarray, float]]:
    """Return thresholds float32 [K] and ramp of each place whose choice can be replayed: not inside experts."""
    return {
        (part.layer_index, which): (threshold.cpu().numpy(), part.ramp)
        for part in gathered_layers(module)
        for which, threshold in part.thresholds().items()
        if which != "expert_h"
    }


def set_top_k(layers: dict[int, Any], top_k: int, folder: Path) -> None:
    """Run each of ``layers`` with ``top_k`` experts, or all of them where it has fewer.

    Raises:
        MoEdgeError: there is no routed layer, or ``top_k`` is below 1.
    """
    if top_k < 1 or not layers:
        raise MoEdgeError(f"top_k={top_k} cannot be set on {folder}: it needs k >= 1 and a routed model.")
    for module in layers.values():
        module.top_k = min(top_k, module.num_experts)


def describe(
    module: Any, folder: Path, dtype: str, threads: int, *, routed: bool, gathered: bool, top_k: int | None
) -> EngineInfo:
    """Return the facts that are printed beside every number."""
    import torch

    config = module.config
    moe = str(config.model_type).startswith(MOE_PREFIX)
    generation = GenerationConfig.read(folder)
    facts = {
        "model_type": config.model_type,
        "vocab_size": int(config.vocab_size),
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "max_position_embeddings": int(config.max_position_embeddings),
        "max_length": int(config.max_position_embeddings),
        "eos_token_ids": list(generation.ends),
        "generation": generation,
        rope.FACT: rope.boundary(config.to_dict()),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "label": folder.name,
        "target": "torch",
        "moe": moe,
        "routed": routed,
        "gathered": gathered,
        "top_k": top_k,
    }
    return EngineInfo(
        name=f"torch {'moe' if moe else 'dense'}",
        runtime=f"torch {torch.__version__}",
        device=_device_name(module.device),
        dtype=dtype,
        threads=threads,
        model=EngineModel.model_validate(facts),
    )


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(device)} ({device})"
    return str(device).upper()
