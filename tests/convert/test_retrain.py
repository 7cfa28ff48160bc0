from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import domains, methods, modeling
from moedge.convert.domains import DomainText
from moedge.convert.train import retrain
from moedge.convert.train.retrain import RetrainSettings

IDS = torch.arange(2, 34).reshape(2, 16)
LENGTH = 16


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """24 windows of two domains, each a few ids in a fixed order with noise."""
    generator = np.random.default_rng(3)
    rows = []
    for low in (0, 120):
        ids = low + (np.arange(12 * LENGTH) * 7) % 40
        noise = generator.random(ids.size) < 0.1
        rows.append(np.where(noise, generator.integers(low, low + 100, ids.size), ids).reshape(12, LENGTH))
    return np.concatenate(rows)


@pytest.fixture
def converted(tiny_llama: Callable[..., Any], windows: np.ndarray) -> Callable[..., Any]:
    """Return a function that makes a tiny DIVE model of two experts."""

    def make(**settings: Any) -> Any:
        texts = {name: DomainText(part, part) for name, part in zip("ab", np.split(windows, 2), strict=True)}
        options = {"domains": dict.fromkeys(texts, "x"), "experts": 2, "router": "random", **settings}
        model = tiny_llama()
        return modeling.apply(methods.convert("dive", texts, model, **options), model)

    return make


def settings(**more: Any) -> RetrainSettings:
    base = {"tokens": 12 * 2 * LENGTH, "router_share": 1 / 3, "length": LENGTH, "batch": 2, "eval_every": 4}
    return RetrainSettings(**{**base, "lr": 1e-2, "router_lr": 1e-2, **more})


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_both_stages_lower_held_out_perplexity(converted: Any, windows: np.ndarray) -> None:
    model = converted()
    said: list[str] = []
    steps: list[tuple[int, int]] = []
    result = retrain.retrain(
        model,
        windows,
        settings(),
        held_out={"a": windows[:4], "b": windows[-4:]},
        progress=lambda *step: steps.append(step),
        note=said.append,
    )
    assert list(result.perplexity) == ["before", "after stage 1, router", "after stage 2, experts"]
    for name in "ab":
        assert result.perplexity["after stage 2, experts"][name] < 0.8 * result.perplexity["before"][name]
    assert result.tokens == settings().tokens
    assert steps[-1] == (settings().tokens, settings().tokens)
    assert [line.split(":")[0] for line in said] == list(result.perplexity)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {(ffn.top_k, ffn.combine, ffn.straight_through) for ffn in modeling.sparse_ffns(model)} == {
        (1, "unit", False)
    }


def test_stage_one_trains_routers_only_and_folds_the_temperature_in(converted: Any, windows: np.ndarray) -> None:
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    only = settings(tokens=4 * 2 * LENGTH, router_share=0.999, temperature=0.5)
    assert list(only.stages(1)) == ["router"]
    retrain.retrain(model, windows, only)
    assert changed(model, before) == {f"model.layers.{i}.mlp.router.weight" for i in range(2)}
    raw = converted()
    retrain.retrain(raw, windows, only.model_copy(update={"fold_temperature": False}))
    for ffn, other in zip(modeling.sparse_ffns(model), modeling.sparse_ffns(raw), strict=True):
        assert torch.equal(ffn.router.weight, other.router.weight / 0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("active", "gradient", "learns"),
    [(1, "straight_through", True), (1, "none", False), (2, "none", True)],
)
def test_a_top_1_router_learns_by_the_straight_through_gradient_alone(
    active: int, gradient: Any, learns: bool, converted: Any, windows: np.ndarray
) -> None:
    model = converted(active=active)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    retrain.retrain(model, windows, settings(router_share=0, tokens=2 * 2 * LENGTH, gradient=gradient))
    moved = changed(model, before)
    assert any(".router." in name for name in moved) == learns
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.down", "model.norm.weight"} <= moved
    assert not any("expert_bias" in name or "self_attn" in name or "embed" in name for name in moved)


