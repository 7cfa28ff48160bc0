"""``moedge export``: a checkpoint becomes ONNX bundles."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs.recipe import TARGETS as DEFAULT
from moedge.export.lowering import TARGETS
from moedge.runtime import run_folder
from moedge.runtime.commands.sizes import size_table
from moedge.runtime.commands.tokens import token_windows
from moedge.runtime.progress import single


def export(
    checkpoint: Path,
    out: Path,
    *,
    targets: list[str] | None,
    label: str | None,
    max_length: int | None,
    tensorrt: str | None,
    force: bool,
    gptq_text: str | None = None,
    gptq_tokens: int = 4096,
) -> None:
    """Write ``out/<target>/`` for each target, all or none. 4-bit weights by GPTQ on ``gptq_text`` if it is given."""
    wanted = targets or list(DEFAULT)
    for target in wanted:
        if target not in TARGETS:
            raise MoEdgeError(f"Unknown target {target!r}; known: {', '.join(TARGETS)}.")
    if not (checkpoint / "config.json").is_file():
        raise MoEdgeError(f"{checkpoint} is not a checkpoint folder: it has no config.json.")
    calibration = None
    if gptq_text is not None:
        from moedge.export.pipeline import CALIBRATED

        if not set(wanted) & set(CALIBRATED):
            raise MoEdgeError(
                f"--gptq is for target {' or '.join(CALIBRATED)}, which is not among {', '.join(wanted)}."
            )
        window = min(256, gptq_tokens)
        calibration = token_windows(checkpoint, gptq_text, window, -(-gptq_tokens // window))[1]
    with atomic_dir(out, force=force) as partial, single("export", f"{checkpoint} -> {out}") as reporter:
        from moedge.export.pipeline import export as run

        def step(what: str, done: int, total: int) -> None:
            reporter.progress(done, total)
            if done < total:
                reporter.note(what)

        run(
            checkpoint,
            partial,
            wanted,
            label=label or checkpoint.name,
            max_length=max_length,
            tensorrt=tensorrt,
            progress=step,
            calibration=calibration,
        )
    for folder in sorted(path.parent for path in out.glob("*/manifest.json")):
        console = Console()
        console.print(escape(f"{folder.name}: {folder}"), highlight=False, soft_wrap=True)
        if sizes := run_folder.read_json(folder / "manifest.json").get("quantization"):
            console.print(size_table(sizes))
