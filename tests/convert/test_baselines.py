"""Baselines as methods and as controls: LLaMA-MoE, MoEfication, Wanda, FLAP, static mask, neuron-level top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moedge.convert import adapters, budgets, calibration, methods, modeling, ops, partition, routers
from moedge.convert.methods import METHODS, baselines
from moedge.convert.methods.baselines import splits
from moedge.convert.plan import LayerPlan, MoEPlan

X = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
EXACT = {"atol": 2e-5, "rtol": 1e-5}
"""float32 sums of 64 products of size ~1: 64 * 2^-24 = 4e-6."""


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


def hidden(block: adapters.FFN, x: torch.Tensor = X) -> torch.Tensor:
    return F.silu(x @ block.gate.T) * (x @ block.up.T)


def make(name: str, data: Any, model: Any, **params: Any) -> MoEPlan:
    plan = methods.convert(name, data, model, **params)
    plan.validate()
    return plan


@pytest.fixture(scope="module")
def data(model: Any, token_windows: np.ndarray) -> dict[str, Any]:
    """What each of the methods reads."""
    statistics = calibration.collect(model, token_windows, k_a=6)
    return {"statistics": statistics, "tokens": token_windows, "nothing": None}


ROUTED = [
    ("llamamoe", "nothing", {"split": "random"}),
    ("llamamoe", "nothing", {"split": "clustering"}),
    ("moefication", "tokens", {"router": "mlp", "epochs": 3}),
    ("moefication", "tokens", {"router": "centre"}),
    ("moefication", "tokens", {"router": "representative", "compensation": "mean"}),
]


@pytest.mark.parametrize(("name", "reads", "params"), ROUTED)
def test_a_split_is_a_balanced_partition_and_exact_with_all_experts(
    name: str, reads: str, params: dict[str, Any], model: Any, data: dict[str, Any]
) -> None:
    plan = make(name, data[reads], model, experts=8, active=5, **params)
    assert plan.sha256 == make(name, data[reads], model, experts=8, active=5, **params).sha256
    for block, layer in zip(adapters.ffns(model), plan.layers, strict=True):
        assert [len(expert) for expert in layer.experts] == [8] * 8
        np.testing.assert_array_equal(np.sort(np.concatenate(layer.experts)), np.arange(64))
        full = modeling.build_ffn(block, replace(layer, top_k=8))
        torch.testing.assert_close(full(X), block.module(X), **EXACT)


def test_other_seeds_give_other_splits(model: Any) -> None:
    for split in ("random", "clustering"):
        assert len({make("llamamoe", None, model, split=split, seed=seed).sha256 for seed in (0, 1)}) == 2


@pytest.mark.parametrize(("name", "weight"), [("llamamoe", "up_proj"), ("moefication", "gate_proj")])
def test_clustering_finds_planted_groups_of_unequal_length_rows(
    name: str, weight: str, tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    generator = np.random.default_rng(1)
    planted = generator.permutation(np.repeat(np.arange(4), 16))
    for layer in model.model.layers:
        rows = np.eye(4, 32)[planted] + 0.01 * generator.standard_normal((64, 32))
        rows *= generator.uniform(0.5, 2, (64, 1))  # only the direction counts
        getattr(layer.mlp, weight).weight.copy_(torch.from_numpy(rows).float())
    more = {"split": "clustering"} if name == "llamamoe" else {"router": "centre"}
    # Plain K-means finds the planted groups from most starts; one of a few seeds is enough.
    plans = [make(name, token_windows, model, experts=4, active=2, seed=seed, **more) for seed in range(4)]
    for index in range(2):
        groups = [{frozenset(planted[e].tolist()) for e in plan.layers[index].experts} for plan in plans]
        assert {frozenset({group}) for group in range(4)} in groups


def test_llamamoe_softmax_weights_are_the_published_scale(model: Any) -> None:
    plan = make("llamamoe", None, model, experts=4, active=2, weights="softmax")
    layer, block = plan.layers[0], adapters.ffns(model)[0]
    gate = {name: torch.from_numpy(value) for name, value in layer.router.tensors.items()}
    scores = torch.tanh(X @ gate["first"].T) @ gate["second"].T
    values, chosen = scores.topk(2, dim=1)
    h, weights = hidden(block), values.softmax(dim=1)
    y = torch.zeros_like(X)
    for e, expert in enumerate(layer.experts):
        share = (weights * (chosen == e)).sum(dim=1, keepdim=True)
        y += share * (4 / 2) * (h[:, expert] @ block.down[:, expert].T)
    torch.testing.assert_close(modeling.build_ffn(block, layer)(X), y, **EXACT)


def test_moefication_router_learns_the_mass_of_the_experts(model: Any, data: dict[str, Any]) -> None:
    plan = make("moefication", data["tokens"], model, experts=8, active=3)
    for layer in plan.layers:
        before, after = layer.report["router"]["held_out_mass_of_oracle"]
        assert before < after <= 1
    # The kind normalises x: its scores do not change with the length of x.
    router = routers.from_plan(plan.layers[0].router, 8, 32, "silu")
    torch.testing.assert_close(router(X), router(3 * X))


def test_mean_compensation_is_the_mean_output_of_an_expert(model: Any, data: dict[str, Any]) -> None:
    plan = make("moefication", data["tokens"], model, experts=8, active=3, router="centre", compensation="mean")
    for block, layer, facts in zip(adapters.ffns(model), plan.layers, data["statistics"], strict=True):
        for expert, given in zip(layer.experts, layer.compensation, strict=True):
            expected = block.down.numpy()[:, expert] @ facts.mean[expert]
            np.testing.assert_allclose(given, expected, atol=1e-5)


def test_wanda_keeps_the_largest_weight_times_activation_norm(model: Any, token_windows: np.ndarray) -> None:
    statistics = calibration.collect(model, token_windows, k_a=6)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, i=i: seen[i].append(args[0][0]))
        for i, layer in enumerate(model.model.layers)
    ]
    for window in token_windows:
        model(torch.from_numpy(window)[None])
    for handle in handles:
        handle.remove()
    plan = make("wanda", statistics, model, keep=0.7)
    for index, (block, layer) in enumerate(zip(adapters.ffns(model), plan.layers, strict=True)):
        # Wanda as released: |W| * |x_j| for every weight, then the mean over the rows.
        score = (block.down.abs() * torch.cat(seen[index]).norm(dim=0)).mean(dim=0)
        assert set(layer.shared.tolist()) == set(score.topk(round(0.7 * 64)).indices.tolist())


def test_static_methods_equal_the_controls_of_the_same_width(
    model: Any, data: dict[str, Any], make_plan: Callable[..., Any]
) -> None:
    tested, _ = make_plan(model)  # 5 of 8 experts run
    facts, tokens = data["statistics"], data["tokens"]
    pairs = [
        (make("atopk", facts, model, keep=5 / 8, k_a=6), baselines.static_mask(tested, facts)),
        (make("wanda", facts, model, keep=5 / 8), baselines.wanda(tested, facts, model)),
        (make("flap", tokens, model, keep=5 / 8), baselines.flap(tested, facts, model)),
    ]
    for method, control in pairs:
        for own, other in zip(method.layers, control.layers, strict=True):
            np.testing.assert_array_equal(own.shared, other.shared)
            assert (own.output_bias is None) == (other.output_bias is None)
            if own.output_bias is not None:
                np.testing.assert_allclose(own.output_bias, other.output_bias, atol=1e-5)


def test_flap_spreads_its_width_by_measured_cost(model: Any, data: dict[str, Any]) -> None:
    tokens = data["tokens"]
    plan = make("flap", tokens, model, keep=0.5, budget="measured", budget_tokens=4 * tokens.shape[1])
    widths = [len(layer.shared) for layer in plan.layers]
    curves = budgets.calibration_curves(model, tokens, 4 * tokens.shape[1])

    def cost(kept: list[int]) -> float:
        return sum(float(curve[width]) for curve, width in zip(curves, kept, strict=True))

    assert len(widths) * 31 <= sum(widths) <= len(widths) * 32, "the budget is honoured, and used"
    assert min(widths) >= 64 - 1.5 * 32  # most_skipped
    assert cost(widths) < cost([32] * len(widths))
    one, two = sorted(range(len(widths)), key=lambda index: widths[index])[:: len(widths) - 1]
    for step in (1, 4):  # no exchange of neurons between two layers is better
        other = [width + step * ((index == one) - (index == two)) for index, width in enumerate(widths)]
        assert cost(other) >= cost(widths)


def test_controls_cut_the_shared_block_into_experts_of_the_same_width(model: Any) -> None:
    whole = np.arange(64, dtype=np.int32)
    routed = LayerPlan(whole[:16], np.split(whole[16:], 6), 2)
    plan = MoEPlan("any", {}, adapters.describe(model), [routed, LayerPlan(whole[:40], [], 0)])
    assert splits.layouts(plan) == [([8] * 8, 4), ([8] * 8, 5)]


def test_neuron_top_k_keeps_the_neurons_with_the_largest_output(model: Any, make_plan: Callable[..., Any]) -> None:
    tested, _ = make_plan(model)
    for block, layer in zip(adapters.ffns(model), baselines.neuron_top_k(tested).layers, strict=True):
        assert layer.active_width == 40
        h = hidden(block)
        kept = (h.abs() * block.down.norm(dim=0)).topk(40, dim=1).indices
        mask = torch.zeros_like(h).scatter_(1, kept, 1)
        torch.testing.assert_close(modeling.build_ffn(block, layer)(X), (h * mask) @ block.down.T, **EXACT)


@pytest.mark.parametrize("top_k", [1, 7, 24])
def test_experts_of_one_neuron_compute_what_grouped_experts_do(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(24, 1, 32, generator=generator) for _ in range(2))
    down, compensation = torch.randn(24, 32, 1, generator=generator), torch.randn(24, 32, generator=generator)
    indices = torch.rand(50, 24, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    weights = torch.rand(50, top_k, generator=generator)
    for given in (None, compensation):
        rows, offsets, inverse = ops.dispatch(X, indices, 24)
        rows = ops.grouped_linear(ops.grouped_glu(rows, offsets, gate, up, "silu"), offsets, down)
        expected = ops.combine(rows, inverse, indices, weights, given)
        found = ops.sparse_glu(X, indices, weights, gate, up, down, given, "silu")
        # Sums of 24 products of size up to ~100 in two orders: 24 * 100 * 2^-24 = 1.4e-4.
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "params", "sentence"),
    [("llamamoe", {"experts": 4, "active": 5}, "active: 5 exceeds"), ("flap", {"keep": 0.0}, "greater than 0")],
)
def test_impossible_parameters_are_refused(name: str, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        METHODS[name].params(**params)


def test_statistics_of_another_kind_are_refused(model: Any, data: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="Calibrate again"):
        make("atopk", data["statistics"], model, k_a=9)
    with pytest.raises(Exception, match="calibrate this model"):
        make("wanda", data["statistics"][:1], model)


def test_a_narrow_ffn_keeps_at_least_one_neuron() -> None:
    assert [partition.kept_width(64, keep) for keep in (1e-6, 0.5, 1.0)] == [1, 32, 64]
