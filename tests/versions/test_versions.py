"""The lowest and the highest versions that pyproject.toml allows: what they install does what it should.

``make test-versions`` runs this. uv makes an environment for each end and extra in ``$MOEDGE_VERSIONS`` or
``.venv-versions``: ``ci`` (0.3 GiB, no torch: bundles made here are generated from, verified and timed there) and
``cpu`` (with torch: a few test files of the conversion run there). Optional pins of pip (``PIP_FIND_LINKS``) count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network]

ROOT = Path(__file__).parents[2]
ENDS = {"lowest": "lowest-direct", "highest": "highest"}
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PROMPT = "Rain is water that"
FILES = ("convert/test_modeling.py", "convert/test_every_method.py", "export/test_silent_failures.py",
         "export/test_like_generate.py")  # fmt: skip
"""Under tests/: from a checkpoint to text, every method and what runtimes do silently."""


def made(end: str, extra: str) -> Path:
    """Return the Python of an environment, made anew when pyproject.toml changed."""
    uv = shutil.which("uv") or pytest.skip("needs uv: pip install uv")
    folder = Path(os.environ.get("MOEDGE_VERSIONS", ROOT / ".venv-versions")) / f"{end}-{extra}"
    wanted, stamp = (ROOT / "pyproject.toml").read_text(encoding="utf-8"), folder / "made-of.toml"
    if end == "lowest" and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return folder / "bin/python"
    # The highest is what there is today, so it is made every time (from uv's cache: seconds).
    environment = os.environ | {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), "UV_PROJECT_ENVIRONMENT": ""}
    subprocess.run([uv, "venv", "-q", "--clear", "--python", PYTHON, folder], check=True, timeout=600)
    uv_pip = [uv, "pip", "install", "-q", "--python", folder / "bin/python"]
    tools = [] if extra == "ci" else ["pytest>=9,<10", "hypothesis>=6.150,<7"]
    direct = ["--resolution", ENDS[end], "-r", ROOT / "pyproject.toml", "--extra", extra, *tools]
    subprocess.run([*uv_pip, *direct], check=True, timeout=3600, env=environment)
    subprocess.run([*uv_pip, "--no-deps", ROOT], check=True, timeout=600, env=environment)
    # The code is that of this checkout, the metadata that of the installed package.
    site = next((folder / "lib").glob("python*/site-packages"))
    shutil.rmtree(site / "moedge")
    (site / "moedge").symlink_to(ROOT)
    stamp.write_text(wanted, encoding="utf-8")
    return folder / "bin/python"


def moedge(python: Path | str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    code = "from moedge.runtime.cli import main; main()"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env=variables, cwd=ROOT / "tests"
    )


@pytest.fixture(scope="session")
def kept(checkpoints: dict[str, Path], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    (folder / "text.txt").write_text("Rain is water that falls from clouds. " * 40, encoding="utf-8")
    options = ("--text", folder / "text.txt", "--tokens", 256, "--save-reference", folder / "ref.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", "from moedge.runtime.cli import main; main()", "verify", checkpoints["moe"],
         *map(str, options)], check=False, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "ref.safetensors"


@pytest.fixture(scope="session", params=list(ENDS))
def runtime(request: pytest.FixtureRequest) -> Path:
    """Python of an environment with the runtime alone, at one end of its ranges."""
    return made(request.param, "ci")


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_bundle_is_right_by_a_kept_reference(
    runtime: Path, bundles: dict[str, Path], kept: Path, target: str
) -> None:
    done = moedge(runtime, "verify", bundles[f"moe/{target}"], "--reference", kept, "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(done.stdout)["outcome"] == "passed"


def test_it_generates_and_times_and_reports(runtime: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    texts = {
        moedge(runtime, "generate", bundles[f"moe/{target}"], PROMPT, "--max-new-tokens", 12).stdout
        for target in ("portable", "ort-cpu")
    }
    assert len(texts) == 1, texts
    assert texts != {""}
    options = ("--prompt", 8, "--decode", 4, "--repeats", 3, "--plot", tmp_path / "times.png", "--json")
    done = moedge(runtime, "bench", bundles["moe/ort-cpu"], *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["schema"] == "moedge.bench/2"


def test_doctor_finds_nothing_out_of_range(runtime: Path) -> None:
    done = moedge(runtime, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["dependencies"]
    assert [row for row in found if row["version"] and row["verdict"] != "tested"] == []
    assert {row["package"] for row in found} >= {"onnxruntime", "numpy", "torch"}


@pytest.mark.parametrize("end", list(ENDS))
def test_the_conversion_passes_its_tests(end: str) -> None:
    python = made(end, "cpu")
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not gpu and not network",
    ]
    files = [ROOT / "tests" / name for name in FILES]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False, timeout=3000, env=variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
