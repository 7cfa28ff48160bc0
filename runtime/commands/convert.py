"""``moedge convert``: a dense model becomes a MoE checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.configs.recipe import recipe_from
from moedge.runtime.commands._options import Device, Force, Model, Settings, Text
from moedge.runtime.commands._settings import parse_settings
from moedge.runtime.progress import single
from moedge.runtime.run import stages
from moedge.runtime.run.conversion import write_checkpoint


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the MoE checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    text: Text = "asset:wiki",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens per calibration window.")] = 2048,
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
    """Turn a dense model into a Mixture-of-Experts checkpoint.

    The result is a Hugging Face folder (config.json, safetensors, tokenizer) plus plan.json, and works with
    AutoModelForCausalLM after `import moedge.convert.modeling`.

    \b
    Examples:
      moedge convert asset:smollm2-135m-instruct build/moe
      moedge convert ./my-llama build/moe --text my.txt --shared 3 --active 3 --experts 8
      moedge convert ./my-llama build/moe --method moedge --device cuda
      moedge convert ./my-llama build/moe --method expertweaver --set experts=32 --set k=24
    """
    named = {"shared": shared, "active": active, "experts": experts, "k_a": k_a, "padding": padding}
    chosen = {"method": method, **parse_settings(settings or [], named)}
    with _named_as_options():
        recipe = recipe_from(
            {
                "name": "convert",
                "model": {"source": model, "revision": revision, "device": device},
                "text": {"calibration": text},  # nothing is measured here
                "calibration": {"windows": windows, "length": length},
                "convert": chosen,
            },
            where="moedge convert",
        )

    def check(config: dict[str, Any]) -> None:
        with _named_as_options():
            recipe.check_model(config, "moedge convert", only_convert=True)

    with single("convert", f"{model} -> {out}") as reporter:
        write_checkpoint(recipe, out, force=force, check=check, progress=reporter.progress, note=reporter.note)
    digest = json.loads((out / "plan.json").read_text(encoding="utf-8"))["sha256"]
    Console().print(
        escape(f"{out}: {stages.notation(recipe.convert.model_dump())}, plan {digest}"), highlight=False, soft_wrap=True
    )


_OPTIONS = {
    "calibration.length": "--length",
    "calibration.windows": "--windows",
    "convert.padding: uneven": "--padding uneven",
    "model.device": "--device",
    "model.revision": "--revision",
    "text.calibration": "--text",
} | {f"convert.{name}": f"--{name}" for name in ("active", "experts", "method", "padding", "shared")}
"""What this command calls the keys of a recipe; other parameters of a method are given by ``--set``."""


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Name the options of this command, not the recipe's keys, in what the recipe refuses."""
    try:
        yield
    except MoEdgeError as error:
        said = str(error)
        for key, option in _OPTIONS.items():
            said = re.sub(rf"\b{re.escape(key)}\b", option, said)
        raise MoEdgeError(re.sub(r"\bconvert\.(\w)", r"--set \1", said)) from None
