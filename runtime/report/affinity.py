"""How alike the domains of a DIVE conversion are: the perplexity matrix beside the dendrogram, and a page of its own.

The data is ``moedge.affinity/1`` of :mod:`moedge.convert.domains`; SciPy is not needed to draw it.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROUPS = ("#1f6feb", "#c9372c", "#1a7f4b", "#8250df", "#bf8700", "#0e7c86", "#d6409f", "#66727f")


def figure(report: dict[str, Any]) -> Figure | None:
    """Draw the affinity of a report, or return None when its method mines none."""
    found = report["conversion"].get("affinity")
    return draw(found) if found else None


def draw(affinity: dict[str, Any]) -> Figure:
    """Draw dendrogram (distance 1 - r) and matrix; rows and columns in the order of the dendrogram's leaves.

    A cell holds the perplexity on the column's domain of the model pruned for the row's domain; its colour is that
    value relative to the best one of the column. Names have the colour of their group.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from moedge.runtime.report.palette import INK, MOE, MUTED

    names, tree = affinity["names"], affinity["dendrogram"]
    order, count = tree["order"], len(names)
    figure = Figure(figsize=(3.4 + 0.62 * count, 1.5 + 0.36 * count), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.6, 0.62 * count])
    for across, height in zip(tree["across"], tree["height"], strict=True):
        left.plot(height, across, color=MUTED, linewidth=1.2)
    left.invert_xaxis()
    left.set_xlabel("1 - correlation")
    left.grid(visible=False)
    left.spines["left"].set_visible(False)
    # SciPy puts leaf i at 5 + 10 i.
    middles = [5 + 10 * position for position in range(count)]
    edges = [10 * position for position in range(count + 1)]
    shade = LinearSegmentedColormap.from_list("affinity", ["#ffffff", MOE])
    values = [[affinity["normalised"][i][j] for j in order] for i in order]
    right.pcolormesh(edges, edges, values, cmap=shade, vmin=min(map(min, values)), vmax=1.4, edgecolors="white")
    for row, i in zip(middles, order, strict=True):
        for column, j in zip(middles, order, strict=True):
            text = f"{affinity['perplexity'][i][j]:.3g}"
            weight = "bold" if affinity["normalised"][i][j] == 1 else "normal"
            right.text(column, row, text, ha="center", va="center", fontsize=8, color=INK, fontweight=weight)
    group = {name: number for number, part in enumerate(affinity["groups"]) for name in part}
    labels = [names[i] for i in order]
    right.set_xticks(middles, labels, rotation=40, ha="right")
    left.set_yticks(middles, [""] * count)
    left.tick_params(axis="y", length=0)
    right.set_yticks(middles, labels)
    right.tick_params(axis="y", labelleft=True, length=0)
    for label in (*right.get_xticklabels(), *right.get_yticklabels()):
        label.set_color(_GROUPS[group[label.get_text()] % len(_GROUPS)])
    right.invert_yaxis()
    right.grid(visible=False)
    for spine in right.spines.values():
        spine.set_visible(False)
    right.set_xlabel("perplexity on (bold: best of a column)")
    right.set_title("pruned for", loc="left", fontsize=9, color=MUTED)
    return figure


def page(affinity: dict[str, Any], title: str) -> str:
    """Return a self-contained HTML page: plot, groups and the numbers."""
    import matplotlib

    from moedge.runtime.report.palette import STYLE, svg

    with matplotlib.rc_context(STYLE):
        drawn = svg(draw(affinity), "affinity")
    groups = "".join(f"<li>{escape(', '.join(group))}</li>" for group in affinity["groups"])
    tables = "".join(
        _table(affinity["names"], affinity[key], words)
        for key, words in (
            ("perplexity", "Perplexity: rows pruned for, columns measured on"),
            ("correlation", "Correlation of the rows of the column-normalised matrix"),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>body{{font:15px/1.5 system-ui,sans-serif;color:#1d2733;max-width:1000px;"
        "margin:0 auto;padding:24px}td,th{text-align:right;padding:3px 10px;font-size:13.5px}"
        "caption{text-align:left;color:#66727f}svg{width:100%;height:auto}</style></head><body>"
        f"<h1>{escape(title)}</h1>{drawn}<h2>Groups</h2><ol>{groups}</ol>{tables}</body></html>\n"
    )


def _table(names: list[str], values: list[list[float]], caption: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value:.4g}</td>' for value in row)}</tr>"
        for name, row in zip(names, values, strict=True)
    )
    return f"<table><caption>{escape(caption)}</caption><tr><th></th>{head}</tr>{rows}</table>"
