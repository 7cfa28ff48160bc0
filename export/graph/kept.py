"""Where a graph leaves out small values (``KeepLarge``): how that is shown and how it is forced, for parity.

What is left out is a decision, as the choice of experts is: rounding turns it. A *place* is one such decision of a
layer, ``(layer, "x")`` for the inputs of gate and up, ``(layer, "h")`` for the hidden values of the shared block, and
``(layer, "expert_h")`` for those of routed experts, which stay inside a SparseGLU and are shown by no graph;
``(layer, "qkv")`` and ``(layer, "o")`` for the inputs of attention and of its output projection, ``(number of layers,
"head")`` for those of the model's output projection.

Values keep their names through every rewrite, so the names of the portable graph also say what an operator of our own
would show: its further outputs, which nobody reads, are connected under these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export.manifest import GatherPlace, Kept, Which

_BUFFERS: dict[str, Which] = {
    **{"x_threshold": "x", "shared_h_threshold": "h", "h_threshold": "expert_h"},
    **{"qkv_threshold": "qkv", "o_threshold": "o"},
}
_HEAD = "head_threshold"
_OWN = ("GatherGLU", "GatherLinear")
Places = Mapping[int, Mapping[Which, Kept]]


def kept_places(model: Any) -> dict[int, dict[Which, Kept]]:
    """Name by layer of a portable graph (``ir.Model``) what is left out, and the values before and after."""
    from moedge.export.graph.nodes import h_threshold_of, nodes_of

    found: dict[int, dict[Which, Kept]] = {}
    layers = sum(str(value.name).startswith("past_key_values.") for value in model.graph.inputs) // 2
    for node in nodes_of(model, "KeepLarge"):
        layer, which = _place(str(getattr(node.inputs[1], "name", "")), layers)
        kept = Kept(reads=str(getattr(node.inputs[0], "name", "")), output=str(node.outputs[0].name))
        found.setdefault(layer, {})[which] = kept
    for node in nodes_of(model, "SparseGLU"):
        threshold = h_threshold_of(node)
        if threshold is not None:
            layer, which = _place(str(threshold.name), layers)
            found.setdefault(layer, {})[which] = Kept()
    return found


def still_shown(model: Any, places: Places) -> dict[int, dict[Which, Kept]]:
    """Return ``places`` of a portable graph as the graph ``model``, lowered from it, shows them.

    A place loses its names where the values are gone, and every place does in a half-precision graph: what is kept is
    rounded there, and so is what it is kept from.
    """
    import onnx_ir as ir

    from moedge.export.graph.build import values_by_name

    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    if any(value.dtype in half for value in (*model.graph.inputs, *model.graph.outputs)):  # the cache
        return {layer: {which: Kept() for which in kept} for layer, kept in places.items()}
    values = values_by_name(model)
    own = {str(node.inputs[0].name): node for node in model.graph if node.op_type in _OWN}
    found: dict[int, dict[Which, Kept]] = {}
    for layer, kept in places.items():
        fused = own.get(kept["x"].reads or "") if "x" in kept else None
        found[layer] = {}
        for which, place in kept.items():
            node = own.get(place.reads or "")
            inside = fused is not None and fused.op_type == "GatherGLU" and which in ("x", "h")
            beside = place.reads in values and (node is not None or place.output in values)
            found[layer][which] = place if inside or beside else Kept()
    return found


def _place(name: str, layers: int) -> GatherPlace:
    """The layer and the place whose thresholds an initializer holds, by its name, in a model of so many layers.

    Raises:
        MoEdgeError: the name says neither.
    """
    layer, buffer = re.search(r"\blayers\.(\d+)\.", name), name.rpartition(".")[2]
    if buffer == _HEAD:
        return layers, "head"
    if layer is None or buffer not in _BUFFERS:
        raise MoEdgeError(f"Nothing says which layer the thresholds {name!r} belong to; export the checkpoint again.")
    return int(layer[1]), _BUFFERS[buffer]


def named(places: Places) -> dict[GatherPlace, Kept]:
    """Return the places that a graph shows."""
    return {
        (layer, which): place
        for layer, kept in sorted(places.items())
        for which, place in kept.items()
        if place.reads is not None and place.output is not None
    }


def show(model: Any, path: Path, places: Mapping[GatherPlace, Kept], *, after: bool) -> None:
    """Make what is left out an output of a graph (``onnx.ModelProto``): the values before, and ``after`` too.

    Raises:
        MoEdgeError: one of the values is not in the graph.
    """
    import onnx

    own = {node.input[0]: node for node in model.graph.node if node.op_type in _OWN}
    made = {output for node in model.graph.node for output in node.output}
    for (layer, which), place in places.items():
        node = own.get(place.reads or "")
        # Experts beside a shared block keep the KeepLarge, which shows it.
        output = "" if place.output is None or place.output in made else place.output
        if node is not None and which == "x" and node.op_type == "GatherGLU":
            inner = places.get((layer, "h"), Kept())
            node.output[1:] = [output, inner.reads or "", inner.output or ""]
        elif node is not None and node.op_type == "GatherLinear" and output:
            node.output[1:] = [output]
    made = {output for node in model.graph.node for output in node.output}
    made |= {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    for (layer, _), place in places.items():
        for name in (place.reads, place.output if after else None):
            if name is not None and name not in made:
                raise MoEdgeError(
                    f"{path}: {name!r}, of which layer {layer} leaves out small values, is not in the graph; export it "
                    "again."
                )
            if name is not None and name not in outputs:
                outputs.add(name)
                model.graph.output.append(onnx.ValueInfoProto(name=name))  # without a type: the runtime infers it


def factor_input(place: GatherPlace) -> str:
    """Name of the graph input that forces what is left out at a place."""
    return f"layers.{place[0]}.{place[1]}.factors"


OWN = np.float32(-1.0)
"""Fed as a factor: take the graph's own thresholds."""


