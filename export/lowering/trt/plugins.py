"""Nodes that TensorRT takes as plugins, with their function bodies for everyone else.

``SparseGLU`` becomes its chain in the graph: Dispatch, GroupedGLU, GroupedLinear, Combine. Only the weights of selected
experts are read, which no combination of standard operators does in one graph for prefill and decode. The products of a
gathered FFN are plugins too (:mod:`gathered`), with experts or without.

A node carries ``plugin_namespace`` and ``plugin_version``: without them NVIDIA's parser takes the function body
although the plugin is registered (driven with TensorRT for RTX 1.7.1, with and without ENABLE_PLUGIN_OVERRIDE). ONNX
Runtime and ``onnx.reference`` ignore both attributes.

Shapes: T tokens, H hidden, I expert width, E experts, k active, R = T*k rows.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from moedge.export import functions
from moedge.export.device import plugins
from moedge.export.functions import DOMAIN
from moedge.export.graph.build import Builder, remove_unused, required, size, sizes
from moedge.export.graph.nodes import KEEPS, active_of, keeps_large, nodes_of
from moedge.runtime.device.moedge_plugins import PLUGINS, node_type

_NAMED = ("activation", "rule")
"""Attributes that a function body depends on."""
MOST_EXPERTS = 512
"""What the Route kernel takes (``kernels/route.py``, which needs Triton to be imported)."""


def refusal(model: ir.Model) -> str | None:
    """Return why the kernels cannot take a layer of the model, or None. Types are not known yet: half follows."""
    if keeps_large(model):
        return KEEPS
    for node in nodes_of(model, "SparseGLU"):
        count, width, _ = sizes(node.inputs[3])
        if count > MOST_EXPERTS:
            return f"a layer has {count} experts, the kernels take {MOST_EXPERTS}"
        if width == 1:
            return "a layer's experts are single neurons, which are faster as one dense product"
    return None


def rewrite(model: ir.Model) -> int:
    """Replace every SparseGLU of a typed graph in place and attach the bodies; return how many were replaced."""
    nodes = nodes_of(model, "SparseGLU")
    for node in nodes:
        _chain(model, node)
    remove_unused(model)
    model.functions.clear()
    attach(model)
    return len(nodes)


def attach(model: ir.Model) -> int:
    """Make plugins of the nodes of a typed graph that can be, with their bodies, in place; return how many are."""
    nodes = _nodes(model)
    used = set()
    for node in nodes:
        operator, given = node.op_type, [value for value in node.inputs if value is not None]
        node.op_type = node_type(operator, len(given))
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", "1")
        used.add((operator, node.op_type))
    # `trace` refuses a model that mixes rules, activations, or layers with and without compensation.
    facts = {name: found.as_string() for node in nodes for name, found in node.attributes.items() if name in _NAMED}
    bodies = functions.bodies(
        activation=facts.get("activation", "silu"),
        rule=facts.get("rule", "unit"),
        compensation=any(name == "CombineCompensated" for _, name in used),
    )
    for operator, name in sorted(used):
        bodies[operator].name = name
        function = ir.serde.deserialize_function(bodies[operator])
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = functions.VERSION
    return len(nodes)


def _nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that are plugins or become some; TensorRT's own MoE layer is none (``native.py``)."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type in PLUGINS]


def _chain(model: ir.Model, node: ir.Node) -> None:
    x, indices, weights, gate, up, down, *rest = node.inputs
    x = required(x)
    count, width, _ = sizes(gate)
    builder = Builder(model, before=node)
    int32, half = ir.TensorType(ir.DataType.INT32), x.type

    def make(
        op_type: str, inputs: list[ir.Value | None], outputs: list[tuple[Any, list[Any]]], **attributes: Any
    ) -> Any:
        made = builder.node(op_type, inputs, domain=DOMAIN, outputs=len(outputs), attributes=attributes)
        for value, (kind, shape) in zip(made if len(outputs) > 1 else (made,), outputs, strict=True):
            value.type, value.shape = kind, ir.Shape(shape)
        return made

    rows = f"rows_{active_of(node)}"  # R, a dimension of its own for each k
    hidden, tokens = size(x, 1), (x.shape or [None])[0]
    grouped, offsets, inverse = make(
        "Dispatch", [x, indices], [(half, [rows, hidden]), (int32, [count + 1]), (int32, [rows])], num_experts=count
    )
    activation = node.attributes["activation"].as_string()
    h = make("GroupedGLU", [grouped, offsets, gate, up], [(half, [rows, width])], activation=activation)
    out = size(down, 1)
    each = make("GroupedLinear", [h, offsets, down], [(half, [rows, out])])
    y = make(
        "Combine",
        [each, inverse, indices, weights, *rest],
        [(half, [tokens, out])],
    )
    builder.replace_output(node.outputs[0], y)


def requests(model: ir.Model) -> list[plugins.Request]:
    """Return the distinct kernels that TensorRT will ask for when it builds this graph, as the nodes' own rules say."""
    found: list[plugins.Request] = []
    for node in _nodes(model):
        plugin = PLUGINS[node.op_type]
        given = [value for value in node.inputs if value is not None]
        dims = [[dim if isinstance(dim, int) else None for dim in value.shape or ()] for value in given]
        types = [(value.dtype or ir.DataType.UNDEFINED).numpy().name for value in given]
        attributes = {name: node.attributes[name].value for name in plugin.attributes}
        request = plugins.Request(node.op_type, plugin.options(dims, types, attributes))
        if request not in found:
            found.append(request)
    return found
