"""GRIFFIN: what a window's first half chooses runs for its second half, and only that half is scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moedge.convert import adapters, evaluate, forms, prompted, scoring
from moedge.convert.methods import baselines
from moedge.convert.plan import LayerPlan, MoEPlan

WINDOWS = np.random.default_rng(5).integers(0, 256, size=(3, 24))
KEEP = 40


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


def griffin(model: Any, keep: int = KEEP) -> MoEPlan:
    """The control of a static plan of ``keep`` neurons."""
    layers = [LayerPlan(np.arange(keep, dtype=np.int32), [], 0) for _ in adapters.ffns(model)]
    plan = MoEPlan("atopk", {}, adapters.describe(model), layers)
    return baselines.CONTROLS["GRIFFIN"](plan, [], model, 0, WINDOWS)


def answered(model: Any, window: np.ndarray, keep: int) -> torch.Tensor:
    """What the published method predicts behind the prompt of a window: prefill, choose, cut the weights, decode."""
    ids, half = torch.from_numpy(window)[None], len(window) // 2
    hidden: dict[int, torch.Tensor] = {}
    blocks = adapters.ffns(model)
    hooks = [
        block.module.down_proj.register_forward_pre_hook(lambda _, args, i=block.index: hidden.update({i: args[0][0]}))
        for block in blocks
    ]
    with torch.no_grad():
        cache = model(ids[:, :half], use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        kept = {}
        for block in blocks:
            h = hidden[block.index].double()
            statistic = (h / h.norm(dim=1, keepdim=True)).square().sum(dim=0).sqrt()
            left_out = statistic.argsort(descending=True)[keep:]
            kept[block.index] = block.module.down_proj.weight.clone()
            block.module.down_proj.weight[:, left_out] = 0
        logits = [model(ids[:, at : at + 1], past_key_values=cache).logits[0] for at in range(half, len(window) - 1)]
        for block in blocks:
            block.module.down_proj.weight.copy_(kept[block.index])
    return torch.cat(logits).double().log_softmax(-1)


def test_a_window_is_a_prompt_and_an_answer_as_published(model: Any) -> None:
    with prompted.in_place(model, griffin(model).layers):
        states = scoring.last_hidden_states(model, {"t": WINDOWS})["t"]
    with torch.no_grad():
        logits = model.get_output_embeddings()(states)[:, 12:].double().log_softmax(-1)
        dense = model(torch.from_numpy(WINDOWS)).logits[:, :-1].double().log_softmax(-1)
        prompt = model.get_output_embeddings()(states)[:, :12].double().log_softmax(-1)
    for row, window in zip(logits, WINDOWS, strict=True):  # each row chooses for itself
        # float32 sums of some 64 products of size 1 in another order, through two layers: some 1e-5.
        torch.testing.assert_close(row, answered(model, window, KEEP), rtol=0, atol=1e-4)
    torch.testing.assert_close(prompt, dense[:, :12], rtol=0, atol=1e-4)  # the prompt is dense
    assert (logits - dense[:, 12:]).abs().max() > 0.01, "and the answer is not"


def test_a_plan_of_all_neurons_is_the_dense_model(model: Any) -> None:
    result = evaluate.evaluate(model, {"GRIFFIN": griffin(model, 64)}, {"t": WINDOWS}, {})
    row = result["second_half"]["rows"][1]
    assert row["ffn_read_share"] == 1.0
    assert abs(row["kl_to_dense"]["t"]) < 1e-6  # see test_all_experts_selected_has_no_divergence


def test_it_is_scored_on_second_halves_beside_all_others(model: Any) -> None:
    before = [block.module for block in adapters.ffns(model)]
    control = griffin(model)
    mask = MoEPlan("atopk", {}, control.model, [LayerPlan(np.arange(KEEP, dtype=np.int32), [], 0)] * 2)
    result = evaluate.evaluate(model, {"mask": mask, "GRIFFIN": control}, {"t": WINDOWS}, {})
    assert [block.module for block in adapters.ffns(model)] == before
    assert not any(block.module.down_proj._forward_pre_hooks for block in adapters.ffns(model))
    assert [row["label"] for row in result["rows"]] == ["dense", "mask"]
    second = result["second_half"]
    assert [row["label"] for row in second["rows"]] == ["dense", "mask", "GRIFFIN"]
    assert second["tokens"] == {"t": 3 * 11}
    with torch.no_grad():
        dense = model(torch.from_numpy(WINDOWS)).logits[:, 12:-1].double().log_softmax(-1)
    expected = torch.stack([answered(model, window, KEEP) for window in WINDOWS])
    kl = float((dense.exp() * (dense - expected)).sum(-1).mean())
    row = second["rows"][2]
    assert row["kl_to_dense"]["t"] == pytest.approx(kl, rel=1e-3)
    assert (row["form"], row["ffn_read_share"], row["active_width_fraction"]) == ("prompted", KEEP / 64, KEEP / 64)
    targets = torch.from_numpy(WINDOWS)[:, 13:, None]
    assert np.log(second["rows"][0]["ppl"]["t"]) == pytest.approx(float(-dense.gather(-1, targets).mean()), rel=1e-5)
    assert forms.WHERE["prompted"].split(",")[0] in result["where"][-1]


def test_the_verdict_compares_it_on_second_halves() -> None:
    def row(label: str, kind: str, ppl: float, form: str = "gathered") -> dict[str, Any]:
        return {"label": label, "kind": kind, "form": form, "ppl": {"t": ppl}, "ffn_read_share": 0.5}

    rows = [row("dense", "dense", 10), row("gather", "method", 12)]
    second = [row("dense", "dense", 7), row("gather", "method", 8), row("GRIFFIN", "control", 9, "prompted")]
    assert evaluate.verdict(rows, second)["router_beats"] == {"GRIFFIN": True}
    second[1] = row("gather", "method", 9.5)
    said = evaluate.verdict(rows, second)["sentences"]
    assert said == ["gather loses to the control 'GRIFFIN' on t (9.50 against 9.00)."]


@pytest.mark.parametrize(("length", "prompt"), [(2, 0), (3, 1), (8, 4), (9, 4), (512, 256)])
def test_a_prompt_is_the_first_half_and_leaves_one_token_to_score(length: int, prompt: int) -> None:
    assert prompted.prompt_length(length) == prompt
    assert length - 1 - prompt >= 1
