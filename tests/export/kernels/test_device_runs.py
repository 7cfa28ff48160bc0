"""Which runs of pytest interpret the kernels, and which compile them for the device."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")  # Linux only


@pytest.mark.parametrize(
    ("expression", "interpreted"),
    [
        ("", True),
        ("not gpu", True),
        ("not slow and not network and not gpu", True),
        ("gpu", False),
        ("gpu and not slow", False),
        ("not slow and (gpu)", False),
    ],
)
def test_the_expression_decides(expression: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    code = (root / "conftest.py").read_text()
    space: dict[str, object] = {"__name__": "conftest"}
    exec(compile(code, "conftest.py", "exec"), space)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    space["pytest_configure"](SimpleNamespace(option=SimpleNamespace(markexpr=expression)))  # type: ignore[operator]
    assert os.environ.get("TRITON_INTERPRET") == ("1" if interpreted else None)


def test_device_tests_never_pass_in_the_interpreter() -> None:
    """As a GPU user runs one file without ``-m gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda and test_combine"]
    command.append(str(Path(__file__).with_name("test_kernels.py")) + "::test_combine")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "device tests need: pytest -m gpu" in done.stdout, done.stdout + done.stderr
    assert " passed" not in done.stdout
