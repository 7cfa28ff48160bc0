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
_APART = 0.03
"""Share of a plot's width that two numbers of steps in one row are apart, at least."""
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
            listed = [step_lines(found[start : start + _LINES]) for start in range(0, len(found), _LINES)]
            plots = list(zip(drawn, listed, strict=True))
            parts.append({"title": METRICS[metric], "machine": machine, "plots": plots, "rows": list(map(row, found))})
    template = environment(html=True).get_template("history.html.j2")
    return template.render(history=history, parts=parts, columns=COLUMNS)


def step_lines(series: list[Series]) -> list[str]:
    """What stepped when, a line for each number of the plot."""
    return [
        f"{when[:10]}: " + "; ".join(f"{one['engine']} {change(one['metric'], *levels)}" for one, levels in stepped)
        for when, stepped in _steps(series).items()
    ]


def _steps(series: list[Series]) -> dict[str, list[tuple[Series, tuple[float, float]]]]:
    """By time, which series step to another level, and both levels. Lines that step together have one number."""
    found: dict[str, list[tuple[Series, tuple[float, float]]]] = {}
    for one in series:
        for step in one["steps"]:
            found.setdefault(step["when"], []).append((one, (step["before"], step["after"])))
    return dict(sorted(found.items()))


def _number_steps(axis: Axes, times: list[str]) -> None:
    """Write the numbers of steps above the axes, in rows where they are near to each other."""
    from matplotlib.dates import date2num

    low, high = axis.get_xlim()
    last: list[float] = []  # in each row, where its last number stands
    for number, at in enumerate(date2num([datetime.fromisoformat(when) for when in times]), 1):
        place = (at - low) / (high - low)
        row = next((row for row, before in enumerate(last) if place - before > _APART), len(last))
        last[row : row + 1] = [place]
        text = f"{number}"
        axis.annotate(
            text, (at, 1), (0, 3 + 9 * row), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=7.5, ha="center",
        )  # fmt: skip


def draw(metric: Metric, series: list[Series]) -> Figure:
    """Draw series of one figure on one machine over time; a dotted line is a step of :func:`step_lines`."""
    import matplotlib.dates as dates

    from moedge.runtime.report.palette import figure_of

    figure, (axis,) = figure_of(9.4, 3.2 + 0.19 * len(series))
    for number, one in enumerate(series):
        _line(axis, one, f"C{number}")
    _number_steps(axis, list(_steps(series)))
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
        axis.axvline(when[step["index"]], color=colour, linewidth=1, linestyle=":")
