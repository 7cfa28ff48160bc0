"""CMoE inside the experts of an existing Mixture-of-Experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.configs.recipe import recipe_from
from moedge.convert import adapters, calibration, hierarchical, methods, modeling, moe_adapters, streaming
from moedge.convert.methods import cmoe_hierarchical
from moedge.convert.ops import activate
from moedge.convert.plan import LayerPlan, MoEPlan
from moedge.convert.train.finetune import finetune
from moedge.convert.train.settings import TrainSettings
from moedge.runtime.cli import app

IDS = torch.arange(2, 66).reshape(2, 32)
CALIBRATION = np.random.default_rng(0).integers(0, 256, (4, 64))
SMALL = {"shared": 2, "active": 3, "experts": 8, "k_a": 6, "min_tokens": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture
def tiny_moe(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """``tiny_moe(family)``: 3 layers; experts have 32 neurons, dense layers of Qwen3-MoE 64."""

    def make(family: str, **more: Any) -> Any:
        width = 64 if family == "qwen3_moe" else 32
        return tiny_model(family, **{"layers": 3, "width": width, **FAMILIES[family], **more})

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def converted(model: Any, **more: Any) -> MoEPlan:
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **{**SMALL, **more})
    modeling.apply(plan, model)
    return plan


def busy(model: Any) -> int:
    """A min_tokens that keeps some experts of every layer dense, and splits others."""
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **SMALL)
    counts = [layer.report["tokens"] for layer in plan.layers if layer.children]
    threshold = max(min(tokens) for tokens in counts) + 1
    assert all(max(tokens) >= threshold for tokens in counts)
    return threshold


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", moe_adapters.FAMILIES)
def test_every_sub_expert_selected_is_the_parent(family: str, dense: bool, tiny_moe: Callable[..., Any]) -> None:
    model = tiny_moe(family)
    want = logits(model)
    plan = converted(model, min_tokens=busy(model) if dense else 1)
    ffns = modeling.hierarchical_ffns(model)
    assert [ffn.layer_index for ffn in ffns] == ([0, 2] if family == "qwen3_moe" else [0, 1, 2])
    assert all((ffn.dense_parents > 0) == dense for ffn in ffns)
    assert relative(logits(model), want) > 1e-3  # something is left out
    for ffn in ffns:
        ffn.top_k = ffn.num_experts
    # float32 sums of at most 32 products in another order, in 3 layers: 3 * 32 * 2^-24.
    assert relative(logits(model), want) < 6e-6
    assert plan.differs_from_dense() is None


@pytest.mark.parametrize("family", moe_adapters.FAMILIES)
def test_forward_is_the_documented_formula(family: str, tiny_moe: Callable[..., Any]) -> None:
    """Token by token and expert by expert, from the parent's own weights."""
    model = tiny_moe(family, layers=1, **({"mlp_only_layers": []} if family == "qwen3_moe" else {}))
    (block,) = moe_adapters.blocks(model)
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **{**SMALL, "min_tokens": busy(model)})
    children = plan.layers[0].children
    assert children
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(0))
    parents, weights = block.route(x)
    expected = torch.zeros_like(x)
    for t, token in enumerate(x):
        for parent, weight in zip(parents[t].tolist(), weights[t], strict=True):
            expert, child = block.experts()[parent], children[parent]
            h = torch.nn.functional.silu(expert.gate @ token) * (expert.up @ token)
            neurons = [child.shared]
            if child.router is not None:
                rows = {name: torch.from_numpy(value) for name, value in child.router.tensors.items()}
                scores = torch.nn.functional.silu(rows["gate"] @ token) * (rows["up"] @ token)
                neurons += [child.experts[e] for e in scores.topk(3).indices]
            kept = np.concatenate(neurons)
            expected[t] += weight * (expert.down[:, kept] @ h[kept])
    assert relative(hierarchical.build_ffn(block, plan.layers[0])(x), expected) < 1e-5


