"""``moedge ablate``: compare methods, controls and switches under one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from moedge.configs.study import load_study
from moedge.runtime.progress import Reporter
from moedge.runtime.run import run_folder
from moedge.runtime.run import study as rows
from moedge.runtime.run.engine import execute


def ablate(
    study: Annotated[str, typer.Argument(help="A packaged study, or the path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
) -> None:
    """Compare conversion methods, switches of a method, and controls on one held-out protocol; training-free.

    A study is a YAML file; every row is kept, so an interrupted study goes on where it stopped.

    \b
    Examples:
      moedge ablate smollm2-135m-methods
      moedge ablate my-study.yaml --out runs/my-study
    """
    wanted = load_study(study)
    root = out or Path("runs") / wanted.name
    run_folder.check_free(root)
    console = Console(stderr=True)
    reporter = Reporter(console)
    console.print(escape(f"{wanted.name}: {wanted.model.source} -> {root}"), highlight=False)
    record = {"schema": rows.STUDY_SCHEMA, "study": wanted.model_dump(mode="json")}
    with reporter.show():
        execute(rows.build(wanted), root, reporter, record=record)
    results = rows.results(root)
    Console().print(Markdown(results.read_text(encoding="utf-8")))
    Console().print(escape(f"{results} and results.json beside it"), highlight=False, soft_wrap=True)
