"""The commands and links of README.md and docs/ exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import moedge
from moedge.runtime.cli import app

ROOT = Path(moedge.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = re.compile(r"^ *(?:\.venv/bin/)?moedge +([a-z][a-z-]*)(.*)$", re.MULTILINE)
_group: Any = typer.main.get_command(app)
OPTIONS = {name: {o for p in command.params for o in p.opts} for name, command in _group.commands.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_every_command_line_has_a_command_and_its_options() -> None:
    found = []
    for page in PAGES:
        for name, rest in LINE.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            words = shlex.split(rest, comments=True)
            found.append(name)
            assert name in OPTIONS, f"{page.name}: moedge {name}"
            unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - OPTIONS[name]
            assert not unknown, f"{page.name}: moedge {name} has no {', '.join(unknown)}"
    assert set(found) >= set(OPTIONS) - {"report"}, "every command is shown somewhere"
