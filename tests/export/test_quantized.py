"""int8 and int4 bundles: everything is quantised, kernels compute what their weights say, mistakes are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge.export import bundle, quantize
from moedge.export.lowering import legality, ort_moe, ort_nbits, ort_qmoe, ort_quantized, selftest, weights
from moedge.export.lowering.graph import array_of, values_by_name
from moedge.export.pipeline import export
from moedge.runtime.engines.onnxruntime import OrtEngine

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 160, 5, 2  # experts of 20 and a shared expert of 60: neither fills its last block
TARGETS = {8: "ort-cpu-int8", 4: "ort-cpu-int4"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """A dense tiny Llama and its CMoE conversion, of a shape that the quantised kernels hold."""
    from moedge.convert import calibration, modeling
    from moedge.convert.methods import cmoe

    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_llama(hidden=HIDDEN, width=WIDTH)
    model.save_pretrained(root / "dense")
    tiny_tokenizer.save_pretrained(root / "dense")
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    statistics = calibration.collect(model, tokens, k_a=8)
    plan = cmoe.plan(statistics, model, shared=3, active=TOP_K, experts=8, k_a=8)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    return {"dense": root / "dense", "moe": root / "moe"}


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    made = {}
    for kind, checkpoint in checkpoints.items():
        for target, path in export(checkpoint, root / kind, [*TARGETS.values()], label=kind).items():
            made[f"{kind}/{target}"] = path
    return made


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# Float32 twice: ten products of at most 160 terms in another order, each 160 * 2^-24.
RELATIVE = 1e-4
ALL = [f"{kind}/{target}" for kind in ("dense", "moe") for target in TARGETS.values()]
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))


@pytest.mark.parametrize("name", ALL)
def test_every_class_is_quantised_and_every_byte_is_accounted_for(bundles, name):
    manifest = bundle.open_bundle(bundles[name]).manifest
    bits = manifest["quantization"]["bits"]
    classes = {entry["tensor_class"]: entry for entry in manifest["quantization"]["classes"]}
    ffn = ["shared", "experts"] if name.startswith("moe") else ["ffn"]
    assert [c for c in classes if c in quantize.QUANTISED] == ["embedding", "attention", *ffn]  # the head is tied
    for tensor_class in ("embedding", "attention"):
        assert classes[tensor_class]["bits_per_weight"] == bits + 32 / quantize.BLOCK  # one float32 scale a block
    assert classes["norms"]["bits_per_weight"] == 32
    model = onnx.load(bundles[name] / "model.onnx")
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert abs(stored - sum(entry["bytes"] for entry in classes.values())) < 400  # sizes of Splits, k of TopK
    matrices = [t for t in model.graph.initializer if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT]
    kept = [t.name for t in matrices if not t.name.endswith(".scales")]
    router = {"merged.0", "merged.1"} if name.startswith("moe") else set()
    assert {n for n in kept if not n.startswith(("rotary", "model.model.rotary"))} - {"const"} == router | {
        n for n in kept if "selection_bias" in n
    }


@pytest.mark.parametrize("name", ALL)
def test_every_value_has_its_type_and_shape(bundles, values_match_their_shapes, name):
    assert values_match_their_shapes(bundles[name]) > 50


@pytest.mark.parametrize("name", ALL)
def test_stored_weights_are_the_originals_to_one_step(bundles, name):
    portable = ir.load(bundles[f"{name.split('/')[0]}/portable"] / "model.onnx")
    original = portable.graph.initializers
    opened = bundle.open_bundle(bundles[name])
    bits, seen = opened.manifest["quantization"]["bits"], 0
    for weight, values in quantize.dequantized_weights(opened):
        want = array_of(original[weight])
        assert values.shape == want.shape
        # Symmetric blocks have levels -2^(b-1) .. 2^(b-1) - 1 times the scale: the far end is one step off at most.
        assert np.abs(values - want).max() <= np.abs(want).max() / 2 ** (bits - 1) * 1.001
        assert relative(values, want) > 0
        seen += 1
    router = 4 if name.startswith("moe") else 0  # its gate and up in two layers
    assert seen == len(weights.collect(portable)) - router


@pytest.mark.parametrize("name", ALL)
def test_prefill_and_decode_compute_what_the_stored_weights_say(bundles, name):
    kind, target = name.split("/")
    exact = {"float32_activations": True} if target == TARGETS[4] or kind == "dense" else {}
    # int8 activations: 1 % a block (ort_quantized.INT8_LIMIT) through two layers; where an expert flips, far more.
    typical = 0.1
    reference = OrtEngine(bundles[f"{kind}/portable"], taps=True, weights_of=bundles[name])
    engine, fast = OrtEngine(bundles[name], taps=True, **exact), OrtEngine(bundles[name])
    want, got, quick = (each.prefill(IDS[:, :20]) for each in (reference, engine, fast))
    by_token = [relative(one, other) for one, other in zip(quick.logits[0], want.logits[0], strict=True)]
    assert RELATIVE < np.median(by_token) < typical
    for position in range(20, 24) if exact else ():
        assert relative(got.logits, want.logits) < RELATIVE
        for layer, experts in (want.routes or {}).items():
            np.testing.assert_array_equal(np.sort(got.routes[layer]), np.sort(experts))
        token = IDS[:, position : position + 1]
        want, got = (each.decode(token, step.cache) for each, step in ((reference, want), (engine, got)))


def test_every_expert_can_run_in_a_quantised_bundle(bundles):
    name = "moe/ort-cpu-int4"
    want = OrtEngine(bundles["moe/portable"], weights_of=bundles[name], top_k=99).prefill(IDS).logits
    got = OrtEngine(bundles[name], float32_activations=True, top_k=99).prefill(IDS).logits
    assert relative(got, want) < RELATIVE
    assert relative(OrtEngine(bundles[name], float32_activations=True).prefill(IDS).logits, want) > 100 * RELATIVE


def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(bundles):
    ids = np.concatenate([np.concatenate([np.full((1, 3), 258), IDS[:, :6]], axis=1), IDS[:, 6:15]])
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    engine = OrtEngine(bundles["moe/ort-cpu-int4"], float32_activations=True)
    step = engine.decode(ids[:, 8:], engine.prefill(ids[:, :8], mask[:, :8]).cache)
    for row, alone in enumerate((IDS[:, :6], IDS[:, 6:15])):
        single = engine.decode(alone[:, -1:], engine.prefill(alone[:, :-1]).cache)
        assert relative(step.logits[row, -1], single.logits[0, -1]) < RELATIVE


def test_dequantising_asks_for_the_portable_bundle_of_the_same_export(bundles):
    with pytest.raises(MoEdgeError, match="was not lowered from"):
        OrtEngine(bundles["dense/portable"], weights_of=bundles["moe/ort-cpu-int4"])
    with pytest.raises(MoEdgeError, match="nothing to de-quantise"):
        list(quantize.dequantized_weights(bundle.open_bundle(bundles["moe/portable"])))


def test_the_self_tests_keep_kernel_error_and_quantisation_error_apart(bundles):
    for bits, target in TARGETS.items():
        lowering = bundle.open_bundle(bundles[f"moe/{target}"]).manifest["lowering"]
        tests = {entry["rewrite"]: entry["self_test"] for entry in lowering if entry["self_test"]}
        qmoe = tests["Route + SparseGLU -> QMoE"]
        assert qmoe["passed"]
        assert 1e-3 < qmoe["max_rel_error"] < 4e-2
        assert qmoe["quantisation_error"] > {4: 5e-2, 8: 2e-3}[bits]
        assert ("float32_activations" in qmoe) == (bits == 4)  # 8-bit experts have no float32 kernel
        for name in ("attention -> MatMulNBits", "shared -> MatMulNBits"):
            assert 0 < tests[name]["float32_activations"] < 2e-6


def test_a_class_that_was_skipped_fails_the_export(bundles, monkeypatch):
    fuse = ort_nbits.fuse

    def lazy(model, packed, classes):
        return fuse(model, {n: v for n, v in packed.items() if classes[n] != "attention"}, classes)

    monkeypatch.setattr(ort_nbits, "fuse", lazy)
    with pytest.raises(MoEdgeError, match=r"attention takes .* bytes instead of .* \(32\.0 bits a weight\)"):
        ort_quantized.lower(ir.load(bundles["dense/portable"] / "model.onnx"), max_length=64, bits=4)


def test_asymmetric_blocks_err_less(bundles):
    model = ir.load(bundles["dense/portable"] / "model.onnx")
    lowered = ort_quantized.lower(model, max_length=64, bits=4, method="rtn-asymmetric")
    symmetric = bundle.open_bundle(bundles["dense/ort-cpu-int4"]).manifest["lowering"]
    errors = [
        {entry["rewrite"]: entry["self_test"]["quantisation_error"] for entry in entries if "Bits" in entry["rewrite"]}
        for entries in ([vars(rewrite) for rewrite in lowered.rewrites], symmetric)
    ]
    assert errors[0].keys() == errors[1].keys()
    assert sum(errors[0].values()) < sum(errors[1].values())


# --- mistakes are caught and named ----------------------------------------------------------------------------------


class Block:
    """The experts and the shared expert of the tiny MoE, quantised, with a mistake somewhere."""

    def __init__(self, path: Path, *, square: bool = False, rule: str = "unit", bias: bool = False) -> None:
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
        if rule != "unit":
            from moedge.export import nodes

            model.functions.clear()
            if rule == "scaled":
                for node in list(model.graph):
                    if node.op_type == "Route":
                        node.resize_inputs(3)
                        scale = ir.Value(
                            name=f"{node.name}.scale",
                            shape=ir.Shape([EXPERTS]),
                            type=ir.TensorType(ir.DataType.FLOAT),
                            const_value=ir.tensor(generator.random(EXPERTS).astype(np.float32)),
                        )
                        model.graph.register_initializer(scale)
                        node.replace_input_with(2, scale)
            nodes.attach(model, form="dense")
        table = weights.collect(model)
        chosen = {n: w for n, w in table.items() if w.tensor_class in ("experts", "shared")}
        values = model.graph.initializers
        self.packed = {n: quantize.quantize(weights.array(values[n], w), 4) for n, w in chosen.items()}
        self.reference = ort_quantized.dequantized_graph(model, self.packed, table)
        self.model, self.classes = model, {n: w.tensor_class for n, w in chosen.items()}
        self.routed = next(str(n.outputs[0].name) for n in model.graph if n.op_type == "SparseGLU")

    def lower(self, form: str = "weights") -> "Block":
        ort_qmoe.fuse(self.model, self.packed, form=form)
        ort_nbits.fuse(self.model, self.packed, self.classes)
        return self

    def test(self) -> selftest.SelfTest:
        node = selftest.mistakes.FFN.find(self.reference, self.routed).node
        stacks = [self.packed[value.name] for value in node.inputs[3:6]]
        exact = ort_nbits.with_accuracy(self.model, 0)
        return selftest.compare_ffn("QMoE", self.reference, exact, self.routed, 2e-6, stacks)


@pytest.mark.parametrize("form", ["weights", "adapter"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", ["unit", "scaled", "softmax", "probability"])
def test_every_router_rule_reaches_the_kernel_exactly(bundles, rule, bias, form):
    test = Block(bundles["moe/portable"], rule=rule, bias=bias).lower(form).test()
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
    from moedge.export.lowering.graph import Builder, constant_of

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
    ort_nbits.fuse(block.model, block.packed, block.classes)
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
            ort_moe.fuse(after)
            return selftest.compare_ffn("MoE", before, after, routed, 2e-6).looks_like

    right = ort_moe.interleave
    assert failed() == ()
    assert failed(interleave=lambda gate, up: right(up, gate)) == ("gate and up are swapped",)
    assert "wrong interleave" in failed(interleave=lambda g, u: np.concatenate([g, u], axis=1))[0]
    unhidden = failed(UNSELECTED=0.0)
    assert any("not hidden" in name for name in unhidden), unhidden


def test_a_failing_self_test_stops_the_export_and_says_what_is_wrong(bundles, monkeypatch):
    monkeypatch.setattr(ort_qmoe, "interleave", lambda gate, up: interleave(up, gate))
    with pytest.raises(MoEdgeError, match="It looks like: gate and up are swapped"):
        ort_quantized.lower(ir.load(bundles["moe/portable"] / "model.onnx"), max_length=64, bits=4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"activations": {"gelu_tanh"}}, "gates with SiLU only"),
        ({"smallest_weight": 0.0}, "drops such experts"),
        ({"dtypes": {"FLOAT", "FLOAT16"}}, "quantised from float32"),
        ({"hidden_sizes": {96, 100}}, "hidden size 100"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(facts, reason):
    fine: dict[str, Any] = {
        "dtypes": {"FLOAT"}, "activations": {"silu"}, "smallest_weight": 1.0, "hidden_sizes": {64},
    }  # fmt: skip
    assert legality.quantized_cpu(**fine) is None
    assert reason in legality.quantized_cpu(**{**fine, **facts})


def test_an_older_runtime_is_refused_with_what_to_do(monkeypatch, bundles):
    monkeypatch.setattr(legality, "onnxruntime_version", lambda: (1, 27))
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


def test_verify_judges_the_model_and_the_kernels_apart(bundles, checkpoints):
    from moedge.runtime.verification import verify_run

    engines = {"torch moe": checkpoints["moe"], "torch dense": checkpoints["dense"]}
    engines |= {f"{name.split('/')[1]} moe": path for name, path in bundles.items() if name.startswith("moe")}
    engines["ort-cpu-int4 dense"] = bundles["dense/ort-cpu-int4"]
    result = verify_run(engines, IDS, prefill=20, tolerances="float32", text="random")
    assert not [entry for entry in result["identity"] if "int" in entry["name"]]
    kl = {entry["name"]: entry["overall"]["kl_ref_test"]["mean"] for entry in result["parity"]}
    for target in TARGETS.values():
        assert kl[f"{target} moe vs its de-quantised weights"] > 0
    assert kl["ort-cpu-int4 moe vs its de-quantised weights"] < kl["ort-cpu-int4 moe vs torch moe"]
    ratios = {
        entry["name"]: check["value"]
        for entry in result["parity"]
        for check in entry["verdict"]["checks"]
        if check["name"] == "kl_ratio_to_dense"
    }
    replays = {entry["name"]: entry["replay"] for entry in result["parity"] if entry["replay"]}
    forced = {name: replay["overall"]["kl_ref_test"]["mean"] for name, replay in replays.items()}
    assert set(forced) == {name for name in kl if "int" in name and "moe" in name}
    want = forced["ort-cpu-int4 moe vs torch moe"] / kl["ort-cpu-int4 dense vs torch dense"]
    assert ratios == {"ort-cpu-int4 moe vs torch moe": pytest.approx(want)}
