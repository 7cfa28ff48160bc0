"""Options of the commands that ask lm-eval's questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moedge import MoEdgeError

if TYPE_CHECKING:
    from moedge.convert.tasks import Questions

Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks with commas between, e.g. arc_easy,piqa.")]
TaskData = Annotated[
    list[str] | None,
    typer.Option("--task-data", metavar="TASK=FILE", help="Local data of a task (.arrow, .jsonl, .parquet, .csv)."),
]
Shots = Annotated[int, typer.Option(min=0, help="Solved examples in front of a question.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each task.")]


def questions(tasks: str | None, task_data: list[str] | None, shots: int, limit: int | None) -> Questions:
    """Return what these options ask.

    Raises:
        MoEdgeError: data that is not of the form TASK=FILE, or of a task that is not asked.
    """
    from moedge.convert.tasks import Questions

    names = dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip())
    return Questions(tuple(names), dict(map(_assignment, task_data or [])), shots, limit)


def _assignment(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise MoEdgeError(f"--task-data {text}: write TASK=FILE, for example --task-data sciq=my.jsonl.")
    return name, Path(path).expanduser()
