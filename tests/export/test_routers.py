"""Every form of router, with and without shared experts and compensation: exported, lowered, matched."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.convert import adapters, modeling
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan
from moedge.export.bundle import open_bundle
from moedge.export.lowering.ort import products as ort_products
from moedge.export.lowering.ort import quantized as ort_quantized
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.pipeline import export, lower
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine

HIDDEN, WIDTH = 32, 96
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
# Two fp32 evaluations of a 1-layer model: some six products of at most 96 terms in another order, each 96 * 2^-24.
FLOAT = 4e-5
# The only block that rounds its inputs to int8, within INT8_LIMIT of its own output: experts of our operator.
INT8 = ort_quantized.INT8_LIMIT
# Two blocks, each within HALF_LIMIT of its own output, added to one residual stream.
HALF = 2 * tensorrt.HALF_LIMIT
QUANTISED = ("ort-cpu-int8", "ort-cpu-int4", "tensorrt-rtx-int8", "tensorrt-rtx-int4")
TARGETS = ("portable", "ort-cpu", "tensorrt", "tensorrt-rtx", *QUANTISED)


@dataclass(frozen=True)
class Form:
    """A router as its authors have it; ``widths`` are those of the experts, the rest of the 96 neurons is shared."""

    kind: str
    combine: str
    top_k: int
    widths: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    compensation: bool = False


FORMS = {
    "softmax over the chosen (Mixtral), nothing shared": Form("linear", "softmax", 2, (24,) * 4, {"bias": True}),
    "representative neuron (CMoE)": Form("representative", "scaled", 3, (8,) * 6, {"score": "abs"}, bias=True),
    "mean gate (ExpertWeaver), compensation": Form("linear", "probability", 3, (16,) * 5, compensation=True),
    "sigmoid with selection bias (DeepSeek-V3)": Form("sigmoid", "normalised", 2, (16,) * 5, bias=True),
    "sigmoid, nothing shared, compensation": Form("sigmoid", "normalised", 2, (24,) * 4, compensation=True),
    "two layers with tanh (LLaMA-MoE)": Form("mlp", "softmax", 2, (16,) * 5),
    "two layers on unit inputs (MoEfication)": Form("mlp", "unit", 2, (16,) * 5, {"normalise": True}, bias=True),
    "top-1 (ToMoE), unequal widths": Form("linear", "unit", 1, (8, 20, 12, 24), {"bias": True}),
    "every expert": Form("linear", "softmax", 4, (16,) * 4, bias=True),
    "unequal widths, nothing shared": Form("representative", "unit", 2, (40, 30, 20, 6), compensation=True),
    "no router (MLPMoE)": Form("", "unit", 0, ()),
}


def make_plan(form: Form, model: Any) -> MoEPlan:
    generator = np.random.default_rng(3)
    experts, order = len(form.widths), generator.permutation(WIDTH).astype(np.int32)
    ends = np.cumsum((0, *form.widths))
    parts = [np.sort(order[a:b]) for a, b in pairwise(ends)]
    shared = np.sort(order[ends[-1] :]) if experts else np.sort(order[:48])

    def draw(*shape: int, size: float = 0.3) -> np.ndarray:
        return generator.normal(0, size, shape).astype(np.float32)

    tensors = {
        "representative": {"gate": (experts, HIDDEN), "up": (experts, HIDDEN)},
        "mlp": {"first": (experts, HIDDEN), "second": (experts, experts)},
    }.get(form.kind, {"weight": (experts, HIDDEN)} | ({"bias": (experts,)} if form.options.get("bias") else {}))
    router = RouterPlan(form.kind, {name: draw(*shape) for name, shape in tensors.items()}, form.options)
    layer = LayerPlan(
        shared,
        parts,
        form.top_k,
        router=router if experts else None,
        combine=form.combine,  # type: ignore[arg-type]
        selection_bias=draw(experts, size=0.1) if form.bias else None,
        scale=np.abs(draw(experts)) if form.combine == "scaled" else None,
        compensation=draw(experts, HIDDEN, size=0.1) if form.compensation else None,
    )
    return MoEPlan("by hand", {}, adapters.describe(model), [layer])


def relative(actual: Any, expected: Any) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check(engine: Any, reference: Any, limit: float) -> None:
    """Prefill of 20 tokens and four decoded ones; every token has the reference's experts."""
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert 0 < relative(got.logits, want.logits) < limit
        assert set(got.routes or {}) == set(want.routes or {})
        for layer, experts in (want.routes or {}).items():
            np.testing.assert_array_equal(np.sort(got.routes[layer]), np.sort(experts))
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)


