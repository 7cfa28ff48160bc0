"""Read a GGUF file: checked, de-quantized to float32 once, and cached as a Hugging Face folder."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

from moedge import MoEdgeError
from moedge._files import atomic_dir, sha256_file, write_json
from moedge.convert import adapters, assets, tokenizer_files
from moedge.convert.errors import first_sentence, quiet

_NAMES = {"gemma3": "gemma3_text"}
"""Architectures that a GGUF file names otherwise than transformers does."""


def to_folder(path: Path) -> tuple[Path, str]:
    """De-quantize a GGUF file to float32 once; return the cached folder and a label.

    float32, because a bfloat16 save moves logits by up to 0.16 (assets.md); loading the GGUF itself takes 17 s.
    """
    folder = assets.cache_dir() / "gguf" / f"{sha256_file(path)[:32]}-float32"
    stamp = folder / "moedge_source.json"
    if stamp.is_file():
        return folder, _label(path, json.loads(stamp.read_text(encoding="utf-8"))["quantization"])
    quantization = _check(path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": path.name, "trust_remote_code": False}
    # The GGUF reader draws a tqdm bar that no transformers switch turns off.
    with atomic_dir(folder, force=True, inputs=[path]) as partial, quiet(), redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
            )
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise MoEdgeError(f"Cannot read the GGUF file {path}: {first_sentence(error)}") from error
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # it is a plain float model now, and must load as one
        model.save_pretrained(partial)
        tokenizer_files.save(tokenizer, partial)
        write_json(partial / stamp.name, {"quantization": quantization})
    return folder, _label(path, quantization)


def _label(path: Path, quantization: str) -> str:
    return f"{path.stem} (float32 de-quantized from the {quantization} GGUF)"


def _check(path: Path) -> str:
    """Check that a GGUF file is whole and of a supported architecture; return its most used quantization, e.g. Q4_1.

    Raises:
        MoEdgeError: not a GGUF file, truncated or damaged, or an architecture without an adapter.
    """
    from collections import Counter

    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.fields["general.architecture"]
        architecture = bytes(field.parts[field.data[0]]).decode()
        sizes: Counter[str] = Counter()
        for tensor in reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    except Exception as error:  # the reader indexes a memory map: a damaged file raises almost anything
        raise MoEdgeError(f"{path} is not a whole GGUF file (truncated or damaged); download it again.") from error
    if _NAMES.get(architecture, architecture) not in adapters.FAMILIES:
        supported = ", ".join(adapters.FAMILIES)
        raise MoEdgeError(f"{path}: unknown architecture {architecture!r} in the GGUF file; supported: {supported}.")
    return sizes.most_common(1)[0][0]
