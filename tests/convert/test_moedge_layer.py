from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moedge.convert import adapters, closed_form, energy, methods, modeling, streaming
from moedge.convert.methods import moedge
from moedge.convert.methods.moedge import layer as moedge_layer
from moedge.convert.plan import LayerPlan
from moedge.convert.streaming import LayerTokens

LAYOUT = {"shared": 2, "active": 3, "experts": 8}
WINDOWS = np.random.default_rng(3).integers(0, 256, size=(10, 48))

MANY = np.random.default_rng(4).integers(0, 256, size=(60, 64))
"""Enough tokens for a fit of 70 unknowns a row to carry over to the held-out ones."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(model: Any, windows: np.ndarray = WINDOWS) -> LayerTokens:
    return next(iter(streaming.walk(model, windows)))


# --- partition ------------------------------------------------------------------------------------------------------


def test_every_half_step_of_the_ascent_captures_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "TOLERANCE", 0.0)
    for seed in range(5):
        # Low-rank, so that neurons have something in common (independent ones stay where they are).
        factors = [torch.rand(300, 5, generator=generator(seed)), torch.rand(5, 24, generator=generator(9 + seed))]
        energies = (factors[0] ** 4 @ factors[1] ** 4).square()
        start = np.random.default_rng(seed).permutation(np.repeat(np.arange(6), 4)).astype(np.int32)
        ascent = energy.ascend(energies, start, [4] * 6, 2, iterations=8)
        assert len(ascent.objective) >= 5
        # float32 sums of 300 * 8 positive terms in different orders: relative error below 2400 * 2^-24 = 1.5e-4.
        assert all(b >= a * (1 - 1.5e-4) for a, b in itertools.pairwise(ascent.objective))
        assert ascent.objective[-1] > ascent.objective[0] * 1.01
        assert np.bincount(ascent.labels).tolist() == [4] * 6
        best = energy.by_expert(energies, ascent.labels, 6).topk(2, dim=1).values.sum()
        assert ascent.objective[-1] == pytest.approx(float(best), rel=1e-5)


def test_an_iteration_that_gains_too_little_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    energies = torch.rand(60, 12, generator=generator()) ** 4
    start = np.repeat(np.arange(4), 3).astype(np.int32)
    steps = []
    for tolerance in (0.0, 10.0):
        monkeypatch.setattr(energy, "TOLERANCE", tolerance)
        steps.append(len(energy.ascend(energies, start, [3] * 4, 1, 8).objective))
    assert steps[0] > 3
    assert steps[1] == 3, "selection, assignment, selection"


def test_reassignment_is_the_best_balanced_one() -> None:
    energies = torch.rand(40, 6, generator=generator())
    mask = closed_form.select(torch.rand(40, 3, generator=generator(1)), 1)
    labels, captured = energy.reassign(energies, mask, [2, 2, 2])
    gain = (energies.T @ mask).numpy()
    every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    assert captured == pytest.approx(max(sum(gain[n, e] for n, e in enumerate(p)) for p in every), rel=1e-6)
    assert np.bincount(labels).tolist() == [2, 2, 2]


def test_groups_that_fire_together_are_found() -> None:
    """4 groups of 5 neurons; a token excites one group. Any start must end at the groups, up to their names."""
    group = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 5))
    active = torch.randint(4, (400,), generator=generator())
    energies = (active[:, None] == torch.from_numpy(group)).float() + 0.01 * torch.rand(400, 20, generator=generator(1))
    labels = energy.ascend(energies, energy.by_correlation(energies, [5] * 4), [5] * 4, 1, 10).labels
    assert len(set(zip(labels.tolist(), group.tolist(), strict=True))) == 4


# --- second moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [5, closed_form._TILE, 3 * closed_form._TILE + 7])
def test_second_moments_are_whole_and_symmetric(features: int) -> None:
    z = torch.randn(300, features, generator=generator(), dtype=torch.float64)
    weight = torch.rand(300, generator=generator(1), dtype=torch.float64)
    moments = closed_form.Moments(features, 2, z.device)
    for rows in (slice(0, 100), slice(100, 300)):
        moments.add(z[rows], z[rows, :2], weight[rows])
    expected = (z * weight[:, None]).T @ z
    torch.testing.assert_close(moments.gram, expected)
    torch.testing.assert_close(moments.cross, expected[:, :2])


# --- router ---------------------------------------------------------------------------------------------------------


def test_router_is_the_closed_form_ridge() -> None:
    x = torch.randn(200, 5, generator=generator()) + 1
    targets = torch.randn(200, 3, generator=generator(1)) + x[:, :3].abs()
    weight = torch.rand(200, generator=generator(2)) + 0.1
    held = torch.arange(200) % 5 == 4
    fit = closed_form.RouterFit(x, weight, held).fit(targets, targets.clamp_min(0), 1, ridges=(0.3,))
    z, w = np.c_[x.numpy(), np.ones(200)].astype(np.float64), weight.numpy().astype(np.float64)
    gram = (z * w[:, None]).T @ z
    penalty = np.full(6, 0.3 * np.diag(gram)[:5].mean())
    penalty[5] = 1e-4 * w.sum()
    expected = np.linalg.solve(gram + np.diag(penalty), (z * w[:, None]).T @ targets.numpy())
    # The same float64 sums in another order, then rounded to float32.
    np.testing.assert_allclose(fit.weight.numpy(), expected[:5].T, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fit.bias.numpy(), expected[5], rtol=1e-6, atol=1e-7)
    assert fit(x).dtype == torch.float32


def test_router_learns_a_linear_score_and_prefers_the_ridge_that_selects_best() -> None:
    x = torch.randn(500, 8, generator=generator())
    truth = x @ torch.randn(8, 4, generator=generator(1)) + torch.tensor([5.0, 6.0, 7.0, 8.0])
    fit = closed_form.RouterFit(x, torch.ones(500), torch.arange(500) % 5 == 0).fit(truth, truth.clamp_min(0), 2)
    assert fit.ridge == min(closed_form.ROUTER_RIDGES)
    assert fit.held_out_share > 0.999
    # A ridge of 1e-4 shrinks scores of size 3 by about 3e-4.
    torch.testing.assert_close(fit(x), truth, atol=5e-3, rtol=0)


def test_calibrated_scores_have_slope_one_on_held_out_tokens() -> None:
    x = torch.randn(500, 8, generator=generator())
    truth = x @ torch.randn(8, 4, generator=generator(1)) + 0.5 * torch.randn(500, 4, generator=generator(2))
    held = torch.arange(500) % 2 == 0
    router = closed_form.RouterFit(x, torch.ones(500), held)
    fit = router.fit(truth, truth.clamp_min(0), 2, ridges=(1.0,))
    scores = router.calibrated(fit, truth)(x[held])
    centred = scores - scores.mean(0)
    slope = (centred * truth[held]).sum(0) / centred.square().sum(0)
    torch.testing.assert_close(slope, torch.ones(4), atol=1e-4, rtol=0)
    assert not torch.allclose(scores, fit(x[held]), atol=0.1)  # a ridge of 1 had halved them


# --- layers ---------------------------------------------------------------------------------------------------------


def output(tokens: LayerTokens, layer: LayerPlan) -> torch.Tensor:
    with torch.no_grad():
        return modeling.build_ffn(tokens.block, layer)(tokens.x)


@pytest.mark.parametrize("partition", ["energy", "correlation", "cmoe"])
def test_all_experts_selected_is_the_dense_ffn(partition: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan = methods.convert("moedge", WINDOWS, model, **LAYOUT, partition=partition, refit=False)
    for block, layer in zip(adapters.ffns(model), plan.layers, strict=True):
        neurons = np.sort(np.concatenate([layer.shared, *layer.experts]))
        np.testing.assert_array_equal(neurons, np.arange(64))
        assert len(layer.shared) == 16
        assert {len(expert) for expert in layer.experts} == {8}
        x = torch.randn(9, 32, generator=generator())
        dense = block.module(x)
        full = modeling.build_ffn(block, replace(layer, top_k=layer.num_experts))(x)
        # float32 sums of 64 products in another order: 64 * 2^-24 = 4e-6 of the largest.
        assert float((full - dense).abs().max() / dense.abs().max()) < 1e-5


def test_shared_neurons_have_the_highest_mean_energy(tiny_llama: Callable[..., Any]) -> None:
    tokens = first(tiny_llama(layers=1))
    w = (tokens.weight / tokens.weight.sum()).double()
    h = tokens.hidden(slice(None)).double()
    expected = (w @ (h - w @ h).square()) * tokens.block.down.double().square().sum(0)
    _, mean_energy, _ = moedge_layer.neuron_energy(tokens)
    torch.testing.assert_close(mean_energy.double(), expected, rtol=1e-4, atol=0)
    layer = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**LAYOUT))
    assert set(layer.shared) == set(expected.argsort(descending=True)[:16].tolist())


@pytest.mark.parametrize("target", ["energy", "root_energy", "norm"])
def test_targets_are_what_they_say(target: str, tiny_llama: Callable[..., Any]) -> None:
    tokens = first(tiny_llama(layers=1))
    mean, _, norms = moedge_layer.neuron_energy(tokens)
    experts = [np.array([3, 9, 40]), np.array([1, 2])]
    loss = moedge_layer.Loss(tokens, np.array([1, 2, 3, 5, 9, 40]), mean, norms, None)
    targets, gains = moedge_layer._expert_targets(tokens, experts, loss, target)
    h = tokens.hidden(slice(None)) - mean
    for e, expert in enumerate(experts):
        energies = (h[:, expert].square() * norms[expert]).sum(1)
        norm = (h[:, expert] @ tokens.block.down[:, expert].T).norm(dim=1)
        expected = {"energy": energies, "root_energy": energies.sqrt(), "norm": norm}[target]
        torch.testing.assert_close(targets[:, e], expected, rtol=1e-4, atol=1e-5)
        worth = norm.square() if target == "norm" else energies
        torch.testing.assert_close(gains[:, e], worth * tokens.weight, rtol=1e-4, atol=1e-5)


def test_loss_about_the_shared_neurons_is_what_they_cannot_predict(tiny_llama: Callable[..., Any]) -> None:
    tokens = first(tiny_llama(layers=1), MANY)
    mean, _, norms = moedge_layer.neuron_energy(tokens)
    shared, rest = np.arange(20), np.arange(20, 64)
    plain, predicted = (moedge_layer.Loss(tokens, rest, mean, norms, given) for given in (None, shared))
    everything = slice(None)
    residual, h = predicted(everything).double(), tokens.hidden(everything).double()
    assert predicted.energy(everything).sum() < 0.97 * plain.energy(everything).sum()
    # Normal equations: up to the small ridge, no shared neuron is left with a say in what remains.
    w = tokens.weight.double()[:, None]
    centred = h[:, shared] - mean.double()[shared]
    left, before = ((centred * w).T @ value for value in (residual, h[:, rest] - mean.double()[rest]))
    assert float(left.norm() / before.norm()) < 0.02
    torch.testing.assert_close(plain(everything), (h[:, rest] - mean.double()[rest]).float())


@pytest.mark.parametrize("compensation", ["mean", "unselected"])
def test_compensation_is_exact_when_experts_are_constant(compensation: str, tiny_llama: Callable[..., Any]) -> None:
    """With one and the same input everywhere, an expert left out is its mean: nothing is lost."""
    tokens = first(tiny_llama(layers=1))
    same = tokens.x[:1].expand(tokens.count, -1).contiguous()
    tokens = LayerTokens(tokens.block, same, tokens.weight, tokens.held)
    params = {**LAYOUT, "refit": False}
    layer = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**params, compensation=compensation))
    dense = tokens.target(slice(None))
    # float32 means over 480 equal rows and sums of 64 products.
    assert float((output(tokens, layer) - dense).abs().max() / dense.abs().max()) < 1e-5
    bare = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**params, compensation="none"))
    assert float((output(tokens, bare) - dense).abs().max() / dense.abs().max()) > 1e-3


def test_unselected_compensation_is_the_mean_where_the_expert_is_left_out(tiny_llama: Callable[..., Any]) -> None:
    tokens = first(tiny_llama(layers=1))
    params = moedge.MoEdgeParams(**LAYOUT, refit=False, token_weight="none")
    layer = moedge_layer.make_layer(tokens, params)
    _, omitted = closed_form.gates(tokens.x, layer, "silu")
    h, down = tokens.hidden(slice(None)), tokens.block.down
    assert layer.compensation is not None
    for e, expert in enumerate(layer.experts):
        expected = h[omitted[:, e] > 0][:, expert].mean(0) @ down[:, expert].T
        torch.testing.assert_close(torch.from_numpy(layer.compensation[e]), expected, rtol=1e-4, atol=1e-5)


def weighted_loss(tokens: LayerTokens, layer: LayerPlan, rows: torch.Tensor) -> float:
    missed = (tokens.target(slice(None)) - output(tokens, layer)).double().square().sum(1)
    return float((missed * tokens.weight.double())[rows].sum())


@pytest.mark.parametrize("compensation", ["none", "unselected"])
def test_refit_is_never_worse_on_what_it_was_fitted_to(
    compensation: str, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = torch.ones(MANY.size, dtype=torch.bool)
    for seed in range(3):
        tokens = first(tiny_llama(layers=1, seed=seed), MANY)
        plain = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**LAYOUT, refit=False, compensation=compensation))
        before = weighted_loss(tokens, plain, everything)
        for ridge in (1e-5, 1e-2, 100.0):
            monkeypatch.setattr(closed_form, "REFIT_RIDGES", (ridge,))
            layer = closed_form.refit(tokens, plain)
            assert layer.report["refit"]["ridge"] == ridge
            assert weighted_loss(tokens, layer, everything) < before
        moved = np.abs(layer.down - tokens.block.down.numpy()).max()
        assert 0 < moved < 0.1 * float(tokens.block.down.abs().max())
        # the routing is what it was
        assert all(np.array_equal(a, b) for a, b in zip(layer.experts, plain.experts, strict=True))


def test_refit_is_the_ridge_regression_on_the_routed_activations(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = first(tiny_llama(layers=1), MANY)
    plain = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**LAYOUT, refit=False))
    monkeypatch.setattr(closed_form, "REFIT_RIDGES", (0.1,))
    layer = closed_form.refit(tokens, plain)
    _, omitted = closed_form.gates(tokens.x, plain, "silu")
    assert (omitted.sum(1) == 3).all()
    h = tokens.hidden(slice(None)).clone()
    for e, expert in enumerate(plain.experts):
        h[:, expert] *= 1 - omitted[:, e : e + 1]
    z, w = np.c_[h.numpy(), omitted.numpy()].astype(np.float64), tokens.weight.numpy().astype(np.float64)
    anchor = np.r_[tokens.block.down.T.numpy(), plain.compensation].astype(np.float64)
    gram = (z * w[:, None]).T @ z
    penalty = np.r_[np.full(64, 0.1 * np.diag(gram)[:64].mean()), np.full(6, 1e-4 * w.sum())]
    y = tokens.target(slice(None)).numpy().astype(np.float64)
    expected = anchor + np.linalg.solve(gram + np.diag(penalty), (z * w[:, None]).T @ (y - z @ anchor))
    # float32 products (2^-24 of sums of 480 terms) over a smallest eigenvalue of 0.1 of the mean one.
    np.testing.assert_allclose(layer.down.T, expected[:64], atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(layer.compensation, expected[64:], atol=2e-4 * np.abs(expected).max())


def test_refit_declines_when_it_would_not_help(tiny_llama: Callable[..., Any]) -> None:
    """Targets on the held-out windows point the other way: what the fit learns makes them worse."""
    tokens = first(tiny_llama(layers=1), MANY)
    plain = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**LAYOUT, refit=False))
    missing = tokens.target(slice(None)) - output(tokens, plain)
    tokens.shift = torch.where(tokens.held[:, None], -2 * missing, 0.0)
    layer = closed_form.refit(tokens, plain)
    assert layer.report["refit"]["ridge"] is None
    assert layer.down is None
    assert layer.compensation is plain.compensation
    tokens.shift = None
    assert closed_form.refit(tokens, plain).down is not None  # without the trick there is something to gain


def test_relative_error_is_on_held_out_tokens(tiny_llama: Callable[..., Any]) -> None:
    tokens = first(tiny_llama(layers=1))
    for layer in (
        moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**LAYOUT)),
        LayerPlan(np.arange(0, 64, 2, dtype=np.int32), [], 0, output_bias=np.full(32, 0.1, np.float32)),
    ):
        w = tokens.weight.double()[tokens.held]
        target = tokens.target(slice(None))[tokens.held].double().square().sum(1)
        expected = weighted_loss(tokens, layer, tokens.held) / float((w * target).sum())
        assert closed_form.relative_error(tokens, layer) == pytest.approx(expected, rel=1e-4)


def test_gates_follow_the_converted_ffn(tiny_llama: Callable[..., Any]) -> None:
    """Weights of the rule, and the selection bias counts."""
    tokens = first(tiny_llama(layers=1))
    layer = moedge_layer.make_layer(tokens, moedge.MoEdgeParams(**LAYOUT, refit=False, compensation="none"))
    draw = np.random.default_rng(0).normal(size=6).astype(np.float32)
    layer = replace(layer, combine="scaled", scale=draw, selection_bias=draw * 3)
    weights, omitted = closed_form.gates(tokens.x, layer, "silu")
    h = tokens.hidden(slice(None)).clone()
    for e, expert in enumerate(layer.experts):
        h[:, expert] *= weights[:, e : e + 1]
    torch.testing.assert_close(output(tokens, layer), h @ tokens.block.down.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(omitted, (weights == 0).float())
