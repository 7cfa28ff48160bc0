"""CausalAttention and rotary embedding for TensorRT: one mask for the graph, and operators or plain products.

``operator``  the ONNX nodes ``Attention`` and ``RotaryEmbedding`` (opset 23), which TensorRT maps to layers of its own;
``products``  MatMul, mask, float32 Softmax, MatMul, and a Gather for rotary (opset 18), for older parsers.

The body of the function builds the mask again in every layer; here it is built once. Hidden positions get a finite
bias: a padding row sees nothing, and a softmax over minus infinity would put NaN into its keys, which 0 * NaN carries
into every row that masks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import Builder, constant_of, remove_unused, required, size, upstream
from moedge.export.graph.nodes import attention_kinds, nodes_of
from moedge.export.lowering.check import selftest
from moedge.export.lowering.rule import Applied, Block

Form = Literal["operator", "products"]
HIDDEN = -3.0e4
"""Bias of a hidden position. exp(-3e4) is 0 in any precision, and a score of up to 3.5e4 stays finite in float16."""


_MARK = "ai.onnxruntime._fusion"


SMALLEST_HEAD = 16
"""Head sizes 16 to 256 built for SM75, 86 and 120 on TensorRT-RTX 1.7.1, float16; 8 did not [M]."""


def operator_refusal(model: ir.Model) -> str | None:
    """Say why ONNX ``Attention`` (opset 23) cannot be used in float16, or None; float32 has no kernel at all [M]."""
    heads = {size(node.inputs[0], 3) for node in nodes_of(model, "CausalAttention")}
    head_dim = min(heads, default=SMALLEST_HEAD)
    if head_dim < SMALLEST_HEAD:
        return f"the Attention operator has no kernel for heads of {head_dim} (at least {SMALLEST_HEAD}) [M]"
    return None


@dataclass(frozen=True)
class TurnRotary:
    """Rule for rotary embeddings.

    x*cos + rotate_half(x)*sin reaches the graph with two Slices of a dynamic tensor, for each of which TensorRT
    makes 25 layers of shape arithmetic: half of all layers of a whole model, and most of its build time.
    """

    form: Form
    name: str = "rotary embedding without dynamic slices"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused: what is not recognised stays as it is."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every one; the first two are tested.

        The table's values (all that is computed from the positions) are no place to cut a test: its halves are equal,
        and random numbers' are not.
        """
        count, outputs, table = _rotary(graph, self.form)
        return Applied(count, [Block(tuple(outputs))], inside=frozenset(table))


def _rotary(model: ir.Model, form: Form) -> tuple[int, list[str], set[str]]:
    from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding

    fuse_rotary_embedding(model)  # marks x, cos, sin
    nodes = [node for node in model.graph if node.op_type == "RotaryEmbedding" and node.domain == _MARK]
    tables: dict[tuple[int, ...], ir.Value] = {}
    inside: set[str] = set()
    if nodes and form == "operator":
        model.opset_imports[""] = max(23, model.opset_imports[""])
    for node in nodes:
        x, cos, sin = node.inputs[:3]
        half = size(x, 3) // 2
        if cos is not None and str(cos.name) not in inside:
            sources, _ = upstream([value for value in (cos, sin) if value is not None], lambda _: False)
            inside |= {str(value.name) for source in sources for value in source.outputs}
        builder, output = Builder(model, before=node), node.outputs[0]
        if form == "operator":
            inputs = [x, *(_table(builder, value, half, tables) for value in (cos, sin))]
            y = _typed(builder.node("RotaryEmbedding", inputs))
        else:
            order = constant_of(builder, [*range(half, 2 * half), *range(half)])
            turned = _typed(builder.node("Gather", [x, order], attributes={"axis": 3}))
            signs = constant_of(builder, [-1.0] * half + [1.0] * half, np.float32)
            if (id(sin),) not in tables:
                assert sin is not None
                early = Builder(model, before=node)
                tables[(id(sin),)] = _typed(early.node("Mul", [sin, signs]))
            parts = [(x, cos), (turned, tables[(id(sin),)])]
            y = _typed(builder.node("Add", [_typed(builder.node("Mul", list(part))) for part in parts]))
        builder.replace_output(output, y)
    names = [str(node.outputs[0].name).removesuffix(".replaced") for node in nodes[:2]]
    remove_unused(model)
    model.opset_imports.pop(_MARK, None)
    return len(nodes), names, inside


