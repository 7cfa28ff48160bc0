"""A tied embedding is looked up in the rows that the output projection multiplies by, so one copy is stored.

Our operators store one row for each *input* (:mod:`moedge.export.ort_ops.pack`), so the embedding of a token is a
column. Reading it touches one cache line for each of the H inputs instead of a few: at one token some 50 microseconds
more, for the largest matrix of a small model less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import Builder, constant_of, remove_unused, required, sizes
from moedge.export.graph.gathered import columns
from moedge.export.graph.weights import is_embedding
from moedge.export.lowering.rule import Applied, Block
from moedge.export.manifest import PackedPlace
from moedge.export.ort_ops import pack
from moedge.export.quantize.format import BLOCK

INT8 = 8


def held(place: PackedPlace, bits: int) -> bool:
    """Whether a weight that our operators store so can be looked up in: alone, in float32 or 8 bits."""
    alone = place.outputs == (0, place.total) and not place.interleaved_inputs
    return alone and bits in (INT8, 32)


@dataclass(frozen=True)
class LookUpColumns:
    """Rule for the embedding whose table our operators store in rows of its inputs (``stored``, by its name)."""

    stored: Mapping[str, PackedPlace]
    bits: int = 32
    name: str = "embedding -> columns of the tied output projection"

    def refuse(self, graph: ir.Model) -> str | None:
        """Refuse a graph whose embedding is not stored so."""
        found = [name for name in self._tables(graph) if name in self.stored]
        if not found:
            return "the embedding is no output projection of our own operators"
        if not all(held(self.stored[name], self.bits) for name in found):
            return f"columns of {self.bits} bits are not read by standard operators"
        return None

    @staticmethod
    def _tables(graph: ir.Model) -> dict[str, ir.Node]:
        return {str(required(node.inputs[0]).name): node for node in graph.graph if is_embedding(node)}

    def apply(self, graph: ir.Model) -> Applied:
        """Replace the lookup; it is tested."""
        blocks = []
        for name, node in self._tables(graph).items():
            if name not in self.stored:
                continue
            place, builder, ids = self.stored[name], Builder(graph, before=node), required(node.inputs[1])
            make = _floats if self.bits == 32 else _integers
            builder.replace_output(node.outputs[0], make(builder, place, ids))
            blocks.append(Block((str(node.outputs[0].name).removesuffix(".replaced"),), inputs=(str(ids.name),)))
        remove_unused(graph)
        return Applied(len(blocks), blocks)


def _floats(builder: Builder, place: PackedPlace, ids: ir.Value) -> ir.Value:
    return columns(builder, builder.graph.initializers[f"{place.tensor}.rows"], ids)


def _integers(builder: Builder, place: PackedPlace, ids: ir.Value) -> ir.Value:
    """Levels and scales of the columns, multiplied: what ``GatherBlockQuantized`` gives for the same table."""
    graph = builder.graph
    levels, scales = graph.initializers[f"{place.tensor}.q"], graph.initializers[f"{place.tensor}.scales"]
    hidden = sizes(levels.const_value)[0]
    at = builder.initializer(f"{place.tensor}.columns", positions(place.total))
    flat = builder.node("Reshape", [ids, constant_of(builder, [-1])])
    where = builder.node("Gather", [at, flat])
    to_float = {"to": int(ir.DataType.FLOAT)}
    level = builder.node("Gather", [levels, where], attributes={"axis": 1})  # [H, T]
    level = builder.node("Cast", [level], attributes=to_float)
    level = builder.node("Sub", [level, constant_of(builder, 128.0, np.float32)])
    level = builder.node("Reshape", [level, constant_of(builder, [hidden // BLOCK, BLOCK, -1])])
    scale = builder.node("Gather", [scales, flat], attributes={"axis": 1})  # [H / 32, T]
    scale = builder.node("Cast", [scale], attributes=to_float)
    scale = builder.node("Unsqueeze", [scale, constant_of(builder, [1])])
    value = builder.node("Mul", [level, scale])
    value = builder.node("Reshape", [value, constant_of(builder, [hidden, -1])])
    value = builder.node("Transpose", [value], attributes={"perm": [1, 0]})
    shape = builder.node(
        "Concat", [builder.node("Shape", [ids]), constant_of(builder, [hidden])], attributes={"axis": 0}
    )
    found: ir.Value = builder.node("Reshape", [value, shape])
    return found


def positions(count: int) -> np.ndarray:
    """Return the byte of a stored row of 8 bits at which each column lies, int32 [count]."""
    column = np.arange(count)
    line, (i, lane, e) = column // pack.LINE, np.unravel_index(column % pack.LINE, (4, 4, 4))
    return (line * pack.LINE + 16 * lane + 4 * i + e).astype(np.int32)
