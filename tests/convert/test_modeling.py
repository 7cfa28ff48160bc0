from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moedge import MoEdgeError
from moedge._files import hash_tree
from moedge.convert import adapters, modeling, routers
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan

IDS = torch.arange(2, 34).reshape(2, 16)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize("options", [{"width": 64}, {"width": 67, "padding": "uneven"}])
def test_all_experts_selected_is_the_dense_model(
    family: str, options: dict[str, Any], tiny_model: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_model(family, width=options["width"])
    dense = logits(model)
    plan, _ = make_plan(model, **{key: value for key, value in options.items() if key != "width"})
    modeling.apply(plan, model)
    sparse = logits(model)
    for ffn in modeling.sparse_ffns(model):
        ffn.top_k = ffn.num_experts
    assert relative(logits(model), dense) < 1e-5
    assert relative(sparse, dense) > 1e-3  # with k experts something is left out


@pytest.mark.parametrize("biased", [False, True])
def test_an_expert_holds_the_rows_and_columns_of_its_neurons(
    biased: bool, tiny_llama: Callable[..., Any], make_plan: Callable[..., Any], gathered: Any
) -> None:
    model = tiny_llama(width=67, mlp_bias=biased)
    for parameter in model.parameters():
        parameter.data.normal_()
    plan = gathered(make_plan(model, padding="uneven")[0], model)
    for block, layer in zip(adapters.ffns(model), plan.layers, strict=True):
        ffn = modeling.build_ffn(block, layer)
        assert len({len(expert) for expert in layer.experts}) == 2, "some are padded"
        for e, expert in enumerate(layer.experts):
            size, kept = len(expert), expert.astype(np.int64)
            for name, rows, bias in (("gate", block.gate, block.gate_bias), ("up", block.up, block.up_bias)):
                found = getattr(ffn, name)[e]
                assert torch.equal(found[:size, :32], rows[kept])
                assert not found[size:].any()
                assert found.shape[1] == 32 + biased
                if biased:
                    assert torch.equal(found[:size, 32], bias[kept])
            assert torch.equal(ffn.down[e, :, :size], block.down[:, kept])
            assert not ffn.down[e, :, size:].any()
            assert torch.equal(ffn.h_threshold[e, :size], torch.from_numpy(layer.h_threshold[kept]))
            assert (ffn.h_threshold[e, size:] == 1).all()
        assert all(getattr(ffn, name).is_contiguous() for name in ("gate", "up", "down"))


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_other_activations_keep_the_identity(
    act: str, tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama(hidden_act=act)
    dense = logits(model)
    plan, _ = make_plan(model, active=6)
    modeling.apply(plan, model)
    assert relative(logits(model), dense) < 1e-5


def everything(model: Any, plan: MoEPlan, rule: str) -> MoEPlan:
    """The plan with every optional tensor filled in."""
    generator = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.3, shape).astype(np.float32)

    layers = [
        replace(
            layer,
            combine=rule,
            router=RouterPlan("linear", {"weight": draw(6, 32)}),
            selection_bias=draw(6),
            scale=draw(6),
            compensation=draw(6, 32),
            output_bias=draw(32),
            down=draw(32, 64),
        )
        for layer in plan.layers
    ]
    return replace(plan, layers=layers)


@pytest.mark.parametrize("rule", ["unit", "scaled", "softmax"])
def test_forward_is_the_documented_formula(
    rule: str, tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=1)
    plan = everything(model, make_plan(model)[0], rule)
    (block,), (layer,) = adapters.ffns(model), plan.layers
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(0))
    down = torch.from_numpy(layer.down)
    h = torch.nn.functional.silu(x @ block.gate.T) * (x @ block.up.T)
    scores = x @ torch.from_numpy(layer.router.tensors["weight"]).T
    expected = h[:, layer.shared] @ down[:, layer.shared].T + torch.from_numpy(layer.output_bias)
    for t in range(len(x)):
        chosen = (scores[t] + torch.from_numpy(layer.selection_bias)).topk(3).indices
        for e in range(6):
            if e not in chosen:
                expected[t] += torch.from_numpy(layer.compensation[e])
                continue
            weight = torch.tensor(1.0)
            if rule == "scaled":
                weight = 1 + layer.scale[e] * scores[t].softmax(0)[e]
            elif rule == "softmax":
                weight = scores[t, chosen].softmax(0)[chosen == e].squeeze()
            expected[t] += weight * (h[t, layer.experts[e]] @ down[:, layer.experts[e]].T)
    # float32 sums of 64 products in another order: relative error about 64 * 2^-24 = 4e-6.
    assert relative(modeling.build_ffn(block, layer)(x), expected) < 1e-5


