"""``moedge export``: a checkpoint becomes ONNX bundles."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import atomic_dir, link_or_copy
from moedge.export import manifest as manifests
from moedge.export import targets as registry
from moedge.export.manifest import Manifest
from moedge.runtime.commands import models
from moedge.runtime.commands.sizes import size_table
from moedge.runtime.commands.tokens import token_windows
from moedge.runtime.device.moedge_plugins import refusal
from moedge.runtime.device.moedge_trt import DeviceError
from moedge.runtime.progress import single
from moedge.runtime.run import held_out, run_folder


def export(
    checkpoint: Path,
    out: Path,
    *,
    targets: list[str] | None,
    label: str | None,
    max_length: int | None,
    tensorrt: str | None,
    experts: str | None,
    dtype: str | None,
    force: bool,
    gptq_text: str | None = None,
    gptq_tokens: int = 4096,
) -> None:
    """Write ``out/<target>/`` for each target, all or none. 4-bit weights by GPTQ on ``gptq_text`` if it is given.

    Bundles of other targets that ``out`` already holds stay when they are of the same graph.
    """
    wanted = targets or list(registry.default())
    rows = [registry.find(name) for name in wanted]
    registry.check_form(experts)
    if tensorrt is not None:
        try:
            refusal(tensorrt)
        except DeviceError as error:
            raise MoEdgeError(str(error)) from None
    if experts:
        _check_taken(f"--experts {experts}", lambda row: experts in row.expert_forms, rows)
    if dtype:
        _check_taken("--dtype", registry.has_dtypes, rows)
    if gptq_text is not None:
        _check_taken("--gptq", lambda row: row.calibrated, rows)
    given, checkpoint = checkpoint, models.local(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise MoEdgeError(f"{checkpoint} is not a checkpoint folder: it has no config.json.")
    if max_length is not None:
        config = run_folder.read_json(checkpoint / "config.json", "download or save the model again")
        held_out.check_positions(config.get("max_position_embeddings"), max_length, "--max-length")
    there = _bundles(out)
    if not force and (taken := sorted(set(there) & set(wanted))):
        raise MoEdgeError(f"Output folder {out / taken[0]} already exists; pass --force to replace it.")
    calibration = None
    if gptq_text is not None:
        window = min(256, gptq_tokens)
        calibration = token_windows(checkpoint, gptq_text, window, -(-gptq_tokens // window))[1]
    opened = atomic_dir(out, force=force or bool(there), inputs=[checkpoint, *([gptq_text] if gptq_text else [])])
    with opened as partial, single("export", f"{checkpoint} -> {out}") as reporter:
        from moedge.export.pipeline import export as run

        def step(what: str, done: int, total: int) -> None:
            reporter.progress(done, total)
            if done < total:
                reporter.note(what)

        run(
            checkpoint,
            partial,
            wanted,
            label=label or _label(given, checkpoint),
            max_length=max_length,
            tensorrt=tensorrt,
            experts=experts,
            dtype=dtype,
            progress=step,
            calibration=calibration,
        )
        _keep(there, partial, force=force)
    for folder in sorted(path.parent for path in out.glob("*/manifest.json")):
        console = Console()
        console.print(escape(f"{folder.name}: {folder}"), highlight=False, soft_wrap=True)
        facts = manifests.read(folder)
        if isinstance(facts, Manifest) and facts.quantization:
            console.print(size_table(facts.quantization))


def _label(given: Path, checkpoint: Path) -> str:
    """The folder's name (a path without one is the working folder), or the hub id, asset or GGUF that was given."""
    return str(given) if checkpoint != given else given.name or given.resolve().name


def _check_taken(option: str, takes: Callable[[registry.Target], bool], rows: list[registry.Target]) -> None:
    """Refuse an option that none of the targets takes."""
    if not any(map(takes, rows)):
        wanted = ", ".join(row.name for row in rows)
        raise MoEdgeError(f"{option} is for target {' or '.join(registry.names(takes))}, not among {wanted}.")


def _bundles(out: Path) -> dict[str, Path]:
    """Return the bundles in ``out`` by target; none when something else is there too, which is not ours to touch."""
    found = {path.parent.name: path.parent for path in out.glob("*/manifest.json")}
    return found if out.is_dir() and {path.name for path in out.iterdir()} == set(found) else {}


def _keep(there: dict[str, Path], partial: Path, *, force: bool) -> None:
    """Link those bundles of ``there`` into ``partial`` that were not made again and stem from its portable graph.

    Raises:
        MoEdgeError: one stems from another graph and ``force``, which drops it, is not given.
    """
    graph = manifests.content_hash(partial / "portable")
    for name, folder in there.items():
        manifest = manifests.read(folder, "delete the folder and export again")
        parent = manifest.parent if manifest else None
        if not force and graph != (manifests.content_hash(folder) if name == "portable" else parent):
            raise MoEdgeError(
                f"{folder} is of another model, or was exported with other settings; choose another output folder, or "
                "pass --force to replace it."
            )
        if graph == parent and not (partial / name).exists():
            shutil.copytree(folder, partial / name, copy_function=link_or_copy)
