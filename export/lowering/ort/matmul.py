"""Matrix products: siblings into one, and tied weights read in place.

``FuseTransposed``  MatMul(x, Transpose(W)) -> com.microsoft.FusedMatMul(x, W, transB=1). A tied output projection
reaches the graph as the transpose of the embedding. ONNX Runtime would fold the transpose at load and hold the largest
matrix of a small model twice.

``MergeSiblings``  MatMul(x, A), MatMul(x, B), ... -> Split(MatMul(x, [A | B | ...])): query, key and value; gate and
up; a router beside them. One product a group instead of two to four. Measured on SmolLM2, 2 threads, five interleaved
runs: 0 to 9 % less time per decoded token, dense and MoE alike, for 2 % more at a prompt of 512 (the Split copies).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.graph.build import Builder, array_of, remove_unused
from moedge.export.graph.weights import is_plain
from moedge.export.lowering.rule import Applied, Block


@dataclass(frozen=True)
class FuseTransposed:
    """Rule for every MatMul whose second input is a transposed weight."""

    name: str = "tied output projection -> FusedMatMul"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Fuse each; the first and the last product are tested, without what follows them (a soft cap)."""
        names = _fuse_transposed(graph)
        ends = dict.fromkeys((*names[:1], *names[-1:]))
        return Applied(len(names), [Block((name,)) for name in ends], reason="" if names else "no transposed weight")


@dataclass(frozen=True)
class MergeSiblings:
    """Rule for products of one value with several constant matrices; it counts groups."""

    name: str = "sibling MatMuls -> one MatMul + Split"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Merge each group; of those of the same operators the first and the last are tested."""
        groups = merge_siblings(graph)
        kinds: dict[frozenset[str], list[tuple[str, ...]]] = {}
        for group in groups:
            kinds.setdefault(frozenset(group.values()), []).append(tuple(group))
        ends = dict.fromkeys(names for found in kinds.values() for names in (found[0], found[-1]))
        blocks = [Block(names, may_be_new=True) for names in ends]
        return Applied(len(groups), blocks, reason="" if groups else _NO_SIBLINGS)


_NO_SIBLINGS = "no value is multiplied by several matrices"


def _fuse_transposed(model: ir.Model) -> list[str]:
    """Fuse each; return the names of what the products give."""
    names = []
    for node in list(model.graph):
        transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is None or weight.const_value is None or list(transpose.attributes["perm"].as_ints()) != [1, 0]:
            continue
        builder = Builder(model, before=node)
        product = builder.node(
            "FusedMatMul", [node.inputs[0], weight], domain="com.microsoft", attributes={"transA": 0, "transB": 1}
        )
        builder.replace_output(node.outputs[0], product)
        names.append(str(product.name))
    remove_unused(model)
    return names


def merge_siblings(model: ir.Model) -> list[dict[str, str]]:
    """Merge products of one value with several constant matrices; return each group's outputs with their operators."""
    groups: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        weight = node.inputs[1] if len(node.inputs) == 2 else None
        if node.op_type in ("MatMul", "Gemm") and node.domain == "" and _is_matrix(weight) and is_plain(node):
            groups.setdefault(id(node.inputs[0]), []).append(node)
    merged = [group for group in groups.values() if len(group) > 1]
    made = [{str(node.outputs[0].name): node.op_type for node in group} for group in merged]
    for number, group in enumerate(merged):
        _merge(model, group, f"merged.{number}")
    remove_unused(model)
    return made


def _is_matrix(weight: ir.Value | None) -> bool:
    if weight is None or weight.const_value is None or weight.producer() is not None:
        return False
    return len(weight.const_value.shape) == 2


def _columns(node: ir.Node) -> np.ndarray:
    """Return a product's matrix as [K, N]; Gemm keeps it as [N, K] (``transB``) in what PyTorch exports."""
    matrix = array_of(node.inputs[1])
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    return matrix.T if transposed else matrix


def _merge(model: ir.Model, group: list[ir.Node], name: str) -> None:
    parts = [_columns(node) for node in group]
    builder = Builder(model, before=group[0])
    # Lazy: the merged matrix exists when it is written to disk, one group at a time, not for the whole model at once.
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    dtype = ir.DataType.from_numpy(parts[0].dtype)
    weight = builder.lazy(name, shape, dtype, lambda: np.concatenate(parts, axis=1))
    sizes = builder.initializer(f"{name}.sizes", np.array([part.shape[1] for part in parts], np.int64))
    product = builder.node("MatMul", [group[0].inputs[0], weight])
    pieces = builder.node("Split", [product, sizes], outputs=len(group), attributes={"axis": -1})
    for node, piece in zip(group, pieces, strict=True):
        builder.replace_output(node.outputs[0], piece)