def _table(builder: Builder, value: ir.Value | None, half: int, tables: dict[tuple[int, ...], ir.Value]) -> ir.Value:
    """Return the distinct half [B, S, D/2] of a marked cos or sin [B, 1, S, D], whose halves are equal."""
    assert value is not None
    if (id(value), half) not in tables:
        flat = _typed(builder.node("Squeeze", [value, constant_of(builder, [1])]))
        tables[id(value), half] = _typed(builder.node("Gather", [flat, constant_of(builder, list(range(half)))],
                                                      attributes={"axis": 2}))  # fmt: skip
    return tables[id(value), half]


def _typed(value: ir.Value) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return value


@dataclass(frozen=True)
class RewriteAttention:
    """Rule for every CausalAttention. ``operator`` raises the opset to 23.

    ``dtype`` is the half type that the graph gets: products of float16 are scaled before they can leave its range,
    those of bfloat16 after, in float32. Soft-capped scores always take the form ``products``.
    """

    form: Form
    dtype: str = "float16"
    name: str = "CausalAttention -> attention with one mask"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused: the form was chosen before."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; one of each kind is tested, with its output, present keys and values."""
        kinds = attention_kinds(graph)
        values = [value for node in kinds for value in (node.outputs[0], *node.inputs[1:3])]
        block = Block(tuple(str(required(value).name) for value in values))
        cases = selftest.attention_cases(graph)
        return Applied(_rewrite(graph, self.form, self.dtype), [block], cases=cases)


def _rewrite(model: ir.Model, form: Form, dtype: str) -> int:
    nodes = nodes_of(model, "CausalAttention")
    if not nodes:
        return 0
    if form == "operator":
        model.opset_imports[""] = max(23, model.opset_imports[""])
    first = model.graph[0]
    windows = sorted({node.attributes["window"].as_int() for node in nodes})
    biases = {window: _bias(Builder(model, before=first), window) for window in windows}
    for node in nodes:
        builder, output = Builder(model, before=node), node.outputs[0]
        bias = biases[node.attributes["window"].as_int()]
        operator = form == "operator" and not node.attributes["softcap"].as_float()
        y = _operator(builder, node, bias) if operator else _products(builder, node, bias, dtype)
        y.type = output.type
        builder.replace_output(output, builder.node("Transpose", [y], attributes={"perm": [0, 2, 1, 3]}))
    remove_unused(model)
    return len(nodes)


def _operator(builder: Builder, node: ir.Node, bias: ir.Value) -> ir.Value:
    # No softmax_precision: TensorRT refuses the attribute, and its layer accumulates in float32 anyway.
    scale = node.attributes["scale"].as_float()
    y: ir.Value = builder.node("Attention", [*node.inputs[:3], bias], attributes={"scale": scale})
    return y


