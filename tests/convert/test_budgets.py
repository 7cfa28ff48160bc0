"""Budgets: the estimated cost of skipping neurons is the measured one, and the spread over layers is the best."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moedge.convert import adapters, backward, budgets, modeling, partition
from moedge.convert.plan import LayerPlan

WINDOWS = np.random.default_rng(5).integers(0, 256, size=(8, 32))


def measured_kl(model: Any, index: int, kept: int) -> float:
    """KL(dense || one layer pruned by FLAP on WINDOWS), nats a token."""
    ids = torch.from_numpy(WINDOWS)
    block = adapters.ffns(model)[index]
    inputs: list[torch.Tensor] = []
    handle = block.module.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    dense = model(ids).logits.log_softmax(-1)
    handle.remove()
    h = block.hidden(inputs[0]).double().numpy()
    neurons, bias = partition.flap(block.down.numpy(), h.mean(axis=0), h.var(axis=0), kept)
    replacement = modeling.build_ffn(block, LayerPlan(neurons, [], 0, output_bias=bias))
    model.set_submodule(block.name, replacement)
    pruned = model(ids).logits.log_softmax(-1)
    model.set_submodule(block.name, block.module)
    return float((dense.exp() * (dense - pruned)).sum(-1).double().mean())


@torch.no_grad()
def test_the_estimate_is_the_measured_cost(tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For small changes; the estimate draws tokens, so its mean over draws is compared within four standard errors.

    A tenth of the cost is allowed for what the estimate leaves out: errors at two tokens together, and the third order
    (with three quarters of a layer left out it is a third too low).
    """
    model = tiny_llama(layers=3)
    draws = []
    for seed in range(24):
        monkeypatch.setattr(backward, "SEED", seed)
        draws.append(budgets.loss_curves(model, WINDOWS))
    for index, kept in itertools.product(range(3), (48, 56, 60)):
        estimates = np.array([curves[index][kept] for curves in draws])
        true = measured_kl(model, index, kept)
        error = estimates.std(ddof=1) / len(estimates) ** 0.5
        assert estimates.mean() == pytest.approx(true, abs=4 * error + 0.1 * true)
        assert 4 * error < 0.5 * true  # otherwise the line above would prove nothing
    for curves in draws:
        assert all(len(curve) == 65 and curve[-1] == 0 for curve in curves)


def test_the_measurement_leaves_the_model_as_it_was(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().requires_grad_(True)
    first = budgets.loss_curves(model, WINDOWS[:2])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for a, b in zip(first, budgets.loss_curves(model, WINDOWS[:2]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_spread_is_the_cheapest_of_all() -> None:
    """Against every possible spread, for convex curves."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        curves = [np.append(np.sort(draw.random(6)).cumsum()[::-1], 0.0) for _ in range(3)]
        found = budgets.spread(curves, 0, [1] * 6, 3, most_skipped=5.0 / 3)

        def cost(active: tuple[int, ...], curves: list[np.ndarray] = curves) -> float:
            return sum(curve[count] for curve, count in zip(curves, active, strict=True))

        every = [choice for choice in itertools.product(range(1, 7), repeat=3) if sum(choice) == 9]
        assert sum(found) == 9
        assert cost(tuple(found)) == pytest.approx(min(map(cost, every)))


def test_no_layer_skips_more_than_allowed() -> None:
    flat, steep = np.zeros(65), np.linspace(9, 0, 65)
    assert budgets.spread([flat, steep], 16, [8] * 6, 4, most_skipped=1.5) == [3, 5]
    assert budgets.spread([flat, steep], 16, [8] * 6, 4, most_skipped=1.0) == [4, 4]
    assert budgets.spread([flat, steep], 16, [8] * 6, 4, most_skipped=9.0) == [1, 6], "what costs nothing is left out"
