"""``moedge evaluate``: perplexity on held-out text and lm-eval tasks, of dense and converted models side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.runtime.commands._options import Device, HoldoutEvery, Json, Save
from moedge.runtime.progress import single
from moedge.runtime.run.scores import scores
from moedge.runtime.tables import Sheet


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
    holdout_every: HoldoutEvery = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or questions per forward pass.")] = 4,
    device: Device = "cpu",
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on held-out text and accuracy on lm-eval tasks (needs moedge\\[eval]), all from local data.

    \b
    Examples:
      moedge evaluate runs/smollm2-135m --text asset:wiki --text asset:c4
      moedge evaluate ./my-llama build/moe --tasks arc_easy,piqa,sciq --limit 200
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    with single("evaluate", ", ".join(map(str, models))) as reporter:
        result = scores(
            models,
            texts=text or ([] if names else ["asset:wiki"]),
            tasks=names,
            task_data=dict(map(_assignment, task_data or [])),
            shots=shots,
            limit=limit,
            tokens=tokens,
            window=window,
            bos=bos,
            every=holdout_every,
            batch_size=batch_size,
            device=device,
            progress=reporter.progress,
            note=reporter.note,
        )
    if save is not None:
        write_json(save, result)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)


def _assignment(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise MoEdgeError(f"--task-data {text}: write TASK=FILE, for example --task-data sciq=my.jsonl.")
    return name, Path(path).expanduser()


def _print(result: dict[str, Any]) -> None:
    console, protocol, rows = Console(), result["protocol"], result["rows"]
    names = list(protocol["documents"])
    if names:
        table = Sheet(title=f"perplexity, windows of {protocol['window']} tokens, {protocol['dtype']}")
        table.add_column("model")
        for name in names:
            table.add_column(escape(name), justify="right")
        table.add_column("FFN weights read", justify="right")
        for row in rows:
            found = [row["perplexity"][name] for name in names]
            shares = [one["ffn_read_share"] for one in found if one["ffn_read_share"] is not None]
            read = f"{sum(shares) / len(shares):.1%}" if shares else "not counted"
            table.add_row(escape(row["model"]), *(f"{one['ppl']:.4g}" for one in found), read)
        console.print(table)
        for name, documents in protocol["documents"].items():
            scored = rows[0]["perplexity"][name]["tokens"]
            console.print(escape(f"{name}: {documents}; {scored:,} tokens scored"), highlight=False, soft_wrap=True)
    if rows[0]["tasks"]:
        table = Sheet(title=f"lm-eval tasks, {protocol['shots']} shots, {protocol['dtype']}")
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
