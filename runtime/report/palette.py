"""Colours and style of every plot, and how a figure becomes SVG text; no display, no files, no scripts."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2733", "#66727f", "#e3e8ee"
DENSE, MOE, CONTROL, BOUND, BAD = "#8795a5", "#1f6feb", "#c6cdd6", "#b9a3e3", "#c9372c"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moedge",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "text.parse_math": False,
}


def figure_of(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` by ``height`` inches with ``columns`` axes beside each other, in the report's style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def svg(figure: Figure, name: str) -> str:
    """SVG text that can stand in HTML: no prolog, no metadata, ids that no other plot of the page uses."""
    stream = io.StringIO()
    # Every metadata entry set to None drops the RDF block, the only place with links.
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=empty)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    width = round(figure.get_figwidth() * 96)  # CSS pixels: no plot is drawn larger than it was made
    svg = rf'<svg role="img" viewBox="\1" style="max-width:{width}px">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', svg, text, count=1)
    return text.replace("xlink:href", "href")


def short(text: str, limit: int = 34) -> str:
    """The text, cut to ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"
