"""De-quantize a GGUF file to float32 once, and cache it as a Hugging Face folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from moedge._files import atomic_dir, digest, sha256_file, write_json
from moedge.convert.sources import assets
from moedge.convert.sources.gguf_files import GGUF, parts, read

READER = 3
"""Version of this reader, part of the key of the cache: raise it when a file would be read otherwise than before.

1 (the key was the hash of the file alone) lost rotary scalings, biases, pre-tokenizers and parts of split files. 2
turned a temperature of 0 round, and took a penalty of repetitions for sampling.
"""
_STAMP = "moedge_source.json"


def to_folder(path: Path) -> tuple[Path, str]:
    """De-quantize a GGUF file to float32 once; return the cached folder and a label.

    float32, because a bfloat16 save moves logits by up to 0.16 (docs/assets.md). Of a split file any part may be given;
    the others are read from the folder that it lies in.

    Raises:
        MoEdgeError: damaged, incomplete, or with something in it that would be lost; nothing is cached then.
    """
    files = parts(path)
    key = digest({"reader": READER, "parts": [sha256_file(file) for file in files]})
    folder = assets.cache_dir() / "gguf" / f"{key[:32]}-float32"
    quantization = _cached(folder)
    if quantization is None:
        from moedge.convert.sources import gguf_config, gguf_tokenizer, gguf_weights

        file = read(path)
        vocabulary = gguf_tokenizer.build(file)
        config = gguf_config.build(file, vocabulary.ids)
        plan = gguf_weights.plan(file, config)
        with atomic_dir(folder, force=True, inputs=files) as partial:
            config.save_pretrained(partial)
            gguf_tokenizer.save(file, vocabulary, partial)
            gguf_weights.write(file, config, plan, partial)
            quantization = _most_used(file)
            sizes = {saved.name: saved.stat().st_size for saved in partial.iterdir() if saved.is_file()}
            write_json(partial / _STAMP, {"quantization": quantization, "reader": READER, "files": sizes})
    return folder, f"{path.stem} (float32 de-quantized from the {quantization} GGUF)"


def _cached(folder: Path) -> str | None:
    """Return the quantization of what ``folder`` holds, or None when it is missing or no longer whole."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, size in stamp["files"].items()):
            return str(stamp["quantization"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _most_used(file: GGUF) -> str:
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return sizes.most_common(1)[0][0]
