"""Is an engine still the same one? The hash of what it is opened from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moedge._files import digest, sha256_file
from moedge.export import manifest as manifests
from moedge.runtime.bench.footprint import path_of
from moedge.runtime.engines import Engine


def identity(opener: Callable[..., Engine]) -> str | None:
    """Return the hash of the files of a bundle, an engine folder or a checkpoint; None where it is not known.

    Of a peer that is a file, its own.

    Of a bundle the hashes of its manifest are taken, without the versions that it was made with: what a rebuild makes
    byte for byte again is the same engine. A checkpoint's files are read once in a process.

    Args:
        opener: ``functools.partial(open_engine, path, **options)``; of any other callable nothing is known.

    Raises:
        MoEdgeError: the manifest cannot be read.
    """
    path = path_of(opener)
    if path is not None and Path(path).is_file():
        return sha256_file(Path(path))
    if path is None or not (folder := Path(path)).is_dir():
        return None
    if manifest := manifests.read(folder):
        return digest({name: entry.sha256 for name, entry in manifest.files.items()})
    from moedge.runtime.run.fingerprint import top_files

    return digest(top_files(folder))
