"""Give a float32 graph explicit half-precision types: what a strongly typed TensorRT network takes literally.

TensorRT 11 and TensorRT for RTX choose no precision themselves; a graph says where it is float16 or bfloat16 and where
not. Float32 stays where half precision is known to hurt:

* the router, from the FFN's input to the indices: rounding flips ranks of experts (docs/methods.md 1.4);
* the sums of a norm: squares of activations overflow float16 above 255;
* the rotary table: positions above 2048 are not integers in float16;
* the softmax of attention, inside the body of CausalAttention;
* in a bfloat16 graph, what follows the output projection (scale, soft cap) and the logits themselves: numpy, which
  reads them on a device, has no bfloat16.

Everything else, weights and cache included, becomes half. A cast is placed once a value, where it is first needed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.functions import DOMAIN
from moedge.export.graph.build import sizes

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding to a half type (11 and 8 bits of significand, to nearest)."""
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895313892515355e38}
_OF_ANOTHER_RANGE = "take --half bfloat16 (targets tensorrt, tensorrt-rtx), or "
# Inputs of moedge nodes that stay float32: the body casts where it must.
_FLOAT_INPUTS = {"Route": {0, 1, 2}, "SparseGLU": {2, 7}, "KeepLarge": {1}, "GatheredGLU": {3}}
_REDUCTIONS = {"Pow", "ReduceMean", "ReduceSum", "Sqrt", "Reciprocal", "Cos", "Sin", "Exp", "Log", "Softmax"}
_NORM_PARTS = {"ReduceMean", "Sqrt", "Reciprocal"}
_SAME_TYPE = {
    "Reshape",
    "Transpose",
    "Slice",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Expand",
    "Gather",
    "Identity",
    "Split",
}
_SCALES = ("Mul", "Div", "Tanh")
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Clip", "Max", "Min", "Tanh"}


def convert(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16) -> int:
    """Type ``model`` in place; return how many nodes compute in ``dtype``.

    Cache inputs and outputs become ``dtype`` too, and so do the logits in float16.

    Args:
        model: float32 graph with ``moedge`` nodes.
        dtype: FLOAT16 or BFLOAT16.

    Raises:
        MoEdgeError: a weight does not fit ``dtype``'s range.
    """
    wide = _router_nodes(model) | (_after_projection(model) if dtype == ir.DataType.BFLOAT16 else set())
    casts: dict[tuple[int, ir.DataType], ir.Value] = {}
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(dtype)
    count = 0
    for node in list(model.graph):
        wanted = _compute_type(node, dtype)
        if wanted is None:
            continue
        if node in wide:
            wanted = ir.DataType.FLOAT
        count += wanted == dtype
        _type_inputs(model, node, wanted, dtype, casts)
        _type_outputs(node, wanted)
    for index, result in enumerate(model.graph.outputs):
        if result.name == "logits" and dtype == ir.DataType.BFLOAT16:
            _widen_output(model, index, dtype)
        elif result.dtype == ir.DataType.FLOAT:
            raise MoEdgeError(f"Graph output {result.name} stayed float32; this graph has a node that half.py misses.")
    unused = [name for name, value in model.graph.initializers.items() if not value.uses()]
    for name in unused:
        del model.graph.initializers[name]
    return count


def _type_inputs(
    model: ir.Model,
    node: ir.Node,
    wanted: ir.DataType,
    dtype: ir.DataType,
    casts: dict[tuple[int, ir.DataType], ir.Value],
) -> None:
    """Let a node read what it computes in, ``wanted``; of our own operators some inputs stay float32."""
    kept = _FLOAT_INPUTS.get(node.op_type, set()) if node.domain == DOMAIN else set()
    for index, source in enumerate(node.inputs):
        if source is not None and source.dtype in (ir.DataType.FLOAT, dtype):
            target = ir.DataType.FLOAT if index in kept else wanted
            node.replace_input_with(index, _as(model, node, source, target, casts))


def _type_outputs(node: ir.Node, dtype: ir.DataType) -> None:
    if node.op_type == "Route" and node.domain == DOMAIN:
        return
    for index, output in enumerate(node.outputs):
        if output.dtype in (ir.DataType.FLOAT, None):
            # A fused norm's mean and inverse deviation are float32 whatever it normalises.
            statistic = node.op_type.endswith("SimplifiedLayerNormalization") and index in (1, 2)
            output.type = ir.TensorType(ir.DataType.FLOAT if statistic else dtype)


