from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, evaluate, modeling, reads, scoring
from moedge.convert.calibration import LayerStatistics
from moedge.convert.methods import baselines
from moedge.convert.plan import LayerPlan, MoEPlan

WINDOWS = np.random.default_rng(5).integers(0, 256, size=(5, 24))


def direct_nll(model: Any, ids: np.ndarray) -> float:
    with torch.no_grad():
        tokens = torch.from_numpy(ids)
        logp = model(tokens).logits[:, :-1].double().log_softmax(-1)
        return float(-logp.gather(-1, tokens[:, 1:, None]).mean())


def test_perplexity_is_the_mean_over_predicted_tokens(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    for batch_size in (1, 2, 5):
        result = scoring.perplexity(model, WINDOWS, batch_size=batch_size)
        assert result["tokens"] == 5 * 23
        # float32 log-softmax over 260 entries of size ~10: 260 * 2^-24 * 10 at worst, 2e-4; typically 1e-6.
        assert result["nll"] == pytest.approx(direct_nll(model, WINDOWS), abs=1e-5)
        assert result["ppl"] == math.exp(result["nll"])


@pytest.fixture
def case(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> tuple[Any, MoEPlan, list[LayerStatistics]]:
    model = tiny_llama()
    return model, *make_plan(model)


Case = tuple[Any, MoEPlan, list[LayerStatistics]]


def test_evaluation_compares_every_variant_and_restores_the_model(case: Case) -> None:
    model, plan, statistics = case
    before = [block.module for block in adapters.ffns(model)]
    steps: list[tuple[int, int]] = []
    variants: dict[str, Any] = {"cmoe": plan}
    for name in baselines.STANDARD:
        seeds = (0, 1, 2) if name in baselines.SEEDED else (0,)
        variants[name] = [baselines.CONTROLS[name](plan, statistics, model, seed, WINDOWS) for seed in seeds]
    result = evaluate.evaluate(
        model,
        variants,
        {"wiki": WINDOWS, "c4": WINDOWS[:2]},
        {"window": 24, "bos": False},
        batch_size=2,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [block.module for block in adapters.ffns(model)] == before
    assert steps[-1] == ((1 + 1 + 3 + 2 * 3) * 7,) * 2
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["protocol"] == {
        "window": 24,
        "bos": False,
        "dtype": "float32",
        "tokens": {"wiki": 5 * 23, "c4": 2 * 23},
    }
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["dense"]["ppl"]["wiki"] == pytest.approx(math.exp(direct_nll(model, WINDOWS)), rel=1e-5)
    assert rows["dense"]["kl_to_dense"] is None
    assert rows["cmoe"]["kind"] == "method"
    assert rows["oracle router"]["kind"] == "control"
    assert rows["random partition"]["seeds"] == [0, 1, 2]
    assert rows["random partition"]["ppl_std"]["wiki"] > 0
    # Every control runs as many neurons a token as the method: 5 of 8 experts.
    assert {row["active_width_fraction"] for row in result["rows"][1:]} == {5 / 8}
    assert all(row["kl_to_dense"]["wiki"] > 0 for row in result["rows"][1:])
    # The method's numbers are those of the model that apply() makes, and its KL is the definition's.
    with torch.no_grad():
        dense = model(torch.from_numpy(WINDOWS)).logits[:, :-1].double().log_softmax(-1)
    sparse_model = modeling.apply(plan, model)
    assert rows["cmoe"]["ppl"]["wiki"] == pytest.approx(math.exp(direct_nll(sparse_model, WINDOWS)), rel=1e-5)
    with torch.no_grad():
        sparse = sparse_model(torch.from_numpy(WINDOWS)).logits[:, :-1].double().log_softmax(-1)
    kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert rows["cmoe"]["kl_to_dense"]["wiki"] == pytest.approx(kl, rel=1e-4)


def test_all_experts_selected_has_no_divergence(case: Case) -> None:
    model, plan, _ = case
    full = replace(plan, layers=[replace(layer, top_k=layer.num_experts) for layer in plan.layers])
    result = evaluate.evaluate(model, {"full": full}, {"t": WINDOWS}, {})
    # KL is quadratic in logit errors of about 1e-5; what is left is float32 rounding of log-probabilities.
    assert abs(result["rows"][1]["kl_to_dense"]["t"]) < 1e-6


def test_the_model_is_restored_after_an_interruption(case: Case) -> None:
    model, plan, _ = case
    before = [block.module for block in adapters.ffns(model)]

    def interrupted() -> None:
        with scoring.swapped(model, plan):
            assert len(modeling.sparse_ffns(model)) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [block.module for block in adapters.ffns(model)] == before


def row(label: str, kind: str, wiki: float, c4: float, read: float = 0.75) -> dict[str, Any]:
    return {"label": label, "kind": kind, "ppl": {"wiki": wiki, "c4": c4}, "ffn_read_share": read}


def test_verdict_says_when_the_router_loses() -> None:
    rows = [
        row("dense", "dense", 10, 20),
        row("cmoe", "method", 12, 25),
        row("static mask", "control", 13, 24),
        row("FLAP-MLP", "control", 14, 26),
        row("oracle router", "control", 11, 21),
    ]
    verdict = evaluate.verdict(rows)
    assert verdict["router_beats"] == {"static mask": False, "FLAP-MLP": True}
    assert verdict["sentences"] == ["cmoe loses to the control 'static mask' on c4 (25.00 against 24.00)."]
    verdict = evaluate.verdict([rows[1], rows[3]])
    assert verdict["sentences"] == [
        "cmoe beats every control that reads as many FFN weights for a token, within 2% of the dense FFN's: FLAP-MLP."
    ]
    assert evaluate.verdict([rows[0]]) == {"router_beats": {}, "sentences": []}


def test_rows_that_read_another_share_of_the_weights_are_not_compared() -> None:
    rows = [
        row("cmoe", "method", 12, 25, 0.6),
        row("a little more", "control", 14, 26, 0.6 + 0.99 * evaluate.READ_TOLERANCE),
        row("too much", "control", 11, 24, 0.6 + 1.01 * evaluate.READ_TOLERANCE),
    ]
    verdict = evaluate.verdict(rows)
    assert verdict["router_beats"] == {"a little more": True}
    assert verdict["sentences"][1] == (
        "Not compared with cmoe (60.0%), as they read another share of the FFN weights: too much (62.0%)."
    )


@pytest.mark.parametrize("name", baselines.CONTROLS)
def test_every_control_is_a_valid_plan_of_equal_width_and_repeats(name: str, case: Case) -> None:
    model, plan, statistics = case
    make = baselines.CONTROLS[name]
    control = make(plan, statistics, model, 3, WINDOWS)
    control.validate()
    if name in ("TEAL", "WINA"):  # every neuron runs, and as many weights are read
        assert reads.of_plan(control) == pytest.approx(reads.of_plan(plan), abs=0.005)
    else:
        assert [layer.active_width for layer in control.layers] == [layer.active_width for layer in plan.layers]
    assert control.sha256 == make(plan, statistics, model, 3, WINDOWS).sha256
    if name in baselines.SEEDED:
        assert control.sha256 != make(plan, statistics, model, 4, WINDOWS).sha256
    if name not in baselines.READ_STATISTICS:
        assert control.sha256 == make(plan, [], model, 3, WINDOWS).sha256
    else:
        with pytest.raises((MoEdgeError, ValueError)):
            make(plan, [], model, 3, WINDOWS)


def test_flap_is_exact_when_the_dropped_neurons_are_constant(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    block = adapters.ffns(model)[0]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    h = torch.nn.functional.silu(x @ block.gate.T) * (x @ block.up.T)
    constant = np.zeros(64, dtype=bool)
    constant[::4] = True
    h[:, constant] = h[0, constant]
    facts = LayerStatistics(
        np.zeros((6, 1), dtype=np.uint16), h.mean(0).numpy(), np.where(constant, 0, h.var(0).numpy()).astype(np.float32)
    )
    width = 48 - 8
    reference = LayerPlan(np.arange(width, dtype=np.int32), [np.arange(40 + 8 * e, 48 + 8 * e) for e in range(3)], 1)
    plan = MoEPlan("cmoe", {}, adapters.describe(model), [reference])
    layer = baselines.flap(plan, [facts], model).layers[0]
    np.testing.assert_array_equal(layer.shared, np.flatnonzero(~constant))
    y = h[:, layer.shared] @ block.down[:, layer.shared].T + torch.from_numpy(layer.output_bias)
    # float32 sums of 64 products of size ~1: 64 * 2^-24 = 4e-6.
    torch.testing.assert_close(y, h @ block.down.T, atol=2e-5, rtol=1e-5)


def test_static_mask_keeps_the_most_active_neurons(case: Case) -> None:
    _, plan, statistics = case
    for layer, facts, parent in zip(
        baselines.static_mask(plan, statistics).layers, statistics, plan.layers, strict=True
    ):
        dropped = np.setdiff1d(np.arange(64), layer.shared)
        assert len(layer.shared) == 40
        assert facts.counts[layer.shared].min() >= facts.counts[dropped].max()
        assert np.isin(parent.shared, layer.shared).all()


def test_oracle_selects_the_largest_expert_outputs(case: Case) -> None:
    model, plan, _ = case
    layer, block = baselines.oracle(plan).layers[0], adapters.ffns(model)[0]
    ffn = modeling.build_ffn(block, layer)
    ffn.record_routes = True
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    h = torch.nn.functional.silu(x @ block.gate.T) * (x @ block.up.T)
    norms = torch.stack([(h[:, e] @ block.down[:, e].T).norm(dim=1) for e in layer.experts], dim=1)
    ffn(x)
    assert torch.equal(ffn.last_routes.long(), norms.topk(3, dim=1).indices)
    assert not list(ffn.router.parameters())
