"""What a config.json may say: the keys that conversion and tracing honour, and those that change nothing.

transformers keeps every key that it does not know, or that its model class ignores, without a word. Such a key may be
all that tells a fork (other masks, multipliers, norms) from the family it is named after: then the model that
transformers builds is another one than its author's. So a key is honoured, known to be harmless, at a value that
changes nothing, at the default of the family's config class, or the folder is refused. Read from the modeling code of
transformers 5.23 and 5.24; tests/convert/test_config_keys.py finds fields of newer config classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from moedge import MoEdgeError
from moedge.convert import adapters
from moedge.convert.sources import float8


def _words(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


_SHAPE = _words(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters",
)
"""What every family's modeling code reads, and so what a trace of it holds."""

_GEMMA = (
    "attention_bias hidden_activation query_pre_attn_scalar sliding_window layer_types "
    "attn_logit_softcapping final_logit_softcapping"
)
_HONOURED: dict[str, frozenset[str]] = {
    family: _SHAPE | _words(more)
    for family, more in {
        "llama": "attention_bias mlp_bias",
        "mistral": "sliding_window",
        "qwen2": "use_sliding_window sliding_window max_window_layers layer_types",
        "qwen3": "attention_bias use_sliding_window sliding_window max_window_layers layer_types",
        "phi3": "sliding_window original_max_position_embeddings partial_rotary_factor",
        "gemma2": _GEMMA,
        "gemma3_text": f"{_GEMMA} rope_local_base_freq sliding_window_pattern",
        "olmo2": "attention_bias",
        "olmoe": "attention_bias clip_qkv num_experts num_local_experts num_experts_per_tok norm_topk_prob",
        "qwen3_moe": "attention_bias use_sliding_window sliding_window decoder_sparse_step moe_intermediate_size "
        "mlp_only_layers num_experts num_local_experts num_experts_per_tok norm_topk_prob",
        "mixtral": "sliding_window num_experts num_local_experts num_experts_per_tok",
    }.items()
}
_STEMS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "olmo2": "Olmo2",
    "olmoe": "Olmoe",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
}
"""How the classes of each family are called in transformers: ``LlamaForCausalLM``."""

_HARMLESS = _words(
    # Who wrote the file, with what.
    "model_type _name_or_path name_or_path _model_name_or_path _commit_hash transformers_version torch_dtype dtype",
    "use_bfloat16 unsloth_fixed unsloth_version transformers.js_config model_max_length max_sequence_length seq_length",
    "moedge",
    # Training only: dropout, initial values, losses.
    "initializer_range attention_dropout attn_pdrop resid_pdrop embd_pdrop dropout hidden_dropout classifier_dropout",
    "router_aux_loss_coef router_jitter_noise neftune_noise_alpha gradient_checkpointing",
    # How it is run, which is ours to choose (see sources.load_model), or how a product is summed up.
    "use_cache return_dict output_hidden_states output_attentions torchscript cache_implementation pretraining_tp",
    "attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal",
    "experts_implementation _experts_implementation",
    "_flash_attn_2_enabled is_llama_config",
    # Heads of other tasks, and fields of encoders that older versions of transformers wrote.
    "id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix",
    "is_decoder tie_encoder_decoder tf_legacy_loss output_past bos_token eos_token pad_token unk_token",
    # Generation, which generate() does not read from here.
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty",
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate",
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
)
_HARMLESS_ENDS = ("_token_id", "_token_ids")

