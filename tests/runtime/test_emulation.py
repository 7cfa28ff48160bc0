"""Half precision on a CPU: the two Casts round as the types do, every stored value is rounded, nothing else is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moedge import MoEdgeError
from moedge.export.graph import emulation

NUMPY: dict[str, Any] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TYPES = pytest.mark.parametrize("dtype", list(emulation.HALVES))


def model(nodes: list[Any], inputs: dict[str, int], output: int, weights: dict[str, np.ndarray] | None = None) -> Any:
    """A graph of ``nodes`` with the output ``y``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(made: Any, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()  # with every optimisation, as the engine has it
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]


@TYPES
def test_the_casts_round_every_float32_as_the_type_does(dtype: str) -> None:
    """To nearest even, ties, subnormals, infinities and all: 1.4 million bit patterns, beside ml_dtypes and numpy."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    ends = [upper | low for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    drawn = np.random.default_rng(0).integers(0, 2**32, 700_000, dtype=np.uint32)
    x = np.concatenate([*ends, drawn]).view(np.float32)
    kind = emulation.HALVES[dtype]
    made = emulation.emulated(model([helper.make_node("Cast", ["x"], ["y"], to=kind)], {"x": 1}, kind))
    got = run(made, x=x)
    with np.errstate(all="ignore"):
        want = x.astype(NUMPY[dtype]).astype(np.float32)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), ~number)
    np.testing.assert_array_equal(got[number].view(np.uint32), want[number].view(np.uint32))


@TYPES
def test_single_operators_are_those_of_the_half_type(dtype: str) -> None:
    """Beside PyTorch's CPU kernels of the type: element for element, functions within one rounding of another exp."""
    kind, unit = emulation.HALVES[dtype], float(ml_dtypes.finfo(NUMPY[dtype]).eps) / 2
    torch.manual_seed(0)
    a, b = (torch.randn(37, 64).to(getattr(torch, dtype)) for _ in range(2))
    cases = {
        "Add": (["a", "b"], a + b, 0.0),
        "Sub": (["a", "b"], a - b, 0.0),
        "Mul": (["a", "b"], a * b, 0.0),
        "Div": (["a", "b"], a / b, 0.0),
        "Sigmoid": (["a"], torch.sigmoid(a), 2 * unit),
        "Tanh": (["a"], torch.tanh(a), 2 * unit),
        "Erf": (["a"], torch.erf(a), 2 * unit),
    }
    feeds = {"a": a.float().numpy(), "b": b.float().numpy()}
    for operator, (inputs, want, limit) in cases.items():
        made = model([helper.make_node(operator, inputs, ["y"])], dict.fromkeys(inputs, kind), kind)
        got = run(emulation.emulated(made), **{name: feeds[name] for name in inputs})
        wanted = want.float().numpy()
        assert (np.abs(got - wanted) <= limit * np.abs(wanted)).all(), operator
        np.testing.assert_array_equal(got, got.astype(NUMPY[dtype]).astype(np.float32), operator)


@TYPES
def test_a_product_accumulates_in_float32_and_is_rounded_once(dtype: str) -> None:
    kind, rng = emulation.HALVES[dtype], np.random.default_rng(1)
    x, weight = (rng.standard_normal(shape).astype(NUMPY[dtype]) for shape in ((33, 257), (257, 40)))
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": kind}, kind, {"w": weight})
    got = run(emulation.emulated(made), x=x.astype(np.float32))
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    want = exact.astype(NUMPY[dtype]).astype(np.float64)
    # Rounded sums may differ where the float32 sum lies on another side of a tie: seldom, and by one step.
    assert (got == want).mean() > 0.98
    assert np.abs(got - want).max() <= 2 * float(ml_dtypes.finfo(NUMPY[dtype]).eps) * np.abs(exact).max()


@TYPES
def test_what_leaves_the_range_in_between_is_infinite(dtype: str) -> None:
    """300 * 300 * 0.01: ONNX Runtime's own float16 leaves out the rounding in the middle and says 900."""
    kind = emulation.HALVES[dtype]
    nodes = [helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Mul", ["square", "w"], ["y"])]

    def made() -> Any:
        return model(nodes, {"x": kind}, kind, {"w": np.array([0.01], NUMPY[dtype])})

    got = run(emulation.emulated(made()), x=np.array([300.0], np.float32))
    if dtype == "float16":
        assert np.isinf(got).all()
        assert run(made(), x=np.array([300.0], np.float16))[0] == 900
    else:
        rounded = [np.float32(NUMPY[dtype].type(value)) for value in (90000.0, 0.01)]
        assert got[0] == np.float32(NUMPY[dtype].type(rounded[0] * rounded[1])) == 904


def test_functions_inputs_weights_and_attributes_of_half_precision_are_found() -> None:
    kind = TensorProto.BFLOAT16
    body = onnx.parser.parse_function(
        '<domain: "own", opset_import: ["" : 18]> Scaled (x) => (y) '
        "{ k = Constant <value_float = 0.3> ()  c = CastLike (k, x)  y = Mul (x, c) }"
    )
    step = helper.make_tensor("value", kind, [1], np.array([0.7]))
    nodes = [
        helper.make_node("Cast", ["n"], ["x"], to=kind),
        helper.make_node("Scaled", ["x"], ["s"], domain="own"),
        helper.make_node("Constant", [], ["c"], value=step),
        helper.make_node("Add", ["s", "c"], ["t"]),
        helper.make_node("Mul", ["t", "w"], ["u"]),
        helper.make_node("Cast", ["u"], ["y"], to=TensorProto.FLOAT),
    ]
    weight = np.array([1.7], ml_dtypes.bfloat16)
    made = model(nodes, {"n": TensorProto.INT64}, TensorProto.FLOAT, {"w": weight})
    made.functions.append(body)
    made.opset_import.append(helper.make_opsetid("own", 1))
    made.opset_import[0].version = 21  # the body's is 18
    assert emulation.needed(made)
    x = np.arange(-50, 50)
    half = ml_dtypes.bfloat16
    want = ((x.astype(half) * half(0.3)) + half(0.7)) * weight
    assert want.dtype == half
    np.testing.assert_array_equal(run(emulation.emulated(made), n=x), want.astype(np.float32))


def test_what_holds_no_half_precision_or_is_no_standard_operator_is_left_alone() -> None:
    plain = model([helper.make_node("Add", ["x", "x"], ["y"])], {"x": 1}, 1)
    nodes = [
        helper.make_node("MoE", ["x", "x"], ["z"], domain="com.microsoft"),
        helper.make_node("Identity", ["z"], ["y"]),
    ]
    own = model(nodes, {"x": 10}, 10)
    assert not emulation.needed(plain)
    own.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert not emulation.needed(own)
    with pytest.raises(MoEdgeError, match=r"The type of z \(MoE\) is not known"):
        emulation.emulated(own)


def test_a_node_with_a_graph_inside_is_refused() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "g", [], [helper.make_tensor_value_info("z", 16, None)]
    )
    node = helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=inner)
    with pytest.raises(MoEdgeError, match="If has a graph inside"):
        emulation.emulated(model([node], {"b": TensorProto.BOOL, "x": 16}, 16))
