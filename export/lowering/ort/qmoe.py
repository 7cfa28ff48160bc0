"""moedge::Route + moedge::SparseGLU -> com.microsoft.QMoE, experts in blocks of 32 with 4 or 8 bits.

The CPU kernel (ONNX Runtime 1.31) takes its experts from ``router_probs`` and its weights from ``router_weights``
(input 14), so a router reaches it in one or two nodes:

===========  ==========================  =============================  =================
rule         router_probs                router_weights                 normalise
===========  ==========================  =============================  =================
unit         scores (+ bias)             ones                           0
scaled       scores (+ bias)             1 + scale * softmax(scores)    0
probability  scores (+ bias)             softmax(scores)                0
softmax      scores                      -                              1
softmax      scores + bias               softmax(scores)                1
normalised   scores (+ bias)             scores                         1
===========  ==========================  =============================  =================

Without input 14 the kernel ignores ``normalize_routing_weights=0`` (measured: relative error 0.6, no error message), so
that combination is never written. With input 14 and the flag at 1 unit weights would become 1/k. A weight <= 1e-8 is
dropped by the kernel: :func:`refusal` asks for positive ones. Equal scores go to the higher index, elsewhere the lower.

Where something must know which experts were *not* selected (compensation) the router is dressed as logits
log(w) with -1e4 elsewhere and the output multiplied by sum(w), as in ``moe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import Builder, array_of, constant_of, remove_unused
from moedge.export.graph.nodes import KEEPS, activations, has_biases, keeps_large, layer_of, nodes_of, smallest_weight
from moedge.export.lowering.ort import moe as ort_moe
from moedge.export.lowering.ort.nbits import INT8_ACTIVATIONS, initializers
from moedge.export.lowering.rule import Applied, ends
from moedge.export.manifest import Tap
from moedge.export.quantize.format import BLOCK, Quantized


def interleave(gate: Quantized, up: Quantized) -> Quantized:
    """Row pairs g0, u0, g1, u1, ... of two stacks [E, I, K]: -> [E, 2I, K] (``swiglu_fusion=1``)."""

    def pairs(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.stack([one, two], axis=2).reshape(one.shape[0], 2 * one.shape[1], *one.shape[2:])

    zero_points = None
    if gate.zero_points is not None and up.zero_points is not None:
        zero_points = pairs(gate.zero_points, up.zero_points)
    return Quantized(pairs(gate.packed, up.packed), pairs(gate.scales, up.scales), zero_points, gate.bits, gate.columns)


def padded_width(width: int) -> int:
    """Expert width as the kernel needs it: a multiple of the block."""
    return -(-width // BLOCK) * BLOCK


def pad_rows(weight: Quantized, rows: int) -> Quantized:
    """Add rows of zeros to [E, N, K]; silu(0) * 0 = 0 meets the zero columns that ``down`` was padded with."""

    def pad(array: np.ndarray) -> np.ndarray:
        more = rows - array.shape[1]
        return np.pad(array, [(0, 0), (0, more), *[(0, 0)] * (array.ndim - 2)])

    zero_points = None if weight.zero_points is None else pad(weight.zero_points)
    return Quantized(pad(weight.packed), pad(weight.scales), zero_points, weight.bits, weight.columns)


def refusal(*, activations: set[str], smallest_weight: float, biased: bool) -> str | None:
    """Say why the kernel cannot be used, or None; experts are then products of their own.

    Args:
        activations: gate activations of the model's experts.
        smallest_weight: lower bound of the combination weights.
        biased: whether experts have biases in gate or up.
    """
    if activations - {"silu"}:
        return f"the QMoE kernel gates with SiLU only, the model uses {', '.join(sorted(activations))} [M]"
    if not smallest_weight > 0:
        return "an expert weight can be zero or negative; the QMoE kernel drops such experts without an error [M]"
    return ort_moe.BIASED if biased else None


@dataclass(frozen=True)
class FuseQMoE:
    """Rule for every Route and SparseGLU; ``weights`` are the quantised stacks by the name of what they replace."""

    weights: Mapping[str, Quantized]
    name: str = "Route + SparseGLU -> QMoE"

    def refuse(self, graph: ir.Model) -> str | None:
        """See :func:`refusal`."""
        nodes = nodes_of(graph, "SparseGLU")
        if keeps_large(graph):
            return KEEPS
        return refusal(
            activations=activations(graph), smallest_weight=smallest_weight(graph), biased=any(map(has_biases, nodes))
        )

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; the first and the last whole FFN are tested."""
        nodes = nodes_of(graph, "SparseGLU")
        blocks = ends([str(node.outputs[0].name) for node in nodes])
        taps = {}
        for node in nodes:
            layer = layer_of(node)
            taps[layer] = _replace(graph, node, layer, self.weights)
        remove_unused(graph)
        return Applied(len(nodes), blocks, taps)


