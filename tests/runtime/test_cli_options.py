"""Every option of every command reaches the function that does the work."""

from __future__ import annotations

import importlib
import typing
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest

from moedge.runtime.cli import app

COMMANDS = {str(command.name): command.callback for command in app.registered_commands}
ELSEWHERE = {("build", "list_devices")}
"""Options that call another function."""


def given(kind: Any, number: int, name: str) -> tuple[Any, Any]:
    """A value for a parameter of type ``kind``, and what has to arrive: the value, or a part of it."""
    if get_origin(kind) in (typing.Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        if name == "settings":  # --set KEY=VALUE
            return [f"key_{number}={number}"], number
        value = given(get_args(kind)[0], number, name)[0]
        return [value], value
    value = {str: f"text-{number}", int: number, float: number + 0.5, Path: Path(f"path-{number}"), bool: True}[kind]
    return value, value


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = COMMANDS[name]
    assert callback is not None
    kinds = typing.get_type_hints(callback)
    kinds.pop("return", None)
    seen: list[list[Any]] = []
    module = importlib.import_module(f"moedge.runtime.commands.{name.replace('-', '_')}")
    monkeypatch.setattr(module, name.replace("-", "_"), lambda *args, **named: seen.append(leaves([args, named])))
    numbers = range(1001, 1001 + len(kinds))
    values = {option: given(kind, n, option) for n, (option, kind) in zip(numbers, kinds.items(), strict=True)}
    flags = [option for option, (value, _) in values.items() if value is True]
    everything = {option: value for option, (value, _) in values.items()} | dict.fromkeys(flags, False)
    callback(**everything)
    for option, (_, wanted) in values.items():
        assert option in flags or wanted in seen[0], f"{option} does not arrive"
    for flag in flags:
        if (name, flag) not in ELSEWHERE:
            callback(**{**everything, flag: True})
            assert seen[-1] != seen[0], f"{flag} does not arrive"
