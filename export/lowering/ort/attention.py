"""CausalAttention -> com.microsoft.GroupQueryAttention.

Before: ``MatMul`` q/k/v -> Reshape -> Transpose -> rotary -> Concat with the past -> ``moedge::CausalAttention``.
After: ``MatMul`` q/k/v -> ``RotaryEmbedding`` (q, k) -> ``GroupQueryAttention`` (cache update and attention).

Two things keep a left-padded batch meaning what it means in transformers. The kernel takes lengths, so padding is
hidden by an additive bias instead. And rotary stays outside: with ``do_rotary`` the CPU kernel ignores
``position_ids`` on the first prompt but obeys them afterwards (ONNX Runtime 1.31.1, measured; no error), so a padded
prefill and its decode would disagree. A sliding window and a soft cap are attributes of the kernel; a norm of each
head leaves [B, N, S, D] to rotate, which is then transposed back. The cache may be bound to one preallocated buffer
(past and present the same memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph.build import (
    Builder,
    array_of,
    constant_of,
    evaluate,
    remove_unused,
    required,
    same_shape_input,
    size,
    weights_dtype,
)
from moedge.export.graph.nodes import attention_kinds, nodes_of
from moedge.export.lowering.check import selftest
from moedge.export.lowering.rule import Applied, Block

_ROTARY_DOMAIN = "ai.onnxruntime._fusion"
HIDDEN = -1.0e9
"""Bias of a hidden position: its softmax weight underflows to exactly 0 in float32 beside any score within 1e8."""


@dataclass(frozen=True)
class _Heads:
    """What is rotated for one attention: a flat projection [B, S, N*D], or its heads [B, N, S, D] after a norm."""

    value: ir.Value
    flat: bool
    rotary_dim: int
    """Leading dimensions of a head that are rotated; 0: all."""
    cos: ir.Value
    sin: ir.Value


@dataclass(frozen=True)
class _Match:
    attention: ir.Node
    query: _Heads
    key: _Heads
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
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


def _slice_bounds(node: ir.Node) -> tuple[int, int]:
    start, end = (array_of(value).ravel() for value in node.inputs[1:3])
    return int(start[0]), int(end[0])


def _heads(value: ir.Value | None) -> _Heads | str:
    """Find what is rotated into ``value``, or say which part is not as expected."""
    source, rotary_dim = value, 0
    heads: ir.Value | None = None
    concat = _produced(value, "Concat")
    if concat is not None:  # the first dimensions of each head are rotated, the others pass
        rotated, passed = (source.producer() if source is not None else None for source in concat.inputs[:2])
        if rotated is None or passed is None or not rotated.inputs:
            return "the rotated part of a head was not recognised"
        first = _produced(rotated.inputs[0], "Slice")
        if first is None or passed.op_type != "Slice" or first.inputs[0] is not passed.inputs[0]:
            return "the rotated part of a head was not recognised"
        (start, rotary_dim), rest = _slice_bounds(first), _slice_bounds(passed)[0]
        if start or rest != rotary_dim or rotary_dim % 2:
            return "the rotated part of a head was not recognised"
        source, heads = concat.inputs[0], first.inputs[0]
    rotary = _produced(source, "RotaryEmbedding", _ROTARY_DOMAIN)
    if rotary is None:
        return "no rotary embedding was recognised before the attention"
    heads = rotary.inputs[0] if heads is None else heads
    cos, sin = (_produced(rotary.inputs[i], "Unsqueeze") for i in (1, 2))
    if cos is None or sin is None or cos.inputs[0] is None or sin.inputs[0] is None or heads is None:
        return "the rotary table is not computed from position_ids"
    flat = _before_heads(heads)
    return _Heads(heads if flat is None else flat, flat is not None, rotary_dim, cos.inputs[0], sin.inputs[0])


def _match(node: ir.Node) -> _Match | str:
    """Find what feeds one CausalAttention, or say which part is not as expected."""
    query, key, value, _ = node.inputs
    key_concat, value_concat = _produced(key, "Concat"), _produced(value, "Concat")
    if key_concat is None or value_concat is None:
        return "keys or values are not a cache concatenation"
    query_heads, key_heads = _heads(query), _heads(key_concat.inputs[1])
    if isinstance(query_heads, str):
        return query_heads
    if isinstance(key_heads, str):
        return key_heads
    flat_value = _before_heads(value_concat.inputs[1])
    past_key, past_value = key_concat.inputs[0], value_concat.inputs[0]
    if flat_value is None or past_key is None or past_value is None:
        return "the value is not a reshaped projection"
    heads = size(query, 1), size(key, 1)
    return _Match(node, query_heads, key_heads, flat_value, past_key, past_value, *heads)


def rotary_table(model: ir.Model, value: ir.Value, positions: int) -> np.ndarray:
    """Evaluate a cos or sin value [1, S, D] for positions 0..positions-1 and return its distinct half [positions, D/2].

    Raises:
        MoEdgeError: the two halves differ or depend on the longest position, which no rotary kernel can hold.
    """
    ids = np.arange(positions, dtype=np.int64)[None]
    table = evaluate(model, value, {"position_ids": ids})[0]
    if not np.array_equal(table[:2], evaluate(model, value, {"position_ids": ids[:, :2]})[0]) or not np.array_equal(
        table[: positions // 2], evaluate(model, value, {"position_ids": ids[:, : positions // 2]})[0]
    ):
        raise MoEdgeError("the rotary table depends on the longest position of a call (longrope)")
    first, second = np.split(table, 2, axis=-1)
    if not np.array_equal(first, second):
        raise MoEdgeError("the two halves of the rotary table differ")
    return np.ascontiguousarray(first)


class _Tables:
    """Rotary tables as weights, one for each distinct cos or sin value of the graph (Gemma 3 has two of each)."""

    def __init__(self, model: ir.Model, positions: int) -> None:
        self._model, self._positions = model, positions
        self._builder = Builder(model, before=model.graph[0])
        self._made: dict[str, ir.Value] = {}

    def of(self, kind: str, value: ir.Value) -> ir.Value:
        name = str(value.name)
        if name not in self._made:
            number = sum(made.name is not None and made.name.startswith(kind) for made in self._made.values())
            table = rotary_table(self._model, value, self._positions)
            self._made[name] = self._builder.initializer(f"{kind}.{number}" if number else kind, table)
        return self._made[name]


def _rotate(here: Builder, heads: _Heads, count: int, position_ids: ir.Value, tables: _Tables) -> ir.Value:
    """Insert the rotary node; return [B, S, N*D]."""
    attributes = {"num_heads": count}
    if heads.rotary_dim:
        attributes["rotary_embedding_dim"] = heads.rotary_dim
    inputs = [heads.value, position_ids, tables.of("rotary.cos", heads.cos), tables.of("rotary.sin", heads.sin)]
    rotated = here.node("RotaryEmbedding", inputs, domain="com.microsoft", attributes=attributes)
    if heads.flat:
        return rotated
    by_token = here.node("Transpose", [rotated], attributes={"perm": [0, 2, 1, 3]})
    return here.node("Reshape", [by_token, constant_of(here, [0, 0, -1])])


@dataclass(frozen=True)
class FuseAttention:
    """Rule for every CausalAttention of a graph.

    ``max_length`` is the longest sequence that the rotary tables, hence the graph, can hold. ``padding=False`` leaves
    out the bias that hides left padding: the rows of a batch are then equally long.
    """

    max_length: int
    padding: bool = True
    name: str = "CausalAttention -> GroupQueryAttention"

    def refuse(self, graph: ir.Model) -> str | None:
        """Only float32 was executed on the CPU kernel, and it takes no heads but of multiples of 8 values."""
        dtype = weights_dtype(graph)
        if dtype != "float32":
            return f"only float32 was executed on the CPU kernel, the model is {dtype}"
        odd = [head for node in nodes_of(graph, "CausalAttention") if (head := size(node.inputs[0], 3)) % 8]
        return f"GroupQueryAttention takes heads of multiples of 8 values, these have {odd[0]}" if odd else None

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node, or none when the surroundings of one are not recognised."""
        kinds = attention_kinds(graph)
        blocks = [Block(tuple(edges(kinds)))]
        cases = [case for case in selftest.attention_cases(graph) if self.padding or not case.padding]
        count, reason = _fuse(graph, self.max_length, self.padding)
        return Applied(count, blocks, reason=reason, cases=cases)


