"""moedge::SparseGLU -> moedge.cpu::RoutedGLU, an operator of our own that reads only the experts that are selected.

One node a layer for experts of any width: SiLU and GELU, weights of any sign, compensation, thresholds of hidden
values, and an expert that stands twice in a row of indices (a hierarchical layer) has the sum of its weights. The
thresholds of the experts' inputs go into the operator too; their KeepLarge goes away unless something else reads it.

The operator takes indices and weights, as SparseGLU does, so a router stays as it is and shows its choice where it did.
Where all weights are 1 a TopK takes its place, as for the other forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import Builder, array_of, constant_of, required, sizes
from moedge.export.graph.nodes import (
    active_of,
    compensation_of,
    h_threshold_of,
    has_biases,
    holds_experts,
    layer_of,
    nodes_of,
    routed_directly,
)
from moedge.export.lowering.ort import moe as ort_moe
from moedge.export.lowering.ort.gathered import bits_of, refusal, stored_integers
from moedge.export.lowering.rule import Applied, ends
from moedge.export.manifest import PackedPlace, Tap
from moedge.export.ort_ops import library, pack
from moedge.export.quantize.format import Quantized


@dataclass
class FuseRouted:
    """Rule for every SparseGLU; with ``packed`` (quantised stacks by name) the operators read integers.

    Their scales are stored as float16 where that holds them. After :meth:`apply`, ``stored`` says where each stack
    went.
    """

    packed: Mapping[str, Quantized] | None = None
    stored: dict[str, PackedPlace] = field(default_factory=dict)
    name: str = "SparseGLU -> RoutedGLU, which reads only the selected experts"

    def refuse(self, graph: ir.Model) -> str | None:
        """Refuse experts with biases, asymmetric integers, where another form is faster, and where there is no g++."""
        nodes = nodes_of(graph, "SparseGLU")
        if not nodes:
            return "the graph has no SparseGLU node"
        if any(map(has_biases, nodes)):
            return ort_moe.BIASED
        return refusal(self.packed)

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; the first and the last whole FFN are tested."""
        nodes = nodes_of(graph, "SparseGLU")
        blocks = ends([str(node.outputs[0].name) for node in nodes])
        taps = {}
        for node in nodes:
            indices = self._replace(graph, node)
            if holds_experts(node):
                taps[layer_of(node)] = Tap(output=str(indices.name), kind="indices", top_k=active_of(node))
        ort_moe.replace_unit_routes(graph)
        return Applied(len(nodes), blocks, taps, rounds=self.packed is not None)

    def _replace(self, graph: ir.Model, node: ir.Node) -> ir.Value:
        """Replace one node; return the value that shows which experts are selected."""
        x, indices, weights, gate, up, down = map(required, node.inputs[:6])
        builder, (experts, width, hidden) = Builder(graph, before=node), sizes(gate)
        chosen, limits = indices, h_threshold_of(node)
        route = indices.producer() if routed_directly(node) else None
        if route is not None and route.attributes["rule"].as_string() == "unit":
            chosen, indices, weights = _unit(builder, route, layer_of(node))
        x, x_threshold, ramp = _before_threshold(node, x)
        facts = {
            "activation": node.attributes["activation"].as_string(),
            "num_experts": experts,
            "width": width,
            "hidden": hidden,
            "bits": self.bits,
            "interleaved": int(pack.narrow(2 * width, self.bits)),
            "ramp": ramp,
        }
        inputs = [
            *(x, indices, weights, x_threshold, *self._stack(builder, [gate, up])),
            limits and builder.initializer(f"{limits.name}.flat", array_of(limits).ravel()),
            *(*self._stack(builder, [down]), compensation_of(node)),
        ]
        while inputs[-1] is None:
            inputs.pop()
        y = builder.node("RoutedGLU", inputs, domain=library.DOMAIN, attributes=facts)
        builder.replace_output(node.outputs[0], y)
        return chosen

    @property
    def bits(self) -> int:
        """Of the weights; 32: floats."""
        return bits_of(self.packed)

    def _stack(self, builder: Builder, group: list[ir.Value]) -> list[ir.Value | None]:
        """Add stacks [E, N, K], the rows of each expert one below the other; return them and their scales."""
        names, shapes = [str(value.name) for value in group], [sizes(value) for value in group]
        joined, total = f"experts.{'+'.join(names)}", sum(shape[1] for shape in shapes)
        experts, _, inputs = shapes[0]
        interleaved = len(group) > 1 and pack.narrow(total, self.bits)
        start = 0
        for name, (_, rows, _) in zip(names, shapes, strict=True):
            self.stored[name] = PackedPlace(
                tensor=joined,
                outputs=(start, start + rows),
                total=total,
                layout="ENK",
                interleaved_inputs=inputs if interleaved else 0,
            )
            start += rows
        if self.packed is None:

            def floats() -> np.ndarray:
                return pack.pack_floats(np.concatenate([array_of(value) for value in group], axis=1)).weights

            return [builder.lazy(f"{joined}.rows", (experts, inputs, total), ir.DataType.FLOAT, floats), None]
        whole = _joined([self.packed[name] for name in names])
        return stored_integers(builder, joined, pack.pack(whole, pack.fits_half(whole), interleaved))


def stack_weights(graph: ir.Model) -> set[str]:
    """Name the stacks that the operators will read: their scales are rounded to float16 before anything is judged."""
    return {str(required(value).name) for node in nodes_of(graph, "SparseGLU") for value in node.inputs[3:6]}


def _before_threshold(node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value | None, float]:
    """Return what the operator reads, the thresholds of it or None, and the ramp: the operator has one for both."""
    own = node.attributes["ramp"].as_float() if h_threshold_of(node) is not None else None
    keep = x.producer()
    if keep is None or keep.op_type != "KeepLarge":
        return x, None, own or 0.0
    ramp = keep.attributes["ramp"].as_float()
    if own is not None and own != ramp:
        return x, None, own
    return required(keep.inputs[0]), keep.inputs[1], ramp


def _unit(builder: Builder, route: ir.Node, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Let a TopK select instead of a Route whose weights are 1, which takes two nodes less: its choice, and inputs."""
    chosen, zeros = ort_moe.selection(builder, route, layer, route.attributes["top_k"].as_int())
    indices = builder.node("Cast", [chosen], attributes={"to": int(ir.DataType.INT32)})
    return chosen, indices, builder.node("Add", [zeros, constant_of(builder, 1.0, np.float32)])


def _joined(parts: list[Quantized]) -> Quantized:
    """Return stacks as one, the rows of each expert one below the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    packed, scales = (
        np.concatenate(arrays, axis=1) for arrays in zip(*((part.packed, part.scales) for part in parts), strict=True)
    )
    return Quantized(packed, scales, None, first.bits, first.columns)
