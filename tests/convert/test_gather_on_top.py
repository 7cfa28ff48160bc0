"""``gather`` on top of every method, and the controls of a plan that leaves out small values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.configs.recipe import recipe_from
from moedge.convert import calibration, diagnostics, forms, levels, methods, modeling, reads
from moedge.convert.methods import METHODS, baselines
from moedge.convert.plan import SMALLEST_RAMP, SMALLEST_THRESHOLD, THRESHOLDS, MoEPlan

TAKING = [name for name, method in METHODS.items() if not method.no_gather]
SETTINGS: dict[str, dict[str, Any]] = {
    "cmoe": {"shared": 2, "active": 5, "experts": 8, "k_a": 6},
    "expertweaver": {"experts": 16, "k": 14, "tau_percentile": 50},
    "mlpmoe": {"branches": 8, "p_max": 0.25},
    "moedge": {"shared": 2, "active": 5, "experts": 8},
    "llamamoe": {"experts": 8, "active": 7},
    "moefication": {"experts": 8, "active": 7, "epochs": 2},
    "atopk": {"keep": 0.9},
    "wanda": {"keep": 0.9},
    "flap": {"keep": 0.9, "refit": True},
}


def make(name: str, model: Any, token_windows: np.ndarray, **more: Any) -> MoEPlan:
    needs, data = METHODS[name].needs, None
    if "tokens" in needs:
        data = token_windows
    elif "statistics" in needs:
        gate = calibration.GateSampling() if "gate_profile" in needs else None
        data = calibration.collect(model, token_windows, k_a=SETTINGS[name].get("k_a", 10), gate=gate)
    return methods.convert(name, data, model, token_windows=token_windows, **SETTINGS[name], **more)


@pytest.mark.parametrize("name", TAKING)
def test_every_method_takes_it_and_reads_what_was_asked_for(
    name: str, tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    plain, plan = (make(name, model, token_windows, **more) for more in ({}, {"gather": {"share": 0.5}}))
    plan.validate()
    assert reads.of_plan(plan) == pytest.approx(0.5, abs=0.003)
    assert levels.read_share(model, plan.layers, token_windows) == pytest.approx(0.5, abs=0.003)
    assert plan.params["gather"]["share"] == 0.5
    assert METHODS[name].layout(plan.params) == f"{METHODS[name].layout(plain.params)}, gather 0.5"
    assert "gather" not in plain.params, "plans without it keep their hash"
    none = dict.fromkeys(THRESHOLDS)
    bare = [layer.with_thresholds(none, own.ramp) for layer, own in both(plan, plain)]
    assert "qkv_threshold" in plan.layers[0].thresholds, "attention reads less too"
    assert replace(plan, layers=bare, params=plain.params, provenance=plain.provenance).sha256 == plain.sha256


def both(one: MoEPlan, two: MoEPlan) -> list[tuple[Any, Any]]:
    return list(zip(one.layers, two.layers, strict=True))


@pytest.mark.parametrize("scores", ["fisher", "norms", "magnitude"])
def test_with_every_expert_and_the_smallest_thresholds_the_model_is_dense(
    scores: str, tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    plan = make("cmoe", model, token_windows, gather={"share": 0.6, "scores": scores})
    assert plan.differs_from_dense() == "small inputs are left out"

    def everything(layer: Any) -> Any:
        least = {name: np.full_like(value, SMALLEST_THRESHOLD) for name, value in layer.thresholds.items()}
        return replace(layer.with_thresholds(least, layer.ramp), top_k=layer.num_experts)

    ids = torch.from_numpy(token_windows[:2])
    with torch.no_grad():
        dense, sparse = model(ids).logits, modeling.apply(plan, tiny_llama())(ids).logits
        full = modeling.apply(replace(plan, layers=[everything(layer) for layer in plan.layers]), model)(ids).logits
    assert float((sparse - dense).abs().max() / dense.abs().max()) > 1e-2
    assert float((full - dense).abs().max() / dense.abs().max()) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dive", "trained after it is converted"),
        ("cmoe-hierarchical", "experts inside experts"),
        ("gather", "leaves out small values already"),
    ],
)
def test_methods_that_cannot_take_it_say_why(name: str, words: str) -> None:
    with pytest.raises(MoEdgeError, match=f"^{name}: gather: .*{words}"):
        methods.convert(name, None, None, gather={"share": 0.5})
    convert = {"method": name, "gather": {"share": 0.5}}
    with pytest.raises(MoEdgeError, match=rf"^here: convert\.gather: .*{words}"):
        recipe_from({"name": "x", "model": {"source": "a"}, "convert": convert}, where="here")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"share": 2}, r"convert\.gather\.share: must be at most 1, got 2"),
        ({"share": "half"}, r"convert\.gather\.share: must be a number, got 'half'"),
        ({"shares": 0.5}, r"convert\.gather\.shares: unknown key; known keys here: share, .*nearest: share"),
        (0.5, r"convert\.gather: must be a mapping of keys, got 0\.5"),
    ],
)
def test_impossible_settings_are_refused_with_their_path(given: Any, words: str) -> None:
    with pytest.raises(MoEdgeError, match=words):
        recipe_from({"name": "x", "model": {"source": "a"}, "convert": {"gather": given}}, where="here")


def test_a_share_beyond_what_the_experts_read_is_refused(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    with pytest.raises(MoEdgeError, match=r"No thresholds read 0\.99 of the FFN weights: the nearest found read 0\.9"):
        make("atopk", tiny_llama(), token_windows, gather={"share": 0.99})


def test_the_nearest_try_is_taken_and_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no level reads the share the search ends soon, on either side of the jump."""
    last_is_beyond = set()
    for jump in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        tried: list[float] = []

        def read(model: Any, layers: Any, token_windows: Any, jump: float = jump, tried: list[float] = tried) -> float:
            tried.append(layers[0])
            return 0.505 if layers[0] < jump else 0.49  # nothing reads a half

        monkeypatch.setattr(levels, "read_share", read)
        choice: Any = levels.Levels(make=lambda level: [level], expected=lambda level: 0.5 - level / 100)
        layers, found = levels.fit(None, choice, np.zeros((1, 1)), 0.5)  # type: ignore[arg-type]
        assert (layers[0] < jump, found) == (True, 0.505)
        assert len(tried) < levels.ROUNDS
        last_is_beyond.add(tried[-1] >= jump)
    assert last_is_beyond == {True, False}, "the last try is the nearest one in some of them, and not in others"


