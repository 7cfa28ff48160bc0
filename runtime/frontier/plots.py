"""Pareto plots of a frontier as inline SVG: KL against decode time, and against the time to read a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moedge.runtime.bench.stats import bars
from moedge.runtime.report.palette import CONTROL, DENSE, INK, MOE, MUTED, STYLE, figure_of, short, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moedge.runtime.frontier.schema import Estimate, Frontier, Measured

_AXES = {"tpot_ms": "time per decoded token, ms", "ttft_ms": "time to first token, ms"}
_LINEAR = 8
"""A largest KL of so many times the smallest still fits on an axis from 0."""
_KNOBS = ("share", "keep", "active")
"""Parameters that say how much is left out: variants that differ in them alone are points of one line."""


def draw(frontier: Frontier) -> list[str]:
    """Return one SVG for each entry of ``measured``: decode at the left, the prompt at the right."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return [svg(_figure(frontier, one), f"frontier{i}") for i, one in enumerate(frontier["measured"])]


def _figure(frontier: Frontier, measured: Measured) -> Figure:
    figure, axes = figure_of(9.8, 3.9, len(_AXES))
    for axis, (metric, words) in zip(axes, _AXES.items(), strict=True):
        _points(axis, frontier, measured, metric)
        axis.set_xlabel(f"{words} (left is better)")
    axes[0].set_ylabel("KL to the dense parent, nats a token (lower is better)")
    return figure


def _points(axis: Axes, frontier: Frontier, measured: Measured, metric: str) -> None:
    kl: dict[str, Estimate] = {one["label"]: one["kl"] for one in frontier["variants"]}
    rows: dict[str, Any] = {row["label"]: row for row in measured["rows"]}
    for family in _families(frontier):
        line = [
            (rows[one][metric]["value"], kl[one]["value"]) for one in sorted(family, key=lambda one: kl[one]["value"])
        ]
        axis.plot(*zip(*line, strict=True), color=CONTROL, linewidth=1, zorder=1)
    shown = [label for label, row in rows.items() if row["variant"] is not None]
    shown.sort(key=lambda one: kl[one]["value"])
    for number, label in enumerate(shown):
        row = rows[label]
        x, y = row[metric], kl[label]
        colour = DENSE if row["dominated_by"] else MOE
        axis.errorbar(
            *(x["value"], y["value"], _bars(y), _bars(x)),
            fmt="o",
            markersize=5,
            color=colour,
            elinewidth=0.8,
            zorder=2,
        )
        # Neighbours in KL have their names at different sides: points of one speed lie above each other.
        offset, side = ((5, 5), "left") if number % 2 == 0 else ((-5, 5), "right")
        axis.annotate(
            short(label),
            (x["value"], y["value"]),
            offset,
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
            ha=side,
        )
    _kl_scale(axis, [kl[label]["value"] for label in shown])
    top = axis.get_ylim()[1]
    for label, row in rows.items():
        if row["variant"] is None:
            axis.axvline(row[metric]["value"], color=MUTED, linewidth=0.9, linestyle=":")
            axis.text(
                row[metric]["value"], top, f"{label} ", color=MUTED, fontsize=7.5, rotation=90, va="top", ha="right"
            )


def _kl_scale(axis: Axes, values: list[float]) -> None:
    """Start at 0, or where the largest loss would press all others together, show ratios."""
    if min(values) > 0 and max(values) > _LINEAR * min(values):
        axis.set_yscale("log")
        axis.set_ylim(bottom=min(values) / 2)
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)


def _bars(found: Estimate) -> list[list[float]]:
    below, above = bars(found["value"], found["ci95"])
    return [[below], [above]]


def _families(frontier: Frontier) -> list[list[str]]:
    """Labels of variants that differ in how much they leave out alone, where there are several."""
    groups: dict[str, list[str]] = {}
    for one in frontier["variants"]:
        rest = {name: value for name, value in one["convert"].items() if name not in _KNOBS}
        groups.setdefault(repr(sorted(rest.items())), []).append(one["label"])
    return [labels for labels in groups.values() if len(labels) > 1]
