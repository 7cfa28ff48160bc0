"""Which config.json passes: those of published models do, and what transformers ignores does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moedge import MoEdgeError
from moedge.convert import adapters, moe_adapters, sources
from moedge.convert.sources import config_keys

FACTORS = [1.0 + n / 16 for n in range(64)]
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
NESTED = {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 1e4}}}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b-hf": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
    "unsloth's Llama-3.2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "pad_token_id": 128004,
        "quantization_config": None,
        "rope_scaling": LLAMA3,
        "_model_name_or_path": "as transformers writes it for a GGUF",
        "unsloth_fixed": True,
        "unsloth_version": "2025.1.5",
        "use_cache": False,
    },
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "mlp_bias": False,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "attention_dropout": 0.0,
        "head_dim": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "max_window_layers": 21,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_window_layers": 28,
        "sliding_window": 4096,
        "use_mrope": False,
        "use_sliding_window": False,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B, saved by transformers 5": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 28,
        "max_window_layers": 28,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Phi-3-mini-4k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "sliding_window": 2047,
    },
    "Phi-3-mini-128k-instruct, first revision": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"long_factor": FACTORS[:48], "short_factor": FACTORS[:48], "type": "su"},
        "sliding_window": 262144,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            "AutoTokenizer": "Xenova/gpt-4o",
        },
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rope_scaling": {"long_factor": FACTORS[:48], "short_factor": FACTORS[:48], "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b-it": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-4b-it, its text model": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
    },
    "gemma-3-4b-it, its text model, saved by transformers 5": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        **NESTED,
    },
    "gemma-3-270m": {
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "use_bidirectional_attention": False,
    },
    "OLMo-2-0425-1B-Instruct": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "a GPT-2 style dump of every field": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "add_cross_attention": False,
        "bad_words_ids": None,
        "chunk_size_feed_forward": 0,
        "do_sample": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "output_attentions": False,
        "pruned_heads": {},
        "temperature": 1.0,
        "tie_encoder_decoder": False,
        "torchscript": False,
        "use_bfloat16": False,
    },
}
"""What config.json of published models says besides sizes, from memory and from copies in public repositories."""

IGNORED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (family, {"is_causal": False}, "is_causal is False: every token would see later ones")
        for family in (*adapters.FAMILIES, *moe_adapters.FAMILIES)
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("llama", {"sliding_window": 128}, "sliding_window is 128: this family has no windows"),
    ("olmoe", {"sliding_window": 128}, "sliding_window is 128"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0: not a number of tokens"),
    ("mistral", {"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window is False"),
    ("mistral", {"sliding_window": 8, "max_window_layers": 2}, "max_window_layers is 2"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names 'full_attention'"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names 'sliding_attention'"),
    ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "layer_types names 'linear_attention'"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "no sliding_window is set"),
    ("gemma2", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "no sliding_window is set"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0: not a positive number"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_act is 'silu': this family reads hidden_activation"),
    ("gemma2", {"sliding_window": 8, "sliding_window_size": 16}, "sliding_window_size is 16, sliding_window 8"),
    ("gemma3_text", {"_sliding_window_pattern": 2}, "_sliding_window_pattern is 2 without layer_types"),
    ("llama", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("llama", {"logits_scaling": 8.0, "residual_multiplier": 0.2}, "logits_scaling is 8.0.*residual_multiplier is 0.2"),
    ("llama", {"scale_emb": 12, "scale_depth": 1.4}, "scale_depth is 1.4: MoEdge does not know this key"),
    ("llama", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
    ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    ("llama", {"fusion_config": {"x": True}}, "fusion_config is"),
    ("llama", {"per_layer_config": {"0": {"intermediate_size": 32}}}, "per_layer_config is"),
    ("llama", {"architectures": ["LlamaBiForMNTP"]}, "architectures names 'LlamaBiForMNTP'"),
    ("llama", {"auto_map": {"AutoModel": "modeling_x.BidirectionalLlama"}}, "auto_map names code of its own"),
    ("mistral", {"attention_bias": True}, "attention_bias is True: this family has no such biases"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias is True"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias is True"),
    ("llama", {"rope_scaling": {"type": "ntk"}}, "rope_scaling is of type 'ntk'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "rope_scaling.alpha is 3"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "rope_scaling.mrope_section"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0},
        "rope_theta is 6.0 and",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "rope_parameters and rope_scaling differ",
    ),
    ("gemma3_text", {"rope_parameters": LINEAR}, "rope_parameters has neither full_attention nor sliding_attention"),
    ("gemma3_text", {"rope_scaling": {"full_attention": LINEAR}}, "rope_scaling has full_attention: transformers woul"),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type is 'linear'"),
    ("gemma3_text", {**NESTED, "rope_theta": 5e5}, "rope_theta is 500000.0 and .*full_attention.rope_theta 1000000.0"),
    ("gemma3_text", {**NESTED, "rope_local_base_freq": 777}, "rope_local_base_freq is 777 and .*rope_theta 10000.0"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling.type is 'linear'"),
    ("qwen3", {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "one rotary embedding"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0: not a number above 0"),
    ("llama", {"rope_parameters": {"rope_theta": -5.0}}, "rope_parameters.rope_theta is -5.0"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rope_scaling.factor is 0.0: not a number abo"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor is 0.5: YaRN stretches"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor is 1.0 and low"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
        "short_factor has 1 numbers: ",
    ),
    ("phi3", {"rope_scaling": {"type": "su", "long_factor": [0.0] * 48}}, r"long_factor is \[0.0.* above 0"),
    ("phi3", {"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0: not a share of each head"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.0}}, "partial_rotary_factor is 0.0: not a share"),
    ("gemma3_text", {"rope_local_base_freq": 0}, "rope_local_base_freq is 0: not a number above 0"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0: not a number above 0"),
    ("qwen2", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06: not a number above 0"),
    ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "num_experts and num_local_experts differ"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config is of method 'gptq'"),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "method 'bitsandbytes': the weights are quan"),
    ("llama", {"quantization": {"bits": 4, "group_size": 64}}, "quantization is .*the weights are quantized"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_models_pass(name: str) -> None:
    config_keys.check(PUBLISHED[name], Path("config.json"))


@pytest.mark.parametrize(("family", "keys", "message"), IGNORED, ids=lambda value: str(value)[:40])
def test_what_transformers_would_ignore_is_refused_by_name(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(MoEdgeError, match=rf"config\.json.*: .*{message}"):
        config_keys.check({"model_type": family, **keys}, Path("config.json"))
    config_keys.check({"model_type": family}, Path("config.json"))
    if not keys.keys() & {"architectures", "auto_map"}:  # the classes of a converted checkpoint are ours
        with pytest.raises(MoEdgeError, match=message):
            config_keys.check({"model_type": f"moedge_{family}", **keys}, Path("config.json"))


@pytest.mark.parametrize("family", [*adapters.FAMILIES, *moe_adapters.FAMILIES])
def test_every_field_of_a_familys_config_is_judged(family: str) -> None:
    """A new field of a newer transformers is to be read up on before it is trusted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    known = config_keys._HONOURED[family] | config_keys._HARMLESS | set(config_keys._NEUTRAL) | config_keys._SPECIAL
    fields = {key for key in config.to_dict() if not key.endswith("_token_id")}
    assert fields <= known, sorted(fields - known)