def test_checkpoint_reloads_with_identical_logits_and_tensors(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    for family in adapters.FAMILIES:
        model = tiny_model(family)
        plan = everything(model, make_plan(model)[0], "scaled")
        modeling.apply(plan, model)
        modeling.save(model, plan, tiny_tokenizer, tmp_path / family)
        loaded, same_plan, tokenizer = modeling.load(tmp_path / family)
        assert torch.equal(logits(loaded), logits(model))
        assert same_plan.sha256 == plan.sha256
        assert tokenizer("Hi").input_ids == tiny_tokenizer("Hi").input_ids
        assert loaded.config.model_type == f"moedge_{family}"
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()


def test_auto_classes_load_and_generate(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.apply(plan, model)
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Hello", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        out = loaded.generate(ids, **settings)
    assert out.shape == (1, 13)
    # Greedy decoding with the KV cache picks what full forward passes pick.
    expected = ids
    for _ in range(8):
        step = logits(model, expected)[:, -1]
        step[:, 257] = -torch.inf  # min_new_tokens forbids the end of text
        expected = torch.cat([expected, step.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, expected)


def test_force_never_replaces_what_the_model_was_loaded_from(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    before = hash_tree(tmp_path)
    loaded, _, _ = modeling.load(tmp_path / "moe")
    with pytest.raises(MoEdgeError, match="which would be deleted"):
        modeling.save(loaded, plan, tiny_tokenizer, tmp_path / "moe", force=True)
    assert hash_tree(tmp_path) == before


def test_plain_transformers_refuses_the_checkpoint(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.apply(plan, model)
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(tmp_path / 'out')!r})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode != 0
    assert "moedge_llama" in result.stderr


@pytest.mark.parametrize("how", ["load", "to"])
def test_bfloat16_keeps_the_router_in_float32(
    how: str, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = everything(model, make_plan(model)[0], "scaled")
    modeling.apply(plan, model)
    if how == "load":
        modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
        model = modeling.load(tmp_path / "out", dtype="bfloat16")[0]
    else:
        model.to(torch.bfloat16)
    for ffn, layer in zip(modeling.sparse_ffns(model), plan.layers, strict=True):
        # Equal values, not only the dtype: a trip through bfloat16 would have rounded them.
        np.testing.assert_array_equal(ffn.router.weight.numpy(), layer.router.tensors["weight"])
        np.testing.assert_array_equal(ffn.selection_bias.numpy(), layer.selection_bias)
        np.testing.assert_array_equal(ffn.scale.numpy(), layer.scale)
        assert {ffn.gate.dtype, ffn.shared_down.dtype, ffn.compensation.dtype} == {torch.bfloat16}
    assert logits(model).isfinite().all()


def test_static_plan_runs_without_router_or_experts(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    kept = np.arange(0, 64, 2, dtype=np.int32)
    layers = [LayerPlan(kept, [], 0, output_bias=np.full(32, 0.5, dtype=np.float32)) for _ in range(2)]
    plan = MoEPlan("static", {}, adapters.describe(model), layers)
    block = adapters.ffns(model)[0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    h = torch.nn.functional.silu(x @ block.gate[kept].T) * (x @ block.up[kept].T)
    assert relative(modeling.build_ffn(block, layers[0])(x), h @ block.down[:, kept].T + 0.5) < 1e-6
    modeling.apply(plan, model)
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
    loaded, _, _ = modeling.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert modeling.sparse_ffns(loaded)[0].num_experts == 0


def test_routes_are_recorded_on_request(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama()
    modeling.apply(make_plan(model)[0], model)
    ffns = modeling.sparse_ffns(model)
    logits(model)
    assert [ffn.last_routes for ffn in ffns] == [None, None]
    for ffn in ffns:
        ffn.record_routes = True
    logits(model)
    assert [tuple(ffn.last_routes.shape) for ffn in ffns] == [(32, 3)] * 2
    assert ffns[1].last_routes.dtype == torch.int32


def test_apply_frees_every_dense_ffn_and_keeps_the_rest(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    dense = [weakref.ref(layer.mlp) for layer in model.model.layers]
    attention = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert modeling.apply(plan, model) is model
    gc.collect()
    assert [ref() for ref in dense] == [None, None]
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == attention
    assert model.model.config is model.config


def test_two_conversions_write_equal_bytes(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        model = tiny_llama()
        plan, _ = make_plan(model)
        modeling.apply(plan, model)
        modeling.save(model, plan, tiny_tokenizer, tmp_path / name)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert {"model.safetensors", "plan.json", "plan.safetensors", "tokenizer.json"} <= hash_tree(tmp_path / "a").keys()


def test_wrong_plans_and_folders_are_refused(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    plan, _ = make_plan(tiny_llama())
    with pytest.raises(MoEdgeError, match="num_layers=2, the model has 1"):
        modeling.apply(plan, tiny_llama(layers=1))
    with pytest.raises(MoEdgeError, match=r"call apply\(plan, model\) first"):
        modeling.save(tiny_llama(), plan, tiny_tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model = modeling.apply(plan, tiny_llama())
    with pytest.raises(MoEdgeError, match="the model is already a MoEdge Mixture-of-Experts"):
        adapters.ffns(model)
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
    with pytest.raises(MoEdgeError, match="already exists"):
        modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["moedge"]["plan_sha256"] = "0" * 64
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoEdgeError, match="not of the same conversion"):
        modeling.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda section: section["layers"][0].update(top_k=2), "not of the same conversion"),
        (lambda section: section["layers"][1].update(combine="softmax"), "not of the same conversion"),
        (lambda section: section["layers"][0].update(top_k=9), "Layer 0: top_k=9 of 6 experts cannot be selected"),
        (lambda section: section["layers"].pop(), "The moedge section of config.json is damaged"),
        (lambda section: section["layers"][0].pop("combine"), r"damaged \(KeyError\('combine'\)\)"),
        (lambda section: section.update(schema="moedge.checkpoint/2"), "of schema moedge.checkpoint/2, this version"),
    ],
)
def test_a_changed_config_is_refused(
    change: Callable[[Any], Any],
    sentence: str,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    make_plan: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["moedge"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoEdgeError, match=sentence):
        modeling.load(tmp_path / "out")


def test_a_plan_is_applied_once(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.apply(plan, model)
    with pytest.raises(MoEdgeError, match="The model is converted already"):
        modeling.apply(plan, model)


@pytest.mark.parametrize("kind", routers.ROUTERS)
def test_every_router_scores_every_expert_in_float32(
    kind: str, tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=1)
    plan, _ = make_plan(model)
    generator = np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in routers.build(kind, 6, 32, "silu", {}).state_dict().items()}
    tensors = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    layer = replace(plan.layers[0], router=RouterPlan(kind, tensors))
    ffn = modeling.build_ffn(adapters.ffns(model)[0], layer)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    scores = ffn.router(x)
    assert scores.shape == (7, 6)
    assert scores.dtype == torch.float32
    assert len(set(scores[0].tolist())) == 6
    assert ffn(x).shape == (7, 32)


def test_unknown_router_and_misfit_tensors_are_refused(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=1)
    layer = make_plan(model)[0].layers[0]
    block = adapters.ffns(model)[0]
    with pytest.raises(MoEdgeError, match="Unknown router kind 'nope'"):
        modeling.build_ffn(block, replace(layer, router=RouterPlan("nope")))
    right = np.zeros((6, 32), np.float32)
    for tensors in ({"weight": right[:5]}, {}, {"weight": right, "wait": right}):
        with pytest.raises(MoEdgeError, match="do not fit"):
            modeling.build_ffn(block, replace(layer, router=RouterPlan("linear", tensors)))
