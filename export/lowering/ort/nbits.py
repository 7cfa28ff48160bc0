"""Dense products and the embedding on quantised weights.

``MatMul`` / ``Gemm`` by a constant -> ``com.microsoft.MatMulNBits``; products of one value (q, k, v; gate, up) become
one product and a Split, as in ``matmul.py``. ``Gather`` from the embedding -> ``GatherBlockQuantized``, which reads
the very table that a tied output projection multiplies by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph.build import Builder, constant_of, remove_unused, required
from moedge.export.graph.weights import is_embedding, product_weight
from moedge.export.lowering.rule import Applied, Block
from moedge.export.quantize.format import BLOCK, Quantized

INT8_ACTIVATIONS = 4
"""``accuracy_level`` of the kernels: activations are rounded to int8 in blocks of 32, the only fast path on CPUs."""


def initializers(builder: Builder, name: str, value: Quantized) -> list[ir.Value | None]:
    """Add the tensors of a quantised matrix: values, scales, zero points (None when symmetric).

    The values of a matrix are stored as [N, K/32, bytes] (MatMulNBits), those of a stack as [E, N, bytes] (QMoE).
    """
    graph = builder.graph.initializers
    if f"{name}.q" in graph:
        return [graph[f"{name}.q"], graph[f"{name}.scales"], graph.get(f"{name}.zero_points")]
    packed, zero_points = value.packed, value.zero_points
    return [
        builder.initializer(f"{name}.q", packed if packed.ndim == 3 else packed.reshape(*packed.shape[:2], -1)),
        builder.initializer(f"{name}.scales", value.scales),
        None if zero_points is None else builder.initializer(f"{name}.zero_points", zero_points),
    ]


@dataclass(frozen=True)
class QuantizeProducts:
    """Rule for every product by, and every lookup in, a weight of one tensor class.

    ``weights`` are quantised [N, K] by the name of the initializer that each replaces; the new initializers are called
    ``<tensor_class>.<...>``.
    """

    tensor_class: str
    weights: Mapping[str, Quantized]

    @property
    def name(self) -> str:
        """Named after the class. Only the embedding is looked up, and a tied one multiplies as well."""
        if self.tensor_class == "embedding":
            return "embedding -> GatherBlockQuantized, tied output projection -> MatMulNBits"
        return f"{self.tensor_class} -> MatMulNBits"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused here: what cannot be quantised stops the lowering before (``quantized.py``)."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Replace lookups, then products, those of one value together; the first and the last are tested."""
        groups: dict[int, list[tuple[ir.Node, str]]] = {}
        blocks = []
        for node in list(graph.graph):
            product = product_weight(node)
            if product and str(product[0].name) in self.weights:
                groups.setdefault(id(node.inputs[0]), []).append((node, str(product[0].name)))
            elif is_embedding(node) and str(required(node.inputs[0]).name) in self.weights:
                name = str(required(node.inputs[0]).name)
                blocks.append(_block([node], required(node.inputs[1])))
                _replace_lookup(graph, node, f"{self.tensor_class}.{name}", self.weights[name])
        for group in groups.values():
            blocks.append(_block([node for node, _ in group], required(group[0][0].inputs[0])))
            _replace_products(graph, group, self.weights, self.tensor_class)
        remove_unused(graph)
        return Applied(len(blocks), blocks[:1] + blocks[-1:] if len(blocks) > 1 else blocks)


def _block(nodes: Sequence[ir.Node], source: ir.Value) -> Block:
    return Block(tuple(str(node.outputs[0].name) for node in nodes), inputs=(str(source.name),))


def _replace_lookup(model: ir.Model, node: ir.Node, name: str, weight: Quantized) -> None:
    builder = Builder(model, before=node)
    packed, scales, zero_points = initializers(builder, name, weight)
    # MatMulNBits wants the table as [V, K/32, bytes], the lookup as [V, bytes]: one stored tensor, one view of it.
    flat = builder.node("Reshape", [packed, constant_of(builder, [0, -1])])
    attributes = {"bits": weight.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    inputs = [flat, node.inputs[1], scales, *([zero_points] if zero_points is not None else [])]
    found = builder.node("GatherBlockQuantized", inputs, domain="com.microsoft", attributes=attributes)
    if weight.scales.shape[1] * BLOCK != weight.columns:
        raise MoEdgeError(f"The embedding's width {weight.columns} is not a multiple of {BLOCK}; use target ort-cpu.")
    builder.replace_output(node.outputs[0], found)


def _replace_products(
    model: ir.Model, group: list[tuple[ir.Node, str]], weights: Mapping[str, Quantized], tensor_class: str
) -> None:
    first = group[0][0]
    builder = Builder(model, before=first)
    parts = [weights[name] for _, name in group]
    merged = parts[0].rows(*parts[1:]) if len(parts) > 1 else parts[0]
    names = "+".join(name for _, name in group)
    packed, scales, zero_points = initializers(builder, f"{tensor_class}.{names}", merged)
    attributes = {
        "K": merged.columns,
        "N": int(merged.packed.shape[0]),
        "bits": merged.bits,
        "block_size": BLOCK,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    inputs = [first.inputs[0], packed, scales, *([zero_points] if zero_points is not None else [])]
    product = builder.node("MatMulNBits", inputs, domain="com.microsoft", attributes=attributes)
    pieces = [product]
    if len(group) > 1:
        sizes = constant_of(builder, [int(part.packed.shape[0]) for part in parts])
        pieces = builder.node("Split", [product, sizes], outputs=len(group), attributes={"axis": -1})
    for (node, _), piece in zip(group, pieces, strict=True):
        here = Builder(model, before=node)
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        here.replace_output(node.outputs[0], here.node("Add", [piece, bias]) if bias is not None else piece)


def with_accuracy(model: ir.Model, level: int) -> ir.Model:
    """Return a copy whose quantised products run at another ``accuracy_level`` (0: float32 activations)."""
    copy = model.clone()
    for node in copy.graph:
        if node.op_type in ("MatMulNBits", "QMoE"):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return copy


def tensor_class(name: str) -> str | None:
    """The class of an initializer that this module or ``qmoe.py`` made, from its name; None for any other."""
    head = name.split(".", 1)[0]
    return head if name.endswith((".q", ".scales", ".zero_points")) else None
