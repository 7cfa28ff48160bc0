"""What the metadata of a GGUF file say about the model, as a config of transformers.

Every key ``<architecture>.*`` is applied here, listed as one that changes nothing, or refused by name. Where a key is
missing, llama.cpp's default holds, which is not always that of transformers.
"""

from __future__ import annotations

import re
from typing import Any

from moedge.convert.sources.gguf_files import ARCHITECTURES, GGUF, Keys, values

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_ext_factor": (1,),  # llama.cpp's own for YaRN
}
"""Keys with the values that change nothing; another value is refused."""
_IGNORED = (
    "rope.scaling.finetuned",  # printed by llama.cpp, never computed with
    "tensor_data_layout",  # what the converter read
)
"""Keys that change nothing, whatever they say."""
_BIASED = ("llama", "qwen3", "gemma2", "gemma3_text", "olmo2")
"""Model types whose attention has biases or not (``attention_bias``, in all four projections)."""


def build(file: GGUF, ids: dict[str, int | None]) -> Any:
    """Return the config of the model in ``file``.

    Args:
        file: the GGUF file.
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of its vocabulary.

    Raises:
        MoEdgeError: a key that is missing, out of range or not known, or a rotary scaling that cannot be expressed.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    keys = Keys(file, f"{file.architecture}.")
    for key, allowed in _NEUTRAL.items():
        keys.only(key, *allowed)
    for key in _IGNORED:
        keys.take(key)
    facts = {**_sizes(file, keys), **ids}
    model_type, window = _window(keys, facts["num_hidden_layers"])
    facts |= window
    facts |= _gemma(keys, facts) if model_type.startswith("gemma") else {}
    facts["rope_parameters"] = _rope(file, keys, facts)
    if model_type == "phi3":
        scaled = facts["rope_parameters"].get("original_max_position_embeddings")
        facts["original_max_position_embeddings"] = scaled or facts["max_position_embeddings"]
    if model_type in _BIASED:
        facts["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if model_type == "llama":
        facts["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    keys.done()
    try:
        names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
        return AutoConfig.for_model(model_type, architectures=names, dtype="float32", **facts)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]  # the first line only names a class
        raise file.refuse(f"its metadata make no {model_type} model: {reason[0].strip()}") from error


def _sizes(file: GGUF, keys: Keys) -> dict[str, Any]:
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", hidden // heads or 1)
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("attention.value_length", f"differs from the {head_dim} of the keys, which is not supported")
    for key in ("attention.key_length_swa", "attention.value_length_swa"):
        keys.only(key, head_dim)
    layers = keys.whole("block_count")
    blocks = {int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if len(blocks) != layers or blocks != set(range(layers)):  # the first: a damaged number may be huge
        raise keys.refuse("block_count", f"is {layers}, but the file holds tensors of {len(blocks)} layers")
    embedding = file.tensors.get("token_embd.weight")
    rows = int(embedding.shape[-1]) if embedding is not None else 0
    tokens = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    keys.only("vocab_size", rows)
    if rows != tokens:
        raise file.refuse(f"token_embd.weight has {rows} rows for {tokens} tokens; download it again.")
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **({"head_dim": head_dim} if head_dim * heads != hidden or file.architecture not in ("phi3", "qwen2") else {}),
    }


def _window(keys: Keys, layers: int) -> tuple[str, dict[str, Any]]:
    """Return the model type, which for a Llama depends on it, and the entries about sliding windows."""
    architecture = keys.file.architecture
    default = {"gemma2": 4096}.get(architecture)  # that of llama.cpp
    window = int(keys.given("attention.sliding_window", default) or 0)
    pattern = keys.take("attention.sliding_window_pattern", kind=(int, list))
    model_type = ARCHITECTURES[architecture]
    if not window:
        if architecture == "gemma3":
            raise keys.refuse("attention.sliding_window", "is missing; without it a Gemma 3 is another model")
        if pattern:
            raise keys.refuse("attention.sliding_window_pattern", "is given without a sliding window")
        return model_type, {"sliding_window": None} if architecture == "phi3" else {}
    if architecture in ("gemma2", "gemma3"):
        local = _local_layers(keys, pattern or {"gemma2": 2, "gemma3": 6}[architecture], layers)
        types = ["sliding_attention" if one else "full_attention" for one in local]
        return model_type, {"sliding_window": window, "layer_types": types}
    if architecture in ("llama", "phi3") and not pattern:
        # A Llama with a sliding window is what transformers calls a Mistral.
        return "mistral" if architecture == "llama" else model_type, {"sliding_window": window}
    raise keys.refuse("attention.sliding_window", f"is {window}; no {model_type} model has a sliding window")


def _local_layers(keys: Keys, pattern: Any, layers: int) -> list[bool]:
    """Return which layers see only the window: listed, or all but each ``pattern``-th."""
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise keys.refuse("attention.sliding_window_pattern", f"has {len(pattern)} entries for {layers} layers")
        return [bool(one) for one in pattern]
    return [i % pattern < pattern - 1 for i in range(layers)]


def _gemma(keys: Keys, facts: dict[str, Any]) -> dict[str, Any]:
    """Soft caps, and the scale of attention scores: no key says it; llama.cpp knows the 27B models by their depth."""
    gemma2 = keys.file.architecture == "gemma2"
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if gemma2 else {}
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    found = {name: keys.given(name, caps.get(name)) for name in names}
    big = facts["num_hidden_layers"] == (46 if gemma2 else 62)
    scalar = facts["hidden_size"] // facts["num_attention_heads"] if big else facts["head_dim"]
    return {**found, "query_pre_attn_scalar": scalar}


def _rope(file: GGUF, keys: Keys, facts: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters``."""
    theta = keys.number("rope.freq_base", 10000.0)
    rotary: dict[str, Any] = {"rope_theta": theta, **_partial(keys, facts)}
    if file.architecture == "gemma3":  # a scaling concerns the global layers only
        local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
        return {"full_attention": {**rotary, **_scaling(file, keys, facts, theta)}, "sliding_attention": local}
    keys.only("rope.freq_base_swa", theta)
    return {**rotary, **_scaling(file, keys, facts, theta)}


