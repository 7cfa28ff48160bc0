"""Layers that differ in the number of experts and in top_k, and layers without experts (ExpertWeaver, MLPMoE)."""

import math
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moedge.convert import calibration, methods, modeling
from moedge.convert.plan import LayerPlan
from moedge.export.bundle import open_bundle
from moedge.export.pipeline import export
from moedge.export.trace import trace
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine

# Two fp32 evaluations of a 3-layer model: some twenty products of at most 64 terms in another order, each 64 * 2^-24.
RELATIVE = 8e-5
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))


def relative(actual, expected):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """ExpertWeaver on 3 layers, of which the first has no experts and the last no shared block; and its bundles."""
    root = tmp_path_factory.mktemp("mixed")
    model = tiny_llama(layers=3)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 48))
    statistics = calibration.collect(model, tokens, k_a=6, gate=calibration.GateSampling(sample=12))
    plan = methods.convert("expertweaver", statistics, model, experts=16, k=12, tau_percentile=50)
    plan.layers[0] = LayerPlan(np.arange(0, 64, 2, dtype=np.int32), [], 0)
    last = plan.layers[2]
    plan.layers[2] = replace(last, shared=last.shared[:0])
    model.save_pretrained(root / "dense")
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    export(root / "moe", root / "bundles", ["portable", "ort-cpu"], label="mixed")
    return root, plan


def test_the_layers_really_differ(mixed):
    root, plan = mixed
    facts = open_bundle(root / "bundles" / "ort-cpu").manifest.document()["moe"]["layers"]
    assert [facts[str(i)]["num_experts"] for i in range(3)] == [layer.num_experts for layer in plan.layers]
    assert len({layer.num_experts for layer in plan.layers}) >= 3
    assert len({layer.top_k for layer in plan.layers}) >= 3
    assert plan.layers[0].num_experts == 0
    assert len(plan.layers[2].shared) == 0


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_prefill_and_decode_match_pytorch(mixed, target):
    root, plan = mixed
    reference, engine = TorchEngine(root / "moe", taps=True), OrtEngine(root / "bundles" / target, taps=True)
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert relative(got.logits, want.logits) < RELATIVE
        assert set(got.routes) == set(want.routes) == {1, 2}
        for layer, experts in want.routes.items():
            assert experts.shape[-1] == plan.layers[layer].top_k
            np.testing.assert_array_equal(got.routes[layer], experts)
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    assert relative(got.logits, want.logits) < RELATIVE


def test_the_lowering_fuses_every_layer_that_has_experts(mixed):
    graph = onnx.load(mixed[0] / "bundles" / "ort-cpu" / "model.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("RoutedGLU") == 2
    assert not [node for node in graph.node if node.domain == "moedge"]


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_larger_k_stops_at_each_layers_experts(mixed, target):
    """More experts than any layer has: every layer runs all of its own, as in PyTorch."""
    root, _ = mixed
    want = TorchEngine(root / "moe", top_k=99).prefill(IDS).logits
    assert relative(OrtEngine(root / "bundles" / target, top_k=99).prefill(IDS).logits, want) < RELATIVE
    assert relative(OrtEngine(root / "bundles" / target).prefill(IDS).logits, want) > 100 * RELATIVE


def test_the_reference_chain_computes_it_too(mixed):
    """The graph as traced: one body of SparseGLU for all layers, whose Dispatch takes each node's number of experts."""
    root, plan = mixed
    proto = ir.to_proto(trace(modeling.load(root / "moe")[0]))
    made = [
        {a.name: a.i for a in node.attribute}["num_experts"] for node in proto.graph.node if node.op_type == "SparseGLU"
    ]
    assert made == [layer.num_experts for layer in plan.layers if layer.experts]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(24)[None]}
    feeds |= {v.name: np.zeros((1, 2, 0, 8), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    assert relative(session.run(["logits"], feeds)[0], TorchEngine(root / "moe").prefill(IDS).logits) < RELATIVE


def test_a_model_without_any_expert_is_exported_as_a_narrower_one(tmp_path, tiny_llama, tiny_tokenizer):
    model, dense = tiny_llama(layers=1), tiny_llama(layers=1)
    plan = methods.convert("mlpmoe", None, model, structure="neurons", branches=8, p_max=0.5, keep=6)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    bundles = export(tmp_path / "moe", tmp_path / "bundles", ["portable", "ort-cpu"], label="static")
    want = TorchEngine(tmp_path / "moe").prefill(IDS).logits
    for target, path in bundles.items():
        assert relative(OrtEngine(path).prefill(IDS).logits, want) < RELATIVE
        tensors = onnx.load(path / "model.onnx").graph.initializer
        assert sorted([len(plan.layers[0].shared), 32]) in [sorted(tensor.dims) for tensor in tensors], target
        # The dense FFN's 3 * 64 * 32 numbers are gone, whatever a lowering merges.
        assert sum(math.prod(tensor.dims) for tensor in tensors) < sum(p.numel() for p in dense.parameters())
