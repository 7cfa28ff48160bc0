"""A stock Hugging Face checkpoint of a converted model: same logits within the derived bound, or a reason why not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge._files import hash_tree
from moedge.convert import adapters, calibration, methods, modeling
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan
from moedge.export.stock import check as hf_check
from moedge.export.stock import glm as hf
from moedge.runtime.cli import app

IDS = np.random.default_rng(1).integers(0, 256, (6, 32))
CALIBRATION = np.random.default_rng(0).integers(0, 256, (4, 48))


def logits(model: Any, ids: np.ndarray = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits


def varying(model: Any) -> MoEPlan:
    """An ExpertWeaver plan whose layers share 7, 10 and 3 of 16 experts, then one without experts."""
    statistics = calibration.collect(model, CALIBRATION, k_a=6, gate=calibration.GateSampling(sample=12))
    plans = [
        methods.convert("expertweaver", statistics, model, experts=16, k=12, alpha_min=share, alpha_max=share)
        for share in (7 / 16, 10 / 16, 3 / 16)
    ]
    plan = plans[0]
    layers = [plans[i % 3].layers[i] for i in range(3)]
    layers.append(LayerPlan(np.arange(0, 64, 2, dtype=np.int32), [], 0))
    return replace(plan, layers=layers)


def saved(plan: MoEPlan, model: Any, tokenizer: Any, folder: Path) -> torch.Tensor:
    modeling.save(modeling.apply(plan, model), plan, tokenizer, folder)
    return logits(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", pytest.param("mistral", marks=pytest.mark.slow)])
def test_logits_stay_within_the_derived_bound(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(family, layers=4, **({"sliding_window": None} if family == "mistral" else {}))
    plan = varying(model)
    assert [len(layer.shared) for layer in plan.layers] == [28, 40, 12, 32]
    want = saved(plan, model, tiny_tokenizer, tmp_path / "moe")
    record = hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert type(stock) is Glm4MoeForCausalLM
    # 4 neurons are filled up to 8, the 12 that every layer shares to 16; the layer that shares fewest has 9 of 13.
    assert record["layout"] == {"experts": 13, "top_k": 9, "width": 8, "shared_width": 16}
    measured = record["measured"]
    # 192 tokens, 3 layers; two scores of a token are closer than the resolution, 4e-4 of their spread, in about 1.6e-3
    # of the cases: 1 expected, more than 5 in one of 1,000 draws.
    assert measured["changed"]["pairs"] * 192 * 3 <= 5
    found = measured["logits"]
    assert found["covered"] > 0.5
    assert float((logits(stock) - want).abs().max()) == pytest.approx(found["max_difference_all"], rel=1e-2)
    # The difference is what the weights alone predict, up to rounding (1e-5 of the largest logit) and third order.
    assert abs(found["prediction"]) == pytest.approx(found["max_difference"], abs=1e-5 * found["max_logit"])
    assert hf_check.ROUNDING * found["max_logit"] < found["max_difference"] < found["bound"]
    assert bool(torch.isfinite(logits(stock.bfloat16())).all())  # its grouped product wants rows of 16 bytes
    for layer, shape in zip(measured["layers"], plan.layers, strict=False):
        assert shape.experts
        assert layer["eps"] == 2.0 ** np.round(np.log2(layer["eps"]))
        assert hf.TARGET_STD / 2 < layer["std"] <= hf.TARGET_STD
        assert 0 < layer["max_weight_error"] <= layer["weight_bound"] < 0.05


def test_halving_eps_halves_the_difference(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=4)
    saved(varying(model), model, tiny_tokenizer, tmp_path / "moe")
    found = []
    for number, target in enumerate((2.0**-6, 2.0**-7)):
        monkeypatch.setattr(hf, "TARGET_STD", target)
        found.append(hf.export_hf(tmp_path / "moe", tmp_path / str(number), IDS)["measured"]["logits"])
    for name in ("max_difference", "bound"):
        assert found[0][name] / found[1][name] == pytest.approx(2, rel=0.05), name


def test_stock_transformers_needs_nothing_of_ours(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama(layers=4)
    want = saved(varying(model), model, tiny_tokenizer, tmp_path / "moe")
    bound = hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)["measured"]["logits"]["bound"]
    code = (
        "import sys, torch, numpy as np; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "T.from_pretrained('stock'); ids = torch.from_numpy(np.load('ids.npy'))\n"
        "np.save('out.npy', M.from_pretrained('stock', dtype='float32')(ids).logits.detach().numpy())\n"
        "assert not [name for name in sys.modules if name.startswith('moedge')]"
    )
    np.save(tmp_path / "ids.npy", IDS)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**environment, "HF_HUB_OFFLINE": "1"}, check=True, timeout=900
    )
    assert np.abs(np.load(tmp_path / "out.npy") - want.numpy()).max() <= bound
    names = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert names["architectures"] == ["Glm4MoeForCausalLM"]
    # No custom code, and the record says where it comes from.
    files = hash_tree(tmp_path / "stock")
    assert not [name for name in files if name.endswith(".py")]
    assert json.loads((tmp_path / "stock" / hf.RECORD).read_text())["method"] == "expertweaver"


def test_router_and_balance_biases_become_corrections(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = methods.convert(
        "moedge", CALIBRATION, model, shared=2, active=3, experts=8, compensation="none", refit=False
    )
    generator = np.random.default_rng(3)
    for layer in plan.layers:
        assert layer.router is not None
        assert np.abs(layer.router.tensors["bias"]).max() > 0
        layer.selection_bias = generator.normal(0, layer.router.tensors["bias"].std(), 6).astype(np.float32)
    saved(plan, model, tiny_tokenizer, tmp_path / "moe")
    measured = hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)["measured"]
    assert measured["changed"]["tokens"] == 0
    assert measured["logits"]["max_difference"] <= measured["logits"]["bound"]


def test_changed_sets_are_found_and_counted(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=4)
    saved(varying(model), model, tiny_tokenizer, tmp_path / "moe")
    monkeypatch.setattr(hf, "TARGET_STD", 2.0**-21)  # a few units of 2^-24: most scores become ties
    with pytest.raises(MoEdgeError, match="chooses other experts"):
        hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)
    assert not (tmp_path / "stock").exists()
    monkeypatch.setattr(hf, "TARGET_STD", 2.0**-15)
    measured = hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)["measured"]
    assert 0 < measured["changed"]["pairs"] <= measured["changed"]["tokens"] < 0.5
    assert 0 < measured["logits"]["covered"] < 1
    assert measured["logits"]["max_difference_all"] > 10 * measured["logits"]["max_difference"]


@pytest.mark.parametrize("broken", ["down", "router", "forced"])
def test_a_wrong_checkpoint_is_not_written(
    broken: str, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=4)
    saved(varying(model), model, tiny_tokenizer, tmp_path / "moe")
    blocks, correction = hf._routed_blocks, hf._correction

    def wrong_down(ffn: Any, layer: Any, layout: Any) -> Any:
        gate, up, down = blocks(ffn, layer, layout)
        slot = layer.routed if broken == "forced" and layer.forced else 0
        down[slot] = down[slot] * 1.2
        return gate, up, down

    if broken == "router":
        monkeypatch.setattr(hf, "_correction", lambda ffn, layer: correction(ffn, layer) + torch.randn(layer.routed))
        monkeypatch.setattr(hf, "_check_biases", lambda *_: None)
    else:
        monkeypatch.setattr(hf, "_routed_blocks", wrong_down)
    with pytest.raises(MoEdgeError, match="nothing was written"):
        hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("qwen3", {}), ("llama", {"attention_bias": True}), ("mistral", {"sliding_window": 8})],
)
def test_static_plans_are_narrower_dense_checkpoints(
    family: str, more: dict[str, Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(family, **more)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    plan = methods.convert("mlpmoe", None, model, structure="neurons", branches=8, p_max=0.5, keep=6)
    want = saved(plan, model, tiny_tokenizer, tmp_path / "moe")
    record = hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert stock.config.model_type == family
    widths = [ffn.shared_gate.shape[0] for ffn in modeling.sparse_ffns(model)]
    assert stock.config.intermediate_size == max(widths) < 64
    assert record["zero_share_of_ffn_weights"] == pytest.approx(1 - np.mean(widths) / max(widths), abs=1e-6)
    assert float((logits(stock) - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_zeros_of_a_plan_stay_zero_in_the_stock_checkpoint_and_are_counted(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = methods.convert("mlpmoe", None, model, branches=8)
    want = saved(plan, model, tiny_tokenizer, tmp_path / "moe")
    record = hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    weights = [parameter for name, parameter in stock.named_parameters() if ".mlp." in name]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert record["zero_share_of_ffn_weights"] == pytest.approx(share, abs=1e-6)
    assert share == pytest.approx(0.2, abs=0.01)
    assert float((logits(stock) - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_a_static_plan_with_an_output_bias_fits_llama_only(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for family in ("llama", "qwen3"):
        model = tiny_model(family)
        kept = np.arange(0, 64, 2, dtype=np.int32)
        layers = [LayerPlan(kept, [], 0, output_bias=np.full(32, 0.5, dtype=np.float32)) for _ in range(2)]
        plan = MoEPlan("static", {}, adapters.describe(model), layers)
        want = saved(plan, model, tiny_tokenizer, tmp_path / family)
        if family == "qwen3":
            with pytest.raises(MoEdgeError, match="layer 0 adds an output bias"):
                hf.export_hf(tmp_path / family, tmp_path / "refused", IDS)
            continue
        hf.export_hf(tmp_path / family, tmp_path / "stock", IDS)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
        assert float((logits(stock) - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_a_static_plan_without_biases_says_so(tiny_model: Callable[..., Any]) -> None:
    """Whatever the config of the dense model said: else its class would look for biases that nobody wrote."""
    dense = tiny_model("llama", layers=1)
    layers = [LayerPlan(np.arange(0, 64, 2, dtype=np.int32), [], 0)]
    model = modeling.apply(MoEPlan("static", {}, adapters.describe(dense), layers), dense)
    model.config.mlp_bias = True
    stock, _, _ = hf._stock(model, {})
    assert stock.config.mlp_bias is False
    assert not [name for name, _ in stock.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("linears", ["ffn", "all"])
def test_thresholds_are_refused(
    linears: str, tiny_model: Any, tiny_tokenizer: Any, gather_only: Any, tmp_path: Path
) -> None:
    """Without them the checkpoint would be another model, and its loader would not say so."""
    model = tiny_model("llama")
    plan = gather_only(model, linears=linears)
    saved(plan, model, tiny_tokenizer, tmp_path / "moe")
    with pytest.raises(MoEdgeError, match=r"leaves out small inputs.*without gather"):
        hf.export_hf(tmp_path / "moe", tmp_path / "stock", IDS)
    assert not (tmp_path / "stock").exists()


def test_what_has_no_stock_form_is_refused_with_the_reason(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    def linear(**more: Any) -> Callable[[LayerPlan], LayerPlan]:
        router = RouterPlan("linear", {"weight": np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)})
        return lambda layer: replace(layer, router=router, **more)

    cases: dict[str, Any] = {
        "'representative' router.*expertweaver": lambda layer: layer,
        "weights its experts .softmax": linear(combine="softmax"),
        "weights its experts .scaled": linear(combine="scaled", scale=np.ones(6, np.float32)),
        "compensation=none": linear(compensation=np.ones((6, 32), np.float32)),
        "refit=false": linear(output_bias=np.ones(32, np.float32)),
    }
    for number, (reason, change) in enumerate(cases.items()):
        model = tiny_model("llama", layers=1)
        statistics = calibration.collect(model, CALIBRATION, k_a=6)
        plan = methods.convert("cmoe", statistics, model, shared=2, active=3, experts=8, k_a=6)
        plan = replace(plan, layers=[change(layer) for layer in plan.layers])
        saved(plan, model, tiny_tokenizer, tmp_path / str(number))
        with pytest.raises(MoEdgeError, match=reason):
            hf.export_hf(tmp_path / str(number), tmp_path / "stock", IDS)
    # u = 0 is weight 1, whatever the rule is called.
    plan = replace(plan, layers=[linear(combine="scaled", scale=np.zeros(6, np.float32))(plan.layers[0])])
    plan.layers[0].output_bias = None
    saved(plan, tiny_model("llama", layers=1), tiny_tokenizer, tmp_path / "zero")
    hf.export_hf(tmp_path / "zero", tmp_path / "stock", IDS)
    model = tiny_model("mistral", layers=1, sliding_window=16)
    saved(replace(plan, model=adapters.describe(model)), model, tiny_tokenizer, tmp_path / "window")
    with pytest.raises(MoEdgeError, match="no sliding window"):
        hf.export_hf(tmp_path / "window", tmp_path / "never", IDS)


def test_the_command_prints_what_it_chose_and_measured(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama(layers=4)
    saved(varying(model), model, tiny_tokenizer, tmp_path / "moe")
    letters = random.Random(0)
    (tmp_path / "text.txt").write_text("\n".join("".join(letters.choices("abcdefgh ", k=99)) for _ in range(9)))
    arguments = ["export-hf", str(tmp_path / "moe"), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]
    arguments += ["--tokens", "256", "--window", "64"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / hf.RECORD).read_text())
    for shown in ("router of each layer", "derived bound", "expert sets changed", "vLLM keeps the router"):
        assert shown in " ".join(dry.output.split()), dry.output
    for layer in record["measured"]["layers"]:
        assert f"2^{int(np.log2(layer['eps']))}" in dry.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "--force" in again.output
    none = CliRunner().invoke(app, ["export-hf", str(tmp_path), str(tmp_path / "x")])
    assert none.exit_code == 2
    assert "plan.json" in " ".join(none.output.split())


@pytest.mark.slow
def test_the_default_model_stays_within_the_bound(tmp_path: Path) -> None:
    """SmolLM2-135M by ExpertWeaver: the same numbers as users see, on held-out text."""
    from moedge.runtime.text.windows import token_windows

    moe = tmp_path / "moe"
    command = ["convert", "asset:smollm2-135m-instruct", str(moe), "--method", "expertweaver", "--windows", "8"]
    command += ["--length", "256", "--set", "experts=32", "--set", "k=24", "--set", "tau_percentile=50"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = hf.export_hf(moe, tmp_path / "stock", token_windows(moe, "asset:c4", 64, 16)[1])
    measured = record["measured"]
    assert measured["logits"]["max_difference"] <= measured["logits"]["bound"]
    assert measured["logits"]["prediction"] == pytest.approx(measured["logits"]["max_difference"], rel=0.05)
    # A change is a jump that moves the inputs of later layers and tokens. Twice what was measured (hf.TARGET_STD):
    # 1.5 % of pairs, 1.7 % of best tokens; a wrong router changes most of them.
    assert measured["changed"]["pairs"] < 0.03
    assert measured["logits"]["top1_agreement"] > 0.966
