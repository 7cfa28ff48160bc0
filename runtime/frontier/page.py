"""frontier.json, frontier.md and a frontier.html that needs no other file."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from moedge._files import write_json, write_text
from moedge.runtime.frontier.plots import draw
from moedge.runtime.frontier.schema import Frontier
from moedge.runtime.run import run_folder

FILES = ("frontier.html", "frontier.json", "frontier.md")
TEMPLATES = Path(__file__).parent.parent / "report"


def write(frontier: Frontier, out: Path) -> None:
    """Write the three files into ``out``."""
    write_json(out / "frontier.json", frontier)
    for name in ("frontier.md", "frontier.html"):
        write_text(out / name, render(frontier, f"{name}.j2"))


def render(frontier: Frontier, template: str) -> str:
    """Render a frontier with one of the templates of the report; HTML escapes every value."""
    import jinja2
    from markupsafe import Markup

    from moedge.runtime.report.text import filters

    html = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters()
    plots = [Markup(drawn) for drawn in draw(frontier)] if html else []
    return environment.get_template(template).render(frontier=frontier, frontier_plots=plots)


def read(path: Path) -> Frontier:
    """Read a frontier.json.

    Raises:
        MoEdgeError: missing or damaged.
    """
    return cast("Frontier", run_folder.read_json(path, "run `moedge frontier` on its recipe again"))
