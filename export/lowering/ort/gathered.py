"""KeepLarge and the products that read it -> operators of our own that read only the weights of kept values.

``KeepLarge -> gate, up -> SiLU * up -> KeepLarge -> down`` becomes one ``moedge.cpu::GatherGLU``; any other KeepLarge
that only products by constants read becomes a ``GatherLinear`` (and a Split). What reads a KeepLarge otherwise,
such as routed experts, keeps it: ONNX Runtime's own kernels multiply by zeros then, slower and never wrong.

The operators are in a library that is compiled here and lies in the bundle (:mod:`moedge.export.ort_ops`). Without
a compiler the rule is refused and everything keeps ONNX Runtime's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import weights
from moedge.export.graph.build import Builder, constant_of, remove_unused, required
from moedge.export.graph.gathered import GatheredFFN, Product, joined_bias, products
from moedge.export.graph.nodes import nodes_of
from moedge.export.lowering import gather
from moedge.export.lowering.rule import Applied, Block
from moedge.export.manifest import PackedPlace
from moedge.export.ort_ops import library, pack
from moedge.export.quantize.format import BLOCK, Quantized


def refusal(packed: Mapping[str, Quantized] | None) -> str | None:
    """Say why no operator of ours can be used: asymmetric integers, or a library that cannot be compiled here."""
    if packed is not None and any(value.zero_points is not None for value in packed.values()):
        return pack.ZERO_POINTS
    try:
        library.compiled()
    except MoEdgeError as error:
        return str(error)
    return None


def bits_of(packed: Mapping[str, Quantized] | None) -> int:
    """Return the bits of a rule's weights; 32 for floats (None)."""
    return 32 if packed is None else next(iter(packed.values())).bits


def stored_integers(builder: Builder, name: str, made: pack.Packed) -> list[ir.Value | None]:
    """Add a packed weight of integers, and its scales, to the graph; return both."""
    scales = None if made.scales is None else builder.initializer(f"{name}.scales", made.scales)
    return [builder.initializer(f"{name}.q", made.weights), scales]


@dataclass
class FuseGather:
    """Rule for every KeepLarge; with ``packed`` (quantised rows by the weight's name) the operators read integers.

    Their scales are stored as float16 where that holds them. After :meth:`apply`, ``stored`` says where each weight
    went.
    """

    packed: Mapping[str, Quantized] | None = None
    class_of: Callable[[str], str] = lambda name: "shared"
    stored: dict[str, PackedPlace] = field(default_factory=dict)
    name: str = "KeepLarge, products -> operators that read only kept inputs"

    def refuse(self, graph: ir.Model) -> str | None:
        """Refuse a graph without a KeepLarge, asymmetric integers, and where the library cannot be compiled."""
        if not nodes_of(graph, "KeepLarge"):
            return "no values are left out"
        return refusal(self.packed)

    def apply(self, graph: ir.Model) -> Applied:
        """Replace whole FFNs first, then what is left; the first and the last of either kind are tested."""
        blocks: list[list[Block]] = [[], []]
        for kind, fuse in enumerate((self._glu, self._linear)):
            for node in nodes_of(graph, "KeepLarge"):
                if node.graph is not None and (block := fuse(graph, node)):
                    blocks[kind].append(block)
                    remove_unused(graph)
        ends = [block for found in blocks for block in dict.fromkeys((*found[:1], *found[-1:]))]
        reason = "" if ends else "no value that is left out is multiplied by constants alone"
        return Applied(sum(map(len, blocks)), ends, reason=reason, rounds=self.packed is not None)

    def _glu(self, graph: ir.Model, second: ir.Node) -> Block | None:
        """Replace the FFN whose hidden values ``second`` chooses."""
        ffn = GatheredFFN.of(second)
        if ffn is None:
            return None
        first, gate, up, down = ffn.first, ffn.gate, ffn.up, ffn.down
        ramps = {node.attributes["ramp"].as_float() for node in (first, second)}
        if len(ramps) > 1:
            return None
        builder, x = Builder(graph, before=ffn.product), required(first.inputs[0])
        inner, hidden = gate.weight.rows, gate.weight.columns
        bias = joined_bias(builder, [gate, up])
        inputs = [
            *(x, first.inputs[1], *self._weight(builder, [gate, up])),
            *(second.inputs[1], *self._weight(builder, [down]), bias, down.bias),
        ]
        ramp = ramps.pop()
        facts = {"activation": "silu", "bits": bits_of(self.packed), "hidden": hidden, "inner": inner, "ramp": ramp}
        block = _replace(builder, "GatherGLU", inputs, facts, x, [down])
        return replace(block, growth=gather.narrower(ramp))

    def _linear(self, graph: ir.Model, node: ir.Node) -> Block | None:
        """Replace a KeepLarge and the products that read it."""
        group = products(node)
        if not group:
            return None
        builder, x = Builder(graph, before=group[0].node), required(node.inputs[0])
        inputs = [x, node.inputs[1], *self._weight(builder, group), joined_bias(builder, group)]
        outputs = sum(product.weight.rows for product in group)
        ramp = node.attributes["ramp"].as_float()
        facts = {"bits": bits_of(self.packed), "K": group[0].weight.columns, "N": outputs, "ramp": ramp}
        return _replace(builder, "GatherLinear", inputs, facts, x, group)

    def _weight(self, builder: Builder, group: Sequence[Product]) -> list[ir.Value | None]:
        """Add the packed weight of products of one value, side by side; return it and its scales (None: floats)."""
        names = [product.weight.name for product in group]
        kind = self.class_of(names[0])
        # A tied output projection: the table that tokens are looked up in stays, under the name without "rows".
        joined = f"{kind}{'.rows' if kind == 'embedding' else ''}.{'+'.join(names)}"
        total, start = sum(product.weight.rows for product in group), 0
        for product in group:
            end = start + product.weight.rows
            self.stored[product.weight.name] = PackedPlace(
                tensor=joined, outputs=(start, end), total=total, layout=product.weight.layout
            )
            start = end
        if self.packed is None:
            shape = (group[0].weight.columns, total)

            def floats() -> np.ndarray:
                return pack.pack_floats(np.concatenate([product.rows() for product in group])).weights

            return [builder.lazy(f"{joined}.rows", shape, ir.DataType.FLOAT, floats), None]
        parts = [self.packed[name] for name in names]
        whole = parts[0].rows(*parts[1:])
        return stored_integers(builder, joined, pack.pack(whole, pack.fits_half(whole)))


