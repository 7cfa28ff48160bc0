"""``moedge ablate``: compare methods, controls and switches under one protocol."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from moedge.configs.study import load_study
from moedge.runtime.progress import Reporter
from moedge.runtime.run import run_folder, study
from moedge.runtime.run.engine import execute


def ablate(name_or_path: str, out: Path | None) -> None:
    """Run a study, or what is left of it, and print its table."""
    wanted = load_study(name_or_path)
    root = out or Path("runs") / wanted.name
    run_folder.check_free(root)
    console = Console(stderr=True)
    reporter = Reporter(console)
    console.print(escape(f"{wanted.name}: {wanted.model.source} -> {root}"), highlight=False)
    record = {"schema": study.STUDY_SCHEMA, "study": wanted.model_dump(mode="json")}
    with reporter.show():
        execute(study.build(wanted), root, reporter, record=record)
    results = study.results(root)
    Console().print(Markdown(results.read_text(encoding="utf-8")))
    Console().print(escape(f"{results} and results.json beside it"), highlight=False, soft_wrap=True)
