"""The tensors of a GGUF file as weights of a transformers model, one at a time.

The model's skeleton says which weights there must be; a table says what each is called in the file. Both directions
are checked before anything is written: a weight without a tensor would be random, a tensor without a weight lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.convert.errors import first_sentence
from moedge.convert.sources.gguf_files import GGUF, values

if TYPE_CHECKING:
    import numpy as np

ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are facts about the rotary embedding, read by :mod:`moedge.convert.sources.gguf_config`."""
_SHARD = 2 << 30
"""Bytes of one safetensors file; two of these are held in memory."""

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_OWN = {"gemma2": _POST_NORMS, "gemma3_text": _POST_NORMS, "olmo2": _POST_NORMS, "phi3": _FUSED}
"""Names of llama.cpp that differ from :data:`_LAYER`, by model type (gguf-py's tensor_mapping.py)."""


def plan(file: GGUF, config: Any) -> dict[str, str]:
    """Return weight -> tensor for the model that ``config`` describes, after checking that names and shapes agree.

    Raises:
        MoEdgeError: a weight that the file does not hold, a tensor that the model has no place for, another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise file.refuse(f"its metadata make no {config.model_type} model: {first_sentence(error)}") from error
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    found = {name: tensor_name(name, config.model_type) for name in shapes}
    left = sorted(set(file.tensors) - set(found.values()) - set(ROPE))
    if left:
        raise file.refuse(_no_place(left, config))
    missing = sorted((tensor, name) for name, tensor in found.items() if tensor not in file.tensors)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise file.refuse(f"tensor {missing[0][0]}{others} is missing, the model's {missing[0][1]}; download it again.")
    for name, tensor in found.items():
        shape = tuple(file.tensors[tensor].shape[::-1].tolist())
        if shape != shapes[name]:
            raise file.refuse(
                f"tensor {tensor} has shape {list(shape)}, its metadata want {list(shapes[name])}; download it again."
            )
    return found


def tensor_name(name: str, model_type: str) -> str:
    """Return what llama.cpp calls a weight of transformers."""
    module, _, kind = name.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{kind}"
    _, _, number, part = module.split(".", 3)
    table = {**_LAYER, **_OWN.get(model_type, {})}
    return f"blk.{number}.{table.get(part, part)}.{kind}"


def _no_place(left: list[str], config: Any) -> str:
    others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    if any("_exps" in name or "ffn_gate_inp" in name for name in left):
        return f"tensor {left[0]}{others} holds experts: it is a Mixture-of-Experts already, give a dense model."
    return (
        f"tensor {left[0]}{others} has no place in a {config.model_type} model of {config.num_hidden_layers} layers "
        "and would be lost; convert from the Hugging Face folder of this model instead."
    )


def write(file: GGUF, config: Any, weights: dict[str, str], folder: Path) -> None:
    """Write float32 safetensors to ``folder``, at most 2 GiB each with an index.

    Raises:
        MoEdgeError: a tensor cannot be de-quantized, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in weights.items():
        n_bytes = 4 * int(file.tensors[tensor].n_elements)
        if shards[-1] and size + n_bytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + n_bytes, total + n_bytes
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        arrays = {name: _undo(name, values(file, weights[name]), config) for name in names}
        try:
            save_file(arrays, folder / shard, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise MoEdgeError(
                f"Cannot write the float32 copy of {file.path} ({total / 2**30:.1f} GiB) to the cache: {error}; make "
                "room, or set MOEDGE_CACHE to another folder."
            ) from error
        index |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _undo(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """Undo what llama.cpp's converter did to a weight."""
    import numpy as np

    if config.model_type.startswith("gemma") and "norm" in name:
        return value - np.float32(1)  # the file has 1 + w, as Gemma multiplies by it
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if config.model_type in ("llama", "mistral") and heads:
        # Rows of a head as interleaved rotary pairs (0, d/2, 1, d/2 + 1, ...); transformers rotates halves.
        n = getattr(config, heads)
        value = value.reshape(n, len(value) // n // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)
