"""Experts as products of their own on ONNX Runtime: the form of few wide experts, and where ``MoE`` is illegal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.graph.nodes import nodes_of
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import products as ort_products
from moedge.export.pipeline import export, lower
from moedge.runtime.bench.profiling import group_nodes
from moedge.runtime.engines.ort import OrtEngine

IDS = np.random.default_rng(3).integers(0, 256, (2, 40))
# Two layers whose blocks are within 2e-6 of their own output (onnxruntime.BLOCK_LIMIT), added to one residual stream.
LIMIT = 4e-6


@pytest.fixture(scope="module")
def divided(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, without_compiler: Any) -> Path:
    """The tiny MoE (two layers, 3 of 6 experts) in this form."""
    folder = tmp_path_factory.mktemp("products")
    with pytest.MonkeyPatch.context() as patch, without_compiler():
        patch.setattr(ort_products, "SMALLEST_EXPERT", 1)
        lower("ort-cpu", bundles["moe/portable"], folder)
    return folder


def _error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("top_k", [None, 1, 1 << 16])
def test_a_batch_its_cache_and_any_top_k_equal_the_portable_graph(divided, bundles, top_k):
    one, two = (OrtEngine(path, top_k=top_k) for path in (bundles["moe/portable"], divided))
    want, got = one.prefill(IDS), two.prefill(IDS)
    assert 0 < _error(got.logits, want.logits) < LIMIT
    token = IDS[:, :1]  # one token a text: most experts multiply no rows
    want, got = one.decode(token, want.cache), two.decode(token, got.cache)
    assert 0 < _error(got.logits, want.logits) < LIMIT


def test_the_form_depends_on_the_size_of_an_expert(bundles, monkeypatch):
    model = ir.load(bundles["moe/portable"] / "model.onnx")
    experts, width, hidden = nodes_of(model, "SparseGLU")[0].inputs[3].shape
    assert not ort_products.preferred(model)
    monkeypatch.setattr(ort_products, "SMALLEST_EXPERT", 3 * width * hidden)
    assert ort_products.preferred(model)
    monkeypatch.setattr(ort_products, "MOST_EXPERTS", experts - 1)
    assert not ort_products.preferred(model)


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (lambda right: lambda b, g, u, a: right(b, u, g, a), "gate and up are swapped"),
        (lambda right: lambda b, g, u, a: b.node("Mul", [g, u]), "the activation is dropped"),
    ],
)
def test_mistakes_are_caught_and_named(bundles, monkeypatch, mistake, name):
    monkeypatch.setattr(ort_products, "_glu", mistake(ort_products._glu))
    before = ir.load(bundles["moe/portable"] / "model.onnx")
    after = before.clone()
    routed = str(nodes_of(before, "SparseGLU")[0].outputs[0].name)
    ort_products.ExpertProducts().apply(after)
    test = selftest.compare_ffn("products", before, after, routed, LIMIT)
    assert not test.passed
    assert name in test.looks_like


def test_a_profile_counts_them_as_experts(divided, tmp_path):
    engine = OrtEngine(divided, threads=1, trace=tmp_path)
    engine.prefill(IDS[:1])
    engine.end_trace()
    engine.close()
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    kinds: dict[str, Counter[str]] = {}
    for node, group in group_nodes(graph).items():
        kinds.setdefault(group, Counter())[next(n.op_type for n in graph.node if n.name == node)] += 1
    assert kinds["experts"]["NonZero"] == kinds["experts"]["ScatterND"] == 2 * 6
    assert kinds["experts"]["MatMul"] == 2 * 2 * 6
    assert kinds["router"]["TopK"] == 2
    assert not {"NonZero", "ScatterND", "TopK"} & set(kinds["dense FFN"])


@pytest.mark.parametrize("kind", ["gemma2", "llama with biases"])
def test_quantised_experts_that_qmoe_cannot_hold(
    kind, tiny_model, convert_tiny, tiny_tokenizer, tmp_path, without_compiler
):
    """GELU, and gate and up with biases, in 8 and 4 bits: kernels exact, every expert de-quantised as it is stored."""
    model = tiny_model("gemma2", layers=2) if kind == "gemma2" else tiny_model("llama", layers=1, mlp_bias=True)
    plan = convert_tiny(model, "cmoe")
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    targets = ["portable", "ort-cpu-int8", "ort-cpu-int4"]
    with without_compiler():
        made = export(tmp_path / "moe", tmp_path / "bundles", targets, label="tiny")
    for target in targets[1:]:
        manifest = open_bundle(made[target]).manifest.document()
        (found,) = (entry for entry in manifest["lowering"] if entry["rewrite"] == ort_products.ExpertProducts.name)
        assert found["status"] == "applied"
        assert found["self_test"]["passed"]
        assert 0 < found["self_test"]["float32_activations"] < 2e-6
        stored = OrtEngine(made["portable"], taps=True, weights_of=made[target])
        engine = OrtEngine(made[target], taps=True, float32_activations=True)
        want, got = stored.prefill(IDS[:1]), engine.prefill(IDS[:1])
        for layer, chosen in want.routes.items():
            np.testing.assert_array_equal(np.sort(got.routes[layer]), np.sort(chosen))
        # Logits: two such layers and a head, each a product of at most 64 terms in another order, 64 * 2^-24.
        assert 0 < _error(got.logits, want.logits) < 1e-5


def test_every_value_has_the_shape_that_it_says(divided, values_match_their_shapes):
    assert values_match_their_shapes(divided) > 100
