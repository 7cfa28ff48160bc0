"""The ``moedge::`` nodes of a graph: find them, ask what they are, give them their function bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.functions import DOMAIN, VERSION, attributes_of, bodies
from moedge.export.graph.build import array_of, depends_only_on, values_by_name
from moedge.export.manifest import Tap


def nodes_of(model: ir.Model, operator: str) -> list[ir.Node]:
    """Return the nodes of one operator of ours, such as ``SparseGLU``, in the order of the graph."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == operator]


def layer_of(sparse_glu: ir.Node) -> int:
    """Return the model layer of a SparseGLU node, read from the name of its gate weights."""
    gate = sparse_glu.inputs[3]
    found = re.search(r"\blayers\.(\d+)\.", str(gate.name)) if gate is not None else None
    if found is None:
        raise MoEdgeError(f"Node {sparse_glu.name} has no layer number in the name of its weights.")
    return int(found[1])


def attention_kinds(model: ir.Model) -> list[ir.Node]:
    """Return the first CausalAttention of each kind: full, sliding window, soft-capped."""
    kinds: dict[tuple[int, float, float], ir.Node] = {}
    for node in nodes_of(model, "CausalAttention"):
        window, cap, scale = (node.attributes[name].value for name in ("window", "softcap", "scale"))
        kinds.setdefault((window, cap, scale), node)
    return list(kinds.values())


_LATER = {"CausalAttention": {"window": 0, "softcap": 0.0}}
"""Attributes that nodes of older exports lack, and what they meant then: models with any other value were refused."""


def complete(model: ir.Model, where: str) -> None:
    """Bring the ``moedge::`` nodes of a graph that an older version exported up to date, in place.

    Raises:
        MoEdgeError: a node lacks what cannot be known any more; ``where`` is the bundle.
    """
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        for name in attributes_of(node.op_type):
            if name in node.attributes:
                continue
            if name not in _LATER.get(node.op_type, {}):
                raise MoEdgeError(
                    f"{where} was exported by an older moedge: its {node.op_type} nodes have no {name}. Export the "
                    "checkpoint again with this version (moedge export CHECKPOINT OUT --force)."
                )
            value = _LATER[node.op_type][name]
            node.attributes[name] = ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrFloat32(name, value)


def activations(model: ir.Model) -> set[str]:
    """Return the gate activations of a graph's experts."""
    return {node.attributes["activation"].as_string() for node in nodes_of(model, "SparseGLU")}


def smallest_weight(model: ir.Model) -> float:
    """Return a lower bound of the combination weights over all Route nodes (scaled: 1 + u_e * p with p in 0..1)."""
    smallest = 1.0
    for node in nodes_of(model, "Route"):
        rule, scores = node.attributes["rule"].as_string(), node.inputs[0]
        if rule == "scaled":
            smallest = min(smallest, 1.0 + float(np.minimum(array_of(node.inputs[2]), 0).min()))
        producer = scores.producer() if scores is not None else None
        if rule == "normalised" and (producer is None or producer.op_type != "Sigmoid"):
            smallest = 0.0  # nothing says that these scores are positive
    return smallest


def holds_experts(sparse_glu: ir.Node) -> bool:
    """Whether a SparseGLU holds a layer's routed experts: a hierarchical layer has others, of other parts."""
    return str(getattr(sparse_glu.inputs[3], "name", "")).endswith(".mlp.gate")


def has_biases(sparse_glu: ir.Node) -> bool:
    """Whether gate and up have biases: then their rows are one longer than the hidden size, and x ends in ones."""
    gate, down = sparse_glu.inputs[3], sparse_glu.inputs[5]
    if gate is None or down is None or gate.shape is None or down.shape is None:
        raise MoEdgeError(
            f"Node {sparse_glu.name} does not say how large its experts are; it was not traced by moedge."
        )
    return bool(gate.shape[2] != down.shape[1])


def compensation_of(sparse_glu: ir.Node) -> ir.Value | None:
    """Return what a SparseGLU adds for experts that are not selected [E, H], or None."""
    return sparse_glu.inputs[6] if len(sparse_glu.inputs) > 6 else None


def h_threshold_of(sparse_glu: ir.Node) -> ir.Value | None:
    """Return the thresholds [E, I] below which a SparseGLU leaves hidden values out, or None."""
    return sparse_glu.inputs[7] if len(sparse_glu.inputs) > 7 else None


