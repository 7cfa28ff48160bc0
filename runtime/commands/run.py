"""``moedge run``: a whole recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import spare, write_text
from moedge.configs.recipe import Recipe, load_recipe
from moedge.runtime.bench.machine import machine
from moedge.runtime.frontier.stages import with_run
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.verdict import run_outcome
from moedge.runtime.progress import Reporter
from moedge.runtime.run import run_folder
from moedge.runtime.run.engine import Stage, Status, execute, lock, plan
from moedge.runtime.tables import Sheet

_GIB = 2**30
REPORT_FILES = ("report.html", "report.json", "report.md")


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a packaged recipe, or path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, what is cached, disk and memory; do nothing.")
    ] = False,
    redo: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Redo this stage (may be repeated).")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Redo this stage and every later one.")
    ] = None,
) -> int:
    """Do everything: open, calibrate, convert, export, evaluate, verify, bench, report.

    What is already done and unchanged is reused, so an interrupted run resumes with the same command. Exits with 1
    when an engine does not compute what PyTorch computes.

    \b
    Examples:
      moedge run smollm2-135m
      moedge run my-recipe.yaml --out runs/try-2 --dry-run
      moedge run smollm2-135m --from verify
    """
    wanted = load_recipe(recipe)
    root = out or Path("runs") / wanted.name
    run_folder.check_free(root)
    check_early(wanted, root)
    todo = with_run(wanted, machine())
    for stage in todo:
        spare(root / stage.name, [recipe, wanted.model.source, *wanted.text.calibration, *wanted.text.held_out])
    forced = forced_stages(todo, redo or [], start)
    console = Console(stderr=True)
    if dry_run:
        print_stages(Console(), f"{wanted.name} in {root}", plan(todo, root, forced=forced))
        _print_needs(Console(), wanted, root)
        return 0
    reporter = Reporter(console)
    console.print(escape(f"{wanted.name}: {wanted.model.source} -> {root}"), highlight=False)
    record = {"schema": run_folder.RUN_SCHEMA, "recipe": wanted.model_dump()}
    with lock(root):
        with reporter.show():
            execute(todo, root, reporter, forced=forced, record=record)
        return finish(root)


def check_early(recipe: Recipe, root: Path) -> None:
    """Refuse, before anything runs, a recipe that cannot work with a model whose config is already known."""
    from moedge.configs import tolerances

    try:
        profile, limits = tolerances.chosen(recipe.verify.tolerances)
        for target in ("torch", *recipe.export.targets):
            limits.profile(profile, target)
    except MoEdgeError as error:
        raise MoEdgeError(f"{recipe.name}: verify.tolerances: {error}") from None
    config = known_config(recipe, root)
    if config:
        recipe.check_model(config, recipe.name)


def known_config(recipe: Recipe, root: Path) -> dict[str, Any] | None:
    """The model's config.json if it can be read without opening the model: a local folder, or an earlier run's."""
    local = Path(recipe.model.source).expanduser() / "config.json"
    try:
        if local.is_file():
            return run_folder.read_json(local)
        record = run_folder.read_json(root / "source" / "source.json")
        return dict(record["config"]) if record["spec"] == recipe.model.source else None
    except (MoEdgeError, KeyError, TypeError, ValueError):
        return None


def forced_stages(todo: list[Stage], redo: list[str], start: str | None) -> frozenset[str]:
    """Return the names of the stages to redo: those named, and those from ``start`` on.

    Raises:
        MoEdgeError: no such stage.
    """
    names = [stage.name for stage in todo]
    for option, value in [("--redo", name) for name in redo] + ([("--from", start)] if start else []):
        if value not in names:
            raise MoEdgeError(f"{option} {value}: no such stage; stages: {', '.join(names)}.")
    return frozenset(redo) | frozenset(names[names.index(start) :] if start else [])


def finish(root: Path) -> int:
    """Put the report where people look for it, print the summary table; return the exit code."""
    from moedge.runtime.report.summary import show

    for name in REPORT_FILES:
        source, target = root / "report" / name, root / name
        text = source.read_text(encoding="utf-8")
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)
    result = run_folder.read_json(root / "report.json")
    console = Console()
    show(result, console)
    console.print(escape(f"report: {root / 'report.html'}"), highlight=False, soft_wrap=True)
    return mark(run_outcome(result["verification"])).exit_code


def print_stages(console: Console, title: str, statuses: list[tuple[Stage, Status]]) -> None:
    """Print what would be done and what is there already."""
    table = Sheet(title=escape(title))
    for column in ("stage", "state", "why", "what it does"):
        table.add_column(column)
    words = {"cached": "[green]cached[/green]", "run": "[yellow]to run[/yellow]", "depends": "[yellow]may run[/yellow]"}
    for stage, status in statuses:
        table.add_row(stage.name, words[status.state], escape(status.reason), escape(stage.what))
    console.print(table)


def _print_needs(console: Console, recipe: Recipe, root: Path) -> None:
    config = known_config(recipe, root)
    if config is None:
        console.print("disk and memory: known once the model's config is; run the source stage first.")
        return
    need = estimate(config, recipe)
    free = shutil.disk_usage(_existing(root)).free
    console.print(
        f"disk: about {need['disk'] / _GIB:.1f} GiB for the run and the model cache ({free / _GIB:.1f} GiB free); "
        f"memory: about {need['memory'] / _GIB:.1f} GiB at the peak ({machine()['memory_gib']} GiB in this machine).",
        highlight=False,
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def estimate(config: dict[str, Any], recipe: Recipe) -> dict[str, int]:
    """Bytes of disk and of memory at the peak, from the model's shape (float32 everywhere).

    Disk: the parent's float32 copy, the MoE checkpoint and one bundle per target (and per parent). Memory: the export
    stage holds the PyTorch model, the traced graph's copy of the weights and the copy that is being written; on top,
    evaluation holds two sets of logits [batch, window, V]; 1 GiB is what Python and the libraries take.
    """
    hidden, width, layers = (int(config[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    vocabulary, heads = int(config["vocab_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    attention = 2 * hidden * head * (heads + kv_heads)
    embedding = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    weights = 4 * (layers * (3 * hidden * width + attention) + embedding)
    copies = 2 + len(recipe.export.targets) * (2 if recipe.export.dense_parent else 1)
    logits = 4 * recipe.evaluate.batch_size * recipe.evaluate.window * vocabulary
    return {"disk": copies * weights, "memory": max(3 * weights, 2 * weights + 4 * logits) + _GIB}
