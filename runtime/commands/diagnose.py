"""``moedge diagnose``: what the routers of a converted model do, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import write_bytes, write_json
from moedge.runtime.commands._late import shown
from moedge.runtime.commands._options import Device, HoldoutEvery, Json, Save
from moedge.runtime.engines.given import existing
from moedge.runtime.progress import single
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.tables import Sheet

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from moedge.convert.plan import MoEPlan
    from moedge.runtime.progress import Reporter


def diagnose(
    path: Annotated[Path, typer.Argument(help="MoE checkpoint or run folder.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="asset:NAME or a text file in UTF-8 (may be repeated); asset:wiki by default."),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense parent to measure errors against; a run folder knows its own.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 4096,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    holdout_every: HoldoutEvery = 10,
    stability: Annotated[
        bool, typer.Option("--stability", help="Convert again on halves and on each text; compare the partitions.")
    ] = False,
    k_a: Annotated[
        int, typer.Option("--k-a", min=1, help="A neuron is dead when no token has it among its k-a strongest.")
    ] = 10,
    device: Device = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Also draw the first text to this .svg or .png file.")] = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Show what the routers do: agreement with the best choice, load, dead neurons, errors, partition stability.

    \b
    Examples:
      moedge diagnose runs/smollm2-135m-cmoe
      moedge diagnose build/moe --dense ./my-llama --text my.txt --text other.txt --stability --plot routing.svg
    """
    folder = run_folder.converted(path) if run_folder.is_run(path) else path
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise MoEdgeError(f"--plot {plot}: write a .svg or .png file.")
    run_folder.check_results({"--save": save, "--plot": plot}, [folder, *(text or []), *([dense] if dense else [])])
    if stability and dense is None and not run_folder.is_run(path):
        raise MoEdgeError("--stability converts again, which needs the dense parent: give it with --dense.")
    if not (folder / "plan.json").is_file():
        raise MoEdgeError(f"{existing(path)} is neither a run folder nor a MoE checkpoint; `moedge convert` makes one.")
    _check_routed(path, folder)
    texts = _Texts(text or ["asset:wiki"], tokens, window, holdout_every)
    with single("diagnose", str(path)) as reporter:
        result = _diagnose(path, folder, dense, texts, k_a, device, reporter, stability=stability)
    with shown(result, _print, as_json=as_json):
        if save is not None:
            write_json(save, result)
        if plot is not None:
            _draw(result["texts"], plot)


def _check_routed(path: Path, folder: Path) -> None:
    """Refuse the checkpoint ``folder`` of ``path`` when no layer chooses among experts: every column would be empty."""
    from moedge.convert.plan import MoEPlan

    plan = MoEPlan.load(folder)
    if not any(layer.num_experts or layer.children for layer in plan.layers):
        raise MoEdgeError(
            f"{path} has no routers to diagnose (method {plan.method}); `moedge evaluate` says what it reads and loses."
        )


@dataclass(frozen=True)
class _Texts:
    """What is read: ``tokens`` of each text in windows of ``window``, of a known text every ``every``th document."""

    specs: list[str]
    tokens: int
    window: int
    every: int


