"""The allocation of one budget over layers: the best of all choices, and never worse than the greedy one before it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from moedge import MoEdgeError
from moedge.convert import allocation, budgets
from moedge.convert.allocation import Menu, cheapest


def menus(seed: int, layers: int, ways: int) -> list[Menu]:
    """Random costs and losses, some equal, in no order, some ways beaten by others in both."""
    draw = np.random.default_rng(seed)
    return [Menu(draw.integers(1, 9, ways).astype(float), draw.integers(0, 30, ways) / 7) for _ in range(layers)]


def loss(found: list[int], given: list[Menu]) -> float:
    return sum(float(menu.losses[way]) for way, menu in zip(found, given, strict=True))


def cost(found: list[int], given: list[Menu]) -> float:
    return sum(float(menu.costs[way]) for way, menu in zip(found, given, strict=True))


def test_it_is_the_best_of_all_choices() -> None:
    for seed in range(60):
        given = menus(seed, layers=4, ways=5)
        every = [list(choice) for choice in itertools.product(range(5), repeat=4)]
        least = min(cost(choice, given) for choice in every)
        most = least + np.random.default_rng(seed).uniform(0, 20)
        found = cheapest(given, most)
        best = min(loss(choice, given) for choice in every if cost(choice, given) <= most)
        assert cost(found, given) <= most
        assert loss(found, given) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_exactly_what_there_is_can_be_spent_and_no_less_than_the_cheapest() -> None:
    given = [Menu(np.array([0.1, 0.3]), np.array([2.0, 1.0]))] * 3
    assert cost(cheapest(given, 0.1 + 0.1 + 0.1), given) == pytest.approx(0.3)
    assert cheapest(given, 0.3 + 0.3 + 0.3) == [1, 1, 1]
    with pytest.raises(MoEdgeError, match=r"The budget of 0.2 is less than 0.3"):
        cheapest(given, 0.2)


def greedy(curves: list[np.ndarray], shared: int, widths: list[int], active: int, most_skipped: float) -> list[int]:
    """What ``budget: measured`` did before: convex curves, the largest gains first."""
    routed = len(widths)
    least = max(1, math.ceil(routed - most_skipped * (routed - active)))
    kept = np.round(shared + np.arange(routed + 1) * np.mean(widths)).astype(int)
    gains = [isotonic_regression(-np.diff(curve[kept[least:]]), increasing=False).x for curve in curves]
    flat = np.concatenate(gains)
    layer = np.repeat(np.arange(len(curves)), [len(values) for values in gains])
    step = np.concatenate([np.arange(len(values)) for values in gains])
    best = np.lexsort((layer, step, -flat))[: len(curves) * (active - least)]
    return [int(least + count) for count in np.bincount(layer[best], minlength=len(curves))]


def test_a_wide_layer_has_as_few_ways_as_the_solver_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neuron by neuron. For losses a (D - n)^2 the best n is known: what is skipped is shared out as 1 / a."""
    given: list[int] = []
    own = allocation.cheapest
    spied = lambda menus, most: given.extend(len(menu.costs) for menu in menus) or own(menus, most)  # noqa: E731
    monkeypatch.setattr(allocation, "cheapest", spied)
    width, active, weights = 14336, 10001, np.array([1.0, 2.0, 1.5, 3.0])
    curves = [weight * np.square(np.arange(width, -1, -1.0)) for weight in weights]
    found = budgets.spread(curves, 0, [1] * width, active, most_skipped=3.0)
    assert max(given) <= 258
    assert sum(found) <= 4 * active
    skipped = 4 * (width - active) * (1 / weights) / (1 / weights).sum()
    best = float((weights * skipped**2).sum())
    assert best * (1 - 1e-6) <= sum(float(curve[n]) for curve, n in zip(curves, found, strict=True)) < 1.01 * best
    alike = budgets.spread([curves[0]] * 3, 0, [1] * width, active, most_skipped=3.0)
    assert alike == [active] * 3, "the mean width is one of the ways"


def test_a_spread_is_never_worse_than_the_greedy_one_and_sometimes_better() -> None:
    better = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        falls = draw.exponential(size=(6, 40)) * draw.random((6, 1))  # not convex
        curves = [np.append(one[::-1].cumsum()[::-1], 0.0) for one in falls]
        settings = (curves, 8, [4] * 8, 5, 1.5)
        before, found = greedy(*settings), budgets.spread(*settings)

        def lost(active: list[int], curves: list[np.ndarray] = curves) -> float:
            return sum(float(curve[8 + 4 * count]) for curve, count in zip(curves, active, strict=True))

        assert sum(found) <= 6 * 5
        assert lost(found) <= lost(before) * (1 + 1e-9)
        better += lost(found) < lost(before) * 0.999
    assert better > 5, "curves that are not convex are what it is for"
