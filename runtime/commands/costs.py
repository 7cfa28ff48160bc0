"""``moedge costs``: what the products of a model take by how many of their inputs are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moedge import MoEdgeError
from moedge._files import check_writable, spare, write_json
from moedge.export import targets
from moedge.runtime.commands._options import Force, Model, Threads
from moedge.runtime.progress import single
from moedge.runtime.tables import Sheet

_TARGETS = targets.names(lambda row: row.own_operators)


def costs(
    model: Model,
    out: Annotated[Path, typer.Argument(help="JSON file, for `moedge convert --method gather --set costs=FILE`.")],
    target: Annotated[str, typer.Option(help=f"One of {', '.join(_TARGETS)}.")] = "ort-cpu",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=3, help="How often each share of the inputs is timed.")] = 21,
    force: Force = False,
) -> None:
    """Time a model's products on this machine by how many inputs they read: what a gather may save, and where.

    Products of each size are timed alone, with random weights; nothing else should run meanwhile.

    \b
    Examples:
      moedge costs ./my-llama costs.json --target ort-cpu-int8
      moedge convert ./my-llama build/moe --method gather --set share=.6 --set costs=costs.json
    """
    from moedge.convert import sources
    from moedge.runtime.bench import products

    if out.exists() and not force:
        raise MoEdgeError(f"{out} exists; give another name, or --force.")
    check_writable(out, "OUT")
    spare(out, (model,))
    found = sources.resolve(model)
    with single("costs", f"{found.label} -> {out}") as reporter:
        opened = sources.open_model(found.folder)
        result = products.of_model(opened, target, threads, rounds=rounds, progress=reporter.progress)
    write_json(out, {**result, "model": found.label})
    _show(result, Console())


def _show(result: dict[str, Any], console: Console) -> None:
    """Print microseconds with all inputs, and what a few shares take of them."""
    sheet = Sheet(title=f"{result['target']}, {result['threads']} threads: time by share of the inputs that are kept")
    kept = result["products"][0]["kept"]
    shown = [place for place, share in enumerate(kept[:-1]) if round(10 * share) % 2 == 0]
    sheet.add_column("inputs x outputs")
    sheet.add_column("all, us", justify="right")
    for place in shown:
        sheet.add_column(f"{kept[place]:.0%}", justify="right")
    for one in result["products"]:
        parts = [f"{one['ms'][place] / one['ms'][-1]:.2f}" for place in shown]
        sheet.add_row(f"{one['inputs']} x {one['outputs']}", f"{1e3 * one['ms'][-1]:.1f}", *parts)
    console.print(sheet)