def test_each_expert_is_calibrated_on_its_own_tokens_only(tiny_moe: Callable[..., Any]) -> None:
    model = tiny_moe("olmoe")
    seen: list[Any] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].reshape(-1, 32)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for window in torch.from_numpy(CALIBRATION):
            model(window[None])
    for hook in hooks:
        hook.remove()
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **SMALL)
    for index, block in enumerate(moe_adapters.blocks(model)):
        x = torch.cat(seen[index::3])
        chosen, _ = block.route(x)
        layer = plan.layers[index]
        assert layer.children
        assert layer.report["tokens"] == [int((chosen == e).sum()) for e in range(6)]
        assert layer.report["dense_experts"] == [e for e in range(6) if layer.report["tokens"][e] < 8]
        for expert, child in zip(block.experts(), layer.children, strict=True):
            if not child.experts:
                continue
            own = x[(chosen == expert.number).any(dim=1)]
            h = activate(own @ expert.gate.T, "silu") * (own @ expert.up.T)
            marks = h.abs().topk(6, dim=1).indices
            rates = torch.bincount(marks.flatten(), minlength=32).numpy()
            # The 8 shared neurons are those that these tokens mark most.
            assert rates[child.shared].min() >= np.delete(rates, child.shared).max()
            assert np.array_equal(np.sort(np.concatenate([child.shared, *child.experts])), np.arange(32))


@pytest.mark.parametrize("family", moe_adapters.FAMILIES)
def test_a_saved_model_loads_with_equal_logits(
    family: str, tiny_moe: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_moe(family).save_pretrained(tmp_path / "parent")  # in the hub's format: a tensor for each expert
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=torch.float32).requires_grad_(False)
    plan = converted(model, min_tokens=busy(model))
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "moe")
    loaded, same, _ = modeling.load(tmp_path / "moe")
    assert loaded.config.model_type == f"moedge_{family}"
    assert torch.equal(logits(loaded), logits(model))
    assert same.sha256 == plan.sha256
    with torch.no_grad():
        made = loaded.generate(IDS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 9)
    narrow = modeling.load(tmp_path / "moe", dtype="bfloat16")[0]
    first, full = modeling.hierarchical_ffns(narrow)[0], modeling.hierarchical_ffns(model)[0]
    assert first.router.gate.dtype == torch.float32
    assert torch.equal(first.router.gate, full.router.gate)
    assert first.gate.dtype == torch.bfloat16
    assert logits(narrow).isfinite().all()


def test_the_plan_is_deterministic_and_nests(tiny_moe: Callable[..., Any], tmp_path: Path) -> None:
    plans = [methods.convert("cmoe-hierarchical", CALIBRATION, tiny_moe("qwen3_moe"), **SMALL) for _ in range(2)]
    assert plans[0].sha256 == plans[1].sha256
    plans[0].save(tmp_path)
    loaded = MoEPlan.load(tmp_path)
    assert loaded.sha256 == plans[0].sha256
    assert loaded.layers[1].children == []
    first = loaded.layers[0].children
    assert first
    changed = replace(first[0], shared=first[0].shared[::-1].copy())
    loaded.layers[0].children = [changed, *first[1:]]
    assert loaded.sha256 != plans[0].sha256
    loaded.layers[0].children = [replace(first[0], shared=np.array([32], np.int32)), *first[1:]]
    with pytest.raises(MoEdgeError, match="layer 0, expert 0: a neuron index is outside"):
        loaded.validate()


def test_hashes_of_plans_without_children_are_what_they_were() -> None:
    """A hash written by release 0.1.0, before plans could nest."""
    layer = LayerPlan(np.arange(2, dtype=np.int32), [np.array([2, 3], np.int32)], 0, report={"a": 1})
    plan = MoEPlan("static", {"b": 2}, {"intermediate_size": 4}, [layer])
    assert plan.sha256 == "aedcf56a46d8ec5bc2731595c9725526aba4dd4bd6364978d86ff59b33dc2892"