QUICK = ("sigmoid with selection bias (DeepSeek-V3)", "unequal widths, nothing shared")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FORMS])
def test_a_router_is_exported_lowered_and_matched(
    name: str,
    tiny_llama: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_compiler: Any,
) -> None:
    form, model = FORMS[name], tiny_llama(layers=1, hidden=HIDDEN, width=WIDTH)
    plan = make_plan(form, model)
    plan.validate()
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    made = export(tmp_path / "moe", tmp_path / "bundles", TARGETS, label="x", tensorrt="10.13")
    reference = TorchEngine(tmp_path / "moe", taps=True)
    for target in ("portable", "ort-cpu"):
        check(OrtEngine(made[target], taps=True), reference, FLOAT)
    if form.widths:
        plain = {}
        for kind in ("MoE", "products", "QMoE"):
            monkeypatch.setattr(ort_products, "SMALLEST_EXPERT", 1 if kind == "products" else 1 << 19)
            plain[kind] = tmp_path / kind
            plain[kind].mkdir()
            with without_compiler():
                lower("ort-cpu-int4" if kind == "QMoE" else "ort-cpu", made["portable"], plain[kind])
        check(OrtEngine(plain["MoE"], taps=True), reference, FLOAT)
        check(OrtEngine(plain["products"], taps=True), reference, FLOAT)
        exact = OrtEngine(plain["QMoE"], taps=True, float32_activations=True)
        check(exact, OrtEngine(made["portable"], taps=True, weights_of=plain["QMoE"]), FLOAT)
        assert applied(plain["MoE"])["Route + SparseGLU -> MoE"]
        assert applied(plain["products"])["SparseGLU -> products of each expert"]
        assert applied(plain["QMoE"])["Route + SparseGLU -> QMoE"]
    for target in ("tensorrt", "tensorrt-rtx"):
        check(open_engine(made[target], taps=True), reference, HALF)
    for bits in (4, 8):
        path = made[f"ort-cpu-int{bits}"]
        stored = OrtEngine(made["portable"], taps=True, weights_of=path)
        check(OrtEngine(path, taps=True, float32_activations=True), stored, INT8 if form.widths else FLOAT)
        path = made[f"tensorrt-rtx-int{bits}"]
        check(OrtEngine(path, taps=True), OrtEngine(made["portable"], taps=True, weights_of=path), HALF)
    kinds = {target: applied(path) for target, path in made.items()}
    if form.widths:
        assert all(kinds[target][FuseRouted.name] for target in ("ort-cpu", "ort-cpu-int8", "ort-cpu-int4"))
        assert any("as plugins" in rewrite for rewrite in kinds["tensorrt"])
        assert any("one FFN" in rewrite for rewrite in kinds["tensorrt-rtx"])


def applied(path: Path) -> dict[str, bool]:
    return {
        entry["rewrite"]: entry["self_test"] is None or entry["self_test"]["passed"]
        for entry in open_bundle(path).manifest.document()["lowering"]
        if entry["status"] == "applied"
    }


def test_a_rule_that_divides_by_scores_asks_for_positive_ones(tiny_llama: Any) -> None:
    plan = make_plan(Form("linear", "normalised", 2, (16,) * 5), tiny_llama(layers=1, hidden=HIDDEN, width=WIDTH))
    with pytest.raises(MoEdgeError, match="'linear' router does not keep positive; use a 'sigmoid' router"):
        plan.validate()
