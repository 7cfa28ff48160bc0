"""The runtime alone on 64-bit Arm: wheels resolve, and an aarch64 Python under qemu generates, verifies and benchmarks.

``make test-aarch64`` runs this (Debian: ``apt install qemu-user g++-aarch64-linux-gnu``). The first run fetches an
aarch64 CPython from Debian and the wheels of ``moedge[ci]`` from PyPI into ``$MOEDGE_AARCH64`` or ``.aarch64`` (a few
minutes, 0.4 GiB). There is no torch in it. Bundles and the reference are made here and read there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11
pytestmark = [pytest.mark.slow, pytest.mark.network]

ROOT = Path(__file__).parents[2]
PYTHON = "3.11"
PACKAGES = ("python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libstdc++6",
            "libgcc-s1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5", "libsqlite3-0",
            "libuuid1", "libgomp1")  # fmt: skip
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
TARGETS = ("portable", "ort-cpu")
CPUINFO = """processor\t: {number}
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
"""A Neoverse N1. qemu 7.2 shows the host's file, in which ONNX Runtime finds no Arm processor and crashes."""
PROMPT = "Rain is water that"


def requirements() -> list[str]:
    """What ``pip install 'moedge[ci]'`` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["ci"]]


def python_root(folder: Path) -> None:
    """Unpack Debian's aarch64 Python; nothing is installed."""
    lists, root = folder / "lists", folder / "root"
    (lists / "partial").mkdir(parents=True)
    arm = ["-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64", f"-oDir::State::Lists={lists}", "-qq"]
    subprocess.run(["apt-get", *arm, "update"], check=True, timeout=600)
    (folder / "debs").mkdir()
    subprocess.run(["apt-get", *arm, "download", *PACKAGES], check=True, timeout=600, cwd=folder / "debs")
    for file in (folder / "debs").glob("*.deb"):
        subprocess.run(["dpkg", "-x", file, root], check=True, timeout=600)
    shutil.rmtree(lists)
    (root / "proc").mkdir()  # qemu looks for every path here first
    (root / "proc/cpuinfo").write_text("".join(CPUINFO.format(number=n) for n in range(2)), encoding="ascii")


@pytest.fixture(scope="session")
def environment() -> Path:
    """The folder with an aarch64 Python (``root``) and its packages (``site``), made when what it holds changed."""
    for program, package in {"qemu-aarch64": "qemu-user", "apt-get": "apt", "dpkg": "dpkg"}.items():
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: apt install {package})")
    folder = Path(os.environ.get("MOEDGE_AARCH64", ROOT / ".aarch64"))
    wanted, stamp = "\n".join([*PACKAGES, *requirements()]), folder / "holds.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        python_root(folder)
        where = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
        where += [part for platform in PLATFORMS for part in ("--platform", platform)]
        install = [sys.executable, "-m", "pip", "install", "-q", *where, "--target", folder / "site", *requirements()]
        subprocess.run(install, check=True, timeout=1800)
        stamp.write_text(wanted, encoding="utf-8")
    link = folder / "site" / "moedge"  # of this checkout, whichever made the folder
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT)
    return folder


Arm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def arm(environment: Path, tmp_path: Path) -> Arm:
    """Return a function (arguments of Python..., compiler=False) -> the ended process of the aarch64 Python.

    With ``compiler`` it finds a g++ that makes aarch64 libraries.
    """

    def run(*arguments: Any, compiler: bool = False) -> subprocess.CompletedProcess[str]:
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        if compiler and not (tools / "g++").exists():
            cross = shutil.which("aarch64-linux-gnu-g++")
            if cross is None:
                pytest.skip("needs aarch64-linux-gnu-g++ (Debian: apt install g++-aarch64-linux-gnu)")
            (tools / "g++").symlink_to(cross)
        variables = {
            "PYTHONPATH": str(environment / "site"),
            "PATH": str(tools),
            "MOEDGE_CACHE": str(tmp_path / "cache"),
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        }
        # max: with the dot products that the kernels of our own use
        emulator = ["qemu-aarch64", "-cpu", "max", "-L", environment / "root"]
        python = environment / "root/usr/bin" / f"python{PYTHON}"
        command = [shutil.which(emulator[0]), *emulator[1:], python, *arguments]
        return subprocess.run(
            list(map(str, command)), env=variables, capture_output=True, text=True, timeout=1800, check=False
        )

    return run


def moedge(arm: Arm, *arguments: Any, compiler: bool = True) -> subprocess.CompletedProcess[str]:
    code = "import sys; from moedge.runtime.cli import main; main()"
    return arm("-c", code, *arguments, compiler=compiler)


def here(*arguments: Any) -> str:
    code = "import sys; from moedge.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="session")
def kept(checkpoints: dict[str, Path], tmp_path_factory: Any) -> Path:
    """A reference of the converted checkpoint, with a text of its own."""
    folder = tmp_path_factory.mktemp("kept")
    text = folder / "text.txt"
    text.write_text("Rain is water that falls from clouds. " * 40, encoding="utf-8")
    options = ("--text", text, "--tokens", "256", "--save-reference", folder / "ref.safetensors")
    here("verify", checkpoints["moe"], *options)
    return folder / "ref.safetensors"


def test_it_is_an_arm_without_torch(arm: Arm) -> None:
    code = (
        "import importlib.util, platform, onnxruntime, moedge.runtime.engines; "
        "print(platform.machine(), importlib.util.find_spec('torch'))"
    )
    done = arm("-c", code)
    assert done.stdout.split() == ["aarch64", "None"], done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_it_generates_the_same_text(arm: Arm, bundles: dict[str, Path], target: str) -> None:
    arguments = ("generate", bundles[f"moe/{target}"], PROMPT, "--max-new-tokens", "12")
    done = moedge(arm, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stdout == here(*arguments)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_verified_by_a_kept_reference(arm: Arm, bundles: dict[str, Path], kept: Path, target: str) -> None:
    done = moedge(arm, "verify", bundles[f"moe/{target}"], "--reference", kept, "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(done.stdout)["outcome"] == "passed"


def test_it_is_timed(arm: Arm, bundles: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of more than twelve tokens, each of them a byte\n" * 4, encoding="utf-8")
    options = ("--text", text, "--prompt", "8", "--decode", "4", "--repeats", "3", "--batch", "1", "--json")
    done = moedge(arm, "bench", bundles["dense/ort-cpu"], bundles["moe/ort-cpu"], *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "moedge.bench/2"


def test_without_a_compiler_the_library_of_another_processor_is_one_sentence(
    arm: Arm, bundles: dict[str, Path]
) -> None:
    done = moedge(arm, "generate", bundles["moe/ort-cpu"], PROMPT, compiler=False)
    assert done.returncode != 0
    assert "g++, which is not here: install it" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
