"""A benchmark for people and for spreadsheets: tables on a terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from moedge.runtime.bench.peers import sentence
from moedge.runtime.bench.results import Bench, EngineEntry, Gate, PointResult, Row
from moedge.runtime.bench.stats import between
from moedge.runtime.gate.judge import words
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.report.text import kinds
from moedge.runtime.report.watched import unknown_tails
from moedge.runtime.tables import Sheet

Column = tuple[str, str]
"""Header and cell of one row."""


def columns(row: Row, engine: EngineEntry, *, gpu: bool, footprint: bool) -> list[Column]:
    """The figures of one engine at one point, in the order of every table."""
    first, step = row["ttft_ms"], row["tpot_ms"]
    found = [
        ("first token ms", f"{first['p50']:.1f}"),
        ("per token ms", f"{step['p50']:.2f}"),
        ("95% CI", between(step["ci95"], to="-")),
        ("p90", f"{step['p90']:.2f}"),
        ("p99", f"{step['p99']:.2f}"),
        ("tokens/s", f"{row['decode_tokens_per_s']:.1f}"),
    ]
    if footprint:
        found.append(("peak MiB", _number(engine["peak_rss_mib"], ".0f")))
        found += [("GPU MiB", _number(engine.get("peak_gpu_mib"), ".0f"))] * gpu
        found.append(("load s", _number(engine["load_s"], ".1f")))
    return found


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def title(point: PointResult) -> str:
    """The point, and how long it was measured."""
    unsettled = "" if point["settled"] else ", still getting faster"
    return f"{words(point)}, {point['rounds']} rounds after {point['warmup_rounds']} of warm-up{unsettled}"


def tables(result: Bench) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, headers and rows of every table; memory and load time stand in the first."""
    gpu = any(engine["info"]["device"] != "CPU" for engine in result["engines"].values())
    for number, point in enumerate(result["points"]):
        rows = [
            (row["label"], columns(row, result["engines"][row["label"]], gpu=gpu, footprint=number == 0))
            for row in point["rows"]
        ]
        headers = ["engine", *(header for header, _ in rows[0][1])]
        yield title(point), headers, [[label, *(cell for _, cell in cells)] for label, cells in rows]
    if batches := result.get("batches"):
        headers = ["engine", *(f"batch {point['batch']}" for point in batches)]
        rates = [{row["label"]: row["decode_tokens_per_s"] for row in point["rows"]} for point in batches]
        body = [[label, *(f"{rate[label]:.1f}" for rate in rates)] for label in rates[0]]
        one = batches[0]
        yield f"tokens/s of all rows together, after {one['prompt']} tokens, {one['rounds']} rounds", headers, body


def peers(result: Bench) -> list[str]:
    """A sentence for each peer: whether it runs the dense parent's model."""
    kinds = {label: engine["info"]["dtype"] for label, engine in result["engines"].items()}
    return [
        sentence(label, engine["peer"], kinds[label], kinds[engine["peer"]["agreement"]["parent"]])
        for label, engine in result["engines"].items()
        if "peer" in engine
    ]


def footer(result: Bench) -> str:
    """What it was measured on, in a line."""
    infos = [engine["info"] for engine in result["engines"].values()]
    asked = dict.fromkeys(point["threads"] or infos[0]["threads"] for point in result["points"])
    threads = " and ".join(map(str, asked))
    where = f"{result['machine']['processor']}, {threads} threads, {kinds(result)}"
    return f"{where}{pages(result)}, text {result.get('text', 'given')}"


def pages(result: Bench) -> str:
    """How much of the engines' memory lay in huge pages; empty where it is not told."""
    shares = [engine["huge_pages"] for engine in result["engines"].values() if "huge_pages" in engine]
    if not shares:
        return ""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return f", {low} of the memory in huge pages" if low == high else f", {low} to {high} of the memory in huge pages"


