"""Guard, energy and headroom of a benchmark on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from moedge.runtime.bench.results import Bench
from moedge.runtime.bench.watched import Headroom
from moedge.runtime.gate.judge import words
from moedge.runtime.report.watched import sentences
from moedge.runtime.tables import Sheet


def show(result: Bench, console: Console) -> None:
    """Print how near the engines came, what they took, and whether to trust the times, point by point."""
    several = len(result["points"]) > 1
    for point in result["points"]:
        if several:
            console.print(escape(f"{words(point)}:"), highlight=False, style="italic")
        if found := point.get("headroom"):
            for sheet in sheets(found):
                console.print(sheet)
        for said in sentences(point):
            style = "yellow" if said.concern else None
            console.print(escape(said.text), highlight=False, soft_wrap=True, style=style)


def sheets(found: Headroom) -> Iterator[Sheet]:
    """One small table of what was needed and reached, and, with profiles, one of where the rest went."""
    if any("decode" in row for row in found["rows"]):
        sheet = Sheet(title=f"headroom: what a step needs of this machine at least, {found['threads']} threads")
        headers = ("engine", "token MB", "GB/s", "of", "least ms", "reached", "prompt GMul", "least ms", "reached")
        for header in headers:
            sheet.add_column(header, justify="left" if header == "engine" else "right")
        for row in found["rows"]:
            if "decode" not in row:
                continue
            token, prompt = row["decode"], row["prompt"]
            sheet.add_row(
                escape(row["label"]),
                f"{token['bytes'] / 1e6:.0f}",
                f"{token['gb_s']:.1f}",
                f"{row['bandwidth_gb_s']:.1f}",
                f"{token['least_ms']:.2f}",
                f"{token['reached']:.0%}",
                f"{prompt['multiplications'] / 1e9:.1f}",
                f"{prompt['least_ms']:.1f}",
                f"{prompt['reached']:.0%}",
            )
        yield sheet
    if lost := found.get("lost"):
        sheet = Sheet(title="where a token's time went: ms, of which its weights and the cache need at least")
        labels = list(dict.fromkeys(part["label"] for part in lost))
        sheet.add_column("part")
        for label in labels:
            sheet.add_column(escape(label), justify="right")
        by_part: dict[str, dict[str, str]] = {}
        for part in lost:
            if part["ms"] >= 0.005 or part["least_ms"] >= 0.005:
                by_part.setdefault(part["part"], {})[part["label"]] = f"{part['ms']:.2f}  {part['least_ms']:.2f}"
        for name, cells in by_part.items():
            sheet.add_row(escape(name), *(cells.get(label, "") for label in labels))
        yield sheet
