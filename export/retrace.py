"""Spare ``torch.onnx.export`` its second trace where that would change nothing.

The exporter traces a model and then traces the result again (``ExportedProgram.run_decompositions``), to take operators
apart that have no ONNX function: half of its time. A decoder has few of them, all of one kind: they give their input
another type or shape. Here these are rewritten in place. What remains is looked at; if one operator is left that the
exporter would take apart or that changes its input, the second trace is made as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]


@contextmanager
def spared() -> Iterator[None]:
    """Make second traces only where they are needed while the block runs."""
    again = ExportedProgram.run_decompositions

    def once(program: ExportedProgram, table: Table | None = None, **options: Any) -> ExportedProgram:
        if table is not None and not options and needs_none(program, table):
            return program
        return again(program, table, **options)  # type: ignore[arg-type]

    ExportedProgram.run_decompositions = once  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = again  # type: ignore[method-assign]


def needs_none(program: ExportedProgram, table: Table) -> bool:
    """Whether nothing is left to take apart, after what only changes types and shapes was rewritten in place.

    Args:
        program: a traced model; it computes the same before and after.
        table: operators that would be taken apart, as the exporter gives them to ``run_decompositions``.
    """
    graph = program.graph_module.graph
    returned = set(graph.output_node().all_input_nodes)  # the signature names them
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in returned:
            _rewrite(node)
    program.graph_module.recompile()
    return all(_stays(node, table) for node in graph.nodes)


def _stays(node: Node, table: Table) -> bool:
    if node.op == "get_attr":
        return False  # a constant or a subgraph
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator)
    return node.target not in table and not node.target._schema.is_mutable


def _rewrite(node: Node) -> None:
    if node.target == aten.reshape.default:
        node.target = aten.view.default  # one node of ONNX, whatever the strides
    elif node.target in (aten.to.dtype, aten.to.device):
        _rewrite_cast(node)


def _rewrite_cast(node: Node) -> None:
    (given, *_), asked = node.args, {name: node.kwargs[name] for name in ("memory_format",) if node.kwargs.get(name)}
    if not isinstance(given, Node) or asked or node.meta["val"].device != given.meta["val"].device:
        return
    dtype = node.meta["val"].dtype
    if dtype == given.meta["val"].dtype:
        node.replace_all_uses_with(given)
        node.graph.erase_node(node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (given,), {"dtype": dtype}
