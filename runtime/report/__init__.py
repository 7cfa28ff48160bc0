"""The report of a run: report.json (schema ``moedge.report/1``), report.md and a self-contained report.html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge._files import write_json, write_text
from moedge.convert import forms
from moedge.runtime.report.text import filters
from moedge.runtime.report.zeros import zeros_note, zeros_sentence

if TYPE_CHECKING:
    import jinja2

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
VERIFY_SCHEMA_FILE = Path(__file__).with_name("verify.schema.json")
"""Of what ``moedge verify --json`` prints."""


def write(run: Path, out: Path, *, recipe: dict[str, Any]) -> dict[str, Any]:
    """Write the three files of a finished run into ``out`` and return the report.

    Raises:
        MoEdgeError: a stage's result is missing or damaged.
    """
    from moedge.runtime.report.build import build

    report = build(run, recipe)
    write_json(out / "report.json", report)
    write_text(out / "report.md", render(report, "report.md.j2"))
    write_text(out / "report.html", render(report, "report.html.j2"))
    return report


def environment(*, html: bool) -> jinja2.Environment:
    """Return what renders the templates in this folder, with the words of outcomes; HTML escapes every value."""
    import jinja2

    from moedge.runtime.parity import verdict
    from moedge.runtime.parity.outcomes import mark

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= filters()
    found.globals |= {"mark": mark, "check_outcome": verdict.outcome_of, "entry_outcome": verdict.entry_outcome}
    found.globals |= {"run_outcome": verdict.run_outcome, "part_outcome": verdict.part_outcome}
    return found


def render(report: dict[str, Any], template: str) -> str:
    """Render a report with one of the templates in this folder."""
    from markupsafe import Markup

    from moedge.runtime.frontier.plots import draw
    from moedge.runtime.report import gains
    from moedge.runtime.report.plots import draw_all
    from moedge.runtime.report.profile import NOTE, table
    from moedge.runtime.report.watched import sentences

    html = template.endswith(".html.j2")
    templates = environment(html=html)
    templates.filters |= {"zeros": zeros_sentence, "zeros_note": zeros_note, "prompted": forms.prompted}
    templates.globals |= {"gains": gains, "profile_table": table, "profile_note": NOTE, "watched": sentences}
    # The SVG comes from matplotlib, which escapes the text it draws; everything else is escaped by jinja2.
    plots = {name: Markup(svg) for name, svg in draw_all(report).items()} if html else {}
    drawn = draw(report["frontier"]) if html and "frontier" in report else []
    return templates.get_template(template).render(
        report=report, plots=plots, frontier_plots=[Markup(plot) for plot in drawn]
    )
