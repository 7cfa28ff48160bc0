"""Applying a plan to a model, and converted checkpoints that Hugging Face loads.

Importing this module registers their model types with the Auto classes (:mod:`moedge.convert.model_types`).
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.convert import adapters, hierarchical, kept_inputs, moe_adapters, offload, sources
from moedge.convert.errors import quiet
from moedge.convert.model_types import CHECKPOINT_SCHEMA, CONFIGS, MODELS
from moedge.convert.plan import LayerPlan, MoEPlan
from moedge.convert.sources import tokenizer_files
from moedge.convert.sparse_ffn import (
    SparseFFN,
    block_config,
    build_ffn,
    layer_config,
    layer_facts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CHECKPOINT_SCHEMA",
    "CONFIGS",
    "MODELS",
    "SparseFFN",
    "apply",
    "block_config",
    "build_ffn",
    "check_fits",
    "hierarchical_ffns",
    "layer_config",
    "load",
    "save",
    "sparse_ffns",
]

_SHARD = "2GB"
"""Most bytes of one file of weights; two of these are held in memory while a model is written from disk to disk."""


def apply(plan: MoEPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Turn a dense model into the Mixture-of-Experts of a plan, in place.

    Works layer by layer and frees each dense FFN before the next one, so the model is never held twice. Of a model
    whose layers are on disk (:mod:`moedge.convert.offload`) nothing is read before :func:`save`. The model
    becomes one of the registered classes, so ``save_pretrained`` and ``generate`` work on it.

    Raises:
        MoEdgeError: the plan was made for a model of another shape.
    """
    check_fits(plan, model)
    base = model.config.model_type
    nested = base in moe_adapters.FAMILIES
    pending: deque[Any] = deque(moe_adapters.blocks(model) if nested else adapters.ffns(model))
    config_of: Callable[[Any, LayerPlan], Any] = hierarchical.block_config if nested else block_config
    build: Callable[[Any, LayerPlan], nn.Module] = hierarchical.build_ffn if nested else build_ffn
    if offload.is_offloaded(model):
        build = _later
    # Made first: what cannot be built is refused before anything is changed.
    specs = [config_of(block, layer) for block, layer in zip(pending, plan.layers, strict=True)]
    while pending:
        block = pending.popleft()
        model.set_submodule(block.name, build(block, plan.layers[block.index]))
    del block
    gc.collect()
    kept = kept_inputs.apply(model, plan.layers)
    if nested:  # names of the hub's files for the parent's experts; these tensors are others
        model.__dict__.pop("_weight_conversions", None)
    dense = model.config
    config = CONFIGS[base].from_dict({**dense.to_dict(), "model_type": adapters.MOE_PREFIX + base})
    config.moedge = {
        "schema": CHECKPOINT_SCHEMA,
        "plan_sha256": plan.sha256,
        "method": plan.method,
        "layers": specs,
        **({"kept_inputs": kept} if any(kept) else {}),
    }
    config.architectures = [MODELS[base].__name__]
    config._attn_implementation = dense._attn_implementation
    for module in model.modules():
        if getattr(module, "config", None) is dense:
            module.config = config
    model.__class__ = MODELS[base]  # the same attributes; only __init__ and the config class differ
    return model


def _later(block: adapters.FFN, layer: LayerPlan) -> nn.Module:
    """Return a converted FFN without memory: it is built when it is written."""
    with torch.device("meta"):
        skeleton = SparseFFN(block.index, block.hidden_size, block_config(block, layer))
    return offload.deferred(skeleton, lambda: build_ffn(block, layer))


