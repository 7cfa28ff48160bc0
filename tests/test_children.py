"""What we start never imports files of the folder that a user happens to be in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import moedge
from moedge import _children

ROOT = Path(moedge.__file__).parent
LAYERS = ("configs", "convert", "export", "runtime")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder of files that take the place of Python's own where it is first on the path, and say so."""
    for name in ("json", "subprocess", "runpy", "pathlib", "sys", "argparse"):
        (tmp_path / f"{name}.py").write_text(f"open('{name} ran', 'w')\n", encoding="utf-8")
    return tmp_path


def ran(command: list[str], folder: Path) -> tuple[str, list[str]]:
    """What a command printed, and which files of the folder it executed."""
    found = subprocess.run(command, cwd=folder, input='{"a": 1}', capture_output=True, text=True, check=False)
    return found.stdout, sorted(path.name for path in folder.glob("* ran"))


def test_the_folder_is_hostile(hostile: Path) -> None:
    """Otherwise the tests below could not fail."""
    plain = _children.python("import json")
    plain[2] = "import json"
    assert ran(plain, hostile)[1] == ["json ran"]


def test_code_does_not_import_from_the_working_folder(hostile: Path) -> None:
    command = _children.python("import json, subprocess, pathlib, sys; print(json.dumps(sys.argv[1:]))", "x", "-y")
    assert ran(command, hostile) == ('["x", "-y"]\n', [])


def test_a_module_does_not_import_from_the_working_folder(hostile: Path) -> None:
    assert ran(_children.module("json.tool", "--compact"), hostile) == ('{"a":1}\n', [])


def test_our_own_modules_are_found_there(hostile: Path) -> None:
    found, executed = ran(_children.module("moedge", "--version"), hostile)
    assert (found.split()[0], executed) == ("moedge", [])


def test_nothing_else_starts_python() -> None:
    files = [*ROOT.glob("*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
    starts = [path.relative_to(ROOT).as_posix() for path in files if "sys.executable" in path.read_text("utf-8")]
    assert starts == ["_children.py"]
