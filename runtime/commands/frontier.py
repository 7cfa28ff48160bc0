"""``moedge frontier``: conversions on several targets, their quality beside their measured speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge._files import spare, write_text
from moedge.configs.recipe import load_recipe
from moedge.runtime.bench.machine import machine
from moedge.runtime.commands.run import check_early, forced_stages, print_stages
from moedge.runtime.frontier import page, stages
from moedge.runtime.frontier.show import show
from moedge.runtime.progress import Reporter
from moedge.runtime.run import run_folder
from moedge.runtime.run.engine import execute, lock, plan


def frontier(
    recipe: Annotated[str, typer.Argument(help="Name of a packaged recipe, or path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default, as of `moedge run`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages and what is there; do nothing.")] = False,
    redo: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Redo this stage (may be repeated).")] = None,
) -> None:
    """Compare conversions on several targets: perplexity and KL beside measured speed and size, and who wins.

    The section `frontier` of a recipe names variants and targets; without one, our gather at four shares, the
    recipe's own conversion, FLAP and TEAL are compared. What is done and unchanged is reused.

    \b
    Examples:
      moedge frontier smollm2-135m
      moedge frontier my-recipe.yaml --out runs/try-2 --dry-run
      moedge frontier smollm2-135m --redo frontier/bench-ort-cpu
    """
    wanted = load_recipe(recipe)
    root = out or Path("runs") / wanted.name
    run_folder.check_free(root)
    check_early(wanted, root)
    todo = stages.build(wanted, machine())
    for stage in todo:
        spare(root / stage.name, [recipe, wanted.model.source, *wanted.text.calibration, *wanted.text.held_out])
    forced = forced_stages(todo, redo or [], None)
    console = Console(stderr=True)
    if dry_run:
        print_stages(Console(), f"{wanted.name} in {root}", plan(todo, root, forced=forced))
        return
    reporter = Reporter(console)
    console.print(escape(f"{wanted.name}: {wanted.model.source} -> {root}"), highlight=False)
    record = {"schema": run_folder.RUN_SCHEMA, "recipe": wanted.model_dump()}
    with lock(root):
        with reporter.show():
            execute(todo, root, reporter, forced=forced, record=record)
        for name in page.FILES:
            write_text(root / name, (root / stages.TABLE / name).read_text(encoding="utf-8"))
    show(page.read(root / stages.TABLE / "frontier.json"), Console())
    Console().print(escape(f"plots: {root / 'frontier.html'}"), highlight=False, soft_wrap=True)
