"""KeepLarge and the products that read it -> GatheredGLU and GatheredLinear, which read the weights of kept values.

``x -> KeepLarge -> gate, up -> SiLU * up -> KeepLarge -> down`` becomes ``x -> KeepLarge -> GatheredGLU ->
GatheredLinear``; any other product that reads a KeepLarge becomes a GatheredLinear (of FFNs with biases or another
activation). The first KeepLarge stays, for routed experts may read it too: a few operators on single values, of the
kind that TensorRT fuses with the norm before them. The second becomes the end of GatheredGLU.

Weights are turned to one row for each input, and there is one copy of them: the kernels for prompts read the same rows.

Shapes: T tokens, H hidden, I inner width, K inputs and N outputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.functions import DOMAIN
from moedge.export.graph.build import Builder, array_of, remove_unused, required
from moedge.export.graph.gathered import GatheredFFN, Product
from moedge.export.graph.nodes import nodes_of
from moedge.export.lowering import gather
from moedge.export.lowering.rule import Applied, Block


@dataclass(frozen=True)
class GatherProducts:
    """Rule for every KeepLarge of a float32 graph; ``refusal`` says why an engine can have no kernels of ours, or None.

    The new nodes get their types with the graph (``half.py``) and become plugins after that (``plugins.attach``).
    """

    refusal: str | None
    name: str = "KeepLarge, products -> GatheredGLU, GatheredLinear as plugins"

    def refuse(self, graph: ir.Model) -> str | None:
        """Refuse a graph without a KeepLarge, and what the runtime cannot take."""
        return self.refusal if nodes_of(graph, "KeepLarge") else "no values are left out"

    def apply(self, graph: ir.Model) -> Applied:
        """Replace whole FFNs first, then what is left; the first and the last place are tested together."""
        made: list[str] = []
        ramps = [node.attributes["ramp"].as_float() for node in nodes_of(graph, "KeepLarge")]
        for replace in (_ffn, _products):
            for node in nodes_of(graph, "KeepLarge"):
                if node.graph is not None and (names := replace(graph, node)):
                    made += names
                    remove_unused(graph)
        if not made:
            return Applied(0, reason="no value that is left out is multiplied by a constant of two dimensions")
        growth = max(map(gather.narrower, ramps))
        return Applied(len(made), [Block(tuple(dict.fromkeys((made[0], made[-1]))), growth=growth)])


def _ffn(graph: ir.Model, second: ir.Node) -> list[str]:
    """Replace the FFN whose hidden values ``second`` chooses; return the name of what it gives, if it is one."""
    ffn = GatheredFFN.of(second)
    if ffn is None or ffn.gate.bias is not None or ffn.up.bias is not None:
        return []
    builder = Builder(graph, before=ffn.product)
    gate, up = _by_channel(builder, ffn.gate), _by_channel(builder, ffn.up)
    inputs = [ffn.first.outputs[0], gate, up, _limits(builder, second)]
    h = _node(builder, "GatheredGLU", inputs, ffn.gate.weight.rows, activation="silu")
    return [_linear(graph, ffn.down, h)]


def _products(graph: ir.Model, node: ir.Node) -> list[str]:
    """Replace the products that read a KeepLarge; return the names of what they give."""
    found = [Product.of(use.node) for use in node.outputs[0].uses() if use.idx == 0]
    return [_linear(graph, product, node.outputs[0]) for product in found if product is not None]


def _linear(graph: ir.Model, product: Product, x: ir.Value) -> str:
    builder, output = Builder(graph, before=product.node), product.node.outputs[0]
    y = _node(builder, "GatheredLinear", [x, _by_channel(builder, product)], product.weight.rows)
    if product.bias is not None:
        total: ir.Value = builder.node("Add", [y, product.bias])
        total.type, total.shape, y = y.type, y.shape, total
    builder.replace_output(output, y)
    return str(y.name)


def _node(builder: Builder, op_type: str, inputs: list[ir.Value], width: int, **attributes: object) -> ir.Value:
    """Insert a node for x [T, K]; return its output float32 [T, width]."""
    y: ir.Value = builder.node(op_type, inputs, domain=DOMAIN, attributes=attributes)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape([(inputs[0].shape or [None])[0], width])
    return y


def _by_channel(builder: Builder, product: Product) -> ir.Value:
    """Return the weight as [K, N]; it is turned when it is written, one at a time."""
    if product.weight.layout == "KN":
        return product.value
    name = f"{product.value.name}.by_channel"
    existing = builder.graph.initializers.get(name)
    if existing is not None:
        return existing
    source, shape = product.value, ir.Shape([product.weight.columns, product.weight.rows])

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(array_of(source).T), name=name)

    tensor = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    builder.graph.register_initializer(value)
    return value


def _limits(builder: Builder, keep: ir.Node) -> ir.Value:
    """Return a KeepLarge's thresholds and the widths of their ramps, float32 [2, K], as its own form rounds them."""
    value = required(keep.inputs[1])
    threshold = array_of(value).astype(np.float32)
    ramp = np.float32(keep.attributes["ramp"].as_float())
    return builder.initializer(f"{value.name}.limits", np.stack([threshold, threshold * ramp]))
