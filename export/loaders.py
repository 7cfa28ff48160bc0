"""Files by which other programs open a bundle: Hugging Face's config.json and tokenizer, onnxruntime-genai's config.

The graph has the inputs and outputs of optimum's decoder-with-past export. A loader that knows the dense family
therefore runs the converted model as well; it only has to be told the family's name, not ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moedge._files import write_json
from moedge.convert.adapters import MOE_PREFIX
from moedge.export import targets
from moedge.export.manifest import CacheFacts, Manifest, ModelFacts

GENAI_CONFIG = "genai_config.json"

GENAI_SEARCH = ("repetition_penalty", "min_length", "no_repeat_ngram_size", "temperature", "top_k", "top_p")
"""What ``generation_config.json`` may ask and genai's search has the same meaning and name for."""


def describe(folder: Path, manifest: Manifest) -> None:
    """Make the files of a bundle in the making fit other loaders.

    Args:
        folder: holds the companions of a checkpoint or of the bundle that this one was lowered from.
        manifest: of the bundle; its files are not read.
    """
    _name_the_family(folder / "config.json", manifest.model.model_type)
    if targets.find(manifest.target).genai:
        operators = manifest.operators.library if manifest.operators else None
        write_json(folder / GENAI_CONFIG, genai_config(folder, manifest.model, manifest.cache, operators))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _name_the_family(path: Path, model_type: str) -> None:
    """``moedge_llama`` -> ``llama``: no checkpoint is here that the former could open, and loaders know the latter."""
    config = _read(path)
    if str(config.get("model_type", "")).startswith(MOE_PREFIX):
        names = [str(name).removeprefix("MoEdge") for name in config.get("architectures") or []]
        write_json(path, {**config, "model_type": model_type, "architectures": names})


def genai_config(folder: Path, model: ModelFacts, cache: CacheFacts, operators: str | None = None) -> dict[str, Any]:
    """Return onnxruntime-genai's description of a bundle.

    The type is ``decoder``, its generic one: what a family needs of its own (windows, soft caps, rotary scaling) is
    part of the graph. Search is greedy by default; the tokens that end a text and what the model asks of the search are
    those of ``moedge generate``, as far as genai has a name for it. ``operators``: the library of ours in the bundle,
    which genai loads, so it runs where that does.
    """
    from moedge.configs.generation_config import GenerationConfig, Use

    tokens = range(model.vocab_size)
    ends = [end for end in model.eos_token_ids if end in tokens]
    asked = GenerationConfig.read(folder).of(Use.ALWAYS, Use.SAMPLING)
    pad = model.pad_token_id
    length, family = model.max_position_embeddings, "decoder"
    if limit := model.rope_boundary:
        # Where longrope changes its factors genai reads a text again for this family and length alone; any other text
        # ends there.
        family = "phi3" if (model.model_type, limit) == ("phi3", 4096) else family
        length = length if family == "phi3" else min(length, limit)
    caches = {
        f"{kind}_{part}_names": f"{prefix}.%d.{part}"
        for kind, prefix in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    described: dict[str, Any] = {
        "type": family,
        "vocab_size": model.vocab_size,
        "context_length": length,
        # genai wants a number here; it pads only batches, and what it pads is masked.
        "pad_token_id": pad if pad in tokens else next(iter(ends), 0),
        "decoder": {
            "filename": "model.onnx",
            "session_options": {
                "provider_options": [],
                **({"custom_ops_library": operators} if operators else {}),
            },
            "hidden_size": model.hidden_size,
            "head_size": model.head_dim,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_kv_heads,
            "num_hidden_layers": model.num_layers,
            "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
            | {name: text for name, text in caches.items() if name.startswith("past")},
            "outputs": {"logits": "logits"}
            | {name: text for name, text in caches.items() if name.startswith("present")},
        },
    }
    if ends:
        described["eos_token_id"] = ends
    if model.bos_token_id in tokens:
        described["bos_token_id"] = model.bos_token_id
    return {
        "model": described,
        "search": {
            "do_sample": False,
            "max_length": length,
            "num_beams": 1,
            "past_present_share_buffer": cache.kind == "shared_buffer",
            **{name: asked[name] for name in GENAI_SEARCH if name in asked},
        },
    }
