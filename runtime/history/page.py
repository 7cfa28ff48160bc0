"""A history as a table on a terminal, and as an HTML page that needs no other file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from moedge.runtime.history.schema import METRICS, History, Metric, Point, Series
from moedge.runtime.history.steps import change
from moedge.runtime.tables import Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("engine", "at", "results", "first", "last", "change", "steps")
_LINES = 8
"""Lines of one plot; more are drawn in the next one."""


def groups(history: History) -> Iterator[tuple[Metric, str, list[Series]]]:
    """Series of one figure on one machine together: what one plot and one table hold."""
    for (metric, machine), found in itertools.groupby(history["series"], lambda one: (one["metric"], one["machine"])):
        yield metric, machine, list(found)


def row(series: Series) -> list[str]:
    """The cells of one series, in the order of :data:`COLUMNS`."""
    metric, points = series["metric"], series["points"]
    first, last = points[0], points[-1]
    steps = [
        f"{step['when'][:10]}{_commit(points[step['index']])}: {change(metric, step['before'], step['after'])}"
        for step in series["steps"]
    ]
    return [
        series["engine"],
        series["setting"],
        str(len(points)),
        f"{_value(metric, first['value'])} ({first['when'][:10]})",
        f"{_value(metric, last['value'])} ({last['when'][:10]}{_commit(last)})",
        change(metric, first["value"], last["value"]) if len(points) > 1 else "",
        "; ".join(steps),
    ]


def _commit(point: Point) -> str:
    return f", {point['commit'][:8]}" if point["commit"] else ""


def _value(metric: Metric, value: float) -> str:
    return {"accuracy": f"{value:.1%}", "kl": f"{value:.3g}"}.get(metric, f"{value:.4g}")


def show(history: History, console: Console) -> None:
    """Print a table for each figure and machine."""
    for metric, machine, found in groups(history):
        sheet = Sheet(title=escape(f"{METRICS[metric]}, {machine}"))
        for name in COLUMNS:
            sheet.add_column(name, justify="right" if name == "results" else "left")
        for one in found:
            sheet.add_row(*map(escape, row(one)))
        console.print(sheet)
        console.print()
    for note in history["notes"]:
        console.print(escape(f"note: {note}."), highlight=False, soft_wrap=True)


def page(history: History) -> str:
    """Return the HTML page."""
    import matplotlib
    from markupsafe import Markup

    from moedge.runtime.report import environment
    from moedge.runtime.report.palette import STYLE, svg

    parts = []
    with matplotlib.rc_context(STYLE):
        for number, (metric, machine, found) in enumerate(groups(history)):
            drawn = [
                Markup(svg(draw(metric, found[start : start + _LINES]), f"history{number}-{start}"))
                for start in range(0, len(found), _LINES)
            ]
            parts.append({"title": METRICS[metric], "machine": machine, "plots": drawn, "rows": list(map(row, found))})
    template = environment(html=True).get_template("history.html.j2")
    return template.render(history=history, parts=parts, columns=COLUMNS)


def draw(metric: Metric, series: list[Series]) -> Figure:
    """Draw series of one figure on one machine over time; a dotted line is a step."""
    import matplotlib.dates as dates

    from moedge.runtime.report.palette import figure_of

    figure, (axis,) = figure_of(9.4, 3.2 + 0.19 * len(series))
    for number, one in enumerate(series):
        _line(axis, one, f"C{number}")
    if metric == "kl" and min(point["value"] for one in series for point in one["points"]) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axis.yaxis.set_minor_formatter(lambda value, _: "")
    elif metric != "accuracy":
        axis.set_ylim(bottom=0)
    locator = dates.AutoDateLocator()
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    axis.set_ylabel(METRICS[metric])
    figure.legend(frameon=False, fontsize=7.5, loc="outside lower left", ncols=1)
    return figure


def _line(axis: Axes, one: Series, colour: str) -> None:
    """One series with its 95 % intervals, where results have them, and its steps."""
    from matplotlib.dates import date2num

    from moedge.runtime.report.palette import short

    points = one["points"]
    when = date2num([datetime.fromisoformat(point["when"]) for point in points])
    values = [point["value"] for point in points]
    ends = [point["ci95"] or [point["value"]] * 2 for point in points]
    below = [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)]
    label = short(f"{one['engine']}, {one['setting']}", 90)
    axis.errorbar(
        when, values, yerr=[below, above], color=colour, marker="o", markersize=4, linewidth=1.2, elinewidth=0.8,
        label=label,
    )  # fmt: skip
    for step in one["steps"]:
        at = when[step["index"]]
        axis.axvline(at, color=colour, linewidth=1, linestyle=":")
        said = change(one["metric"], step["before"], step["after"])
        place = (at, values[step["index"]])
        axis.annotate(said, place, (4, 8), textcoords="offset points", fontsize=7.5, color=colour)