def _replace(model: ir.Model, node: ir.Node, layer: int, weights: Mapping[str, Quantized]) -> Tap:
    x, indices, routed, *rest = node.inputs
    names = [str(value.name) for value in rest[:3] if value is not None]
    gate, up, down = (weights[name] for name in names)
    width = padded_width(gate.packed.shape[1])
    builder = Builder(model, before=node)
    fc1 = initializers(
        builder, f"experts.layers.{layer}.gate_up", interleave(pad_rows(gate, width), pad_rows(up, width))
    )
    fc2 = initializers(builder, f"experts.layers.{layer}.down", down)
    assert indices is not None
    assert routed is not None
    route = indices.producer()
    assert route is not None
    top_k, rule = route.attributes["top_k"].as_int(), route.attributes["rule"].as_string()
    experts = int(gate.packed.shape[0])
    compensation = rest[3] if len(rest) > 3 else None
    total = None
    if compensation is None:
        probs, combination, normalise = _selection(builder, route, rule, layer, experts)
        tap = Tap(output=str(probs.name), kind="scores", top_k=top_k)
    else:
        probs, total, tap = _adapter(builder, route, rule, layer, top_k, experts, indices, routed)
        combination, normalise = None, 1
    inputs = [x, probs, fc1[0], fc1[1], None, fc2[0], fc2[1], None, None, None, None, fc1[2], fc2[2], None, combination]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {
        "k": top_k,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": normalise,
        "expert_weight_bits": gate.bits,
        "block_size": BLOCK,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    y = builder.node("QMoE", inputs, domain="com.microsoft", attributes=attributes)
    if total is not None:
        y = builder.node("Mul", [y, total])
    if compensation is not None:
        y = builder.node("Add", [y, ort_moe.compensated(builder, probs, compensation)])
    builder.replace_output(node.outputs[0], y)
    return tap


def _selection(
    builder: Builder, route: ir.Node, rule: str, layer: int, experts: int
) -> tuple[ir.Value, ir.Value | None, int]:
    """Return router_probs, router_weights (or None) and the normalise flag; see the table above."""
    scores, bias = route.inputs[:2]
    assert scores is not None
    biased = bool(array_of(bias).any())
    probs = scores
    if biased:
        probs = builder.node("Add", [scores, bias])
        probs.name = f"layers.{layer}.router.selection"
    if rule == "softmax":
        return probs, builder.node("Softmax", [scores], attributes={"axis": -1}) if biased else None, 1
    if rule == "normalised":
        return probs, scores, 1
    if rule == "unit":
        return probs, ort_moe.by_token(builder, f"router.ones.{experts}", experts, 1.0), 0
    share = builder.node("Softmax", [scores], attributes={"axis": -1})
    if rule == "probability":
        return probs, share, 0
    one = constant_of(builder, 1.0, np.float32)
    return probs, builder.node("Add", [builder.node("Mul", [share, route.inputs[2]]), one]), 0


def _adapter(
    builder: Builder,
    route: ir.Node,
    rule: str,
    layer: int,
    top_k: int,
    experts: int,
    indices: ir.Value,
    weights: ir.Value,
) -> tuple[ir.Value, ir.Value, Tap]:
    """Return the logits, the factor sum(w) and the tap of the log-weight form."""
    if rule == "unit":
        indices, logits = ort_moe.zeros_at_top_k(builder, route, layer, top_k, experts)
        total = builder.initializer(f"layers.{layer}.router.weight_sum", np.array(top_k, np.float32))
    else:
        logits = ort_moe.log_weights(builder, route, indices, weights)
        total = builder.node("ReduceSum", [weights, constant_of(builder, [-1])], attributes={"keepdims": 1})
    return logits, total, Tap(output=str(indices.name), kind="indices", top_k=top_k)
