"""A Llama-type Hugging Face folder as a GGUF file, so that llama.cpp runs the very weights that MoEdge runs.

    python tests/benchmarks/to_gguf.py DENSE MODEL.gguf --type Q4_0

For timing: the weights are the model's, quantised by the ``gguf`` package; the vocabulary has the right size and no
text in it, so tokens go in and out as numbers. ``Q4_0`` is what llama.cpp repacks for its fastest kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

NAMES = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
}
WHOLE = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def pairs_together(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, H] with the two halves of each head interleaved, as GGUF's rotary embedding turns pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(folder: Path, config: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 weight), one at a time."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as reader:
            for name in reader.keys():  # noqa: SIM118 - it is no dict
                value = reader.get_tensor(name).astype(np.float32)
                if name in WHOLE:
                    yield f"{WHOLE[name]}.weight", value
                    continue
                _, _, number, part = name.split(".", 3)
                short = NAMES[part]
                yield f"blk.{number}.{short}.weight", pairs_together(value, heads[short]) if short in heads else value


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q4_1", "Q8_0", "F16", "F32"])
    options = parser.parse_args()
    config = json.loads((options.dense / "config.json").read_text("utf-8"))
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise SystemExit(f"{options.dense}: {config['architectures']} is not a Llama; this script knows no other names")
    kind = gguf.GGMLQuantizationType[options.type]
    writer = gguf.GGUFWriter(options.out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(options.type, f"MOSTLY_{options.type}")])
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{value:02X}>" for value in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    more = range(len(tokens), config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"t{number}" for number in more])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(more))
    for name, value in tensors(options.dense, config):
        chosen = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