def test_memory_is_one_layer_at_a_time(tiny_moe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is planned before the next one's inputs exist."""
    events: list[tuple[str, int]] = []
    run, layer = streaming.Runner.run, cmoe_hierarchical._layer

    def ran(self: Any, block: Any, states: Any) -> Any:
        events.append(("run", block.index))
        return run(self, block, states)

    def planned(block: Any, x: Any, params: Any) -> Any:
        events.append(("plan", block.index))
        return layer(block, x, params)

    monkeypatch.setattr(streaming.Runner, "run", ran)
    monkeypatch.setattr(cmoe_hierarchical, "_layer", planned)
    methods.convert("cmoe-hierarchical", CALIBRATION, tiny_moe("olmoe"), **SMALL)
    assert events == [(what, index) for index in range(3) for what in ("run", "plan")]


def test_wrong_models_and_texts_are_refused(tiny_moe: Callable[..., Any], tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match=r"'llama'.*has no experts.*--method cmoe for"):
        methods.convert("cmoe-hierarchical", CALIBRATION, tiny_llama(), **SMALL)
    model = tiny_moe("mixtral")
    with pytest.raises(MoEdgeError, match="No expert sees min_tokens=9999"):
        methods.convert("cmoe-hierarchical", CALIBRATION, model, **{**SMALL, "min_tokens": 9999})
    with pytest.raises(MoEdgeError, match="does not divide into 7"):
        methods.convert("cmoe-hierarchical", CALIBRATION, model, **{**SMALL, "experts": 7})
    with pytest.raises(MoEdgeError, match=r"Mixture-of-Experts already .mixtral.*cmoe-hierarchical"):
        adapters.ffns(model)
    dense = tiny_llama()
    plan = methods.convert(
        "cmoe", calibration.collect(dense, CALIBRATION, k_a=6), dense, shared=2, active=3, experts=8, k_a=6
    )
    with pytest.raises(MoEdgeError, match="the model has mixtral"):
        modeling.apply(plan, model)
    plan = methods.convert("cmoe-hierarchical", CALIBRATION, model, **SMALL)
    children = plan.layers[0].children
    assert children
    children[1] = replace(children[1], top_k=2)
    with pytest.raises(MoEdgeError, match="split in different ways"):
        modeling.apply(plan, model)
    assert not modeling.hierarchical_ffns(model)  # untouched


def test_the_command_splits_a_folder_and_says_which_method_fits(
    tiny_moe: Callable[..., Any], tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for name, model in (("olmoe", tiny_moe("olmoe")), ("llama", tiny_llama())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("\n".join("abc def ghij " * 9 + str(i) for i in range(30)))

    def run(name: str, method: str, *more: str) -> Any:
        text = ["--text", str(tmp_path / "text.txt"), "--windows", "4", "--length", "64"]
        return CliRunner().invoke(
            app, ["convert", str(tmp_path / name), str(tmp_path / "out"), "--method", method, *text, *more]
        )

    refused = run("olmoe", "cmoe", "--experts", "8", "--shared", "2", "--active", "3")
    assert refused.exit_code == 2
    assert "this is olmoe; choose cmoe-hierarchical" in " ".join(refused.output.split())
    refused = run("llama", "cmoe-hierarchical")
    assert refused.exit_code == 2
    assert "this is llama; choose cmoe," in " ".join(refused.output.split())
    whole = recipe_from(
        {"name": "r", "model": {"source": "x"}, "convert": {"method": "cmoe-hierarchical"}}, where="r.yaml"
    )
    with pytest.raises(MoEdgeError, match="`moedge run` compares with dense controls"):
        whole.check_model({"model_type": "olmoe"}, "r.yaml")
    done = run("olmoe", "cmoe-hierarchical", "--set", "min_tokens=8", "--k-a", "6")
    assert done.exit_code == 0, done.output
    assert "cmoe-hierarchical S3A3E8" in done.output
    with pytest.raises(MoEdgeError, match="experts inside of experts"):
        finetune(tmp_path / "out", tmp_path / "tuned", CALIBRATION, TrainSettings(tokens=16, length=8))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"])
    rows = json.loads(shown.stdout)["layers"]
    assert [(row["parents"], row["experts"], row["top_k"]) for row in rows] == [(6, 5, 3)] * 3
    kept = sum(row["kept dense"] for row in rows)
    assert kept == sum(len(layer.report["dense_experts"]) for layer in MoEPlan.load(tmp_path / "out").layers)
