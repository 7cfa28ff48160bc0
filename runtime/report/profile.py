"""Profiles of :mod:`moedge.runtime.bench.profiling` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = (
    "Shortest time of each step over its repeats, mean over the steps, one engine after the other. The recorder's own "
    "cost a node is subtracted; 'outside' is what the unprofiled run takes beyond the nodes. Rows below 0.5 % "
    "everywhere are left out."
)
"""What a reader of the tables must know."""


def table(
    found: Mapping[str, Any], phase: str, key: str
) -> tuple[list[str], list[tuple[str, list[dict[str, Any] | None]]]]:
    """Labels, and rows of (name, one cell a label), the largest first; ``key`` is ``groups`` or ``operators``."""
    shown = {label: entry[phase] for label, entry in found.items() if entry[phase][key]}
    by_name = [{row["name"]: row for row in entry[key]} for entry in shown.values()]
    most: dict[str, float] = {}
    for entry in by_name:
        for name, row in entry.items():
            if abs(row["share"]) >= 0.005:
                most[name] = max(most.get(name, 0.0), -1.0 if name == "outside" else row["ms"])
    rows = [(name, [entry.get(name) for entry in by_name]) for name in sorted(most, key=lambda name: -most[name])]
    whole: list[dict[str, Any] | None] = [{"ms": entry["ms"], "share": 1.0} for entry in shown.values()]
    return list(shown), [*rows, ("all", whole)] if shown else []
