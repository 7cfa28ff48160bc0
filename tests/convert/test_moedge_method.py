from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moedge import MoEdgeError
from moedge.convert import adapters, budgets, closed_form, methods, modeling, scoring, streaming
from moedge.convert.methods import METHODS, baselines, moedge
from moedge.convert.plan import MoEPlan, RouterPlan

LAYOUT = {"shared": 2, "active": 3, "experts": 8}
WINDOWS = np.random.default_rng(3).integers(0, 256, size=(10, 48))


# --- plans ----------------------------------------------------------------------------------------------------------


def test_plan_is_registered_valid_and_repeats(tiny_llama: Callable[..., Any]) -> None:
    method = METHODS["moedge"]
    assert method.needs == ("tokens",)
    params = method.params(**LAYOUT, router_target="norm").model_dump()
    steps: list[tuple[int, int]] = []
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = methods.convert(
        "moedge",
        WINDOWS,
        model,
        **params,
        source_sha256="ab",
        provenance={"tokens": 480},
        progress=lambda done, total: steps.append((done, total)),
    )
    plan.validate()
    assert (plan.method, plan.model["sha256"], plan.provenance) == ("moedge", "ab", {"tokens": 480})
    assert plan.params == params
    assert steps == [(1, 2), (2, 2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = methods.convert("moedge", WINDOWS, tiny_llama(), **params, source_sha256="ab", provenance={"tokens": 480})
    assert again.sha256 == plan.sha256
    assert methods.convert("moedge", WINDOWS[::-1].copy(), model, **params).sha256 != plan.sha256


@pytest.mark.parametrize("budget", ["uniform", "measured"])
def test_one_window_is_too_few(budget: str, tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match="1 calibration window is too few; give at least 2"):
        methods.convert("moedge", WINDOWS[:1], tiny_llama(), **LAYOUT, budget=budget)


def test_checkpoint_with_every_tensor_reloads_with_identical_logits(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Any
) -> None:
    model = tiny_llama()
    plan = methods.convert("moedge", WINDOWS, model, **LAYOUT)
    ids = torch.from_numpy(WINDOWS[:2])
    with torch.no_grad(), scoring.swapped(model, plan):
        swapped = model(ids).logits
    modeling.apply(plan, model)
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
    loaded, same, _ = modeling.load(tmp_path / "out")
    assert same.sha256 == plan.sha256
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, swapped)
    assert {"bias", "weight"} <= set(dict(loaded.model.layers[0].mlp.router.named_parameters()))


SWITCHES: list[dict[str, Any]] = [
    {"partition": "cmoe"},
    {"partition": "correlation"},
    {"router_rounds": 0},
    {"router_target": "energy"},
    {"loss": "mean"},
    {"calibrate_scores": True},
    {"compensation": "none"},
    {"compensation": "mean"},
    {"refit": False},
    {"token_weight": "none"},
    {"sequential": False},
    {"fit_to": "stream"},
    {"budget": "uniform"},
    {"layouts": ["S4E16"]},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_changes_the_plan_and_runs(switch: dict[str, Any], tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan, other = (
        methods.convert("moedge", WINDOWS, model, **LAYOUT),
        methods.convert("moedge", WINDOWS, model, **LAYOUT, **switch),
    )
    layers = [
        MoEPlan("", {}, {}, [replace(layer, report={}) for layer in p.layers]).sha256 for p in (plan, other)
    ]  # tensors only
    assert layers[0] != layers[1]
    assert scoring.perplexity(model, WINDOWS[:2])["ppl"] > 0
    with scoring.swapped(model, other):
        assert np.isfinite(scoring.perplexity(model, WINDOWS[:2])["ppl"])


def test_sequential_layers_see_the_converted_prefix(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    alone, chained = (methods.convert("moedge", WINDOWS, model, **LAYOUT, sequential=value) for value in (False, True))
    assert np.array_equal(alone.layers[0].down, chained.layers[0].down)
    assert not np.array_equal(alone.layers[1].down, chained.layers[1].down)


def test_each_layer_keeps_the_layout_that_misses_least(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    alike: dict[str, Any] = {"sequential": False, "budget": "uniform"}
    plan = methods.convert("moedge", WINDOWS, model, **LAYOUT, layouts=["S4E16", "S0E8"], **alike)
    alone = [
        methods.convert("moedge", WINDOWS, model, shared=shared, active=active, experts=experts, **alike)
        for shared, active, experts in ((2, 3, 8), (4, 6, 16), (0, 5, 8))
    ]
    for index, layer in enumerate(plan.layers):
        errors = [other.layers[index].report["held_out_error"] for other in alone]
        assert layer.report["held_out_error"] == min(errors)
        assert layer.active_width == 40
    assert len({(layer.num_experts, layer.top_k) for other in alone for layer in other.layers}) == 3


def test_a_layout_without_routed_experts_is_not_tried() -> None:
    params = moedge.MoEdgeParams(shared=2, active=3, experts=8, layouts=["S6E16", "S4E16"])
    assert [(one.shared, one.active, one.experts) for one in params.variants()] == [(6, 4, 16), (4, 6, 16)]
    # A measured budget may leave a layer one active expert.
    least = params.model_copy(update={"active": 1})
    assert [(one.shared, one.active, one.experts) for one in least.variants()] == [(4, 2, 16)]


def test_no_layout_is_wider_than_the_one_it_replaces() -> None:
    """A wider one misses less because it reads more: 5 of 8 are 2.5 of 4, so 2."""
    params = moedge.MoEdgeParams(shared=2, active=3, experts=8, layouts=["S1E4", "S0E3", "S3E24"])
    assert [(one.shared, one.active, one.experts) for one in params.variants()] == [(1, 1, 4), (0, 1, 3), (3, 12, 24)]


def test_a_layer_that_adds_nothing_is_converted(tiny_llama: Callable[..., Any]) -> None:
    """Depth is added with down projections of zero: no neuron has any energy."""
    model = tiny_llama()
    adapters.ffns(model)[1].down.zero_()
    plan = methods.convert("moedge", WINDOWS, model, **LAYOUT)
    assert plan.layers[1].report["energy_shared"] == 0
    assert len(plan.sha256) == 64
    plan.validate()


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"layouts": ["S1E7"]}, "64 does not divide into 7"),
        ("llama", {"layouts": ["S9E100"], "padding": "uneven"}, "100 experts are more than the FFN's 64 neurons"),
        ("gemma2", {"fit_to": "stream"}, "fit_to: stream cannot be used for gemma2"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_budget(
    family: str, settings: dict[str, Any], said: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "calibration_curves", lambda *_: pytest.fail("minutes of work came first"))
    with pytest.raises(MoEdgeError, match=said):
        methods.convert("moedge", WINDOWS, tiny_model(family), **LAYOUT, budget="measured", **settings)


def test_a_measured_budget_keeps_the_mean_width(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan = methods.convert("moedge", WINDOWS, model, **LAYOUT, budget="measured")
    assert sum(layer.active_width for layer in plan.layers) == 2 * 40
    assert {layer.num_experts for layer in plan.layers} == {6}


def test_indivisible_width(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(width=66)
    with pytest.raises(MoEdgeError, match="66 does not divide into 8"):
        methods.convert("moedge", WINDOWS, model, **LAYOUT)
    layer = methods.convert("moedge", WINDOWS, model, **LAYOUT, padding="uneven").layers[0]
    np.testing.assert_array_equal(np.sort(np.concatenate([layer.shared, *layer.experts])), np.arange(66))


def test_parameters_refuse_nonsense() -> None:
    for wrong, message in (
        ({"shared": 6, "active": 6}, "active: 6 active experts cannot be chosen"),
        ({"unknown": 1}, "extra"),
        ({"fit_to": "stream", "sequential": False}, "needs sequential: true"),
        ({"layouts": ["S5E8"]}, "layouts: S5E8 shares more experts"),
        ({"layouts": ["5 of 8"]}, "layouts"),
    ):
        with pytest.raises(ValidationError, match=message):
            moedge.MoEdgeParams(**{**LAYOUT, **wrong})


# --- FLAP with refit ------------------------------------------------------------------------------------------------


def test_flap_refit_without_help_is_flap(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama()
    from moedge.convert import calibration

    plan = make_plan(model)[0]
    flap = baselines.flap(plan, calibration.collect(model, WINDOWS, k_a=6), model)
    same = methods.convert("flap", WINDOWS, model, keep=5 / 8)
    for a, b in zip(flap.layers, same.layers, strict=True):
        np.testing.assert_array_equal(a.shared, b.shared)
        np.testing.assert_allclose(a.output_bias, b.output_bias, rtol=1e-4, atol=1e-5)
        assert b.down is None


def test_flap_refit_fits_better_at_equal_width_and_repeats(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=1)
    plan = make_plan(model)[0]
    helped: dict[str, Any] = {"keep": 5 / 8, "token_weight": "residual", "sequential": True}
    without = methods.convert("flap", WINDOWS, model, **helped)
    control = methods.convert("flap", WINDOWS, model, **helped, refit=True)
    control.validate()
    assert [layer.active_width for layer in control.layers] == [layer.active_width for layer in plan.layers]
    tokens = next(iter(streaming.walk(model, WINDOWS)))
    assert closed_form.relative_error(tokens, control.layers[0]) < closed_form.relative_error(tokens, without.layers[0])
    assert control.sha256 == methods.convert("flap", WINDOWS, model, **helped, refit=True).sha256


def test_linear_router_without_bias_is_as_before(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    layer = make_plan(model)[0].layers[0]
    weight = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    bias = np.arange(6, dtype=np.float32)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    block = adapters.ffns(model)[0]
    plain = modeling.build_ffn(block, replace(layer, router=RouterPlan("linear", {"weight": weight})))
    biased = modeling.build_ffn(
        block, replace(layer, router=RouterPlan("linear", {"weight": weight, "bias": bias}, {"bias": True}))
    )
    assert list(dict(plain.router.named_parameters())) == ["weight"]
    torch.testing.assert_close(biased.router(x), plain.router(x) + torch.from_numpy(bias))
    with pytest.raises(MoEdgeError, match="do not fit"):
        modeling.build_ffn(block, replace(layer, router=RouterPlan("linear", {"weight": weight, "bias": bias})))
