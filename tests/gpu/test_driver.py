"""``make test-gpu`` ends with what it found, whatever breaks, and runs the device tests that there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE)
    import run as driver

    return driver


def stub(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def row(out: Path, **values: Any) -> str:
    return f"open({str(out / 'rows.jsonl')!r}, 'a').write({json.dumps(values) + chr(10)!r})"


LAYER = {"kind": "layer", "shape": "1B", "scope": "ffn", "tokens": 1, "captured": True, "low": 1.8, "high": 2.0}


def test_a_part_that_breaks_hangs_or_is_cut_off_ends_alone(run: ModuleType, tmp_path: Path) -> None:
    dense = row(tmp_path, **LAYER, variant="dense", us=100.0, ratio=1.0, reads=1.0)
    moe = row(tmp_path, **LAYER, variant="moe", us=52.0, ratio=1.92, reads=0.5)
    hang = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n{moe}"
    )
    parts = [
        run.Part("breaks", stub(f"{dense}\nraise ValueError('an illegal address')"), 60),
        run.Part("hangs", stub(hang + "\nopen('/dev/null')\ntime.sleep(60)"), 2),
        run.Part("cut", stub(f"open({str(tmp_path / 'rows.jsonl')!r}, 'a').write('{{\"kind\": ')"), 60),
        run.Part("passes", stub("print('fine')"), 60),
    ]
    assert not run.run(tmp_path, parts, dict(run.os.environ), rehearsal=False, budget=300)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["passed"] for part in found["parts"]] == [False, False, True, True]
    reasons = [part.get("reason") for part in found["parts"]]
    assert reasons[:2] == ["exit code 1: ValueError: an illegal address", "stopped after 2 s"]
    assert [entry["variant"] for entry in found["rows"]] == ["dense", "moe"], "rows of broken parts are kept"
    text = (tmp_path / "gpu.md").read_text()
    assert "| moe | 52.0; 1.92 (2.00), 1.80 to 2.00 |" in text
    assert "stopped after 2 s" in text


def test_the_budget_ends_what_is_left_and_says_so(run: ModuleType, tmp_path: Path) -> None:
    parts = [run.Part("one", stub("pass"), 60), run.Part("two", stub("pass"), 60)]
    assert not run.run(tmp_path, parts, dict(run.os.environ), rehearsal=False, budget=4)
    assert [part["reason"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]] == [
        "no time was left"
    ] * 2


def test_all_passed_is_a_pass_and_a_rehearsal_shows_no_times(run: ModuleType, tmp_path: Path) -> None:
    moe = row(tmp_path, **LAYER, variant="moe", us=52.0, ratio=1.92, reads=0.5)
    assert run.run(tmp_path, [run.Part("one", stub(moe), 60)], dict(run.os.environ), rehearsal=True, budget=300)
    text = (tmp_path / "gpu.md").read_text()
    assert "52.0" not in text
    assert "no measurements" in text


def test_files_with_device_tests_are_found_without_collecting(run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "@pytest.fixture(params=[pytest.param('cuda', marks=pytest.mark.gpu)])\n"
        "def place(request): ...\n"
    )
    for name, code in {
        "test_mark.py": "@pytest.mark.gpu\ndef test_a(): ...\n",
        "sub/test_fixture.py": "def test_b(place): ...\n",
        "sub/test_other.py": "def helper(place): ...\ndef test_c(tmp_path): ...\n",
    }.items():
        (tmp_path / name).write_text(code)
    assert [str(file.relative_to(tmp_path)) for file in run.marked(tmp_path)] == ["sub/test_fixture.py", "test_mark.py"]


@pytest.mark.slow
def test_pytest_finds_device_tests_in_no_other_file(run: ModuleType) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=False, timeout=1200)
    found = {run.ROOT / line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(found) > 5, done.stdout[-2000:]
    assert found <= set(run.marked(run.ROOT / "tests"))


@pytest.mark.slow
def test_a_rehearsal_passes(tmp_path: Path) -> None:
    """Every measuring part, on the CPU: layers, kernels in the interpreter, values beside float32."""
    pytest.importorskip("triton")
    command = [sys.executable, HERE / "run.py", "--out", tmp_path, "--only", "layers 1B", "--only", "kernels 7B"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    kinds = [entry["kind"] for entry in found["rows"]]
    assert set(kinds) == {"error", "layer", "kernel"}
    assert all(entry["passed"] for entry in found["rows"] if entry["kind"] == "error")
    assert {entry["kernel"] for entry in found["rows"] if entry["kind"] == "kernel"} >= {"GroupedGLU", "GatheredLinear"}


def test_the_copy_fits_into_a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    import clock

    monkeypatch.setattr(clock.torch.cuda, "mem_get_info", lambda: (6 << 30, 8 << 30))
    monkeypatch.setattr(clock.Clock, "once", lambda self, work: 1e6)
    assert clock.ceilings(clock.Clock("meta", 1))["bytes_per_s"] == 2 * (6 << 30) // 8
