"""Small helpers to edit an ``onnx_ir`` graph: insert nodes, swap outputs, evaluate a constant part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from moedge import MoEdgeError
from moedge._files import safe_join

LARGEST_INSIDE = 1 << 20
"""Bytes of a weight that a part of a graph holds inside: a protobuf message ends at 2 GiB, which one table can pass."""


def load(path: Path) -> ir.Model:
    """Load the graph of a bundle that was opened, its weights memory-mapped when they are read.

    They may have several names (a backup by ``cp -al``, a file system that joins equal files). onnx and onnx_ir refuse
    those, as one could lead to a file that is none of the graph's; of a bundle every byte has been compared with its
    hash.

    Raises:
        MoEdgeError: weights outside of the bundle's folder, or behind a symbolic link.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            place = safe_join(path.parent.absolute(), str(tensor.location))
            value.const_value = ir.ExternalTensor(  # without a folder: that is where the number of names is looked at
                place, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
            )
    return model


class Builder:
    """Insert nodes and initializers before one node of a graph."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model = model
        self.graph = model.graph
        self.before = before

    def graph_input(self, name: str) -> ir.Value:
        """Return the graph input called ``name``."""
        for value in self.graph.inputs:
            if value.name == name:
                return value
        raise MoEdgeError(f"The graph has no input {name!r}; it was not traced by moedge.")

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """Add ``array`` to the graph's weights under ``name`` and return its value."""
        array = np.asarray(array, order="C")  # not ascontiguousarray, which gives a scalar a dimension
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )  # fmt: skip
        self.graph.register_initializer(value)
        return value

    def lazy(self, name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], np.ndarray]) -> ir.Value:
        """Add a weight whose array is made when it is written, one at a time; return its value."""
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(make()), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        outputs: int = 1,
        attributes: dict[str, Any] | None = None,
    ) -> Any:
        """Insert a node; return its output, or a tuple when there are several."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.before, node)
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def replace_output(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` take the place of ``old`` everywhere, its name included.

        Because names survive a rewrite, a self-test can cut the same block out of the graph before and after it.
        """
        new.shape, new.type = new.shape or old.shape, new.type or old.type
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new
        old.replace_all_uses_with(new)


def constant_of(builder: Builder, value: Any, dtype: Any = np.int64) -> ir.Value:
    """Return an initializer that holds a small constant; equal constants share one."""
    array = np.asarray(value, dtype=dtype)
    name = f"const.{array.dtype.name}.{'x'.join(map(str, array.shape)) or 'scalar'}.{'_'.join(map(str, array.ravel()))}"
    existing = builder.graph.initializers.get(name)
    return existing if existing is not None else builder.initializer(name, array)


def required(value: ir.Value | None) -> ir.Value:
    """Return an input that the operator cannot be without.

    Raises:
        MoEdgeError: it is missing.
    """
    if value is None:
        raise MoEdgeError("A node of the graph lacks an input that its operator needs; export the checkpoint again.")
    return value


def size(value: ir.Value | ir.TensorProtocol | None, axis: int) -> int:
    """Return one dimension of a value, a number; see :func:`sizes` for errors."""
    value = required(value) if not isinstance(value, ir.TensorProtocol) else value
    dimension = value.shape[axis] if value.shape is not None else None
    if not isinstance(dimension, int):
        raise MoEdgeError(f"Dimension {axis} of {value.name} is not known ({dimension}); export the checkpoint again.")
    return dimension


def sizes(value: ir.Value | ir.TensorProtocol | None) -> tuple[int, ...]:
    """Return the shape of a value whose dimensions are all numbers.

    Raises:
        MoEdgeError: the value is missing, or a dimension is not known.
    """
    value = required(value) if not isinstance(value, ir.TensorProtocol) else value
    return tuple(size(value, axis) for axis in range(len(value.shape or ())))


def array_of(value: ir.Value | None) -> np.ndarray:
    """Return the numpy array of an initializer (memory-mapped when it is external data)."""
    if value is None or value.const_value is None:
        raise MoEdgeError(f"{value.name if value else 'a missing input'} is not a constant weight.")
    return value.const_value.numpy()


def same_shape_input(reshape: ir.Node) -> bool:
    """Whether a Reshape merges the last two of four dimensions: [B, S, N, D] -> [B, S, N*D]."""
    before, after = reshape.inputs[0], reshape.outputs[0]
    if before is None or before.shape is None or after.shape is None or len(before.shape) != 4 or len(after.shape) != 3:
        return False
    heads, head, merged = before.shape[2], before.shape[3], after.shape[2]
    return isinstance(heads, int) and isinstance(head, int) and heads * head == merged


def weights_dtype(model: ir.Model) -> str:
    """Return the type of a portable graph's weights, e.g. ``float32``."""
    dtype = next(value for value in model.graph.initializers.values() if value.dtype is not None).dtype
    assert dtype is not None
    return "float32" if dtype in (ir.DataType.FLOAT, ir.DataType.INT64) else str(dtype.name).lower()


