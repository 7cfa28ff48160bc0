"""``moedge device-report``: read back what the scripts of a device archive wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import read_json
from moedge.runtime.bench.stats import between
from moedge.runtime.commands._options import Json
from moedge.runtime.device.moedge_archive import RESULT_SCHEMA
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.verdict import outcome_of
from moedge.runtime.report import jetson_llm_benchmark
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
    return 0 if all(result.get("passed", True) for result in loaded.values()) else 1


def read(path: Path) -> dict[str, Any]:
    """Read one result.

    Raises:
        MoEdgeError: it is missing, damaged or not a device result.
    """
    absent = f"{path} does not exist; verify.py and bench.py of an archive write such files."
    value = read_json(path, "copy the device's result again", missing=absent)
    needed = {"verify": ("checks", "logits", "routing", "passed"), "bench": ("ttft_ms", "tpot_ms", "protocol")}
    if value.get("schema") != RESULT_SCHEMA or value.get("kind") not in needed:
        raise MoEdgeError(f"{path} is not a result of verify.py or bench.py (schema {RESULT_SCHEMA}).")
    if missing := [key for key in ("label", "device", "engine", *needed[value["kind"]]) if key not in value]:
        raise MoEdgeError(f"{path} lacks {', '.join(missing)}; run the script again.")
    return value


def _print(path: str, result: dict[str, Any], console: Console) -> None:
    device = result["device"]
    table = Sheet(title=escape(f"{path}: {result['label']}"))
    caption = ""
    if result["kind"] == "verify":
        for column in ("check", "value", "limit", ""):
            table.add_column(column)
        for check in result["checks"]:
            shown = "none" if check["value"] is None else f"{check['value']:.6g}"
            outcome = outcome_of(check)
            table.add_row(escape(check["name"]), shown, f"{check['relation']} {check['limit']:.4g}", mark(outcome).cell)
    else:
        protocol = result["protocol"]
        for column in ("", "p50 ms", "p90", "p99", "95% CI of p50"):
            table.add_column(column, justify="right" if column else "left")
        dense = result.get("dense")
        for engine, row in (("", result), *([(", dense parent", dense)] if dense else [])):
            for name, key in (("first token", "ttft_ms"), ("per token", "tpot_ms")):
                t = row[key]
                interval = between((t["ci95_low"], t["ci95_high"]), "{:.3f}")
                table.add_row(name + engine, f"{t['p50']:.3f}", f"{t['p90']:.3f}", f"{t['p99']:.3f}", interval)
        caption = f"batch 1, prompt {protocol['prompt']}, decode {protocol['decode']}. {protocol['note']}"
    console.print(table)
    for line in (caption, *_measured(result)):
        if line:
            console.print(escape(line), highlight=False, soft_wrap=True)
    said = (
        f"{device['name']}, SM{device['compute_capability'].replace('.', '')}, {device['runtime']}, {device['system']}"
    )
    console.print(escape(said), highlight=False, soft_wrap=True)


def _measured(result: dict[str, Any]) -> list[str]:
    """What a benchmark says beside its times: gain, energy, power mode, and whether to trust it."""
    said = []
    if dense := result.get("dense"):
        other = dense.get("dtype", result["engine"].get("dtype"))
        of = "" if other == result["engine"].get("dtype") else f" in {other}"
        for name, words in (("tpot_ms", "per token"), ("ttft_ms", "first token")):
            gain = dense["speedup"][name]
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
