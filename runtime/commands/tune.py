"""``moedge tune``: from a wanted speed or loss to a checked bundle in one command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import digest
from moedge.configs import devices
from moedge.configs.devices import Device
from moedge.configs.recipe import (
    BenchSection,
    EvaluateSection,
    ExportSection,
    VerifySection,
    load_recipe,
    recipe_from,
)
from moedge.export import targets
from moedge.runtime.bench.machine import machine
from moedge.runtime.commands._options import Json, Model
from moedge.runtime.commands._settings import positions
from moedge.runtime.progress import Reporter
from moedge.runtime.report.text import within
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet
from moedge.runtime.tune.search import Goal

if TYPE_CHECKING:
    from moedge.runtime.tune.device import ParentTime

_HERE = targets.names(lambda row: row.engine is None)


def tune(
    model: Model,
    target: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(_HERE)}; ort-cpu by default. With --for one of the device.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Wanted decode speed over the dense parent, e.g. 1.3.")] = None,
    max_ms: Annotated[float | None, typer.Option(help="Most milliseconds a token at batch 1, e.g. 15.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Most KL to the dense parent, nats a token, e.g. 0.1.")] = None,
    max_ratio: Annotated[float | None, typer.Option(help="Most perplexity over the dense parent's, e.g. 1.05.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose texts, lengths and rounds are used, and its gather if it has one."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="PROFILE",
            help="Device profile, a name or a .yaml file: times are predicted, not measured.",
        ),
    ] = None,
    weigh: Annotated[
        Literal["weights", "milliseconds"],
        typer.Option(
            help="What KL is weighed against in each product: weights that are read, or milliseconds timed here."
        ),
    ] = "weights",
    device_result: Annotated[
        Path | None, typer.Option(help="bench-result.json of that device with the dense parent's times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/tune-<model>-<target>-<goal> by default.")] = None,
    as_json: Json = False,
) -> int:
    """Find how much of the FFN weights to read for a wanted speed or loss; convert, export, verify and time it.

    Give one of --speedup, --max-ms, --max-kl and --max-ratio. Exits with 1 when the goal was not reached or a check
    failed; with --for a speed counts as reached when it is predicted.

    \b
    Examples:
      moedge tune asset:smollm2-135m-instruct --target ort-cpu-int8 --speedup 1.3
      moedge tune ./my-llama --target ort-cpu --max-ratio 1.05 --out runs/tuned
      moedge tune ./my-llama --max-kl 0.1 --recipe my-recipe.yaml
      moedge tune ./my-llama --target ort-cpu-int8 --speedup 1.2 --weigh milliseconds
      moedge tune ./my-llama --max-ms 15 --for jetson-agx-thor
    """
    from moedge.runtime.tune.device import DeviceTuning
    from moedge.runtime.tune.work import Tuning

    goal = _goal(speedup=speedup, ms=max_ms, kl=max_kl, ratio=max_ratio)
    device, timed = _device(profile, device_result)
    target = _target(target, device)
    timed_here = _times_products(weigh, target, device)
    base = _sections(recipe, positions(model))
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._") or "model"
    name = _folder(slug, target, device, goal)
    wanted = recipe_from({**base, "name": name, "model": {"source": model}}, where="moedge tune")
    root = out or Path("runs") / name
    run_folder.check_free(root)
    reporter = Reporter(Console(stderr=True))
    with reporter.show():
        given = (wanted, target, goal, root, machine(), reporter)
        tuning = DeviceTuning(*given, device, timed) if device else Tuning(*given, times_products=timed_here)
        result = tuning.run()
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        show(result, root, Console())
        if device:
            _show_next(device, target, root, Console())
    return 0 if result["reached"] and result["verified"] == "passed" else 1


def _folder(slug: str, target: str, device: Device | None, goal: Goal) -> str:
    """Return a name for each goal: in one folder a second goal would replace what the first has found."""
    found = "-".join(["tune", slug, target, *([device.name] if device else []), goal.kind, f"{goal.limit:g}"])
    found = found.replace("+", "")
    return found if len(found) <= 64 else f"{found[:57]}-{digest(found)[:6]}"


def _sections(recipe: str | None, positions: int | None) -> dict[str, Any]:
    """The sections of a recipe but the model; without one the texts and the gather of the packaged recipe.

    Lengths that nobody asked for fit into the ``positions`` of a short model; None: they are not known yet.
    """
    if recipe is not None:
        return load_recipe(recipe).model_dump(mode="json", exclude={"model"})
    base = load_recipe("smollm2-135m").model_dump(mode="json", include={"text", "calibration", "convert"})
    if positions is not None and positions < ExportSection().max_length:
        window = min(VerifySection().window, positions)
        base["calibration"]["length"] = min(base["calibration"]["length"], positions)
        base |= {
            "export": {"max_length": positions},
            "evaluate": {"window": min(EvaluateSection().window, positions)},
            "verify": {"window": window, "prefill": min(VerifySection().prefill, window * 7 // 8)},
            "bench": {
                "prompt": min(BenchSection().prompt, positions // 2),
                "decode": min(BenchSection().decode, positions // 4),
            },
        }
    return base


def _device(name: str | None, result: Path | None) -> tuple[Device | None, ParentTime | None]:
    """Read the device profile, and what a token of the dense parent took there."""
    from moedge.runtime.tune.device import parent_time

    if name is None and result is not None:
        raise MoEdgeError("--device-result is of a device; name its profile with --for.")
    device = devices.load(name) if name else None
    return device, parent_time(result, device) if device and result else None


def _target(name: str | None, device: Device | None) -> str:
    """Return the target that is meant.

    Raises:
        MoEdgeError: it runs on devices alone and none is given, or it skips no weights on the one that is.
    """
    from moedge.runtime.tune.device import target_for

    if device is not None:
        return target_for(device, name)
    found = name or "ort-cpu"
    if targets.find(found).engine is not None:
        raise MoEdgeError(
            f"--target {found} runs on a device only; name its profile with --for, and times are predicted."
        )
    return found


def _times_products(weigh: str, target: str, device: Device | None) -> bool:
    """Return whether KL is weighed against milliseconds of products, which are timed here.

    Raises:
        MoEdgeError: that is asked for, and the target has no operators of ours on this machine.
    """
    wanted = weigh == "milliseconds"
    if wanted and (device is not None or not targets.find(target).own_operators):
        names = ", ".join(targets.names(lambda row: row.own_operators))
        raise MoEdgeError(f"--weigh milliseconds times products on this machine, in {names} alone; take one of them.")
    return wanted


def _goal(**given: float | None) -> Goal:
    """Read the one goal.

    Raises:
        MoEdgeError: there is none, or more than one, or it asks for nothing.
    """
    wanted = [(kind, value) for kind, value in given.items() if value is not None]
    if len(wanted) != 1:
        raise MoEdgeError("Give one of --speedup, --max-ms, --max-kl and --max-ratio.")
    ((kind, value),) = wanted
    return Goal(kind, value)  # type: ignore[arg-type]


_WORDS = {"speedup": "decode speed-up", "ms": "milliseconds a token", "kl": "KL", "ratio": "perplexity ratio"}


def show(result: dict[str, Any], root: Path, console: Console) -> None:
    """Print the tries, what was predicted and what came out."""
    goal, device = result["goal"], result.get("device")
    title = f"{_WORDS[goal['kind']]}, {'at least' if goal['kind'] == 'speedup' else 'at most'} {goal['limit']:g}"
    if ffn := result.get("dense_decode"):
        console.print(
            f"dense parent on {result['target']}: {ffn['ms']:.2f} ms a token, of which the FFNs take "
            f"{ffn['ffn_ms']:.2f} ms ({ffn['part']:.0%})",
            highlight=False,
        )
    if result["tries"]:
        console.print(_tries(result, title))
    else:
        console.print(title, highlight=False)
    if result.get("weighed") == "milliseconds":
        console.print("KL was weighed against milliseconds of the model's products, timed here", highlight=False)
    lines = [
        f"{'reached' if result['reached'] else 'NOT reached'}: reads {result['ffn_read_share']:.1%} of the FFN weights",
        *(_predicted(result["target"], device) if device else _timed(result)),
        f"KL {within(result['kl'])}, perplexity ratio {within(result['ppl_ratio'])} (brackets: 95 % intervals)",
        f"ONNX against PyTorch: {result['verified']}",
    ]
    for line in lines:
        console.print(escape(line), highlight=False)
    for kind in ("checkpoint", "portable" if device else result["target"]):
        console.print(escape(f"{kind}: {root / 'tuned' / kind}"), highlight=False, soft_wrap=True)


def _tries(result: dict[str, Any], title: str) -> Sheet:
    sheet = Sheet(title=title)
    for title in ("weights to read", "predicted", "measured"):
        sheet.add_column(title, justify="right")
    for one in result["tries"]:
        predicted = "" if one["predicted"] is None else f"{one['predicted']:.3f}"
        kept = one["share"] == result["share"]
        sheet.add_row(f"{one['share']:.1%}", predicted, f"{one['value']:.3f}", style="bold" if kept else "")
    return sheet


def _timed(result: dict[str, Any]) -> list[str]:
    found = result | {"parent": result["dense"]["tpot_ms"]}
    names = ("decode_speedup", "prompt_speedup", "tpot_ms", "parent")
    decode, prompt, ms, parent = (within(found[name], "{:.2f}") for name in names)
    return [
        f"decode {decode} times the dense parent, prompt {prompt} times",
        f"{ms} ms a token, the dense parent {parent}",
    ]


def _predicted(target: str, device: dict[str, Any]) -> list[str]:
    of = "timed on the device" if device["dense_timed"] else "the least that its bandwidth and arithmetic allow"
    return [
        f"PREDICTED, nothing was timed: {target} on {device['label']}, {device['context']} tokens in the cache:",
        f"{device['ms']:.2f} ms a token, {device['dense_ms'] / device['ms']:.2f} times the dense parent "
        f"({device['dense_ms']:.2f} ms, {of})",
    ]


def _show_next(device: Device, target: str, root: Path, console: Console) -> None:
    from moedge.runtime.tune.device import next_step

    console.print(escape(f"next: {next_step(device, target, root)}"), highlight=False, soft_wrap=True)