def show(result: Bench, console: Console) -> None:
    """Print every table and what was measured on."""
    for name, headers, rows in tables(result):
        sheet = Sheet(title=name)
        for number, header in enumerate(headers):
            sheet.add_column(header, justify="right" if number else "left")
        for cells in rows:
            sheet.add_row(*map(escape, cells))
        console.print(sheet)
    said = [
        f"{label}: no GPU MiB, for {engine['gpu_reason']}."
        for label, engine in result["engines"].items()
        if engine.get("gpu_reason")
    ]
    said += [f"{label} decodes no batches: {why}" for label, why in result.get("not_batched", {}).items()]
    said += peers(result)
    for line in (*said, footer(result)):
        console.print(escape(line), highlight=False, soft_wrap=True)


def show_gate(gate: Gate, console: Console) -> None:
    """Print every check of a gate, and the verdict."""
    sheet = Sheet(title="gate")
    for header in ("engine", "what", "outcome"):
        sheet.add_column(header)
    for check in gate["checks"]:
        where = f" ({check['point']})" if len({one["point"] for one in gate["checks"]}) > 1 else ""
        sheet.add_row(escape(check["label"] + where), escape(check["what"]), mark(check["outcome"]).cell)
    console.print(sheet)
    for check in gate["checks"]:
        console.print(escape(f"{check['label']}: {check['sentence']}."), highlight=False, soft_wrap=True)
    for note in gate["notes"]:
        console.print(escape(f"note: {note}."), highlight=False, soft_wrap=True)
    console.print(mark(gate["outcome"]).line)


def markdown(result: Bench) -> str:
    """The tables for a pull request, the gate's verdict first."""
    from moedge.runtime.report.text import filters

    cell = filters()["cell"]
    lines: list[str] = []

    def table(headers: list[str], rows: list[list[str]]) -> None:
        lines.append("| " + " | ".join(map(cell, headers)) + " |")
        lines.append("|---" + "|---:" * (len(headers) - 1) + "|")
        lines.extend("| " + " | ".join(map(cell, cells)) + " |" for cells in rows)
        lines.append("")

    if gate := result.get("gate"):
        lines += [f"### moedge bench: {mark(gate['outcome']).verdict}", ""]
        lines += ["| engine | at | what | outcome | |", "|---|---|---|---|---|"]
        for check in gate["checks"]:
            cells = (check["label"], check["point"], check["what"], mark(check["outcome"]).word, check["sentence"])
            lines.append("| " + " | ".join(map(cell, cells)) + " |")
        lines += ["", *(f"- {cell(note)}" for note in gate["notes"]), *[""] * bool(gate["notes"])]
    for name, headers, rows in tables(result):
        lines += [f"**{name}**", ""]
        table(headers, rows)
    said = [*peers(result), *dict.fromkeys(line for point in result["points"] for line in unknown_tails(point))]
    lines += [*(f"- {cell(line)}" for line in said), *[""] * bool(said)]
    return "\n".join([*lines, cell(footer(result)), ""])


def csv_text(result: Bench) -> str:
    """A line for each engine at each point, with every figure; intervals as two columns."""
    found: list[dict[str, Any]] = []
    for point in (*result["points"], *result.get("batches", [])):
        for row in point["rows"]:
            engine = result["engines"][row["label"]]
            line: dict[str, Any] = {"engine": row["label"], "sha256": engine["sha256"]}
            line |= {fact: engine["info"][fact] for fact in ("runtime", "device", "dtype")}
            line |= {"peer": engine["peer"]["peer"] if "peer" in engine else ""}
            line |= {key: point[key] for key in ("prompt", "decode", "batch", "depth")}
            line |= {"threads": point["threads"] or engine["info"]["threads"]}
            line |= {"rounds": point["rounds"], "warmup_rounds": point["warmup_rounds"]}
            for metric, times in (("ttft_ms", row["ttft_ms"]), ("tpot_ms", row["tpot_ms"])):
                line |= {f"{metric}_{name}": times[name] for name in ("p50", "p90", "p99", "mean")}
                line |= {f"{metric}_ci95_low": times["ci95"][0], f"{metric}_ci95_high": times["ci95"][1]}
            line |= {name: row[name] for name in ("prefill_tokens_per_s", "decode_tokens_per_s")}
            line |= {"peak_rss_mib": engine["peak_rss_mib"], "load_s": engine["load_s"]}
            found.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
