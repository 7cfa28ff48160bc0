from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moedge import MoEdgeError
from moedge.convert import adapters, methods, partition
from moedge.convert.methods import METHODS

LAYOUT = {"shared": 2, "active": 3, "experts": 8}


@pytest.mark.parametrize("params", [{}, {"profile": "normalised", "distance": "l1", "score": "abs", "max_iters": 1}])
def test_partition_uses_every_neuron_once(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any], params: dict[str, Any]
) -> None:
    plan, statistics = make_plan(tiny_llama(), **params)
    for layer, facts in zip(plan.layers, statistics, strict=True):
        neurons = np.concatenate([layer.shared, *layer.experts])
        np.testing.assert_array_equal(np.sort(neurons), np.arange(64))
        assert len(layer.shared) == 16
        assert {len(expert) for expert in layer.experts} == {8}
        assert layer.active_width == (2 + 3) * 8
        # The shared block holds the most active neurons; sets are sorted, so equal sets are equal arrays.
        rest = np.concatenate(layer.experts)
        assert facts.counts[layer.shared].min() >= facts.counts[rest].max()
        for group in (layer.shared, *layer.experts):
            assert (np.diff(group) > 0).all()


def test_representatives_belong_to_their_experts_and_carry_their_rows(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    for layer, block in zip(plan.layers, adapters.ffns(model), strict=True):
        neurons = layer.report["representatives"]
        assert all(neuron in expert for neuron, expert in zip(neurons, layer.experts, strict=True))
        np.testing.assert_array_equal(layer.router.tensors["gate"], block.gate[neurons].numpy())
        np.testing.assert_array_equal(layer.router.tensors["up"], block.up[neurons].numpy())
        assert layer.combine == "unit"
        assert not layer.selection_bias.any()


def test_normalised_profile_has_unit_router_rows(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    plan, _ = make_plan(tiny_llama(), profile="normalised")
    # float32 division: each entry is off by 2^-24 of itself, so is the norm.
    np.testing.assert_allclose(np.linalg.norm(plan.layers[0].router.tensors["gate"], axis=1), 1, atol=2e-7)


def test_a_neuron_of_zeros_has_a_router_row_of_zeros(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    """Pruned neurons mark nothing and lie nearest to many centres; their rows have no length to divide by."""
    model = tiny_llama()
    for block in adapters.ffns(model):
        block.gate[30:] = block.up[30:] = 0
    plan, _ = make_plan(model, profile="normalised", k_a=3)
    rows = np.concatenate([layer.router.tensors["gate"] for layer in plan.layers])
    lengths = np.linalg.norm(rows, axis=1)
    assert (lengths == 0).any()
    np.testing.assert_allclose(lengths[lengths > 0], 1, atol=2e-7)


def test_router_is_exact_when_experts_are_identical_neurons(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any], token_windows: np.ndarray
) -> None:
    """8 groups of 8 copies of one neuron: each group becomes an expert and its representative ranks like its mass."""
    model = tiny_llama(layers=1)
    block = adapters.ffns(model)[0]
    group = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 8))
    seeds = torch.from_numpy(np.array([np.flatnonzero(group == g)[0] for g in group]))
    for name in ("gate_proj", "up_proj"):
        weight = getattr(block.module, name).weight
        weight.copy_(weight[seeds].clone())
    # Copies tie for a token's top neurons, whole groups at a time: k_a is two groups.
    plan, _ = make_plan(model, k_a=16, shared=0, score="abs")
    experts = [np.unique(group[expert]) for expert in plan.layers[0].experts]
    assert sorted(int(groups[0]) for groups in experts) == list(range(8))
    assert all(len(groups) == 1 for groups in experts)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    h = torch.nn.functional.silu(x @ block.gate.T) * (x @ block.up.T)
    mass = torch.stack([h[:, expert].abs().sum(dim=1) for expert in plan.layers[0].experts], dim=1)
    router = plan.layers[0].router
    gate, up = (torch.from_numpy(router.tensors[name]) for name in ("gate", "up"))
    scores = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs()
    assert torch.equal(scores.argsort(dim=1), mass.argsort(dim=1))


