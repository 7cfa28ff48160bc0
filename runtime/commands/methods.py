"""``moedge methods``: the conversion methods and their parameters, from the registry; needs no torch."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.runtime.commands._options import Json
from moedge.runtime.tables import Sheet

_ROLE = re.compile(r":\w+:(?=`)")
"""Sphinx's mark before a name in a docstring, such as ``:func:``."""


def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all by default.")] = None, as_json: Json = False
) -> None:
    """List the conversion methods: where each comes from, what it needs, its parameters and their defaults.

    \b
    Examples:
      moedge methods
      moedge methods expertweaver
    """
    from moedge.convert.methods import METHODS

    if name is not None and name not in METHODS:
        raise MoEdgeError(f"Unknown method {name!r}; known: {', '.join(METHODS)}.")
    listed: dict[str, dict[str, Any]] = {
        key: {"source": method.source, "needs": list(method.needs), "params": parameters(method.params)}
        for key, method in METHODS.items()
        if name in (None, key)
    }
    if as_json:
        print(json.dumps(listed, indent=2, allow_nan=False))
        return
    console = Console()
    for key, entry in listed.items():
        needs = ", ".join(entry["needs"]).replace("_", " ") or "nothing besides the model"
        console.print(escape(f"{key}: {entry['source']}; needs {needs}"), highlight=False, style="bold", soft_wrap=True)
        table = Sheet()
        columns = ("parameter", "default", "values", *(("meaning",) if name else ()))
        for column in columns:
            table.add_column(column)
        for row in entry["params"]:
            default = row["default"] if isinstance(row["default"], str) else json.dumps(row["default"])
            cells = (row["name"], default, row["values"], row["meaning"])
            table.add_row(*(escape(text) for text in cells[: len(columns)]))
        console.print(table)
    tops = [key for key in listed if not METHODS[key].no_gather]
    if tops:
        said = "`--set gather.share=.6` leaves out small values on top"
        only = "" if name else f" of {', '.join(tops)}"
        console.print(f"{said}{only}; its keys are those of the method gather.", highlight=False, soft_wrap=True)
    if name is None:
        console.print("`moedge methods NAME` explains the parameters of one.", highlight=False)


def parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Return name, default (JSON), values in words and meaning (its docstring) of each parameter of a method."""
    defaults = model().model_dump(mode="json")
    return [
        {
            "name": name,
            "default": defaults[name],
            "values": ", ".join([_words(field.annotation), *_bounds(field)]),
            "meaning": " ".join(_ROLE.sub("", field.description or "").replace("`", "").split()),
        }
        for name, field in model.model_fields.items()
    ]


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if kind is type(None):
        return "null"
    if get_origin(kind) is dict:
        return "mapping of names to " + _words(get_args(kind)[1])
    if get_origin(kind) is Annotated:
        return _words(get_args(kind)[0])
    if get_origin(kind) in (tuple, list):
        return f"list of {_words(get_args(kind)[0])}"
    names = {int: "whole number", float: "number", bool: "true | false", str: "text"}
    return names[kind] if kind in names else " | ".join(_words(part) for part in get_args(kind) if not _is_note(part))


def _is_note(part: Any) -> bool:
    """Whether an argument of ``Annotated`` is metadata, not a type."""
    return not isinstance(part, type) and get_origin(part) is None


def _bounds(field: Any) -> list[str]:
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return [
        f"{words} {getattr(note, sign):g}"
        for note in field.metadata
        for sign, words in signs.items()
        if getattr(note, sign, None) is not None
    ]
