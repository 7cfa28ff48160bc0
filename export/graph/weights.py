"""Every weight matrix of a portable graph, with its tensor class: what a quantised lowering must find and replace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moedge.export.functions import DOMAIN
from moedge.export.graph.build import array_of, sizes
from moedge.export.graph.taps import ELEMENTWISE
from moedge.export.quantize.format import Quantized

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0}
"""Attributes of products, as they are where they do nothing."""
_ATTENTION = ("CausalAttention", "GroupQueryAttention")


@dataclass(frozen=True)
class Weight:
    """One initializer that is multiplied or gathered from.

    ``tensor_class``: see ``export.quantize``. ``layout``: ``KN`` (MatMul), ``NK`` (PyTorch's, also embeddings) or
    ``ENK`` (experts).
    """

    name: str
    tensor_class: str
    layout: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Output rows, over all experts."""
        return self.shape[1] if self.layout == "KN" else int(np.prod(self.shape[:-1]))

    @property
    def columns(self) -> int:
        """K, the inputs of a row."""
        return self.shape[0] if self.layout == "KN" else self.shape[-1]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def as_rows(self, array: np.ndarray) -> np.ndarray:
        """Return [.., N, K] from the array in its own layout; the same call turns rows back into the layout."""
        return array.T if self.layout == "KN" else array


def is_matrix(value: ir.Value | None) -> bool:
    """Whether a value is a constant float matrix."""
    if value is None or value.const_value is None or value.producer() is not None:
        return False
    return len(value.const_value.shape) == 2 and value.const_value.dtype == ir.DataType.FLOAT


def is_embedding(node: ir.Node) -> bool:
    """Whether a node looks tokens up in a constant table."""
    if node.op_type != "Gather" or not is_matrix(node.inputs[0]):
        return False
    return node.inputs[1] is not None and node.inputs[1].name == "input_ids"


def is_plain(node: ir.Node) -> bool:
    """Whether a product multiplies what it reads as it is, ``transB`` aside: without factors and other transposes."""
    return all(name == "transB" or found.value == _PLAIN.get(name) for name, found in node.attributes.items())


def product_weight(node: ir.Node) -> tuple[ir.Value, str] | None:
    """The constant matrix that a product multiplies by, and its layout, or None."""
    if node.op_type not in _PRODUCTS or len(node.inputs) < 2 or not is_plain(node):
        return None
    value = node.inputs[1]
    transpose = value.producer() if value is not None else None
    if transpose is not None and transpose.op_type == "Transpose" and is_matrix(transpose.inputs[0]):
        assert transpose.inputs[0] is not None
        return transpose.inputs[0], "NK"
    if not is_matrix(value):
        return None
    assert value is not None
    transposed = any(name in node.attributes and node.attributes[name].as_int() for name in ("transB",))
    return value, "NK" if transposed else "KN"


def collect(model: ir.Model) -> dict[str, Weight]:
    """Return every weight matrix of the main graph by initializer name, in graph order.

    A tied output projection counts as ``embedding``.
    """
    found: dict[str, Weight] = {}

    def add(value: ir.Value, tensor_class: str, layout: str) -> None:
        found.setdefault(str(value.name), Weight(str(value.name), tensor_class, layout, sizes(value.const_value)))

    for node in model.graph:
        if is_embedding(node):
            assert node.inputs[0] is not None
            add(node.inputs[0], "embedding", "NK")
        elif node.domain == DOMAIN and node.op_type == "SparseGLU":
            for value in node.inputs[3:6]:
                assert value is not None
                add(value, "experts", "ENK")
        elif product := product_weight(node):
            add(product[0], _class_of(node, str(product[0].name)), product[1])
    return found


def _class_of(node: ir.Node, name: str) -> str:
    """The tensor class of a product, by where it stands: names of attention weights do not survive tracing."""
    if ".router." in name:
        return "router"
    if ".shared_" in name:
        return "shared"
    if _makes_logits(node):
        return "head"
    after = {found.op_type for found in _until_products(node, forward=True)}
    if "Route" in after:
        return "router"
    if after & set(_ATTENTION):
        return "attention"
    if any(found.op_type in _ATTENTION for found in _until_products(node, forward=False)):
        return "attention"
    return "ffn"


def _makes_logits(node: ir.Node) -> bool:
    """Whether a product is the output projection: what follows it, up to the logits, is elementwise."""
    stack = [node]
    while stack:
        here = stack.pop()
        if any(output.name == "logits" for output in here.outputs):
            return True
        users = [use.node for output in here.outputs for use in output.uses()]
        stack += [user for user in users if user.op_type in ELEMENTWISE]
    return False


def _until_products(node: ir.Node, *, forward: bool) -> Iterator[ir.Node]:
    """Nodes that are reached from one product without passing another product."""

    def step(here: ir.Node) -> list[ir.Node]:
        if forward:
            return [use.node for output in here.outputs for use in output.uses()]
        producers = [value.producer() for value in here.inputs if value is not None]
        return [producer for producer in producers if producer is not None]

    stack, seen = step(node), set()
    while stack:
        here = stack.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        if not (here.op_type in _ATTENTION or product_weight(here) or here.op_type == "SparseGLU"):
            stack.extend(step(here))


def array(value: ir.Value | None, weight: Weight) -> np.ndarray:
    """The weight as rows [N, K] or [E, N, K]."""
    return weight.as_rows(array_of(value))


def set_dequantized(model: ir.Model, packed: Mapping[str, Quantized], table: Mapping[str, Weight]) -> None:
    """Give the weights of ``packed`` their de-quantised values, in place; they are made when they are read."""
    for name, value in packed.items():
        initializer = model.graph.initializers[name]
        assert initializer.const_value is not None

        def made(value: Quantized = value, weight: Weight = table[name]) -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(weight.as_rows(value.dequantized())), name=weight.name)

        initializer.const_value = ir.LazyTensor(
            made, dtype=ir.DataType.FLOAT, shape=ir.Shape(sizes(initializer.const_value)), name=name
        )
