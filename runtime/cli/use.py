"""The whole way by one command, and looking at what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moedge.runtime.cli._app import Device, Dtype, Json, Threads, command

PANEL = "Run"


@command("run", PANEL)
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a packaged recipe, or path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, what is cached, disk and memory; do nothing.")
    ] = False,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Redo this stage (may be repeated).")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Redo this stage and every later one.")
    ] = None,
) -> int | None:
    """Do everything: open, calibrate, convert, export, evaluate, verify, bench, report.

    What is already done and unchanged is reused, so an interrupted run resumes with the same command. Exits with 1
    when an engine does not compute what PyTorch computes.

    \b
    Examples:
      moedge run smollm2-135m
      moedge run my-recipe.yaml --out runs/try-2 --dry-run
      moedge run smollm2-135m --from verify
    """
    from moedge.runtime.commands.run import run as body

    return body(recipe, out, dry_run=dry_run, force=force or [], start=start)


@command("generate", PANEL)
def generate(
    model: Annotated[Path, typer.Argument(help="Run folder, bundle, checkpoint or dense model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads it from stdin.")],
    which: Annotated[str, typer.Option("--model", help="Run folders: moe or dense.")] = "moe",
    target: Annotated[
        str, typer.Option(help="Run folders: ort-cpu, ort-cpu-int8, ort-cpu-int4, portable or torch.")
    ] = "ort-cpu",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message (the model's template).")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 picks the most likely token (greedy).")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the smallest set with this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Generate text and print it as it comes.

    \b
    Examples:
      moedge generate runs/smollm2-135m "The capital of France is"
      moedge generate runs/smollm2-135m "Explain rain to a child." --chat --temperature 0.7
    """
    from moedge.runtime.commands.generate import generate as body

    body(
        model,
        prompt,
        which=which,
        target=target,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
        pytorch={"device": device, "dtype": dtype},
    )


@command("inspect", PANEL)
def inspect(
    path: Annotated[Path, typer.Argument(help="Run folder, MoE checkpoint, bundle, engine, or a model folder.")],
    as_json: Json = False,
) -> None:
    """Print what a run, a plan, a checkpoint or a bundle holds, after checking its hashes.

    \b
    Examples:
      moedge inspect runs/smollm2-135m
      moedge inspect runs/smollm2-135m/export/ort-cpu --json
    """
    from moedge.runtime.commands.inspect import inspect as body

    body(path, as_json=as_json)


@command("doctor", PANEL)
def doctor(as_json: Json = False) -> None:
    """Say which runtimes, versions and devices are here, and which lowerings are therefore possible.

    \b
    Example:
      moedge doctor
    """
    from moedge.runtime.commands.doctor import doctor as body

    body(as_json=as_json)
