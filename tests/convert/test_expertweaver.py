from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moedge import MoEdgeError
from moedge.convert import adapters, calibration, methods, modeling, partition
from moedge.convert.calibration import GateSampling, LayerStatistics
from moedge.convert.methods import METHODS, expertweaver
from moedge.convert.methods.expertweaver import ExpertWeaverParams
from moedge.convert.plan import MoEPlan
from moedge.convert.train.settings import TrainSettings

IDS = torch.arange(2, 34).reshape(2, 16)
# 16 experts of 4 neurons; the median CV tells the layers apart on any model.
SETTINGS = {"experts": 16, "k": 12, "tau_percentile": 50.0}
# With clip="k" one of the three layers of ``plan`` shares everything it runs.
STATIC_K = 8


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def statistics(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> list[LayerStatistics]:
    """Of ``tiny_llama(layers=3)``: 4 windows of 48 tokens, 16 samples of 12."""
    return calibration.collect(tiny_llama(layers=3), token_windows, k_a=6, gate=GateSampling(sample=12))


@pytest.fixture(scope="module")
def plan(tiny_llama: Callable[..., Any], statistics: list[LayerStatistics]) -> MoEPlan:
    return methods.convert("expertweaver", statistics, tiny_llama(layers=3), **SETTINGS)


# --- gate profiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signal", "batch_size"), [("abs", 1), ("signed", 3)])
def test_gate_profiles_are_means_over_the_kept_tokens_of_each_sample(
    signal: calibration.Signal, batch_size: int, tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    ids = np.insert(token_windows[:, 1:], 0, 256, axis=1)
    gates: list[torch.Tensor] = []
    blocks = adapters.ffns(model)
    hooks = [b.module.gate_proj.register_forward_hook(lambda *args: gates.append(args[2])) for b in blocks]
    with torch.no_grad():
        model(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    sampling = GateSampling(sample=16, signal=signal, exclude=(256,))
    layers = calibration.collect(model, ids, k_a=5, batch_size=batch_size, gate=sampling)
    for layer, gate in zip(layers, gates, strict=True):
        active = torch.nn.functional.silu(gate)
        active = active.abs() if signal == "abs" else active
        samples = active.reshape(12, 16, 64).numpy()
        expected = np.stack([s[(0 if i % 3 else 1) :].mean(axis=0) for i, s in enumerate(samples)])
        assert layer.gate_profile is not None
        assert layer.gate_profile.shape == (12, 64)
        # Rounding of the products for another batch shape: 1e-6 of the largest entry.
        np.testing.assert_allclose(layer.gate_profile, expected, atol=2e-6 * np.abs(active.numpy()).max())
    assert all(not block.module.gate_proj._forward_hooks for block in blocks)


def test_gate_profiles_need_samples_that_fit(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    with pytest.raises(MoEdgeError, match="window of 48 tokens cannot be cut into samples of 13"):
        calibration.collect(tiny_llama(), token_windows, k_a=5, gate=GateSampling(sample=13))
    with pytest.raises(MoEdgeError, match="only excluded tokens"):
        calibration.collect(tiny_llama(), token_windows, k_a=5, gate=GateSampling(exclude=tuple(range(256))))


def test_statistics_files_keep_gate_profiles_and_do_not_change_without_them(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray, statistics: list[LayerStatistics], tmp_path: Path
) -> None:
    calibration.save(statistics, tmp_path / "gate")
    for loaded, layer in zip(calibration.load(tmp_path / "gate"), statistics, strict=True):
        assert loaded.gate_sampling == layer.gate_sampling == GateSampling(sample=12)
        np.testing.assert_array_equal(loaded.gate_profile, layer.gate_profile)
        np.testing.assert_array_equal(loaded.top_neurons, layer.top_neurons)
    calibration.save(calibration.collect(tiny_llama(), token_windows, k_a=5), tmp_path / "plain")
    assert b"gate" not in (tmp_path / "plain").read_bytes()[:4096]
    assert calibration.load(tmp_path / "plain")[0].gate_profile is None


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize("alphas", [(0.2, 0.7), (0.0, 1.0), (0.3, 0.3)])
def test_shared_experts_at_the_ends_and_clipped(experts: int, alphas: tuple[float, float]) -> None:
    low, high = alphas
    free = ExpertWeaverParams(experts=experts, k=experts, alpha_min=low, alpha_max=high)
    width = experts * 24
    assert expertweaver.shared_experts(0.0, width, free) == (
        min(round(high * experts), experts - 1),
        round(high * experts),
    )
    assert expertweaver.shared_experts(1.0, width, free)[1] == round(low * experts)
    for clip, limit in (("k-1", 2), ("k", 3)):
        tight = ExpertWeaverParams(experts=experts, k=3, alpha_min=low, alpha_max=max(high, 0.5), clip=clip)
        assert expertweaver.shared_experts(0.0, width, tight)[0] == min(limit, round(max(high, 0.5) * experts))


def test_the_papers_integers() -> None:
    """docs/methods.md 2.2: N_e = 64 gives N_se 13..45, and 35 of 51 to 3 of 19 routed picks at k = 48."""
    settings = ExpertWeaverParams()
    sizes = [expertweaver.shared_experts(share, 18944, settings)[0] for share in (1.0, 0.0)]
    assert [(settings.k - n, settings.experts - n) for n in sizes] == [(35, 51), (3, 19)]


def test_variation_is_the_definition_and_groups_tasks() -> None:
    profile = np.array([[1.0, -1.0], [3.0, -1.0], [5.0, -1.0], [7.0, -1.0]])
    np.testing.assert_allclose(expertweaver.variation(profile, None, 1e-6), [5**0.5 / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(expertweaver.variation(profile, (0, 0, 1, 1), 1e-6), [2 / 4, 0], rtol=1e-6)


@pytest.mark.parametrize(("tau", "at"), [(1e9, 11), (0.0, 3)])
def test_a_layer_configuration_at_its_bounds_is_said_aloud(
    tau: float, at: int, tiny_llama: Callable[..., Any], statistics: list[LayerStatistics]
) -> None:
    with pytest.warns(UserWarning, match=r"every layer hits a bound .*N_se=11.*N_se=3.*tau_percentile"):
        plan = methods.convert("expertweaver", statistics, tiny_llama(layers=3), experts=16, k=12, tau=tau)
    assert plan.provenance["expertweaver"]["n_se"] == [at] * 3
    assert plan.provenance["expertweaver"]["r_l"] == [float(tau == 0)] * 3
    assert "every layer hits a bound" in plan.provenance["expertweaver"]["warning"]


def test_layers_differ_in_what_they_share_and_run_the_same_width(
    plan: MoEPlan, statistics: list[LayerStatistics], tiny_llama: Callable[..., Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods.convert("expertweaver", statistics, tiny_llama(layers=3), **SETTINGS)  # no warning where layers differ
    note = plan.provenance["expertweaver"]
    variations = [expertweaver.variation(s.gate_profile.astype(float), None, 1e-6) for s in statistics]
    assert note["tau"] == pytest.approx(np.median(np.concatenate(variations)))
    assert note["r_l"] == [np.mean(v > note["tau"]).round(6) for v in variations]
    assert len(set(note["n_se"])) > 1
    for layer, facts, n_se in zip(plan.layers, statistics, note["n_se"], strict=True):
        assert (layer.num_experts, layer.top_k) == (16 - n_se, 12 - n_se)
        assert layer.report["n_se"] == n_se
        assert layer.active_width == 48
        assert {len(expert) for expert in layer.experts} == {4}
        np.testing.assert_array_equal(np.sort(np.concatenate([layer.shared, *layer.experts])), np.arange(64))
        mean = facts.gate_profile.mean(axis=0)
        assert mean[layer.shared].min() > mean[np.concatenate(layer.experts)].max()


# --- clustering and router ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_greedy_assignment_takes_the_cheapest_free_pair_first(seed: int) -> None:
    generator = np.random.default_rng(seed)
    widths = [int(width) for width in generator.integers(1, 5, size=4)]
    # Few distinct values, so that ties are common.
    cost = generator.integers(0, 12, size=(sum(widths), 4)).astype(float)
    expected, free = np.full(len(cost), -1), list(widths)
    for _, point, group in sorted((cost[p, g], p, g) for p in range(len(cost)) for g in range(4)):
        if expected[point] < 0 and free[group]:
            expected[point] = group
            free[group] -= 1
    np.testing.assert_array_equal(partition.assign_greedy(cost, widths), expected)
    rows = np.arange(len(cost))
    assert cost[rows, expected].sum() >= cost[rows, partition.assign_balanced(cost, widths)].sum() - 1e-9


@pytest.mark.parametrize("assignment", ["greedy", "lap"])
@pytest.mark.parametrize(("scaling", "init"), [("none", "k-means++"), ("l2", "k-means++"), ("zscore", "k-means++")])
def test_neurons_that_act_together_become_one_expert(assignment: str, scaling: str, init: str) -> None:
    """Five task groups with their own pattern each; scaled profiles find them whatever the neurons' size."""
    generator = np.random.default_rng(3)
    group = generator.permutation(np.repeat(np.arange(5), 6))
    size = 1.0 if scaling == "none" else generator.uniform(1, 9, size=(30, 1))
    points = (np.eye(5).repeat(4, axis=1)[group] + generator.normal(0, 0.02, (30, 20)) + 1) * size
    settings = ExpertWeaverParams(assignment=assignment, scaling=scaling, init=init)
    labels, _, converged = expertweaver.cluster(points, [6] * 5, settings, np.random.default_rng(0))
    assert converged
    assert sorted(len(np.unique(labels[group == g])) for g in range(5)) == [1] * 5


def test_iterations_stop_at_the_limit() -> None:
    points = np.random.default_rng(0).random((40, 6))
    settings = ExpertWeaverParams(max_iters=1)
    labels, iterations, converged = expertweaver.cluster(points, [10] * 4, settings, np.random.default_rng(0))
    assert (iterations, converged) == (1, False)
    assert np.bincount(labels).tolist() == [10] * 4


def test_router_rows_are_mean_gate_rows_and_weights_are_one(plan: MoEPlan, tiny_llama: Callable[..., Any]) -> None:
    for layer, block in zip(plan.layers, adapters.ffns(tiny_llama(layers=3)), strict=True):
        for row, expert in zip(layer.router.tensors["weight"], layer.experts, strict=True):
            np.testing.assert_allclose(row, block.gate[expert].numpy().mean(axis=0), atol=1e-7)
        assert (layer.router.kind, layer.combine) == ("linear", "unit")
        assert not layer.selection_bias.any()


# --- plans ----------------------------------------------------------------------------------------------------------


def test_every_expert_selected_is_the_dense_model(plan: MoEPlan, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=3)
    dense = logits(model)
    modeling.apply(plan, model)
    assert relative(logits(model), dense) > 1e-3  # with k experts something is left out
    for ffn in modeling.sparse_ffns(model):
        ffn.top_k = ffn.num_experts
    assert relative(logits(model), dense) < 1e-5


def test_saved_and_loaded_it_gives_identical_logits(
    plan: MoEPlan, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = modeling.apply(plan, tiny_llama(layers=3))
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "moe")
    loaded, same, _ = modeling.load(tmp_path / "moe")
    assert torch.equal(logits(loaded), logits(model))
    assert same.sha256 == plan.sha256


def test_one_seed_gives_one_plan(
    plan: MoEPlan, tiny_llama: Callable[..., Any], token_windows: np.ndarray, statistics: list[LayerStatistics]
) -> None:
    model = tiny_llama(layers=3)
    again = calibration.collect(model, token_windows, k_a=6, gate=GateSampling(sample=12))
    assert methods.convert("expertweaver", again, model, **SETTINGS).sha256 == plan.sha256
    other = methods.convert("expertweaver", statistics, model, **SETTINGS, seed=1)
    assert [len(layer.shared) for layer in other.layers] == [len(layer.shared) for layer in plan.layers]
    assert other.sha256 != plan.sha256


def test_clip_to_k_makes_a_layer_static(tiny_llama: Callable[..., Any], statistics: list[LayerStatistics]) -> None:
    plan = methods.convert("expertweaver", statistics, tiny_llama(layers=3), **{**SETTINGS, "k": STATIC_K}, clip="k")
    plan.validate()
    for layer, n_se in zip(plan.layers, plan.provenance["expertweaver"]["n_se"], strict=True):
        assert (layer.num_experts == 0) == (n_se == STATIC_K)
        assert layer.active_width == 4 * STATIC_K
    assert 0 < sum(layer.num_experts == 0 for layer in plan.layers) < 3


def test_a_share_of_one_value_is_no_warning_and_a_cut_one_names_alpha() -> None:
    uniform = ExpertWeaverParams(alpha_min=0.5, alpha_max=0.5)
    assert not expertweaver.bound_warning([32, 32], uniform, 0.6)
    assert expertweaver.bound_warning([7, 7], ExpertWeaverParams(k=8), 0.6).endswith("Lower alpha_max.")
    assert not expertweaver.bound_warning([13, 30, 45], ExpertWeaverParams(), 0.6)


def test_uneven_widths_lose_no_neuron(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    model = tiny_llama(width=67)
    facts = calibration.collect(model, token_windows, k_a=6, gate=GateSampling(sample=12))
    with pytest.raises(MoEdgeError, match="67 does not divide into 16"):
        methods.convert("expertweaver", facts, model, **SETTINGS)
    for layer in methods.convert("expertweaver", facts, model, **SETTINGS, padding="uneven").layers:
        np.testing.assert_array_equal(np.sort(np.concatenate([layer.shared, *layer.experts])), np.arange(67))


def test_what_does_not_fit_is_one_sentence(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray, statistics: list[LayerStatistics]
) -> None:
    model = tiny_llama(layers=3)
    with pytest.raises(MoEdgeError, match="3 layers, the model 2"):
        methods.convert("expertweaver", statistics, tiny_llama(), **SETTINGS)
    with pytest.raises(MoEdgeError, match="no gate profile"):
        methods.convert("expertweaver", calibration.collect(model, token_windows, k_a=6), model, **SETTINGS)
    with pytest.raises(MoEdgeError, match=r"signal=abs; the plan needs signal=signed"):
        methods.convert("expertweaver", statistics, model, **SETTINGS, signal="signed")
    with pytest.raises(MoEdgeError, match="tasks names 3 samples, the statistics have 16"):
        methods.convert("expertweaver", statistics, model, **SETTINGS, tasks=(0, 1, 2))
    with pytest.raises(MoEdgeError, match="2 samples or tasks at least"):
        methods.convert("expertweaver", statistics, model, **SETTINGS, tasks=(0,) * 16)


def test_the_registry_makes_it_from_typed_parameters(
    tiny_llama: Callable[..., Any], statistics: list[LayerStatistics]
) -> None:
    method = METHODS["expertweaver"]
    assert method.needs == ("statistics", "gate_profile")
    params = method.params(**SETTINGS).model_dump()
    plan = methods.convert(
        "expertweaver", statistics, tiny_llama(layers=3), **params, source_sha256="ab", provenance={"tokens": 192}
    )
    assert (plan.method, plan.model["sha256"], plan.provenance["tokens"]) == ("expertweaver", "ab", 192)
    assert plan.params == params
    with pytest.raises(ValidationError, match="k: 17 exceeds experts = 16"):
        method.params(experts=16, k=17)
    with pytest.raises(ValidationError, match=r"alpha_min: .* exceeds alpha_max"):
        method.params(alpha_min=0.8)
    with pytest.raises(ValidationError, match="extra"):
        method.params(unknown=1)


# --- downcycling ----------------------------------------------------------------------------------------------------


def test_downcycle_defaults_are_the_papers_layout() -> None:
    assert ExpertWeaverParams(downcycle=True).model_dump() == {
        **ExpertWeaverParams().model_dump(),
        **{"downcycle": True, "k": 16, "alpha_min": 2 / 64, "alpha_max": 2 / 64},
    }
    chosen = ExpertWeaverParams(downcycle=True, experts=16, k=5, alpha_max=0.25)
    assert (chosen.k, chosen.alpha_min, chosen.alpha_max) == (5, 0.25, 0.25)
    for given, says in (
        ({"downcycle": True, "alpha_min": 0.1, "alpha_max": 0.2}, "alpha_min: downcycling"),
        ({"rescale": "selected"}, "rescale: belongs to downcycle"),
    ):
        with pytest.raises(ValidationError, match=says):
            ExpertWeaverParams(**given)


@pytest.mark.parametrize(("rescale", "rule"), [("none", "probability"), ("selected", "softmax")])
def test_downcycle_is_a_softmax_gate_over_uniform_layers(
    rescale: str, rule: str, tiny_llama: Callable[..., Any], statistics: list[LayerStatistics]
) -> None:
    model = tiny_llama(layers=3)
    params = {"experts": 16, "k": 4, "downcycle": True, "rescale": rescale}
    plan = methods.convert("expertweaver", statistics, model, **params)
    assert {layer.combine for layer in plan.layers} == {rule}
    assert {(len(layer.shared), layer.num_experts, layer.top_k) for layer in plan.layers} == {(8, 14, 2)}
    assert plan.provenance["expertweaver"]["training"] == {"balance": "loss", "balance_weight": 0.01}
    modeling.apply(plan, model)
    ffn = modeling.sparse_ffns(model)[1]
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    scores = ffn.router(x)
    indices, weights = torch.ops.moedge.route(scores, None, None, 2, ffn.combine)
    p = torch.softmax(scores, -1).gather(1, indices.long())
    expected = p if rescale == "none" else p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)
    whole = torch.softmax(scores, -1)
    hidden = torch.nn.functional.silu(torch.einsum("th,eih->tei", x, ffn.gate)) * torch.einsum("th,eih->tei", x, ffn.up)
    each = torch.einsum("tei,ehi->teh", hidden, ffn.down)
    mix = torch.zeros_like(whole).scatter(1, indices.long(), expected)
    shared = (torch.nn.functional.silu(x @ ffn.shared_gate.T) * (x @ ffn.shared_up.T)) @ ffn.shared_down.T
    torch.testing.assert_close(ffn(x), shared + torch.einsum("te,teh->th", mix, each), rtol=1e-4, atol=1e-5)


def test_a_downcycled_model_learns_and_its_load_evens_out(
    tiny_llama: Callable[..., Any], statistics: list[LayerStatistics], token_windows: np.ndarray
) -> None:
    from moedge.convert.train import training

    model = tiny_llama(layers=3)
    modeling.apply(methods.convert("expertweaver", statistics, model, experts=16, k=4, downcycle=True), model)
    groups = "router+experts+shared+norms"
    chosen = TrainSettings(
        trainable=groups, tokens=30 * 96, length=48, batch=2, lr=3e-3, router_lr=3e-3, eval_every=10, balance="loss",
        balance_weight=0.3,
    )  # fmt: skip
    curve = training.train(model, token_windows % 64, chosen, held_out={"t": token_windows % 64}).curve
    assert curve[-1]["ppl"]["t"] < 0.7 * curve[0]["ppl"]["t"]
    assert curve[-1]["load_cv"] < 0.8 * curve[1]["load_cv"]
