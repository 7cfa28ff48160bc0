"""Where things lie in a run folder, ``runs/<name>/``: the one place that knows its layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moedge import MoEdgeError, _files
from moedge._files import refuse_pointer
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef, Role

RUN_SCHEMA = "moedge.run/1"


_ON_TOP = ("run.json", "report.json", "report.md", "report.html", "frontier.json", "frontier.md", "frontier.html")
"""What a run writes on top of its folder."""


def is_run(path: Path) -> bool:
    """Tell whether ``path`` is a run folder."""
    return (path / "run.json").is_file()


def check_results(files: Mapping[str, Path | None], inputs: Iterable[Path | str]) -> None:
    """Refuse files of results that cannot be written, or that a command reads.

    Args:
        files: by the option that names them. They replace what a file of their name holds, as results of tests do.
        inputs: what the command reads. Beside its report a run has room for more.

    Raises:
        MoEdgeError: a file cannot be written, is an input, or lies in a folder that is one.
    """
    _files.check_all_writable(files)
    read = [Path(given).resolve() for given in inputs if Path(given).exists()]
    for option, path in files.items():
        if path is None:
            continue
        place = path.resolve()
        for given in read:
            if place == given:
                raise MoEdgeError(f"{option} {path} is read by this command; name another file.")
            beside = place.parent == given and is_run(given) and place.name not in _ON_TOP
            if given in place.parents and not beside:
                raise MoEdgeError(f"{option} {path} lies in {given}, which this command reads; name a file elsewhere.")


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


_BUNDLES: tuple[tuple[str, Role], ...] = (("export", "moe"), ("export-dense", "dense"))
"""Stages that write bundles, and of what."""


def source_digest(source: dict[str, Any]) -> str:
    """What later stages see of the stage ``source``: the model that it points to, by its hash and name."""
    return _files.digest({"sha256": source["sha256"], "label": source["label"]})


def leftovers(run: Path) -> dict[str, str]:
    """Stage -> what it was made of and is no more, where a run was not finished since its recipe was changed.

    Of several recipes' results in one folder only those of the last one belong together.
    """
    found: dict[str, str] = {}
    for stage in ("convert", *(name for name, _ in _BUNDLES)):
        file = run / stage / "stage.json"
        if not file.is_file():
            continue
        inputs = read_json(file).get("parts", {}).get("inputs", {})
        for name, words in (("source", "dense model"), ("convert", "conversion")):
            now = _seen(run, name)
            if name in inputs and (name in found or (now is not None and now != inputs[name])):
                found[stage] = f"{stage} is of another {words} than this run has now"
                break
    return found


def _seen(run: Path, stage: str) -> str | None:
    """What later stages see of a stage now; None where that is not asked, or it is not there."""
    if stage == "source" and (run / "source" / "source.json").is_file():
        return source_digest(source(run))
    if stage == "convert" and (run / "convert" / "stage.json").is_file():
        return _files.digest(read_json(run / "convert" / "stage.json")["outputs"])
    return None


def bundles(run: Path, *, dense: bool = True) -> dict[EngineRef, Path]:
    """Finished bundles, target by target, those of the MoE first; without :func:`leftovers`.

    ``dense=False`` leaves out exports of the dense parent, too (an older recipe may have left some behind).
    """
    return _bundles(run, leftovers(run), dense=dense)


def _bundles(run: Path, left: Mapping[str, str], *, dense: bool) -> dict[EngineRef, Path]:
    return {
        EngineRef(manifest.parent.name, role): manifest.parent
        for stage, role in _BUNDLES
        if stage not in left and (dense or role != "dense")
        for manifest in sorted((run / stage).glob("*/manifest.json"))
    }


def bundles_below(path: Path) -> str:
    """Return a sentence that names the bundles in ``path``, such as `moedge export` writes; empty without any."""
    below = sorted(manifest.parent.name for manifest in path.glob("*/manifest.json"))
    return f" It holds the bundles {', '.join(below)}; give one of them." if below else ""


def engines(run: Path, *, dense_bundles: bool = True) -> dict[EngineRef, Path]:
    """Everything in a run that an engine can open: the bundles, and both models in PyTorch; without :func:`leftovers`.

    ``dense_bundles``: see :func:`bundles`.
    """
    found, left = {}, leftovers(run)
    if (run / "source" / "source.json").is_file():
        found[TORCH_DENSE] = dense(run)
    if checkpoint(run).is_dir() and "convert" not in left:
        found[TORCH_MOE] = checkpoint(run)
    return found | _bundles(run, left, dense=dense_bundles)


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
