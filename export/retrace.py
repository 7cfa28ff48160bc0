"""Spare ``torch.onnx.export`` its second trace where that would change nothing.

The exporter traces a model and then traces the result again (``ExportedProgram.run_decompositions``), to take operators
apart that have no ONNX function: half of its time. A decoder has few of them, all of one kind: they give their input
another type or shape, or nothing new. Here these are rewritten in place. What remains is looked at; if one operator is
left that the exporter would take apart, that is made of others or that changes its input, the second trace is made.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default}
_REWRITTEN = {*_CASTS, aten.reshape.default, aten.dropout.default}
_WHOLE = {aten.linear.default, aten.sym_size.int}
"""Made of others in torch, and with an ONNX function of their own."""
Table = Mapping[Any, Callable[..., Any]]


@contextmanager
def spared() -> Iterator[None]:
    """Make second traces only where they are needed while the block runs."""
    again = ExportedProgram.run_decompositions

    def once(program: ExportedProgram, table: Table | None = None, **options: Any) -> ExportedProgram:
        if table is not None and not options and needs_none(program, table):
            return program
        return again(program, table, **options)

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
        if node.target in _REWRITTEN and node not in returned:
            _rewrite(node)
    program.graph_module.recompile()
    return all(_stays(node, table) for node in graph.nodes)


def _stays(node: Node, table: Table) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False  # a constant or a subgraph
    if not isinstance(node.target, torch._ops.OpOverload):
        return isinstance(node.target, types.BuiltinFunctionType)  # arithmetic with sizes
    composite = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    kept = node.target in _WHOLE or not composite
    return kept and node.target not in table and not node.target._schema.is_mutable


def _rewrite(node: Node) -> None:
    """Put what the second trace would find in place of a node that gives its input another type or shape, or none."""
    given = node.args[0]
    if not isinstance(given, Node) or node.kwargs.get("memory_format"):
        return
    before, after = given.meta["val"], node.meta["val"]
    if node.target == aten.reshape.default and before.is_contiguous():
        node.target = aten.view.default
    elif node.target == aten.dropout.default and node.args[2:] == (False,):
        _drop(node, given)
    elif node.target in _CASTS and (before.device, before.layout) == (after.device, after.layout):
        if before.dtype == after.dtype:
            _drop(node, given)
        else:
            node.target, node.args, node.kwargs = aten._to_copy.default, (given,), {"dtype": after.dtype}


def _drop(node: Node, given: Node) -> None:
    node.replace_all_uses_with(given)
    node.graph.erase_node(node)
