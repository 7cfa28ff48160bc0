"""What tells whether a model or a text that a recipe names is still the same one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from moedge import MoEdgeError
from moedge._files import digest
from moedge.runtime.run.engine import cached_sha256


def fingerprint(spec: str, *, text: bool = False) -> str:
    """Return what changes when the file, folder or asset behind a model spec (or a text spec) changes.

    Raises:
        MoEdgeError: an unknown asset, a path that does not exist, or a split GGUF file without all of its parts.
    """
    if spec.startswith("asset:"):
        from moedge.convert.sources import assets

        return digest(asdict(assets.find(spec.removeprefix("asset:"))))
    path = Path(spec).expanduser()
    if path.is_file():
        from moedge.convert.sources import gguf_files

        hashes = [cached_sha256(part) for part in gguf_files.parts(path)]
        return hashes[0] if len(hashes) == 1 else digest(hashes)
    if text:
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise MoEdgeError(f"The text {spec} {wrong}; give a text file, such as .txt or .jsonl, or asset:NAME.")
    if path.is_dir():
        return digest(top_files(path))
    if spec.endswith(".gguf") or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise MoEdgeError(f"Model {spec} does not exist; give a folder, a .gguf file, a hub id org/name or asset:NAME.")
    return "hub"


def top_files(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of the files of a model folder. Links are followed: the hub's cache is made of them."""
    paths = sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")])
    return {path.relative_to(folder).as_posix(): cached_sha256(path) for path in paths if path.is_file()}
