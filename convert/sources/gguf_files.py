"""Open a GGUF file, all of its parts: metadata, tensors, and who has taken which key.

Nothing of a file is left out in silence: what it states about the model (:mod:`.gguf_config`), every
tensor (:mod:`.gguf_weights`) and its vocabulary (:mod:`.gguf_tokenizer`) is applied, known
to change nothing, or refused by name. The rules are llama.cpp's, the program that these files are made for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.convert import adapters

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = {
    "llama": "llama",  # Mistral, too: gguf_config tells them apart
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
}
"""``general.architecture`` -> model type of :data:`adapters.FAMILIES`."""
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUF:
    """A GGUF file, all of its parts."""

    path: Path
    """What the user gave: the file, or any part of a split one."""
    metadata: dict[str, Any]
    """Every key of the first part: str, int, float, bool or a list of these."""
    tensors: dict[str, Any]
    """Name -> ``gguf.ReaderTensor``, which views the mapped file."""
    architecture: str

    def refuse(self, what: str) -> MoEdgeError:
        """Return an error about this file; ``what`` is the rest of the sentence."""
        return MoEdgeError(f"{self.path}: {what}")


class Keys:
    """The keys of a file that start with ``prefix``: each is taken by who applies it, and none may be left over."""

    def __init__(self, file: GGUF, prefix: str) -> None:
        self.file, self.prefix = file, prefix
        start = len(prefix)
        self.left = {key[start:]: value for key, value in file.metadata.items() if key.startswith(prefix)}

    def take(self, key: str, default: Any = None, kind: type | tuple[type, ...] = object) -> Any:
        """Return a value, or ``default`` where the file has none.

        Raises:
            MoEdgeError: it is not of ``kind``.
        """
        value = self.left.pop(key, default)
        if value is not default and not isinstance(value, kind):
            raise self.refuse(key, f"is {str(value)[:40]!r}, which it cannot be")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above zero; one that differs from layer to layer has no place in the families we know.

        Raises:
            MoEdgeError: missing without a default, no such number, or several of them.
        """
        value = self.take(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise self.refuse(key, "differs from layer to layer, which MoEdge does not support")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refuse(key, "is missing" if value is None else f"is {value!r}, not a number above 0")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number above zero.

        Raises:
            MoEdgeError: as :meth:`number`, or it is not whole.
        """
        value = self.number(key, default)
        if value != int(value):
            raise self.refuse(key, f"is {value!r}, not a whole number")
        return int(value)

    def given(self, key: str, default: float | None = None) -> float | None:
        """Return a number above zero, or None where the file has none or 0, which is llama.cpp's "not set".

        Raises:
            MoEdgeError: it is something else.
        """
        if default is None and self.left.get(key) is None:
            return None
        if self.left.get(key) == 0 and not isinstance(self.left[key], bool):
            del self.left[key]
            return None
        return self.number(key, default)

    def only(self, key: str, *values: Any) -> None:
        """Accept a key that changes nothing as long as it is missing or has one of ``values``.

        Raises:
            MoEdgeError: it has another value.
        """
        value = self.take(key)
        if value is not None and value not in values:
            raise self.refuse(key, f"is {value!r}, which MoEdge does not apply")

    def refuse(self, key: str, what: str) -> MoEdgeError:
        """Return an error about one key."""
        return self.file.refuse(f"{self.prefix}{key} {what}.")

    def done(self) -> None:
        """Refuse what nobody has taken.

        Raises:
            MoEdgeError: there is a key that MoEdge does not know.
        """
        if self.left:
            names = sorted(f"{self.prefix}{key}" for key in self.left)
            others = f" (and {len(names) - 1} more unknown keys)" if len(names) > 1 else ""
            value = str(self.left[names[0].removeprefix(self.prefix)])[:40]
            raise self.file.refuse(
                f"MoEdge does not know what {names[0]} = {value} means{others}, and does not guess; convert from the "
                "Hugging Face folder of this model instead."
            )


def parts(path: Path) -> list[Path]:
    """Return the files that a GGUF consists of, by the names that ``llama-gguf-split`` gives; mostly it is one.

    Raises:
        MoEdgeError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    files = [path.with_name(f"{match['name']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or path not in files:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise MoEdgeError(
            f"{path} is part {number} of {count} of a split GGUF file; "
            + (f"{names} is missing beside it: put all parts into one folder." if missing else "there is no such part.")
        )
    return files


def read(path: Path) -> GGUF:
    """Read metadata and the list of tensors of a GGUF file, of all its parts.

    Raises:
        MoEdgeError: not a GGUF file, truncated or damaged, no model, or of an architecture without an adapter.
    """
    from gguf import GGUFEndian

    files = parts(path)
    metadata: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for index, file in enumerate(files):
        reader, fields = _open(file)
        if reader.endianess == GGUFEndian.BIG:
            raise MoEdgeError(f"{file} is a big-endian GGUF file; MoEdge reads little-endian ones.")
        number, count = fields.get("split.no", 0), fields.get("split.count", 0) or 1
        if (number, count) != (index, len(files)):
            raise MoEdgeError(
                f"{file} says that it is number {number} (from 0 on) of {count} parts (split.no, split.count); name "
                "them NAME-00001-of-0000N.gguf as llama-gguf-split does, and put them into one folder."
            )
        if index == 0:
            metadata = fields
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise MoEdgeError(f"{file}: tensor {tensor.name} is in an earlier part, too; download all parts again.")
            tensors[tensor.name] = tensor
    found = GGUF(path, metadata, tensors, str(metadata.get("general.architecture")))
    _check(found)
    return found


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        return reader, {key: _plain(field.contents()) for key, field in reader.fields.items()}
    except Exception as error:  # the reader indexes a memory map: a damaged file raises almost anything
        if "GGMLQuantizationType" in str(error):
            raise MoEdgeError(f"{path}: tensors of an unknown type ({error}); update the gguf package.") from error
        raise MoEdgeError(f"{path} is not a whole GGUF file (truncated or damaged); download it again.") from error


def _plain(value: Any) -> Any:
    """A float as the shortest decimal of its float32: rms_norm_eps is 1e-05 then, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check(file: GGUF) -> None:
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise file.refuse(f"a GGUF file of type {kind!r} is no language model; give the file of the model.")
    if file.architecture not in ARCHITECTURES:
        raise file.refuse(
            f"unknown architecture {file.architecture!r} in the GGUF file; supported: {', '.join(ARCHITECTURES)} "
            f"(families {', '.join(adapters.FAMILIES)})."
        )
    total = file.metadata.get("split.tensors.count", len(file.tensors))
    if total != len(file.tensors) or not file.tensors:
        raise file.refuse(f"{len(file.tensors)} tensors found where there should be {total}; download it again.")


def values(file: GGUF, name: str) -> np.ndarray:
    """Return a tensor as float32, shape as PyTorch has it: rows first.

    Raises:
        MoEdgeError: of a type that the ``gguf`` package cannot de-quantize, or with NaN or infinity in it.
    """
    import numpy as np
    from gguf import quants

    tensor = file.tensors[name]
    try:
        value = quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise file.refuse(
            f"tensor {name} is of type {tensor.tensor_type.name}, which cannot be de-quantized here; give another "
            "quantization of this model, such as Q8_0 or F16."
        ) from error
    if not np.isfinite(value).all():
        raise file.refuse(f"tensor {name} holds NaN or infinity; download it again, or another quantization.")
    return value.reshape(tensor.shape[::-1].tolist())
