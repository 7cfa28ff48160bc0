"""One price for milliseconds: against the price for weights, against all choices, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from moedge import MoEdgeError
from moedge.convert import costs, gather, methods
from moedge.convert.costs import Product
from moedge.convert.gather import Ladder
from moedge.convert.kept_inputs import Reader

KEPT = [0.25, 0.5, 0.75, 1.0]


def ladder(inputs: int, outputs: int, seed: int, layer: int = 0) -> Ladder:
    """Values of a place of these sizes, some larger than others."""
    linear = nn.Linear(inputs, outputs, bias=False)
    values = np.abs(np.random.default_rng(seed).standard_normal(4000)) * (1 + seed)
    steps = np.quantile(values, np.linspace(0, 1, 1001))
    return Ladder(Reader("h", layer, linear, (linear,)), np.ones(inputs, np.float32), steps)


def product(inputs: int, outputs: int, ms: list[float]) -> Product:
    return Product(inputs=inputs, outputs=outputs, kept=KEPT, ms=ms)


def test_milliseconds_in_step_with_weights_give_the_price_of_weights() -> None:
    steps = [ladder(8, 6, 0), ladder(12, 40, 1, 1)]
    products = [product(k, n, [k * n * share for share in KEPT]) for k, n in ((8, 6), (12, 40))]
    for level in (0.01, 0.05, 0.1, 0.2):
        wanted = gather.cuts(steps, level)
        found = costs.cuts(steps, products, level)
        for one, cut, other in zip(steps, found, wanted, strict=True):
            assert one.kept(cut) == pytest.approx(one.kept(other), abs=1.5e-3)  # a step of the ladder, rounded


@pytest.mark.parametrize("level", [0.05, 0.3, 1.0, 3.0])
def test_no_other_shares_are_worth_more(level: float) -> None:
    """Every pair of shares on the ladder, with a KL that is counted from values and a time read off by hand."""
    steps = [ladder(8, 6, 0), ladder(12, 40, 1, 1)]
    products = [product(8, 6, [0.4, 0.7, 0.9, 0.8]), product(12, 40, [1.0, 1.5, 2.5, 4.0])]
    quantiles = np.linspace(0, 1, 1001)

    def parts(one: Ladder, ms: list[float]) -> np.ndarray:
        middle = (one.steps[1:] ** 2 + one.steps[:-1] ** 2) / 2
        lost = np.array([one.place.inputs / 2 * middle[:count].sum() / 1000 for count in range(1001)])
        return lost + level**2 / 2 * np.interp(1 - quantiles, [0, *KEPT], [0, *ms])

    tables = [parts(one, curve.ms) for one, curve in zip(steps, products, strict=True)]
    best = min(sum(pair) for pair in itertools.product(*(table[::20] for table in tables)))
    chosen = [
        table[int(np.searchsorted(one.steps, cut))]
        for one, table, cut in zip(steps, tables, costs.cuts(steps, products, level), strict=True)
    ]
    assert sum(chosen) <= best + 1e-12


def test_what_saves_no_time_is_read_whole() -> None:
    """Rows so short that three quarters of them take as long as all."""
    one = ladder(8, 6, 0)
    flat, falling = product(8, 6, [2.0, 2.0, 2.0, 2.0]), product(8, 6, [0.5, 1.0, 1.5, 2.0])
    level = 0.5
    (cut,), (other,) = costs.cuts([one], [flat], level), costs.cuts([one], [falling], level)
    assert one.kept(cut) == 1.0
    assert 0.05 < one.kept(other) < 0.95


def sizes_of(model: Any) -> list[tuple[int, int]]:
    return costs.sizes(gather.places(model, "all"))


def measured(model: Any) -> list[dict[str, Any]]:
    """Costs of a model whose down projections save nothing."""
    width = model.config.intermediate_size
    flat, falling = [1.0, 1.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]
    return [
        {"inputs": k, "outputs": n, "kept": KEPT, "ms": [k * n * ms for ms in (flat if k == width else falling)]}
        for k, n in sizes_of(model)
    ]


def test_a_conversion_leaves_whole_what_saves_no_time(tiny_llama: Any) -> None:
    model = tiny_llama()
    windows = np.random.default_rng(3).integers(0, model.config.vocab_size, (4, 32))
    found = measured(model)
    plan = methods.convert("gather", windows, model, share=0.8, costs=found)
    assert plan.params["costs"] == found
    assert abs(plan.provenance["gather"]["share"] - 0.8) <= 0.02
    plain = methods.convert("gather", windows, model, share=0.8)
    for ours, theirs in zip(plan.layers, plain.layers, strict=True):
        assert ours.h_threshold.max() < theirs.h_threshold.min()
        assert np.median(ours.x_threshold) > np.median(theirs.x_threshold)


def test_costs_come_from_a_file(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    found = measured(model)
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"schema": "moedge.costs/1", "products": found}), encoding="utf-8")
    assert [one.model_dump() for one in methods.GatherParams(costs=str(file)).costs] == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist; measure them with moedge costs."),
        ('{"schema": "moedge.bench/2"}', "is not of schema moedge.costs/1; measure them again with moedge costs."),
        ('{"schema": "moedge.costs/1", "products": 3}', "is not of schema moedge.costs/1"),
    ],
)
def test_a_file_that_holds_no_costs_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(MoEdgeError, match=said):
        methods.GatherParams(costs=str(file))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kept": [0.5, 0.25, 0.75, 1.0]}, "kept must rise from above 0 to 1"),
        ({"kept": [0.25, 0.5, 0.75, 0.9]}, "kept must rise from above 0 to 1"),
        ({"ms": [1.0, 2.0]}, "one positive number for each share"),
        ({"ms": [0.0, 1.0, 1.0, 1.0]}, "one positive number for each share"),
        ({"inputs": 0}, "inputs"),
    ],
)
def test_an_impossible_product_is_refused(change: dict[str, Any], said: str, tiny_llama: Any) -> None:
    model = tiny_llama()
    first, *rest = measured(model)
    with pytest.raises(MoEdgeError, match=said):
        methods.convert("gather", np.zeros((2, 16), np.int64), model, costs=[{**first, **change}, *rest])


def test_a_model_of_other_sizes_is_refused(tiny_llama: Any) -> None:
    model = tiny_llama()
    windows = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 16))
    with pytest.raises(MoEdgeError, match=r"no product of \d+ inputs and \d+ outputs was measured.*moedge costs"):
        methods.convert("gather", windows, model, costs=measured(model)[:2])


def test_costs_need_a_price_and_the_whole_model(tiny_llama: Any) -> None:
    model = tiny_llama()
    windows = np.zeros((2, 16), np.int64)
    with pytest.raises(MoEdgeError, match="costs are weighed against KL"):
        methods.convert("gather", windows, model, scores="norms", costs=measured(model))
    with pytest.raises(MoEdgeError, match=r"mlpmoe: gather\.costs are of the whole model's products"):
        methods.convert("mlpmoe", None, model, gather={"costs": measured(model)}, token_windows=windows)
