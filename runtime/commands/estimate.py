"""``moedge estimate``: does a model fit on a device, and how fast can it be there at best."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.configs import devices
from moedge.configs.devices import Device
from moedge.export import needs
from moedge.export.device import outlook
from moedge.export.device.outlook import Bound, Outlook, Work
from moedge.runtime.commands._options import Batch, Json
from moedge.runtime.engines.given import existing, local
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet


def estimate(
    model: Annotated[Path, typer.Argument(help="Bundle, engine, checkpoint or run folder.")],
    profiles: Annotated[
        list[str],
        typer.Option("--for", metavar="PROFILE", help="Device profile: a name or a .yaml file (may be repeated)."),
    ],
    batch: Batch = 1,
    context: Annotated[int, typer.Option(min=2, help="Tokens in the cache when a token is decoded.")] = 4096,
    max_prompt: Annotated[
        int | None, typer.Option(min=1, help="Most prompt tokens in one call; half of --context by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether a model fits on a device and what its bandwidth and arithmetic allow, before anything is built.

    \b
    Examples:
      moedge estimate build/bundles/portable --for jetson-orin-nano
      moedge estimate runs/smollm2-135m --for rtx-4060 --for jetson-agx-orin --context 8192
    """
    folder = run_folder.converted(model) if run_folder.is_run(model) else existing(local(model))
    if folder.is_dir() and (hint := run_folder.bundles_below(folder)) and not (folder / "config.json").is_file():
        raise MoEdgeError(f"{model} is no bundle, engine, checkpoint or run folder.{hint}")
    facts, moe, share = needs.facts(folder)
    work = Work(batch=batch, context=context, prompt=max_prompt or max(1, context // 2))
    if work.prompt > work.context:
        raise MoEdgeError(f"A prompt of {work.prompt} tokens does not fit into --context {work.context}.")
    found = [devices.load(name) for name in profiles]
    rows = {device.name: outlook.outlooks(facts, moe, share, device, work) for device in found}
    longest = facts.max_position_embeddings
    beyond = f"--context {context} is beyond the model's {longest} positions: it was not made for such a text."
    notes = [beyond] if context > longest else []
    if as_json:
        print(json.dumps(document(found, rows, work, notes), indent=2, allow_nan=False))
        return
    console = Console()
    for device in found:
        show(str(model), device, rows[device.name], work, console)
    for note in notes:
        console.print(escape(f"note: {note}"), highlight=False, soft_wrap=True)


def document(found: list[Device], rows: dict[str, list[Outlook]], work: Work, notes: list[str]) -> dict[str, object]:
    """Return the whole result as JSON."""
    return {
        "schema": "moedge.estimate/1",
        "work": asdict(work),
        "notes": notes,
        "devices": {
            device.name: {
                "profile": device.model_dump(mode="json", by_alias=True),
                "outlooks": [
                    {**asdict(row), "fits": row.fits, "ttft_bound": row.ttft.by, "tpot_bound": row.tpot.by}
                    for row in rows[device.name]
                ],
                "best": None if (one := outlook.best(rows[device.name])) is None else asdict(one),
            }
            for device in found
        },
    }


def show(label: str, device: Device, rows: list[Outlook], work: Work, console: Console) -> None:
    """Print one device's table and the best row of it."""
    rate = f", {device.fp16_tflops:g} TFLOPS" if device.fp16_tflops else ""
    table = Sheet(
        title=escape(
            f"{label} on {device.label}: {device.memory_gib:g} GiB, {device.bandwidth_gb_s:g} GB/s{rate}; batch "
            f"{work.batch}, {work.context} tokens in the cache, prompts of {work.prompt}"
        )
    )
    table.add_column("model")
    table.add_column("weights")
    for column in ("needs GiB", "first token ms", "per token ms", "tokens/s", "bound by"):
        table.add_column(column, justify="right" if column != "bound by" else "left")
    table.add_column("engine")
    for row in rows:
        table.add_row(
            row.model,
            row.precision,
            f"{row.needed / 2**30:.2f}" + ("" if row.fits else " [red]too large[/red]"),
            _least(row.ttft),
            _least(row.tpot),
            f"{row.tokens_per_s:.1f}",
            row.tpot.by,
            ", ".join(row.targets) or "none",
        )
    console.print(table)
    for line in sentences(device, rows):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _least(bound: Bound) -> str:
    return f"{bound.ms:.1f}" + ("" if bound.arithmetic_ms is not None else " (memory alone)")


def sentences(device: Device, rows: list[Outlook]) -> list[str]:
    """Say which row to take, what the conversion is worth there, and how sure the profile is."""
    said = ["Least times and most tokens: bounds, not measurements (docs/estimate.md: what published engines reach)."]
    chosen = outlook.best(rows)
    if chosen is None:
        said.append("None of these both fits and has an engine: lower --context or --batch, or take another device.")
    else:
        said.append(
            f"Fastest that fits: {' or '.join(chosen.targets)}, {chosen.tpot.ms:.1f} ms a token at least, "
            f"{chosen.needed / 2**30:.2f} of {device.memory_gib:g} GiB."
        )
    said += _gain(rows)
    if device.unified_memory:
        said.append("The memory is shared with the CPU: the system and other programs take their part of it first.")
    if device.unconfirmed:
        said.append(f"Not confirmed at the vendor's page: {', '.join(device.unconfirmed)} (see the profile's sources).")
    return said


def _gain(rows: list[Outlook]) -> list[str]:
    """What the conversion is worth at most, where an engine leaves weights out."""
    dense = {row.precision: row for row in rows if row.model == "dense"}
    found = [row for row in rows if row.model == "moe" and row.targets]
    if not found:
        whole = any(row.model == "moe, all weights" for row in rows)
        return ["No engine there leaves weights out: the conversion gains nothing."] if whole else []
    return [
        f"The conversion is worth there ({' or '.join(row.targets)}): at most "
        f"{dense[row.precision].tpot.ms / row.tpot.ms:.2f} times as fast a token, "
        f"{dense[row.precision].ttft.ms / row.ttft.ms:.2f} times as fast a prompt."
        for row in found
    ]
