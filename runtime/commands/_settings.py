"""What ``--set KEY=VALUE`` says, joined with options that have a name of their own; and what defaults depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moedge import MoEdgeError
from moedge._files import read_json


def parse_settings(assignments: list[str], named: dict[str, Any]) -> dict[str, Any]:
    """Join the options of their own (``named``, None: not given) and ``KEY=VALUE`` texts, whose values are YAML.

    ``gather.share=.6`` sets the key ``share`` of the mapping ``gather``.

    Raises:
        MoEdgeError: a text without ``=``, a value that is not YAML, or a parameter that is given twice.
    """
    found = {key: value for key, value in named.items() if value is not None}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise MoEdgeError(f"--set {assignment}: write KEY=VALUE, for example --set experts=8.")
        *path, last = key.split(".")
        inner: Any = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise MoEdgeError(f"--set {assignment}: {part} has a value of its own; give {part} or {key}.")
        if last in inner or key == "method":
            raise MoEdgeError(f"--set {assignment}: {key} is given twice, or has an option of its own; give it once.")
        inner[last] = _value(text, assignment)
    return found


def positions(model: str) -> int | None:
    """Tokens that a model in a folder here was made for; None where the folder does not tell, or is not here yet."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        found = read_json(file, "download or save the model again").get("max_position_embeddings")
    except MoEdgeError:
        return None  # what opens the model says what is wrong with it
    return found if isinstance(found, int) and found > 0 else None


def _value(text: str, assignment: str) -> Any:
    try:
        return json.loads(text)  # YAML 1.1 takes 1e-6 for text, JSON does not
    except ValueError:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise MoEdgeError(f"--set {assignment}: the value is not readable as YAML.") from None
