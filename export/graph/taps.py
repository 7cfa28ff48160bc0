"""Changes to a bundle's graph in memory: routing taps as outputs, another number of active experts.

Only the small graph is read and rewritten; weights stay in their file. Needs the ``onnx`` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge.export import targets
from moedge.export.graph import kept
from moedge.export.manifest import GatherPlace, Kept, Manifest, Tap


def edited(
    path: Path,
    manifest: Manifest,
    taps: Mapping[int, Tap],
    top_k: int | None,
    float32_activations: bool = False,
    router_inputs: dict[int, str] | None = None,
    replay: bool = False,
    last_logits: bool = False,
    keeps: Mapping[GatherPlace, Kept] | None = None,
    show_scores: bool = False,
) -> tuple[bytes, dict[int, str]]:
    """Return the model at ``path`` as bytes, with ``taps`` as outputs and every layer run with ``top_k`` experts.

    ``float32_activations`` sets ``accuracy_level`` of quantised products to 0: no rounding of activations to int8.
    ``router_inputs`` (see the function) become outputs too, and with them, or with ``show_scores``, what each layer
    ranks its experts by where the graph shows it (:func:`_show_scores`): their names by layer are returned. With
    ``replay`` each routed layer gets an input ``layers.N.forced`` float32 [T, E] that is added to the scores it selects
    by, and to no weight. ``last_logits`` makes the output projection read the last position alone. ``keeps``: what is
    left out becomes outputs, and with ``replay`` what is left out can be forced (:mod:`moedge.export.graph.kept`).

    Raises:
        MoEdgeError: ``onnx`` is missing, a tap is not in the graph, or there is no routing whose k could be changed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MoEdgeError("Routing taps and top_k need the onnx package; install it with: pip install onnx") from error
    model = onnx.load(path, load_external_data=False)
    made = {output for node in model.graph.node for output in node.output}
    outputs = {value.name for value in model.graph.output}
    for layer, tap in taps.items():
        name = tap.output
        if name not in made:
            raise MoEdgeError(f"{path}: the tap {name!r} of layer {layer} is not in the graph; export it again.")
        if name not in outputs:
            # Without a type: the runtime infers it.
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    scores = _show_scores(model, taps) if (router_inputs or show_scores) and not replay else {}
    shown = dict.fromkeys([*(router_inputs or {}).values(), *scores.values()])
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
    if replay:
        _add_forced(model, path, manifest)
        kept.force(model, path, kept.named(manifest.keeps))
    kept.show(model, path, keeps or {}, after=not replay)
    if top_k is not None:
        _set_top_k(model, path, manifest, top_k)
    if last_logits:
        _keep_last(model, path, manifest.target)
    if float32_activations:
        _keep_activations(model)
    return bytes(model.SerializeToString()), scores


def _keep_activations(model: Any) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0


def _show_scores(model: Any, taps: Mapping[int, Tap]) -> dict[int, str]:
    """Name by layer the value whose k best a layer selects; empty unless every layer shows one.

    It is what a TopK ranks, or the scores of a Route with its selection bias added. A choice that is computed in any
    other way, or changed after it was made, shows none.
    """
    from onnx import helper

    makers = {output: node for node in model.graph.node for output in node.output}
    found: dict[int, str] = {}
    for layer, tap in taps.items():
        node = makers.get(tap.output) if tap.kind == "indices" else None
        while node is not None and node.op_type in ("Cast", "Identity"):
            node = makers.get(node.input[0])
        if node is not None and (node.domain, node.op_type) == ("moedge", "Route"):
            added = helper.make_node("Add", list(node.input[:2]), [f"layers.{layer}.ranked"])
            model.graph.node.insert(list(model.graph.node).index(node), added)
            found[layer] = added.output[0]
        elif node is not None and node.op_type == "TopK":
            found[layer] = node.input[0]
    return found if found.keys() == taps.keys() else {}


def emulated(path: Path, graph: bytes | None) -> bytes:
    """Return the half-precision graph at ``path``, or as :func:`edited` gave it, in float32 with its roundings.

    Raises:
        MoEdgeError: ``onnx`` is missing.
    """
    try:
        import onnx

        from moedge.export.graph import emulation
    except ImportError as error:
        raise MoEdgeError("Running a half-precision graph on a CPU needs the onnx package: pip install onnx") from error
    model = onnx.load(path, load_external_data=False) if graph is None else onnx.ModelProto.FromString(graph)
    return bytes(emulation.emulated(model).SerializeToString())


_PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits", "GatherLinear")
ELEMENTWISE = ("Cast", "Div", "Mul", "Tanh")
"""What may follow the output projection: scale, soft cap."""


def _keep_last(model: Any, path: Path, target: str) -> None:
    """Cut what the output projection reads, [B, S, H], to its last position."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    maker = {output: node for node in graph.node for output in node.output}
    head = maker.get("logits")
    while head is not None and head.op_type in ELEMENTWISE:
        head = maker.get(head.input[0])
    if head is None or head.op_type not in _PRODUCTS:
        if targets.find(target).engine is not None:  # its plugins take rows of tokens, in whose graph no last one is
            raise MoEdgeError(
                f"{path.parent} is for TensorRT: `moedge build` makes its engine on the device, `moedge pack` an "
                "archive for one. Here use ort-cpu or portable."
            )
        raise MoEdgeError(f"{path}: no product makes the logits, so they cannot be computed for the last token alone.")
    for name, value in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), f"last_logits.{name}"))
    inputs = [head.input[0], "last_logits.start", "last_logits.end", "last_logits.axis"]
    last = helper.make_node("Slice", inputs, ["last_logits.hidden"], name="last_logits")
    graph.node.insert(list(graph.node).index(head), last)
    head.input[0] = "last_logits.hidden"
    after = {"logits", *head.output}
    for value in [*graph.output, *graph.value_info]:  # their shapes say S where 1 is meant now
        if value.name in after and value.type.tensor_type.HasField("shape"):
            dimension = value.type.tensor_type.shape.dim[1]
            dimension.Clear()
            dimension.dim_value = 1


def forced_input(layer: int) -> str:
    """Name of the graph input that forces the experts of a layer."""
    return f"layers.{layer}.forced"


def _add_forced(model: Any, path: Path, manifest: Manifest) -> None:
    from onnx import TensorProto, helper

    layers = manifest.routed_layers
    # Layers follow each other in the graph, so the n-th node is the n-th routed layer.
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == ("moedge", "Route")]
    if len(nodes) != len(layers) or (manifest.moe and manifest.moe.nested):
        raise MoEdgeError(
            f"{path}: experts can be forced in a portable bundle whose layers each choose once; this is none."
        )
    for layer, node in zip(layers, nodes, strict=True):
        name = forced_input(layer)
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]))
        # The selection bias is in no weight (export/functions.py), so this changes the choice and nothing else.
        added = helper.make_node("Add", [node.input[1], name], [f"{name}.bias"])
        model.graph.node.insert(list(model.graph.node).index(node), added)
        node.input[1] = f"{name}.bias"


def router_inputs(path: Path, manifest: Manifest) -> dict[int, str]:
    """Return by layer the value that its router reads, as the bundle's taps name it.

    Raises:
        MoEdgeError: ``onnx`` is missing, or the taps name no such value, or one that is not all that the layer's choice
            depends on: what a router would select could not be told from it.
    """
    layers = manifest.routed_layers
    if not manifest.names_reads:
        return _expert_inputs(path, layers)
    import onnx_ir as ir

    from moedge.export.graph.build import depends_only_on, values_by_name

    values = values_by_name(ir.load(path))
    found = {}
    for layer in layers:
        tap = manifest.taps[layer]
        if tap.reads not in values or tap.output not in values:
            raise MoEdgeError(f"{path}: a tap of layer {layer} is not in the graph; export it again.")
        if not depends_only_on(values[tap.output], tap.reads):
            raise MoEdgeError(
                f"{path}: layer {layer} does not choose its experts by {tap.reads!r} alone, as its tap says; export "
                "it again."
            )
        found[layer] = tap.reads
    return found


def own_router_inputs(path: Path) -> dict[int, str]:
    """Name by layer what the routers of a portable graph read, whatever its taps say (older bundles say nothing)."""
    import onnx_ir as ir

    from moedge.export.graph import nodes

    return nodes.router_inputs(ir.load(path))


def _expert_inputs(path: Path, layers: list[int]) -> dict[int, str]:
    """What the experts of older quantised bundles read, and their routers with them: one ``QMoE`` node a layer."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    names = [node.input[0] for node in graph.node if (node.domain, node.op_type) == ("com.microsoft", "QMoE")]
    if len(names) != len(layers):
        raise MoEdgeError(f"{path} does not say what its routers read; export it again.")
    return dict(zip(layers, names, strict=True))


