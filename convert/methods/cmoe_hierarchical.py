"""CMoE applied to the experts of an existing Mixture-of-Experts (arXiv 2502.04416v3, hierarchical use).

Steps 1 to 4 of :mod:`moedge.convert.methods.cmoe` on every expert: E_i(x) -> shared_i(x) + sum_j g_ij(x) E_ij(x), with
a sub-router of its own. The model's own router is not touched.

The paper leaves open what an expert is calibrated on; here it is exactly the tokens that the model's router sends to
it, and an expert that gets fewer than ``min_tokens`` of them stays as it is (listed in the layer's report). With 16,384
tokens and 8 of 64 experts active an expert sees 2,048 on average.

Memory: the inputs of one layer for all tokens, and the activations [n, I] of one expert. Statistics are those of the
unchanged model (one pass).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from moedge import MoEdgeError
from moedge.convert import moe_adapters, partition
from moedge.convert.methods import cmoe
from moedge.convert.methods.layers import Layers
from moedge.convert.plan import LayerPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.calibration import LayerStatistics, Profile


class HierarchicalParams(cmoe.CMoEParams):
    """Typed parameters; the layout S3A3E8 splits every expert into 3 shared and 5 routed parts of which 3 run."""

    shared: int = Field(default=3, ge=0)
    """Always-on parts of every expert, S."""
    active: int = Field(default=3, ge=1)
    """Routed parts that run for a token, A."""
    experts: int = Field(default=8, ge=2)
    """Parts that every expert is cut into, E."""
    min_tokens: int = Field(default=256, ge=1)
    """An expert with fewer calibration tokens stays dense."""


def plan(
    token_windows: np.ndarray,
    model: PreTrainedModel,
    params: HierarchicalParams,
    progress: Progress | None = None,
) -> Layers:
    """Plan layers with ``children``, one for each expert of the model.

    Args:
        token_windows: calibration ids, int64 [N, L].
        model: the Mixture-of-Experts to convert (``moe_adapters.FAMILIES``); it is not changed.
        progress: called with (layers done, layers).

    Raises:
        MoEdgeError: another family, a width that does not divide, or no expert that sees enough tokens.
    """
    from moedge.convert import streaming

    blocks = moe_adapters.blocks(model)
    width = next(block.width for block in blocks if block.sparse)
    partition.group_widths(width, params.shared, params.experts, params.padding)  # refuses a width before any work
    layers = []
    for block, x in streaming.inputs(model, token_windows, blocks):
        layers.append(_layer(block, x, params) if block.sparse else LayerPlan(_NONE, [], 0, children=[]))
        if progress:
            progress(len(layers), len(blocks))
    if not any(child.experts for layer in layers for child in layer.children or []):
        most = max((max(layer.report["tokens"]) for layer in layers if layer.children), default=0)
        raise MoEdgeError(
            f"No expert sees min_tokens={params.min_tokens} of the {token_windows.size:,} calibration tokens (the "
            f"busiest {most:,}); calibrate on more text, or lower min_tokens."
        )
    return Layers(layers)


_NONE = np.zeros(0, dtype=np.int32)


def _layer(block: moe_adapters.Block, x: torch.Tensor, params: HierarchicalParams) -> LayerPlan:
    """Plan every expert of one layer from x [T, H]."""
    import torch

    chosen, _ = block.route(x)
    flat = chosen.reshape(-1)
    # Tokens sorted by expert once; each expert's are then a slice.
    tokens = flat.argsort(stable=True) // chosen.shape[1]
    counts = torch.bincount(flat, minlength=block.num_experts).tolist()
    children, dense, start = [], [], 0
    for expert, count in zip(block.experts(), counts, strict=True):
        own = x[tokens[start : start + count]]
        start += count
        if count < params.min_tokens:
            dense.append(expert.number)
            children.append(LayerPlan(np.arange(block.width, dtype=np.int32), [], 0, report={"tokens": count}))
            continue
        child = cmoe.layer_plan(_statistics(expert, own, params.k_a, params.profile), expert, params)
        child.report["tokens"] = count
        children.append(child)
    report = {"tokens": counts, "dense_experts": dense}
    return LayerPlan(_NONE, [], 0, children=children, report=report)


def _statistics(expert: moe_adapters.Expert, x: torch.Tensor, k_a: int, profile: Profile) -> LayerStatistics:
    """Return the ATopK marks of one expert on its own tokens x [n, H], as calibration.collect makes them."""
    import torch.nn.functional as F

    from moedge.convert.calibration import LayerStatistics
    from moedge.convert.ops import activate

    width = expert.down.shape[1]
    if k_a > width:
        raise MoEdgeError(f"k_a={k_a} must be between 1 and the expert width {width}.")
    x, gate, up = x.float(), expert.gate.float(), expert.up.float()
    h = activate(F.linear(x, gate), expert.hidden_act) * F.linear(x, up)
    mean, variance = h.mean(dim=0), h.var(dim=0, correction=0)
    if profile == "normalised":
        x, gate, up = (F.normalize(value, dim=-1) for value in (x, gate, up))
        h = activate(F.linear(x, gate), expert.hidden_act) * F.linear(x, up)
    top = h.abs().topk(k_a, dim=-1).indices.sort(dim=-1).values
    marks = top.cpu().numpy().astype(np.uint16 if width <= 1 << 16 else np.int32)
    return LayerStatistics(marks, mean.cpu().numpy(), variance.cpu().numpy(), profile)
