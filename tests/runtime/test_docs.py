"""The commands and links of README.md and docs/ exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import moedge
from moedge.runtime.cli import COMMANDS, load

ROOT = Path(moedge.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = re.compile(r"^ *(?:\.venv/bin/)?moedge +([a-z][a-z-]*)(.*)$", re.MULTILINE)
OPTIONS = {name: {option for parameter in load(name).params for option in parameter.opts} for name in COMMANDS}


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
    assert set(found) >= set(OPTIONS), "every command is shown somewhere"
