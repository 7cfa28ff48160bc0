"""The report's plots as inline SVG text, drawn with matplotlib's Agg backend; no display, no files, no scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moedge.export import targets
from moedge.runtime.bench.stats import bars
from moedge.runtime.report import affinity, diagnosis
from moedge.runtime.report.palette import BAD, BOUND, CONTROL, DENSE, INK, MOE, MUTED, STYLE, figure_of, short, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_all(report: dict[str, Any]) -> dict[str, str]:
    """Return ``{name: SVG}`` for every plot that the report's data allows."""
    plots: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "quality": _quality,
        "kl": lambda report: divergence(report["verification"]),
        "speed": _speed,
        "dead": _dead,
        "routing": _routing,
        "affinity": affinity.figure,
    }
    import matplotlib

    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(report)
            if figure is not None:
                drawn[name] = svg(figure, name)
    if "diagnostics" in report:
        name, text = next(iter(report["diagnostics"]["texts"].items()))
        drawn["diagnosis"] = diagnosis.draw_inline(name, text)
    return drawn


def _quality(report: dict[str, Any]) -> Figure:
    quality = report["quality"]
    rows, names = quality["rows"], quality["protocol"]["texts"]
    dense = rows[0]["ppl"]
    figure, axes = figure_of(4.2 * len(names) + 1, 0.34 * len(rows) + 0.9, len(names))
    for column, (axis, name) in enumerate(zip(axes, names, strict=True)):
        values = [row["ppl"][name] / dense[name] for row in rows]
        spread = [(row.get("ppl_std") or {}).get(name, 0.0) / dense[name] for row in rows]
        colours = [_quality_colour(row) for row in rows]
        axis.barh(range(len(rows)), values, xerr=spread, color=colours, height=0.68, ecolor=MUTED)
        axis.set_yticks(range(len(rows)), [short(row["label"]) for row in rows] if column == 0 else [""] * len(rows))
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        limit = min(max(values), 3 * sorted(values)[len(values) // 2])  # a broken control must not flatten the rest
        axis.set_xlim(0, limit * 1.28)
        for position, (value, row) in enumerate(zip(values, rows, strict=True)):
            at = min(value, limit * 1.02)
            axis.text(at + limit * 0.02, position, f"{row['ppl'][name]:.4g}", va="center", fontsize=8, color=INK)
        axis.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
        axis.set_xlabel(f"perplexity on {short(name)}, relative to dense (lower is better)")
    return figure


def _quality_colour(row: dict[str, Any]) -> str:
    if row["kind"] == "dense":
        return DENSE
    if row["kind"] == "method":
        return MOE
    from moedge.convert.methods.baselines import CEILINGS  # names only, no torch

    return BOUND if row["label"] in CEILINGS else CONTROL


def _for_ort(entry: dict[str, Any]) -> bool:
    """Whether a comparison is of a bundle made for ONNX Runtime."""
    row = targets.known(str(entry["test"]["model"].get("target", "")))
    return row is not None and row.family == "ort"


def divergence(verification: Mapping[str, Any]) -> Figure | None:
    """Draw how far the tokens of each comparison are off; None where nothing was compared."""
    entries = verification["parity"]
    keys = ("p50", "p90", "p99", "p99.9", "max")
    figure, (axis,) = figure_of(7.6, 2.9)
    drawn = 0
    floor = 1e-17  # a KL of exactly 0 has no place on a log axis
    for number, entry in enumerate(entries):
        values = [entry["overall"]["kl_ref_test"][key] for key in keys]
        if any(value is None for value in values):
            continue
        colour = MOE if _for_ort(entry) else BOUND
        style = "-" if entry["test"]["model"].get("moe") else ":"
        shown = [max(value, floor) for value in values]
        axis.plot(
            range(len(keys)), shown, style, marker="o", markersize=3.5, color=colour, label=short(entry["name"], 60)
        )
        drawn += 1
        if number == 0 and entry.get("tolerances"):
            axis.axhline(entry["tolerances"]["max_kl"], color=BAD, linewidth=0.8, linestyle="--")
            axis.text(
                0, entry["tolerances"]["max_kl"], " limit of the worst token", color=BAD, fontsize=7.5, va="bottom"
            )
    if not drawn:
        return None
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")  # no TeX: labels are never parsed as mathematics
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_xticks(range(len(keys)), ["median", "90 %", "99 %", "99.9 %", "worst token"])
    axis.set_ylabel("KL to PyTorch, nats")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))
    return figure


def _speed(report: dict[str, Any]) -> Figure:
    rows, engines = report["speed"]["points"][0]["rows"], report["speed"]["engines"]
    figure, axes = figure_of(9.4, 0.36 * len(rows) + 0.9, 2)
    titles = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per decoded token, ms"}
    for column, (axis, (metric, title)) in enumerate(zip(axes, titles.items(), strict=True)):
        values = [row[metric]["p50"] for row in rows]
        low, high = zip(*(bars(row[metric]["p50"], row[metric]["ci95"]) for row in rows), strict=True)
        colours = [MOE if engines[row["label"]]["info"]["model"].get("moe") else DENSE for row in rows]
        axis.barh(range(len(rows)), values, xerr=[low, high], color=colours, height=0.66, ecolor=INK, capsize=2)
        axis.set_yticks(range(len(rows)), [short(row["label"]) for row in rows] if column == 0 else [""] * len(rows))
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, max(values) * 1.22)
        for position, (value, extra) in enumerate(zip(values, high, strict=True)):
            axis.text(value + extra + max(values) * 0.02, position, f"{value:.1f}", va="center", fontsize=8)
        axis.set_xlabel(f"{title} (lower is better)")
    return figure


def _dead(report: dict[str, Any]) -> Figure | None:
    from matplotlib.ticker import MaxNLocator

    layers = report["conversion"]["layers"]
    series = {"all neurons": "dead_share", "routed neurons": "dead_share_of_routed"}
    if not layers or any(layer["report"].get(key) is None for key in series.values() for layer in layers):
        return None
    figure, (axis,) = figure_of(7.6, 2.4)
    numbers = [layer["layer"] for layer in layers]
    for (label, key), colour in zip(series.items(), (DENSE, MOE), strict=True):
        shares = [100 * layer["report"][key] for layer in layers]
        axis.plot(numbers, shares, color=colour, marker="o", markersize=3, label=label)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("never marked, %")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _routing(report: dict[str, Any]) -> Figure | None:
    from matplotlib.ticker import MaxNLocator

    routed = [entry for entry in report["verification"]["parity"] if entry["routing"].get("compared")]
    if not routed:
        return None
    figure, (axis,) = figure_of(7.6, 2.2)
    width = 0.8 / len(routed)
    for number, entry in enumerate(routed):
        layers = {int(layer): value["flips"] for layer, value in entry["routing"]["layers"].items()}
        positions = [layer + (number - (len(routed) - 1) / 2) * width for layer in sorted(layers)]
        colour = MOE if _for_ort(entry) else BOUND
        axis.bar(
            positions, [layers[layer] for layer in sorted(layers)], width, color=colour, label=short(entry["name"], 60)
        )
    axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("tokens, other experts")
    axis.legend(frameon=False, fontsize=8)
    return figure
