"""What a self-test opens and what it executes: weights beside the message, and never a block that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moedge import MoEdgeError
from moedge.export.graph import build, weights
from moedge.export.graph.build import Builder, constant_of, values_by_name
from moedge.export.lowering import openvino
from moedge.export.lowering.check import mistakes, selftest
from moedge.export.lowering.check.session import open_part
from moedge.export.lowering.ort import cpu, cuda, matmul, quantized
from moedge.export.lowering.rule import Applied, Block, Work
from moedge.export.lowering.trt import engine, rtx
from moedge.export.lowering.trt import quantized as trt_quantized

LOWERINGS: dict[str, Callable[[ir.Model], Any]] = {
    "ort-cpu": lambda graph: cpu.lower(graph, max_length=64),
    "ort-cuda": lambda graph: cuda.lower(graph, max_length=64),
    "ort-cpu-int4": lambda graph: quantized.lower(graph, max_length=64, bits=4),
    "openvino": lambda graph: openvino.lower(graph, max_length=64),
    "tensorrt": lambda graph: engine.lower(graph, max_length=64, tensorrt="10.3", dtype="bfloat16"),
    "tensorrt-rtx": lambda graph: rtx.lower(graph, max_length=64),
    "tensorrt-rtx-int8": lambda graph: trt_quantized.lower(graph, max_length=64, bits=8),
}


def portable(bundles: dict[str, Path], kind: str = "moe") -> ir.Model:
    return ir.load(bundles[f"{kind}/portable"] / "model.onnx")


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """Every message that ONNX Runtime is given while a weight of more than 256 bytes counts as large."""
    seen: list[onnx.ModelProto] = []
    opened = onnxruntime.InferenceSession

    def session(model: bytes, *rest: Any, **options: Any) -> Any:
        seen.append(onnx.ModelProto.FromString(model))
        return opened(model, *rest, **options)

    monkeypatch.setattr(build, "LARGEST_INSIDE", 256)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return seen


def large(messages: list[onnx.ModelProto]) -> list[str]:
    """Weights that lie in a message and should not; there are others, which lie beside it."""
    tensors = [tensor for model in messages for tensor in model.graph.initializer]
    assert any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors)
    return [tensor.name for tensor in tensors if tensor.ByteSize() > 256 + 200]  # a name and dimensions


@pytest.mark.parametrize("target", LOWERINGS)
def test_no_message_of_a_self_test_holds_a_large_weight(
    bundles: dict[str, Path], messages: list[onnx.ModelProto], target: str
) -> None:
    lowered = LOWERINGS[target](portable(bundles))
    tests = [rewrite.self_test for rewrite in lowered.rewrites if rewrite.self_test]
    assert tests
    assert all(test["passed"] for test in tests)
    assert large(messages) == []


def test_nor_does_that_of_an_explanation(bundles: dict[str, Path], messages: list[onnx.ModelProto]) -> None:
    graph = portable(bundles)
    node = next(node for node in graph.graph if node.op_type == "SparseGLU")
    ffn = mistakes.FFN.find(graph, str(node.outputs[0].name))
    x = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    assert "the block returns zeros" in mistakes.explain(graph, ffn, x, np.zeros_like(x))
    assert large(messages) == []


KINDS = ("float32", "float16", "bfloat16", "int4", "uint8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [1, 1 << 20], ids=["beside", "inside"])
def test_weights_mean_the_same_inside_and_beside(monkeypatch: pytest.MonkeyPatch, kind: str, largest: int) -> None:
    monkeypatch.setattr(build, "LARGEST_INSIDE", largest)
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    array = np.random.default_rng(0).integers(0, 8, (6, 4)).astype(dtype).T  # read-only and in another order, as views
    array.flags.writeable = False
    weight = ir.Value(name="w", const_value=ir.tensor(array, name="w"))
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [weight], attributes={"to": 1})
    product = ir.node("MatMul", [x, cast.outputs[0]])
    product.outputs[0].name, cast.outputs[0].name = "y", "c"
    graph = ir.Graph([x], [product.outputs[0]], nodes=[cast, product], initializers=[weight], opset_imports={"": 21})
    part = build.cut(ir.Model(graph, ir_version=10), list(graph.outputs), lambda _: False)
    assert set(part.weights) == ({"w"} if largest == 1 and kind != "int4" else set())
    given = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    (got,) = open_part(part).run({"x": given})
    np.testing.assert_allclose(got, given @ array.astype(np.float32), rtol=1e-5, atol=1e-5)


# ---- what is executed


class Renamed:
    """A rule that rewrites one product and says that it is tested by another value."""

    name = "a rule"

    def __init__(self, tested: str) -> None:
        self.tested = tested

    def refuse(self, graph: ir.Model) -> str | None:
        return None

    def apply(self, graph: ir.Model) -> Applied:
        node = next(node for node in graph.graph if node.op_type == "MatMul")
        builder = Builder(graph, before=node)
        builder.replace_output(node.outputs[0], builder.node("Identity", [builder.node("MatMul", node.inputs)]))
        build.remove_unused(graph)
        return Applied(1, [Block((self.tested,))])


def test_a_block_without_anything_that_was_rewritten_is_no_test(bundles: dict[str, Path]) -> None:
    graph = portable(bundles, "dense")
    products = [str(node.outputs[0].name) for node in graph.graph if node.op_type == "MatMul"]
    with pytest.raises(MoEdgeError, match=f"a rule could not run: nothing that gives {products[-1]} was rewritten"):
        Work(graph.clone(), 1e-6, "").run(Renamed(products[-1]))
    assert Work(graph, 1e-6, "").run(Renamed(products[0]))


def capped(graph: ir.Model) -> ir.Value:
    """Cap the logits of a graph as Gemma 2 does; return what the output projection gives."""
    (old,) = (value for value in graph.graph.outputs if value.name == "logits")
    head = old.producer()
    assert head is not None
    cap = constant_of(Builder(graph, before=head), 3.0, np.float32)
    scaled = ir.node("Div", [old, cap])
    bounded = ir.node("Tanh", scaled.outputs)
    logits = ir.node("Mul", [bounded.outputs[0], cap])
    graph.graph.extend([scaled, bounded, logits])
    old.name, logits.outputs[0].name = "projected", "logits"
    logits.outputs[0].shape, logits.outputs[0].type = old.shape, old.type
    graph.graph.outputs[list(graph.graph.outputs).index(old)] = logits.outputs[0]
    return old


def test_a_tied_output_projection_is_tested_before_a_soft_cap(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = portable(bundles, "dense")
    projected = capped(graph)
    tested: list[Any] = []
    compare = selftest.compare
    monkeypatch.setattr(selftest, "compare", lambda *given: (tested.append(given[3]), compare(*given))[1])
    work = Work(graph, 2e-6, "")
    assert work.run(matmul.FuseTransposed())
    assert tested == [("projected",)]
    made = values_by_name(graph)["projected"].producer()
    assert made is not None
    assert made.op_type == "FusedMatMul"
    assert work.rewrites[0].self_test is not None
    assert work.rewrites[0].self_test["passed"]

    broken = portable(bundles, "dense")
    capped(broken)
    work, node = Work(broken, 2e-6, ""), Builder.node

    def wrong(self: Builder, op_type: str, inputs: Any, **more: Any) -> Any:
        if op_type == "FusedMatMul":
            more["attributes"] = {**more["attributes"], "alpha": 2.0}
        return node(self, op_type, inputs, **more)

    monkeypatch.setattr(Builder, "node", wrong)
    with pytest.raises(MoEdgeError, match=r"Self-test of 'tied output projection -> FusedMatMul' failed"):
        work.run(matmul.FuseTransposed())
    assert projected.name == "projected.replaced"


def test_an_output_projection_before_a_soft_cap_is_a_head(bundles: dict[str, Path]) -> None:
    graph = portable(bundles, "dense")
    projected = capped(graph)
    product = projected.producer()
    assert product is not None
    transpose = product.inputs[1]
    assert transpose is not None
    own = Builder(graph, before=product).initializer("own", np.ones((32, 260), np.float32))
    product.replace_input_with(1, own)  # an untied one
    found = weights.collect(graph)
    assert found["own"].tensor_class == "head"
    assert [name for name, weight in found.items() if weight.tensor_class == "head"] == ["own"]


def products(*attributes: dict[str, Any] | None) -> ir.Model:
    """Products of x [n, 4] by a matrix each, a Gemm with the attributes that are given, else a MatMul."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18})
    generator = np.random.default_rng(0)
    for number, given in enumerate(attributes):
        rows = (3, 4) if given and given.get("transB") else (4, 3)
        weight = ir.Value(name=f"w{number}", const_value=ir.tensor(generator.standard_normal(rows).astype(np.float32)))
        graph.register_initializer(weight)
        node = ir.node("MatMul" if given is None else "Gemm", [x, weight], attributes=given or {})
        node.outputs[0].name, node.outputs[0].shape = f"y{number}", ir.Shape(["n", 3])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def test_products_with_factors_are_not_merged() -> None:
    plain: dict[str, Any] = {"transB": 1, "alpha": 1.0, "beta": 1.0, "transA": 0}
    graph = products(None, {"alpha": 2.0}, plain, {"transB": 1}, {"transA": 1, "transB": 1})
    assert matmul.merge_siblings(graph) == [{"y0": "MatMul", "y2": "Gemm", "y3": "Gemm"}]
    assert [node.op_type for node in graph.graph if node.op_type == "Gemm"] == ["Gemm", "Gemm"]
    scaled = products({"alpha": 2.0}, plain, {"transB": 1, "beta": 2.0})
    assert [weights.product_weight(node) is not None for node in scaled.graph] == [False, True, False]


def test_groups_of_each_kind_are_tested_at_both_ends(bundles: dict[str, Path]) -> None:
    graph = portable(bundles, "dense")
    before = graph.clone()
    done = matmul.MergeSiblings().apply(graph)
    groups = matmul.merge_siblings(before.clone())
    assert len(groups) == done.count > 2
    kinds = {frozenset(group.values()) for group in groups}
    ends = {
        tuple(found[at]) for kind in kinds for at in (0, -1) if (found := [g for g in groups if {*g.values()} == kind])
    }
    assert {block.outputs for block in done.blocks} == ends
    assert tuple(groups[-1]) in ends
    for block in done.blocks:
        assert selftest.compare("merged", before, graph, block.outputs, 2e-6).passed
