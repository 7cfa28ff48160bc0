"""One conversion outside of a run: the stages up to ``convert``, of which the checkpoint alone is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moedge._files import atomic_dir
from moedge._progress import Progress
from moedge.configs.recipe import Conversion
from moedge.runtime.run import run_folder, stages
from moedge.runtime.run.engine import Context


def write_checkpoint(
    recipe: Conversion,
    out: Path,
    *,
    force: bool = False,
    check: Callable[[dict[str, Any]], None],
    progress: Progress,
    note: Callable[[str], None],
) -> None:
    """Convert as a recipe says and write the MoE checkpoint to ``out``, whole or not at all.

    Args:
        recipe: its sections that the stages up to ``convert`` read.
        check: called with the model's ``config.json`` before anything is measured; raises what does not fit.
        progress: called with (done, in all) of each stage; ``note`` with what it does.

    Raises:
        MoEdgeError: ``out`` is in use and ``force`` is not given, or what a stage refuses.
    """
    local = Path(recipe.model.source).expanduser() / "config.json"
    if local.is_file():
        check(run_folder.read_json(local, "download or save the model again"))
    with atomic_dir(out, force=force, inputs=(recipe.model.source, *recipe.text.calibration)) as partial:
        work = partial / ".stages"
        for stage in stages.to_convert(recipe):
            note(stage.what)
            folder = work / stage.name
            folder.mkdir(parents=True)
            stage.body(Context(folder, work, stage.params, progress, note))
            if stage.name == "source":
                check(run_folder.source(work)["config"])
        for path in run_folder.checkpoint(work).iterdir():
            path.rename(partial / path.name)
        shutil.rmtree(work)
