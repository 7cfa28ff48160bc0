"""What training changed, in the plan: a checkpoint's plan has to say what the checkpoint holds."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge.convert import modeling, reads, scoring
from moedge.convert.modeling import SparseFFN
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = ("lora", "experts", "shared", "attention", "norms", "embeddings")
"""Groups that change what the plan does not hold."""
_PLAN = ("selection_bias", "scale", "compensation", "output_bias")
_COUNTED = 16
"""Windows on which is counted what a model with thresholds reads."""


def write_back(
    model: PreTrainedModel, plan: MoEPlan, groups: Collection[str], note: Mapping[str, Any], token_windows: np.ndarray
) -> MoEPlan:
    """Return the plan with what training changed in it; the model's config follows.

    When weights outside the plan were trained, the provenance holds their hash, a refitted ``down`` and ``zeros`` are
    dropped (the trained weights are in the checkpoint, and zeros need not have stayed zero), and
    :func:`moedge.convert.modeling.apply` refuses the plan.

    Args:
        model: as trained, in the dtype in which it is saved.
        plan: that the model was made by.
        groups: what was trained, see :class:`moedge.convert.train.settings.TrainSettings`.
        note: JSON for the plan's provenance.
        token_windows: int64 [N, L] of the text, on which is counted what a token reads now: thresholds stay as they
            are, what they are compared with moves.
    """
    before = model.config.moedge["layers"]
    # An output bias may hold the dense FFN's own bias, which is no part of the plan.
    biased = "compensation" in groups and any("output_bias" in entry["tensors"] for entry in before)
    weights = biased or any(group in _WEIGHTS for group in groups)
    layers = [_layer(layer, ffn, weights) for layer, ffn in zip(plan.layers, modeling.sparse_ffns(model), strict=True)]
    about = {"parent_plan_sha256": plan.sha256, "weights": weights_hash(model) if weights else None, **note}
    earlier = plan.provenance.get("finetune")
    if earlier:
        about["before"] = earlier
        about["weights"] = about["weights"] or earlier["weights"]
    provenance = {**plan.provenance, "finetune": about}
    if any(layer.gathers for layer in plan.layers):
        share = _read_share(model, plan, token_windows[:_COUNTED])
        provenance["gather"] = {**plan.provenance.get("gather", {}), "share": share}
    updated = replace(plan, layers=layers, provenance=provenance)
    activation = plan.model["hidden_act"]
    model.config.moedge = {
        **model.config.moedge,
        "plan_sha256": updated.sha256,
        "layers": [
            modeling.layer_config(
                layer, activation, biased=entry.get("biased", False), output_bias="output_bias" in entry["tensors"]
            )
            for layer, entry in zip(layers, before, strict=True)
        ],
    }
    return updated


@torch.no_grad()
def _read_share(model: PreTrainedModel, plan: MoEPlan, token_windows: np.ndarray) -> float:
    with reads.counted(model) as counts:
        scoring.last_hidden_states(model, {"text": token_windows})
    return counts.share(int(plan.model["intermediate_size"]))


def _layer(layer: LayerPlan, ffn: SparseFFN, weights: bool) -> LayerPlan:
    def array(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.detach().float().cpu().numpy().copy()

    changed: dict[str, Any] = {name: array(getattr(ffn, name)) for name in _PLAN}
    if layer.output_bias is None or not weights:
        changed["output_bias"] = layer.output_bias
    if layer.router is not None and ffn.router is not None:
        tensors = {name: array(tensor) for name, tensor in ffn.router.state_dict().items()}
        changed["router"] = RouterPlan(layer.router.kind, tensors, layer.router.options)  # type: ignore[arg-type]
    if weights:
        changed |= {"down": None, "zeros": None}
    return replace(layer, combine=ffn.combine, **changed)  # type: ignore[arg-type]


def weights_hash(model: PreTrainedModel) -> str:
    """Hash of all weights of a model by their names, as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
