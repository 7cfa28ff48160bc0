"""moedge::SparseGLU -> products of each expert with the tokens that chose it, on ONNX Runtime's own matrix products.

For expert e: the tokens whose indices name it (NonZero), their rows of x (Gather), a GLU of the expert's width, and
the sum into the output (ScatterND). No shape depends on a capacity, and an expert that no token chose multiplies
matrices without rows, which costs a few microseconds a node.

``com.microsoft.MoE`` does the same in one node, but multiplies by an unpacked matrix and gives experts to threads
whole. Which is faster depends on the size of an expert alone (:func:`preferred`); what only this form can express are
activations other than SiLU, weights of any sign and biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import Builder, array_of, constant_of, remove_unused, sizes
from moedge.export.graph.nodes import h_threshold_of, layer_of, nodes_of, routed_directly
from moedge.export.lowering.gather import keep_large
from moedge.export.lowering.ort import moe as ort_moe
from moedge.export.lowering.rule import Applied, ends
from moedge.export.manifest import Tap

SMALLEST_EXPERT = 1 << 19
"""Parameters of an expert (3 * H * I) from which its own products are at least as fast as ``com.microsoft.MoE``."""
MOST_EXPERTS = 16
"""Routed experts of a layer up to which the nodes of experts without tokens are no burden to a decode step."""

_ACTIVATIONS = {"gelu_tanh": "FastGelu", "gelu": "Gelu"}
"""Operators of ``com.microsoft``; the standard ``Gelu`` needs opset 20."""


def refusal(model: ir.Model) -> str | None:
    """Say why this form cannot take the place of every SparseGLU, or None.

    A composed layer may name an expert twice for one token; ``ScatterND`` adds rows in no fixed order and, run by
    several threads, could lose one of two that meet.
    """
    if not all(map(routed_directly, nodes_of(model, "SparseGLU"))):
        return "a token of a hierarchical layer may choose an expert twice"
    return None


def preferred(model: ir.Model) -> bool:
    """Whether this form is the faster one for every layer (docs/lowering.md has the measurement)."""
    if refusal(model):
        return False
    shapes = [array_of(node.inputs[3]).shape for node in nodes_of(model, "SparseGLU")]
    return all(experts <= MOST_EXPERTS and 3 * width * hidden >= SMALLEST_EXPERT for experts, width, hidden in shapes)


@dataclass(frozen=True)
class ExpertProducts:
    """Rule for every SparseGLU."""

    name: str = "SparseGLU -> products of each expert"

    def refuse(self, graph: ir.Model) -> str | None:
        """See :func:`refusal`."""
        return refusal(graph)

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; the first and the last whole FFN are tested."""
        nodes = nodes_of(graph, "SparseGLU")
        blocks = ends([str(node.outputs[0].name) for node in nodes])
        taps = {layer_of(node): _replace(graph, node) for node in nodes}
        remove_unused(graph)
        return Applied(len(nodes), blocks, taps)


def _replace(model: ir.Model, node: ir.Node) -> Tap:
    x, indices, weights, gate, up, down, *rest = node.inputs
    assert indices is not None
    route = indices.producer()
    assert route is not None
    builder = Builder(model, before=node)
    experts, hidden, _ = array_of(down).shape
    top_k, rule = route.attributes["top_k"].as_int(), route.attributes["rule"].as_string()
    activation = node.attributes["activation"].as_string()
    if rule == "unit":
        chosen, weights = ort_moe.selection(builder, route, layer_of(node), top_k)[0], None
    else:
        chosen = builder.node("Cast", [indices], attributes={"to": int(ir.DataType.INT64)})
    y = ort_moe.by_token(builder, f"experts.zeros.{hidden}", hidden, 0.0)
    for expert in range(experts):
        where = builder.node("NonZero", [builder.node("Equal", [chosen, constant_of(builder, expert)])])
        tokens = builder.node("Gather", [where, constant_of(builder, 0)], attributes={"axis": 0})
        rows = builder.node("Gather", [x, tokens], attributes={"axis": 0})
        g, u = (builder.node("MatMul", [rows, _matrix(builder, stack, expert)]) for stack in (gate, up))
        h = _glu(builder, g, u, activation)
        if (limits := h_threshold_of(node)) is not None:
            threshold = builder.initializer(f"{limits.name}.{expert}", array_of(limits)[expert])
            h = keep_large(builder, h, threshold, node.attributes["ramp"].as_float())
        out = builder.node("MatMul", [h, _matrix(builder, down, expert)])
        if weights is not None:
            place = builder.node("Transpose", [where], attributes={"perm": [1, 0]})
            weight = builder.node("GatherND", [weights, place])
            out = builder.node("Mul", [out, builder.node("Unsqueeze", [weight, constant_of(builder, [1])])])
        target = builder.node("Unsqueeze", [tokens, constant_of(builder, [1])])
        y = builder.node("ScatterND", [y, target, out], attributes={"reduction": "add"})
    if rest and rest[0] is not None:  # compensation
        y = builder.node("Add", [y, _compensation(builder, chosen, rest[0], experts)])
    builder.replace_output(node.outputs[0], y)
    return Tap(output=str((chosen if rule == "unit" else indices).name), kind="indices", top_k=top_k)


def _glu(builder: Builder, g: ir.Value, u: ir.Value, activation: str) -> ir.Value:
    if activation == "silu":
        active = builder.node("Mul", [g, builder.node("Sigmoid", [g])])
    else:
        active = builder.node(_ACTIVATIONS[activation], [g], domain="com.microsoft")
    product: ir.Value = builder.node("Mul", [active, u])
    return product


def matrix_name(stack: str, expert: int) -> str:
    """Name of one expert's matrix in the graph, from that of the layer's stack."""
    return f"{stack}.{expert}"


def _matrix(builder: Builder, stack: ir.Value | None, expert: int) -> ir.Value:
    """Expert ``expert`` of a stack [E, N, K] as a matrix [K, N], made when it is read."""
    assert stack is not None
    assert stack.const_value is not None
    source, name = stack.const_value, matrix_name(str(stack.name), expert)
    _, rows, columns = sizes(stack.const_value)

    return builder.lazy(name, (columns, rows), source.dtype, lambda: source.numpy()[expert].T)


def _compensation(builder: Builder, chosen: ir.Value, compensation: ir.Value, experts: int) -> ir.Value:
    """What the unselected experts contribute on average [T, H]."""
    ones = ort_moe.by_token(builder, f"experts.ones.{experts}", experts, 1.0)
    none = ir.tensor(np.zeros(1, np.float32))
    zeros = builder.node("ConstantOfShape", [builder.node("Shape", [chosen])], attributes={"value": none})
    omitted = builder.node("ScatterElements", [ones, chosen, zeros], attributes={"axis": 1})
    added: ir.Value = builder.node("MatMul", [omitted, compensation])
    return added
