"""Mistakes in quantised experts are caught and named, and what the kernels cannot hold is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge.export.graph import weights
from moedge.export.graph.build import values_by_name
from moedge.export.lowering import capabilities
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import moe as ort_moe
from moedge.export.lowering.ort import nbits as ort_nbits
from moedge.export.lowering.ort import qmoe as ort_qmoe
from moedge.export.lowering.ort import quantized as ort_quantized
from moedge.export.quantize import format as quantize

HIDDEN, EXPERTS = 64, 5  # of the model in conftest.py
TARGETS = {8: "ort-cpu-int8", 4: "ort-cpu-int4"}


class Block:
    """The experts and the shared expert of the tiny MoE, quantised, with a mistake somewhere."""

    def __init__(
        self, path: Path, *, square: bool = False, rule: str = "unit", bias: bool = False, compensated: bool = False
    ) -> None:
        model = ir.load(path / "model.onnx")
        generator = np.random.default_rng(7)
        for node in list(model.graph):
            if node.op_type == "SparseGLU" and square:
                for value in node.inputs[3:6]:
                    array = generator.normal(0, 0.2, (EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)
                    value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
            if node.op_type == "Route":
                node.attributes["rule"] = ir.AttrString("rule", rule)
                value = node.inputs[1]
                if bias:
                    value.const_value = ir.tensor(generator.normal(0, 2, EXPERTS).astype(np.float32), name=value.name)
            if node.op_type == "SparseGLU" and compensated:
                node.resize_inputs(7)
                array = generator.normal(0, 0.1, (EXPERTS, HIDDEN)).astype(np.float32)
                node.replace_input_with(6, self._weight(model, f"{node.name}.compensation", array))
        if rule != "unit" or compensated:
            from moedge.export.graph import nodes

            model.functions.clear()
            if rule == "scaled":
                for node in list(model.graph):
                    if node.op_type == "Route":
                        node.resize_inputs(3)
                        array = generator.random(EXPERTS).astype(np.float32)
                        node.replace_input_with(2, self._weight(model, f"{node.name}.scale", array))
            nodes.attach(model, form="dense")
        table = weights.collect(model)
        chosen = {n: w for n, w in table.items() if w.tensor_class in ("experts", "shared")}
        values = model.graph.initializers
        self.packed = {n: quantize.quantize(weights.array(values[n], w), 4) for n, w in chosen.items()}
        self.reference = ort_quantized.dequantized_graph(model, self.packed, table)
        self.model, self.classes = model, {n: w.tensor_class for n, w in chosen.items()}
        self.routed = next(str(n.outputs[0].name) for n in model.graph if n.op_type == "SparseGLU")

    @staticmethod
    def _weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
        kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(value)
        return value

    def lower(self) -> "Block":
        ort_qmoe.FuseQMoE(self.packed).apply(self.model)
        self.quantize_products()
        return self

    def quantize_products(self) -> None:
        shared = {name: value for name, value in self.packed.items() if self.classes[name] == "shared"}
        ort_nbits.QuantizeProducts("shared", shared).apply(self.model)

    def test(self) -> selftest.SelfTest:
        node = selftest.mistakes.FFN.find(self.reference, self.routed).node
        stacks = [self.packed[value.name] for value in node.inputs[3:6]]
        exact = ort_nbits.with_accuracy(self.model, 0)
        return selftest.compare_ffn("QMoE", self.reference, exact, self.routed, 2e-6, stacks)


@pytest.mark.parametrize("compensated", [False, True])  # the second takes the form of log-weights
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", ["unit", "scaled", "softmax", "probability"])
def test_every_router_rule_reaches_the_kernel_exactly(bundles, rule, bias, compensated):
    test = Block(bundles["moe/portable"], rule=rule, bias=bias, compensated=compensated).lower().test()
    assert test.passed, test.failure()
    assert test.max_rel_error > 0


interleave = ort_qmoe.interleave


def _stacked(gate: Any, up: Any) -> Any:
    return replace(
        gate,
        packed=np.concatenate([gate.packed, up.packed], axis=1),
        scales=np.concatenate([gate.scales, up.scales], axis=1),
    )


def _turn(value: quantize.Quantized) -> quantize.Quantized:
    return quantize.quantize(np.ascontiguousarray(value.dequantized().transpose(0, 2, 1)), 4)


MISTAKES: dict[str, Any] = {
    "gate and up are swapped": lambda gate, up: interleave(up, gate),
    "wrong interleave": _stacked,
    "the sign of the block scales is lost (abs) (gate and up)": lambda gate, up: interleave(
        *(replace(value, scales=np.abs(value.scales)) for value in (gate, up))
    ),
    "the block scales are dropped (gate and up)": lambda gate, up: interleave(
        *(replace(value, scales=np.ones_like(value.scales)) for value in (gate, up))
    ),
    "the nibbles of each byte are swapped (gate and up)": lambda gate, up: interleave(
        *(replace(value, packed=(value.packed << 4) | (value.packed >> 4)) for value in (gate, up))
    ),
    "the gate and up weights are transposed": lambda gate, up: interleave(_turn(gate), _turn(up)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_packing_are_named(bundles, monkeypatch, mistake):
    monkeypatch.setattr(ort_qmoe, "interleave", MISTAKES[mistake])
    test = Block(bundles["moe/portable"], square=True).lower().test()
    assert not test.passed
    assert len(test.looks_like) == 1
    assert mistake in test.looks_like[0]


def test_the_norm_flag_that_the_kernel_ignores_is_caught_and_named(bundles, monkeypatch):
    """Unit weights, ``normalize_routing_weights=0`` and no ``router_weights``: ONNX Runtime normalises all the same."""
    monkeypatch.setattr(ort_qmoe, "_selection", lambda builder, route, *_: (route.inputs[0], None, 0))
    test = Block(bundles["moe/portable"]).lower().test()
    assert not test.passed
    assert test.looks_like == ("the combination weights are the softmax over the selected scores",)


def test_renormalised_unit_weights_are_named(bundles, monkeypatch):
    selection = ort_qmoe._selection
    monkeypatch.setattr(ort_qmoe, "_selection", lambda *a: (*selection(*a)[:2], 1))
    test = Block(bundles["moe/portable"]).lower().test()
    assert not test.passed
    assert any("renormalised to sum 1 (norm flag ignored" in name for name in test.looks_like)


def test_missing_renormalisation_is_named(bundles, monkeypatch):
    def unnormalised(builder, route, *_):
        return route.inputs[0], builder.node("Softmax", [route.inputs[0]], attributes={"axis": -1}), 0

    monkeypatch.setattr(ort_qmoe, "_selection", unnormalised)
    test = Block(bundles["moe/portable"], rule="softmax").lower().test()
    assert not test.passed
    assert "missing renormalisation" in test.looks_like[0]


def test_a_dropped_router_scale_and_bias_are_named(bundles, monkeypatch):
    def unscaled(builder, route, *_):
        share = builder.node("Softmax", [route.inputs[0]], attributes={"axis": -1})
        one = builder.initializer(f"{route.name}.one", np.array(1.0, np.float32))
        return route.inputs[0], builder.node("Add", [share, one]), 0

    monkeypatch.setattr(ort_qmoe, "_selection", unscaled)
    test = Block(bundles["moe/portable"], rule="scaled").lower().test()
    assert test.looks_like == ("the scale of the router is dropped (1 + softmax)",)
    monkeypatch.setattr(
        ort_qmoe,
        "_selection",
        lambda b, route, *_: (route.inputs[0], ort_moe.by_token(b, "ones", EXPERTS, 1.0), 0),
    )
    test = Block(bundles["moe/portable"], bias=True).lower().test()
    assert test.looks_like == ("the selection bias is ignored",)


def test_a_dropped_shared_expert_is_named(bundles):
    block = Block(bundles["moe/portable"]).lower()
    values = values_by_name(block.model)
    add = next(use.node for use in values[block.routed].uses() if use.node.op_type == "Add")
    other = next(position for position, value in enumerate(add.inputs) if value.name != block.routed)
    zeros = ir.Value(
        name="zeros", shape=ir.Shape([HIDDEN]), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.zeros(HIDDEN, np.float32)),
    )  # fmt: skip
    block.model.graph.register_initializer(zeros)
    add.replace_input_with(other, zeros)
    assert block.test().looks_like == ("the shared expert is dropped",)


def test_a_dropped_activation_is_named(bundles):
    """In standard operators, since the CPU kernel has no form of this: every expert, gate times up without SiLU."""
    from moedge.export.graph.build import Builder, constant_of

    block = Block(bundles["moe/portable"])
    node = next(n for n in block.model.graph if n.op_type == "SparseGLU")
    build = Builder(block.model, before=node)
    gate, up, down = (
        build.initializer(f"wrong.{i}", np.ascontiguousarray(block.packed[v.name].dequantized().transpose(0, 2, 1)))
        for i, v in enumerate(node.inputs[3:6])
    )
    product = build.node("Mul", [build.node("MatMul", [node.inputs[0], w]) for w in (gate, up)])
    hit = build.node(
        "OneHot",
        [
            build.node("Cast", [node.inputs[1]], attributes={"to": 7}),
            constant_of(build, EXPERTS),
            constant_of(build, [0.0, 1.0], np.float32),
        ],
        attributes={"axis": 0},
    )
    share = build.node("ReduceSum", [hit, constant_of(build, [2])], attributes={"keepdims": 1})
    weighted = build.node("Mul", [build.node("MatMul", [product, down]), share])
    y = build.node("ReduceSum", [weighted, constant_of(build, [0])], attributes={"keepdims": 0})
    build.replace_output(node.outputs[0], y)
    block.quantize_products()
    test = block.test()
    assert not test.passed
    assert test.looks_like == ("the activation is dropped",), test


def test_the_float_lowering_names_its_mistakes_too(bundles, monkeypatch):
    def failed(**patches: Any) -> tuple[str, ...]:
        with monkeypatch.context() as patch:
            for name, replacement in patches.items():
                patch.setattr(ort_moe, name, replacement)
            before = ir.load(bundles["moe/portable"] / "model.onnx")
            after = before.clone()
            routed = next(str(n.outputs[0].name) for n in before.graph if n.op_type == "SparseGLU")
            ort_moe.FuseMoE().apply(after)
            return selftest.compare_ffn("MoE", before, after, routed, 2e-6).looks_like

    right = ort_moe.interleave
    assert failed() == ()
    assert failed(interleave=lambda gate, up: right(up, gate)) == ("gate and up are swapped",)
    assert "wrong interleave" in failed(interleave=lambda g, u: np.concatenate([g, u], axis=1))[0]
    unhidden = failed(UNSELECTED=0.0)
    assert any("not hidden" in name for name in unhidden), unhidden


def test_a_failing_self_test_stops_the_export_and_says_what_is_wrong(bundles, monkeypatch, without_compiler):
    monkeypatch.setattr(ort_qmoe, "interleave", lambda gate, up: interleave(up, gate))
    with without_compiler(), pytest.raises(MoEdgeError, match="It looks like: gate and up are swapped"):
        ort_quantized.lower(ir.load(bundles["moe/portable"] / "model.onnx"), max_length=64, bits=4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtypes": {"FLOAT", "FLOAT16"}}, "quantised from float32"),
        ({"hidden_sizes": {96, 100}}, "hidden size 100"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(facts, reason):
    fine: dict[str, Any] = {"dtypes": {"FLOAT"}, "hidden_sizes": {64}}
    assert ort_quantized.refusal(**fine) is None
    assert reason in ort_quantized.refusal(**{**fine, **facts})


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"activations": {"gelu_tanh"}}, "gates with SiLU only"),
        ({"smallest_weight": 0.0}, "drops such experts"),
        ({"biased": True}, "biases in gate or up"),
    ],
)
def test_what_qmoe_cannot_hold_becomes_products(facts, reason):
    fine: dict[str, Any] = {"activations": {"silu"}, "smallest_weight": 1.0, "biased": False}
    assert ort_qmoe.refusal(**fine) is None
    assert reason in ort_qmoe.refusal(**{**fine, **facts})


def test_an_older_runtime_is_refused_with_what_to_do(monkeypatch, bundles):
    monkeypatch.setattr(capabilities, "onnxruntime_version", lambda: (1, 27))
    with pytest.raises(MoEdgeError, match=r"ort-cpu-int4: quantised experts need onnxruntime 1\.31, this is 1\.27"):
        ort_quantized.lower(ir.load(bundles["moe/portable"] / "model.onnx"), max_length=64, bits=4)


def test_zero_points_of_one_block_experts_are_refused(bundles):
    model = ir.load(bundles["moe/portable"] / "model.onnx")
    with pytest.raises(MoEdgeError, match="experts of 20 neurons are one block"):
        ort_quantized.lower(model, max_length=64, bits=4, method="rtn-asymmetric")


def test_values_that_cannot_be_quantised_are_refused():
    with pytest.raises(MoEdgeError, match="NaN or infinite"):
        quantize.quantize(np.full((2, 32), np.nan, np.float32), 4)
    with pytest.raises(MoEdgeError, match="known: 4 and 8"):
        quantize.quantize(np.zeros((2, 32), np.float32), 3)
