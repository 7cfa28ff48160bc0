"""Every family as bundles: what ONNX Runtime computes is what PyTorch computes, in prefill and in decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge.convert import adapters, modeling
from moedge.export.bundle import open_bundle
from moedge.export.graph import nodes
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.lowering.trt import experts as trt_experts
from moedge.export.pipeline import export
from moedge.export.trace import trace
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine

# Two fp32 evaluations of a 2-layer model: some ten products of at most 64 terms in another order, each 64 * 2^-24.
RELATIVE = 4e-5
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
ALSO_ELSEWHERE = {"llama"}


def relative(actual: Any, expected: Any) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture
def bundles(convert_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    """Return a function (model, method) -> (checkpoint, bundles by target)."""

    def make(model: Any, method: str = "cmoe") -> tuple[Path, dict[str, Path]]:
        plan = convert_tiny(model, method)
        modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
        return tmp_path / "moe", export(tmp_path / "moe", tmp_path / "bundles", ["portable", "ort-cpu"], label="tiny")

    return make


def check_parity(checkpoint: Path, made: dict[str, Path]) -> None:
    """Prefill of 20 tokens, four decoded ones, a chunk, and a left-padded batch."""
    for path in made.values():
        reference, engine = TorchEngine(checkpoint, taps=True), OrtEngine(path, taps=True)
        want, got = reference.prefill(IDS[:, :16]), engine.prefill(IDS[:, :16])
        for start, end in ((16, 17), (17, 18), (18, 22), (22, 23)):
            assert relative(got.logits, want.logits) < RELATIVE
            for layer, experts in (want.routes or {}).items():
                np.testing.assert_array_equal(got.routes[layer], experts)
            ids = IDS[:, start:end]
            want, got = reference.decode(ids, want.cache), engine.decode(ids, got.cache)
        assert relative(got.logits, want.logits) < RELATIVE
        ids, mask = np.concatenate([IDS[:, :12], IDS[:, 8:20]]), np.ones((2, 12), np.int64)
        mask[0, :3] = 0
        step = engine.decode(ids[:, 11:], engine.prefill(ids[:, :11], mask[:, :11]).cache)
        alone = reference.decode(ids[:1, 11:], reference.prefill(ids[:1, 3:11]).cache)
        assert relative(step.logits[0, -1], alone.logits[0, -1]) < RELATIVE


def applied(bundle: Path) -> dict[str, str]:
    """Rewrite -> its reason for refusal, empty when it was applied."""
    return {entry["rewrite"]: entry["reason"] for entry in open_bundle(bundle).manifest.document()["lowering"]}


ATTENTION = "CausalAttention -> GroupQueryAttention"
EXPERTS = "Route + SparseGLU -> MoE"
PRODUCTS = "SparseGLU -> products of each expert"
ROUTED = FuseRouted.name


ONE_TEXT = ("cmoe", "expertweaver", "mlpmoe", "moedge", "llamamoe", "moefication", "atopk", "wanda", "flap")
"""Methods for dense models that one calibration text, or none, is enough for."""
QUICK = ("phi3", "gemma2", "gemma3_text", "olmo2")
PRODUCT = [
    pytest.param(family, method, marks=[] if (family in QUICK and method == "cmoe") else [pytest.mark.slow])
    for family in adapters.FAMILIES
    for method in ONE_TEXT
]


@pytest.mark.parametrize(("family", "method"), PRODUCT)
def test_prefill_and_decode_match_pytorch(family: str, method: str, tiny_model: Any, bundles: Any) -> None:
    checkpoint, made = bundles(tiny_model(family, layers=2 if family.startswith("gemma") else 1), method)
    check_parity(checkpoint, made)
    found = applied(made["ort-cpu"])
    assert found[ATTENTION] == ""
    if ROUTED in found:
        assert found[ROUTED] == ""
        assert not {EXPERTS, PRODUCTS} & set(found)


def test_ffn_biases_and_heads_that_the_attention_kernel_refuses(tiny_llama: Any, bundles: Any) -> None:
    checkpoint, made = bundles(tiny_llama(layers=1, mlp_bias=True, head_dim=20))
    check_parity(checkpoint, made)
    found = applied(made["ort-cpu"])
    assert found[ATTENTION] == "GroupQueryAttention takes heads of multiples of 8 values, these have 20"
    assert "biases" in found[ROUTED]
    assert "biases" in found[EXPERTS]
    assert found[PRODUCTS] == ""
    graph = ir.load(made["portable"] / "model.onnx")
    edges = [str(node.outputs[0].name) for node in nodes.nodes_of(graph, "SparseGLU")]
    after = graph.clone()
    trt_experts.RewriteExperts("merged").apply(
        after
    )  # gate and up have a column more than the hidden size, down has not
    assert selftest.compare("merged", graph, after, edges, 2e-6).passed
    with pytest.raises(MoEdgeError, match="has no biases, the model's experts have some; take --expert-form plugins"):
        trt_experts.choose(graph, "11.0", "native")
    for version in ("10.3", "10.13"):
        found = tensorrt.lower(graph.clone(), max_length=64, tensorrt=version).rewrites
        assert all(entry.self_test["passed"] for entry in found if entry.self_test)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}


@pytest.mark.parametrize("original", [pytest.param(4096, marks=pytest.mark.slow), 17])
def test_partial_rotary_and_longrope(original: int, tiny_model: Any, bundles: Any) -> None:
    """Half of each head is rotated, by other frequencies once a call passes the position of the original training.

    The prefill of check_parity has 16 tokens and its decode passes 17; 4096 is more than the model's maximum of 256.
    """
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **LONGROPE}
    more = {"rope_parameters": rope, "original_max_position_embeddings": original}
    checkpoint, made = bundles(tiny_model("phi3", layers=1, **more))
    check_parity(checkpoint, made)
    reason = applied(made["ort-cpu"])[ATTENTION]
    assert ("longrope" in reason) if original == 17 else (reason == "")


def test_dynamic_rotary_scaling_is_refused(tiny_llama: Any) -> None:
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(MoEdgeError, match="'dynamic' cannot be exported: its frequencies depend"):
        trace(model)