def force(model: Any, path: Path, places: Mapping[GatherPlace, Kept]) -> None:
    """Give each place of a portable graph an input float32 [T, K] (or [1, 1]): the factor of each value of one text.

    Where it is negative (:data:`OWN`) the graph's own thresholds decide.

    Raises:
        MoEdgeError: a place is no KeepLarge of the graph.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    if places:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "factors.zero"))
    for place, kept in places.items():
        node = next((node for node in graph.node if kept.output in node.output), None)
        if node is None or (node.domain, node.op_type) != ("moedge", "KeepLarge"):
            raise MoEdgeError(f"{path}: what a layer leaves out can be forced in a portable bundle; this is none.")
        name, output = factor_input(place), node.output[0]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]))
        node.output[0] = f"{output}.own"
        added = [
            helper.make_node("Less", [name, "factors.zero"], [f"{name}.none"]),
            helper.make_node("Mul", [node.input[0], name], [f"{name}.forced"]),
            helper.make_node("Where", [f"{name}.none", node.output[0], f"{name}.forced"], [output]),
        ]
        at = list(graph.node).index(node) + 1
        for offset, one in enumerate(added):
            graph.node.insert(at + offset, one)


def thresholds(path: Path, places: Mapping[GatherPlace, Kept]) -> dict[GatherPlace, tuple[np.ndarray, float]]:
    """Return the thresholds float32 [K] and the ramp of each place of the portable graph at ``path``."""
    import onnx_ir as ir

    from moedge.export.graph.build import array_of, required
    from moedge.export.graph.nodes import nodes_of

    found = {str(node.outputs[0].name): node for node in nodes_of(ir.load(path), "KeepLarge")}
    nodes = {place: found[str(kept.output)] for place, kept in places.items()}
    return {
        place: (array_of(required(node.inputs[1])), node.attributes["ramp"].as_float()) for place, node in nodes.items()
    }
