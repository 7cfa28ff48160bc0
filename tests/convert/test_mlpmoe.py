from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moedge import MoEdgeError
from moedge.convert import adapters, modeling
from moedge.convert.methods import METHODS, mlpmoe
from moedge.convert.methods.mlpmoe import MLPMoEParams

IDS = torch.arange(2, 34).reshape(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("order", ["branches", "neurons", "none"])
@pytest.mark.parametrize("width", [64, 67])
def test_nothing_faded_and_every_branch_kept_is_the_dense_model(
    order: str, width: int, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(width=width)
    dense = logits(model)
    plan = mlpmoe.plan(None, model, branches=8, p_max=0, keep=8, order=order)
    assert plan.provenance["mlpmoe"]["saved_share"] == 0
    assert torch.equal(logits(modeling.apply(plan, model)), dense)  # the same neurons in the same order


@pytest.mark.parametrize("fade", ["linear", "geometric"])
@pytest.mark.parametrize("branches", [1, 2, 5])
def test_schedule_rises_from_zero_to_p_max(fade: str, branches: int) -> None:
    shares = mlpmoe.schedule(MLPMoEParams(branches=branches, fade=fade, p_max=0.4))
    assert shares[0] == 0
    if branches > 1:
        assert shares[-1] == pytest.approx(0.4)
        assert (np.diff(shares) > 0).all()
    if fade == "linear":
        assert np.diff(shares, n=2) == pytest.approx(np.zeros(max(branches - 2, 0)))
    else:  # equal steps of log2(1 - p): every branch keeps the same share of what the one before it keeps
        assert np.diff(np.log2(1 - shares), n=2) == pytest.approx(np.zeros(max(branches - 2, 0)))


@pytest.mark.parametrize("fade", ["linear", "geometric"])
def test_kept_shares_equal_the_schedule_and_weak_neurons_go_first(fade: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(width=80)
    settings = MLPMoEParams(branches=5, fade=fade, p_max=0.5)
    plan = mlpmoe.plan(None, model, **settings.model_dump())
    shares = mlpmoe.schedule(settings)
    for layer, block in zip(plan.layers, adapters.ffns(model), strict=True):
        score = mlpmoe.scores(block)
        means = score.reshape(5, 16).mean(axis=1)
        rows = layer.report["branches"]
        assert [row["kept"] for row in rows] == [16 - round(share * 16) for share in shares]
        assert [row["score"] for row in rows] == pytest.approx(sorted(means, reverse=True), rel=1e-5)
        for row, branch in zip(rows, np.argsort(-means), strict=True):
            members = np.arange(branch * 16, branch * 16 + 16)
            kept = np.intersect1d(layer.shared, members)
            assert len(kept) == row["kept"]
            assert score[kept].min() > score[np.setdiff1d(members, kept)].max(initial=0)
        assert (layer.num_experts, layer.top_k, layer.router, layer.down) == (0, 0, None, None)


def test_score_is_the_product_of_norms(tiny_llama: Callable[..., Any]) -> None:
    block = adapters.ffns(tiny_llama(layers=1))[0]
    expected = [
        np.linalg.norm(block.gate[j]) * np.linalg.norm(block.up[j]) * np.linalg.norm(block.down[:, j])
        for j in range(64)
    ]
    assert mlpmoe.scores(block) == pytest.approx(expected, rel=1e-5)


def test_order_by_neurons_drops_the_weakest_of_all(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    score = mlpmoe.scores(adapters.ffns(model)[0])
    (layer,) = mlpmoe.plan(None, model, branches=4, p_max=0, keep=3, order="neurons").layers
    np.testing.assert_array_equal(layer.shared, np.sort(np.argsort(-score)[:48]))


@pytest.mark.parametrize(("rule", "variance"), [("sqrt", 1.0), ("mean", 2.0), ("none", 0.5)])
def test_sqrt_compensation_keeps_the_variance(rule: str, variance: float, tiny_llama: Callable[..., Any]) -> None:
    """Half of 8 branches of a random FFN: independent zero-mean contributions, so variances add up.

    A neuron's variance scatters by about 100% (lengths of 32-dimensional rows and the activation), so half of 4096
    neurons scatter by 2% / sqrt(2) of the total; outputs of one FFN share neurons, hence no smaller error from tokens.
    """
    model = tiny_llama(layers=1, width=4096)
    block = adapters.ffns(model)[0]
    (layer,) = mlpmoe.plan(None, model, branches=8, p_max=0, keep=4, order="none", compensation=rule).layers
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, half = block.module(x), modeling.build_ffn(block, layer)(x)
    assert float(half.var() / whole.var()) == pytest.approx(variance, rel=0.1)
    assert layer.report["factor"] == pytest.approx({"sqrt": 2**0.5, "mean": 2.0, "none": 1.0}[rule])
    assert (layer.down is None) == (rule == "none")


def test_what_is_dropped_is_really_saved(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(width=320)
    before = sum(p.numel() for block in adapters.ffns(model) for p in block.module.parameters())
    plan = mlpmoe.plan(None, model)  # the defaults fade 16 branches linearly to 0.4
    modeling.apply(plan, model)
    after = sum(p.numel() for ffn in modeling.sparse_ffns(model) for p in ffn.parameters())
    saved = plan.provenance["mlpmoe"]
    assert saved["ffn_parameters"] == [before, after]
    assert saved["ffn_flops_per_token"] == [2 * before, 2 * after]
    assert saved["saved_share"] == pytest.approx(1 - after / before, abs=1e-6)
    assert saved["saved_share"] == pytest.approx(0.2, abs=0.025)  # rounding: half a neuron of each branch of 20
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "moe")
    loaded, _, _ = modeling.load(tmp_path / "moe")
    assert [ffn.shared_gate.shape[0] for ffn in modeling.sparse_ffns(loaded)] == [len(p.shared) for p in plan.layers]


def test_saved_and_loaded_it_gives_identical_logits(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = mlpmoe.plan(None, model, branches=8, keep=6)
    assert plan.sha256 == mlpmoe.plan(None, tiny_llama(), branches=8, keep=6).sha256
    assert plan.sha256 != mlpmoe.plan(None, tiny_llama(), branches=8, keep=6, compensation="mean").sha256
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    loaded, same, _ = modeling.load(tmp_path / "moe")
    assert torch.equal(logits(loaded), logits(model))
    assert same.sha256 == plan.sha256


def test_the_registry_says_that_it_is_a_reconstruction_and_needs_nothing(tiny_llama: Callable[..., Any]) -> None:
    method = METHODS["mlpmoe"]
    assert method.needs == ()
    assert "reconstruction" in method.source
    params = method.params(branches=4).model_dump()
    plan = method.function(None, tiny_llama(), **params, source_sha256="ab", provenance={"text": "none"})
    assert (plan.method, plan.model["sha256"], plan.provenance["text"]) == ("mlpmoe", "ab", "none")
    assert plan.params == {**params, "reconstruction": mlpmoe.RECONSTRUCTION}
    with pytest.raises(ValidationError, match="keep: 9 exceeds branches = 8"):
        method.params(branches=8, keep=9)
    with pytest.raises(ValidationError, match="less than 1"):
        method.params(p_max=1)
    with pytest.raises(MoEdgeError, match="64 neurons; 65 branches are too many"):
        mlpmoe.plan(None, tiny_llama(), branches=65)
