"""``moedge convert``: a dense model becomes a MoE checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moedge._files import atomic_dir
from moedge.configs.recipe import recipe_from
from moedge.runtime import run_folder, stages
from moedge.runtime.machine import machine
from moedge.runtime.progress import single
from moedge.runtime.recipe import Context


def convert(
    model: str,
    out: Path,
    *,
    revision: str | None,
    text: str,
    calibration: dict[str, Any],
    settings: dict[str, Any],
    force: bool,
) -> None:
    """Run the stages ``source``, ``calibrate`` and ``convert`` of a recipe made of the options; keep the checkpoint."""
    recipe = recipe_from(
        {
            "name": "convert",
            "model": {"source": model, "revision": revision},
            "text": {"calibration": text, "held_out": [text]},
            "calibration": calibration,
            "convert": settings,
        },
        where="moedge convert",
    )
    local = Path(model).expanduser() / "config.json"
    if local.is_file():
        recipe.check_model(run_folder.read_json(local), "moedge convert", only_convert=True)
    with atomic_dir(out, force=force) as partial, single("convert", f"{model} -> {out}") as reporter:
        work = partial / ".stages"
        for stage in stages.build(recipe, machine())[:3]:
            reporter.note(stage.what)
            folder = work / stage.name
            folder.mkdir(parents=True)
            stage.body(Context(folder, work, stage.params, reporter.progress, reporter.note))
            if stage.name == "source":
                recipe.check_model(run_folder.source(work)["config"], "moedge convert", only_convert=True)
        checkpoint = run_folder.checkpoint(work)
        for path in checkpoint.iterdir():
            path.rename(partial / path.name)
        shutil.rmtree(work)
    digest = json.loads((out / "plan.json").read_text(encoding="utf-8"))["sha256"]
    Console().print(escape(f"{out}: {stages.notation(settings)}, plan {digest}"), highlight=False, soft_wrap=True)
