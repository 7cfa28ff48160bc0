"""One conversion outside of a run: the stages up to ``convert``, of which the checkpoint alone is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moedge._files import atomic_dir
from moedge._progress import Progress
from moedge.configs.recipe import Recipe
from moedge.runtime.bench.machine import machine
from moedge.runtime.run import run_folder, stages
from moedge.runtime.run.engine import Context


def write_checkpoint(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    check: Callable[[dict[str, Any]], None],
    progress: Progress,
    note: Callable[[str], None],
) -> None:
    """Convert as a recipe says and write the MoE checkpoint to ``out``, whole or not at all.

    Args:
        recipe: its sections ``model``, ``text``, ``calibration`` and ``convert`` are read.
        check: called with the model's ``config.json`` before anything is measured; raises what does not fit.
        progress: called with (done, in all) of each stage; ``note`` with what it does.

    Raises:
        MoEdgeError: ``out`` is in use and ``force`` is not given, or what a stage refuses.
    """
    local = Path(recipe.model.source).expanduser() / "config.json"
    if local.is_file():
        check(run_folder.read_json(local, "download or save the model again"))
    with atomic_dir(out, force=force, inputs=(recipe.model.source, recipe.text.calibration)) as partial:
        work = partial / ".stages"
        built = {stage.name: stage for stage in stages.build(recipe, machine())}
        for stage in (*(built[name] for name in built["convert"].reads), built["convert"]):
            note(stage.what)
            folder = work / stage.name
            folder.mkdir(parents=True)
            stage.body(Context(folder, work, stage.params, progress, note))
            if stage.name == "source":
                check(run_folder.source(work)["config"])
        checkpoint = run_folder.checkpoint(work)
        for path in checkpoint.iterdir():
            path.rename(partial / path.name)
        shutil.rmtree(work)
