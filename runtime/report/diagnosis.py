"""The plot of ``moedge.diagnostics/1``: errors, agreement and load of every layer on one text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from moedge.runtime.report import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = {"router": palette.MOE, "oracle": palette.BOUND, "random": palette.CONTROL, "static": palette.INK}


def draw(name: str, text: dict[str, Any], form: str) -> bytes:
    """Return the plot of one entry of ``texts`` as a file of this form, ``svg`` or ``png``."""
    import matplotlib

    with matplotlib.rc_context(palette.STYLE):
        figure = _draw(name, text)
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def draw_inline(name: str, text: dict[str, Any]) -> str:
    """Return the same plot as SVG text that can stand in the report."""
    import matplotlib

    with matplotlib.rc_context(palette.STYLE):
        return palette.svg(_draw(name, text), "diagnosis")


def _draw(name: str, text: dict[str, Any]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = palette.figure_of(12.5, 2.9, 3)
    layers = text["layers"]
    numbers = [layer["layer"] for layer in layers]
    for who, colour in _LINES.items():
        values = [_or_nan(layer["relative_error"][who]) for layer in layers]
        axes[0].plot(numbers, values, color=colour, marker="o", markersize=2.5, label=who)
    axes[0].set_ylabel("|F - y| / |F|")
    axes[0].set_title(f"relative error of the FFN on {palette.short(name)}", fontsize=9, loc="left")
    shares = {"captured": palette.MOE, "agreement": palette.BOUND, "dead_neurons": palette.BAD}
    for key, colour in shares.items():
        values = [100 * _or_nan(layer[key]) for layer in layers]
        axes[1].plot(numbers, values, color=colour, marker="o", markersize=2.5, label=key.replace("_", " "))
    axes[1].set_ylim(0, 103)
    axes[1].set_title("%, of the best choice; of neurons", fontsize=9, loc="left")
    _load(axes[2], layers)
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8)
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _load(axis: Axes, layers: list[dict[str, Any]]) -> None:
    """One column a layer, one row an expert, busiest on top; the colour is the share of tokens that select it."""
    import numpy as np

    rows = max((len(layer["load"]) for layer in layers), default=0)
    shares = np.full((max(rows, 1), len(layers)), np.nan)
    for column, layer in enumerate(layers):
        shares[: len(layer["load"]), column] = sorted(layer["load"], reverse=True)
    axis.grid(visible=False)
    image = axis.imshow(100 * shares, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, label="% of tokens")
    axis.set_xlabel("layer")
    axis.set_ylabel("experts by load")
    axis.set_title("load", fontsize=9, loc="left")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
