"""``moedge device-report``: read back what the scripts of a device archive wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.runtime.commands._options import Json
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.verdict import outcome_of
from moedge.runtime.tables import Sheet

SCHEMA = "moedge.device-result/1"


def device_report(
    results: Annotated[list[Path], typer.Argument(help="verify-result.json and bench-result.json of a device.")],
    as_json: Json = False,
) -> int:
    """Print what verify.py and bench.py of a device archive wrote. Exits with 1 when a verification failed.

    \b
    Example:
      moedge device-report verify-result.json bench-result.json
    """
    loaded = {str(path): read(path) for path in results}
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoEdgeError(f"{path} does not exist; verify.py and bench.py of an archive write such files.") from None
    except (OSError, ValueError) as error:
        raise MoEdgeError(f"{path} cannot be read as a device result ({error}).") from error
    needed = {"verify": ("checks", "logits", "routing", "passed"), "bench": ("ttft_ms", "tpot_ms", "protocol")}
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or value.get("kind") not in needed:
        raise MoEdgeError(f"{path} is not a result of verify.py or bench.py (schema {SCHEMA}).")
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
        for name, key in (("first token", "ttft_ms"), ("per token", "tpot_ms")):
            t = result[key]
            interval = f"{t['ci95_low']:.3f}-{t['ci95_high']:.3f}"
            table.add_row(name, f"{t['p50']:.3f}", f"{t['p90']:.3f}", f"{t['p99']:.3f}", interval)
        caption = f"batch 1, prompt {protocol['prompt']}, decode {protocol['decode']}. {protocol['note']}"
    console.print(table)
    if caption:
        console.print(escape(caption), highlight=False, soft_wrap=True)
    said = (
        f"{device['name']}, SM{device['compute_capability'].replace('.', '')}, {device['runtime']}, {device['system']}"
    )
    console.print(escape(said), highlight=False, soft_wrap=True)
