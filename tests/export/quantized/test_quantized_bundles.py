"""int8 and int4 bundles: everything is quantised, and the kernels compute what their weights say."""

import json
import os
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge.export import bundle, pipeline
from moedge.export.graph import weights
from moedge.export.graph.build import array_of
from moedge.export.graph.nodes import nodes_of
from moedge.export.lowering.ort import quantized as ort_quantized
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.quantize import format as quantize
from moedge.export.quantize.stored import dequantized_weights
from moedge.runtime.engines.ort import OrtEngine

TARGETS = {8: "ort-cpu-int8", 4: "ort-cpu-int4"}


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# Float32 twice: ten products of at most 160 terms in another order, each 160 * 2^-24.
RELATIVE = 1e-4
ALL = [f"{kind}/{target}" for kind in ("dense", "moe") for target in TARGETS.values()]
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))


@pytest.mark.parametrize("name", ALL)
def test_every_class_is_quantised_and_every_byte_is_accounted_for(bundles, name):
    manifest = bundle.open_bundle(bundles[name]).manifest.document()
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


def test_weights_with_several_names_are_read(bundles, tmp_path):
    """Hard links, as a backup by ``cp -al`` leaves them: onnx and onnx_ir refuse such files."""
    made = bundle.open_bundle(shutil.copytree(bundles["dense/ort-cpu-int4"], tmp_path / "made"))
    portable = bundle.open_bundle(shutil.copytree(bundles["dense/portable"], tmp_path / "portable"))
    for opened in (made, portable):
        os.link(opened.path / "model.onnx.data", tmp_path / f"backup of {opened.path.name}")
    assert dict(dequantized_weights(made)).keys() == made.manifest.quantization.tensors.keys()
    (tmp_path / "openvino").mkdir()
    pipeline.lower("openvino", portable.path, tmp_path / "openvino")
    weights_file = bundle.open_bundle(tmp_path / "openvino").path / "model.onnx.data"
    assert weights_file.stat().st_nlink == 1
    OrtEngine(portable.path, weights_of=made.path)


@pytest.mark.parametrize("name", ALL)
def test_stored_weights_are_the_originals_to_one_step(bundles, name):
    portable = ir.load(bundles[f"{name.split('/')[0]}/portable"] / "model.onnx")
    original = portable.graph.initializers
    opened = bundle.open_bundle(bundles[name])
    bits, seen = opened.manifest.document()["quantization"]["bits"], 0
    for weight, values in dequantized_weights(opened):
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
        list(dequantized_weights(bundle.open_bundle(bundles["moe/portable"])))


def test_experts_of_tiny_weights_keep_float32_scales(bundles):
    """Up times 2^20 and down by it is the same model, whose quantisation errors are the same part of its outputs."""
    errors, types = [], []
    for factor in (1.0, 2.0**20):
        graph = ir.load(bundles["moe/portable"] / "model.onnx")
        for node in nodes_of(graph, "SparseGLU"):
            for value, by in ((node.inputs[4], factor), (node.inputs[5], 1 / factor)):
                value.const_value = ir.tensor(array_of(value) * np.float32(by), name=value.name)
        found = ort_quantized.lower(graph, max_length=256, bits=8).rewrites
        errors += [entry.self_test["quantisation_error"] for entry in found if entry.rewrite == FuseRouted.name]
        types.append([node.inputs[8].dtype for node in graph.graph if node.op_type == "RoutedGLU"])
    assert types == [[ir.DataType.FLOAT16] * 2, [ir.DataType.FLOAT] * 2]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)  # scales of float16 are 2^-11 off, steps of 8 bits 2^-8


