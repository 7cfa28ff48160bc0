"""Training through thresholds: gradients flow as through a mask, and the thresholds stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge.convert import domains, methods, modeling, reads
from moedge.convert.plan import MoEPlan
from moedge.convert.train import finetune, retrain, trainable, training
from moedge.convert.train.settings import TrainSettings
from moedge.convert.train.trainable import GROUPS, LoRASettings

LENGTH = 16
IDS = torch.arange(2, 34).reshape(2, 16)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """24 windows of text with something to learn: a few ids in a fixed order, with noise."""
    generator = np.random.default_rng(3)
    ids = (np.arange(24 * LENGTH) * 7) % 40
    noise = generator.random(ids.size) < 0.1
    return np.where(noise, generator.integers(0, 256, ids.size), ids).reshape(24, LENGTH)


def settings(steps: int = 12, **more: Any) -> TrainSettings:
    base = {"tokens": steps * 2 * LENGTH, "length": LENGTH, "batch": 2, "lr": 1e-2, "router_lr": 1e-2, "eval_every": 4}
    return TrainSettings(**{**base, **more})


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, make_plan: Any, gathered: Any) -> Path:
    model = tiny_llama()
    plan = gathered(make_plan(model)[0], model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    return tmp_path / "moe"


@pytest.mark.parametrize("groups", ["lora+scale+router+compensation", "experts+shared+norms"])
def test_a_tuned_checkpoint_is_better_and_leaves_out_by_the_same_thresholds(
    groups: str, checkpoint: Path, windows: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "tuned").mkdir()
    record = finetune.finetune(
        checkpoint, tmp_path / "tuned", windows[4:], settings(trainable=groups), held_out={"a": windows[:4]}
    )
    assert record["curve"][-1]["ppl"]["a"] < 0.9 * record["curve"][0]["ppl"]["a"]
    model, plan, _ = modeling.load(tmp_path / "tuned")
    before = MoEPlan.load(checkpoint)
    assert plan.sha256 == record["plan_sha256"] != before.sha256
    for layer, old, ffn in zip(plan.layers, before.layers, modeling.sparse_ffns(model), strict=True):
        for name in ("x_threshold", "h_threshold"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(old, name))
        assert ffn.ramp == layer.ramp == old.ramp
        np.testing.assert_array_equal(ffn.x_threshold, old.x_threshold)
        np.testing.assert_array_equal(ffn.shared_h_threshold, old.h_threshold[layer.shared])
    ids = torch.from_numpy(windows[:2])
    with torch.no_grad(), reads.counted(model) as counts:
        model(torch.from_numpy(windows[4:20]))
    assert reads.of_plan(plan) == pytest.approx(counts.share(int(plan.model["intermediate_size"])), abs=1e-4)
    assert plan.provenance["finetune"]["parent_plan_sha256"] == before.sha256
    assert abs(reads.of_plan(plan) - (reads.of_plan(before) or 0)) > 1e-3, "what training moved is counted"
    with torch.no_grad():
        kept = model(ids).logits
        for ffn in modeling.sparse_ffns(model):
            ffn.x_threshold = ffn.shared_h_threshold = ffn.h_threshold = None
        assert float((model(ids).logits - kept).abs().max()) > 1e-2, "the trained model leaves values out too"


def test_no_group_holds_a_threshold(checkpoint: Path) -> None:
    model, _, _ = modeling.load(checkpoint)
    ready = trainable.prepare(model, GROUPS, LoRASettings(rank=2))
    names = [name for pairs in ready.groups.values() for name, _ in pairs]
    assert names
    assert not [name for name in names if "threshold" in name]
    assert len([name for name, _ in ready.model.named_buffers() if "threshold" in name]) == 2 * 3


@torch.no_grad()
def test_an_update_reads_what_its_layer_reads(tiny_llama: Any, gather_only: Any) -> None:
    model = tiny_llama()
    modeling.apply(gather_only(model, linears="all"), model).double()  # ramps make much of rounding
    ready = trainable.prepare(model, ("lora",), LoRASettings(rank=3))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in ready.groups["lora"]:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ready.model.eval()
    counted: list[int] = []
    model.base_model.layers[0].self_attn.o_proj.get_base_layer().count = lambda *_: counted.append(1)
    before = ready.model(IDS).logits
    assert counted == [1]
    after = trainable.finish(ready)(IDS).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-9


def test_every_trained_weight_gets_a_gradient(checkpoint: Path, windows: np.ndarray) -> None:
    model, _, _ = modeling.load(checkpoint)
    ready = trainable.prepare(model, ("experts", "shared", "attention", "norms", "embeddings"), LoRASettings())
    ids = torch.from_numpy(windows[:8])
    out = ready.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(out, ids[:, 1:].reshape(-1)).backward()
    assert not [name for pairs in ready.groups.values() for name, p in pairs if p.grad is None or not p.grad.any()]


def test_training_under_autocast_learns(checkpoint: Path, windows: np.ndarray) -> None:
    model, _, _ = modeling.load(checkpoint)
    result = training.train(
        model, windows, settings(trainable="experts+shared", mixed_precision="bf16"), held_out={"a": windows[:4]}
    )
    assert result.curve[-1]["ppl"]["a"] < 0.9 * result.curve[0]["ppl"]["a"]


def test_retraining_goes_through_thresholds_in_both_stages(
    tiny_llama: Callable[..., Any], gathered: Any, windows: np.ndarray
) -> None:
    texts = {name: domains.DomainText(part, part) for name, part in zip("ab", np.split(windows, 2), strict=True)}
    model = tiny_llama()
    plan = methods.convert("dive", texts, model, domains=dict.fromkeys(texts, "x"), experts=2, router="random")
    plan = gathered(plan, model)
    modeling.apply(plan, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("threshold" in name for name in before)
    options = {"tokens": 12 * 2 * LENGTH, "router_share": 1 / 3, "length": LENGTH, "batch": 2, "eval_every": 4}
    result = retrain.retrain(
        model, windows, retrain.RetrainSettings(**options, lr=1e-2, router_lr=1e-2), held_out={"a": windows[:4]}
    )
    assert result.perplexity["after stage 2, experts"]["a"] < 0.8 * result.perplexity["before"]["a"]
    updated = result.plan(model, plan, retrain.RetrainSettings(**options), windows)
    with torch.no_grad(), reads.counted(model) as counts:
        model(torch.from_numpy(windows[:16]))
    assert reads.of_plan(updated) == pytest.approx(counts.share(int(plan.model["intermediate_size"])), abs=1e-4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".router." in name for name in changed)
    assert "model.layers.0.mlp.gate" in changed
    assert not [name for name in changed if "threshold" in name]


def test_a_plan_that_was_only_routed_again_still_applies_to_its_dense_parent(
    checkpoint: Path, windows: np.ndarray, tmp_path: Path, tiny_llama: Any
) -> None:
    (tmp_path / "tuned").mkdir()
    finetune.finetune(checkpoint, tmp_path / "tuned", windows, settings(2, trainable="scale+router"))
    model, plan, _ = modeling.load(tmp_path / "tuned")
    again = modeling.apply(replace(plan), tiny_llama())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