def edges(nodes: Sequence[ir.Node]) -> list[str]:
    """Name what attention blocks give to the rest of the graph: outputs, present keys and values."""
    names = []
    for node in nodes:
        reshape = next(iter(node.outputs[0].uses())).node
        names += [str(value.name) for value in (reshape.outputs[0], *map(required, node.inputs[1:3]))]
    return names


def _fuse(model: ir.Model, max_length: int, padding: bool) -> tuple[int, str]:
    nodes = nodes_of(model, "CausalAttention")
    if not nodes:
        return 0, "the graph has no CausalAttention node"
    matches = [_match(node) for node in nodes]
    reasons = {match for match in matches if isinstance(match, str)}
    if reasons:
        return 0, "; ".join(sorted(reasons))
    found = [match for match in matches if isinstance(match, _Match)]
    tables = _Tables(model, max_length)
    try:
        for heads in (heads for match in found for heads in (match.query, match.key)):
            tables.of("rotary.cos", heads.cos), tables.of("rotary.sin", heads.sin)
    except MoEdgeError as error:
        remove_unused(model)
        return 0, str(error)
    seqlens, total, bias = _lengths(Builder(model, before=model.graph[0]))
    position_ids = next(value for value in model.graph.inputs if value.name == "position_ids")
    for match in found:
        here = Builder(model, before=match.attention)
        query = _rotate(here, match.query, match.num_heads, position_ids, tables)
        key = _rotate(here, match.key, match.kv_heads, position_ids, tables)
        inputs = [query, key, match.value, match.past_key, match.past_value, seqlens, total]
        _replace(here, match, [*inputs, None, None, None, bias] if padding else inputs)
    remove_unused(model)
    return len(found), ""


def _replace(here: Builder, match: _Match, inputs: Sequence[ir.Value | None]) -> None:
    """Put GroupQueryAttention in the place of one attention.

    Raises:
        MoEdgeError: something else than its Reshape reads the output.
    """
    node, output = match.attention, match.attention.outputs[0]
    attributes: dict[str, float] = {"num_heads": match.num_heads, "kv_num_heads": match.kv_heads, "do_rotary": 0}
    attributes |= {"scale": node.attributes["scale"].as_float()}
    if window := node.attributes["window"].as_int():
        attributes["local_window_size"] = window
    if softcap := node.attributes["softcap"].as_float():
        attributes["softcap"] = softcap
    result, present_key, present_value = here.node(
        "GroupQueryAttention", inputs, domain="com.microsoft", outputs=3, attributes=attributes
    )
    for old, new in ((node.inputs[1], present_key), (node.inputs[2], present_value)):
        here.replace_output(required(old), new)
    # [B, S, N, D] -> Reshape -> [B, S, N*D] was the only use; GroupQueryAttention gives the latter at once.
    for consumer in [use.node for use in output.uses()]:
        if consumer.op_type == "Reshape" and same_shape_input(consumer):
            here.replace_output(consumer.outputs[0], result)
        else:
            raise MoEdgeError(f"Attention output {output.name} feeds {consumer.op_type}, not the expected Reshape.")


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
