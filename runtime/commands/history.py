"""``moedge history``: stored results over time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moedge._files import write_text
from moedge.runtime.commands._options import Json
from moedge.runtime.history import page, read, steps
from moedge.runtime.history.schema import SCHEMA, History
from moedge.runtime.run import run_folder


def history(
    results: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or files and folders of stored results (JSON); read to the bottom."),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Also write plots and tables as one HTML page to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how KL, accuracy and times changed over stored results, and where they stepped.

    Results of different machines are never joined. Steps are marked with moedge\\[history].

    \b
    Examples:
      moedge history runs/
      moedge history results/ --html history.html
    """
    run_folder.check_results({"--html": html}, [given for given in results if given.is_file()])
    series, files, notes = read.collect(results)
    if steps.available():
        for one in series:
            steps.mark(one)
    else:
        notes.append(steps.NEEDS)
    found: History = {"schema": SCHEMA, "series": series, "files": files, "notes": notes}
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        page.show(found, Console())
    if html is not None:
        write_text(html, page.page(found))
