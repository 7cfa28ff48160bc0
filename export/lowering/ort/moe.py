"""moedge::Route + moedge::SparseGLU -> com.microsoft.MoE.

The kernel takes logits and applies its own softmax and top-k, so a router is dressed as logits whose softmax over the
selected experts gives the wanted weights (docs/node-forms.md 3.1): log(w_e) for the selected experts, -1e4 elsewhere,
and ``y = sum(w) * MoE``. With unit weights that is zeros scattered at the selected experts and a factor k.

``normalize_routing_weights=1`` always: the only mode that is right for every dtype of the CPU kernel. Scaling scores
towards zero instead (softmax of nearly equal logits is 1/k) does not work: the kernel ranks the float32 softmax over
all E, where scaled scores become ties (measured on 1.31.1: wrong experts from a factor of 2**-20 on, no error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import (
    Builder,
    array_of,
    constant_of,
    remove_unused,
    sizes,
    values_by_name,
    weights_dtype,
)
from moedge.export.graph.nodes import (
    KEEPS,
    activations,
    active_of,
    has_biases,
    holds_experts,
    keeps_large,
    layer_of,
    nodes_of,
    routed_directly,
    smallest_weight,
)
from moedge.export.lowering.rule import Applied, ends
from moedge.export.manifest import Tap

UNSELECTED = -1.0e4
"""Logit of an unselected expert: its softmax weight is exactly 0 beside any log(w) above -9.9e3; fits float16."""


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Row pairs g0, u0, g1, u1, ...: two [E, I, H] -> [E, 2I, H] (``swiglu_fusion=1``)."""
    experts, width, hidden = gate.shape
    return np.stack([gate, up], axis=2).reshape(experts, 2 * width, hidden)


def cpu_refusal(*, dtype: str, activations: set[str], smallest_weight: float) -> str | None:
    """Say why the kernel of the CPU provider cannot be used, or None.

    Args:
        dtype: weight dtype, e.g. ``float32``.
        activations: gate activations of the model's experts.
        smallest_weight: lower bound of the combination weights; the log-weight form needs it positive.
    """
    if dtype == "float16":
        return "the CPU kernel's float16 path loses 3 digits, and before 1.32 returns zeros without normalisation [M]"
    if dtype != "float32":
        return f"the CPU kernel has no {dtype} implementation [M]"
    if activations - {"silu"}:
        return f"the CPU kernel gates with SiLU only, the model uses {', '.join(sorted(activations))} [M]"
    return None if smallest_weight > 0 else NO_LOGIT


def cuda_refusal(*, activations: set[str], smallest_weight: float) -> str | None:
    """Say why the kernel of the CUDA provider (float16, ``normalize_routing_weights=1``) cannot be used, or None.

    Before 1.28 the kernel's SwiGLU had gpt-oss constants, whatever the attributes said (onnxruntime-genai #2062) [R];
    the extra ``moedge[cuda]`` asks for 1.31.
    """
    if activations - {"silu"}:
        return f"the node form gates with SiLU only, the model uses {', '.join(sorted(activations))}"
    return None if smallest_weight > 0 else NO_LOGIT


NO_LOGIT = "an expert weight can be zero or negative, which no logit expresses"
BIASED = "the experts have biases in gate or up, kept as a further input that the kernel has no place for"