def _router_nodes(model: ir.Model) -> set[ir.Node]:
    """Nodes whose every use leads to a Route, or to the logits of a fused MoE, and nowhere else."""
    outputs = {id(value) for value in model.graph.outputs}
    routers: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        # Less: the mask of unselected experts (lowering/ort/moe.py) is read off the logits.
        if (node.op_type == "Route" and node.domain == DOMAIN) or node.op_type == "Less":
            routers.add(node)
            continue
        uses = [use for value in node.outputs for use in value.uses()]
        inside = all(use.node in routers or (use.node.op_type == "MoE" and use.idx == 1) for use in uses)
        if uses and inside and not any(id(v) in outputs for v in node.outputs):
            routers.add(node)
    return routers


def _after_projection(model: ir.Model) -> set[ir.Node]:
    """Nodes between the product that makes the logits and the output ``logits``: scale and soft cap."""
    found: set[ir.Node] = set()
    node = next((value.producer() for value in model.graph.outputs if value.name == "logits"), None)
    while node is not None and node.op_type in _SCALES:
        found.add(node)
        computed = [value for value in node.inputs if value is not None and value.const_value is None]
        node = computed[0].producer() if computed else None
    return found


def _widen_output(model: ir.Model, index: int, dtype: ir.DataType) -> None:
    """Let a graph output of ``dtype`` leave the graph as float32, under its own name."""
    value = model.graph.outputs[index]
    if value.dtype != dtype:
        return
    cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
    output = cast.outputs[0]
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    value.name, output.name = f"{value.name}.{dtype.name.lower()}", value.name
    model.graph.append(cast)
    model.graph.outputs[index] = output


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _compute_type(node: ir.Node, dtype: ir.DataType) -> ir.DataType | None:
    """Return the type that a node computes in.

    None for one without float inputs, a Cast, which says it itself, and a Shape or Size, which read no values.
    """
    floats = [value for value in node.inputs if value is not None and _is_float(value)]
    if node.op_type in ("Cast", "Shape", "Size") or not floats:
        return None
    if node.domain == DOMAIN:
        return ir.DataType.FLOAT if node.op_type == "Route" else dtype
    if node.op_type in _REDUCTIONS:
        return ir.DataType.FLOAT
    computed = [value for value in floats if value.const_value is None]
    if node.op_type in _SAME_TYPE | _ELEMENTWISE and computed:
        if all(value.dtype == ir.DataType.FLOAT for value in computed):
            return ir.DataType.FLOAT
        producers = [value.producer() for value in computed]
        if node.op_type in _ELEMENTWISE and any(p is not None and p.op_type in _NORM_PARTS for p in producers):
            return ir.DataType.FLOAT
    return dtype


def _as(
    model: ir.Model,
    node: ir.Node,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[int, ir.DataType], ir.Value],
) -> ir.Value:
    """Return ``value`` in ``dtype``: itself, a converted weight, or a Cast."""
    if value.dtype == dtype:
        return value
    key = (id(value), dtype)
    if key not in casts:
        if value.const_value is not None and value.producer() is None:
            casts[key] = _weight(model, value, dtype)
        else:
            cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
            cast.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
            model.graph.insert_before(node, cast)
            casts[key] = cast.outputs[0]
    return casts[key]


def _weight(model: ir.Model, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return a half-precision twin of an initializer; the array is converted when it is written, one at a time."""
    source = value.const_value
    assert source is not None
    name = f"{value.name}.{dtype.name.lower()}"

    def make() -> ir.TensorProtocol:
        array = source.numpy()
        if array.size and not float(np.abs(array).max()) <= _LARGEST[dtype]:
            raise MoEdgeError(
                f"Weight {value.name} does not fit {dtype.name.lower()} (largest {np.abs(array).max():.3g}); "
                f"{_OF_ANOTHER_RANGE if dtype == ir.DataType.FLOAT16 else ''}export ort-cpu or portable, which keep "
                "float32."
            )
        return ir.tensor(array.astype(dtype.numpy()), name=name)

    tensor = ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(sizes(source)), name=name)
    twin = ir.Value(name=name, shape=ir.Shape(sizes(source)), type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(twin)
    return twin
