"""Plot a benchmark: both times of every engine, over the list that has the most values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moedge import MoEdgeError
from moedge.runtime.bench.results import METRICS, Bench, PointResult
from moedge.runtime.bench.stats import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png", ".pdf")
_AXES = {
    "batch": "batch",
    "depth": "tokens in the cache",
    "prompt": "tokens of the prompt",
    "threads": "threads",
    "decode": "tokens decoded",
}
_TITLES = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per decoded token, ms"}


def check_ending(path: Path) -> None:
    """Refuse what cannot be drawn, before an hour of timing.

    Raises:
        MoEdgeError: the file's ending is not one of :data:`ENDINGS`.
    """
    if path.suffix.lower() not in ENDINGS:
        raise MoEdgeError(f"--plot {path} ends in {path.suffix or 'nothing'}; give a name with {', '.join(ENDINGS)}.")


def draw(result: Bench) -> Figure:
    """Return the figure; points with error bars (95 %), the median's."""
    from moedge.runtime.report.palette import figure_of, short

    axis_name = _longest(result["points"])
    rest = [name for name in _AXES if name != axis_name and len(_values(result["points"], name)) > 1]
    figure, axes = figure_of(9.4, 3.4, 2)
    for axis, metric in zip(axes, METRICS, strict=True):
        lines: dict[str, list[tuple[str, float, float, float]]] = {}
        for point in result["points"]:
            for row in point["rows"]:
                more = ", ".join(f"{name} {point[name]}" for name in rest)  # type: ignore[literal-required]
                times = row[metric]
                ends = bars(times["p50"], times["ci95"])
                name = short(row["label"]) + (f" ({more})" if more else "")
                lines.setdefault(name, []).append((str(point[axis_name]), times["p50"], *ends))  # type: ignore[literal-required]
        for name, values in lines.items():
            where, middle, below, above = zip(*values, strict=True)
            axis.errorbar(where, middle, yerr=[below, above], marker="o", markersize=4, capsize=3, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(_AXES[axis_name])
        axis.set_ylabel(f"{_TITLES[metric]} (lower is better)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def save(result: Bench, path: Path) -> None:
    """Draw into a file of one of :data:`ENDINGS`."""
    import io

    import matplotlib as mpl

    from moedge._files import write_bytes
    from moedge.runtime.report.palette import STYLE

    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        draw(result).savefig(stream, format=path.suffix.lower()[1:], dpi=150)
    write_bytes(path, stream.getvalue())


def _values(points: list[PointResult], name: str) -> list[int | None]:
    return list(dict.fromkeys(point[name] for point in points))  # type: ignore[literal-required]


def _longest(points: list[PointResult]) -> str:
    return max(_AXES, key=lambda name: len(_values(points, name)))
