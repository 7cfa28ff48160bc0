"""What a user may give where an engine or a checkpoint is wanted: its folder, or the name of a dense model."""

from __future__ import annotations

from pathlib import Path

from moedge import MoEdgeError


def local(given: Path) -> Path:
    """Return the folder of a hub id ``org/name``, an ``asset:NAME`` or a .gguf file; any other path as it is.

    What begins with a folder that is here is a path, not a hub id.

    Raises:
        MoEdgeError: the model cannot be had.
    """
    spec = str(given)
    hub = len(given.parts) == 2 and spec[0] not in "./~" and not given.parent.exists()
    if given.is_dir() or not (spec.startswith("asset:") or (given.suffix == ".gguf" and given.is_file()) or hub):
        return given
    from moedge.convert.sources import locate

    return locate(spec)[1]


def existing(path: Path) -> Path:
    """Return the path.

    Raises:
        MoEdgeError: nothing is there.
    """
    if not path.exists():
        raise MoEdgeError(f"{path} does not exist.")
    return path
