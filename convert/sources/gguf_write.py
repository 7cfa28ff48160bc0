"""A dense checkpoint as a GGUF file, so that llama.cpp can be timed on the very weights that MoEdge runs.

The inverse of :mod:`moedge.convert.sources.gguf_weights`, for families whose layers llama.cpp computes from these
weights alone. The ``gguf`` package quantises and writes. The vocabulary has the right size and no text in it: tokens go
in and out as numbers. llama.cpp's K-quants (Q4_K_M and others) are made by its own tool from the F32 file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.convert.errors import quiet, translated
from moedge.convert.sources import folder_check
from moedge.convert.sources.gguf_weights import tensor_name

if TYPE_CHECKING:
    import numpy as np

_WRITES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model type -> llama.cpp's architecture."""
_PAIRED = ("llama", "mistral")
"""Model types whose rotary pairs lie next to each other in a GGUF file."""


def build(checkpoint: Path, out: Path, precision: str) -> None:
    """Write ``checkpoint`` to ``out``, one tensor in memory at a time.

    Args:
        checkpoint: Hugging Face folder of a dense model, safetensors.
        out: the file, which is not there yet.
        precision: ``Q4_0``, ``Q4_1``, ``Q8_0``, ``F16`` or ``F32``, of every matrix; vectors are float32.

    Raises:
        MoEdgeError: a family or a rotary scaling that this cannot express, or a width that has no whole blocks.
    """
    import gguf

    config = _config(checkpoint)
    architecture = _architecture(checkpoint, config)
    kind = gguf.GGMLQuantizationType[precision]
    writer = gguf.GGUFWriter(out, architecture)
    _add_sizes(writer, config, architecture)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(precision, f"MOSTLY_{precision}")])
    _add_vocabulary(writer, config.vocab_size)
    for name, value in _tensors(checkpoint, config):
        chosen = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        try:
            packed = gguf.quants.quantize(value, chosen)
        except gguf.quants.QuantError as error:
            raise MoEdgeError(f"{checkpoint}: {name} cannot be stored as {precision}: {error}; take F16.") from error
        writer.add_tensor(name, packed, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config(checkpoint: Path) -> Any:
    """The config as transformers reads it: config.json may leave out what its class has a default for."""
    from transformers import AutoConfig

    family = folder_check.read_config(checkpoint)["model_type"]
    if family not in _WRITES:
        raise MoEdgeError(
            f"{checkpoint}: a {family} model is not written as GGUF here (known: {', '.join(_WRITES)}); use "
            "llama.cpp's convert_hf_to_gguf.py."
        )
    folder_check.check(checkpoint)
    with quiet(), translated(f"transformers refuses {checkpoint / 'config.json'}"):
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)


def _architecture(checkpoint: Path, config: Any) -> str:
    """llama.cpp's name of the family, after refusing what would be another model there."""
    scaled = config.rope_parameters["rope_type"] != "default"
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        window = None
    if scaled or window:
        what = "a scaled rotary embedding" if scaled else f"a sliding window of {window}"
        raise MoEdgeError(f"{checkpoint}: {what} is not written as GGUF here; use llama.cpp's convert_hf_to_gguf.py.")
    return _WRITES[config.model_type]


def _add_sizes(writer: Any, config: Any, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, size: int) -> None:
    """As many tokens as the model has, of which llama.cpp only wants to know that there are bytes among them."""
    import gguf

    kinds = gguf.TokenType
    known = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    known += [(f"<0x{value:02X}>", kinds.BYTE) for value in range(256)]
    tokens = [*known, *((f"t{number}", kinds.NORMAL) for number in range(len(known), size))][:size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for _, kind in tokens])


def _tensors(checkpoint: Path, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF's name, float32 weight), one at a time."""
    import torch
    from safetensors import safe_open

    family = config.model_type
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in folder_check.weight_files(checkpoint):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - it is no dict
                tied = config.tie_word_embeddings and name == "lm_head.weight"
                if tied or name.endswith("rotary_emb.inv_freq"):
                    continue
                value = reader.get_tensor(name).to(torch.float32).numpy()
                part = name.split(".")[-2]
                if family in _PAIRED and part in heads:
                    value = _pairs_together(value, heads[part])
                yield tensor_name(name, family), value


def _pairs_together(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, ...] with the two halves of each head interleaved, as GGUF's rotary embedding turns pairs."""
    halves = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)
