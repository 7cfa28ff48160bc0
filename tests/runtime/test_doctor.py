"""Doctor tells the truth about what is here, and needs nothing heavy to do so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moedge.export import targets
from moedge.runtime import doctor, ranges

H200 = "NVIDIA H200, 143771, 9.0, 570.86.15\n"


def text_of(result: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(doctor.render(result))
    return console.export_text()


def target(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in result["targets"] if entry["target"] == name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages that seem to be installed; the test changes the dict."""
    packages: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(ranges.metadata, "version", version)
    monkeypatch.setattr(doctor, "_providers", lambda: ["CPUExecutionProvider"] if "onnxruntime" in packages else [])
    monkeypatch.setattr(doctor, "_gpus", lambda: ([], "no NVIDIA GPU found (test)"))
    return packages


CONVERT = {name[0]: "1.0" for name in doctor._CONVERT}


def test_answer_on_this_machine_is_json_and_shows_every_target() -> None:
    result = doctor.examine()
    json.dumps(result, allow_nan=False)
    torch = next(row for row in result["runtimes"] if row["name"] == "PyTorch")
    assert torch["version"] == metadata.version("torch")
    assert target(result, "ort-cpu")["run"]["possible"]
    text = text_of(result)
    for name in ("portable", "ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"):
        assert name in text


def test_a_missing_compiler_is_said_with_what_it_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\necho 9.4.0\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tmp_path / name) if name == "g++" else None)
    found = doctor.examine()
    assert found["compiler"] == "9.4.0"
    assert "skips no weights" not in text_of(found)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    missing = doctor.examine()
    assert missing["compiler"] is None
    assert "missing: bundles for a CPU are written without MoEdge's operators" in " ".join(text_of(missing).split())


def test_nothing_heavy_is_imported_and_a_bare_device_gets_an_answer() -> None:
    """In a fresh process where the packages of the other stages cannot be imported at all."""
    code = """
import sys
blocked = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum", "scipy", "tensorrt", "matplotlib")
for name in blocked:
    sys.modules[name] = None
from moedge.runtime import doctor
doctor.render(doctor.examine())
print("answered")
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.stdout == "answered\n", child.stderr


def test_every_target_is_examined() -> None:
    result = doctor.examine()
    assert sorted(targets.names()) == sorted(entry["target"] for entry in result["targets"])


def imported() -> set[str]:
    """Top-level packages that some file of this package imports, by a statement or by name."""
    import moedge

    root = Path(str(moedge.__file__)).parent
    files = [path for part in ("convert", "configs", "export", "runtime") for path in (root / part).rglob("*.py")]
    found: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)
    return found


def test_what_a_runtime_is_used_for_is_true() -> None:
    """Doctor said for two releases that Triton was not used."""
    used = imported()
    for row in doctor.examine()["runtimes"]:
        module = {"PyTorch": "torch", "TensorRT for RTX": "tensorrt_rtx"}.get(
            row["name"], row["name"].lower().replace(" ", "")
        )
        if row["name"] != "OpenVINO":  # users open its bundles with it (docs/interop.md), this package does not
            assert module in used, f"{row['name']} is listed and imported nowhere"
        assert "not used" not in row["use"]


def test_an_empty_environment_lists_what_is_missing(installed: dict[str, str]) -> None:
    result = doctor.examine()
    assert not result["convert"]["possible"]
    assert "torch is not installed" in result["convert"]["reasons"]
    assert target(result, "portable")["run"] == {
        "possible": False,
        "reasons": ["onnxruntime is not installed"],
        "warnings": [],
    }
    assert all(row["version"] is None for row in result["runtimes"])
    assert "torch is not installed" in text_of(result)


def test_a_device_with_only_onnxruntime_can_run_but_not_make(installed: dict[str, str]) -> None:
    installed["onnxruntime"] = "1.31.1"
    result = doctor.examine()
    for name in ("portable", "ort-cpu"):
        assert target(result, name)["run"]["possible"]
        assert not target(result, name)["export"]["possible"]


def test_the_lowering_needs_its_runtime_where_the_bundle_is_made(installed: dict[str, str]) -> None:
    installed.update(CONVERT)
    result = doctor.examine()
    assert result["convert"]["possible"]
    assert target(result, "portable")["export"]["possible"]
    assert target(result, "ort-cpu")["export"]["reasons"] == ["onnxruntime is not installed"]


def test_untested_versions_are_a_warning_not_a_refusal(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges.metadata, "requires", lambda name: ['torch<2.14,>=2.13; extra == "convert"', "numpy<3"])
    installed.update(CONVERT, torch="2.4.1+cu121")
    result = doctor.examine()
    assert result["convert"]["possible"]
    assert result["convert"]["warnings"] == ["torch 2.4.1+cu121 is too old: tested with <2.14,>=2.13"]
    assert "untested" in text_of(result)
    installed["torch"] = "2.13.0+cpu"
    assert doctor.examine()["convert"]["warnings"] == []


@pytest.mark.parametrize(
    ("version", "allowed", "fits"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.0", ">=2.13,<2.14", False),
        ("2.9", "<2.13,>=2.1", True),
        ("1.31", "==1.31.0", True),
        ("1.31.0rc1", ">1.31", False),
        ("10.9.0.34", ">=10.9,<12", True),
        ("0.7.1", ">=0.7.2,<0.8", False),
        ("3", "", True),
    ],
)
def test_version_ranges(version: str, allowed: str, fits: bool) -> None:
    assert ranges.satisfies(version, allowed) is fits


def test_every_package_of_the_metadata_is_judged(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two extras with ranges of their own: either will do. What is too old says so, what is too new too."""
    lines = ["triton<3.10,>=3.7.1; extra == 'cuda'", "triton<3.8,>=3.7.1; extra == 'plugins'", "Rich<16,>=13.9",
             "typer<1,>=0.15", "kernel-lens==2.0.1; extra == 'test'", "moedge[convert]; extra == 'cpu'"]  # fmt: skip
    monkeypatch.setattr(ranges.metadata, "requires", lambda name: lines)
    installed.update({"triton": "3.9.0", "rich": "13.8.1", "kernel-lens": "2.0.2"})
    result = doctor.examine()
    assert {row["package"]: row["verdict"] for row in result["dependencies"]} == {
        "triton": "tested",
        "rich": "too old",
        "typer": "not installed",
        "kernel-lens": "too new",
    }
    shown = [" ".join(line.split()) for line in text_of(result).splitlines()]
    assert any("rich 13.8.1 too old <16,>=13.9" in line for line in shown), shown
    assert any("kernel-lens 2.0.2 too new ==2.0.1" in line for line in shown)
    installed.update({"rich": "14.0", "kernel-lens": "2.0.1"})
    assert "nobody has tested" not in text_of(doctor.examine())


