"""A Mixture-of-Experts whose experts were split: exported flat, with the logits and routes of PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moedge import MoEdgeError
from moedge.convert import methods, modeling
from moedge.export import targets
from moedge.export.bundle import open_bundle
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.pipeline import export
from moedge.export.stock import glm as hf
from moedge.export.trace import trace
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine
from moedge.runtime.parity import compare as parity

# Two fp32 evaluations of a 2-layer model: some twenty products of at most 64 terms in another order, each 64 * 2^-24.
RELATIVE = 8e-5
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
CALIBRATION = np.random.default_rng(0).integers(0, 256, (4, 64))
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# Tracing takes seconds: one family is enough every day.
@pytest.fixture(
    scope="module", params=["olmoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "mixtral"))]
)
def made(request: Any, tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A folder with ``moe`` and its bundles; OLMoE and Qwen3-MoE keep their idlest experts dense."""
    family = request.param
    root: Path = tmp_path_factory.mktemp(family)
    model = tiny_model(family, layers=2, width=32, **FAMILIES[family])
    settings = {"shared": 2, "active": 3, "experts": 8, "k_a": 6}
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **settings, min_tokens=1)
    if family != "mixtral":
        fewest = max(min(layer.report["tokens"]) for layer in plan.layers) + 1
        plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **settings, min_tokens=fewest)
        assert all(0 < len(layer.report["dense_experts"]) < 6 for layer in plan.layers)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    export(root / "moe", root / "bundles", ["portable", "ort-cpu"], label=family)
    return root


def test_prefill_and_decode_match_pytorch(made: Path) -> None:
    for target in ("portable", "ort-cpu"):
        reference = TorchEngine(made / "moe", taps=True)
        engine = OrtEngine(made / "bundles" / target, taps=True)
        want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
        for position in range(20, 24):
            assert relative(got.logits, want.logits) < RELATIVE, target
            assert want.routes is not None
            assert got.routes is not None
            assert set(got.routes) == set(want.routes) == {0, 1}
            for layer, experts in want.routes.items():
                assert experts.shape[-1] == 6  # 2 parents, 3 sub-experts of each
                np.testing.assert_array_equal(got.routes[layer], experts)
            token = IDS[:, position : position + 1]
            want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
        assert relative(got.logits, want.logits) < RELATIVE, target


def test_the_lowering_fuses_shared_routed_and_dense_parts(made: Path) -> None:
    graph = onnx.load(made / "bundles" / "ort-cpu" / "model.onnx", load_external_data=False).graph
    parts = 2 if made.name.startswith("mixtral") else 3
    assert [node.op_type for node in graph.node].count("RoutedGLU") == 2 * parts
    assert not [node for node in graph.node if node.domain == "moedge"]
    manifest = open_bundle(made / "bundles" / "ort-cpu").manifest.document()
    tests = {entry["rewrite"]: entry for entry in manifest["lowering"]}
    assert tests[FuseRouted.name]["status"] == "applied"
    facts = manifest["moe"]["layers"]["0"]
    assert (facts["num_experts"], facts["top_k"], facts["shared_width"], facts["expert_width"]) == (6, 3, 8, 4)


def test_the_reference_chain_computes_it_too(made: Path) -> None:
    """The graph as traced, whose bodies are the meaning of the operators."""
    proto = ir.to_proto(trace(modeling.load(made / "moe")[0]))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(24)[None]}
    feeds |= {v.name: np.zeros((1, 2, 0, 8), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    assert relative(session.run(["logits"], feeds)[0], TorchEngine(made / "moe").prefill(IDS).logits) < RELATIVE


def test_parity_compares_composed_routes(made: Path) -> None:
    from moedge.configs import tolerances

    engines = TorchEngine(made / "moe", taps=True), OrtEngine(made / "bundles" / "ort-cpu", taps=True)
    limits = tolerances.load().profile("float32", "ort-cpu")
    windows = np.random.default_rng(2).integers(0, 256, (2, 64))
    found = parity.compare(*engines, windows, prefill=60, tolerances=limits)
    values = {check["name"]: check["value"] for check in found["verdict"]["checks"]}
    assert values["routing.expert_set_agreement"] == 1.0
    assert max(value for name, value in values.items() if name.endswith("kl_ref_test.mean")) < 1e-6


def test_what_a_hierarchical_model_cannot_do_is_said(made: Path, tmp_path: Path) -> None:
    with pytest.raises(MoEdgeError, match="top_k of a hierarchical model"):
        OrtEngine(made / "bundles" / "ort-cpu", top_k=6)
    with pytest.raises(MoEdgeError, match="no stock equivalent"):
        hf.export_hf(made / "moe", tmp_path / "stock", IDS)
    for target in ("ort-cpu-int8", "tensorrt-rtx"):
        graph = ir.load(made / "bundles" / "portable" / "model.onnx")
        row = targets.find(target)
        with pytest.raises(MoEdgeError, match="experts inside experts"):
            row.lowering()(graph, max_length=64, **targets.options(row))


def test_layers_that_keep_their_experts_are_refused(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("olmoe", layers=2, width=32, **FAMILIES["olmoe"])
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, shared=2, active=3, experts=8, k_a=6, min_tokens=1)
    children = plan.layers[1].children
    assert children
    whole = np.arange(32, dtype=np.int32)
    plan.layers[1].children = [type(child)(whole, [], 0) for child in children]
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    with pytest.raises(MoEdgeError, match="Layer 1 keeps the experts of its parent"):
        export(tmp_path / "moe", tmp_path / "bundles", ["portable"], label="olmoe")
