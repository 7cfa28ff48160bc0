"""HierarchicalFFN: a Mixture-of-Experts whose experts are Mixtures-of-Experts themselves.

P parent experts that were split, K parents active for a token, E sub-experts of each, k of them active, H hidden,
S shared width, I sub-expert width, T tokens. With the parents' router untouched::

    y = sum over selected parents p of g_p * ( shared_p(x) + sum over selected e of p of E_pe(x) )

The hierarchy runs flat: the shared blocks are one SparseGLU over P experts with the parents' indices and weights, the
sub-experts one over P*E experts with the composed indices p*E + e and the weight g_p repeated k times, because the sum
over e is inside the factor g_p. Both are matrix products grouped by expert; nothing loops over tokens. Every
sub-router scores every token (one product for all P*E rows), and the scores of the selected parents are gathered.

Parents that stay dense are a third SparseGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import moedge.convert.ops  # noqa: F401  registers torch.ops.moedge
from moedge import MoEdgeError
from moedge.convert import moe_adapters, routers
from moedge.convert.plan import LayerPlan


class HierarchicalFFN(nn.Module):
    """The FFN of one layer, made from its section of config.json alone (see :func:`layer_config`), with empty weights.

    Attributes:
        layer_index: position in the model.
        num_experts: E. top_k: k; settable, and with ``top_k = num_experts`` the FFN is the parent's.
        record_routes: when True, ``last_routes`` holds the composed indices of the latest call, int32 [T, K*k] (those
            of a dense parent's places are of no meaning).
    """

    shared_gate: torch.Tensor
    shared_up: torch.Tensor
    shared_down: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    dense_gate: torch.Tensor
    dense_up: torch.Tensor
    dense_down: torch.Tensor
    split_slot: torch.Tensor
    dense_slot: torch.Tensor
    no_bias: torch.Tensor

    def __init__(self, layer_index: int, hidden_size: int, spec: dict[str, Any], parent_router: nn.Module) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.parent_router = parent_router
        self.num_experts: int = spec["num_experts"]
        self.top_k: int = spec["top_k"]
        self.activation: str = spec["activation"]
        self.record_routes = False
        self.last_routes: torch.Tensor | None = None
        self.dense_parents = len(spec["dense"])
        split, shared, inner = spec["parents"] - self.dense_parents, spec["shared_width"], spec["expert_width"]
        groups = {"shared_": (split, shared), "": (split * self.num_experts, inner)}
        if self.dense_parents:
            groups["dense_"] = (self.dense_parents, spec["parent_width"])
        for prefix, (count, width) in groups.items():
            for name, shape in (("gate", (width, hidden_size)), ("up", (width, hidden_size)), ("down", None)):
                shape = shape or (hidden_size, width)
                self.register_parameter(prefix + name, nn.Parameter(torch.empty(count, *shape)))
        # Where a parent's weights lie among the split ones (-1: it is dense), and among the dense ones.
        for name in ("split_slot", "dense_slot") if self.dense_parents else ():
            self.register_buffer(name, torch.zeros(spec["parents"], dtype=torch.int64))
        # moedge::Route takes a bias; a layer's sub-routers have none of their own.
        self.register_buffer("no_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        kind, options = spec["router"]["kind"], spec["router"]["options"]
        self.router = routers.build(kind, split * self.num_experts, hidden_size, self.activation, options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the FFN output, same shape and dtype as x [..., H]."""
        flat = x.reshape(-1, x.shape[-1])
        _, parent_weights, parents = self.parent_router(flat)
        weights = parent_weights.float()
        slots = parents
        if self.dense_parents:
            # A dense parent's places run sub-experts of the first parent with weight 0.
            slots = self.split_slot[parents]
            weights = torch.where(slots >= 0, weights, 0.0)
            slots = slots.clamp_min(0)
        y = torch.ops.moedge.sparse_glu(
            flat, slots.to(torch.int32), weights, self.shared_gate, self.shared_up, self.shared_down, None,
            self.activation,
        )  # fmt: skip
        indices, repeated = self._compose(flat, slots, weights)
        if self.record_routes:
            self.last_routes = indices
        y = y + torch.ops.moedge.sparse_glu(
            flat, indices, repeated, self.gate, self.up, self.down, None, self.activation
        )
        if self.dense_parents:
            y = self._add_dense(y, flat, self.dense_slot[parents], parent_weights.float())
        return y.reshape(x.shape)

    def _compose(
        self, flat: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the composed indices int32 [T, K*k] and their weights float32 [T, K*k]."""
        scores = self.router(flat.float()).unflatten(1, (-1, self.num_experts))
        of_selected = scores.gather(1, slots.unsqueeze(2).expand(-1, -1, self.num_experts))
        # Rows are (token, selected parent) pairs from here on.
        chosen, unit = torch.ops.moedge.route(of_selected.flatten(0, 1), self.no_bias, None, self.top_k, "unit")
        first = (slots.reshape(-1, 1) * self.num_experts).to(torch.int32)
        places = slots.shape[1] * self.top_k
        return (first + chosen).reshape(-1, places), (weights.reshape(-1, 1) * unit).reshape(-1, places)

    def _add_dense(
        self, y: torch.Tensor, flat: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        weights = torch.where(slots >= 0, weights, 0.0)
        arguments = (self.dense_gate, self.dense_up, self.dense_down, None, self.activation)
        if torch.compiler.is_exporting():  # shapes must not depend on the routing: the others run with weight 0
            slots = slots.clamp_min(0).to(torch.int32)
            return y + torch.ops.moedge.sparse_glu(flat, slots, weights, *arguments)
        token, place = (slots >= 0).nonzero(as_tuple=True)
        if not len(token):
            return y
        index, weight = slots[token, place][:, None].to(torch.int32), weights[token, place][:, None]
        return y.index_add(0, token, torch.ops.moedge.sparse_glu(flat[token], index, weight, *arguments))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HierarchicalFFN:
        """Move or cast, but never cast the sub-routers (``model.to(torch.bfloat16)``)."""
        kept = {id(self.no_bias), *(id(parameter) for parameter in self.router.parameters())}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        super()._apply(move, recurse)
        return self


def layer_config(layer: LayerPlan, activation: str) -> dict[str, Any] | None:
    """Return what config.json says about one layer, or None when it stays as it is (dense, or no parent was split).

    Raises:
        MoEdgeError: the parents of the layer are split in different ways, which one flat layer cannot hold.
    """
    children = layer.children or []
    split = [child for child in children if child.experts]
    if not split:
        return None
    first = split[0]
    assert first.router is not None  # LayerPlan.validate
    for child in split:
        same = (len(child.shared), child.num_experts, child.expert_width, child.top_k, child.combine)
        router = child.router
        if (
            same != (len(first.shared), first.num_experts, first.expert_width, first.top_k, "unit")
            or router is None
            or (router.kind, router.options) != (first.router.kind, first.router.options)
            or any(
                getattr(child, name) is not None
                for name in ("compensation", "expert_bias", "output_bias", "down", "zeros", "scale")
            )
            or (child.selection_bias is not None and child.selection_bias.any())
        ):
            raise MoEdgeError(
                "The experts of a layer are split in different ways, or with biases or weights; a hierarchical layer "
                "needs one layout, unit weights and plain routers. Convert with --method cmoe-hierarchical."
            )
    return {
        "parents": len(children),
        "parent_width": max(len(child.shared) + sum(map(len, child.experts)) for child in children),
        "dense": [number for number, child in enumerate(children) if not child.experts],
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "shared_width": len(first.shared),
        "expert_width": first.expert_width,
        "activation": activation,
        "router": {"kind": first.router.kind, "options": first.router.options},
    }


def block_config(block: moe_adapters.Block, layer: LayerPlan) -> dict[str, Any] | None:
    """:func:`layer_config` of a layer of a model."""
    return layer_config(layer, block.hidden_act)


@torch.no_grad()
def build_ffn(block: moe_adapters.Block, layer: LayerPlan) -> nn.Module:
    """Split the experts of one layer by its plan; the result owns copies of the rows it uses, and the parents' router.

    A layer that stays as it is gives back its own module.
    """
    spec = layer_config(layer, block.hidden_act)
    if spec is None:
        return block.module
    assert layer.children is not None
    parents = block.experts()
    like = parents[0].down
    with torch.device("meta"):
        ffn = HierarchicalFFN(block.index, like.shape[0], spec, nn.Identity())
    ffn.parent_router = block.module.get_submodule("gate")
    pairs = list(zip(parents, layer.children, strict=True))
    for prefix, wanted in (("shared_", True), ("", True), ("dense_", False)):
        members = [(parent, child) for parent, child in pairs if bool(child.experts) == wanted]
        for name in ("gate", "up", "down") if members else ():
            old = ffn.get_parameter(prefix + name)
            new = like.new_zeros(old.shape)
            for number, (parent, child) in enumerate(members):
                groups = child.experts if not prefix else [child.shared]
                for part, neurons in enumerate(groups):
                    _copy(getattr(parent, name), neurons, new[number * len(groups) + part], columns=name == "down")
            ffn.register_parameter(prefix + name, nn.Parameter(new, requires_grad=False))
    if spec["dense"]:
        dense = np.isin(np.arange(spec["parents"]), spec["dense"])
        for name, mask in (("split_slot", ~dense), ("dense_slot", dense)):
            slots = np.where(mask, np.cumsum(mask) - 1, -1)
            setattr(ffn, name, torch.from_numpy(slots).to(like.device))
    ffn.no_bias = torch.zeros(ffn.num_experts, device=like.device)
    split = [child.router for child in layer.children if child.router is not None]
    tensors = {name: np.concatenate([router.tensors[name] for router in split]) for name in split[0].tensors}
    count = len(split) * ffn.num_experts
    joined = type(split[0])(split[0].kind, tensors, split[0].options)
    router = routers.from_plan(joined, count, like.shape[0], block.hidden_act)
    ffn.router = router.to(like.device).requires_grad_(False)
    return ffn.train(block.module.training)


def _copy(source: torch.Tensor, neurons: np.ndarray, target: torch.Tensor, *, columns: bool) -> None:
    """Copy rows (or columns) of a parent's weight to the front of a zero-padded one."""
    index = torch.from_numpy(neurons.astype(np.int64)).to(source.device)
    if columns:
        target[:, : len(index)] = source[:, index]
    else:
        target[: len(index)] = source[index]