def test_a_method_of_statistics_needs_the_windows_too(tiny_llama: Callable[..., Any], make_plan: Any) -> None:
    model = tiny_llama()
    _, statistics = make_plan(model)
    with pytest.raises(MoEdgeError, match="pass token_windows"):
        methods.convert("cmoe", statistics, model, shared=2, active=3, experts=8, k_a=6, gather={"share": 0.5})


@pytest.fixture(scope="module")
def gathered(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> tuple[Any, MoEPlan, Any]:
    model = tiny_llama()
    plan = make("cmoe", model, token_windows, gather={"share": 0.5})
    return model, plan, calibration.collect(model, token_windows, k_a=6)


@pytest.mark.parametrize("name", baselines.CONTROLS)
def test_controls_of_a_gathered_plan_read_as_much(
    name: str, gathered: tuple[Any, MoEPlan, Any], token_windows: np.ndarray
) -> None:
    model, plan, statistics = gathered
    assert baselines.refusal(name, plan) is None
    control = baselines.CONTROLS[name](plan, statistics, model, 0, token_windows)
    control.validate()
    # Other experts have other hidden values beyond the same thresholds; a width is a whole number of 64 neurons.
    near = 0.1 if name in baselines.ROUTED else 0.01
    if forms.form(control) == "prompted":  # each prompt chooses as many neurons
        read = float(np.mean([layer.top_k / len(layer.experts) for layer in control.layers]))
    else:
        read = levels.read_share(model, control.layers, token_windows)
    assert read == pytest.approx(0.5, abs=near)


def test_teal_and_wina_keep_one_share_of_every_layer_by_their_own_scores(
    gathered: tuple[Any, MoEPlan, Any], token_windows: np.ndarray
) -> None:
    model, plan, statistics = gathered
    for name, same in (("TEAL", True), ("WINA", False)):
        control = baselines.CONTROLS[name](plan, statistics, model, 0, token_windows)
        assert forms.form(control) == "gathered"
        for layer in control.layers:
            assert len(layer.shared) == 64
            assert (np.ptp(layer.x_threshold) < 1e-6) == (np.ptp(layer.h_threshold) < 1e-6) == same
            assert layer.ramp == SMALLEST_RAMP, "published thresholds are steps"
        assert control.params["control_of"] == plan.sha256


def test_a_plan_that_only_gathers_has_static_controls_at_its_share(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    plan = methods.convert("gather", token_windows, model, share=0.5)
    statistics = calibration.collect(model, token_windows, k_a=6)
    taken = {name for name in baselines.CONTROLS if baselines.refusal(name, plan) is None}
    assert taken == {"static mask", "FLAP-MLP", "Wanda-structured", "TEAL", "WINA", "GRIFFIN", "neuron top-k"}
    control = baselines.CONTROLS["static mask"](plan, statistics, model, 0, token_windows)
    assert {layer.active_width for layer in control.layers} == {32}


def test_stability_makes_the_gather_again(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    model = tiny_llama()
    plan = make("cmoe", model, token_windows, gather={"share": 0.5})
    again = diagnostics.replan(model, plan, token_windows)
    assert again.params["gather"] == plan.params["gather"]
    assert all(layer.gathers for layer in again.layers)