def routers(path: Path, layers: list[int]) -> tuple[bytes, dict[int, str], list[str]]:
    """Cut the routers out of a portable graph.

    Returns:
        A model from what each layer's router reads to what it ranks its experts by, the input's name by layer, and the
        outputs' names in the order of ``layers``.

    Raises:
        MoEdgeError: a router reads something else than its layer's input.
    """
    from moedge.export.graph import nodes
    from moedge.export.graph.build import Builder, cut_whole, load, values_by_name

    model = load(path)
    inputs = nodes.router_inputs(model)
    stops = set(inputs.values())
    found = nodes.nodes_of(model, "Route")
    if len(found) != len(layers):
        raise MoEdgeError(f"{path}: {len(found)} routers for {len(layers)} routed layers; export it again.")
    # Layers follow each other in the graph, so the n-th node is the n-th routed layer.
    outputs = [f"layers.{layer}.ranked" for layer in layers]
    for name, node in zip(outputs, found, strict=True):
        Builder(model, before=node).node("Add", node.inputs[:2]).name = name
    values = values_by_name(model)
    part = cut_whole(model, [values[name] for name in outputs], lambda value: value.name in stops)
    if not inputs.keys() >= set(layers) or {entry.name for entry in part.graph.input} - stops:
        raise MoEdgeError(f"{path}: a router reads more than the input of its experts, so it cannot be run alone.")
    return bytes(part.SerializeToString()), {layer: inputs[layer] for layer in layers}, outputs


def _set_top_k(model: Any, path: Path, manifest: Manifest, top_k: int) -> None:
    """Set k of every routed layer to ``top_k``, or to the layer's number of experts where that is less.

    k stands in attributes: ``top_k`` of ``moedge::Route`` and ``k`` of ``com.microsoft::MoE`` and ``QMoE``. Where the
    lowering has replaced Route (unit weights, export/lowering/ort/moe.py) it also stands in initializers of the
    layer.
    """
    if top_k < 1:
        raise MoEdgeError(f"top_k={top_k} must be at least 1.")
    layers = manifest.routed_layers
    if manifest.moe and manifest.moe.nested:
        raise MoEdgeError(
            f"{path}: top_k of a hierarchical model is fixed when it is exported; open its checkpoint in PyTorch."
        )
    counts = [min(top_k, manifest.layers[layer].num_experts) for layer in layers]
    named = {value.name: value for value in model.graph.initializer}
    routed: set[int] = set()  # layers whose selection has been changed
    places = (("moedge", "Route", "top_k"), ("com.microsoft", "MoE", "k"), ("com.microsoft", "QMoE", "k"))
    for domain, kind, attribute in places:
        # Layers follow each other in the graph, so the n-th node is the n-th routed layer.
        nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (domain, kind)]
        if nodes and len(nodes) != len(layers):
            raise MoEdgeError(f"{path}: {len(nodes)} {kind} nodes for {len(layers)} routed layers; export it again.")
        for node, layer, count in zip(nodes, layers, counts, strict=False):
            value = next((item for item in node.attribute if item.name == attribute), None)
            if value is None:
                raise MoEdgeError(f"{path}: node {node.name!r} has no attribute {attribute!r}; export it again.")
            value.i = count
            # QMoE selects by itself where it is given scores; as a log-weight form it follows the initializers below.
            if kind == "Route" or (kind == "QMoE" and f"layers.{layer}.router.top_k" not in named):
                routed.add(layer)
    routed |= {layer for layer, count in zip(layers, counts, strict=True) if _set_initializers(named, layer, count)}
    if not layers or routed != set(layers):
        raise MoEdgeError(f"{path}: top_k cannot be set, the graph does not show where its layers choose experts.")
    # Shapes recorded for the old k would contradict the new one.
    del model.graph.value_info[:]


def _set_initializers(named: dict[str, Any], layer: int, top_k: int) -> bool:
    """Set k where the graph has it as initializers of a layer; False where it has none."""
    import numpy as np
    from onnx import numpy_helper

    if f"layers.{layer}.router.top_k" not in named:
        return False
    for name, new in (("top_k", np.array([top_k], np.int64)), ("weight_sum", np.array(top_k, np.float32))):
        if tensor := named.get(f"layers.{layer}.router.{name}"):
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return True
