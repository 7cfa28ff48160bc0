"""KeepLarge and the products that read it -> GatheredGLU and GatheredLinear, which read the weights of kept values.

``x -> KeepLarge -> gate, up -> SiLU * up -> KeepLarge -> down`` becomes ``x -> KeepLarge -> GatheredGLU ->
GatheredLinear``; any other product that reads a KeepLarge becomes a GatheredLinear (attention, the output projection,
FFNs with biases or another activation). The KeepLarge before a product stays, for others may read it too: a few
operators on single values, of the kind that TensorRT fuses with the norm before them. The second of an FFN becomes the
end of GatheredGLU.

Weights are turned to one row for each input, and there is one copy of them: the kernels for prompts read the same rows,
and tokens are looked up in the columns of a tied output projection.

Shapes: T tokens, H hidden, I inner width, K inputs and N outputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.functions import DOMAIN
from moedge.export.graph import weights
from moedge.export.graph.build import Builder, array_of, constant_of, remove_unused, required
from moedge.export.graph.gathered import GatheredFFN, Product, columns
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
        """Replace whole FFNs first, then what is left; the first and the last places of either are tested together."""
        made: list[list[str]] = [[], []]
        ramps = [node.attributes["ramp"].as_float() for node in nodes_of(graph, "KeepLarge")]
        for kind, replace in enumerate((_ffn, _products)):
            for node in nodes_of(graph, "KeepLarge"):
                if node.graph is not None and (names := replace(graph, node)):
                    made[kind] += names
                    remove_unused(graph)
        if not any(made):
            return Applied(0, reason="no value that is left out is multiplied by a constant of two dimensions")
        growth = max(map(gather.narrower, ramps))
        # The last of all may be a tied embedding, behind its output projection.
        ends = dict.fromkeys(name for names in made for name in (*names[:1], *names[-2:]))
        return Applied(sum(map(len, made)), [Block(tuple(ends), growth=growth)])


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
    """Replace the products that read a KeepLarge; return the names of what they give, and of a tied embedding."""
    kept = node.outputs[0]
    found = [Product.of(use.node) for use in kept.uses() if use.idx == 0]
    group = [product for product in found if product is not None]
    if not group:
        return []
    order = list(graph.graph)
    first = min((product.node for product in group), key=order.index)
    x = _flat(Builder(graph, before=first), kept)
    return [name for product in group for name in (_linear(graph, product, x, kept), *_looked_up(graph, product))]


def _flat(builder: Builder, x: ir.Value) -> ir.Value:
    """Return x [B, S, K] as [T, K], which the kernels take."""
    *leading, inputs = x.shape or []
    if len(leading) < 2:
        return x
    flat: ir.Value = builder.node("Reshape", [x, constant_of(builder, [-1, inputs])])
    flat.type, flat.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["*".join(map(_name, leading)), inputs])
    return flat


def _name(dim: object) -> str:
    return str(getattr(dim, "value", dim))


def _linear(graph: ir.Model, product: Product, x: ir.Value, like: ir.Value | None = None) -> str:
    """Replace a product by one of x [T, K]; what it gives has the leading dimensions of ``like``, if it is given."""
    builder, output = Builder(graph, before=product.node), product.node.outputs[0]
    y = _node(builder, "GatheredLinear", [x, _by_channel(builder, product)], product.weight.rows)
    if product.bias is not None:
        total: ir.Value = builder.node("Add", [y, product.bias])
        total.type, total.shape, y = y.type, y.shape, total
    if like is not None and like is not x:
        leading = builder.node("Shape", [like], attributes={"start": 0, "end": -1})
        width = constant_of(builder, [product.weight.rows])
        shape = builder.node("Concat", [leading, width], attributes={"axis": 0})
        shaped: ir.Value = builder.node("Reshape", [y, shape])
        shaped.type, y = y.type, shaped
    builder.replace_output(output, y)
    return str(y.name)


def _looked_up(graph: ir.Model, product: Product) -> list[str]:
    """Look tokens up in the columns of a tied output projection: one copy is stored.

    A token's row is then one number of each of the H rows, a sector of memory each: little beside one product.
    """
    made = []
    for use in list(product.value.uses()):
        if product.weight.layout == "KN" or not weights.is_embedding(use.node):
            continue
        builder, output = Builder(graph, before=use.node), use.node.outputs[0]
        found = columns(builder, _by_channel(builder, product), required(use.node.inputs[1]))
        builder.replace_output(output, found)
        made.append(str(found.name))
    return made


def _node(builder: Builder, op_type: str, inputs: list[ir.Value], width: int, **attributes: object) -> ir.Value:
    """Insert a node for x [T, K]; return its output float32 [T, width]."""
    assert len(inputs[0].shape or ()) == 2, "the kernels take rows of tokens"
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
    shape = (product.weight.columns, product.weight.rows)
    return builder.lazy(name, shape, ir.DataType.FLOAT, lambda: array_of(product.value).T)


def _limits(builder: Builder, keep: ir.Node) -> ir.Value:
    """Return a KeepLarge's thresholds and the widths of their ramps, float32 [2, K], as its own form rounds them."""
    value = required(keep.inputs[1])
    threshold = array_of(value).astype(np.float32)
    ramp = np.float32(keep.attributes["ramp"].as_float())
    return builder.initializer(f"{value.name}.limits", np.stack([threshold, threshold * ramp]))
