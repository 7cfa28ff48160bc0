"""The wheel holds what it must and nothing else, and works from a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moedge

ROOT = Path(moedge.__file__).resolve().parent
DATA = (".cc", ".cpp", ".h", ".inl", ".j2", ".json", ".typed", ".yaml")
"""Endings of the files that are read at run time and are no code."""

OUTSIDE = ("docs/", "tests/", "runtime/optimum_register/")
"""What is no part of the package ``moedge``; the last is a namespace package of its own."""


def python_packages() -> set[str]:
    """Every package of the source tree, as it is imported."""
    folders = [Path(path).parent for path in source_files() if path.endswith("__init__.py")]
    return {".".join(("moedge", *folder.parts)) for folder in folders if folder.parts[:1] != ("tests",)}


def packages(wheel: Path) -> set[str]:
    """Every package in the wheel."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name.removesuffix("/__init__.py").replace("/", ".") for name in names if name.endswith("/__init__.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git knows (a build leaves folders in its source)."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in source_files():
        copy = folder / "source" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / path).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def source_files() -> list[str]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the wheel in front of any other moedge, in a folder that holds none."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment, capture_output=True, text=True
    )


def test_every_package_is_in_it(wheel: Path) -> None:
    """pyproject.toml lists them by hand; one that is left out breaks users only."""
    assert python_packages() - packages(wheel) == set()
    assert packages(wheel) - python_packages() == set()


def test_every_file_that_is_read_is_in_it_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"moedge/{path}" for path in source_files() if path.endswith((".py", *DATA)) and not path.startswith(OUTSIDE)
    }
    assert wanted - names == set()
    assert {"moedge/py.typed", "moedge/configs/tolerances.yaml", "moedge/runtime/report/report.html.j2"} <= wanted
    assert {"moedge/runtime/report/report.schema.json", "optimum/commands/register/register_moedge.py"} <= names
    assert any(name.endswith("launcher.cpp") for name in names)
    assert [name for name in names if name.split("/")[-1].startswith(("test_", "conftest")) or "/tests/" in name] == []
    assert [name for name in names if name.startswith(("moedge/docs", "moedge/build", "moedge/.ci"))] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_package_imports_from_it(wheel: Path, installed: Path) -> None:
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; import moedge"
    done = run(
        installed,
        "-c",
        f"{code}; print(moedge.__file__)",
        *sorted(packages(wheel)),
        "optimum.commands.register.register_moedge",
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_the_command_and_the_public_names_work_from_it(installed: Path) -> None:
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "moedge = moedge.runtime.cli:main" in entry.read_text(encoding="utf-8")
    assert "[pytest11]\nmoedge = moedge.runtime.pytest_plugin\n" in entry.read_text(encoding="utf-8")
    done = run(installed, "-c", "import sys; from moedge.runtime.cli import main; main()", "--help")
    assert done.returncode == 0, done.stderr
    for name in ("convert", "export", "verify", "bench"):
        assert name in done.stdout
    code = "import moedge; print([name for name in moedge.__all__ if getattr(moedge, name) is None])"
    assert run(installed, "-c", code).stdout.strip() == "[]"