def remove_unused(model: ir.Model) -> None:
    """Delete nodes, functions and initializers that no output depends on."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Return every named value of the main graph: inputs, initializers and node outputs."""
    values = {str(value.name): value for value in model.graph.inputs}
    values.update(model.graph.initializers)
    values.update({str(output.name): output for node in model.graph for output in node.outputs})
    return values


def upstream(outputs: Sequence[ir.Value], stop: Callable[[ir.Value], bool]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Walk back from ``outputs`` to values where ``stop`` holds or that nothing computes.

    Returns:
        The nodes on the way in topological order, and the values the walk ended at (initializers excluded).
    """
    nodes: list[ir.Node] = []
    ends: dict[str, ir.Value] = {}
    seen: set[int] = set()
    stack: list[tuple[ir.Value | None, ir.Node | None]] = [(value, None) for value in reversed(outputs)]
    while stack:
        value, finished = stack.pop()
        if finished is not None:
            nodes.append(finished)
            continue
        if value is None or (value.const_value is not None and value.producer() is None):
            continue
        node = value.producer()
        if node is None or (stop(value) and not any(value is output for output in outputs)):
            ends[str(value.name)] = value
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((None, node))
            stack.extend((source, None) for source in reversed(node.inputs))
    return nodes, list(ends.values())


def depends_only_on(output: ir.Value, source: str) -> bool:
    """Whether ``output`` is computed from the value called ``source`` and weights, and from nothing else."""
    return {str(value.name) for value in upstream([output], lambda value: value.name == source)[1]} == {source}


@dataclass(frozen=True)
class Part:
    """A part of a graph as a model of its own, its weights beside it.

    ``weights`` by the location that the initializers of ``model`` state; only those of at most
    :data:`LARGEST_INSIDE` bytes (and 4-bit ones, which no array holds as ONNX Runtime does) lie in ``model`` itself.
    """

    model: onnx.ModelProto
    weights: dict[str, np.ndarray]


def cut(model: ir.Model, outputs: Sequence[ir.Value], stop: Callable[[ir.Value], bool]) -> Part:
    """Return the part of the main graph between ``stop`` values and ``outputs``."""
    nodes, ends = upstream(outputs, stop)
    inside, beside = [], dict[str, np.ndarray]()
    for name, tensor in weights_of(nodes).items():
        if tensor.nbytes <= LARGEST_INSIDE or tensor.dtype.bitwidth < 8:
            inside.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
        else:
            beside[name] = np.ascontiguousarray(tensor.numpy())
            place = [onnx.StringStringEntryProto(key="location", value=name)]
            inside.append(
                onnx.TensorProto(
                    name=name, data_type=int(tensor.dtype), dims=beside[name].shape,
                    data_location=onnx.TensorProto.EXTERNAL, external_data=place,
                )
            )  # fmt: skip
    return Part(_model(model, nodes, ends, outputs, inside), beside)


def cut_whole(model: ir.Model, outputs: Sequence[ir.Value], stop: Callable[[ir.Value], bool]) -> onnx.ModelProto:
    """Return the same part as one message, every weight inside: for small ones."""
    nodes, ends = upstream(outputs, stop)
    inside = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights_of(nodes).items()]
    return _model(model, nodes, ends, outputs, inside)


def weights_of(nodes: Sequence[ir.Node]) -> dict[str, ir.TensorProtocol]:
    """Return the initializers that nodes read, by name."""
    return {
        str(source.name): source.const_value
        for node in nodes
        for source in node.inputs
        if source is not None and source.const_value is not None and source.producer() is None
    }


def _model(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    ends: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    weights: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "part",
        [
            onnx.helper.make_tensor_value_info(str(v.name), v.dtype or ir.DataType.FLOAT, [None] * len(v.shape or ()))
            for v in ends
        ],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in outputs],
        initializer=weights,
    )
    return onnx.helper.make_model(
        graph,
        functions=[ir.serde.serialize_function(function) for function in model.functions.values()],
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()],
        ir_version=model.ir_version,
    )


def evaluate(model: ir.Model, value: ir.Value, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Compute one value of the main graph from ``feeds``, running only the nodes that it depends on.

    Raises:
        MoEdgeError: the value depends on a graph input that ``feeds`` does not hold.
    """
    from onnx.reference import ReferenceEvaluator

    proto = cut_whole(model, [value], lambda _: False)
    needed = {entry.name for entry in proto.graph.input}
    if missing := needed - set(feeds):
        raise MoEdgeError(f"{value.name} depends on {', '.join(sorted(missing))}, not only on {list(feeds)}.")
    outputs = ReferenceEvaluator(proto).run(None, {name: feeds[name] for name in needed})
    assert isinstance(outputs, list)
    return np.asarray(outputs[0])
