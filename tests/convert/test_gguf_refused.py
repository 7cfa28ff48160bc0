"""What would be lost of a GGUF file, or made up, is refused by name, and nothing of it is cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.convert import sources


def scaling(kind: str, architecture: str = "llama", **keys: Any) -> dict[str, Any]:
    return {f"{architecture}.rope.scaling.{key}": value for key, value in {"type": kind, **keys}.items()}


VECTOR = np.ones(32, dtype=np.float32)
MATRIX = np.ones((64, 32), dtype=np.float32)
ONE_TOKEN: dict[str, Any] = {
    "tokenizer.ggml.tokens": ["a"],
    "tokenizer.ggml.token_type": [1],
    **{f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos", "padding", "unknown")},
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "experts": ({}, {"blk.0.ffn_gate_exps.weight": np.stack([MATRIX] * 4)}, r"blk\.0\.ffn_gate_exps.* experts"),
    "a bias of q alone": ({}, {"blk.0.attn_q.bias": VECTOR}, r"tensor blk\.0\.attn_k\.bias .*is missing"),
    "a bias of k alone": ({}, {"blk.1.attn_k.bias": VECTOR[:16]}, r"blk\.1\.attn_k\.bias has no place"),
    "a bias of a norm": ({}, {"output_norm.bias": VECTOR}, r"output_norm\.bias has no place in a llama model"),
    "a bias of the output": ({}, {"output.bias": VECTOR}, r"output\.bias has no place"),
    "a scale": ({}, {"blk.0.ffn_up.scale": VECTOR[:1]}, r"blk\.0\.ffn_up\.scale has no place"),
    "an adapter's tensor": ({}, {"blk.0.ffn_up.weight.lora_a": MATRIX}, "lora_a has no place"),
    "a layer too many": ({}, {"blk.2.ffn_up.weight": MATRIX}, r"llama\.block_count is 2, .* tensors of 3 layers"),
    "a layer too few": ({"llama.block_count": 3}, {}, r"llama\.block_count is 3, .* tensors of 2 layers"),
    "a weight that is missing": ({}, {"blk.1.ffn_up.weight": None}, r"tensor blk\.1\.ffn_up\.weight is missing"),
    "a weight of another shape": ({}, {"blk.1.ffn_up.weight": MATRIX[:48]}, r"has shape \[48, 32\], .*want \[64, 32\]"),
    "NaN": ({}, {"blk.1.attn_norm.weight": VECTOR * np.nan}, r"blk\.1\.attn_norm\.weight holds NaN or infinity"),
    "a type without de-quantization": ({}, {"blk.1.ffn_up.weight": MATRIX.astype(np.int32)}, "of type I32, which"),
    "rope_freqs of no known kind": (
        {},
        {"rope_freqs.weight": np.float32([1, 3, 2, 1])},
        "is no scaling of Llama 3's kind",
    ),
    "rope_freqs of other heads": ({}, {"rope_freqs.weight": VECTOR}, r"rope_freqs\.weight does not fit"),
    "rope_freqs beside a scaling": (
        scaling("linear", factor=2.0),
        {"rope_freqs.weight": VECTOR[:4]},
        "only one can be applied",
    ),
    "one longrope table": (scaling("longrope"), {"rope_factors_long.weight": VECTOR[:4]}, r"_short\.weight is missing"),
    "longrope without tables": (scaling("longrope"), {}, r"rope_factors_long\.weight is missing"),
    "longrope without its factor": (
        {},
        {f"rope_factors_{name}.weight": VECTOR[:4] for name in ("long", "short")},
        r"rope\.scaling says something else",
    ),
    "an unknown scaling": (scaling("dynamic", factor=2.0), {}, r"llama\.rope\.scaling\.type is 'dynamic'"),
    "yarn without its context": (scaling("yarn", factor=2.0), {}, r"original_context_length is missing; YaRN"),
    "yarn with two factors": (
        scaling("yarn", factor=2.0, original_context_length=64, attn_factor=1.2),
        {},
        "attn_factor is 1.2",
    ),
    "yarn of DeepSeek": (scaling("yarn", factor=2.0, yarn_log_multiplier=0.1), {}, "yarn_log_multiplier is 0.1"),
    "half a rotation": ({"llama.rope.dimension_count": 4}, {}, r"rope\.dimension_count is 4 for heads of 8"),
    "other values than keys": ({"llama.attention.value_length": 4}, {}, r"attention\.value_length differs"),
    "heads layer by layer": ({"llama.attention.head_count_kv": [2, 4]}, {}, "_kv differs from layer to layer"),
    "kv heads as many as heads": ({"llama.attention.head_count_kv": None}, {}, r"attn_k\.weight has shape \[16, 32\]"),
    "experts stated": ({"llama.expert_count": 8}, {}, r"llama\.expert_count is 8, which MoEdge does not apply"),
    "not causal": ({"llama.attention.causal": False}, {}, r"attention\.causal is False"),
    "a pattern without a window": ({"llama.attention.sliding_window_pattern": 2}, {}, "without a sliding window"),
    "a negative scaling": (scaling("linear", factor=-2.0), {}, r"scaling\.factor is -2\.0, not a number above 0"),
    "more rotated than there is": ({"llama.rope.dimension_count": 1 << 31}, {}, "is 2147483648 for heads of 8"),
    "billions of layers": ({"llama.block_count": 1 << 31}, {}, r"block_count is 2147483648, but"),
    "an unknown key": ({"llama.attention.magic": 0.5}, {}, r"does not know what llama\.attention\.magic = 0\.5 means"),
    "no context length": ({"llama.context_length": None}, {}, r"llama\.context_length is missing"),
    "zero heads": ({"llama.attention.head_count": 0}, {}, r"head_count is 0, not a number above 0"),
    "heads as text": ({"llama.attention.head_count": "4"}, {}, r"head_count is '4', not a number above 0"),
    "rows without tokens": (ONE_TOKEN, {}, "260 rows for 1 tokens"),
    "another vocabulary size": ({"llama.vocab_size": 300}, {}, r"llama\.vocab_size is 300"),
    "a projector of images": ({"general.type": "mmproj"}, {}, "of type 'mmproj' is no language model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_or_made_up_is_refused_by_name(
    case: str, tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    metadata, tensors, message = REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata, tensors)
    with pytest.raises(MoEdgeError, match=message) as caught:
        sources.resolve(str(path))
    assert str(path) in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert not moedge_cache.exists() or not [file for file in moedge_cache.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("family", "metadata", "message"),
    [
        ("qwen2", {"qwen2.attention.sliding_window": 8}, r"sliding_window is 8; no qwen2 model has"),
        ("olmo2", {"olmo2.attention.sliding_window": 8}, r"sliding_window is 8; no olmo2 model has"),  # OLMo 3
        ("gemma3_text", {"gemma3.attention.sliding_window": None}, r"sliding_window is missing; without it a Gemma 3"),
        ("gemma3_text", {"gemma3.attention.sliding_window_pattern": [True]}, r"has 1 entries for 2 layers"),
        ("phi3", {"phi3.rope.dimension_count": 7}, r"rope\.dimension_count is 7 for heads of 8, which"),
        ("phi3", scaling("linear", "phi3", factor=2.0), r"type is 'linear', which transformers' Phi-3 cannot have"),
    ],
)
def test_what_a_family_has_no_place_for_is_refused(
    family: str,
    metadata: dict[str, Any],
    message: str,
    tiny_model: Callable[..., Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    moedge_cache: Path,
) -> None:
    with pytest.raises(MoEdgeError, match=message):
        sources.resolve(str(write_gguf(tmp_path / "m.gguf", tiny_model(family), metadata)))


def test_a_big_endian_file_is_refused(
    tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    with pytest.raises(MoEdgeError, match="big-endian"):
        sources.resolve(str(write_gguf(tmp_path / "m.gguf", tiny_llama(), big=True)))


def test_other_architectures_are_refused(
    tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    with pytest.raises(MoEdgeError, match=r"unknown architecture 'bert' in the GGUF file; supported: llama, qwen2, "):
        sources.resolve(str(write_gguf(tmp_path / "m.gguf", tiny_llama(), architecture="bert")))


@pytest.mark.parametrize("keep", [2, 30, 0.3, 0.9])
def test_a_truncated_file_is_refused_and_leaves_nothing(
    keep: float, tiny_llama: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, moedge_cache: Path
) -> None:
    path = write_gguf(tmp_path / "cut.gguf", tiny_llama())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(MoEdgeError, match=r"cut\.gguf is not a whole GGUF file"):
        sources.resolve(str(path))
    assert not list(moedge_cache.rglob("*.safetensors"))
