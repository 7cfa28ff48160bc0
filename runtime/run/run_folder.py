"""Where things lie in a run folder, ``runs/<name>/``: the one place that knows its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedge import MoEdgeError, _files
from moedge._files import refuse_pointer
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef, Role

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


def converted(run: Path) -> Path:
    """Folder of the MoE checkpoint of a finished run, for a command that was given the run.

    Raises:
        MoEdgeError: there is none. Runs of `moedge tune`, `frontier` and `ablate` have theirs elsewhere.
    """
    folder = checkpoint(run)
    if folder.is_dir():
        return folder
    others = sorted(str(plan.parent) for plan in run.rglob("plan.json") if (plan.parent / "config.json").is_file())
    mend = f"give one of its checkpoints: {', '.join(others)}" if others else "finish it with `moedge run`"
    raise MoEdgeError(f"Run {run} has no {folder.relative_to(run)}; {mend}.")


def tokenizer(run: Path) -> Path:
    """Folder whose tokenizer reads text for the engines of a run: they all have the same.

    Raises:
        MoEdgeError: none has one.
    """
    places = (checkpoint(run), *engines(run).values())
    found = next((folder for folder in places if (folder / "tokenizer.json").is_file()), None)
    if found is None:
        raise MoEdgeError(f"No engine of run {run} has a tokenizer.json; finish it with `moedge run`.")
    return found


def source(run: Path) -> dict[str, Any]:
    """What the source stage found: spec, kind, sha256, label, folder, config."""
    return read_json(run / "source" / "source.json")


def dense(run: Path) -> Path:
    """Folder of the dense parent (in the cache, or where the user keeps it)."""
    return Path(source(run)["folder"])


def bundles(run: Path) -> dict[EngineRef, Path]:
    """Finished bundles, target by target, those of the MoE first."""
    stages: tuple[tuple[str, Role], ...] = (("export", "moe"), ("export-dense", "dense"))
    return {
        EngineRef(manifest.parent.name, role): manifest.parent
        for stage, role in stages
        for manifest in sorted((run / stage).glob("*/manifest.json"))
    }


def bundles_below(path: Path) -> str:
    """Return a sentence that names the bundles in ``path``, such as `moedge export` writes; empty without any."""
    below = sorted(manifest.parent.name for manifest in path.glob("*/manifest.json"))
    return f" It holds the bundles {', '.join(below)}; give one of them." if below else ""


def engines(run: Path, *, dense_bundles: bool = True) -> dict[EngineRef, Path]:
    """Everything in a run that an engine can open: the bundles, and both models in PyTorch.

    ``dense_bundles=False`` leaves out exports of the dense parent (an older recipe may have left some behind).
    """
    found = {}
    if (run / "source" / "source.json").is_file():
        found[TORCH_DENSE] = dense(run)
    if checkpoint(run).is_dir():
        found[TORCH_MOE] = checkpoint(run)
    return found | {ref: path for ref, path in bundles(run).items() if dense_bundles or ref.role != "dense"}


def executable(found: dict[EngineRef, Path]) -> tuple[dict[EngineRef, Path], dict[str, str]]:
    """Split :func:`engines` into what this machine executes and, label by label, why the rest is not executed.

    A bundle of a TensorRT target is a graph for an engine: its numbers on a CPU say nothing about the engine's.
    """
    here = {ref: path for ref, path in found.items() if ref.row is None or ref.row.engine is None}
    reason = (
        "not executed here: an engine runs on its device; `moedge verify` checks the half-precision graph on this CPU"
    )
    return here, {str(ref): reason for ref in found if ref not in here}


def pick(run: Path, *, model: Role, target: str) -> Path:
    """Return one engine folder of a run.

    Raises:
        MoEdgeError: the run has no such engine.
    """
    found = engines(run)
    ref = EngineRef(target, model)
    if ref not in found:
        there = ", ".join(map(str, found)) or "nothing yet"
        raise MoEdgeError(f"Run {run} has no {str(ref)!r}; it has: {there}. Finish it with `moedge run`.")
    return found[ref]
