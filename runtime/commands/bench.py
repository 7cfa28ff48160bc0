"""``moedge bench``: time engines side by side."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.runtime.bench import latency as benchmark
from moedge.runtime.bench.profiling import profiles
from moedge.runtime.commands._options import Device, Dtype, Json, Text, Threads
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.progress import single
from moedge.runtime.report.profile import NOTE, table
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet
from moedge.runtime.text.windows import token_windows


def bench(
    engines: Annotated[list[Path], typer.Argument(help="One run folder, or bundles and checkpoints to time together.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=3, help="Timed rounds.")] = 10,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    text: Text = "asset:wiki",
    profile: Annotated[
        bool, typer.Option("--profile", help="Then profile the bundles: time by operator and by part of the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time engines side by side at batch 1: time to first token, time per token, memory, load time.

    \b
    Examples:
      moedge bench runs/smollm2-135m
      moedge bench build/dense/ort-cpu build/bundles/ort-cpu --decode 128 --profile
      moedge bench ./my-llama build/moe --device cuda --dtype bfloat16
    """
    if len(engines) == 1 and run_folder.is_run(engines[0]):
        folders = run_folder.engines(engines[0])
        tokenizer = run_folder.checkpoint(engines[0])
    else:
        folders = {str(path): local(path) for path in engines}
        if twice := next((path for path in engines if engines.count(path) > 1), None):
            raise MoEdgeError(f"{twice} is given twice; name each engine once.")
        tokenizer = next(iter(folders.values()))
    if not folders:
        raise MoEdgeError(f"{engines[0]} has no engines yet; finish it with `moedge run`.")
    pytorch = {"device": device, "dtype": dtype}
    with single("bench", ", ".join(folders)) as reporter:
        name, windows = token_windows(tokenizer, text, prompt, 1)
        openers = {
            label: partial(open_engine, path, threads=threads, pytorch=pytorch, last_logits=True)
            for label, path in folders.items()
        }
        result = benchmark.bench(
            openers, windows[0], prompt=prompt, decode=decode, repeats=repeats, progress=reporter.progress
        )
        if profile:
            sizes = {"prompt": prompt, "decode": decode, "repeats": repeats, "threads": threads}
            result["profiles"] = profiles(folders, windows[0], progress=reporter.progress, **sizes)
    result["text"] = name
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        console = Console()
        show(result, console)
        if profile:
            show_profiles(result["profiles"], console)


def show_profiles(found: dict[str, Any], console: Console) -> None:
    """Print, for prefill and decode, milliseconds and share by part of the model and by operator."""
    for phase in ("prefill", "decode"):
        for key, title in (("groups", "part"), ("operators", "operator")):
            labels, rows = table(found, phase, key)
            if not labels:
                continue
            shown = Sheet(title=f"{phase}: milliseconds and share by {title}")
            shown.add_column(title)
            for label in labels:
                shown.add_column(escape(label), justify="right")
            for name, cells in rows:
                shown.add_row(
                    escape(name), *(f"{cell['ms']:.2f}  {cell['share']:4.0%}" if cell else "" for cell in cells)
                )
            console.print(shown)
    console.print(NOTE, highlight=False, soft_wrap=True)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the rows of a benchmark and what they were measured on."""
    protocol, machine = result["protocol"], result["machine"]
    table = Sheet(
        title=f"batch 1, prompt {protocol['prompt']}, decode {protocol['decode']}, {protocol['repeats']} rounds"
    )
    table.add_column("engine")
    gpu = any(row["info"]["device"] != "CPU" for row in result["rows"])
    for column in ("first token ms", "per token ms", "95% CI", "tokens/s", "peak MiB", *(["GPU MiB"] * gpu), "load s"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        low, high = row["tpot_ms"]["ci95"]
        table.add_row(
            escape(row["label"]),
            f"{row['ttft_ms']['p50']:.1f}",
            f"{row['tpot_ms']['p50']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['decode_tokens_per_s']:.1f}",
            "-" if row["peak_rss_mib"] is None else f"{row['peak_rss_mib']:.0f}",
            *(["-" if row.get("peak_gpu_mib") is None else f"{row['peak_gpu_mib']:.0f}"] if gpu else []),
            "-" if row["load_s"] is None else f"{row['load_s']:.1f}",
        )
    console.print(table)
    for row in result["rows"]:
        if reason := row.get("gpu_reason"):
            console.print(escape(f"{row['label']}: no GPU MiB, for {reason}."), highlight=False, soft_wrap=True)
    infos = [row["info"] for row in result["rows"]]
    kinds = ", ".join(dict.fromkeys(f"{info['dtype']} on {info['device']}" for info in infos))
    console.print(
        escape(f"{machine['processor']}, {infos[0]['threads']} threads, {kinds}, text {result['text']}"),
        highlight=False,
        soft_wrap=True,
    )