KEEPS = "hidden values of the experts that are small are left out, for which the kernel has no place"
"""Why a kernel of whole experts cannot take a SparseGLU with :func:`h_threshold_of`."""


def keeps_large(model: ir.Model) -> bool:
    """Whether a SparseGLU of the graph leaves out small hidden values."""
    return any(h_threshold_of(node) is not None for node in nodes_of(model, "SparseGLU"))


def active_of(sparse_glu: ir.Node) -> int:
    """Return how many experts a SparseGLU runs for one token."""
    indices = sparse_glu.inputs[1]
    shape = indices.shape if indices is not None else None
    if shape is None or not isinstance(shape[1], int):
        raise MoEdgeError(f"Node {sparse_glu.name} does not say how many experts it runs; it was not traced by moedge.")
    return int(shape[1])


def router_inputs(model: ir.Model) -> dict[int, str]:
    """Name by layer of a portable graph what the layer's router reads; hierarchical layers are left out.

    That is what the experts read, before small values are left out and experts with biases get a further column of
    ones.
    """
    found: dict[int, str] = {}
    for node in nodes_of(model, "SparseGLU"):
        x, indices = node.inputs[:2]
        if x is None or indices is None or not (holds_experts(node) and routed_directly(node)):
            continue
        sources: list[ir.Value | None] = [x]
        while (before := sources[-1].producer() if sources[-1] is not None else None) is not None and len(sources) < 3:
            sources.append(before.inputs[0] if before.inputs else None)
        names = [str(value.name) for value in sources if value is not None]
        found |= {layer_of(node): name for name in reversed(names) if depends_only_on(indices, name)}
    return found


def name_reads(model: ir.Model, read: dict[int, str], taps: Mapping[int, Tap]) -> dict[int, Tap]:
    """Return the taps with what each layer's router reads in ``model``: the entries ``reads`` and ``reads_dtype``.

    Args:
        model: the lowered graph.
        read: :func:`router_inputs` of the graph that it was lowered from. Rewrites keep the names of values.
        taps: by layer, for the manifest. A layer is left without the entries where its choice is not a function of that
            value alone: nobody could then repeat the choice from it.
    """
    values = values_by_name(model)
    found = dict(taps)
    for layer, tap in taps.items():
        name = read.get(layer, "")
        if name in values and depends_only_on(values[tap.output], name):
            kind = values[name].dtype
            assert kind is not None
            found[layer] = tap.model_copy(update={"reads": name, "reads_dtype": kind.numpy().name})
    return found


def routed_directly(sparse_glu: ir.Node) -> bool:
    """Whether a Route node gives a SparseGLU its experts; those of a hierarchical layer are composed after it."""
    indices = sparse_glu.inputs[1]
    route = indices.producer() if indices is not None else None
    return route is not None and route.op_type == "Route"


def attach(model: ir.Model, *, form: str) -> None:
    """Give every ``moedge::`` node of the graph its function body; ``form`` is that of SparseGLU.

    Raises:
        MoEdgeError: the layers mix weight rules, activations, or with and without compensation or soft capping.
    """
    experts, attention = (nodes_of(model, name) for name in ("SparseGLU", "CausalAttention"))

    def only(what: str, values: set[Any], default: Any) -> Any:
        if len(values) > 1:
            listed = ", ".join(map(str, sorted(values)))
            raise MoEdgeError(f"The layers mix {what} ({listed}); use one for the whole model.")
        return next(iter(values), default)

    protos = bodies(
        activation=only("activations", {node.attributes["activation"].as_string() for node in experts}, "silu"),
        rule=only("weight rules", {n.attributes["rule"].as_string() for n in nodes_of(model, "Route")}, "unit"),
        compensation=only(
            "layers with and without compensation", {compensation_of(node) is not None for node in experts}, False
        ),
        window=any(node.attributes["window"].as_int() for node in attention),
        softcap=only(
            "capped and uncapped attention", {n.attributes["softcap"].as_float() > 0 for n in attention}, False
        ),
        form=form,
        gather=only(
            "experts with and without thresholds", {h_threshold_of(node) is not None for node in experts}, False
        ),
        repeats=any(not routed_directly(node) for node in experts),
    )
    model.functions.clear()
    needed = {node.op_type for node in model.graph if node.domain == DOMAIN}
    if form == "chain" and experts:
        needed |= {"Dispatch", "GroupedGLU", "GroupedLinear", "Combine"}
    for name in sorted(needed):
        function = ir.serde.deserialize_function(protos[name])
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
