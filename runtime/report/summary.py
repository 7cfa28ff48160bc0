"""The summary table that ends ``moedge run``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from moedge.convert import forms
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.verdict import entry_outcome, run_outcome
from moedge.runtime.report.zeros import zeros_note
from moedge.runtime.tables import Sheet


def show(report: dict[str, Any], console: Console) -> None:
    """Print quality beside the controls, identity and parity verdicts, speed and sizes."""
    conversion = report["conversion"]
    console.print()
    console.print(
        escape(
            f"{report['model']['label']}: {conversion['method']} {conversion['notation']}, "
            f"{conversion['active_fraction']:.1%} of each FFN active{zeros_note(conversion.get('zero_fraction'))}, "
            f"{conversion['ffn_read_share']:.1%} of the FFN weights read for a token"
        ),
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    for title, table in (
        *_quality(report["quality"]),
        _verification(report["verification"]),
        _speed(report),
    ):
        console.print(escape(f"\n{title}"), highlight=False, soft_wrap=True)
        console.print(table)
    for sentence in report["sentences"]:
        console.print(escape(f"- {sentence}"), highlight=False, soft_wrap=True)
    console.print(mark(run_outcome(report["verification"])).line)


def _quality(quality: dict[str, Any]) -> list[tuple[str, Sheet]]:
    protocol = quality["protocol"]
    names = protocol["texts"]
    tokens = ", ".join(f"{name} {protocol['tokens'][name]:,} tokens" for name in names)
    title = f"quality on held-out text ({tokens}, window {protocol['window']}, {protocol['dtype']})"
    found = [(title, _rows(names, quality["rows"]))]
    if prompted := forms.prompted(quality):
        title = f"the second halves of these windows: {', '.join(prompted)} takes the first half as its prompt"
        found.append((title, _rows(names, quality["second_half"]["rows"])))
    return found


def _rows(names: list[str], rows: list[dict[str, Any]]) -> Sheet:
    table = Sheet()
    table.add_column("")
    table.add_column("active", justify="right")
    table.add_column("read", justify="right")
    for name in names:
        table.add_column(escape(f"ppl {name}"), justify="right")
    for name in names:
        table.add_column(escape(f"KL {name}"), justify="right")
    for row in rows:
        kl = row["kl_to_dense"] or {}
        table.add_row(
            escape(row["label"]),
            f"{row['active_width_fraction']:.0%}{zeros_note(row.get('zero_weight_fraction'))}",
            f"{row['ffn_read_share']:.0%}",
            *(f"{row['ppl'][name]:.4g}" for name in names),
            *(f"{kl[name]:.3g}" if name in kl else "-" for name in names),
            style="bold" if row["kind"] == "method" else "",
        )
    return table


def _verification(verification: dict[str, Any]) -> tuple[str, Sheet]:
    table = Sheet()
    for column in ("comparison", "tokens", "rel. error", "mean KL", "top-1", "expert sets", ""):
        table.add_column(column, justify="left" if column in ("comparison", "") else "right")
    for entry in verification["identity"]:
        worst = entry["max_rel_error"]
        table.add_row(
            escape(entry["name"] + ", all experts"),
            f"{entry['tokens']:,}",
            "none" if worst is None else f"max {worst:.1e}",
            "",
            "",
            "",
            mark(entry_outcome(entry)).cell,
        )
    for entry in verification["parity"]:
        rows = [(entry["name"], entry["overall"], entry["routing"], mark(entry_outcome(entry)).cell)]
        if replay := entry.get("replay"):  # the arithmetic and the choices apart
            same = "same experts" if replay["router"].get("compared", True) else "same values kept"
            rows.append((f"{entry['name']}, {same}", replay["overall"], replay["router"], ""))
        for name, overall, routing, said in rows:
            table.add_row(
                escape(name),
                f"{overall['tokens']:,}",
                _number(overall["rel_error"]["p50"], "med {:.1e}"),
                _number(overall["kl_ref_test"]["mean"], "{:.1e}"),
                _number(overall["top1"]["agreement"], "{:.2%}"),
                _number(routing.get("agreement"), "{:.4%}"),
                said,
            )
    for entry in verification.get("shapes", []):
        cases = list(entry["cases"].values())
        errors = [case["rel_error"]["mean"] for case in cases if case["rel_error"]["mean"] is not None]
        tokens, worst = sum(case["tokens"] for case in cases), max(errors, default=None)
        shown = (f"{tokens:,}", _number(worst, "mean {:.1e}"), "", "", "")
        table.add_row(escape(entry["name"]), *shown, mark(entry_outcome(entry)).cell)
    for entry in verification.get("accuracy", []):
        found = entry["overall"]
        shown = (f"{found['questions']:,} asked", "", "", f"{found['agreement']:.2%}", "")
        table.add_row(escape(entry["name"]), *shown, mark(entry_outcome(entry)).cell)
    return f"the same numbers as PyTorch? (text {verification['text']})", table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _speed(report: dict[str, Any]) -> tuple[str, Sheet]:
    from moedge.runtime.report import gains

    speed, sizes = report["speed"], {bundle["label"]: bundle["bytes"] for bundle in report["bundles"]}
    point, engines, machine = speed["points"][0], speed["engines"], report["machine"]
    threads = next(iter(engines.values()))["info"]["threads"]
    title = (
        f"speed, batch 1, prompt {point['prompt']}, {point['decode']} tokens decoded, {threads} threads, "
        f"{machine['processor']}"
    )
    table = Sheet()
    table.add_column("engine")
    for column in (
        "first token ms",
        "per token ms",
        "tokens/s",
        "vs its dense",
        "vs PyTorch dense",
        "peak MiB",
        "disk MiB",
    ):
        table.add_column(column, justify="right")
    for row in point["rows"]:
        size = sizes.get(row["label"])
        table.add_row(
            escape(row["label"]),
            f"{row['ttft_ms']['p50']:.0f}",
            f"{row['tpot_ms']['p50']:.1f}",
            f"{row['decode_tokens_per_s']:.1f}",
            *(
                "" if gain is None else f"{gain['speedup']:.2f}x"
                for gain in gains.columns(report, "tpot_ms", row["label"])
            ),
            _number(engines[row["label"]]["peak_rss_mib"], "{:.0f}"),
            "" if size is None else f"{size / 2**20:.0f}",
        )
    return title, table
