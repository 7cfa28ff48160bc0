"""CausalAttention -> com.microsoft.GroupQueryAttention.

Before: ``MatMul`` q/k/v -> Reshape -> Transpose -> rotary -> Concat with the past -> ``moedge::CausalAttention``.
After: ``MatMul`` q/k/v -> ``RotaryEmbedding`` (q, k) -> ``GroupQueryAttention`` (cache update and attention).

Two things keep a left-padded batch meaning what it means in transformers. The kernel takes lengths, so padding is
hidden by an additive bias instead. And rotary stays outside: with ``do_rotary`` the CPU kernel ignores
``position_ids`` on the first prompt but obeys them afterwards (ONNX Runtime 1.31.1, measured; no error), so a padded
prefill and its decode would disagree. The cache may be bound to one preallocated buffer (past and present the same
memory).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.functions import DOMAIN
from moedge.export.lowering.graph import Builder, constant_of, evaluate, remove_unused, same_shape_input

_ROTARY_DOMAIN = "ai.onnxruntime._fusion"
HIDDEN = -1.0e9
"""Bias of a hidden position: its softmax weight underflows to exactly 0 in float32 beside any score within 1e8."""


@dataclass(frozen=True)
class _Match:
    attention: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    cos: ir.Value
    sin: ir.Value
    num_heads: int
    kv_heads: int


def _produced(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """Return the [B, S, N*D] value behind ``Transpose(0,2,1,3)`` of ``Reshape``, or None."""
    transpose = _produced(value, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    reshape = _produced(transpose.inputs[0], "Reshape")
    flat = reshape.inputs[0] if reshape is not None else None
    return flat if flat is not None and flat.shape is not None and len(flat.shape) == 3 else None


def _match(node: ir.Node) -> _Match | str:
    """Find what feeds one CausalAttention, or say which part is not as expected."""
    query, key, value, _ = node.inputs
    key_concat, value_concat = _produced(key, "Concat"), _produced(value, "Concat")
    if key_concat is None or value_concat is None:
        return "keys or values are not a cache concatenation"
    q_rotary = _produced(query, "RotaryEmbedding", _ROTARY_DOMAIN)
    k_rotary = _produced(key_concat.inputs[1], "RotaryEmbedding", _ROTARY_DOMAIN)
    if q_rotary is None or k_rotary is None:
        return "no rotary embedding was recognised before the attention"
    flat_query, flat_key = _before_heads(q_rotary.inputs[0]), _before_heads(k_rotary.inputs[0])
    flat_value = _before_heads(value_concat.inputs[1])
    if flat_query is None or flat_key is None or flat_value is None:
        return "query, key or value is not a reshaped projection"
    cos, sin = (_produced(q_rotary.inputs[i], "Unsqueeze") for i in (1, 2))
    past_key, past_value = key_concat.inputs[0], value_concat.inputs[0]
    if cos is None or sin is None or past_key is None or past_value is None:
        return "the rotary table is not computed from position_ids"
    assert query is not None
    assert query.shape is not None
    assert key is not None
    assert key.shape is not None
    return _Match(
        node, flat_query, flat_key, flat_value, past_key, past_value, cos.inputs[0], sin.inputs[0],
        int(query.shape[1]), int(key.shape[1]),
    )  # fmt: skip


def rotary_table(model: ir.Model, value: ir.Value, positions: int) -> np.ndarray:
    """Evaluate a cos or sin value [1, S, D] for positions 0..positions-1 and return its distinct half [positions, D/2].

    Raises:
        MoEdgeError: the two halves differ, which no rotary kernel can hold.
    """
    ids = np.arange(positions, dtype=np.int64)[None]
    table = evaluate(model, value, {"position_ids": ids})[0]
    first, second = np.split(table, 2, axis=-1)
    if not np.array_equal(first, second):
        raise MoEdgeError(f"Rotary table {value.name} has unequal halves; GroupQueryAttention cannot express it.")
    return np.ascontiguousarray(first)


def fuse(model: ir.Model, max_length: int) -> tuple[int, str]:
    """Replace every CausalAttention of ``model``; return how many, and why the rest (if any) were left.

    ``max_length`` is the longest sequence that the rotary tables, hence the graph, can hold.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "CausalAttention"]
    if not nodes:
        return 0, "the graph has no CausalAttention node"
    matches = [_match(node) for node in nodes]
    reasons = {match for match in matches if isinstance(match, str)}
    if reasons:
        return 0, "; ".join(sorted(reasons))
    found = [match for match in matches if isinstance(match, _Match)]
    first = found[0]
    if any((m.cos, m.sin) != (first.cos, first.sin) for m in found):
        return 0, "the layers use different rotary tables"
    builder = Builder(model, before=model.graph[0])
    cos = builder.initializer("rotary.cos", rotary_table(model, first.cos, max_length))
    sin = builder.initializer("rotary.sin", rotary_table(model, first.sin, max_length))
    seqlens, total, bias = _lengths(builder)
    position_ids = next(value for value in model.graph.inputs if value.name == "position_ids")
    for match in found:
        node, output = match.attention, match.attention.outputs[0]
        here = Builder(model, before=node)
        query, key = (
            here.node(
                "RotaryEmbedding", [x, position_ids, cos, sin], domain="com.microsoft", attributes={"num_heads": n}
            )
            for x, n in ((match.query, match.num_heads), (match.key, match.kv_heads))
        )
        result, present_key, present_value = here.node(
            "GroupQueryAttention",
            [query, key, match.value, match.past_key, match.past_value, seqlens, total, None, None, None, bias],
            domain="com.microsoft",
            outputs=3,
            attributes={
                "num_heads": match.num_heads,
                "kv_num_heads": match.kv_heads,
                "do_rotary": 0,
                "scale": node.attributes["scale"].as_float(),
            },
        )
        for old, new in ((node.inputs[1], present_key), (node.inputs[2], present_value)):
            here.replace_output(old, new)
        # [B, S, N, D] -> Reshape -> [B, S, N*D] was the only use; GroupQueryAttention gives the latter at once.
        for consumer in [use.node for use in output.uses()]:
            if consumer.op_type == "Reshape" and same_shape_input(consumer):
                here.replace_output(consumer.outputs[0], result)
            else:
                raise MoEdgeError(f"Attention output {output.name} feeds {consumer.op_type}, not the expected Reshape.")
    remove_unused(model)
    return len(found), ""


