"""Every family, converted by every method: identity, checkpoint, generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moedge import MoEdgeError
from moedge.convert import adapters, calibration, modeling, sources
from moedge.convert.methods import METHODS

IDS = torch.arange(2, 34).reshape(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def select_all(model: Any) -> None:
    for ffn in modeling.sparse_ffns(model):
        ffn.top_k = ffn.num_experts


ONE_TEXT = ("cmoe", "expertweaver", "mlpmoe", "moedge", "llamamoe", "moefication", "atopk", "wanda", "flap")
"""Methods for dense models that one calibration text, or none, is enough for."""
CASES: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in adapters.FAMILIES},
    "llama with FFN biases": {"family": "llama", "mlp_bias": True},
    "width that no layout divides": {"family": "llama", "width": 67},
}
QUICK = {("cmoe", case) for case in CASES} | {(method, "phi3") for method in ONE_TEXT}
QUICK |= {(method, case) for method in ("expertweaver", "moedge") for case in ("gemma2", "llama with FFN biases")}
PRODUCT = [
    pytest.param(case, method, marks=[] if (method, case) in QUICK else [pytest.mark.slow])
    for case in CASES
    for method in ONE_TEXT
]


@pytest.mark.parametrize(("case", "method"), PRODUCT)
def test_identity_checkpoint_and_generation(
    case: str,
    method: str,
    tiny_model: Callable[..., Any],
    convert_tiny: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = tiny_model(**CASES[case])
    dense = logits(model)
    uneven = "width" in CASES[case] and "padding" in METHODS[method].params.model_fields
    plan = convert_tiny(model, method, **({"padding": "uneven"} if uneven else {}))
    if method == "flap":  # it always has an output bias: what the pruned neurons contribute on average
        assert not any(layer.output_bias.any() for layer in plan.layers)
    else:
        assert plan.differs_from_dense() is None
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        out = loaded.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 20)
    if any(ffn.num_experts for ffn in modeling.sparse_ffns(model)):
        assert relative(logits(model), dense) > 1e-3  # with k experts something is left out
    select_all(model)
    assert relative(logits(model), dense) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "method"), [("bfloat16", "moedge"), ("bfloat16", "expertweaver"), ("float16", "cmoe")]
)
def test_a_checkpoint_keeps_its_dtype(
    dtype: str,
    method: str,
    tiny_llama: Callable[..., Any],
    convert_tiny: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    tiny_llama().to(getattr(torch, dtype)).save_pretrained(tmp_path / "dense")
    model = sources.load_model(tmp_path / "dense", "auto")
    assert model.dtype == getattr(torch, dtype)
    plan = convert_tiny(model, method)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "out")
    loaded, same, _ = modeling.load(tmp_path / "out", "auto")
    assert same.sha256 == plan.sha256
    assert {p.dtype for name, p in loaded.named_parameters() if ".router." not in name} == {model.dtype}
    assert {p.dtype for name, p in loaded.named_parameters() if ".router." in name} <= {torch.float32}
    assert torch.equal(logits(loaded), logits(model))
    assert logits(model).dtype == model.dtype


def test_biases_are_added_once_and_go_with_their_neurons(
    tiny_llama: Callable[..., Any], convert_tiny: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=1, mlp_bias=True)
    (block,) = adapters.ffns(model)
    layer = convert_tiny(model, "cmoe").layers[0]
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    bias = np.full(32, 0.5, dtype=np.float32)
    # Nothing selected: the shared neurons with their own biases, the down bias and the plan's.
    h = torch.nn.functional.silu(x @ block.gate.T + block.gate_bias) * (x @ block.up.T + block.up_bias)
    want = h[:, layer.shared] @ block.down[:, layer.shared].T + block.down_bias + 0.5
    static = replace(layer, experts=[], top_k=0, router=None, selection_bias=None, output_bias=bias)
    assert relative(modeling.build_ffn(block, static)(x), want) < 1e-5
    # One expert selected: its neurons too, chosen by the whole activation of its representative.
    router = modeling.build_ffn(block, layer).router
    assert router is not None
    chosen = router(x).argmax(dim=1)
    representatives = torch.tensor(layer.report["representatives"])
    assert torch.equal(chosen, h[:, representatives].argmax(dim=1))
    for t, e in enumerate(chosen):
        want[t] += h[t, layer.experts[e]] @ block.down[:, layer.experts[e]].T
    got = modeling.build_ffn(block, replace(layer, top_k=1, output_bias=bias))(x)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "falcon"])
def test_ffns_without_a_gate_are_refused(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MoEdgeError, match=f"has no GLU FFN \\(model type '{family}'.*gated FFNs only"):
        sources.check_folder(tmp_path)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    AutoConfig.for_model("starcoder2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MoEdgeError, match="has no GLU FFN"):
        sources.check_folder(tmp_path)
    AutoConfig.for_model("glm4", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(MoEdgeError, match=r"'glm4' has no adapter yet; supported: .*gemma3_text"):
        sources.check_folder(tmp_path)


def test_a_norm_behind_the_ffn_excludes_the_stream_target(
    tiny_model: Callable[..., Any], convert_tiny: Callable[..., Any]
) -> None:
    with pytest.raises(MoEdgeError, match="olmo2: it normalises the FFN's output"):
        convert_tiny(tiny_model("olmo2"), "moedge", refit=True, fit_to="stream")


def test_the_gate_profile_of_a_fused_projection_is_that_of_its_gate(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("phi3", layers=1)
    tokens = np.random.default_rng(0).integers(0, 256, size=(2, 8))
    (layer,) = calibration.collect(model, tokens, k_a=6, gate=calibration.GateSampling())
    (block,) = adapters.ffns(model)
    inputs: list[torch.Tensor] = []
    handle = block.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(torch.from_numpy(tokens))
    handle.remove()
    want = torch.nn.functional.silu(inputs[0] @ block.gate.T).abs().mean(dim=1)
    assert relative(torch.from_numpy(layer.gate_profile), want) < 1e-5
    h = block.hidden(inputs[0].reshape(-1, 32))
    assert relative(torch.from_numpy(layer.mean), h.mean(dim=0)) < 1e-5