def test_a_broken_onnxruntime_is_reported_and_does_not_stop_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = doctor.examine()
    reasons = target(result, "ort-cpu")["run"]["reasons"]
    assert len(reasons) == 1
    assert reasons[0].startswith("onnxruntime cannot be imported")
    text_of(result)


def fake_smi(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    values = {"returncode": 0, "stdout": "", "stderr": "", **answer}
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(**values))


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, stdout=H200 + "Orin (nvgpu), [N/A], 8.7, 540.4.0\n")
    gpus, _ = doctor._gpus()
    assert gpus[0] == {
        "name": "NVIDIA H200",
        "memory_mib": 143771,
        "compute_capability": "9.0",
        "driver": "570.86.15",
    }
    assert gpus[1]["memory_mib"] is None
    result = doctor.examine()
    assert "NVIDIA H200, 143771 MiB, compute capability 9.0" in text_of(result)
    assert not any("GPU" in reason for reason in target(result, "tensorrt")["run"]["reasons"])


def test_a_failing_nvidia_smi_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, returncode=9, stdout="NVIDIA-SMI has failed because it couldn't communicate\nmore")
    assert doctor._gpus() == (
        [],
        "no NVIDIA GPU found (nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate)",
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._gpus() == ([], "no NVIDIA GPU found (nvidia-smi is not here)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("nothing\n", None),
        (None, None),
    ],
)
def test_huge_pages_are_what_the_kernel_says(text: str | None, said: str | None, tmp_path: Path) -> None:
    if text is not None:
        file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert doctor._huge_pages(tmp_path) == said
    result = doctor.examine()
    result["devices"]["cpu"]["huge_pages"] = said
    printed = text_of(result)
    assert ("huge pages" in printed) == (said is not None)
    assert ("glibc.malloc.hugetlb=1" in printed) == (said == "madvise")


def test_jetson_is_recognised_by_the_device_tree(tmp_path: Path) -> None:
    assert doctor._jetson(tmp_path) is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    model = tmp_path / "proc/device-tree/model"
    model.write_bytes(b"Raspberry Pi 5\0")
    assert doctor._jetson(tmp_path) is None
    model.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert doctor._jetson(tmp_path) == {"model": "NVIDIA Jetson AGX Orin Developer Kit", "l4t": "unknown"}
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    found = doctor._jetson(tmp_path)
    assert found is not None
    assert found["l4t"].startswith("# R36")