def _diagnose(
    path: Path,
    folder: Path,
    dense: str | None,
    texts: _Texts,
    k_a: int,
    device: str,
    reporter: Reporter,
    *,
    stability: bool,
) -> dict[str, Any]:
    """Diagnose the checkpoint ``folder`` of ``path`` on each text; JSON of the diagnostics' schema."""
    from moedge.convert import calibration, diagnostics, modeling

    model, plan, tokenizer = modeling.load(folder, device=device)
    parent = _parent(path, dense, plan, device, reporter)
    window, count = texts.window, -(-texts.tokens // texts.window)
    bos = calibration.starts_with_bos(tokenizer)
    found: dict[str, Any] = {}
    windows = {}
    for spec in texts.specs:
        read, how = held_out.beside([plan], spec, texts.every)
        held_out.check_window(model, window, "--window")
        name = held_out.own_name(read.name, found)
        windows[name] = held_out.windows(tokenizer, read, window, count, bos=bos, name="diagnosed")
        reporter.note(f"{name}: {how}")
        result = diagnostics.diagnose(model, windows[name], dense_model=parent, k_a=k_a, progress=reporter.progress)
        found[name] = {"documents": how, **result}
    again = None
    if stability:
        assert parent is not None
        again = _stability(parent, plan, windows, reporter)
    return {
        "schema": diagnostics.DIAGNOSTICS_SCHEMA,
        "plan_sha256": plan.sha256,
        "method": plan.method,
        "protocol": {"window": window, "bos": bos, "k_a": k_a, "dtype": str(model.dtype).removeprefix("torch.")},
        "texts": found,
        "stability": again,
    }


def _parent(path: Path, dense: str | None, plan: MoEPlan, device: str, reporter: Reporter) -> PreTrainedModel | None:
    """The dense parent: the one that was named, else that of the run folder, else None."""
    from moedge.convert import sources

    if dense is None:
        return sources.load_model(run_folder.dense(path), device=device) if run_folder.is_run(path) else None
    given = sources.resolve(dense)
    if not plan.made_of(given.sha256):
        reporter.note(f"{dense} is not the folder that was converted (its files differ); errors are against it")
    return sources.load_model(given.folder, device=device)


def _draw(texts: dict[str, Any], plot: Path) -> None:
    """Draw the first text."""
    from moedge.runtime.report import diagnosis

    first = next(iter(texts))
    write_bytes(plot, diagnosis.draw(first, texts[first], plot.suffix[1:]))


def _stability(
    parent: PreTrainedModel, plan: MoEPlan, windows: dict[str, np.ndarray], reporter: Reporter
) -> list[dict[str, Any]]:
    """Convert again from the two halves of the first text, and from each text; compare the partitions."""
    from moedge.convert import diagnostics

    first, ids = next(iter(windows.items()))
    half = len(ids) // 2
    if half < 2:
        raise MoEdgeError(f"--stability: {len(ids)} windows are too few to halve; raise --tokens to 4 windows or more.")
    parts = {f"{first} 1/2": ids[:half], f"{first} 2/2": ids[half : 2 * half]}
    found = []
    for group in (parts, windows if len(windows) > 1 else {}):
        plans = {}
        for name, part in group.items():
            reporter.note(f"converting again on {name}")
            plans[name] = diagnostics.replan(parent, plan, part)
        found += diagnostics.stability(plans)
    return found


def _print(result: dict[str, Any]) -> None:
    console = Console()
    for name, text in result["texts"].items():
        protocol = result["protocol"]
        console.print(
            escape(
                f"{result['method']} on {name} ({text['documents']}; {text['tokens']:,} tokens, window "
                f"{protocol['window']}, {protocol['dtype']}); errors against {text['reference']}"
            ),
            highlight=False,
            soft_wrap=True,
        )
        table = Sheet()
        columns = ("layer", "k of E", "agree", "capt.", "load CV", "dead E", "dead n")
        for column in (*columns, "router", "oracle", "random", "static"):
            table.add_column(column, justify="right")
        for layer in [*text["layers"], {"layer": "mean", **text["mean"]}]:
            shape = f"{layer['top_k']} of {layer['experts']}" if "experts" in layer else ""
            table.add_row(
                str(layer["layer"]),
                shape,
                _percent(layer["agreement"]),
                _percent(layer["captured"]),
                _number(layer["load_cv"]),
                str(layer.get("dead_experts", "")),
                _percent(layer["dead_neurons"]),
                *(_number(layer["relative_error"][who]) for who in ("router", "oracle", "random", "static")),
                style="bold" if layer["layer"] == "mean" else "",
            )
        console.print(table)
        chance = text["mean"]["agreement_by_chance"]
        if chance is not None:
            notes = (
                f"agree: share of the best experts (oracle) that are chosen, by chance {chance:.1%}; capt.: their value"
            )
            console.print(
                f"{notes} over that of the best; dead E, n: experts, neurons that no token uses", soft_wrap=True
            )
        console.print("router, oracle, random, static: relative error when it chooses the experts", soft_wrap=True)
    for entry in result["stability"] or []:
        shown = [
            f"{name} {part['mean']:.3f} (by chance {part['by_chance']:.3f})"
            for name in ("shared", "experts")
            if (part := entry[name]) is not None
        ]
        console.print(escape(f"Jaccard {' / '.join(entry['between'])}: {', '.join(shown)}"), highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
