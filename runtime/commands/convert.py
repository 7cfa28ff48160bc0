"""``moedge convert``: a dense model becomes a checkpoint that reads fewer weights for a token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge.configs.recipe import Conversion, conversion_from
from moedge.convert import processes
from moedge.runtime.commands._options import Device, Force, Model, Settings
from moedge.runtime.commands._settings import parse_settings, positions
from moedge.runtime.progress import single
from moedge.runtime.run import run_folder, stages
from moedge.runtime.run.conversion import one_message, write_checkpoint


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the converted checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="asset:NAME or a text file in UTF-8 (.jsonl, or a document a line), asset:wiki by default; several "
            "texts (may be repeated) share the windows."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 8,
    length: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens per calibration window; 2048, or what the model takes."),
    ] = None,
    method: Annotated[str, typer.Option(help="Conversion method; `moedge methods` lists them.")] = "cmoe",
    settings: Settings = None,
    shared: Annotated[int | None, typer.Option(min=0, help="Always-on experts; cmoe: 6.")] = None,
    active: Annotated[int | None, typer.Option(min=1, help="Routed experts that run for a token; cmoe: 6.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=2, help="Experts in all; must divide the FFN width; cmoe: 16.")
    ] = None,
    k_a: Annotated[
        int | None, typer.Option("--k-a", min=1, help="Strongest neurons that a token marks; cmoe: 10.")
    ] = None,
    padding: Annotated[
        str | None, typer.Option(help="'uneven' allows a width that the experts do not divide; 'none' by default.")
    ] = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Convert a dense model: leave out small values, or cut its FFNs into experts.

    The result is a Hugging Face folder (config.json, safetensors, tokenizer) plus plan.json, and works with
    AutoModelForCausalLM after `import moedge.convert.modeling`.

    \b
    Examples:
      moedge convert asset:smollm2-135m-instruct build/moe --method gather --set share=.55
      moedge convert asset:smollm2-135m-instruct build/moe
      moedge convert ./my-llama build/moe --text my.txt --shared 3 --active 3 --experts 8
      moedge convert ./my-llama build/moe --method moedge --device cuda
      moedge convert ./my-llama build/moe --method expertweaver --set experts=32 --set k=24
      moedge convert ./my-llama build/moe --method moedge --set gather.share=.6
      torchrun --nproc-per-node 2 -m moedge convert ./my-llama build/moe --method moedge
    """
    named = {"shared": shared, "active": active, "experts": experts, "k_a": k_a, "padding": padding}
    processes.start(device)
    with one_message():
        recipe = conversion_from(
            {
                "name": "convert",
                "model": {"source": model, "revision": revision, "device": device},
                "text": {"calibration": text or ["asset:wiki"]},  # nothing is measured here
                "calibration": {"windows": windows, "length": length or min(2048, positions(model) or 2048)},
                "convert": {"method": method, **parse_settings(settings or [], named)},
            },
            where=_WHERE,
            called=_option,
        )
        _write(recipe, model, out, force=force)


def _write(recipe: Conversion, model: str, out: Path, *, force: bool) -> None:
    def check(config: dict[str, Any]) -> None:
        recipe.check_model(config, _WHERE, called=_option)

    if processes.rank():  # the first process writes, and speaks
        write_checkpoint(recipe, out, force=force, check=check, progress=lambda *_: None, note=lambda _: None)
        return
    with single("convert", f"{model} -> {out}") as reporter:
        write_checkpoint(recipe, out, force=force, check=check, progress=reporter.progress, note=reporter.note)
    plan = run_folder.read_json(out / "plan.json")
    read = plan["provenance"].get("gather")
    measured = f", measured to read {read['share']:.1%}" if read else ""
    said = f"{out}: {stages.notation(recipe.convert.model_dump())}{measured}, plan {plan['sha256']}"
    Console().print(escape(said), highlight=False, soft_wrap=True)


_WHERE = "moedge convert"
_OPTIONS = {
    "calibration.length": "--length",
    "calibration.windows": "--windows",
    "model.device": "--device",
    "model.revision": "--revision",
    "text.calibration": "--text",
} | {f"convert.{name}": f"--{name}" for name in ("active", "experts", "method", "padding", "shared")}
"""What this command calls the keys of a recipe; other parameters of a method are given by ``--set``."""


def _option(setting: str) -> str:
    """Return what the user of this command writes for a recipe's key, or for ``key: value``."""
    key, colon, value = setting.partition(": ")
    key = key.partition("[")[0] if key.startswith("text.calibration[") else key  # one of several texts
    if key in _OPTIONS:
        return f"{_OPTIONS[key]} {value}" if colon else _OPTIONS[key]
    name = key.removeprefix("convert.")
    return key if name == key else f"--set {name}" + (f"={value}" if colon else "")
