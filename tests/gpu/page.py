"""The Markdown of a result, for docs/gpu.md; standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

START, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def tests_of(junit: Path) -> dict[str, Any]:
    """Return ``{"tests": {passed, failed, skipped, failures, reasons}}`` from pytest's file; nothing without one."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c.find("skipped") for c in cases if c.find("skipped") is not None]
    reasons: dict[str, int] = {}
    for element in skipped:
        text = (element.get("message") or "").strip() if element is not None else ""
        reasons[text] = reasons.get(text, 0) + 1
    return {
        "tests": {
            "passed": len(cases) - len(failed) - len(skipped),
            "failed": len(failed),
            "skipped": len(skipped),
            "failures": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
            "reasons": reasons,
        }
    }


def render(result: dict[str, Any]) -> str:
    """Return all tables of a result; what a part did not find has no table."""
    rows = result["rows"]
    blocks = [*_head(result, _of(rows, "facts"), _of(rows, "ceilings")), *_tests(result.get("tests"))]
    if result["rehearsal"]:  # times of the CPU in tables of a GPU's would be taken for such
        kinds = {kind: len(_of(rows, kind)) for kind in ("error", "layer", "kernel")}
        blocks += _errors("tiny", _of(rows, "error"))
        blocks.append(f"{kinds['layer']} rows of layers and {kinds['kernel']} of kernels were made.")
        return "\n\n".join(blocks) + "\n"
    for shape in dict.fromkeys(row["shape"] for row in rows if "shape" in row):
        mine = [row for row in rows if row.get("shape") == shape]
        blocks += _errors(shape, _of(mine, "error"))
        for scope, title in (("layer", "whole layers"), ("ffn", "FFNs alone")):
            blocks += _layers(shape, title, [row for row in _of(mine, "layer") if row["scope"] == scope])
        blocks += _kernels(shape, _of(mine, "kernel"))
    return "\n\n".join(blocks) + "\n"


def _of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def _table(head: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    cells = [tuple(head)]
    rows = [cells[0], tuple("---" for _ in cells[0]), *(tuple(map(str, line)) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _head(result: dict[str, Any], facts: list[dict[str, Any]], ceilings: list[dict[str, Any]]) -> list[str]:
    blocks = []
    if result["rehearsal"]:
        blocks.append(
            "**A rehearsal without a GPU**: tiny shapes, the CPU, kernels in Triton's interpreter. It shows that the "
            "program runs and that values are right; its times are no measurements and are not shown."
        )
    if facts:
        told = facts[0]
        packages = ", ".join(f"{name} {version}" for name, version in told["packages"].items() if version)
        more = [f"driver {told['driver_version']}"] if "driver_version" in told else []
        more += (
            [f"{told['memory_gib']} GiB", f"compute capability {told['capability']}"] if "capability" in told else []
        )
        blocks.append(", ".join([f"{told['device']}", *more]) + f". Python {told['python']}, {packages}.")
    if ceilings and not result["rehearsal"]:
        limit = ceilings[0]
        blocks.append(
            f"Measured limits: {limit['bytes_per_s'] / 1e12:.2f} TB/s (a copy, bytes read and written), "
            f"{limit['flop_per_s'] / 1e12:.0f} TFLOP/s (a product of 8,192 x 8,192 in bfloat16)."
        )
    parts = ((p["part"], "passed" if p["passed"] else p["reason"], f"{p['seconds']:.0f}") for p in result["parts"])
    blocks += [f"Started {result['started']}.", _table(("part", "outcome", "seconds"), parts)]
    return blocks


def _tests(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    text = f"Tests: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped."
    lines = [f"- failed: `{name}`" for name in found["failures"]]
    lines += [f"- skipped ({number}): {reason}" for reason, number in found["reasons"].items()]
    return [text, *(["\n".join(lines)] if lines else [])]


def _errors(shape: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    worst = max(rows, key=lambda row: row["error"] / row["limit"])
    failed = sum(not row["passed"] for row in rows)
    return [
        f"Values at the {shape} shape, beside float32: {len(rows)} checked, {failed} failed; nearest to its limit "
        f"{worst['variant']} with {worst['tokens']} tokens, {worst['error']:.1e} of {worst['limit']:.1e}."
    ]


def _layers(shape: str, title: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = {row["tokens"]: row for row in rows if row["variant"] == variant}
        table.append([variant, *(_cell(mine.get(count)) for count in tokens)])
    loose = sorted({row["variant"] for row in rows if not row["captured"]})
    note = f" Not in a CUDA graph: {', '.join(loose)}." if loose else ""
    return [
        f"**{shape}, {title}**: microseconds of one, and the dense time over it with its 95 % interval; in brackets "
        f"what that would be if an FFN's time were the bytes of its weights.{note}",
        _table(("", *(f"T = {count}" for count in tokens)), table),
    ]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["variant"] == "dense":
        return f"{row['us']:,.1f}"
    ideal = f" ({1 / row['reads']:.2f})" if row["scope"] == "ffn" else ""
    return f"{row['us']:,.1f}; {row['ratio']:.2f}{ideal}, {row['low']:.2f} to {row['high']:.2f}"


def _kernels(shape: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    table = []
    for row in rows:
        times = (f"{row['us']:,.1f}", f"{row['limit_us']:,.1f}", row["bound"], f"{row['reached']:.0%}")
        table.append((row["kernel"], row["path"], row["tokens"], *times))
    head = ("kernel", "path", "T", "µs", "limit, µs", "by", "reached")
    text = f"**{shape}, single kernels**, bfloat16, 2 of 8 experts; the weights of each call are in no cache."
    return [text, _table(head, table)]


def write(target: Path, source: Path) -> None:
    """Put the tables of a result between the marks of a page."""
    text = target.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    shown = render(json.loads(source.read_text(encoding="utf-8")))
    target.write_text(f"{before}{START}\n\n{shown}\n{END}{after}", encoding="utf-8")
