"""What a model lost, what it computes and how long it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moedge.runtime.cli._app import Device, Dtype, Json, Text, Threads, command

PANEL = "Measure"


@command("verify", PANEL)
def verify(
    reference: Annotated[
        Path, typer.Argument(help="Run folder (all its pairs), or the reference: bundle or checkpoint.")
    ],
    test: Annotated[
        Path | None,
        typer.Argument(
            help="Bundle, engine or checkpoint to compare with the reference; or verify-answers.npz of a device."
        ),
    ] = None,
    text: Text = "asset:wiki",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of a window in one prefill; the rest is decoded.")] = 224,
    tolerances: Annotated[
        str,
        typer.Option(metavar="FILE", help="YAML file of limits that take the place of the packaged ones."),
    ] = "float32",
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML to this file.")] = None,
) -> int | None:
    """Compare two engines on real text: logits, KL, top-1 and top-5, expert sets. Exits with 1 when a check fails.

    \b
    Examples:
      moedge verify runs/smollm2-135m
      moedge verify build/moe build/bundles/ort-cpu --junit verify.xml
      moedge verify build/moe verify-answers.npz
    """
    from moedge.runtime.commands.verify import verify as body

    return body(
        reference,
        test,
        text=text,
        tokens=tokens,
        window=window,
        prefill=prefill,
        tolerances=tolerances,
        threads=threads,
        device=device,
        as_json=as_json,
        junit=junit,
    )


@command("bench", PANEL)
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
    from moedge.runtime.commands.bench import bench as body

    body(
        engines,
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        threads=threads,
        pytorch={"device": device, "dtype": dtype},
        text=text,
        as_json=as_json,
        profile=profile,
    )


@command("evaluate", PANEL)
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="MoE checkpoints, dense models, or a run folder (both of its).")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Perplexity on this text: asset:NAME or a file (may be repeated); asset:wiki by default."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks with commas between, e.g. arc_easy,piqa.")] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option("--task-data", metavar="TASK=FILE", help="Local data of a task (.arrow, .jsonl, .parquet, .csv)."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples in front of a question.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each task.")] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 8192,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window; windows do not overlap.")] = 512,
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the begin-of-sequence token.")] = False,
    holdout_every: Annotated[
        int, typer.Option(min=2, help="Of the calibration text only every Nth document is used, the held-out ones.")
    ] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or questions per forward pass.")] = 4,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the whole result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on held-out text and accuracy on lm-eval tasks (needs moedge\\[eval]), all from local data.

    \b
    Examples:
      moedge evaluate runs/smollm2-135m --text asset:wiki --text asset:c4
      moedge evaluate ./my-llama build/moe --tasks arc_easy,piqa,sciq --limit 200
    """
    from moedge.runtime.commands.evaluate import evaluate as body

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    body(
        models,
        texts=text or ([] if names else ["asset:wiki"]),
        tasks=names,
        task_data=task_data or [],
        shots=shots,
        limit=limit,
        tokens=tokens,
        window=window,
        bos=bos,
        every=holdout_every,
        batch_size=batch_size,
        device=device,
        out=out,
        as_json=as_json,
    )


@command("diagnose", PANEL)
def diagnose(
    path: Annotated[Path, typer.Argument(help="MoE checkpoint or run folder.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="asset:NAME or a .txt, .utf8 or .jsonl file (may be repeated); asset:wiki by default."),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense parent to measure errors against; a run folder knows its own.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 4096,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    holdout_every: Annotated[
        int, typer.Option(min=2, help="Of the calibration text only every Nth document is used, the held-out ones.")
    ] = 10,
    stability: Annotated[
        bool, typer.Option("--stability", help="Convert again on halves and on each text; compare the partitions.")
    ] = False,
    k_a: Annotated[
        int, typer.Option("--k-a", min=1, help="A neuron is dead when no token has it among its k-a strongest.")
    ] = 10,
    device: Device = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Also draw the first text to this .svg or .png file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what the routers do: agreement with the best choice, load, dead neurons, errors, partition stability.

    \b
    Examples:
      moedge diagnose runs/smollm2-135m
      moedge diagnose build/moe --dense ./my-llama --text my.txt --text other.txt --stability --plot routing.svg
    """
    from moedge.runtime.commands.diagnose import diagnose as body

    body(
        path,
        texts=text or ["asset:wiki"],
        dense=dense,
        tokens=tokens,
        window=window,
        every=holdout_every,
        stability=stability,
        k_a=k_a,
        device=device,
        plot=plot,
        out=out,
        as_json=as_json,
    )


@command("ablate", PANEL)
def ablate(
    study: Annotated[str, typer.Argument(help="A packaged study, or the path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
) -> None:
    """Compare conversion methods, switches of a method, and controls on one held-out protocol; training-free.

    A study is a YAML file; every row is kept, so an interrupted study goes on where it stopped.

    \b
    Examples:
      moedge ablate smollm2-135m-methods
      moedge ablate my-study.yaml --out runs/my-study
    """
    from moedge.runtime.commands.ablate import ablate as body

    body(study, out)


@command("report", PANEL)
def report(
    results: Annotated[list[Path], typer.Argument(help="verify-result.json and bench-result.json of a device.")],
    as_json: Json = False,
) -> int | None:
    """Print what verify.py and bench.py of a device archive wrote. Exits with 1 when a verification failed.

    \b
    Example:
      moedge report verify-result.json bench-result.json
    """
    from moedge.runtime.commands.report import report as body

    return body(results, as_json=as_json)