def test_dead_neurons_are_reported(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    dead = np.arange(0, 64, 4)
    adapters.ffns(model)[0].module.up_proj.weight[torch.from_numpy(dead)] = 0
    plan, statistics = make_plan(model)
    counts = statistics[0].counts
    assert not counts[dead].any()
    assert plan.layers[0].report["dead_share"] == np.mean(counts == 0) >= 0.25


def test_equal_inputs_give_equal_plans(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    assert make_plan(tiny_llama())[0].sha256 == make_plan(tiny_llama())[0].sha256
    assert make_plan(tiny_llama())[0].sha256 != make_plan(tiny_llama(seed=1))[0].sha256


def test_indivisible_width(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama(width=66)
    with pytest.raises(MoEdgeError, match="66 does not divide into 8"):
        make_plan(model)
    plan, _ = make_plan(model, padding="uneven")
    layer = plan.layers[0]
    np.testing.assert_array_equal(np.sort(np.concatenate([layer.shared, *layer.experts])), np.arange(66))
    assert sorted(map(len, layer.experts)) == [8, 8, 8, 8, 9, 9]


def test_statistics_of_other_settings_are_refused(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama()
    _, statistics = make_plan(model)
    with pytest.raises(MoEdgeError, match=r"k_a=6, profile=raw.*asks for k_a=7"):
        methods.convert("cmoe", statistics, model, **LAYOUT, k_a=7)
    with pytest.raises(MoEdgeError, match="1 layers, the model 2"):
        methods.convert("cmoe", statistics[:1], model, **LAYOUT, k_a=6)
    with pytest.raises(MoEdgeError, match="active: 7 active experts cannot be chosen: 8 experts minus 2 shared"):
        methods.convert("cmoe", statistics, model, shared=2, active=7, experts=8, k_a=6)


def test_typed_parameters_refuse_nonsense() -> None:
    params = METHODS["cmoe"].params
    assert params(**LAYOUT).model_dump().items() >= LAYOUT.items()
    with pytest.raises(ValidationError, match="active: 6 active experts cannot be chosen"):
        params(shared=6, active=6, experts=8)
    with pytest.raises(ValidationError, match="extra"):
        params(**LAYOUT, unknown=1)


def test_the_registry_makes_a_valid_plan_from_typed_parameters(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama()
    _, statistics = make_plan(model)
    params = METHODS["cmoe"].params(**LAYOUT, k_a=6).model_dump()
    plan = methods.convert("cmoe", statistics, model, **params, source_sha256="ab", provenance={"tokens": 192})
    plan.validate()
    assert (plan.method, plan.model["sha256"], plan.provenance) == ("cmoe", "ab", {"tokens": 192})
    assert plan.params == params


def test_a_variant_is_the_four_choices_of_that_version_and_the_plan_writes_them_out(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    chosen = {"profile": "normalised", "distance": "l1", "score": "abs", "max_iters": 1}
    one, _ = make_plan(tiny_llama(), **chosen)
    params = METHODS["cmoe"].params(**LAYOUT, k_a=one.params["k_a"], variant="released").model_dump()
    assert {name: params[name] for name in chosen} == chosen
    statistics = make_plan(tiny_llama(), **chosen)[1]
    two = methods.convert("cmoe", statistics, tiny_llama(), **params)
    three = methods.convert("cmoe", statistics, tiny_llama(), **LAYOUT, k_a=one.params["k_a"], variant="released")
    assert two.params == three.params == {**one.params, "variant": "released"}
    for layer, other in zip(one.layers, two.layers, strict=True):
        np.testing.assert_array_equal(layer.shared, other.shared)
        assert layer.report == other.report
    # What is given wins over the variant, and the paper is the default.
    assert METHODS["cmoe"].params(variant="released", max_iters=5).max_iters == 5
    assert METHODS["cmoe"].params() == METHODS["cmoe"].params(variant="paper", profile="raw", distance="l2")
    assert METHODS["cmoe-hierarchical"].params(variant="released").distance == "l1"


def test_more_iterations_never_leave_a_group_unbalanced(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    for max_iters in (1, 2, 20):
        plan, _ = make_plan(tiny_llama(), max_iters=max_iters)
        for layer in plan.layers:
            assert layer.report["iterations"] <= max_iters
            _, widths = partition.group_widths(64, 2, 8)
            assert [len(expert) for expert in layer.experts] == widths
