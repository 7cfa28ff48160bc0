"""Statistics and plans of tiny models, and tiny GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge.convert import calibration, methods
from moedge.convert.plan import MoEPlan


@pytest.fixture(scope="session")
def token_windows() -> np.ndarray:
    """Calibration ids, int64 [4, 48]."""
    return np.random.default_rng(0).integers(0, 256, size=(4, 48))


@pytest.fixture(scope="session")
def make_plan(token_windows: np.ndarray) -> Callable[..., tuple[MoEPlan, list[calibration.LayerStatistics]]]:
    """Return a function (model, **CMoE parameters) -> (plan, statistics); the layout is S2A3E8 unless given."""

    def make(model: Any, *, k_a: int = 6, **params: Any) -> tuple[MoEPlan, list[calibration.LayerStatistics]]:
        statistics = calibration.collect(model, token_windows, k_a=k_a, profile=params.get("profile", "raw"))
        layout = {"shared": 2, "active": 3, "experts": 8, "k_a": k_a, **params}
        return methods.convert("cmoe", statistics, model, **layout), statistics

    return make


GGUF_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""Model types that llama.cpp calls otherwise."""


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """Name -> float32 tensor, as llama.cpp's converter makes them: its own table of names, rotary pairs, 1 + norm."""
    import gguf

    config = model.config
    architecture = GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        value = parameter.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        if heads and architecture == "llama":
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if module.endswith("norm") and architecture.startswith("gemma"):
            value = value + np.float32(1)
        tensors[f"{names.get_name(module)}.{kind}"] = np.ascontiguousarray(value)
    return tensors


def gguf_metadata(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Metadata of ``model`` and of a byte-level ``tokenizer``, as llama.cpp's converter writes them.

    transformers builds its own tokenizer for a Qwen2, whatever tokenizer.json says: only ``qwen2`` agrees with it.
    """
    config = model.config
    architecture = GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    heads = config.num_attention_heads
    rope = config.rope_parameters
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "attention.value_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if config.model_type in ("mistral", "phi3", "gemma2", "gemma3_text"):
        keys["attention.sliding_window"] = config.sliding_window or 0
    if config.model_type == "gemma2":
        keys["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        keys["attention.sliding_window_pattern"] = 2
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    return {
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if architecture == "qwen2" else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.unknown_token_id": 259,
    }


@pytest.fixture(scope="session")
def write_gguf(tiny_tokenizer: Any) -> Callable[..., Path]:
    """Return a function that writes a tiny model as a GGUF file in float32.

    ``write(path, model, metadata, tensors, split=0, big=False)``: ``metadata`` and ``tensors`` change or add entries
    (None removes one); ``split`` is the most tensors of one part; the file has the byte order of ``big``.
    A tensor may be (bytes, GGMLQuantizationType).
    """
    import gguf

    def write(
        path: Path,
        model: Any,
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        *,
        architecture: str | None = None,
        split: int = 0,
        big: bool = False,
    ) -> Path:
        order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
        own = GGUF_ARCHITECTURES.get(model.config.model_type, model.config.model_type)
        writer = gguf.GGUFWriter(str(path), architecture or own, split_max_tensors=split, endianess=order)
        for key, value in {**gguf_metadata(model, tiny_tokenizer), **(metadata or {})}.items():
            if value is not None and key != "general.architecture":
                kinds = {
                    bool: writer.add_bool,
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    str: writer.add_string,
                }
                kinds.get(type(value), writer.add_array)(key, value)
        for name, value in {**gguf_tensors(model), **(tensors or {})}.items():
            if isinstance(value, tuple):
                writer.add_tensor(name, value[0], raw_dtype=value[1])
            elif value is not None:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