def _lengths(builder: Builder) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Build, once for the whole graph, seqlens_k [B], total_sequence_length [] and the padding bias [B, 1, S, L]."""
    mask = builder.graph_input("attention_mask")
    ids = builder.graph_input("input_ids")
    shape = builder.node("Shape", [mask])
    total = builder.node("Cast", [builder.node("Gather", [shape, constant_of(builder, 1)])], attributes={"to": 6})
    batch = builder.node("Shape", [ids], attributes={"start": 0, "end": 1})
    last = builder.node("Sub", [total, constant_of(builder, 1, np.int32)])
    seqlens = builder.node("Expand", [last, batch])
    new = builder.node("Shape", [ids], attributes={"start": 1, "end": 2})
    one = constant_of(builder, [1])
    shown = builder.node("Cast", [mask], attributes={"to": 9})
    zero, hidden = (constant_of(builder, value, np.float32) for value in (0.0, HIDDEN))
    row = builder.node("Where", [shown, zero, hidden])
    row4 = builder.node("Unsqueeze", [row, constant_of(builder, [1, 2])])
    length = builder.node("Shape", [mask], attributes={"start": 1, "end": 2})
    bias_shape = builder.node("Concat", [batch, one, new, length], attributes={"axis": 0})
    bias = builder.node("Expand", [row4, bias_shape])
    return seqlens, total, bias