def test_the_self_tests_keep_kernel_error_and_quantisation_error_apart(bundles):
    for bits, target in TARGETS.items():
        lowering = bundle.open_bundle(bundles[f"moe/{target}"]).manifest.document()["lowering"]
        tests = {entry["rewrite"]: entry["self_test"] for entry in lowering if entry["self_test"]}
        qmoe = tests["Route + SparseGLU -> QMoE"]
        assert qmoe["passed"]
        assert 1e-3 < qmoe["max_rel_error"] < 4e-2
        assert qmoe["quantisation_error"] > {4: 5e-2, 8: 2e-3}[bits]
        assert ("float32_activations" in qmoe) == (bits == 4)  # 8-bit experts have no float32 kernel
        for name in ("attention -> MatMulNBits", "shared -> MatMulNBits"):
            assert 0 < tests[name]["float32_activations"] < 2e-6


def test_a_class_that_was_skipped_fails_the_export(bundles, monkeypatch):
    products = ort_quantized._Blocks.products
    monkeypatch.setattr(
        ort_quantized._Blocks,
        "products",
        lambda self, own: [rule for rule in products(self, own) if rule.tensor_class != "attention"],
    )
    with pytest.raises(MoEdgeError, match=r"attention takes .* bytes instead of .* \(32\.0 bits a weight\)"):
        ort_quantized.lower(ir.load(bundles["dense/portable"] / "model.onnx"), max_length=64, bits=4)


def test_asymmetric_blocks_err_less(bundles):
    model = ir.load(bundles["dense/portable"] / "model.onnx")
    lowered = ort_quantized.lower(model, max_length=64, bits=4, method="rtn-asymmetric")
    symmetric = bundle.open_bundle(bundles["dense/ort-cpu-int4"]).manifest.document()["lowering"]
    errors = [
        {entry["rewrite"]: entry["self_test"]["quantisation_error"] for entry in entries if "Bits" in entry["rewrite"]}
        for entries in ([vars(rewrite) for rewrite in lowered.rewrites], symmetric)
    ]
    assert errors[0].keys() == errors[1].keys()
    assert sum(errors[0].values()) < sum(errors[1].values())


def test_zero_points_are_an_option_of_export(bundles, tmp_path, tiny_llama, tiny_tokenizer):
    from moedge.convert import calibration, methods, modeling
    from moedge.export import pipeline

    model = tiny_llama(hidden=64, width=320, layers=1)  # experts of 40 neurons: two blocks
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    statistics = calibration.collect(model, tokens, k_a=8)
    plan = methods.convert("cmoe", statistics, model, shared=3, active=2, experts=8, k_a=8)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    error = {}
    for method, chosen in (("rtn", False), ("rtn-asymmetric", True)):
        made = pipeline.export(tmp_path / "moe", tmp_path / method, ["ort-cpu-int4"], label="moe", zero_points=chosen)
        quantised = bundle.open_bundle(made["ort-cpu-int4"])
        section = json.loads((quantised.path / "manifest.json").read_text(encoding="utf-8"))["quantization"]
        assert section["method"] == method
        floats = ir.load(made["portable"] / "model.onnx").graph.initializers
        error[method] = {
            name: float(np.square(array - array_of(floats[name])).mean())
            for name, array in dequantized_weights(quantised)
        }
    assert error["rtn-asymmetric"].keys() == error["rtn"].keys()
    assert all(value < error["rtn"][name] for name, value in error["rtn-asymmetric"].items())
    with pytest.raises(MoEdgeError, match="GPTQ has no zero points; give"):
        pipeline.export(
            tmp_path / "moe", tmp_path / "no", TARGETS.values(), label="", zero_points=True, calibration=tokens
        )
    with pytest.raises(MoEdgeError, match="one block, whose zero points"):
        pipeline.lower("ort-cpu-int4", bundles["moe/portable"], tmp_path, zero_points=True)


def test_verify_judges_the_model_and_the_kernels_apart(bundles, checkpoints):
    from moedge.runtime.parity.suite import verify_run
    from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

    engines = {TORCH_MOE: checkpoints["moe"], TORCH_DENSE: checkpoints["dense"]}
    engines |= {EngineRef(name.split("/")[1], "moe"): path for name, path in bundles.items() if name.startswith("moe")}
    engines[EngineRef("ort-cpu-int4", "dense")] = bundles["dense/ort-cpu-int4"]
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
