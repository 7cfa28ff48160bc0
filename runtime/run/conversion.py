"""One conversion outside of a run: the stages up to ``convert``, of which the checkpoint alone is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge._progress import Progress
from moedge.configs.recipe import Conversion
from moedge.convert import processes
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

    Under ``torchrun`` every process calls this, the processes split the calibration windows, and the first one writes
    (:mod:`moedge.convert.processes`).

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
    with _place(out, force=force, inputs=[recipe.model.source, *recipe.text.calibration]) as partial:
        work = partial / ".stages"
        for stage in stages.to_convert(recipe):
            note(stage.what)
            folder = work / stage.name
            folder.mkdir(parents=True)
            with processes.first_alone() if stage.name == "source" else nullcontext():
                stage.body(Context(folder, work, stage.params, progress, note))
            if stage.name == "source":
                check(run_folder.source(work)["config"])
        if not processes.rank():
            for path in run_folder.checkpoint(work).iterdir():
                path.rename(partial / path.name)
        shutil.rmtree(work)


@contextmanager
def _place(out: Path, *, force: bool, inputs: list[str]) -> Iterator[Path]:
    """A folder that becomes ``out``; in the processes that do not write one that is thrown away."""
    if not processes.rank():
        with atomic_dir(out, force=force, inputs=inputs) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory(prefix="moedge-convert-") as folder:
        yield Path(folder)


_PATIENCE = 15.0
"""Seconds in which the first process, too, should have seen what is wrong."""


@contextmanager
def one_message() -> Iterator[None]:
    """Let one process say what is wrong: the first, or where it sees nothing wrong the one that does."""
    try:
        yield
    except MoEdgeError as error:
        if processes.rank():
            time.sleep(_PATIENCE)
        if not _speaks():
            raise SystemExit(MoEdgeError.exit_code) from None
        if processes.rank():
            raise MoEdgeError(f"process {processes.rank()}: {error}") from error
        raise


def _speaks() -> bool:
    """Whether no other process has said anything. They count in the store by which ``torchrun`` joined them.

    How long it takes until all are ended when one has ended is nothing to count on. Where the store is gone nobody
    knows, and something said twice is better than nothing said.
    """
    if processes.count() == 1:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=10))
        said: int = store.add(f"moedge/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1)
    except (KeyError, RuntimeError):
        return True
    return said == 1