def _partial(keys: Keys, facts: dict[str, Any]) -> dict[str, float]:
    """Return the share of a head that is rotated, where it is not all of it."""
    whole = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
    keys.only("rope.dimension_count_swa", whole)
    dims = keys.whole("rope.dimension_count", whole)
    if dims == whole:
        return {}
    if keys.file.architecture == "phi3" and dims < whole and dims % 2 == 0 and int(whole * (dims / whole)) == dims:
        return {"partial_rotary_factor": dims / whole}
    if keys.file.architecture.startswith("gemma") and dims == facts["hidden_size"] // facts["num_attention_heads"]:
        return {}  # every Gemma rotates whole heads; this is what a writer puts here that does not know the head size
    raise keys.refuse("rope.dimension_count", f"is {dims} for heads of {whole}, which this family cannot have")


def _scaling(file: GGUF, keys: Keys, facts: dict[str, Any], theta: float) -> dict[str, Any]:
    """Return how positions are scaled: ``rope_type`` and what belongs to it."""
    kind = keys.take("rope.scaling.type", kind=str)
    older = keys.given("rope.scale_linear")
    factor = keys.given("rope.scaling.factor") or older or 1.0
    original = int(keys.given("rope.scaling.original_context_length") or 0)
    attention = keys.given("rope.scaling.attn_factor")  # on top of what the kind of scaling brings along
    yarn = {
        name: value
        for name, key in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"))
        if (value := keys.given(f"rope.scaling.yarn_{key}")) is not None
    }
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise keys.refuse("rope.scaling.type", f"is {kind!r}; known: none, linear, yarn, longrope")
    if kind == "longrope" or any(name.startswith("rope_factors") for name in file.tensors):
        return _longrope(file, keys, facts, kind, factor, attention, original)
    if attention not in (None, 1):
        raise keys.refuse("rope.scaling.attn_factor", f"is {attention!r}, which MoEdge applies to longrope only")
    if "rope_freqs.weight" in file.tensors:
        if kind == "yarn" or factor != 1:
            raise keys.refuse("rope.scaling.type", "is given beside rope_freqs.weight; only one can be applied")
        return _llama3(file, facts, theta)
    if kind == "none" or (factor == 1 and kind != "yarn"):
        return {"rope_type": "default"}
    if file.architecture == "phi3":
        raise keys.refuse("rope.scaling.type", f"is {kind or 'linear'!r}, which transformers' Phi-3 cannot have")
    if kind == "yarn":
        if not original:
            raise keys.refuse("rope.scaling.original_context_length", "is missing; YaRN needs it")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **yarn}
    return {"rope_type": "linear", "factor": factor}


