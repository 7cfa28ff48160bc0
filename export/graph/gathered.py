"""The products that read what a KeepLarge leaves of its input: where an operator can skip the weights of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.graph import weights
from moedge.export.graph.build import Builder, array_of, required, sizes


@dataclass(frozen=True)
class Product:
    """A product by a constant: its node, its weight, and its bias or None."""

    node: ir.Node
    weight: weights.Weight
    value: ir.Value
    bias: ir.Value | None

    @classmethod
    def of(cls, node: ir.Node) -> Product | None:
        """Return the product that a node is, or None."""
        found = weights.product_weight(node)
        if found is None:
            return None
        value, layout = found
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        return cls(node, weights.Weight(str(value.name), "", layout, sizes(value.const_value)), value, bias)

    def rows(self) -> np.ndarray:
        """The weight float32 [N, K]."""
        return weights.array(self.value, self.weight)


@dataclass(frozen=True)
class GatheredFFN:
    """``first KeepLarge -> gate, up -> SiLU(gate) * up -> second KeepLarge -> down``; ``product`` is the ``*``."""

    first: ir.Node
    gate: Product
    up: Product
    product: ir.Node
    second: ir.Node
    down: Product

    @classmethod
    def of(cls, second: ir.Node) -> GatheredFFN | None:
        """Return the FFN whose hidden values a KeepLarge chooses, or None where it is no such FFN."""
        down, product = products(second), required(second.inputs[0]).producer()
        if down is None or len(down) != 1 or product is None or product.op_type != "Mul":
            return None
        found = _gate_and_up(product)
        if found is None:
            return None
        gate, up = found
        first = required(gate.node.inputs[0]).producer()
        if first is None or first.op_type != "KeepLarge" or up.node.inputs[0] is not gate.node.inputs[0]:
            return None
        return cls(first, gate, up, product, second, down[0])


def products(node: ir.Node) -> list[Product] | None:
    """Return the products that read a KeepLarge, or None when something else reads it too."""
    found = [Product.of(use.node) if use.idx == 0 else None for use in node.outputs[0].uses()]
    known = [product for product in found if product is not None]
    return known if known and len(known) == len(found) else None


def _gate_and_up(product: ir.Node) -> tuple[Product, Product] | None:
    """Return gate and up of ``SiLU(gate) * up``, the producer of a hidden value."""
    for active, other in (product.inputs[:2], product.inputs[1::-1]):
        silu, up = required(active).producer(), required(other).producer()
        if silu is None or up is None or silu.op_type != "Mul":
            continue
        for value, factor in (silu.inputs[:2], silu.inputs[1::-1]):
            sigmoid, gate = required(factor).producer(), required(value).producer()
            if sigmoid is None or gate is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not value:
                continue
            pair = Product.of(gate), Product.of(up)
            if pair[0] is not None and pair[1] is not None:
                return pair[0], pair[1]
    return None


def columns(builder: Builder, rows: ir.Value, ids: ir.Value) -> ir.Value:
    """Return float32 [B, S, K] of tokens ids int64 [B, S]: the columns of rows [K, V], a turned embedding."""
    picked = builder.node("Gather", [rows, ids], attributes={"axis": 1})  # [K, B, S]
    found: ir.Value = builder.node("Transpose", [picked], attributes={"perm": [1, 2, 0]})
    for value in (picked, found):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return found


def joined_bias(builder: Builder, group: Sequence[Product]) -> ir.Value | None:
    """Return the biases of products side by side, zeros where one has none; None where none has."""
    if all(product.bias is None for product in group):
        return None
    parts = [
        np.zeros(product.weight.rows, np.float32) if product.bias is None else array_of(product.bias)
        for product in group
    ]
    return builder.initializer("+".join(f"{product.weight.name}.bias" for product in group), np.concatenate(parts))
