"""The curve of a fine-tuning run: held-out perplexity over tokens, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedge.runtime.report.palette import CONTROL, MOE, MUTED, STYLE


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the curve of ``finetune.json`` (``moedge.finetune/1``) into a PNG file."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = record["curve"]
    names = list(curve[0]["ppl"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * max(len(names), 1), 2.8), layout="constrained")
        FigureCanvasAgg(figure)
        for number, name in enumerate(names, 1):
            axes = figure.add_subplot(1, len(names), number)
            tokens, ppl = [e["tokens"] / 1e3 for e in curve], [e["ppl"][name] for e in curve]
            axes.axhline(ppl[0], color=CONTROL, linewidth=1, linestyle="--")
            axes.plot(tokens, ppl, color=MOE, marker="o", markersize=3, linewidth=1.5)
            axes.annotate(f"{ppl[0]:.1f}", (tokens[0], ppl[0]), xytext=(2, 3), textcoords="offset points", color=MUTED)
            axes.annotate(
                f"{ppl[-1]:.1f}", (tokens[-1], ppl[-1]), xytext=(0, 6), textcoords="offset points", ha="right"
            )
            axes.set_title(f"held-out {name}")
            axes.set_xlabel("thousand tokens trained on")
            axes.set_ylabel("perplexity")
        figure.savefig(path, dpi=150, metadata={"Software": None})
