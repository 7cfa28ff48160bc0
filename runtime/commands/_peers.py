"""What ``--peer`` means: other programs beside our engines (``bench``), and what they open (``export``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.runtime import peers
from moedge.runtime.bench.headroom import converted
from moedge.runtime.bench.peers import Peers
from moedge.runtime.bench.points import BATCHES, Point
from moedge.runtime.engines import Engine, open_engine

Timed = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        metavar="[NAME=]PEER:PATH",
        help=f"Time another program, too: {', '.join(peers.names())}, and what it opens (may be repeated).",
    ),
]

MADE = "; ".join(f"{row.name}: {', '.join(row.precisions)}" for row in peers.every() if row.builds)
"""What ``moedge export --peer`` makes, for its help."""


def timed(
    given: Sequence[str] | None, folders: Mapping[str, Path], points: Sequence[Point], pytorch: Mapping[str, Any]
) -> tuple[dict[str, Callable[..., Engine]], Peers | None]:
    """Label -> what opens each peer, and what to ask them; nothing where none was ``given``.

    Args:
        given: values of ``--peer``.
        folders: label -> folder of our engines, among which is the dense parent.
        points: that are timed.
        pytorch: ``device`` and ``dtype`` of checkpoints.

    Raises:
        MoEdgeError: a peer that is not installed, a path that it does not take, a name that is taken, or no dense
            parent.
    """
    if not given:
        return {}, None
    longest = max(point.length for point in (*points, *BATCHES))
    openers: dict[str, Callable[..., Engine]] = {}
    kinds: dict[str, str] = {}
    for one in map(peers.parse, given):
        if one.label in folders or one.label in openers:
            raise MoEdgeError(f"{one.label} is given twice; name each engine once.")
        one.peer.check(one.path)
        kinds[one.label] = one.peer.name
        openers[one.label] = partial(
            open_engine, one.path, peer=one.peer.name, pytorch=dict(pytorch), max_length=longest
        )
    return openers, Peers(kinds, _parent(folders))


def _parent(folders: Mapping[str, Path]) -> str:
    """Label of the dense parent: of several the first whose weights are not rounded."""
    dense = [label for label, folder in folders.items() if not converted(folder)]
    if not dense:
        raise MoEdgeError(
            f"--peer is compared with the dense parent, which is not among {', '.join(folders)}; give its bundle or "
            "checkpoint, too, as in dense=build/dense/ort-cpu."
        )
    return next((label for label in dense if not _rounded(folders[label])), dense[0])


def _rounded(folder: Path) -> bool:
    manifest = manifests.read(folder)
    row = targets.known(manifest.target) if manifest else None
    return row is not None and row.bits is not None


def alone(**others: Any) -> None:
    """Refuse options of bundles beside ``--peer``.

    Raises:
        MoEdgeError: names the first.
    """
    for name, value in others.items():
        if value:
            raise MoEdgeError(f"--{name.replace('_', '-')} is for bundles; export them in a call without --peer.")


def export(given: Sequence[str], checkpoint: Path, out: Path, *, force: bool) -> None:
    """Make what peers open of a dense checkpoint, a folder each in ``out``; what else is there stays.

    Args:
        given: such as ``genai`` or ``llama.cpp:Q8_0``.
        checkpoint: Hugging Face folder.
        out: for the folders.
        force: replace those that are there.

    Raises:
        MoEdgeError: a model that is converted, a peer for which nothing is made, or its builder fails.
    """
    wanted = [peers.buildable(text) for text in given]
    if converted(checkpoint):
        raise MoEdgeError(f"{checkpoint} is converted, and --peer is for the dense parent, which others can run.")
    for row, _ in wanted:
        if lacking := peers.missing(row.build_needs):
            raise peers.not_installed(row, lacking)
    console = Console()
    for row, precision in wanted:
        folder = out / f"{row.name}-{precision}"
        with atomic_dir(folder, force=force, inputs=[checkpoint]) as partial_folder, console.status(f"{folder} ..."):
            row.build(checkpoint, partial_folder / row.built if row.built else partial_folder, precision)
        path = folder / row.built if row.built else folder
        console.print(escape(f"{row.name}: {path}"), highlight=False, soft_wrap=True)
        console.print(escape(f"time it beside ours: moedge bench ... --peer {row.name}:{path}"), soft_wrap=True)
