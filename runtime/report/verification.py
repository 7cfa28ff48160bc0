"""One verification as an HTML page that needs no other file: ``moedge verify --html FILE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moedge.runtime.parity.results import HeatMap, IdentityEntry, ParityEntry, Verification, WorstToken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOW, _HIGH = -3.0, 3.0
"""Range of the colours, log10 of an error over its limit."""


def page(result: Verification) -> str:
    """Return the page of a result of ``moedge verify``."""
    import matplotlib
    from markupsafe import Markup

    from moedge.runtime.report import environment
    from moedge.runtime.report.palette import STYLE, svg
    from moedge.runtime.report.plots import divergence

    entries: list[ParityEntry | IdentityEntry] = [*result["identity"], *result["parity"]]
    maps: dict[int, str] = {}
    with matplotlib.rc_context(STYLE):
        spread = divergence(result)
        drawn = svg(spread, "kl") if spread is not None else ""
        for number, entry in enumerate(entries):
            if heat := entry.get("location", {}).get("heat"):
                worst = entry.get("worst")
                tokens = entry["tokens"]  # of all windows; an identity check only counts them
                prefill = tokens["prefill"] // tokens["windows"] if isinstance(tokens, dict) else None
                maps[number] = Markup(svg(heat_map(heat, worst, prefill), f"heat{number}"))  # matplotlib escapes text
    template = environment(html=True).get_template("verification.html.j2")
    return template.render(result=result, entries=entries, maps=maps, spread=Markup(drawn))


def heat_map(heat: HeatMap, worst: WorstToken | None, prefill: int | None) -> Figure:
    """Draw errors over their limits: a row a layer, a column a few tokens; what gives no numbers is black."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    from moedge.runtime.report.palette import BAD, INK, MUTED, figure_of

    starts, rows = heat["positions"], heat["rows"]
    values = np.array([[np.nan if ratio is None else ratio for ratio in row] for row in heat["ratios"]])
    width = starts[1] - starts[0] if len(starts) > 1 else 1
    end = starts[-1] + width
    figure, (axis,) = figure_of(7.6, 1.2 + 0.13 * len(rows))
    limit = -_LOW / (_HIGH - _LOW)
    steps = [(0, "#ffffff"), (limit - 1e-3, "#bcd4f6"), (limit, "#f6c3b8"), (1, BAD)]
    colours = LinearSegmentedColormap.from_list("departs", steps).with_extremes(bad=INK)
    # From -0.5: a token is as wide as its column, and its position is the middle.
    image = axis.imshow(
        values, cmap=colours, vmin=_LOW, vmax=_HIGH, aspect="auto", interpolation="nearest",
        extent=(-0.5, end - 0.5, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    every = max(1, len(rows) // 12)
    shown = [number for number in range(len(rows)) if number in (0, len(rows) - 1) or (number - 1) % every == 0]
    axis.set_yticks(shown, [rows[number] for number in shown])
    axis.set_xlabel("position in the window")
    axis.set_ylabel("layer")
    axis.grid(visible=False)
    if prefill is not None and 0 < prefill < end:
        axis.axvline(prefill - 0.5, color=MUTED, linewidth=0.9, linestyle="--")
        axis.text(prefill - 0.5, -0.7, "decode ", ha="left", va="bottom", fontsize=7.5, color=MUTED)
    if worst is not None:
        axis.plot([worst["position"]], [len(rows) - 0.5], marker="^", markersize=5, color=INK, clip_on=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02)
    bar.set_ticks([-2, 0, 2], labels=["1/100", "limit", "100 times"])
    return figure
