"""The pytest plugin as a user has it: in a project of their own, through the entry point that pyproject.toml names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moedge
from moedge.runtime.engines import open_engine
from moedge.runtime.parity import reference as references

pytest_plugins = "pytester"

ROOT = Path(moedge.__file__).parent
GATE = """
def test_the_engine_is_the_model(moedge_parity):
    assert moedge_parity["outcome"] == "passed"

def test_it_answers(moedge_engine):
    import numpy as np
    assert moedge_engine.prefill(np.array([[1, 2, 3]])).logits.shape[1] == 3
"""
STRICT = """
schema: moedge.tolerances/1
profiles:
  float32/ort-cpu:
    layer_rel_error: 1.0e-12
"""
WATCH = """
import sys

def pytest_collection_finish(session):
    print("collected with:", [name for name in HEAVY if name in sys.modules])

def pytest_unconfigure(config):
    print("ended with:", [name for name in HEAVY if name in sys.modules])
"""
HEAVY = ("numpy", "onnxruntime", "pydantic", "rich", "torch", "transformers", "yaml", "moedge.runtime.engines.ort")


@pytest.fixture(scope="module")
def kept(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, path = checkpoints["moe"], tmp_path_factory.mktemp("kept") / "ref.safetensors"
    engine = open_engine(folder, threads=1, **references.how_to_open(folder))
    windows = np.random.default_rng(1).integers(0, 256, (2, 120))
    references.keep(engine, windows, path, text="random", prefill=100, identity=references.identity_of(folder))
    engine.close()
    return path


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project in an environment in which MoEdge is installed as pyproject.toml says."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (entries,) = re.findall(r'^\[project\.entry-points\.pytest11\]\n((?:.+ = ".+"\n)+)', declared, re.MULTILINE)
    installed = pytester.mkdir("site") / "moedge-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: moedge\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("[pytest11]\n" + entries.replace('"', ""))
    monkeypatch.setenv("PYTHONPATH", str(installed.parent), prepend=os.pathsep)
    for name in ("PYTEST_ADDOPTS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(f"HEAVY = {HEAVY!r}{WATCH}")
    pytester.makepyfile(test_engine=GATE)
    return pytester


def run(project: pytest.Pytester, *options: Any) -> tuple[pytest.RunResult, str]:
    """Run the project's tests in a process of their own; return the result and what was printed."""
    result = project.runpytest_subprocess("-s", "-p", "no:cacheprovider", *map(str, options))
    return result, result.stdout.str()


def run_here(project: pytest.Pytester, *options: Any) -> tuple[pytest.RunResult, str]:
    """Run them in this process, which has imported all that is slow, where what is imported is not asked."""
    project.syspathinsert(project.path / "site")
    result = project.runpytest_inprocess("-s", "-p", "no:cacheprovider", *map(str, options))
    return result, result.stdout.str()


def test_a_bundle_is_gated_by_a_kept_reference_without_torch(
    project: pytest.Pytester, bundles: dict[str, Path], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "summary.md"))
    given = ("--moedge-bundle", bundles["moe/ort-cpu"], "--moedge-reference", kept, "--moedge-threads", 1)
    result, said = run(project, *given)
    result.assert_outcomes(passed=2)
    assert "collected with: []" in said
    assert "onnxruntime" in said.partition("ended with:")[2]
    assert "'torch'" not in said
    assert "'transformers'" not in said
    summary = (project.path / "summary.md").read_text(encoding="utf-8")
    assert summary.count("### moedge verify: passed") == 1


def test_a_failing_test_shows_which_checks_failed(
    project: pytest.Pytester, bundles: dict[str, Path], kept: Path
) -> None:
    limits = project.makefile(".yaml", strict=STRICT)
    given = ("--moedge-bundle", bundles["moe/ort-cpu"], "--moedge-reference", kept, "--moedge-threads", 1)
    result, said = run(project, *given, "--moedge-tolerances", limits)
    result.assert_outcomes(passed=1, failed=1)
    assert "- moedge verify -" in said
    assert re.search(r"ref.safetensors: layers.prefill.rel_error is [\d.e-]+, must be <= 1e-12: FAILED", said)
    assert "KeyError" not in said


def test_a_checkpoint_is_a_reference_too(
    project: pytest.Pytester, bundles: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    text = project.path / "text.txt"
    text.write_text("All that is gold does not glitter, not all those who wander are lost. " * 20, encoding="utf-8")
    result, _ = run_here(
        project, "--moedge-bundle", bundles["moe/ort-cpu"], "--moedge-reference", checkpoints["moe"],
        "--moedge-text", text, "--moedge-tokens", 256, "--moedge-threads", 1,
    )  # fmt: skip
    result.assert_outcomes(passed=2)


def test_runs_without_the_option_are_left_alone(project: pytest.Pytester) -> None:
    project.makepyfile(test_other="def test_one(): pass")
    result, said = run(project, "-rs")
    result.assert_outcomes(passed=1, skipped=2)
    assert said.count("There is no engine to gate: give --moedge-bundle DIR.") == 2
    assert "ended with: []" in said
    assert "--moedge-bundle=DIR" in run(project, "--help")[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "Nothing to judge BUNDLE by: give --moedge-reference with a kept reference or a checkpoint."),
        (["--moedge-reference", "none.safetensors"], "No kept reference at none.safetensors"),
        (["--moedge-reference", "no/model/here"], "No model at no/model/here: the folder does not exist."),
        (["--moedge-reference", "KEPT", "--moedge-tokens", "64"], "KEPT holds the text that it judges on; leave out"),
        (["--moedge-bundle", "nowhere"], "No model at nowhere: the folder does not exist."),
        (["--moedge-bundle", ""], "--moedge-bundle is empty; give the folder of a bundle."),
    ],
)
def test_what_a_user_can_mend_is_an_error_in_one_sentence(
    project: pytest.Pytester, bundles: dict[str, Path], kept: Path, options: list[str], says: str
) -> None:
    names = {"KEPT": str(kept), "BUNDLE": str(bundles["moe/ort-cpu"])}
    given = ["--moedge-bundle", names["BUNDLE"], *(names.get(option, option) for option in options)]
    result, said = run_here(project, *given, "--moedge-threads", 1)
    counts = result.parseoutcomes()
    assert counts.get("errors", 0) >= 1
    assert "failed" not in counts
    for name, path in names.items():
        says = says.replace(name, path)
    assert says in " ".join(said.split())
    assert "Traceback" not in said
    assert "runtime/pytest_plugin.py" not in said


def test_the_engine_is_closed_when_the_session_ends(project: pytest.Pytester, bundles: dict[str, Path]) -> None:
    project.makepyfile(
        test_engine="""
        def test_it_is_closed_once(moedge_engine, request):
            close = moedge_engine.close
            def closing():
                print("closed")
                close()
            moedge_engine.close = closing

        def test_it_is_the_same(moedge_engine):
            assert moedge_engine.close.__name__ == "closing"
            print("used")
        """
    )
    result, said = run(project, "--moedge-bundle", bundles["moe/ort-cpu"], "--moedge-threads", 1)
    result.assert_outcomes(passed=2)
    assert re.search(r"used.*closed", said, re.DOTALL)
    assert said.count("closed") == 1