_QUANTIZED = (
    "the weights are quantized; give the float model that they were made from, or save a de-quantized one in "
    "safetensors"
)
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "every token would see later ones, which no causal model with a cache computes"),
    "use_bidirectional_attention": (
        (False,),
        "every token would see later ones, which no causal model with a cache computes",
    ),
    "is_encoder_decoder": ((False,), "MoEdge converts decoders only"),
    "add_cross_attention": ((False,), "MoEdge converts decoders only"),
    "cross_attention_hidden_size": ((), "MoEdge converts decoders only"),
    "compression_config": ((), _QUANTIZED),
    "quantization": ((), _QUANTIZED),
    "pruned_heads": (({},), "heads were removed"),
    "per_layer_config": (({},), "layers of different shapes are not converted"),
    "chunk_size_feed_forward": ((0,), "the FFN would run in pieces"),
    "output_router_logits": ((False,), "it adds training losses to every forward pass; set it to false"),
    # What the family's class has no place for, unless it honours it (above).
    "attention_bias": ((False,), "this family has no such biases"),
    "mlp_bias": ((False,), "this family has no such biases"),
    "lm_head_bias": ((False,), "this family has no such bias"),
    "sliding_window": ((), "this family has no windows"),
    "partial_rotary_factor": ((1,), "this family rotates whole heads"),
    "rope_interleaved": ((False,), "this family rotates halves"),
    "use_mrope": ((False,), "this family has one position a token"),
    "use_qk_norm": ((False,), "transformers has this norm in the family, or not, whatever the key says"),
    "num_nextn_predict_layers": ((0,), "layers that predict further tokens are not converted"),
    "full_attn_mod": ((1,), "transformers ignores it"),
    "interpolate_factor": ((1,), "transformers ignores it"),
    "logit_scale": ((1,), "this family scales nothing"),
    "logits_scaling": ((1,), "this family scales nothing"),
    "residual_multiplier": ((1,), "this family scales nothing"),
    "embedding_multiplier": ((1,), "this family scales nothing"),
}
"""key -> (values beside null at which the model is the family's, why it is not at others)."""

_ROPE = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor original_max_position_embeddings",  # computed by transformers; export refuses it
    "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
    "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate finetuned",
    "longrope": "factor original_max_position_embeddings attention_factor short_factor long_factor",
}
"""rope_type -> its parameters."""
_ROPE_NAMES = {"su": "longrope"}  # what Phi-3 called it first


