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
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.tables import Sheet

SCHEMA = "moedge.scores/1"


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
    from moedge.convert import evaluate as quality
    from moedge.convert import modeling, sources
    from moedge.convert.plan import MoEPlan
    from moedge.convert.tasks import run

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    data = dict(_assignment(given) for given in task_data or [])
    if unused := set(data) - set(names):
        raise MoEdgeError(f"--task-data names {', '.join(sorted(unused))}, which --tasks does not.")
    folders = _models(models)
    plans = {label: MoEPlan.load(folder) for label, folder in folders.items() if (folder / "plan.json").is_file()}
    chosen = {}
    for spec in text or ([] if names else ["asset:wiki"]):
        read, how = held_out.beside(plans.values(), spec, holdout_every)
        chosen[read.name] = (read, how)
    rows: list[dict[str, Any]] = []
    count = -(-tokens // window)
    with single("evaluate", ", ".join(folders)) as reporter:
        for label, folder in folders.items():
            if label in plans:
                model, _, tokenizer = modeling.load(folder, device=device)
            else:
                folder = sources.resolve(str(folder)).folder
                model, tokenizer = sources.load_model(folder, device=device), sources.load_tokenizer(folder)
            if chosen:
                held_out.check_window(model, window, "--window")
            row: dict[str, Any] = {"model": label, "perplexity": {}, "tasks": []}
            for name, (read, _) in chosen.items():
                reporter.note(f"{label}: perplexity on {name}")
                windows = held_out.windows(tokenizer, read, window, count, bos=bos, name="evaluation")
                row["perplexity"][name] = quality.perplexity(
                    model, windows, batch_size=batch_size, progress=reporter.progress
                )
            if names:
                reporter.note(f"{label}: {', '.join(names)}")
                row["tasks"] = run(model, tokenizer, names, data=data, shots=shots, limit=limit, batch_size=batch_size)
            dtype = str(model.dtype).removeprefix("torch.")
            rows.append(row)
            del model
    protocol = {
        "window": window,
        "bos": bos,
        "dtype": dtype,
        "device": device,
        "documents": {name: how for name, (_, how) in chosen.items()},
        "shots": shots,
        "limit": limit,
    }
    result = {"schema": SCHEMA, "protocol": protocol, "rows": rows}
    if save is not None:
        write_json(save, result)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)


def _models(paths: list[Path]) -> dict[str, Path]:
    """Label -> folder; a run folder stands for its dense parent and its checkpoint."""
    found: dict[str, Path] = {}
    for path in paths:
        if run_folder.is_run(path):
            found |= {f"{path} dense": run_folder.dense(path), f"{path} moe": run_folder.checkpoint(path)}
        else:
            found[str(path)] = path
    return found


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
        for row in rows:
            table.add_row(escape(row["model"]), *(f"{row['perplexity'][name]['ppl']:.4g}" for name in names))
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
