"""``moedge evaluate``: perplexity on held-out text and answers to lm-eval tasks, of any engines side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge._files import write_json
from moedge.runtime.bench.machine import commit, created, machine
from moedge.runtime.commands._late import shown
from moedge.runtime.commands._options import Device, HoldoutEvery, Json, Save, Threads
from moedge.runtime.commands._questions import Limit, Shots, TaskData, Tasks, questions
from moedge.runtime.progress import single
from moedge.runtime.run import run_folder
from moedge.runtime.run.scores import Evaluation, scores
from moedge.runtime.tables import Sheet


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints, dense models, bundles, engines, or a run folder (its dense and MoE model)."),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Perplexity on this text: asset:NAME or a file (may be repeated); asset:wiki by default."),
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    shots: Shots = 0,
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 8192,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window; windows do not overlap.")] = 512,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Start every window with the begin-of-sequence token; as the tokenizer does, if neither is given.",
        ),
    ] = None,
    holdout_every: HoldoutEvery = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or questions per forward pass.")] = 4,
    threads: Threads = None,
    device: Device = "cpu",
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on held-out text and accuracy on lm-eval tasks (needs moedge\\[eval]), all from local data.

    Answers of each model are set beside the first one's, and a bundle's beside those of the checkpoint before it.

    Bundles may carry a library of operators, and engines kernels: native code. Open only those whose origin you trust.

    \b
    Examples:
      moedge evaluate runs/smollm2-135m --text asset:wiki --text asset:c4
      moedge evaluate ./my-llama build/moe --tasks arc_easy,piqa,sciq --limit 200
      moedge evaluate ./my-llama build/moe build/bundles/ort-cpu-int8 --tasks hellaswag
    """
    run_folder.check_results({"--save": save}, [*models, *(text or [])])
    asked = questions(tasks, task_data, shots, limit)
    evaluation = Evaluation(
        texts=text or ([] if asked.tasks else ["asset:wiki"]),
        questions=asked,
        tokens=tokens,
        window=window,
        bos=bos,
        holdout_every=holdout_every,
        batch_size=batch_size,
        device=device,
        threads=threads,
    )
    with single("evaluate", ", ".join(map(str, models))) as reporter:
        result = scores(models, evaluation, progress=reporter.progress, note=reporter.note)
    result |= {"created": created(), "commit": commit(), "machine": machine()}
    with shown(result, _print, as_json=as_json):
        if save is not None:
            write_json(save, result)


def _print(result: dict[str, Any]) -> None:
    console = Console()
    if result["protocol"]["documents"]:
        _print_perplexity(console, result)
    if result["rows"][0]["tasks"]:
        _print_tasks(console, result)
    _print_paired(console, result["paired"])


def _print_perplexity(console: Console, result: dict[str, Any]) -> None:
    protocol, rows = result["protocol"], result["rows"]
    names = list(protocol["documents"])
    behind = [row["model"] for row in rows if row["bos"]]
    start = f" (BOS first: {', '.join(behind)})" if behind else ""
    if len(behind) == len(rows):
        start = " that start with BOS"
    table = Sheet(title=escape(f"perplexity, windows of {protocol['window']} tokens{start}"))
    table.add_column("model")
    table.add_column("runs on")
    for name in names:
        table.add_column(escape(name), justify="right")
    table.add_column("FFN weights read", justify="right")
    for row in rows:
        found = [row["perplexity"][name] for name in names]
        shares = [one["ffn_read_share"] for one in found if one["ffn_read_share"] is not None]
        read = f"{sum(shares) / len(shares):.1%}" if shares else "not counted"
        engine = f"{row['engine']['runtime']}, {row['engine']['dtype']}"
        table.add_row(escape(row["model"]), escape(engine), *(f"{one['ppl']:.4g}" for one in found), read)
    console.print(table)
    for name, documents in protocol["documents"].items():
        scored = rows[0]["perplexity"][name]["tokens"]
        console.print(escape(f"{name}: {documents}; {scored:,} tokens scored"), highlight=False, soft_wrap=True)


def _print_tasks(console: Console, result: dict[str, Any]) -> None:
    rows = result["rows"]
    table = Sheet(title=f"lm-eval tasks, {result['protocol']['shots']} shots")
    for column in ("task", "questions", "metric", *(row["model"] for row in rows)):
        table.add_column(escape(column), justify="right" if column == "questions" else "left")
    for number, task in enumerate(rows[0]["tasks"]):
        for metric in task["metrics"]:
            values = [row["tasks"][number]["metrics"][metric] for row in rows]
            shown = [
                f"{value['value']:.4f}" + (f" ± {value['stderr']:.4f}" if value["stderr"] is not None else "")
                for value in values
            ]
            table.add_row(escape(task["task"]), f"{task['questions']:,}", escape(metric), *shown)
    console.print(table)
    for task in rows[0]["tasks"]:
        note = f"{task['task']}: lm-eval version {task['version']}, {task['shots']} shots, data {task['data']}"
        console.print(escape(note), highlight=False, soft_wrap=True)


def _print_paired(console: Console, pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        console.print(
            escape(f"\nanswers of {pair['test']} beside {pair['reference']}:"), highlight=False, soft_wrap=True
        )
        table = Sheet()
        for column in ("task", "questions", "same answer", "accuracy", "drop", "drop, 95 %", "McNemar p"):
            table.add_column(column, justify="left" if column == "task" else "right")
        together = {"all": pair["overall"]} if len(pair["tasks"]) > 1 else {}
        for task, found in {**pair["tasks"], **together}.items():
            low, high = found["drop_interval"]
            table.add_row(
                escape(task),
                f"{found['questions']:,}",
                f"{found['agreement']:.1%}",
                f"{found['test_accuracy']:.1%}",
                f"{found['drop']:+.2%}",
                f"{low:+.2%} to {high:+.2%}",
                f"{found['mcnemar_p']:.2g}",
            )
        console.print(table)
