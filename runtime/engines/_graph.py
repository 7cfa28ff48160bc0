"""Changes to a bundle's graph in memory: routing taps as outputs, another number of active experts.

Only the small graph is read and rewritten; weights stay in their file. Needs the ``onnx`` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedge import MoEdgeError


def edited(
    path: Path,
    manifest: dict[str, Any],
    taps: dict[int, dict[str, Any]],
    top_k: int | None,
    float32_activations: bool = False,
) -> bytes:
    """Return the model at ``path`` as bytes, with ``taps`` as outputs and every layer run with ``top_k`` experts.

    ``float32_activations`` sets ``accuracy_level`` of quantised products to 0: no rounding of activations to int8.

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
        name = tap["output"]
        if name not in made:
            raise MoEdgeError(f"{path}: the tap {name!r} of layer {layer} is not in the graph; export it again.")
        if name not in outputs:
            # Without a type: the runtime infers it.
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    if top_k is not None:
        _set_top_k(model, path, manifest, top_k)
    if float32_activations:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    return bytes(model.SerializeToString())


def _set_top_k(model: Any, path: Path, manifest: dict[str, Any], top_k: int) -> None:
    """Set k of every routed layer to ``top_k``, or to the layer's number of experts where that is less.

    k stands in attributes: ``top_k`` of ``moedge::Route`` and ``k`` of ``com.microsoft::MoE`` and ``QMoE``. Where the
    lowering has replaced Route (unit weights, export/lowering/ort_moe.py) it also stands in two initializers of the
    layer.
    """
    import numpy as np
    from onnx import numpy_helper

    if top_k < 1:
        raise MoEdgeError(f"top_k={top_k} must be at least 1.")
    facts = (manifest.get("moe") or {}).get("layers", {})
    layers = sorted(int(layer) for layer in facts if facts[layer]["num_experts"])
    if any("parents" in entry for entry in facts.values()):
        raise MoEdgeError(
            f"{path}: top_k of a hierarchical model is fixed when it is exported; open its checkpoint in PyTorch."
        )
    counts = [min(top_k, facts[str(layer)]["num_experts"]) for layer in layers]
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
    for layer, count in zip(layers, counts, strict=True):
        if f"layers.{layer}.router.top_k" in named:
            for name, new in (("top_k", np.array([count], np.int64)), ("weight_sum", np.array(count, np.float32))):
                tensor = named[f"layers.{layer}.router.{name}"]
                tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
            routed.add(layer)
    if not layers or routed != set(layers):
        raise MoEdgeError(f"{path}: top_k cannot be set, the graph does not show where its layers choose experts.")
    # Shapes recorded for the old k would contradict the new one.
    del model.graph.value_info[:]
