"""The share of the FFN weights that a token reads: counted while a model runs, and from a plan alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moedge.convert import adapters, evaluate, methods, modeling, reads, scoring
from moedge.convert.methods import baselines
from moedge.convert.plan import LayerPlan, MoEPlan

WINDOWS = np.random.default_rng(5).integers(0, 256, size=(3, 24))


def counted(model: Any, plan: MoEPlan) -> float:
    with scoring.swapped(model, plan), reads.counted(model) as counts, torch.no_grad():
        model(torch.from_numpy(WINDOWS))
    return counts.share(64)


def test_what_the_plan_says_is_what_is_counted(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan, statistics = make_plan(model)
    # 5 of 8 experts of 8 neurons, and a router of 6 rows of gate and up.
    assert reads.of_plan(plan) == pytest.approx((5 * 8 * 3 * 32 + 2 * 6 * 32) / (3 * 32 * 64))
    for name in ("static mask", "random router", "LLaMA-MoE random", "MoEfication, centre router", "neuron top-k"):
        control = baselines.CONTROLS[name](plan, statistics, model, 0, WINDOWS)
        assert counted(model, control) == pytest.approx(reads.of_plan(control)), name
    assert counted(model, plan) == pytest.approx(reads.of_plan(plan))


def test_static_pruning_reads_its_width_exactly_and_a_dense_ffn_everything(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    for kept in (64, 40):
        layers = [LayerPlan(np.arange(kept, dtype=np.int32), [], 0)] * 2
        plan = MoEPlan("static", {}, adapters.describe(model), layers)
        assert counted(model, plan) == reads.of_plan(plan) == kept / 64


def test_small_values_are_counted_one_by_one(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    plan, _ = make_plan(model)
    thresholds = {"x_threshold": np.full(32, 0.7, np.float32), "h_threshold": np.full(64, 0.2, np.float32)}
    plan = replace(plan, layers=[replace(plan.layers[0], **thresholds)])
    assert reads.of_plan(plan) is None, "nobody measured it"
    seen: list[torch.Tensor] = []
    with scoring.swapped(model, plan), torch.no_grad():
        ffn = modeling.sparse_ffns(model)[0]
        ffn.record_routes = True
        ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
        model(torch.from_numpy(WINDOWS))
        routes = ffn.last_routes
    x, layer, block = seen[0], plan.layers[0], adapters.ffns(model)[0]
    kept = x * (x.abs() > 0.7) * ((x.abs() - 0.7) / 0.07).clamp(0, 1)
    h = block.hidden(kept)
    active = torch.zeros(len(x), 64, dtype=torch.bool)
    active[:, layer.shared] = True
    for e, expert in enumerate(layer.experts):
        active[:, expert] |= (routes == e).any(dim=1, keepdim=True)
    x_kept = float((x.abs() > 0.7).sum(dim=1).float().mean())
    h_kept = float((active & (h.abs() > 0.2)).sum(dim=1).float().mean())
    expected = (2 * 40 * x_kept + 32 * h_kept + 2 * 6 * 32) / (3 * 32 * 64)
    # A value within rounding of its threshold may fall on the other side: of 72 x 32 values a few.
    assert counted(model, plan) == pytest.approx(expected, rel=1e-3)
    assert expected < 0.9 * (5 * 8 * 3 * 32) / (3 * 32 * 64)


def test_rows_carry_what_each_text_reads(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    model = tiny_llama()
    plan = methods.convert("gather", token_windows, model, share=0.6)
    texts = {"random": WINDOWS, "one token": np.full((2, 24), 7)}
    result = evaluate.evaluate(model, {"gather": plan}, texts, {})
    dense, row = result["rows"]
    assert (dense["form"], dense["ffn_read_share"]) == ("dense", 1.0)
    assert (row["form"], row["active_width_fraction"]) == ("gathered", 1.0)
    assert row["ffn_read_shares"]["random"] == pytest.approx(0.6, abs=0.05)
    assert row["ffn_read_shares"]["one token"] != row["ffn_read_shares"]["random"]
    assert row["ffn_read_share"] == pytest.approx(np.mean(list(row["ffn_read_shares"].values())))
    (where,) = result["where"]
    assert where.startswith("gather: a gain only in decoding few tokens at a time")
