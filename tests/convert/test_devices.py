"""Conversion and PyTorch's engine where the model is not in host memory, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import calibration, diagnostics, evaluate, forms, methods, modeling, prompted, scoring, sources
from moedge.convert.methods import METHODS, baselines
from moedge.runtime.engines import ReplayEngine, open_engine

WINDOWS = np.random.default_rng(0).integers(0, 256, size=(6, 32))
LAYOUT = {"shared": 2, "active": 3, "experts": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "cmoe": LAYOUT,
    "expertweaver": {"experts": 16, "k": 12, "tau_percentile": 50},
    "mlpmoe": {"branches": 8},
    "moedge": {**LAYOUT, "budget": "measured", "router_rounds": 1, "iterations": 2},
    "llamamoe": {"split": "clustering", "experts": 8, "active": 6},
    "moefication": {"experts": 8, "active": 6, "compensation": "mean", "epochs": 2},
    "atopk": {"keep": 0.8},
    "wanda": {"keep": 0.8},
    "flap": {"keep": 0.8, "refit": True},
}


def test_the_device_refuses_tensors_of_another_one(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"not a lazy tensor|on the same device"):
        torch.ones(2, device=device) + torch.ones(2)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_converts_where_the_model_is(name: str, device: str, tiny_llama: Callable[..., Any]) -> None:
    model, here = tiny_llama(layers=2).to(device), tiny_llama(layers=2)
    statistics = calibration.collect(model, WINDOWS, k_a=10, gate=calibration.GateSampling(signal="abs"))
    data = {"tokens": WINDOWS, "statistics": statistics, "gate_profile": statistics}
    given = next((data[need] for need in METHODS[name].needs if need in data), None)
    plan = methods.convert(name, given, model, **SETTINGS[name])
    texts = {"text": WINDOWS[:2]}
    states = scoring.last_hidden_states(here, texts)
    away, home = (evaluate.evaluate(one, {name: plan}, texts, {}, dense_states=states)["rows"] for one in (model, here))
    # One plan on one text; both compute in float32 with the same kernels, products of at most 96 terms in two orders.
    for one, two in zip(away, home, strict=True):
        assert one["ppl"]["text"] == pytest.approx(two["ppl"]["text"], rel=1e-4)
    found = []
    for one in (model, here):
        parent = tiny_llama(layers=2).to(one.device)
        found.append(diagnostics.diagnose(modeling.apply(plan, one), WINDOWS[:2], dense_model=parent)["mean"])
    if found[1]["agreement"] is None:  # no experts, no router
        assert found[0]["agreement"] is None
    else:
        assert found[0]["agreement"] == pytest.approx(found[1]["agreement"], rel=0.02)


def test_every_control_is_made_where_the_model_is(device: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=2).to(device)
    statistics = calibration.collect(model, WINDOWS, k_a=10)
    plan = methods.convert("cmoe", statistics, model, **LAYOUT)
    for name, make in baselines.CONTROLS.items():
        if baselines.refusal(name, plan) is None:
            control = make(plan, statistics, model, 0, WINDOWS)
            prompts_choose = forms.form(control) == "prompted"
            with prompted.in_place(model, control.layers) if prompts_choose else scoring.swapped(model, control):
                assert np.isfinite(scoring.perplexity(model, WINDOWS[:1])["ppl"]), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", r"Device 'gpu' is not supported; give cpu, cuda or cuda:N\."),
        ("cuda:x", r"Device 'cuda:x' is not supported"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(name: str, message: str) -> None:
    with pytest.raises(MoEdgeError, match=message):
        sources.check_device(name)


def test_a_machine_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MoEdgeError, match=r"Device cuda: PyTorch .* finds no CUDA device here"):
        sources.check_device("cuda")


def test_a_card_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sources.check_device("cuda:1")
    with pytest.raises(MoEdgeError, match=r"Device cuda:2 is not here; this machine has 2"):
        sources.check_device("cuda:2")


def test_the_engine_computes_where_it_is_told(
    device: str,
    tmp_path: Path,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    convert_tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(layers=2)
    plan = convert_tiny(model, "cmoe", **LAYOUT)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    folder = tmp_path / "moe"
    monkeypatch.setattr(sources, "check_device", lambda name: None)
    ids = np.random.default_rng(1).integers(0, 256, (2, 12))
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    here = open_engine(folder, threads=1, taps=True, replay=True)
    away = open_engine(folder, threads=1, taps=True, replay=True, pytorch={"device": device})
    assert here.info.device == "CPU" != away.info.device
    steps = [engine.prefill(ids, mask) for engine in (here, away)]
    steps += [engine.decode(np.array([[7], [8]]), step.cache) for engine, step in zip((here, away), steps, strict=True)]
    for one, two in (steps[:2], steps[2:]):
        # float32 on both, products of at most 64 terms in two orders.
        np.testing.assert_allclose(one.logits[:, -1], two.logits[:, -1], atol=2e-5)
        assert one.routes is not None
        assert two.routes is not None
        for layer in one.routes:
            np.testing.assert_array_equal(np.sort(one.routes[layer][-1]), np.sort(two.routes[layer][-1]))
    assert isinstance(away, ReplayEngine)
    forced = {layer: (chosen + 1) % 6 for layer, chosen in away.prefill(ids[:1]).routes.items()}  # type: ignore[union-attr]
    again = away.prefill(ids[:1], experts=forced)
    assert again.routes is not None
    for layer, chosen in forced.items():
        np.testing.assert_array_equal(np.sort(again.routes[layer]), np.sort(chosen))
