"""GGUF files become the model that they describe, or are refused by the name of what would be lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, sources
from moedge.convert.sources import gguf_folder
from moedge.runtime.run.fingerprint import fingerprint

IDS = torch.arange(2, 98)[None]
"""96 tokens: a rotary scaling that is lost moves the logits of most of them."""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def opened(path: Path) -> Any:
    return sources.load_model(sources.resolve(str(path)).folder)


def assert_same(found: Any, model: Any) -> None:
    """Bits for bits, but a Gemma: 1 + w rounds a norm by 2^-24, and logits are sums over some 10 of them."""
    gemma = model.config.model_type.startswith("gemma")
    torch.testing.assert_close(logits(found), logits(model), atol=0, rtol=0) if not gemma else (
        torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    )


GEMMA = {"query_pre_attn_scalar": 8}
"""No key of a GGUF file says this; llama.cpp takes the head size, but for the 27B models."""
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{family: ({"family": family}, {}) for family in adapters.FAMILIES if not family.startswith("gemma")},
    **{family: ({"family": family, **GEMMA}, {}) for family in ("gemma2", "gemma3_text")},
    "untied": ({"tie_word_embeddings": False}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "biases of qwen3": ({"family": "qwen3", "attention_bias": True}, {}),
    "heads larger than hidden size / heads": ({"head_dim": 24}, {}),
    "layer by layer, all the same": ({}, {"llama.feed_forward_length": [64, 64]}),
    "phi3 without a window": ({"family": "phi3", "sliding_window": None}, {}),
    "phi3 that rotates a part": (
        {
            "family": "phi3",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
        {"phi3.rope.dimension_count": 6},
    ),
    "gemma3, listed windows": (
        {"family": "gemma3_text", "layer_types": ["full_attention", "sliding_attention"], **GEMMA},
        {"gemma3.attention.sliding_window_pattern": [False, True]},
    ),
    "gemma3, soft cap": (
        {"family": "gemma3_text", "final_logit_softcapping": 3.0, **GEMMA},
        {"gemma3.final_logit_softcapping": 3.0},
    ),
    "gemma2, defaults of llama.cpp": (
        {"family": "gemma2", "sliding_window": 4096, **CAPS, **GEMMA},
        {f"gemma2.{key}": None for key in ("attention.sliding_window", *CAPS)},
    ),
    "keys that change nothing": (
        {},
        {"llama.expert_count": 0, "llama.attention.causal": True, "llama.rope.scaling.finetuned": False, "x.y": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(
    case: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    options, metadata = CASES[case]
    model = tiny_model(**options)
    assert_same(opened(write_gguf(tmp_path / "m.gguf", model, metadata)), model)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def scaling(kind: str, architecture: str = "llama", **keys: Any) -> dict[str, Any]:
    return {f"{architecture}.rope.scaling.{key}": value for key, value in {"type": kind, **keys}.items()}


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (rope("linear", factor=4.0), scaling("linear", factor=4.0)),
    "linear, the key of old": (rope("linear", factor=4.0), {"llama.rope.scale_linear": 4.0}),
    "none": (rope("default"), scaling("none", factor=4.0)),
    "yarn": (
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
        scaling("yarn", factor=4.0, original_context_length=64),
    ),
    "yarn, everything stated": (
        rope(
            "yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.5, beta_fast=20.0, beta_slow=2.0
        ),
        scaling(
            "yarn",
            factor=4.0,
            original_context_length=64,
            yarn_attn_factor=1.5,
            yarn_beta_fast=20.0,
            yarn_beta_slow=2.0,
            yarn_ext_factor=1.0,
        ),
    ),
    "qwen3 with yarn": (
        {"family": "qwen3", **rope("yarn", factor=4.0, original_max_position_embeddings=64)},
        scaling("yarn", "qwen3", factor=4.0, original_context_length=64),
    ),
    "gemma3: global layers only": (
        {
            "family": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            **GEMMA,
        },
        scaling("linear", "gemma3", factor=8.0),
    ),
    "gemma3: both bases": (
        {
            "family": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            **GEMMA,
        },
        {"gemma3.rope.freq_base_swa": 100.0},
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_a_rotary_scaling_in_the_metadata_is_applied(
    case: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    options, metadata = SCALINGS[case]
    model = tiny_model(**options)
    assert_same(opened(write_gguf(tmp_path / "m.gguf", model, metadata)), model)


def llama3_factors(original: int, high: float, dims: int, factor: float, theta: float = 10000.0) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1: what each rotary frequency is divided by."""
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * theta ** (i / dims)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (high - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(("original", "high"), [(8192, 4.0), (64, 4.0), (1024, 32.0)])
def test_the_scaling_of_llama_3_is_recovered_from_its_tensor(
    original: int,
    high: float,
    tiny_llama: Callable[..., Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    moedge_cache: Path,
) -> None:
    limits = {"high_freq_factor": high, "original_max_position_embeddings": original}
    model = tiny_llama(head_dim=64, rope_parameters={"rope_theta": 10000.0, **LLAMA3, **limits})
    factors = llama3_factors(original, high, 64, 8.0)
    found = opened(write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors}))
    assert found.config.rope_parameters == model.config.rope_parameters
    assert_same(found, model)