def test_straight_through_keeps_values_and_has_the_gradient_of_a_softmax_over_all(converted: Any) -> None:
    ffn = modeling.sparse_ffns(converted())[0]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weight = ffn.router.weight.requires_grad_(True)  # type: ignore[union-attr]
    plain = ffn(x)
    without = torch.autograd.grad(plain.sum(), weight, allow_unused=True)[0]
    assert without is None or not without.any()
    with retrain.straight_through(ffn):
        y = ffn(x)
    assert torch.equal(y, plain)
    direction = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((y * direction).sum(), weight)
    p = torch.softmax(x @ weight.T, dim=1)
    chosen = p.detach().argmax(dim=1)
    (expected,) = torch.autograd.grad(
        (p.gather(1, chosen[:, None])[:, 0] * (plain.detach() * direction).sum(dim=1)).sum(), weight
    )
    assert found.abs().max() > 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_interrupted_run_ends_like_one_that_was_not(converted: Any, windows: np.ndarray, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 9 * 2 * LENGTH:
            raise Stopped

    model = converted()
    with pytest.raises(Stopped):
        retrain.retrain(model, windows, settings(), state=tmp_path / "state", progress=stop)
    resumed = converted()
    retrain.retrain(resumed, windows, settings(), state=tmp_path / "state")
    whole = converted()
    retrain.retrain(whole, windows, settings())
    for (name, tensor), other in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("other", [{"fold_temperature": False}, {"gradient": "none"}, {"temperature": 0.1}])
def test_a_run_with_other_settings_of_the_first_stage_does_not_go_on(
    other: dict[str, Any], converted: Any, windows: np.ndarray, tmp_path: Path
) -> None:
    """Its second stage would go on from routers that they did not make."""
    retrain.retrain(converted(), windows, settings(), state=tmp_path / "state")
    with pytest.raises(MoEdgeError, match="with other settings"):
        retrain.retrain(converted(), windows, settings(**other), state=tmp_path / "state")


def test_a_model_without_routers_is_refused(tiny_llama: Callable[..., Any], windows: np.ndarray) -> None:
    model = tiny_llama()
    modeling.apply(methods.convert("mlpmoe", None, model, branches=8), model)
    with pytest.raises(MoEdgeError, match="a router in every layer"):
        retrain.retrain(model, windows, settings())


@pytest.mark.slow
def test_smollm2_is_converted_and_retrained_on_four_domains(tmp_path: Path) -> None:
    """The real chain on two cores: 4 domains in 2 groups, then 8,192 tokens of retraining; some ten minutes."""
    from moedge.convert import adapters, sources

    source = sources.resolve("asset:smollm2-135m-instruct").folder
    tokenizer, model = sources.load_tokenizer(source), sources.load_model(source)
    specs = {"encyclopedia": "asset:wiki", "code": "asset:code", "fiction": "asset:fiction", "law": "asset:law"}
    entries = [{"name": name, "spec": spec, "every": 10} for name, spec in specs.items()]
    texts, _ = domains.read(tokenizer, entries, length=256, samples=5, score_samples=2, bos=False, seed=42)
    plan = methods.convert("dive", texts, model, domains=specs, experts=2)
    affinity = plan.provenance["affinity"]
    assert sorted(name for group in affinity["groups"] for name in group) == sorted(specs)
    # A model pruned for code is the best of the four on code by far: the matrix shows domains at all.
    column = np.array(affinity["perplexity"])[:, 1]
    assert column.argmin() == 1
    assert column.min() < 0.5 * np.median(column)
    for layer in plan.layers:
        assert layer.report["error_best"] <= layer.report["error_router"] < layer.report["error_any"]
    assert adapters.describe(model)["num_layers"] == len(plan.layers)
    modeling.apply(plan, model)
    train, held = domains.training_windows(tokenizer, entries, length=256, count=32, seed=0)
    wanted = RetrainSettings(tokens=8192, router_share=0.25, batch=2, lr=1e-3, router_lr=1e-3, eval_every=1000)
    found = retrain.retrain(model, train, wanted, held_out={name: ids[:2] for name, ids in held.items()})
    means = [np.mean(np.log(list(values.values()))) for values in found.perplexity.values()]
    assert means[-1] < means[0]
