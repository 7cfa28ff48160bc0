from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moedge import MoEdgeError
from moedge.convert import adapters, domains, methods, modeling
from moedge.convert.domains import DomainText
from moedge.convert.methods import METHODS, baselines, dive
from moedge.convert.plan import LayerPlan, MoEPlan

IDS = torch.arange(2, 34).reshape(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def texts() -> dict[str, DomainText]:
    """Six domains of three alphabets, two domains each: ids 0..40, 90..130, 180..220."""
    generator = np.random.default_rng(0)
    starts = {"a": 0, "b": 90, "c": 180, "d": 0, "e": 90, "f": 180}
    return {
        name: DomainText(generator.integers(low, low + 40, (6, 32)), generator.integers(low, low + 40, (4, 32)))
        for name, low in starts.items()
    }


def make(texts: dict[str, DomainText], model: Any, **settings: Any) -> MoEPlan:
    params = {"domains": dict.fromkeys(texts, "x"), "experts": 3, **settings}
    return methods.convert("dive", texts, model, **params)


@pytest.fixture(scope="module")
def plan(texts: dict[str, DomainText], tiny_llama: Callable[..., Any]) -> MoEPlan:
    return make(texts, tiny_llama())


def test_domains_of_one_alphabet_share_an_expert(plan: MoEPlan) -> None:
    assert plan.provenance["affinity"]["groups"] == [["a", "d"], ["b", "e"], ["c", "f"]]


def test_experts_are_flap_prunings_of_their_group(plan: MoEPlan, texts: Any, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    for e, group in enumerate(plan.provenance["affinity"]["groups"]):
        both = np.concatenate([texts[name].prune for name in group])  # equal sizes: pooling is joining
        expected = domains.pruned(model, domains.moments(model, both), 32)
        for layer, static in zip(plan.layers, expected.layers, strict=True):
            np.testing.assert_array_equal(layer.experts[e], static.shared)
            assert layer.expert_bias is not None
            assert layer.expert_bias[e] == pytest.approx(static.output_bias, rel=1e-4, abs=1e-6)
    assert all(layer.active_width == 32 and layer.overlapping for layer in plan.layers)
    assert len(np.unique(np.concatenate(plan.layers[0].experts))) < 3 * 32


@pytest.mark.parametrize("active", [1, 2])
def test_the_ffn_adds_a_selected_experts_bias_with_its_weight(
    active: int, texts: Any, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=1)
    block = adapters.ffns(model)[0]
    (layer,) = make(texts, model, active=active).layers
    assert layer.router is not None
    assert layer.expert_bias is not None
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    scores = x @ torch.from_numpy(layer.router.tensors["weight"]).T + torch.from_numpy(layer.router.tensors["bias"])
    h = torch.nn.functional.silu(x @ block.gate.T) * (x @ block.up.T)
    outputs = torch.stack(
        [
            h[:, e] @ block.down[:, e].T + torch.from_numpy(b)
            for e, b in zip(layer.experts, layer.expert_bias, strict=True)
        ]
    )
    best = scores.topk(active, dim=1)
    weights = torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(dim=1))
    with torch.no_grad():
        assert modeling.build_ffn(block, layer)(x) == pytest.approx(
            torch.einsum("te,eth->th", weights, outputs), rel=1e-4, abs=1e-5
        )


def test_a_fitted_router_misses_less_than_a_random_choice_and_not_less_than_the_best(
    plan: MoEPlan, texts: Any, tiny_llama: Callable[..., Any]
) -> None:
    for layer in plan.layers:
        report = layer.report
        assert report["error_best"] <= report["error_router"] < report["error_any"]
        assert sum(report["load"]) == pytest.approx(1)
    # The errors are those of the FFN itself.
    model = tiny_llama()
    layer, block = plan.layers[0], adapters.ffns(model)[0]
    from moedge.convert import streaming

    windows = np.concatenate([text.prune for text in texts.values()])
    tokens = next(iter(streaming.walk(model, windows)))
    errors, whole = dive._errors(tokens, layer)
    for e, kept in enumerate(layer.experts):
        assert layer.expert_bias is not None
        alone = modeling.build_ffn(block, LayerPlan(kept, [], 0, output_bias=layer.expert_bias[e]))
        with torch.no_grad():
            missed = (block.module(tokens.x) - alone(tokens.x)).square().sum(dim=1)
        assert errors[:, e] == pytest.approx(missed, rel=1e-3, abs=1e-5)
    with torch.no_grad():
        assert whole == pytest.approx(block.module(tokens.x).square().sum(dim=1), rel=1e-4)


def test_two_runs_give_one_plan_and_a_seed_another_random_router(texts: Any, tiny_llama: Callable[..., Any]) -> None:
    settings = {"router": "random", "grouping": "random", "seed": 7}
    first = make(texts, tiny_llama(), **settings)
    assert first.sha256 == make(texts, tiny_llama(), **settings).sha256
    other = make(texts, tiny_llama(), **{**settings, "seed": 8})
    assert not np.array_equal(first.layers[0].router.tensors["weight"], other.layers[0].router.tensors["weight"])  # type: ignore[union-attr]
    assert make(texts, tiny_llama()).sha256 == make(texts, tiny_llama()).sha256


def test_saved_and_loaded_it_gives_identical_logits(
    plan: MoEPlan, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = modeling.apply(plan, tiny_llama())
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "moe")
    loaded, same, _ = modeling.load(tmp_path / "moe")
    assert torch.equal(logits(loaded), logits(model))
    assert same.sha256 == plan.sha256
    assert [layer.overlapping for layer in same.layers] == [True, True]
    without = replace(plan, layers=[replace(layer, expert_bias=None) for layer in plan.layers])
    assert not torch.allclose(logits(modeling.apply(without, tiny_llama())), logits(model))
    ffn = modeling.sparse_ffns(loaded)[0]
    assert ffn.gate.shape == (3, 32, 32)
    assert ffn.expert_bias is not None
    assert ffn.to(torch.bfloat16)(torch.ones(1, 2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_overlap_and_biases_are_checked_and_the_hash_of_other_plans_stands(plan: MoEPlan) -> None:
    layer = plan.layers[0]
    with pytest.raises(MoEdgeError, match="assigned twice"):
        replace(layer, overlapping=False).validate(64, "here")
    with pytest.raises(MoEdgeError, match="assigned twice"):
        replace(layer, experts=[np.array([1, 1], np.int32), *layer.experts[1:]]).validate(64, "here")
    with pytest.raises(MoEdgeError, match="2 expert biases for 3 experts"):
        replace(layer, expert_bias=np.zeros((2, 32), np.float32)).validate(64, "here")
    assert plan.differs_from_dense() == "experts share neurons"
    # What a plan without the two fields hashed to before they existed.
    old = MoEPlan("m", {}, {"intermediate_size": 4}, [LayerPlan(np.arange(4, dtype=np.int32), [], 0)])
    assert old.sha256 == "83729541f687f8f1432d425f7f1f7965a2c97267facac25de1f4726250644744"


def test_controls_that_need_a_partition_are_refused(plan: MoEPlan) -> None:
    refused = {name for name in baselines.CONTROLS if baselines.refusal(name, plan)}
    assert set(baselines.CONTROLS) - refused == {
        "static mask", "FLAP-MLP", "Wanda-structured", "random router", "TEAL", "WINA", "GRIFFIN", "neuron top-k"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": {"one": "x"}}, "at least two named texts"),
        ({"experts": 7}, "7 experts need as many domains; 6 are named"),
        ({"active": 5}, "5 of 4 experts cannot be chosen"),
        ({"keep": 0}, "greater than 0"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_parameters_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        METHODS["dive"].params(**settings)


def test_windows_of_other_domains_are_refused(texts: Any, tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match="windows are of a, b, c, d, e, f, the settings of p, q"):
        methods.convert("dive", texts, tiny_llama(), domains={"p": "x", "q": "y"}, experts=2)


def test_diagnostics_measure_the_router_but_no_oracle_by_output_norm(
    plan: MoEPlan, texts: Any, tiny_llama: Callable[..., Any]
) -> None:
    from moedge.convert import diagnostics

    model = modeling.apply(plan, tiny_llama())
    found = diagnostics.diagnose(model, texts["a"].score, dense_model=tiny_llama())
    for layer in found["layers"]:
        assert layer["agreement"] is None
        assert set(layer["relative_error"]) >= {"router", "oracle"}
        assert layer["relative_error"]["oracle"] is None
        assert 0 < layer["relative_error"]["router"] < 1
        assert sum(layer["load"]) == pytest.approx(1)