def check(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that may describe another model than transformers builds from it.

    Args:
        config: content of a config.json of a dense family, of a Mixture-of-Experts that can be split, or converted.
            Other model types pass: those are refused, or not, elsewhere.
        path: the file, for messages.

    Raises:
        MoEdgeError: naming each such key and value, and why.
    """
    family = str(config.get("model_type")).removeprefix(adapters.MOE_PREFIX)
    if family not in _HONOURED:
        return
    if (quantization := config.get("quantization_config")) is not None and not float8.is_fp8(config):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise MoEdgeError(f"{path}: quantization_config is of method {_short(method)}: {_QUANTIZED}.")
    found = [
        *_unknown(family, config),
        *_classes(family, config),
        *_rope(family, config),
        *_windows(family, config),
        *_numbers(family, config),
    ]
    if found:
        more = f" (and {len(found) - 4} more)" if len(found) > 4 else ""
        raise MoEdgeError(
            f"{path} describes a model that MoEdge would not compute as it is meant: {'; '.join(found[:4])}{more}. "
            "Remove a key only if it changes nothing in this model."
        )


def _unknown(family: str, config: dict[str, Any]) -> Iterator[str]:
    """Name the keys that nothing honours."""
    for key, value in sorted(config.items()):
        if value is None or key in _HONOURED[family] or key in _HARMLESS or key.endswith(_HARMLESS_ENDS):
            continue
        if key in _SPECIAL:
            continue
        neutral, reason = _NEUTRAL.get(key, ((), "MoEdge does not know this key"))
        if value not in neutral and not _is_default(family, key, value):
            yield f"{key} is {_short(value)}: {reason}"


def _is_default(family: str, key: str, value: Any) -> bool:
    """Whether the family's config class has this field with this default: a newer transformers writes it out."""
    default = _default(family, key)
    return default is not None and bool(default == value)


def _default(family: str, key: str) -> Any:
    """Default of a field of the family's config class; None where there is none (null is judged nowhere)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    field = CONFIG_MAPPING[family].__dataclass_fields__.get(key)
    return None if field is None else field.default


_SPECIAL = {
    "quantization_config",
    "architectures",
    "auto_map",
    "layer_types",
    "hidden_act",
    "sliding_window_size",
    "use_sliding_window",
    "max_window_layers",
    "_sliding_window_pattern",
}
"""Keys that the functions below judge together with others."""


def _classes(family: str, config: dict[str, Any]) -> Iterator[str]:
    """Name classes of somebody's own code: transformers would run its own class in their place. And two numbers."""
    experts = {config[key] for key in ("num_experts", "num_local_experts") if isinstance(config.get(key), int)}
    if len(experts) > 1:  # two names of one number
        yield "num_experts and num_local_experts differ"
    stem = _STEMS[family]
    if str(config["model_type"]).startswith(adapters.MOE_PREFIX):
        return  # ours
    own = {f"{stem}{kind}" for kind in ("ForCausalLM", "TextForCausalLM", "Model", "TextModel", "Config", "TextConfig")}
    own |= {"LLaMAForCausalLM"} if family == "llama" else set()  # of the first Llama conversions
    names = config.get("architectures") or []
    if not isinstance(names, list):
        yield f"architectures is {_short(names)}: not a list"
    elif other := [name for name in names if str(name) not in own]:
        yield f"architectures names {_short(other[0])}"
    mapped = config.get("auto_map") or {}
    if not isinstance(mapped, dict):
        yield f"auto_map is {_short(mapped)}: not an object"
        return
    for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        name = str(mapped.get(auto) or "").rpartition(".")[2]
        if name and name not in own:
            yield f"auto_map names code of its own, {name}, which is not run"


def _rope(family: str, config: dict[str, Any]) -> Iterator[str]:
    """Name what is not known, or said twice, about rotary embeddings."""
    named = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    if len(named) == 2 and named["rope_parameters"] != named["rope_scaling"]:
        yield "rope_parameters and rope_scaling differ"
    for key, value in named.items():
        if not isinstance(value, dict):
            yield f"{key} is {_short(value)}: not an object"
            continue
        kinds = [name for name in ("full_attention", "sliding_attention") if name in value]
        entries = {f"{key}.{name}": value[name] for name in kinds} if kinds else {key: value}
        if kinds and (family != "gemma3_text" or set(value) - set(kinds)):
            yield f"{key} has {', '.join(sorted(value))}: this family has one rotary embedding for all layers"
            continue
        if family == "gemma3_text" and bool(kinds) != (key == "rope_parameters"):
            # Gemma3TextConfig puts a flat rope_scaling into full_attention, and a nested one beside what it reads.
            what = f"has {kinds[0]}" if kinds else "has neither full_attention nor sliding_attention"
            yield f"{key} {what}: transformers would ignore it in this family"
            continue
        for name, entry in entries.items():
            if isinstance(entry, dict):
                yield from _rope_entry(family, name, entry, config)
            elif entry is not None:
                yield f"{name} is {_short(entry)}: not an object"


def _rope_entry(family: str, name: str, entry: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    kind, older = entry.get("rope_type"), entry.get("type")
    if family == "gemma3_text" and name == "rope_scaling":
        kind = kind or "default"  # which transformers has put there before, so that it never looks at the older name
    kind = kind or older or "default"
    if older is not None and _ROPE_NAMES.get(str(older), older) != _ROPE_NAMES.get(str(kind), kind):
        yield f"{name}.type is {_short(older)}: transformers would take rope_type {_short(kind)}"
    kind = _ROPE_NAMES.get(kind, kind) if isinstance(kind, str) else repr(kind)
    if family == "phi3" and kind == "yarn":
        kind = "longrope"  # so does transformers
    if kind not in _ROPE:
        yield f"{name} is of type {_short(kind)}; known: {', '.join(_ROPE)}"
        return
    known = {"rope_type", "type", "rope_theta", *_ROPE[kind].split()}
    for key, value in sorted(entry.items()):
        if value is None or key in known:
            continue
        if key == "partial_rotary_factor" and (family == "phi3" or value == 1):
            continue
        yield f"{name}.{key} is {_short(value)}: rope type {kind!r} has no such parameter"
    yield from _rope_numbers(family, name, kind, entry, config)
    key = "rope_local_base_freq" if name.endswith(".sliding_attention") else "rope_theta"
    if (top := config.get(key)) is not None and entry.get("rope_theta") not in (None, top):
        yield f"{key} is {_short(top)} and {name}.rope_theta {_short(entry['rope_theta'])}"


_POSITIVE = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar")
_POSITIVE_ROPE = _words(
    "factor rope_theta original_max_position_embeddings attention_factor low_freq_factor high_freq_factor beta_fast "
    "beta_slow"
)


def _numbers(family: str, config: dict[str, Any]) -> Iterator[str]:
    """Name numbers with which transformers computes something (mostly NaN) that nobody can have meant."""
    for key in _POSITIVE:
        if key in _HONOURED[family]:
            yield from _positive(key, config.get(key))
    if "partial_rotary_factor" in _HONOURED[family]:
        yield from _share("partial_rotary_factor", config.get("partial_rotary_factor"))


def _rope_numbers(family: str, name: str, kind: str, entry: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    for key in sorted(_POSITIVE_ROPE & set(_ROPE[kind].split()) | {"rope_theta"}):
        yield from _positive(f"{name}.{key}", entry.get(key))
    yield from _share(f"{name}.partial_rotary_factor", entry.get("partial_rotary_factor"))
    factor = entry.get("factor")
    if kind == "yarn" and _number(factor) and 0 < factor < 1:
        yield f"{name}.factor is {_short(factor)}: YaRN stretches, its factor is 1 or more"
    low, high = entry.get("low_freq_factor"), entry.get("high_freq_factor")
    if kind == "llama3" and _number(low) and _number(high) and high <= low:
        yield f"{name}.high_freq_factor is {_short(high)} and low_freq_factor {_short(low)}: the first must be larger"
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        if (value := entry.get(key)) is None:
            continue
        if not isinstance(value, list) or not all(_number(one) and one > 0 for one in value):
            yield f"{name}.{key} is {_short(value)}: not a list of numbers above 0"
        elif len(value) != (pairs := _rotary_pairs(family, entry, config)) and pairs:
            # One number would count for all frequencies.
            yield f"{name}.{key} has {len(value)} numbers: this model rotates {pairs} pairs"


def _rotary_pairs(family: str, entry: dict[str, Any], config: dict[str, Any]) -> int:
    """How many pairs of each head are rotated, as transformers counts; 0 where the sizes make no sense."""
    share = entry.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    head_dim, hidden, heads = (
        config.get(key, _default(family, key)) for key in ("head_dim", "hidden_size", "num_attention_heads")
    )
    try:
        return int((head_dim or hidden // heads) * (1.0 if share is None else share)) // 2
    except (TypeError, ZeroDivisionError):
        return 0


def _positive(name: str, value: Any) -> Iterator[str]:
    if value is not None and not (_number(value) and value > 0):
        yield f"{name} is {_short(value)}: not a number above 0"


def _share(name: str, value: Any) -> Iterator[str]:
    if value is not None and not (_number(value) and 0 < value <= 1):
        yield f"{name} is {_short(value)}: not a share of each head, above 0 and at most 1"


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_WINDOWED = ("mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")
"""Families whose config class sets a window (4096) where the file names none."""


def _windows(family: str, config: dict[str, Any]) -> Iterator[str]:
    """Name windows, layer types and soft caps that transformers would drop, or that compute nothing."""
    honoured = _HONOURED[family]
    window = config.get("sliding_window", 4096 if family in _WINDOWED else None)
    switch = config.get("use_sliding_window")
    on = "sliding_window" in honoured and window is not None
    if "use_sliding_window" in honoured:
        on = on and bool(switch)
    elif switch is not None and bool(switch) != on:
        yield f"use_sliding_window is {_short(switch)}: this family has no such switch"
    if on and not (isinstance(window, int) and window > 0):
        yield f"sliding_window is {_short(window)}: not a number of tokens"
    if on and config.get("max_window_layers") is not None and "max_window_layers" not in honoured:
        yield f"max_window_layers is {_short(config['max_window_layers'])}: this family has windows in all layers"
    size = config.get("sliding_window_size")
    if size is not None and size != window:
        yield f"sliding_window_size is {_short(size)}, sliding_window {_short(window)}"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = config.get(key)
        if key in honoured and value is not None and not (isinstance(value, int | float) and value > 0):
            yield f"{key} is {_short(value)}: not a positive number"
    yield from _layer_types(family, config, on)
    activation = config.get("hidden_act")
    other = "hidden_activation" in honoured and not config.get("hidden_activation")  # whose default is this one
    if other and activation not in (None, "gelu_pytorch_tanh", "gelu_new"):
        yield f"hidden_act is {_short(activation)}: this family reads hidden_activation"


def _layer_types(family: str, config: dict[str, Any], window: bool) -> Iterator[str]:
    types, honoured = config.get("layer_types"), "layer_types" in _HONOURED[family]
    pattern = config.get("_sliding_window_pattern")
    if pattern is not None and types is None and config.get("sliding_window_pattern", 6) != pattern:
        yield f"_sliding_window_pattern is {_short(pattern)} without layer_types"
    if types is None:
        return
    if not isinstance(types, list):
        yield f"layer_types is {_short(types)}: not a list"
        return
    known = (
        {"full_attention", "sliding_attention"} if honoured else {"sliding_attention" if window else "full_attention"}
    )
    if other := [kind for kind in types if str(kind) not in known]:
        yield f"layer_types names {_short(other[0])}: transformers' class has {' and '.join(sorted(known))} layers"
    elif "sliding_attention" in types and not window:
        yield "layer_types names sliding_attention, and no sliding_window is set"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
