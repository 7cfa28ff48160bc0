"""Routed experts in one operator of ours: every router, thresholds, all precisions, mistakes named, fallbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.graph import nodes, weights
from moedge.export.graph.build import array_of
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import quantized
from moedge.export.lowering.ort import routed as ort_routed
from moedge.export.lowering.ort.moe import BIASED
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.ort_ops import library, pack
from moedge.export.pipeline import export, lower
from moedge.export.quantize.format import QUANTISED, Quantized, quantize
from moedge.export.quantize.stored import dequantized_weights
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine
from moedge.runtime.parity.given import pair

EXPERTS, HIDDEN = 6, 32  # of the tiny MoE, whose experts have 8 neurons
FLOAT = 2e-6  # BLOCK_LIMIT of lowering/ort/cpu.py
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
RULES = ("unit", "scaled", "softmax", "probability", "normalised")


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    kind, shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def block(
    path: Path,
    *,
    rule: str = "unit",
    bias: bool = False,
    compensated: bool = False,
    activation: str = "silu",
    width: int = 8,
    x_ramp: float = 0.0,
    h_ramp: float = 0.0,
) -> ir.Model:
    """The graph of the tiny MoE with another router, other experts, and thresholds where a ramp is given."""
    model, generator = ir.load(path / "model.onnx"), np.random.default_rng(7)

    def draw(*shape: int, size: float = 0.3) -> np.ndarray:
        return generator.normal(0, size, shape).astype(np.float32)

    for node in list(model.graph):
        if node.op_type == "Route":
            node.attributes["rule"] = ir.AttrString("rule", rule)
            if bias:
                node.replace_input_with(1, constant(model, f"{node.name}.selection_bias", draw(EXPERTS, size=2)))
            if rule == "scaled":
                node.resize_inputs(3)
                node.replace_input_with(2, constant(model, f"{node.name}.scale", np.abs(draw(EXPERTS))))
            if rule == "normalised":  # by positive scores, those of a sigmoid
                source = node.inputs[0]
                sigmoid = ir.node("Sigmoid", [source])
                model.graph.insert_before(node, sigmoid)
                sigmoid.outputs[0].name, sigmoid.outputs[0].type = f"{node.name}.positive", source.type
                sigmoid.outputs[0].shape = source.shape
                node.replace_input_with(0, sigmoid.outputs[0])
        elif node.op_type == "SparseGLU":
            node.attributes["activation"] = ir.AttrString("activation", activation)
            for value, shape in zip(node.inputs[3:6], ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width)), strict=True):
                array = draw(EXPERTS, *shape)
                value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
            node.resize_inputs(8 if h_ramp else 7 if compensated else 6)
            if compensated:
                node.replace_input_with(6, constant(model, f"{node.name}.compensation", draw(EXPERTS, HIDDEN)))
            if h_ramp:
                limit = constant(model, f"{node.name}.h_threshold", np.abs(draw(EXPERTS, width)))
                node.replace_input_with(7, limit)
                node.attributes["ramp"] = ir.AttrFloat32("ramp", h_ramp)
            if x_ramp:
                x, limit = node.inputs[0], constant(model, f"{node.name}.x_threshold", np.abs(draw(HIDDEN, size=1)))
                keep = ir.node("KeepLarge", [x, limit], domain="moedge", attributes={"ramp": x_ramp})
                model.graph.insert_before(node, keep)
                keep.outputs[0].name, keep.outputs[0].type, keep.outputs[0].shape = f"{node.name}.kept", x.type, x.shape
                node.replace_input_with(0, keep.outputs[0])
    nodes.attach(model, form="dense")
    return model


def stacks(model: ir.Model, bits: int) -> dict[str, Quantized]:
    table = {name: weight for name, weight in weights.collect(model).items() if weight.tensor_class == "experts"}
    values = model.graph.initializers
    return {n: pack.round_scales(quantize(weights.array(values[n], weight), bits)) for n, weight in table.items()}


def compared(before: ir.Model, bits: int = 32, change: Callable[[ir.Node], None] | None = None) -> selftest.SelfTest:
    """The whole FFN of the first layer before and after the rule, in the precision, after ``change`` of its node."""
    after, packed = before.clone(), None
    routed = str(nodes.nodes_of(before, "SparseGLU")[0].outputs[0].name)
    if bits != 32:
        packed = stacks(before, bits)
        before = quantized.dequantized_graph(before, packed, weights.collect(before))
    rule = FuseRouted(packed)
    assert rule.refuse(after) is None
    done = rule.apply(after)
    assert (done.count, done.rounds, len(done.blocks), set(done.taps)) == (2, bits != 32, 2, {0, 1})
    (node,) = [n for n in after.graph if n.op_type == "RoutedGLU" and n.outputs[0].name == routed]
    if change:
        change(node)
    given = (
        [packed[str(value.name)] for value in nodes.nodes_of(before, "SparseGLU")[0].inputs[3:6]] if packed else None
    )
    growth = quantized.gather.growth(before)
    return selftest.compare_ffn(
        "routed", before, after, routed, (FLOAT if bits == 32 else quantized.INT8_LIMIT) * growth, given
    )


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_router_reaches_the_operator(bundles: dict[str, Path], rule: str, bias: bool, compensated: bool) -> None:
    test = compared(block(bundles["moe/portable"], rule=rule, bias=bias, compensated=compensated))
    assert test.passed, test
    assert test.max_rel_error > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [8, 40, 160])  # interleaved, with half a block of padding, and rows of gate and up
def test_integers_are_those_of_their_weights(bundles: dict[str, Path], bits: int, width: int) -> None:
    test = compared(block(bundles["moe/portable"], rule="softmax", bias=True, compensated=True, width=width), bits)
    assert test.passed, test
    assert test.max_rel_error > 1e-4  # activations are rounded to int8


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("x_ramp", "h_ramp"), [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1), (0.2, 0.1)])
@pytest.mark.parametrize("bits", [32, 8])
def test_thresholds_go_into_the_operator(
    bundles: dict[str, Path], activation: str, x_ramp: float, h_ramp: float, bits: int
) -> None:
    model = block(bundles["moe/portable"], activation=activation, width=40, x_ramp=x_ramp, h_ramp=h_ramp)
    test = compared(model, bits)
    assert test.passed, test
    FuseRouted().apply(model)
    # Two ramps have no place in one operator: inputs are then left out before it.
    assert len(nodes.nodes_of(model, "KeepLarge")) == (2 if x_ramp == 0.2 else 0)
    (first, _) = [node for node in model.graph if node.op_type == "RoutedGLU"]
    assert (first.inputs[3] is not None) == (x_ramp == 0.1)


def swapped(number: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ir.Node], None]:
    def apply(node: ir.Node) -> None:
        value = node.inputs[number]
        assert value is not None
        value.const_value = ir.tensor(np.ascontiguousarray(change(array_of(value))), name=value.name)

    return apply


def without(number: int) -> Callable[[ir.Node], None]:
    return lambda node: node.replace_input_with(number, None)


def other(name: str, value: Any) -> Callable[[ir.Node], None]:
    def apply(node: ir.Node) -> None:
        node.attributes[name] = ir.AttrString(name, value) if isinstance(value, str) else ir.AttrInt64(name, value)

    return apply


def halves(rows: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(rows, 2, axis=-1)[::-1], axis=-1)


MISTAKES = {
    "gate and up are swapped": swapped(4, halves),
    "the experts are in reverse order": lambda node: [
        swapped(n, lambda a: a.reshape(EXPERTS, -1)[::-1].reshape(a.shape))(node) for n in (4, 6, 7, 9)
    ],
    "the small hidden values are kept": without(6),
    "each expert has the thresholds of another": swapped(
        6, lambda t: np.roll(t.reshape(EXPERTS, -1), 1, axis=0).ravel()
    ),
    "each hidden value has the threshold of its neighbour": swapped(
        6, lambda t: np.roll(t.reshape(EXPERTS, -1), 1, axis=1).ravel()
    ),
    "the experts read the small inputs too": without(3),
    "the thresholds of inputs are in another order": swapped(3, lambda t: t[::-1]),
    "each input has the threshold of its neighbour": swapped(3, lambda t: np.roll(t, 1)),
    "the compensation of unselected experts is dropped": without(9),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught_and_named(bundles: dict[str, Path], name: str) -> None:
    model = block(bundles["moe/portable"], rule="softmax", compensated=True, x_ramp=0.1, h_ramp=0.1, width=40)
    test = compared(model, change=MISTAKES[name])
    assert not test.passed
    assert name in test.looks_like


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("the block scales are dropped (gate and up)", swapped(5, np.ones_like)),
        ("the block scales are dropped (down)", swapped(8, np.ones_like)),
        ("the sign of the block scales is lost (abs) (gate and up)", swapped(5, np.abs)),
        ("gate and up are swapped", lambda node: [swapped(n, halves)(node) for n in (4, 5)]),
    ],
)
def test_a_mistake_with_integers_is_caught_and_named(
    bundles: dict[str, Path], name: str, change: Callable[[ir.Node], None]
) -> None:
    test = compared(block(bundles["moe/portable"], width=256), 8, change)  # whole lines: halves are gate and up
    assert not test.passed
    assert name in test.looks_like


def test_experts_with_biases_and_zero_points_are_refused(tiny_model: Any, convert_tiny: Any) -> None:
    from moedge.export.trace import trace

    model = tiny_model("llama", layers=1, mlp_bias=True)
    assert FuseRouted().refuse(trace(modeling.apply(convert_tiny(model, "cmoe"), model))) == BIASED
    fitting = trace(modeling.apply(convert_tiny(model := tiny_model("llama", layers=1), "cmoe"), model))
    matrix = quantize(np.ones((8, 64), np.float32), 4, "rtn-asymmetric")
    assert FuseRouted().refuse(fitting) is None
    assert FuseRouted({"any": matrix}).refuse(fitting) == pack.ZERO_POINTS


# --- whole bundles ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, convert_tiny: Any) -> dict[str, Path]:
    """A MoE with compensation, its checkpoint and its bundles."""
    root, model = tmp_path_factory.mktemp("routed"), tiny_model("llama")
    model.model.norm.weight.data *= 2  # logits with a standard deviation that the limits of verify are derived for
    fill = np.random.default_rng(2).normal(0, 0.1, (EXPERTS, HIDDEN)).astype(np.float32)
    plan = convert_tiny(model, "cmoe")
    plan = replace(plan, layers=[replace(layer, compensation=fill) for layer in plan.layers])
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    targets = ["ort-cpu", "ort-cpu-int8", "ort-cpu-int4"]
    return export(root / "moe", root / "bundles", targets, label="tiny") | {"moe": root / "moe"}


def test_verify_passes_against_pytorch_and_with_the_experts_replayed(made: dict[str, Path]) -> None:
    windows = np.random.default_rng(1).integers(0, 256, (2, 64))

    def verdicts(reference: str, test: str) -> list[Any]:
        found = pair(made[reference], made[test], "x", windows, 24, "float32", {"threads": 1}, lambda *_: None)
        return [entry["verdict"] for entry in found["parity"]]

    for verdict in [*verdicts("moe", "ort-cpu"), *verdicts("portable", "ort-cpu-int8")]:
        assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-int8"])
@pytest.mark.parametrize("top_k", [1, 99])
def test_another_k_is_the_models(made: dict[str, Path], target: str, top_k: int) -> None:
    if target == "ort-cpu":
        want = TorchEngine(made["moe"], top_k=top_k).prefill(IDS).logits
    else:
        want = OrtEngine(made["portable"], weights_of=made[target], top_k=top_k).prefill(IDS).logits
    got = OrtEngine(made[target], taps=True, top_k=top_k).prefill(IDS)
    error = np.abs(got.logits - want).max(-1) / np.abs(want).max()
    assert np.median(error) < (1e-5 if target == "ort-cpu" else 0.1)
    assert {experts.shape[-1] for experts in got.routes.values()} == {min(top_k, EXPERTS)}


@pytest.mark.parametrize("bits", [8, 4])
def test_every_byte_is_read_back(made: dict[str, Path], bits: int) -> None:
    """Weights of the stored bytes: those that were quantised, with scales that float16 holds; nothing else is there."""
    opened = open_bundle(made[f"ort-cpu-int{bits}"])
    assert opened.manifest.operators is not None
    assert opened.manifest.quantization is not None
    graph = ir.load(made["portable"] / "model.onnx")
    packed, found = stacks(graph, bits), dict(dequantized_weights(opened))
    table = weights.collect(graph)
    assert set(found) == {name for name, weight in table.items() if weight.tensor_class in QUANTISED}
    assert len(packed) == 6
    for name, value in packed.items():
        np.testing.assert_array_equal(found[name], value.dequantized())
    size = {entry.tensor_class: entry.bytes for entry in opened.manifest.quantization.classes}["experts"]
    stored = onnx.load(opened.model_path).graph.initializer
    assert size == sum(len(tensor.raw_data) for tensor in stored if tensor.name.startswith("experts."))


def test_every_value_has_the_shape_that_it_says(made: dict[str, Path]) -> None:
    graph = onnx.load(made["ort-cpu"] / "model.onnx", load_external_data=False).graph
    described = {value.name: value for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in filter(None, node.output):
            kind = described[name].type.tensor_type
            assert kind.elem_type, name
            assert all(dim.dim_param or dim.dim_value for dim in kind.shape.dim), name


def test_without_a_compiler_exports_are_onnx_runtimes_own(
    made: dict[str, Path], tmp_path: Path, without_compiler: Any
) -> None:
    for target, rewrite in (("ort-cpu", "Route + SparseGLU -> MoE"), ("ort-cpu-int4", "Route + SparseGLU -> QMoE")):
        (tmp_path / target).mkdir()
        with without_compiler():
            lower(target, made["portable"], tmp_path / target)
        manifest = open_bundle(tmp_path / target).manifest
        found = {entry.rewrite: entry for entry in manifest.lowering}
        assert found[FuseRouted.name].status == "refused"
        assert "no g++" in found[FuseRouted.name].reason
        assert found[rewrite].status == "applied"
        assert manifest.operators is None
        domains = {node.domain for node in onnx.load(tmp_path / target / "model.onnx").graph.node}
        assert library.DOMAIN not in domains


def test_stock_operators_are_onnx_runtimes_own_alone(made: dict[str, Path], tmp_path: Path) -> None:
    with library.stock_operators(True):
        lower("ort-cpu", made["portable"], tmp_path)
    bundle = open_bundle(tmp_path)
    assert bundle.manifest.operators is None
    assert library.DOMAIN not in {
        entry.domain for entry in onnx.load(bundle.model_path, load_external_data=False).opset_import
    }
    reason = "asked for ONNX Runtime's own operators alone"
    assert reason in {rewrite.reason for rewrite in bundle.manifest.lowering}


def test_a_mistake_stops_the_export(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ort_routed._joined
    monkeypatch.setattr(ort_routed, "_joined", lambda parts: right(parts[::-1]))
    with pytest.raises(
        MoEdgeError, match=r"Self-test of .*RoutedGLU.* failed: .*It looks like: .*gate and up are swap"
    ):
        lower("ort-cpu-int8", made["portable"], tmp_path)
