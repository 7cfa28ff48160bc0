"""Words of the command line: each means one thing, none is ignored, and former ones are accepted for one release."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
from typer.testing import CliRunner

from moedge.runtime.cli import COMMANDS, app, load
from moedge.runtime.commands._options import Numbers

FORMER_COMMANDS = [("bundle", "pack"), ("report", "device-report")]
FORMER = [
    ("run", "force", "redo"),
    ("generate", "target", "engine"),
    ("finetune", "batch", "batch-size"),
    ("finetune", "parent", "dense"),
    ("export", "experts", "expert-form"),
    ("export", "dtype", "half"),
    ("build", "device", "for"),
    ("estimate", "device", "for"),
    ("pack", "target", "for"),
    ("pack", "experts", "expert-form"),
    ("pack", "dtype", "half"),
    ("evaluate", "out", "save"),
    ("diagnose", "out", "save"),
]
"""Promised until the next release: command, former name of an option, today's."""
MEANINGS: dict[str, tuple[type, str]] = {
    "--batch": (int, "^(Most r|R)ows of a call"),
    "--baseline": (Path, "older result"),
    "--batch-size": (int, "per forward pass"),
    "--dense": (str, "^[Tt]he dense parent|^Dense parent"),
    "--device": (str, "^Where PyTorch computes"),
    "--dry-run": (bool, "(do|write) nothing"),
    "--dtype": (str, "^Of checkpoints in PyTorch"),
    "--expert-form": (str, "Target tensorrt: plugins, merged"),
    "--for": (str, "^Device profile"),
    "--force": (bool, "^Replace the output if it exists"),
    "--half": (str, "float16 .default., or bfloat16"),
    "--holdout-every": (int, "documents? .*(held-out|never trained on)"),
    "--html": (Path, "^Also write .* as one HTML page to this file"),
    "--json": (bool, "^Print the whole result as JSON"),
    "--junit": (Path, "^Also write the checks as JUnit XML"),
    "--k-a": (int, "[Ss]trongest"),
    "--label": (str, "^Name of the model in (reports|results)"),
    "--length": (int, "^Tokens (in a|per calibration) window"),
    "--limit": (int, "^Only the first so many questions"),
    "--markdown": (Path, "^Also write the .* as Markdown"),
    "--max-length": (int, "^Longest (sequence|prompt . answer)"),
    "--max-prompt": (int, "^Most prompt tokens in one call"),
    "--out": (Path, "^Run folder"),
    "--peer": (str, "another program"),
    "--plot": (Path, r"^Also draw .* \.svg"),
    "--redo": (str, "^Redo this stage"),
    "--save": (Path, "^Also write the whole result to this JSON file"),
    "--set": (str, "[Aa](ny other|nother)? (setting|parameter)"),
    "--shots": (int, "^Solved examples"),
    "--target": (str, "ort-cpu-int8"),
    "--task-data": (str, "^Local data of a task"),
    "--tasks": (str, "^lm-eval tasks"),
    "--tensorrt": (str, "^TensorRT on the device"),
    "--text": (str, "asset:NAME|[Tt]ext to train on"),
    "--threads": (int, "^CPU threads"),
    "--tolerances": (str, "^YAML file of limits"),
    "--tokens": (int, "^(Tokens (of each text|to (compare|measure))|Budget in tokens)"),
    "--window": (int, "^Tokens per window"),
}
"""What an option of several commands means: its type, one value of it, and words that its help has everywhere."""


def function(command: str) -> Callable[..., Any]:
    name = command.replace("-", "_")
    found: Callable[..., Any] = getattr(importlib.import_module(f"moedge.runtime.commands.{name}"), name)
    return found


def one_value(kind: Any) -> Any:
    """``list[str] | None`` -> ``str``: an option may be repeatable in one command and single in another."""
    if get_origin(kind) in (typing.Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if kind is Numbers:  # 1,2,4 where another command takes one number
        return int
    return get_args(kind)[0] if get_origin(kind) is list else kind


def test_an_option_name_has_one_type_and_one_meaning() -> None:
    found: dict[str, list[tuple[str, type, str]]] = defaultdict(list)
    for command in COMMANDS:
        kinds = typing.get_type_hints(function(command))
        for option in load(command).params:
            if option.param_type_name == "option":
                for name in option.opts:
                    found[name].append((command, one_value(kinds[str(option.name)]), str(option.help)))
    shared = {name for name, uses in found.items() if len(uses) > 1}
    assert shared == set(MEANINGS), "say above what an option of several commands means"
    for name in shared:
        kind, words = MEANINGS[name]
        for command, its, text in found[name]:
            assert its is kind, f"{command} {name} is of type {its}"
            assert re.search(words, text), f"{command} {name} means something else: {text}"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_ignored(command: str) -> None:
    body = function(command)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(body))).body
    assert isinstance(tree, ast.FunctionDef)
    used = {node.id for part in tree.body for node in ast.walk(part) if isinstance(node, ast.Name)}
    assert set(inspect.signature(body).parameters) <= used


@pytest.mark.parametrize(("command", "former", "today"), FORMER)
def test_a_former_option_is_todays(command: str, former: str, today: str, capsys: pytest.CaptureFixture[str]) -> None:
    (option,) = (option for option in load(command).params if f"--{today}" in option.opts)
    value = "3" if typing.get_type_hints(function(command))[str(option.name)] == int | None else "x"

    def parsed(name: str) -> Any:
        return load(command).make_context(command, [f"--{name}", value], resilient_parsing=True).params[option.name]

    assert parsed(former) == parsed(today) != option.default
    assert f"note: --{former} is now --{today}; " in capsys.readouterr().err
    assert not {f"--{former}"} & {name for option in load(command).params for name in option.opts}


@pytest.mark.parametrize(("former", "today"), FORMER_COMMANDS)
def test_a_former_command_is_todays(former: str, today: str) -> None:
    result = CliRunner().invoke(app, [former, "--help"])
    assert result.exit_code == 0
    assert f"moedge {today} " in result.output
    assert f"│ {former} " not in CliRunner().invoke(app, ["--help"]).output
    assert former not in COMMANDS
