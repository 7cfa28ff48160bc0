"""A frontier on the terminal: one table for each target, and the verdict in a sentence."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from moedge.runtime.frontier.schema import Estimate, Frontier, Measured
from moedge.runtime.tables import Sheet


def show(frontier: Frontier, console: Console) -> None:
    """Print the tables and verdicts; they fit 80 columns."""
    for one in frontier["measured"]:
        console.print(_sheet(frontier, one))
        console.print()
    for one in frontier["measured"]:
        console.print(escape(one["verdict"]["sentence"]), highlight=False)


def _sheet(frontier: Frontier, measured: Measured) -> Sheet:
    variants = {one["label"]: one for one in frontier["variants"]}
    sheet = Sheet(
        title=f"{escape(measured['target'])}, batch {measured['batch']}: speed in units of the dense parent's"
    )
    sheet.add_column("")
    for name in ("weights read", "KL", "ppl ratio", "decode", "prompt", "ms a token", "MiB", "beaten"):
        sheet.add_column(name, justify="right")
    for row in measured["rows"]:
        one = variants.get(row["variant"] or "")
        quality = (
            ["", "", ""]
            if one is None
            else [f"{one['ffn_read_share']:.0%}", _short(one["kl"], 3), f"{one['ppl_ratio']['value']:.3f}"]
        )
        sheet.add_row(
            escape(row["label"]),
            *quality,
            _short(row["decode_speedup"], 2),
            _short(row["prompt_speedup"], 2),
            f"{row['tpot_ms']['value']:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
            "yes" if row["dominated_by"] else "",
            style="bold" if row["variant"] and not row["dominated_by"] else "",
        )
    return sheet


def _short(found: Estimate, digits: int) -> str:
    low, high = found["ci95"]
    half = 0.0 if low is None or high is None else (high - low) / 2
    return f"{found['value']:.{digits}f}" + (f" ±{half:.{digits}f}" if half else "")
