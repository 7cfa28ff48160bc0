"""Attention and the output projection without their small inputs: every family, saved, loaded, scored and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, kept_inputs, modeling, reads, scoring
from moedge.convert.ops.gather import kept as keep
from moedge.convert.plan import THRESHOLDS

IDS = np.random.default_rng(3).integers(0, 256, (2, 24))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.from_numpy(IDS)).logits
    return found


@torch.no_grad()
def by_hand(model: Any, plan: Any) -> torch.Tensor:
    """The dense model with each linear layer's input masked in front of it, by hooks that know nothing of modules."""
    handles = []

    def mask(threshold: np.ndarray, ramp: float) -> Any:
        limit = torch.from_numpy(threshold)
        return lambda module, args: (keep(args[0], limit, ramp), *args[1:])

    for layer, own in zip(model.model.layers, plan.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        places = {
            "qkv_threshold": [part for name, part in attention.named_children() if name in NAMES],
            "o_threshold": [attention.o_proj],
            "x_threshold": [part for name, part in mlp.named_children() if name.startswith(("gate", "up"))],
            "h_threshold": [mlp.down_proj],
        }
        for name, modules in places.items():
            hook = mask(own.thresholds[name], own.ramp)
            handles += [module.register_forward_pre_hook(hook) for module in modules]
    last = plan.layers[-1]
    handles.append(model.lm_head.register_forward_pre_hook(mask(last.head_threshold, last.ramp)))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


NAMES = ("q_proj", "k_proj", "v_proj", "qkv_proj")


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_every_family_computes_the_masked_products(
    family: str, tiny_model: Any, tiny_tokenizer: Any, gather_only: Any, tmp_path: Path
) -> None:
    model = tiny_model(family)
    plan = gather_only(model, linears="all")
    assert set(plan.layers[-1].thresholds) == set(THRESHOLDS)
    dense, want = logits(model), by_hand(model, plan)
    assert float((want - dense).abs().max()) > 0.1
    with scoring.swapped(model, plan):
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), dense), "the dense model comes back"
    assert not any(isinstance(module, kept_inputs.KeepsInputs) for module in model.modules())
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    loaded, again, _ = modeling.load(tmp_path / "moe")
    assert again.sha256 == plan.sha256
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)


def test_thresholds_stay_float32_in_a_half_model(
    tiny_llama: Any, tiny_tokenizer: Any, gather_only: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = gather_only(model, linears="all")
    modeling.save(modeling.apply(plan, model).to(torch.bfloat16), plan, tiny_tokenizer, tmp_path / "moe")
    loaded = modeling.load(tmp_path / "moe", "bfloat16")[0]
    for half in (model, loaded):
        found = {name: value.dtype for name, value in half.named_buffers() if "threshold" in name}
        assert len(found) == 2 * 4 + 1
        assert set(found.values()) == {torch.float32}
    for place in ("qkv", "o", "head"):
        reader = next(one for one in kept_inputs.readers(loaded) if one.place == place)
        layer = plan.layers[min(reader.layer, 1)]
        np.testing.assert_array_equal(
            getattr(reader.module, f"{place}_threshold"), layer.thresholds[f"{place}_threshold"]
        )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_perplexity_is_that_of_the_models_own_logits(family: str, tiny_model: Any, gather_only: Any) -> None:
    """Scores come from hidden states and the bare weights; the logits have the thresholds and Gemma's soft cap."""
    model = tiny_model(family)
    plan = gather_only(model, linears="all")
    dense_states = scoring.last_hidden_states(model, {"": IDS})[""]
    dense = logits(model)
    with scoring.swapped(model, plan):
        states, own = scoring.last_hidden_states(model, {"": IDS})[""], logits(model)
        alone = scoring.perplexity(model, IDS)["nll"]
    targets = torch.from_numpy(IDS[:, 1:, None])
    p, q = (each[:, :-1].double().log_softmax(-1) for each in (dense, own))
    nll, kl = scoring.score_all(model, IDS[:, 1:], dense_states, [states])
    assert nll[0] == pytest.approx(-float(p.gather(-1, targets).mean()), rel=1e-5)
    assert nll[1] == pytest.approx(-float(q.gather(-1, targets).mean()), rel=1e-5)
    assert alone == pytest.approx(nll[1], rel=1e-6)
    assert kl[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_what_is_not_read_outside_counts_as_ffn_weights(tiny_llama: Any, gather_only: Any) -> None:
    """By hand: kept values of each place, times the weights that one is multiplied by."""
    model = tiny_llama()
    plan = gather_only(model, linears="all")
    seen: dict[str, list[torch.Tensor]] = {}
    with scoring.swapped(model, plan), reads.counted(model) as counts:
        for reader in kept_inputs.readers(model):
            reader.module.register_forward_pre_hook(
                lambda module, args, kwargs, key=f"{reader.layer}.{reader.place}": seen.setdefault(key, []).append(
                    kwargs.get("hidden_states", args[0] if args else None)
                ),
                with_kwargs=True,
            )
        logits(model)
    weights = {"qkv": 32 + 16 + 16, "o": 32, "head": 260}
    unread = 0.0
    for key, (values,) in seen.items():
        layer, place = key.split(".")
        limit = plan.layers[min(int(layer), 1)].thresholds[f"{place}_threshold"]
        unread += weights[place] * float((values.abs() <= torch.from_numpy(limit)).float().sum()) / IDS.size
    assert len(seen) == 5
    inside = sum(counts.of_layer(layer, 64) for layer in (0, 1)) / 2
    assert counts.share(64) == pytest.approx(inside - unread / (2 * 3 * 32 * 64), rel=1e-6)


def test_a_plan_for_another_attention_is_refused(tiny_llama: Any, gather_only: Any) -> None:
    plan = gather_only(tiny_llama(), linears="all")
    plan.layers[0].o_threshold = np.ones(48, np.float32)
    with pytest.raises(MoEdgeError, match="48 thresholds for o of layer 0, which reads 32 values"):
        modeling.apply(plan, tiny_llama())
    plan.layers[0].o_threshold = None
    plan.layers[1].head_threshold = np.ones(31, np.float32)
    with pytest.raises(MoEdgeError, match=r"head_threshold has shape \(31,\)"):
        plan.validate()


def test_config_and_plan_must_name_the_same_places(
    tiny_llama: Any, tiny_tokenizer: Any, gather_only: Any, tmp_path: Path
) -> None:
    import json

    model = tiny_llama()
    plan = gather_only(model, linears="all")
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    path = tmp_path / "moe" / "config.json"
    config = json.loads(path.read_text())
    config["moedge"]["kept_inputs"][0]["places"].remove("o")
    path.write_text(json.dumps(config))
    with pytest.raises(MoEdgeError):
        modeling.load(tmp_path / "moe")