def _products(builder: Builder, node: ir.Node, bias: ir.Value, dtype: str) -> ir.Value:
    query, key, value = node.inputs[:3]
    heads, head, kv_heads = size(query, 1), size(query, 3), size(key, 1)
    # Query heads of one key head follow each other, so groups are a reshape: [B, N, S, D] -> [B, G, (N/G)*S, D].
    scale = constant_of(builder, node.attributes["scale"].as_float(), np.float32)
    early = _typed(builder.node("Mul", [query, scale])) if dtype == "float16" else query
    grouped = _typed(builder.node("Reshape", [early, constant_of(builder, [0, kv_heads, -1, head])]))
    turned = _typed(builder.node("Transpose", [key], attributes={"perm": [0, 1, 3, 2]}))
    scores = _typed(builder.node("MatMul", [grouped, turned]))
    wide = _typed(builder.node("Cast", [scores], attributes={"to": int(ir.DataType.FLOAT)}))
    if dtype != "float16":
        wide = _typed(builder.node("Mul", [wide, scale]))
    if softcap := node.attributes["softcap"].as_float():
        cap = constant_of(builder, softcap, np.float32)
        wide = _typed(builder.node("Tanh", [_typed(builder.node("Div", [wide, cap]))]))
        wide = _typed(builder.node("Mul", [wide, cap]))
    lengths = _lengths(builder, heads, kv_heads, head)
    by_head = _typed(builder.node("Reshape", [wide, lengths[0]]))
    p = _typed(builder.node("Softmax", [_typed(builder.node("Add", [by_head, bias]))], attributes={"axis": -1}))
    y = _typed(builder.node("MatMul", [_typed(builder.node("Reshape", [p, lengths[1]])), value]))
    return _typed(builder.node("Reshape", [y, lengths[2]]))


def _lengths(builder: Builder, heads: int, kv_heads: int, size: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Shapes [B, N, S, L], [B, G, -1, L] and [B, N, S, D], made once for the graph."""
    names = ("attention.shape.scores", "attention.shape.grouped", "attention.shape.output")
    known = {str(output.name): output for node in builder.graph for output in node.outputs}
    if names[0] in known:
        return known[names[0]], known[names[1]], known[names[2]]
    top = Builder(builder.model, before=builder.graph[0])
    ids, mask = top.graph_input("input_ids"), top.graph_input("attention_mask")
    batch = top.node("Shape", [ids], attributes={"start": 0, "end": 1})
    new = top.node("Shape", [ids], attributes={"start": 1, "end": 2})
    length = top.node("Shape", [mask], attributes={"start": 1, "end": 2})
    n, g, d, rest = (constant_of(top, [value]) for value in (heads, kv_heads, size, -1))
    made = []
    for name, parts in zip(names, ([batch, n, new, length], [batch, g, rest, length], [batch, n, new, d]), strict=True):
        value = top.node("Concat", parts, attributes={"axis": 0})
        value.name = name
        made.append(value)
    return made[0], made[1], made[2]


def _bias(builder: Builder, window: int) -> ir.Value:
    """Build 0 where a new token sees a position and HIDDEN elsewhere, float32 [B, 1, S, L]; window 0 is none."""
    ids, mask = builder.graph_input("input_ids"), builder.graph_input("attention_mask")
    new = builder.node("Squeeze", [builder.node("Shape", [ids], attributes={"start": 1, "end": 2})])
    length = builder.node("Squeeze", [builder.node("Shape", [mask], attributes={"start": 1, "end": 2})])
    zero, one = constant_of(builder, 0), constant_of(builder, 1)
    position = builder.node("Range", [zero, length, one])
    new_position = builder.node("Range", [builder.node("Sub", [length, new]), length, one])
    column = builder.node("Unsqueeze", [new_position, constant_of(builder, [1])])
    causal = builder.node("LessOrEqual", [position, column])
    if window:
        near = builder.node("Greater", [position, builder.node("Sub", [column, constant_of(builder, window)])])
        causal = builder.node("And", [causal, near])
    shown = builder.node("Cast", [mask], attributes={"to": int(ir.DataType.BOOL)})
    visible = builder.node("And", [causal, builder.node("Unsqueeze", [shown, constant_of(builder, [1, 2])])])
    cast = _typed(builder.node("Cast", [visible], attributes={"to": int(ir.DataType.FLOAT)}))
    # (1 - visible) * HIDDEN in float32: a Where between constants would leave its type to whoever reads it.
    hidden = _typed(builder.node("Sub", [constant_of(builder, 1.0, np.float32), cast]))
    return _typed(builder.node("Mul", [hidden, constant_of(builder, HIDDEN, np.float32)]))
