"""What every registered method promises (tests/README.md, items 1, 2 and 12): a new one cannot forget it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, calibration, methods, modeling
from moedge.convert.methods import METHODS
from moedge.convert.plan import MoEPlan

LAYOUT: dict[str, dict[str, Any]] = {
    "cmoe": {"shared": 2, "active": 3, "experts": 8, "k_a": 6},
    "moedge": {"shared": 2, "active": 3, "experts": 8},
    "expertweaver": {"experts": 16, "k": 12, "tau_percentile": 50},
    "mlpmoe": {"branches": 8},
    "llamamoe": {"experts": 8, "active": 5, "split": "clustering"},
    "moefication": {"experts": 8, "active": 5, "epochs": 2, "compensation": "mean"},
    "atopk": {"k_a": 6},
}
"""Parameters other than the defaults: 64 neurons are few."""
NAMES = [
    name
    for name, method in METHODS.items()
    if set(method.needs) <= {"statistics", "gate_profile", "tokens"} and method.parents == "dense"
]
"""Methods that read one calibration text (several domains: test_dive.py) and a dense model (test_hierarchical.py)."""


def make(name: str, model: Any, windows: np.ndarray) -> MoEPlan:
    method = METHODS[name]
    params = method.params(**LAYOUT.get(name, {})).model_dump(mode="json")
    data: Any = None
    if "tokens" in method.needs:
        data = windows
    elif method.needs:
        gate = calibration.GateSampling(signal=params["signal"]) if "gate_profile" in method.needs else None
        data = calibration.collect(
            model, windows, k_a=params.get("k_a", 6), profile=params.get("profile", "raw"), gate=gate
        )
    return methods.convert(name, data, model, **params, source_sha256="ab", provenance={"text": "ids"})


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_one_plan_and_a_checkpoint_gives_identical_logits(
    name: str, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, token_windows: np.ndarray, tmp_path: Path
) -> None:
    plan = make(name, tiny_llama(), token_windows)
    assert make(name, tiny_llama(), token_windows).sha256 == plan.sha256
    ids = torch.from_numpy(token_windows[:2, :24])
    model = modeling.apply(plan, tiny_llama())
    with torch.no_grad():
        before = model(ids).logits
        modeling.save(model, plan, tiny_tokenizer, tmp_path / "moe")
        loaded, again, _ = modeling.load(tmp_path / "moe")
        after = loaded(ids).logits
    assert again.sha256 == plan.sha256
    assert torch.equal(before, after)
    state = loaded.state_dict()
    for key, value in model.state_dict().items():  # biases, scales and thresholds too
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_no_neuron_is_used_twice_and_with_every_expert_the_model_is_dense(
    name: str, tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    plan = make(name, model, token_windows)
    assert plan.model == adapters.describe(model, "ab")
    for layer in plan.layers:
        used = np.concatenate([layer.shared, *layer.experts])
        assert len(np.unique(used)) == len(used) <= 64
        assert len(used) == 64 or not layer.experts  # a router never comes with lost neurons
    if plan.differs_from_dense() is not None:
        return  # pruned or refitted on purpose; each method's own tests say what it computes
    ids = torch.from_numpy(token_windows[:2])
    with torch.no_grad():
        dense = model(ids).logits
        every = replace(plan, layers=[replace(layer, top_k=layer.num_experts) for layer in plan.layers])
        sparse = modeling.apply(every, model)(ids).logits
    assert float((sparse - dense).abs().max() / dense.abs().max()) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_the_registry_checks_the_parameters_before_any_work(name: str) -> None:
    with pytest.raises(MoEdgeError, match=rf"^{name}: nonsense: unknown key; known keys here: "):
        methods.convert(name, None, None, nonsense=1)


def test_a_method_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(MoEdgeError, match="Unknown method 'cmoes'; known: cmoe, "):
        methods.convert("cmoes", None, None)