@dataclass(frozen=True)
class FuseMoE:
    """Rule for every Route and SparseGLU; ``slower``: another form of the experts is known to be faster here."""

    provider: Literal["cpu", "cuda"] = "cpu"
    slower: bool = False
    name: str = "Route + SparseGLU -> MoE"

    def refuse(self, graph: ir.Model) -> str | None:
        """See :func:`cpu_refusal` and :func:`cuda_refusal`; no kernel has a place for biases."""
        nodes = nodes_of(graph, "SparseGLU")
        if not nodes:
            return "the graph has no SparseGLU node"
        facts: dict[str, Any] = {"activations": activations(graph), "smallest_weight": smallest_weight(graph)}
        cuda = self.provider == "cuda"
        reason = cuda_refusal(**facts) if cuda else cpu_refusal(dtype=weights_dtype(graph), **facts)
        if reason is None and self.slower:
            reason = "products of each expert are faster where experts are few and wide"
        return reason or (BIASED if any(map(has_biases, nodes)) else KEEPS if keeps_large(graph) else None)

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; the first and the last whole FFN are tested."""
        nodes = nodes_of(graph, "SparseGLU")
        blocks = ends([str(node.outputs[0].name) for node in nodes])
        return Applied(len(nodes), blocks, taps=_fuse(graph, nodes))


def _fuse(model: ir.Model, nodes: Sequence[ir.Node]) -> dict[int, Tap]:
    taps = {}
    for node in nodes:
        layer = layer_of(node)
        tap = _replace(model, node, layer)
        if holds_experts(node):
            taps[layer] = tap
    replace_unit_routes(model)
    return taps


def replace_unit_routes(model: ir.Model) -> None:
    """Let a TopK take the place of each Route that composes a hierarchy with weights 1.

    Any other that is left weighs experts, and its body stays.
    """
    remove_unused(model)
    for route in nodes_of(model, "Route"):
        if route.attributes["rule"].as_string() == "unit":
            _replace_route(Builder(model, before=route), route)
    remove_unused(model)


def _replace(model: ir.Model, node: ir.Node, layer: int) -> Tap:
    _, indices, weights, gate, _, _, *rest = node.inputs
    assert indices is not None
    assert weights is not None
    route = indices.producer()
    assert route is not None
    builder = Builder(model, before=node)
    if not routed_directly(node):
        return _replace_composed(builder, node, layer)
    top_k = route.attributes["top_k"].as_int()
    unit = route.attributes["rule"].as_string() == "unit"
    if unit:
        indices, logits = zeros_at_top_k(builder, route, layer, top_k, len(array_of(gate)))
        # An initializer of its own, so that a check with another k (every expert: the dense model) can set it.
        total = builder.initializer(f"layers.{layer}.router.weight_sum", np.array(top_k, np.float32))
    else:
        logits = log_weights(builder, route, indices, weights)
        total = builder.node("ReduceSum", [weights, constant_of(builder, [-1])], attributes={"keepdims": 1})
    y = _moe(builder, node, logits, top_k, f"layers.{layer}.experts")
    y = builder.node("Mul", [y, total])
    if rest:
        y = builder.node("Add", [y, compensated(builder, logits, rest[0])])
    builder.replace_output(node.outputs[0], y)
    return Tap(output=str(indices.name), kind="indices", top_k=top_k)


def _moe(builder: Builder, node: ir.Node, logits: ir.Value, top_k: int, name: str) -> ir.Value:
    x, _, _, gate, up, down = node.inputs[:6]
    experts, width, hidden = sizes(gate)
    # Made when it is written: all layers' together are two thirds of the experts' weights. The rule reads float32.
    fc1 = builder.lazy(
        f"{name}.gate_up",
        (experts, 2 * width, hidden),
        ir.DataType.FLOAT,
        lambda: interleave(array_of(gate), array_of(up)),
    )
    y: ir.Value = builder.node(
        "MoE",
        [x, logits, fc1, None, down],
        domain="com.microsoft",
        attributes={
            "k": top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 1,
        },
    )
    return y


def _replace_composed(builder: Builder, node: ir.Node, layer: int) -> Tap:
    """Replace a SparseGLU of a hierarchical layer: weights of any size from 0 on, an expert may be named twice.

    ``mask[t, e]`` is the sum of the weights that name e. Logits are its logarithm (-1e4 for 0), so the kernel's softmax
    over its k best gives mask / sum(mask), which the factor sum(mask) undoes.
    """
    indices, weights, gate = node.inputs[1], node.inputs[2], node.inputs[3]
    assert indices is not None
    assert gate is not None
    experts = len(array_of(gate))
    tokens = builder.node("Shape", [indices], attributes={"start": 0, "end": 1})
    shape = builder.node("Concat", [tokens, constant_of(builder, [experts])], attributes={"axis": 0})
    none = builder.node("ConstantOfShape", [shape], attributes={"value": ir.tensor(np.zeros(1, np.float32))})
    chosen = builder.node("Cast", [indices], attributes={"to": 7})
    attributes = {"axis": 1, "reduction": "add"}
    mask = builder.node("ScatterElements", [none, chosen, weights], attributes=attributes)
    logits = builder.node("Max", [builder.node("Log", [mask]), constant_of(builder, UNSELECTED, np.float32)])
    total = builder.node("ReduceSum", [mask, constant_of(builder, [-1])], attributes={"keepdims": 1})
    top_k = active_of(node)
    part = str(gate.name).rpartition(".mlp.")[2]
    y = _moe(builder, node, logits, min(top_k, experts), f"layers.{layer}.experts.{part}")
    builder.replace_output(node.outputs[0], builder.node("Mul", [y, total]))
    return Tap(output=str(indices.name), kind="indices", top_k=top_k)


def _replace_route(builder: Builder, route: ir.Node) -> None:
    scores, bias = route.inputs[:2]
    if array_of(bias).any():
        scores = builder.node("Add", [scores, bias])
    count = constant_of(builder, [route.attributes["top_k"].as_int()])
    best, chosen = builder.node("TopK", [scores, count], outputs=2, attributes={"axis": -1, "largest": 1, "sorted": 1})
    ones = builder.node("Add", [builder.node("Sub", [best, best]), constant_of(builder, 1, np.float32)])
    builder.replace_output(route.outputs[0], builder.node("Cast", [chosen], attributes={"to": 6}))
    builder.replace_output(route.outputs[1], ones)


def zeros_at_top_k(
    builder: Builder, route: ir.Node, layer: int, top_k: int, num_experts: int
) -> tuple[ir.Value, ir.Value]:
    """Return the selected experts int64 [T, k] and logits [T, E] that are 0 there and UNSELECTED elsewhere."""
    chosen, zeros = selection(builder, route, layer, top_k)
    floor = by_token(builder, f"router.floor.{num_experts}", num_experts, UNSELECTED)
    return chosen, builder.node("ScatterElements", [floor, chosen, zeros], attributes={"axis": 1})


def selection(builder: Builder, route: ir.Node, layer: int, top_k: int) -> tuple[ir.Value, ir.Value]:
    """Let a TopK select instead of a Route with unit weights; return the experts int64 [T, k] and zeros [T, k].

    Its k is an initializer of the layer, so that a check with another k (every expert: the dense model) can set it.
    """
    scores, bias = route.inputs[:2]
    assert scores is not None
    if array_of(bias).any():
        scores = builder.node("Add", [scores, bias])
    count = builder.initializer(f"layers.{layer}.router.top_k", np.array([top_k], np.int64))
    best, chosen = builder.node("TopK", [scores, count], outputs=2, attributes={"axis": -1, "largest": 1, "sorted": 1})
    chosen.name, chosen.type = f"layers.{layer}.router.indices", ir.TensorType(ir.DataType.INT64)
    zeros = builder.node("Sub", [best, best])
    # What else reads the routing (an expert bias) follows the TopK, whose k can be changed, and Route can go.
    for old, uses in zip(route.outputs, [list(value.uses()) for value in route.outputs], strict=True):
        others = [use for use in uses if use.node.op_type != "SparseGLU"]
        if others:
            new = (
                builder.node("Cast", [chosen], attributes={"to": 6})
                if old is route.outputs[0]
                else builder.node("Add", [zeros, constant_of(builder, 1.0, np.float32)])
            )
            for use in others:
                use.node.replace_input_with(use.idx, new)
    return chosen, zeros


def by_token(builder: Builder, name: str, columns: int, fill: float) -> ir.Value:
    """Return ``fill`` as [T, columns] at the top of the graph, made once a ``name`` (T: the number of fed tokens)."""
    existing = values_by_name(builder.model).get(name)
    if existing is not None:
        return existing
    top = Builder(builder.model, before=builder.graph[0])
    tokens = top.node("Reshape", [top.node("Size", [top.graph_input("input_ids")]), constant_of(top, [1])])
    shape = top.node("Concat", [tokens, constant_of(top, [columns])], attributes={"axis": 0})
    value = top.node("ConstantOfShape", [shape], attributes={"value": ir.tensor(np.array([fill], np.float32))})
    value.name = name
    return value


def log_weights(builder: Builder, route: ir.Node, indices: ir.Value, weights: ir.Value) -> ir.Value:
    """Return logits [T, E]: log(w) at the selected experts, UNSELECTED elsewhere."""
    shape = builder.node("Shape", [route.inputs[0]])
    fill = ir.tensor(np.array([UNSELECTED], np.float32))
    floor = builder.node("ConstantOfShape", [shape], attributes={"value": fill})
    chosen = builder.node("Cast", [indices], attributes={"to": 7})
    return builder.node("ScatterElements", [floor, chosen, builder.node("Log", [weights])], attributes={"axis": 1})


def compensated(builder: Builder, logits: ir.Value, compensation: ir.Value | None) -> ir.Value:
    """What the unselected experts contribute on average: the selected ones are those whose logit is above the floor."""
    below = builder.node("Less", [logits, constant_of(builder, UNSELECTED / 2, np.float32)])
    below.type = ir.TensorType(ir.DataType.BOOL)
    omitted = builder.node("Cast", [below], attributes={"to": 1})
    omitted.type = ir.TensorType(ir.DataType.FLOAT)
    return builder.node("MatMul", [omitted, compensation])
