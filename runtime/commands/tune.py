"""``moedge tune``: from a wanted speed or loss to a checked bundle in one command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.configs.recipe import load_recipe, recipe_from
from moedge.export import targets
from moedge.runtime.bench.machine import machine
from moedge.runtime.commands._options import Json, Model
from moedge.runtime.progress import Reporter
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet
from moedge.runtime.tune.search import Goal

_HERE = targets.names(lambda row: row.engine is None)


def tune(
    model: Model,
    target: Annotated[str, typer.Option(help=f"One of {', '.join(_HERE)}.")] = "ort-cpu",
    speedup: Annotated[float | None, typer.Option(help="Wanted decode speed over the dense parent, e.g. 1.3.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Most KL to the dense parent, nats a token, e.g. 0.1.")] = None,
    max_ratio: Annotated[float | None, typer.Option(help="Most perplexity over the dense parent's, e.g. 1.05.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose texts, lengths and rounds are used, and its gather if it has one."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/tune-<model>-<target> by default.")] = None,
    as_json: Json = False,
) -> int:
    """Find how much of the FFN weights to read for a wanted speed or loss; convert, export, verify and time it.

    Give one of --speedup, --max-kl and --max-ratio. Exits with 1 when the goal was not reached or a check failed.

    \b
    Examples:
      moedge tune asset:smollm2-135m-instruct --target ort-cpu-int8 --speedup 1.3
      moedge tune ./my-llama --target ort-cpu --max-ratio 1.05 --out runs/tuned
      moedge tune ./my-llama --max-kl 0.1 --recipe my-recipe.yaml
    """
    from moedge.runtime.tune.work import Tuning

    goal = _goal(speedup, max_kl, max_ratio)
    if targets.find(target).engine is not None:
        raise MoEdgeError(f"--target {target} runs on a device only; name a target that this machine executes.")
    base = _sections(recipe)
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._") or "model"
    name = f"tune-{slug}-{target}"[:64]
    wanted = recipe_from({**base, "name": name, "model": {"source": model}}, where="moedge tune")
    root = out or Path("runs") / name
    run_folder.check_free(root)
    reporter = Reporter(Console(stderr=True))
    with reporter.show():
        result = Tuning(wanted, target, goal, root, machine(), reporter).run()
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        show(result, root, Console())
    return 0 if result["reached"] and result["verified"] == "passed" else 1


def _sections(recipe: str | None) -> dict[str, Any]:
    """The sections of a recipe but the model; without one the texts and the gather of the packaged recipe."""
    if recipe is not None:
        return load_recipe(recipe).model_dump(mode="json", exclude={"model"})
    base = load_recipe("smollm2-135m").model_dump(mode="json", include={"text", "calibration", "convert"})
    base["calibration"]["bos"] = False  # not every tokenizer has such a token
    return base


def _goal(speedup: float | None, max_kl: float | None, max_ratio: float | None) -> Goal:
    """Read the one goal.

    Raises:
        MoEdgeError: there is none, or more than one, or it asks for nothing.
    """
    given = [(kind, value) for kind, value in (("speedup", speedup), ("kl", max_kl), ("ratio", max_ratio)) if value]
    if len(given) != 1:
        raise MoEdgeError("Give one of --speedup, --max-kl and --max-ratio.")
    kind, value = given[0]
    return Goal(kind, value)  # type: ignore[arg-type]


_WORDS = {"speedup": "decode speed-up", "kl": "KL", "ratio": "perplexity ratio"}


def show(result: dict[str, Any], root: Path, console: Console) -> None:
    """Print the tries, what was predicted and what came out."""
    goal = result["goal"]
    if ffn := result["dense_decode"]:
        console.print(
            f"dense parent on {result['target']}: {ffn['ms']:.2f} ms a token, of which the FFNs take "
            f"{ffn['ffn_ms']:.2f} ms ({ffn['part']:.0%})",
            highlight=False,
        )
    sheet = Sheet(
        title=f"{_WORDS[goal['kind']]}, {'at least' if goal['kind'] == 'speedup' else 'at most'} {goal['limit']:g}"
    )
    for title in ("weights to read", "predicted", "measured"):
        sheet.add_column(title, justify="right")
    for one in result["tries"]:
        predicted = "" if one["predicted"] is None else f"{one['predicted']:.3f}"
        kept = one["share"] == result["share"]
        sheet.add_row(f"{one['share']:.1%}", predicted, f"{one['value']:.3f}", style="bold" if kept else "")
    console.print(sheet)

    def within(found: dict[str, Any], digits: int) -> str:
        low, high = found["ci95"]
        return f"{found['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    lines = [
        f"{'reached' if result['reached'] else 'NOT reached'}: reads {result['ffn_read_share']:.1%} of the FFN weights",
        f"decode {within(result['decode_speedup'], 2)} times the dense parent, prompt "
        f"{within(result['prompt_speedup'], 2)} times",
        f"KL {within(result['kl'], 3)}, perplexity ratio {within(result['ppl_ratio'], 3)} (in brackets 95 % intervals)",
        f"ONNX against PyTorch: {result['verified']}",
    ]
    for line in lines:
        console.print(escape(line), highlight=False)
    for kind in ("checkpoint", result["target"]):
        console.print(escape(f"{kind}: {root / 'tuned' / kind}"), highlight=False, soft_wrap=True)
