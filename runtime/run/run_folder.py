"""Where things lie in a run folder, ``runs/<name>/``: the one place that knows its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedge import MoEdgeError, _files
from moedge._files import refuse_pointer
from moedge.export import targets

RUN_SCHEMA = "moedge.run/1"


def is_run(path: Path) -> bool:
    """Tell whether ``path`` is a run folder."""
    return (path / "run.json").is_file()


def check_free(root: Path) -> None:
    """Refuse a place for a run that holds something else.

    Raises:
        MoEdgeError: ``root`` is a file, or a folder with content that no run has left there.
    """
    if root.exists() and not root.is_dir():
        raise MoEdgeError(f"{root} exists and is not a folder; choose another one with --out.")
    if root.is_dir() and any(root.iterdir()) and not is_run(root) and not (root / ".lock").exists():
        raise MoEdgeError(f"{root} is not empty and not a run folder; choose another one with --out.")


def read_json(path: Path, mend: str = "run `moedge run` on its recipe again") -> dict[str, Any]:
    """Read a JSON object that a stage wrote, or another one with what to do (``mend``) when it is damaged.

    Raises:
        MoEdgeError: missing, damaged or a Git LFS pointer.
    """
    refuse_pointer(path)
    return _files.read_json(path, mend, missing=f"{path} is missing; run `moedge run` on its recipe first.")


def checkpoint(run: Path) -> Path:
    """Folder of the MoE checkpoint."""
    return run / "convert" / "checkpoint"


def source(run: Path) -> dict[str, Any]:
    """What the source stage found: spec, kind, sha256, label, folder, config."""
    return read_json(run / "source" / "source.json")


def dense(run: Path) -> Path:
    """Folder of the dense parent (in the cache, or where the user keeps it)."""
    return Path(source(run)["folder"])


def bundles(run: Path) -> dict[str, Path]:
    """Finished bundles, ``{"portable moe": folder, "ort-cpu dense": folder, ...}``."""
    found = {}
    for stage, kind in (("export", "moe"), ("export-dense", "dense")):
        for manifest in sorted((run / stage).glob("*/manifest.json")):
            found[f"{manifest.parent.name} {kind}"] = manifest.parent
    return found


def bundles_below(path: Path) -> str:
    """Return a sentence that names the bundles in ``path``, such as `moedge export` writes; empty without any."""
    below = sorted(manifest.parent.name for manifest in path.glob("*/manifest.json"))
    return f" It holds the bundles {', '.join(below)}; give one of them." if below else ""


def engines(run: Path, *, dense_bundles: bool = True) -> dict[str, Path]:
    """Everything in a run that an engine can open: the bundles, ``"torch moe"`` and ``"torch dense"``.

    ``dense_bundles=False`` leaves out exports of the dense parent (an older recipe may have left some behind).
    """
    found = {}
    if (run / "source" / "source.json").is_file():
        found["torch dense"] = dense(run)
    if checkpoint(run).is_dir():
        found["torch moe"] = checkpoint(run)
    return found | {label: path for label, path in bundles(run).items() if dense_bundles or not label.endswith("dense")}


def executable(found: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Split :func:`engines` into what this machine executes and, label by label, why the rest is not executed.

    A bundle of a TensorRT target is a graph for an engine: its numbers on a CPU say nothing about the engine's.
    """
    here = {label: path for label, path in found.items() if not _engine(label)}
    reason = (
        "not executed here: an engine runs on its device; `moedge verify` checks the half-precision graph on this CPU"
    )
    return here, dict.fromkeys(found.keys() - here.keys(), reason)


def _engine(label: str) -> bool:
    row = targets.known(label.split()[0])
    return row is not None and row.engine is not None


def pick(run: Path, *, model: str, target: str) -> Path:
    """Return one engine folder of a run.

    Raises:
        MoEdgeError: the run has no such engine.
    """
    found = engines(run)
    label = f"{target} {model}"
    if label not in found:
        raise MoEdgeError(
            f"Run {run} has no {label!r}; it has: {', '.join(found) or 'nothing yet'}. Finish it with `moedge run`."
        )
    return found[label]