def gathered_weights(graph: ir.Model) -> set[str]:
    """Name the weights that the operators may read: their scales are rounded to float16 before anything is judged.

    What else reads a KeepLarge, such as routed experts, may be gone when the rule is applied.
    """
    uses = (use for node in nodes_of(graph, "KeepLarge") for use in node.outputs[0].uses() if use.idx == 0)
    found = (Product.of(use.node) for use in uses)
    return {product.weight.name for product in found if product is not None}


def stored_bytes(place: PackedPlace, weight: weights.Weight, bits: int, *, half_scales: bool) -> int:
    """Bytes of the stored tensor and its scales, padding included, for the first of the weights in it; else 0."""
    if place.outputs[0]:
        return 0
    blocks, inputs = -(-weight.columns // BLOCK), weight.columns
    line = pack.CELL_COLUMNS if place.interleaved_inputs else pack.LINE * 8 // bits
    columns = -(-place.total // line) * line
    if place.interleaved_inputs:
        levels = blocks * BLOCK * columns * bits // 8
    else:
        levels = inputs * pack.row_bytes(columns, bits)
    experts = weight.shape[0] if weight.layout == "ENK" else 1
    return experts * (levels + columns * blocks * (2 if half_scales else 4))


def _replace(
    builder: Builder,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    facts: Mapping[str, object],
    x: ir.Value,
    group: Sequence[Product],
) -> Block:
    """Insert the operator for the outputs of ``group``; return the block that shows that it is right."""
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    y = builder.node(op_type, given, domain=library.DOMAIN, attributes=dict(facts))
    outputs = [product.node.outputs[0] for product in group]
    names = tuple(str(output.name) for output in outputs)
    if len(group) == 1:
        builder.replace_output(outputs[0], y)
    else:
        widths = constant_of(builder, [product.weight.rows for product in group])
        pieces = builder.node("Split", [y, widths], outputs=len(group), attributes={"axis": -1})
        for output, piece in zip(outputs, pieces, strict=True):
            builder.replace_output(output, piece)
    return Block(names, inputs=(str(x.name),))