@pytest.mark.parametrize("length", [30, 96])
def test_longrope_has_both_of_its_tables(
    length: int, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    tables = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 5.0, 8.0]}
    limits = {"original_max_position_embeddings": 40}
    model = tiny_model("phi3", **limits, **rope("longrope", attention_factor=1.25, **limits, **tables))
    tensors = {f"rope_factors_{name.split('_')[0]}.weight": np.float32(value) for name, value in tables.items()}
    keys = {"phi3.rope.scaling.attn_factor": 1.25, "phi3.rope.scaling.original_context_length": 40}
    found = opened(write_gguf(tmp_path / "m.gguf", model, keys, tensors))
    ids = IDS[:, :length]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert found.config.original_max_position_embeddings == 40


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_tensors_are_de_quantized(
    kind: str, tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    import gguf

    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight.numpy()
    number = gguf.GGMLQuantizationType[kind]
    path = write_gguf(
        tmp_path / "m.gguf", model, tensors={"blk.1.ffn_up.weight": (gguf.quants.quantize(weight, number), number)}
    )
    found = opened(path).model.layers[1].mlp.up_proj.weight.numpy()
    # Blocks of 32 numbers: half a step of the range that the type has, 4 bits at worst; bfloat16 keeps 8 bits.
    steps = {"Q4": 15, "Q5": 31, "Q8": 255}.get(kind[:2])
    bound = np.abs(weight).max() * 2 / steps if steps else np.abs(weight) / 2**8
    assert (np.abs(found - weight) <= bound).all()
    assert not np.array_equal(found, weight)


def test_a_file_is_read_once_and_a_damaged_copy_is_made_again(
    tiny_llama: Callable[..., Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    moedge_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    source = sources.resolve(str(path))
    assert (source.kind, source.label) == ("gguf", "tiny (float32 de-quantized from the F32 GGUF)")
    assert moedge_cache in source.folder.parents
    weights = source.folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert sources.resolve(str(path)) == source
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(weights.read_bytes()[:-50])
    assert sources.resolve(str(path)) == source
    assert_same(sources.load_model(source.folder), tiny_llama())
    monkeypatch.setattr(gguf_folder, "READER", gguf_folder.READER + 1)  # what another version cached is not trusted
    assert sources.resolve(str(path)).folder != source.folder


def test_weights_in_several_files_are_the_same_model(
    tiny_llama: Callable[..., Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    moedge_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moedge.convert.sources import gguf_weights

    monkeypatch.setattr(gguf_weights, "_SHARD", 1 << 15)
    model = tiny_llama()
    source = sources.resolve(str(write_gguf(tmp_path / "m.gguf", model)))
    assert len(list(source.folder.glob("model-*.safetensors"))) > 1
    assert_same(sources.load_model(source.folder), model)


@pytest.fixture
def split(tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """A model in three files."""
    write_gguf(tmp_path / "m.gguf", tiny_llama(), split=7)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return parts


def test_a_split_file_is_joined_whichever_part_is_given(
    split: list[Path], tiny_llama: Callable[..., Any], moedge_cache: Path
) -> None:
    found = {sources.resolve(str(part)).folder for part in split}
    assert len(found) == 1
    assert_same(sources.load_model(found.pop()), tiny_llama())


def test_a_split_file_changes_with_each_of_its_parts(
    split: list[Path],
    tiny_llama: Callable[..., Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    moedge_cache: Path,
) -> None:
    source, known = sources.resolve(str(split[0])), fingerprint(str(split[0]))
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "m.gguf", tiny_llama(seed=1), split=7)
    split[2].write_bytes((tmp_path / "other" / split[2].name).read_bytes())
    changed = sources.resolve(str(split[0]))
    assert changed.folder != source.folder
    assert changed.sha256 != source.sha256
    assert fingerprint(str(split[0])) != known


def test_parts_that_are_missing_or_misnamed_are_named(split: list[Path], tmp_path: Path, moedge_cache: Path) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(split[1].read_bytes())
    with pytest.raises(MoEdgeError, match=r"alone\.gguf says that it is number 1 \(from 0 on\) of 3 parts \(split"):
        sources.resolve(str(alone))
    third = split[2].read_bytes()
    split[2].write_bytes(split[1].read_bytes())
    with pytest.raises(MoEdgeError, match=r"00003-of-00003\.gguf says that it is number 1 \(from 0 on\) of 3"):
        sources.resolve(str(split[0]))
    split[2].unlink()
    for given in split[:2]:
        with pytest.raises(
            MoEdgeError, match=rf"{given.name} is part \d of 3 .*; m-00003-of-00003\.gguf is missing besi"
        ):
            sources.resolve(str(given))
    split[2].write_bytes(third)
    assert sources.resolve(str(split[0])).kind == "gguf"


def test_a_recipe_of_a_split_file_says_at_once_what_is_missing(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(MoEdgeError, match=r"m-00002-of-00003\.gguf is missing"):
        fingerprint(str(split[0]))


def test_numbers_are_the_decimals_that_the_original_had(
    tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    folder = sources.resolve(str(write_gguf(tmp_path / "m.gguf", tiny_llama(rms_norm_eps=1e-5)))).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # the file has the float32 9.999999747378752e-06
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 257, 258)


def test_the_largest_gemmas_scale_scores_by_hidden_size_over_heads(
    tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    model = tiny_model("gemma3_text", layers=62, hidden=32, width=32, head_dim=16, query_pre_attn_scalar=8)
    folder = sources.resolve(str(write_gguf(tmp_path / "m.gguf", model))).folder
    assert json.loads((folder / "config.json").read_text())["query_pre_attn_scalar"] == 8  # 32 hidden / 4 heads
