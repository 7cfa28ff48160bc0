"""What lies in a model folder is the model, or the folder is refused: weights, shards, quantized tensors, adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moedge import MoEdgeError
from moedge.convert import modeling, sources
from moedge.export.pipeline import export
from moedge.export.trace import trace
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.pytorch import TorchEngine

IDS = np.arange(24)[None] % 250


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def refuses(folder: Path, message: str) -> None:
    """Every way of opening the folder says the same."""
    for opened in (sources.load_model, TorchEngine, open_engine):
        with pytest.raises(MoEdgeError, match=message):
            opened(folder)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return sources.load_model(folder)(torch.from_numpy(IDS)).logits


def test_biases_that_the_config_has_no_place_for_are_refused(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}))
    refuses(folder, r"weight model\.layers\.1\.self_attn\.q_proj\.bias has no place in the model")


def test_layers_beyond_those_of_the_config_are_refused(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)
    refuses(folder, r"weight model\.layers\.1\.input_layernorm\.weight has no place .*, and 8 more; correct config")


def test_an_output_matrix_of_its_own_beside_tied_embeddings_is_refused(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    refuses(folder, r"lm_head\.weight differs from the embedding")
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    sources.load_model(folder)


def test_rotary_frequencies_of_old_checkpoints_are_left_only_where_they_are_the_configs(folder: Path) -> None:
    want = logits(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    own = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    rewrite(folder, lambda w: w.update({name: own.to(torch.bfloat16)}))
    assert torch.equal(logits(folder), want)
    edit(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    sources.load_model(folder)  # such a checkpoint holds what is scaled
    rewrite(folder, lambda w: w.update({name: own**1.1}))
    refuses(folder, "rotary_emb.inv_freq holds other frequencies than rope_theta")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
        ("model.layers.0.mlp.up_proj.weight", torch.int8),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.float32),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.float32),
        ("model.layers.0.mlp.up_proj.input_scale", torch.float32),
        ("model.layers.0.mlp.up_proj.qweight", torch.int32),
        ("model.layers.0.mlp.up_proj.qzeros", torch.int32),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.uint8),
        ("model.layers.0.mlp.up_proj.SCB", torch.float32),
    ],
)
def test_parts_of_quantized_weights_without_a_quantization_config_are_refused(
    name: str, dtype: torch.dtype, folder: Path
) -> None:
    rewrite(folder, lambda w: w.update({name: torch.ones(64, 32).to(dtype)}))
    with pytest.raises(MoEdgeError, match=rf"model\.safetensors holds {name} \(.*\), a part of quantized weights"):
        sources.resolve(str(folder))
    refuses(folder, "a part of quantized weights, and config.json has no quantization_config")


def float8(folder: Path, block: list[int] | None) -> Path:
    """Quantize the projections by blocks in place; return a folder with what they stand for, in float32."""
    exact = folder.with_name("exact")
    shutil.copytree(folder, exact, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    plain = dict(weights)
    for name in [name for name in weights if "proj" in name]:
        shape = weights[name].shape
        edges = block or shape
        scale = torch.rand([-(-size // edge) for size, edge in zip(shape, edges, strict=True)]) + 0.5
        wide = scale.repeat_interleave(edges[0], 0).repeat_interleave(edges[1], 1)[: shape[0], : shape[1]]
        weights[name] = (weights[name] / wide).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale
        plain[name] = weights[name].float() * wide
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, exact / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    edit(folder / "config.json", quantization_config=quantization)
    return exact


@pytest.mark.parametrize("block", [[16, 8], [128, 16], None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_by_blocks_is_read_with_its_scales(dtype: str, block: list[int] | None, folder: Path) -> None:
    exact = float8(folder, block)
    got, want = (sources.load_model(path, dtype) for path in (folder, exact))
    for (name, a), (_, b) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert torch.equal(a, b), name
    assert not getattr(got.config, "quantization_config", None)


def test_float8_that_transformers_would_read_wrongly_is_refused(folder: Path) -> None:
    float8(folder, [24, 32])  # 64 rows: two whole blocks and one of 16; 32 rows: two blocks, not of the same size
    refuses(folder, r"is \[\d+, \d+\], no whole number of blocks of \[24, 32\]")


def test_float8_without_its_scales_is_refused(folder: Path) -> None:
    float8(folder, [16, 16])
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    rewrite(folder, lambda w: w.pop(f"{name}_scale_inv"))
    refuses(folder, rf"{name} is float8 without float scales")
    rewrite(folder, lambda w: w.update({f"{name}_scale_inv": weights[f"{name}_scale_inv"].to(torch.uint8)}))
    refuses(folder, rf"{name} is float8 without float scales")
    rewrite(folder, lambda w: w.update({f"{name}_scale_inv": torch.ones(2, 1)}))
    refuses(folder, rf"the scales of {name} \[64, 32\] are \[2, 1\]")
    rewrite(folder, lambda w: w.update(weights) or w.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}))
    refuses(folder, r"weight model\.layers\.0\.mlp\.up_proj\.input_scale has no place in the model")


def test_an_adapter_beside_whole_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refuses(folder, r"adapter_config\.json is a LoRA adapter beside a whole model")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    refuses(folder, r"holds a LoRA adapter \(adapter_config\.json\) and no model; merge it")
    with pytest.raises(MoEdgeError, match="holds a LoRA adapter"):
        sources.resolve(str(folder))


@pytest.fixture
def sharded(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_shards_are_whole_or_named(sharded: Path) -> None:
    want, first = logits(sharded), min(sharded.glob("*.safetensors"))
    index = sharded / "model.safetensors.index.json"
    shutil.copy(first, sharded / "model.safetensors")
    refuses(sharded, rf"holds model\.safetensors and {first.name}, two sets of weights")
    (sharded / "model.safetensors").unlink()
    text = index.read_text()
    index.unlink()
    refuses(sharded, rf"holds {first.name}, but neither model\.safetensors nor")
    index.write_text(text.replace(first.name, f"../{first.name}"))
    refuses(sharded, "which is no safetensors file of its folder")
    index.write_text(text)
    data = first.read_bytes()
    first.unlink()
    refuses(sharded, rf"{first.name} is missing, which model\.safetensors\.index\.json names")
    first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refuses(sharded, rf"{first.name} is a Git LFS pointer, .*git lfs pull")
    first.write_bytes(data[:-1])
    refuses(sharded, rf"{first.name} is damaged: .*Download it again")
    first.write_bytes(data)
    assert torch.equal(logits(sharded), want)
    second = sorted(sharded.glob("*.safetensors"))[1]
    save_file({**load_file(second), **load_file(first)}, second, {"format": "pt"})
    refuses(sharded, rf"{second.name} and {first.name} both hold ")


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("config.json", {"vocab_size": "many"}, r"transformers refuses .*config\.json: .*'vocab_size'.*expected int"),
        ("config.json", {"num_attention_heads": 5}, r"transformers refuses .*config\.json: .*not a multiple"),
        ("config.json", {"head_dim": "x"}, r"transformers refuses .*config\.json"),
        ("config.json", {"dtype": "float99"}, r"transformers refuses .*config\.json"),
        ("generation_config.json", {"max_new_tokens": -1}, r"transformers refuses .*generation_config\.json"),
    ],
)
def test_what_transformers_refuses_is_one_sentence_with_the_file(
    file: str, keys: dict[str, Any], message: str, folder: Path
) -> None:
    edit(folder / file, **keys)
    refuses(folder, message)


def test_export_names_the_users_own_tokenizer_and_not_a_copy(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"BPE"', '"BPE2"'))
    with pytest.raises(MoEdgeError, match=r"tokenizer") as refused:
        export(folder, tmp_path / "out", ["portable"], label="x")
    assert str(folder) in str(refused.value)
    assert ".partial" not in str(refused.value)


def test_how_a_config_says_it_was_run_changes_nothing(folder: Path) -> None:
    want = logits(folder)
    edit(folder / "config.json", _attn_implementation="flash_attention_2", attn_implementation="flash_attention_3")
    assert torch.equal(logits(folder), want)
    leftovers = {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "use_cache": False}
    edit(folder / "config.json", **leftovers, _attn_implementation=None, attn_implementation=None)
    assert torch.equal(logits(folder), want)
    assert np.array_equal(TorchEngine(folder).prefill(IDS).logits, want.numpy())


def test_no_warning_of_a_library_reaches_the_user(
    folder: Path,
    make_plan: Callable[..., Any],
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """``past_key_values`` is deprecated since transformers 5.24 and goes with 5.40."""
    from transformers.utils import logging

    model = sources.load_model(folder)
    plan, _ = make_plan(model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    logging.get_logger("transformers.utils.generic").warning_once.cache_clear()
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = TorchEngine(tmp_path / "moe")
        step = engine.prefill(IDS)
        engine.decode(IDS[:, :1], step.cache)
        trace(modeling.load(tmp_path / "moe")[0])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
