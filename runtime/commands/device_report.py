"""``moedge device-report``: read back what the scripts of a device archive wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.runtime.bench.stats import between
from moedge.runtime.commands._options import Json
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.verdict import outcome_of
from moedge.runtime.report import jetson_llm_benchmark
from moedge.runtime.report.device_result import Benched, DeviceResult, Verified, read
from moedge.runtime.report.watched import lines as guard_lines
from moedge.runtime.tables import Sheet


def device_report(
    results: Annotated[list[Path], typer.Argument(help="verify-result.json and bench-result.json of a device.")],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="Print benchmarks as JSON of others: jetson-llm-benchmark."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Print what verify.py and bench.py of a device archive wrote. Exits with 1 when a verification failed.

    \b
    Examples:
      moedge device-report verify-result.json bench-result.json
      moedge device-report bench-result.json --format jetson-llm-benchmark
    """
    loaded = {str(path): read(path) for path in results}
    if form is not None:
        if form != jetson_llm_benchmark.FORMAT:
            raise MoEdgeError(f"Unknown format {form!r}; known: {jetson_llm_benchmark.FORMAT}.")
        converted = [jetson_llm_benchmark.convert(result) for result in loaded.values()]
        print(json.dumps(converted[0] if len(converted) == 1 else converted, indent=2, allow_nan=False))
        return 0
    if as_json:
        print(json.dumps(loaded, indent=2, allow_nan=False))
    else:
        console = Console()
        for path, result in loaded.items():
            _print(path, result, console)
    return 0 if all(result["kind"] == "bench" or result["passed"] for result in loaded.values()) else 1


def _print(path: str, result: DeviceResult, console: Console) -> None:
    table = Sheet(title=escape(f"{path}: {result['label']}"))
    said = _checks(table, result) if result["kind"] == "verify" else _times(table, result)
    console.print(table)
    device = result["device"]
    system = f"SM{device['compute_capability'].replace('.', '')}, {device['runtime']}, {device['system']}"
    for line in (*said, f"{device['name']}, {system}"):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _checks(table: Sheet, result: Verified) -> list[str]:
    """Fill the table of a verification."""
    for column in ("check", "value", "limit", ""):
        table.add_column(column)
    for check in result["checks"]:
        shown = "none" if check["value"] is None else f"{check['value']:.6g}"
        limit = escape(f"{check['relation']} {check['limit']:.4g}")
        table.add_row(escape(check["name"]), shown, limit, mark(outcome_of(check)).cell)
    return []


def _times(table: Sheet, result: Benched) -> list[str]:
    """Fill the table of a benchmark; what is said below it."""
    for column in ("", "p50 ms", "p90", "p99", "95% CI of p50"):
        table.add_column(column, justify="right" if column else "left")
    rows = [("", result["ttft_ms"], result["tpot_ms"])]
    if dense := result.get("dense"):
        rows.append((", dense parent", dense["ttft_ms"], dense["tpot_ms"]))
    for engine, *both in rows:
        for name, t in zip(("first token", "per token"), both, strict=True):
            interval = between((t["ci95_low"], t["ci95_high"]), "{:.3f}")
            table.add_row(name + engine, f"{t['p50']:.3f}", f"{t['p90']:.3f}", f"{t['p99']:.3f}", interval)
    protocol = result["protocol"]
    said = f"batch 1, prompt {protocol['prompt']}, decode {protocol['decode']}. {protocol['note']}"
    return [said, *_measured(result)]


def _measured(result: Benched) -> list[str]:
    """What a benchmark says beside its times: gain, energy, power mode, and whether to trust it."""
    said = []
    if dense := result.get("dense"):
        other = dense.get("dtype", result["engine"].get("dtype"))
        of = "" if other == result["engine"].get("dtype") else f" in {other}"
        gains = dense["speedup"]
        for words, gain in (("per token", gains["tpot_ms"]), ("first token", gains["ttft_ms"])):
            interval = between((gain["ci95_low"], gain["ci95_high"]))
            said.append(f"Against {dense['label']}{of}, {words}: {gain['speedup']:.2f} times as fast ({interval}).")
    if energy := result.get("energy"):
        joules = energy["joules_per_token"]
        told = f"not told: {energy['reason']}" if joules is None else f"{joules:.3f} J a token, {energy['source']}"
        said.append(f"Energy {told}.")
    if environment := result.get("environment"):
        settings = environment["guard"]["settings"]
        locked = {True: "locked", False: "not locked", None: "not told"}[settings["clocks_locked"]]
        said.append(f"Power mode {settings['power_mode'] or 'not told'}, clocks {locked}.")
        said += guard_lines(environment["guard"])
    return said