def test_what_a_gemma_3_may_say_of_rotary_scaling_is_what_transformers_reads() -> None:
    from transformers import Gemma3TextConfig

    def read(**keys: Any) -> tuple[Any, Any]:
        entry = Gemma3TextConfig(**copy.deepcopy(keys)).rope_parameters["full_attention"]
        return entry["rope_type"], entry.get("factor")

    for keys in ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, NESTED):
        assert read(**keys) == ("linear", 8.0)
        config_keys.check({"model_type": "gemma3_text", **keys}, Path("config.json"))
    ignored = [{"rope_parameters": LINEAR}, {"rope_scaling": {"full_attention": LINEAR}}]
    for keys in (*ignored, {"rope_scaling": {"type": "linear", "factor": 8.0}}):
        assert read(**keys)[0] == "default"  # refused: rows of IGNORED


def test_a_field_at_the_default_of_its_class_passes() -> None:
    """A newer transformers writes fields that this version of MoEdge has not seen."""
    from transformers import LlamaConfig

    field = LlamaConfig.__dataclass_fields__["problem_type"]
    try:
        LlamaConfig.__dataclass_fields__["newer_field"] = type("Field", (), {"default": 3})()
        config_keys.check({"model_type": "llama", "newer_field": 3}, Path("config.json"))
        with pytest.raises(MoEdgeError, match="newer_field is 4"):
            config_keys.check({"model_type": "llama", "newer_field": 4}, Path("config.json"))
    finally:
        del LlamaConfig.__dataclass_fields__["newer_field"]
    assert LlamaConfig.__dataclass_fields__["problem_type"] is field


@pytest.mark.parametrize("family", [*adapters.FAMILIES, *moe_adapters.FAMILIES])
def test_every_family_passes_as_transformers_saves_it(
    family: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model(family, layers=1).save_pretrained(tmp_path)
    config_keys.check(json.loads((tmp_path / "config.json").read_text()), tmp_path / "config.json")


def test_attention_that_is_not_causal_is_refused_before_anything_is_loaded(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen3", is_causal=False).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    for open_it in (sources.resolve, lambda path: sources.load_model(Path(path))):
        with pytest.raises(MoEdgeError, match="is_causal is False"):
            open_it(str(tmp_path))