def check_fits(plan: MoEPlan, model: PreTrainedModel) -> None:
    """Check that a plan was made for a model of this shape.

    Raises:
        MoEdgeError: it was not, the plan is inconsistent, or its checkpoint's weights were trained afterwards.
    """
    if plan.trained_weights:
        raise MoEdgeError(
            "The plan belongs to fine-tuned weights, so it cannot be applied to a dense model; load its checkpoint."
        )
    if model.config.model_type.startswith(adapters.MOE_PREFIX):
        raise MoEdgeError("The model is converted already; apply the plan to its dense parent.")
    nested = model.config.model_type in moe_adapters.FAMILIES
    found = moe_adapters.describe(model) if nested else adapters.describe(model)
    for key in ("model_type", "hidden_size", "intermediate_size", "num_layers", "hidden_act"):
        if plan.model.get(key) != found[key]:
            raise MoEdgeError(
                f"The plan is for {key}={plan.model.get(key)}, the model has {found[key]}; convert again."
            )
    if len(plan.layers) != found["num_layers"]:
        raise MoEdgeError(f"The plan has {len(plan.layers)} layers, the model {found['num_layers']}; convert again.")
    counts = {len(layer.children) for layer in plan.layers if layer.children}
    if nested and (any(layer.children is None for layer in plan.layers) or counts != {found["num_experts"]}):
        raise MoEdgeError(f"The plan does not split the model's {found['num_experts']} experts; convert again.")
    if not nested and counts:
        raise MoEdgeError("The plan splits experts, the model is dense; convert again.")
    plan.validate()


def save(
    model: PreTrainedModel, plan: MoEPlan, tokenizer: PreTrainedTokenizerBase, folder: Path, *, force: bool = False
) -> None:
    """Write a checkpoint folder, whole or not at all: weights, configs, tokenizer, plan.json and plan.safetensors.

    Raises:
        MoEdgeError: the plan has not been applied to the model, or the folder is in use, not writable or what the model
            was loaded from.
    """
    moedge_config = getattr(model.config, "moedge", None)
    if not moedge_config or moedge_config["plan_sha256"] != plan.sha256:
        raise MoEdgeError("The model to save was not made by this plan; call apply(plan, model) first.")
    with atomic_dir(folder, force=force, inputs=[model.name_or_path]) as partial, quiet():
        model.save_pretrained(partial, state_dict=offload.names(model), max_shard_size=_SHARD)
        tokenizer_files.save(tokenizer, partial)
        plan.save(partial)


def load(
    folder: Path, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, MoEPlan, PreTrainedTokenizerBase]:
    """Read a checkpoint folder: (model in eval mode, plan, tokenizer).

    ``dtype`` is that of the model, whatever was saved; ``auto`` is what was saved. ``device``: see
    :func:`moedge.convert.sources.check_device`.

    Raises:
        MoEdgeError: not a MoEdge checkpoint, damaged, or its plan is not the one the weights were made with.
    """
    plan = MoEPlan.load(folder)
    model = sources.load_model(folder, dtype, device)
    section = getattr(model.config, "moedge", None)
    if not section or section.get("plan_sha256") != plan.sha256 or not _describes(section, plan):
        raise MoEdgeError(f"{folder}: config.json and plan.json are not of the same conversion; convert again.")
    return model, plan, sources.load_tokenizer(folder)


def _describes(section: dict[str, Any], plan: MoEPlan) -> bool:
    """Whether the section of config.json is of the plan (nested layers are only counted)."""
    specs, kept = section["layers"], kept_inputs.wanted(plan.layers)
    if section.get("kept_inputs", [None] * len(specs)) != kept:
        return False
    return len(specs) == len(plan.layers) and all(
        layer.children is not None or all(spec.get(name) == value for name, value in layer_facts(layer).items())
        for spec, layer in zip(specs, plan.layers, strict=True)
    )


def hierarchical_ffns(model: PreTrainedModel) -> list[hierarchical.HierarchicalFFN]:
    """List the HierarchicalFFN modules of a converted Mixture-of-Experts, first layer first."""
    return [module for module in model.modules() if isinstance(module, hierarchical.HierarchicalFFN)]


def sparse_ffns(model: PreTrainedModel) -> list[SparseFFN]:
    """List the SparseFFN modules of a converted model, first layer first."""
    return [module for module in model.modules() if isinstance(module, SparseFFN)]