def _longrope(
    file: GGUF,
    keys: Keys,
    facts: dict[str, Any],
    kind: str | None,
    factor: float,
    attention: float | None,
    original: int,
) -> dict[str, Any]:
    tensors = {name: f"rope_factors_{name.split('_')[0]}.weight" for name in ("long_factor", "short_factor")}
    for tensor in tensors.values():
        if tensor not in file.tensors:
            raise file.refuse(f"tensor {tensor} is missing, a longrope scaling needs it; download it again.")
    if kind not in (None, "longrope") or factor != 1 or not original or not attention:
        raise keys.refuse(
            "rope.scaling", "says something else than its rope_factors tensors (longrope wants attn_factor and "
            "original_context_length, and no factor)"
        )  # fmt: skip
    factors = {name: values(file, tensor).ravel().tolist() for name, tensor in tensors.items()}
    found = {"rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": attention}
    found["factor"] = facts["max_position_embeddings"] / original  # transformers asks for it, and warns otherwise
    return {**found, **factors}


def _llama3(file: GGUF, facts: dict[str, Any], theta: float) -> dict[str, Any]:
    """Return the parameters of Llama 3.1's scaling behind ``rope_freqs.weight``: what each frequency is divided by.

    A frequency f = 1 / wavelength stays as it is above high / L, is divided by ``factor`` below low / L, and by
    1 / ((1 - s) / factor + s) with s = (f L - low) / (high - low) in between (L: original context). Only the ratios of
    L, low and high count, so low is 1 as in every published model; two frequencies in between give the others.
    """
    import numpy as np

    found = values(file, "rope_freqs.weight").ravel().astype(np.float64)
    dims = 2 * len(found)
    frequency = theta ** -(np.arange(0, dims, 2) / dims) / (2 * np.pi)
    head_dim = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
    factor = round(float(found.max()), 4)
    if dims != head_dim or found.min() <= 0:
        raise file.refuse("tensor rope_freqs.weight does not fit the heads of this model; download it again.")
    if np.allclose(found, 1, rtol=1e-6, atol=0):
        return {"rope_type": "default"}
    candidates = [(8192, 4.0)]
    between = (found > 1 + 1e-4) & (found < factor - 1e-4)
    if between.sum() > 1:
        smooth = (1 / found[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(frequency[between], smooth, 1)  # s = f L / (high - 1) - 1 / (high - 1)
        high = round(1 - 1 / offset, 3)
        candidates.append((round(slope * (high - 1)), high))
    for original, high in candidates:
        smooth = np.clip((frequency * original - 1) / (high - 1), 0, 1)
        # 1e-4: the converter computes in float32 (1e-6), and its own corners may fall on either side.
        if original > 0 and high > 1 and np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0):
            limits = {"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": original}
            return {"rope_type": "llama3", "factor": factor, **limits}
    raise file.refuse("tensor rope_freqs.weight is no scaling of Llama 3's kind; MoEdge cannot apply it.")
