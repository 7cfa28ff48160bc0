"""Half-precision graphs on a CPU, with every rounding that their types ask for.

ONNX Runtime's CPU provider computes a float16 graph in float32 and leaves out the roundings in between: 300 * 300 *
0.01 is 900 there, and infinity in float16. Of bfloat16 it has hardly an operator. So a copy of the graph is rewritten:
it computes in float32, and each value that the graph stores in half precision goes through a pair of Casts, to that
type and back. The two Casts stay in the session (``tests/runtime/test_emulation.py`` executes them) and round to
nearest even, so such a value is one of the half type, infinities included. What an operator does inside, it does in
float32: a product accumulates there, as a GPU's does.

Weights stay in their file as they are; a Cast, which ONNX Runtime folds when it loads, makes each float32. Inputs and
outputs of half precision become float32 that holds half-precision numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError

if TYPE_CHECKING:
    import onnx

HALVES = {"float16": 10, "bfloat16": 16}
"""Half-precision types and their numbers in ONNX (``TensorProto.DataType``)."""
_HALVES = tuple(HALVES.values())
_FLOAT = 1
_MOVES = {
    *("Reshape", "Transpose", "Slice", "Concat", "Unsqueeze", "Squeeze", "Expand", "Gather", "GatherElements"),
    *("Identity", "Split", "Tile", "Where", "Neg", "Max", "Min"),
}
"""Operators whose outputs are numbers of their inputs (or their negatives): nothing to round."""
_TYPES = ("to", "dtype", "output_dtype", "stash_type")
"""Attributes that name a type."""


def needed(model: onnx.ModelProto) -> bool:
    """Whether a model is of standard operators (and functions of them) and states a half-precision type."""
    nodes = [node for function in model.functions for node in function.node] + list(model.graph.node)
    local = {function.domain for function in model.functions}
    if any(node.domain not in ("", "ai.onnx", *local) for node in nodes):
        return False
    typed = [value.type.tensor_type.elem_type for value in model.graph.input]
    typed += [tensor.data_type for tensor in model.graph.initializer]
    typed += [item.i for node in nodes for item in node.attribute if item.name in _TYPES]
    return any(kind in _HALVES for kind in typed)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with float32 arithmetic and every rounding; functions become part of the graph.

    Values keep their names, so that any of them can be an output. ``model`` is used up.

    Raises:
        MoEdgeError: a value whose type cannot be inferred, or a node with a graph inside.
    """
    import onnx.inliner
    from onnx import helper

    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    del model.graph.value_info[:]
    kinds = {tensor.name: tensor.data_type for tensor in weights}
    # Types only: inlining and inference copy the model, and need no weight for that.
    given = {value.name for value in model.graph.input}
    stated = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items() if name not in given]
    count = len(model.graph.input)
    model.graph.input.extend(stated)
    if model.functions:
        # Bodies state opset 18, and the operators in them mean the same in a graph of opset 23; the inliner leaves a
        # function of another opset where it is.
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        for function in model.functions:
            for entry in function.opset_import:
                if entry.domain in ("", "ai.onnx"):
                    entry.version = opset
        model = onnx.inliner.inline_local_functions(model)
    kinds |= _types(model)
    del model.graph.input[count:]
    halves = {name for name, kind in kinds.items() if kind in _HALVES}
    nodes: list[onnx.NodeProto] = []
    for tensor in weights:
        if tensor.name in halves:
            name, tensor.name = tensor.name, f"{tensor.name}.stored"
            nodes.append(helper.make_node("Cast", [tensor.name], [name], to=_FLOAT))
    for node in model.graph.node:
        nodes += [_in_float32(node), *_roundings(node, {name: kinds[name] for name in node.output if name in halves})]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(weights)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = _FLOAT
    return model


def _roundings(node: onnx.NodeProto, halves: dict[str, int]) -> list[onnx.NodeProto]:
    """Casts to the half type and back behind the outputs ``halves`` of a node that computes; they keep the names."""
    from onnx import helper

    if node.op_type in _MOVES and not node.domain:
        return []
    casts = []
    for index, name in enumerate(node.output):
        if name in halves:
            node.output[index] = f"{name}.exact"
            casts.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=halves[name]))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=_FLOAT))
    return casts


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value.

    Raises:
        MoEdgeError: one has none.
    """
    import onnx.shape_inference

    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise MoEdgeError(f"The types of this graph cannot be inferred: {' '.join(str(error).split())}") from error
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in model.graph.node:
        if unknown := [name for name in node.output if name and not kinds.get(name)]:
            raise MoEdgeError(f"The type of {unknown[0]} ({node.op_type}) is not known, so it cannot be rounded.")
    return kinds


def _in_float32(node: onnx.NodeProto) -> onnx.NodeProto:
    """State float32 wherever an attribute states half precision; in place.

    Raises:
        MoEdgeError: the node has a graph inside.
    """
    import onnx
    from onnx import numpy_helper

    for item in node.attribute:
        if item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise MoEdgeError(f"{node.op_type} has a graph inside, whose values are not rounded.")
        if item.name in _TYPES and item.i in _HALVES:
            item.i = _FLOAT
        if item.type == onnx.AttributeProto.TENSOR and item.t.data_type in _HALVES:
            array: Any = numpy_helper.to_array(item.t)
            item.t.CopyFrom(numpy_helper.from_array(array.astype("float32"), item.t.name))
    return node
