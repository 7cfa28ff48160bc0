"""The table that says what a quantised export stored, class by class."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from moedge.runtime.tables import Sheet


def size_rows(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a tensor class, and the sum, from a manifest's ``quantization`` section."""
    rows = [
        {
            "class": entry["tensor_class"],
            "parameters": entry["parameters"],
            "float MiB": entry["float_bytes"] / 2**20,
            "MiB": entry["bytes"] / 2**20,
            "bits a weight": entry["bits_per_weight"],
        }
        for entry in quantization["classes"]
    ]
    total: dict[str, Any] = {"class": "total"}
    for name in ("parameters", "float MiB", "MiB"):
        total[name] = sum(row[name] for row in rows)
    total["bits a weight"] = 8 * 2**20 * total["MiB"] / total["parameters"] if total["parameters"] else 0.0
    return [*rows, total]


def size_table(quantization: dict[str, Any]) -> Sheet:
    """The rows as a table for people."""
    title = f"int{quantization['bits']}, blocks of {quantization['block']}, {quantization['method']}"
    table = Sheet(title=escape(title))
    for column in ("class", "parameters", "float MiB", "MiB", "bits a weight"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in size_rows(quantization):
        numbers = (f"{row['parameters']:,}", f"{row['float MiB']:.2f}", f"{row['MiB']:.2f}")
        table.add_row(escape(row["class"]), *numbers, f"{row['bits a weight']:.2f}")
    return table
