"""KeepLarge, which leaves out small values, in standard operators for runtimes that know no functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.convert.plan import RAMP
from moedge.export.graph.build import Builder, constant_of, required
from moedge.export.graph.nodes import h_threshold_of, nodes_of
from moedge.export.lowering.rule import Applied, Block


def keep_large(builder: Builder, x: ir.Value, threshold: ir.Value, ramp: float) -> ir.Value:
    """Insert what :func:`moedge.convert.ops.gather.keep_large` computes of a float32 ``x``; return it in float32."""

    def node(op_type: str, *inputs: ir.Value) -> ir.Value:
        made: ir.Value = builder.node(op_type, list(inputs))
        made.type = ir.TensorType(ir.DataType.FLOAT)
        made.shape = threshold.shape if op_type == "Mul" and x not in inputs else x.shape
        return made

    zero, one, width = (constant_of(builder, value, np.float32) for value in (0.0, 1.0, ramp))
    part = node("Div", node("Sub", node("Abs", x), threshold), node("Mul", threshold, width))
    return node("Mul", x, node("Clip", part, zero, one))


def outputs(graph: ir.Model) -> tuple[str, ...]:
    """Name what the first and the last KeepLarge of a graph give: the ends of blocks to execute."""
    names = [str(node.outputs[0].name) for node in nodes_of(graph, "KeepLarge")]
    return tuple(dict.fromkeys((*names[:1], *names[-1:])))


def growth(graph: ir.Model) -> float:
    """Return how much larger an error of hidden values may be behind the thresholds of a graph's SparseGLUs, 1 or more.

    For independent errors, as a root of squares. Values on a ramp carry theirs on ``2 + 1 / ramp`` times (the slope at
    its end), all others once or not at all. The share of values on the ramp is at most ``ramp``: where large values are
    rarer than small ones, ``ramp * t`` wide behind ``t`` lie at most ``ramp`` times as many as before ``t``.
    """
    nodes = [node for node in nodes_of(graph, "SparseGLU") if h_threshold_of(node) is not None]
    ramps = [node.attributes["ramp"].as_float() for node in nodes]
    return max(map(_growth, ramps), default=1.0)


def _growth(ramp: float) -> float:
    return math.sqrt(1 + min(ramp, 1.0) * (2 + 1 / ramp) ** 2)


def narrower(ramp: float) -> float:
    """Return how much larger than behind the default ramp an error of hidden values may be, 1 or more.

    The limits of self-tests hold behind the default ramp as they are.
    """
    return max(1.0, _growth(ramp) / _growth(RAMP))


@dataclass(frozen=True)
class ExpandKeepLarge:
    """Rule for every KeepLarge of a graph, typed or not: it computes in float32, between two casts if need be.

    ``ends`` are the values that end blocks to execute, see :func:`outputs`: of the graph before any other rule, because
    experts as one FFN bring nodes of their own.
    """

    ends: tuple[str, ...]
    name: str = "KeepLarge -> Abs, Sub, Div, Clip, Mul"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing to refuse where there is one."""
        return None if nodes_of(graph, "KeepLarge") else "no values are left out"

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; the blocks at the ends are tested."""
        nodes = nodes_of(graph, "KeepLarge")
        for node in nodes:
            _expand(graph, node)
        return Applied(len(nodes), [Block(self.ends)] if self.ends else [])


def _expand(graph: ir.Model, node: ir.Node) -> None:
    builder, (x, threshold) = Builder(graph, before=node), map(required, node.inputs)
    kind, wide = x.dtype, x
    if kind != ir.DataType.FLOAT:
        wide = builder.node("Cast", [x], attributes={"to": int(ir.DataType.FLOAT)})
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    kept = keep_large(builder, wide, threshold, node.attributes["ramp"].as_float())
    if kind is not None and kind != ir.DataType.FLOAT:
        kept = builder.node("Cast", [kept], attributes={"to": int(kind)})
        kept.type, kept.shape = x.type, x.shape
    builder.replace_output(node.outputs[0], kept)
