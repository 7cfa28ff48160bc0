"""``moedge convert``: a dense model becomes a MoE checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs.recipe import conversion_from
from moedge.runtime.progress import single
from moedge.runtime.run import run_folder, stages
from moedge.runtime.run.engine import Context


def convert(
    model: str,
    out: Path,
    *,
    revision: str | None,
    device: str,
    text: str,
    calibration: dict[str, Any],
    settings: dict[str, Any],
    force: bool,
) -> None:
    """Run the stage ``convert``, and those that it reads, of a recipe made of the options; keep the checkpoint."""
    recipe = conversion_from(
        {
            "name": "convert",
            "model": {"source": model, "revision": revision, "device": device},
            "text": {"calibration": text},  # nothing is measured here
            "calibration": calibration,
            "convert": settings,
        },
        where=_WHERE,
        called=_option,
    )
    local = Path(model).expanduser() / "config.json"
    if local.is_file():
        config = run_folder.read_json(local, "download or save the model again")
        recipe.check_model(config, _WHERE, called=_option)
    inputs = (model, text)
    with atomic_dir(out, force=force, inputs=inputs) as partial, single("convert", f"{model} -> {out}") as reporter:
        work = partial / ".stages"
        for stage in stages.to_convert(recipe):
            reporter.note(stage.what)
            folder = work / stage.name
            folder.mkdir(parents=True)
            stage.body(Context(folder, work, stage.params, reporter.progress, reporter.note))
            if stage.name == "source":
                recipe.check_model(run_folder.source(work)["config"], _WHERE, called=_option)
        checkpoint = run_folder.checkpoint(work)
        for path in checkpoint.iterdir():
            path.rename(partial / path.name)
        shutil.rmtree(work)
    digest = run_folder.read_json(out / "plan.json")["sha256"]
    Console().print(
        escape(f"{out}: {stages.notation(recipe.convert.model_dump())}, plan {digest}"), highlight=False, soft_wrap=True
    )


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
    if key in _OPTIONS:
        return f"{_OPTIONS[key]} {value}" if colon else _OPTIONS[key]
    name = key.removeprefix("convert.")
    return key if name == key else f"--set {name}" + (f"={value}" if colon else "")


def parse_settings(assignments: list[str], named: dict[str, Any]) -> dict[str, Any]:
    """Join the options of their own (``named``, None: not given) and ``KEY=VALUE`` texts, whose values are YAML.

    Raises:
        MoEdgeError: a text without ``=``, a value that is not YAML, or a parameter that is given twice.
    """
    found = {key: value for key, value in named.items() if value is not None}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise MoEdgeError(f"--set {assignment}: write KEY=VALUE, for example --set experts=8.")
        if key in found or key == "method":
            raise MoEdgeError(f"--set {assignment}: {key} is given twice, or has an option of its own; give it once.")
        try:
            found[key] = json.loads(text)  # YAML 1.1 takes 1e-6 for text, JSON does not
        except ValueError:
            try:
                found[key] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise MoEdgeError(f"--set {assignment}: the value is not readable as YAML.") from None
    return found
