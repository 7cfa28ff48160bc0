"""``moedge convert``: a dense model becomes a MoE checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.configs.recipe import recipe_from
from moedge.runtime.progress import single
from moedge.runtime.run import stages
from moedge.runtime.run.conversion import write_checkpoint


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
    with _named_as_options():
        recipe = recipe_from(
            {
                "name": "convert",
                "model": {"source": model, "revision": revision, "device": device},
                "text": {"calibration": text},  # nothing is measured here
                "calibration": calibration,
                "convert": settings,
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
