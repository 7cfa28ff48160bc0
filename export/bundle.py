"""Bundles: what an export writes and a runtime opens.

A bundle is a folder of plain files with a ``manifest.json`` that lists every one of them with size and sha256.
Opening verifies all of it before anything is parsed: paths stay inside, no links, no unlisted file, no changed byte.
This module needs neither torch nor onnx, so it also runs on a device.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import check_links, digest, hash_tree, safe_join, sha256_file, write_json
from moedge.export import manifest as manifests
from moedge.export.manifest import MANIFEST, FileEntry, Manifest

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
# Everything a tokenizer and a generation loop read; never weights, never code.
_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest
    sha256: str
    """Content hash: that of the manifest, which holds the hash of every file."""

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return safe_join(self.path, self.manifest.io.model)


def open_bundle(path: Path | str) -> Bundle:
    """Verify a bundle and return it.

    Raises:
        MoEdgeError: no bundle there, another schema, a path that leaves the folder, a link, a file that is missing,
            not listed, or not what its hash says, or external data outside the listed files.
    """
    path = Path(path)
    try:
        document = manifests.load(path)
    except FileNotFoundError as error:
        raise MoEdgeError(f"{path} is not a bundle: it has no {MANIFEST}. Make one with `moedge export`.") from error
    manifest = manifests.parse(Manifest, document, path / MANIFEST)
    verify_files(path, manifest.files)
    if manifest.io.model not in manifest.files:
        raise MoEdgeError(f"{path / MANIFEST} names model {manifest.io.model!r}, which it does not list.")
    return Bundle(path, manifest, digest(document))


def verify_files(path: Path, files: Mapping[str, FileEntry]) -> None:
    """Check that ``path`` holds exactly ``files`` (and its manifest), byte for byte.

    Raises:
        MoEdgeError: a file that is missing, not listed, a link, or not what its hash says.
    """
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() or file.is_symlink()}
    if extra := present - set(files) - {MANIFEST}:
        raise MoEdgeError(f"Bundle {path} holds {sorted(extra)[0]}, which its manifest does not list; it was changed.")
    for name, entry in files.items():
        file = safe_join(path, name)
        if not file.is_file():
            raise MoEdgeError(f"Bundle {path} lacks {name}; copy it whole or make it again.")
        if file.stat().st_size != entry.size or sha256_file(file) != entry.sha256:
            raise MoEdgeError(
                f"Bundle {path}: {name} was changed or damaged (its size or sha256 is not the manifest's)."
            )


def check_external_data(model_path: Path, allowed: set[str]) -> None:
    """Refuse an ONNX file whose tensors point anywhere but to ``allowed`` files beside it (CVE-2025-51480 and kin).

    Raises:
        MoEdgeError: an absolute path, ``..``, a link or an unlisted file.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    for tensor in _tensors(onnx.load(model_path, load_external_data=False)):
        if uses_external_data(tensor):
            location = ExternalDataInfo(tensor).location
            safe_join(model_path.parent, location)
            if location not in allowed:
                raise MoEdgeError(f"{model_path}: tensor {tensor.name} lies in unlisted file {location!r}.")


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto of an ONNX message: weights, sparse ones, attributes, of graphs in graphs and functions too."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy the tokenizer and config files of a bundle.

    Raises:
        MoEdgeError: one is a link.
    """
    for name in (*_CONFIGS, *_TOKENIZER):
        if safe_join(source, name).is_file():
            shutil.copyfile(source / name, destination / name)
    for template in sorted((source / _TEMPLATES).glob("*.jinja")):
        (destination / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(safe_join(source, f"{_TEMPLATES}/{template.name}"), destination / _TEMPLATES / template.name)


def write_companions(model: Path, destination: Path) -> None:
    """Write the tokenizer and copy the config files of a model folder, which may hold links (a snapshot of the hub).

    Raises:
        MoEdgeError: the folder has no tokenizer, or one that cannot be written as tokenizer.json.
    """
    from moedge.convert.sources import tokenizer_files

    check_links(model)
    for name in _CONFIGS:
        if (model / name).is_file():
            shutil.copyfile(model / name, destination / name)
    tokenizer_files.save(tokenizer_files.load(model), destination)


def seal(folder: Path, manifest: Manifest) -> Bundle:
    """Write ``manifest.json`` with the hash of every file in ``folder``: the last step of making a bundle.

    ``manifest.files`` is not read: the folder's files are taken.
    """
    document = {**manifest.document(), "files": hash_tree(folder)}
    write_json(folder / MANIFEST, document)
    return Bundle(folder, manifests.parse(Manifest, document, folder / MANIFEST), digest(document))
