"""docs/ci: the composite action and the workflow can be read, name options that exist, and their steps run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

import moedge
from moedge.runtime.cli import COMMANDS, load
from moedge.runtime.engines import open_engine
from moedge.runtime.parity import reference as references
from moedge.runtime.pytest_plugin import BUNDLE, REFERENCE
from moedge.runtime.report import ci

ROOT = Path(moedge.__file__).parent
ACTION = ROOT / "docs" / "ci" / "action" / "action.yml"
WORKFLOW = ROOT / "docs" / "ci" / "moedge-gate.yml"
QUICK = "--prompt 8 --decode 2 --repeats 6 --threads 1"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    document = read(path)
    found: list[dict[str, Any]] = (document.get("runs") or document["jobs"]["gate"])["steps"]
    return found


def scripts() -> Iterator[str]:
    return (step["run"] for path in (ACTION, WORKFLOW) for step in steps(path) if "run" in step)


def test_every_command_has_the_options_that_the_files_name() -> None:
    """Also those that a script adds to its array ``more``, and those that stand in the default of an input."""
    quick = read(ACTION)["inputs"]["bench-options"]["default"]
    found = set()
    for script in scripts():
        for name, rest in re.findall(r"\bmoedge ([a-z][a-z-]*)((?:[^\n]|(?<=\\)\n)*)", script):
            assert name in COMMANDS
            text = rest.replace("\\\n", " ").replace('"${options[@]}"', quick)
            if '"${more[@]}"' in text:
                text += " " + " ".join(re.findall(r"more\+=\((--[a-z-]+)", script))
            given = {word for word in shlex.split(text) if word.startswith("--")}
            assert given <= {option for parameter in load(name).params for option in parameter.opts}, name
            found |= {name, *given}
        if tests := re.search(r"\bpytest (.*--moedge.*)", script):
            given = {word for word in shlex.split(tests[1], comments=True) if word.startswith("--")}
            assert given == {BUNDLE, REFERENCE}
            found.add("pytest")
    assert found >= {"verify", "bench", "pytest"}
    assert found >= {"--reference", "--baseline", "--fail-on-worse", "--against", "--junit", "--repeats"}


def test_the_workflow_gives_the_action_what_it_takes() -> None:
    inputs = read(ACTION)["inputs"]
    (used,) = [step for step in steps(WORKFLOW) if "/docs/ci/action@" in step.get("uses", "")]
    assert set(used["with"]) <= set(inputs)
    assert {name for name, facts in inputs.items() if facts.get("required")} <= set(used["with"])
    assert used["uses"].endswith(f"@v{moedge.__version__}")
    named = set(re.findall(r"inputs\.([a-z-]+)", ACTION.read_text(encoding="utf-8")))
    assert named == set(inputs), "every input is used, and nothing else is"


def test_what_a_user_gives_is_never_text_of_a_script() -> None:
    assert [script for script in scripts() if "${{" in script] == []


def test_it_installs_the_version_that_it_is_part_of_with_what_the_steps_import() -> None:
    (install,) = [step["run"] for step in steps(ACTION) if step["name"] == "Install"]
    (path, extra) = re.findall(r"\$GITHUB_ACTION_PATH/([./]+)\[(\w+)\]", install)[0]
    assert (ACTION.parent / path).resolve() == ROOT.resolve()
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^{extra} = (\[.+\])$", declared, re.MULTILINE)
    wanted = json.loads(line)
    assert {re.match(r"[\w-]+", each)[0] for each in wanted} == {"onnx", "onnxruntime"}  # type: ignore[index]
    assert [each for each in wanted if declared.count(f'"{each}"') < 2] == [], "ranges are those of the other extras"


# -- the steps, as GitHub's runner runs them ---------------------------------------------------------------------------


class Runner:
    """Runs the action's scripts in a folder with ``bash -eo pipefail``, inputs in variables, and stops at a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "bin" / "moedge"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from moedge.runtime.cli import main; main()" "$@"\n'
        )
        program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        }

    def run(self, **given: str) -> tuple[int, str]:
        """Return the exit code of the first step that failed, or 0, and all that was printed."""
        declared = read(ACTION)["inputs"]
        values = {name: given.get(name.replace("-", "_"), facts.get("default")) for name, facts in declared.items()}
        said = ""
        for step in steps(ACTION):
            if "run" not in step or step["name"] == "Install":
                continue
            if (condition := step.get("if")) is not None:
                (name,) = re.fullmatch(r"inputs\.([a-z-]+) != ''", condition).groups()  # type: ignore[union-attr]
                if not values[name]:
                    continue
            assert step["shell"] == "bash"
            variables = {
                name: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: str(values[found[1]]), text)
                for name, text in step["env"].items()
            }
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                cwd=self.folder, env={**self.environment, **variables}, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            said += done.stdout + done.stderr
            if done.returncode:
                return done.returncode, said
        return 0, said


@pytest.fixture
def runner(bundles: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> Runner:
    """In its folder: ``my new`` and ``old`` bundle, ``ref.safetensors``, ``text.txt``."""
    for name in ("my new", "old"):
        shutil.copytree(bundles["moe/ort-cpu"], tmp_path / name)
    engine = open_engine(checkpoints["moe"], threads=1, **references.how_to_open(checkpoints["moe"]))
    windows = np.random.default_rng(1).integers(0, 256, (2, 120))
    identity = references.identity_of(checkpoints["moe"])
    references.keep(engine, windows, tmp_path / "ref.safetensors", text="random", prefill=100, identity=identity)
    engine.close()
    (tmp_path / "text.txt").write_text("some words " * 100, encoding="utf-8")
    return Runner(tmp_path)


def test_the_steps_of_the_action_gate_a_bundle(runner: Runner) -> None:
    out = runner.folder / "moedge-gate"
    given = {"bundle": "my new", "reference": "ref.safetensors"}
    code, said = runner.run(**given)
    assert code == 0, said
    assert json.loads((out / "verify.json").read_text())["outcome"] == "passed"
    assert ElementTree.parse(out / "verify.xml").getroot().get("failures") == "0"
    assert "### moedge verify: passed" in said
    assert sorted(path.name for path in out.iterdir()) == ["verify.html", "verify.json", "verify.md", "verify.xml"]

    (out / "verify.json").rename(runner.folder / "last.json")
    more = {"against": "old", "bench_options": f"{QUICK} --text text.txt", "max_slowdown": "900%"}
    code, said = runner.run(**given, **more, baseline="last.json", fail_on_worse="true")
    assert json.loads((out / "verify.json").read_text())["baseline"]["outcome"] == "not worse", said
    gate = json.loads((out / "bench.json").read_text())["gate"]
    assert {check["outcome"] for check in gate["checks"]} <= {"passed", "not decided"}, said
    assert code == (0 if gate["outcome"] == "passed" else 1), said  # one build beside itself, on a busy machine
    assert len(list(ElementTree.parse(out / "bench.xml").getroot())) == len(gate["checks"])
    summary = (runner.folder / "summary.md").read_text(encoding="utf-8")
    assert summary.count("### moedge verify: passed") == 2
    assert "bench" in summary


def test_a_bundle_that_is_wrong_is_not_timed_and_leaves_what_was_found(runner: Runner) -> None:
    limits = {"schema": "moedge.tolerances/1", "profiles": {"float32/ort-cpu": {"layer_rel_error": 1e-12}}}
    (runner.folder / "strict.yaml").write_text(yaml.safe_dump(limits), encoding="utf-8")
    out = runner.folder / "kept here"
    code, said = runner.run(
        bundle="my new", reference="ref.safetensors", tolerances="strict.yaml", against="old", out=out.name
    )
    assert code == 1, said
    assert "### moedge verify: FAILED" in said
    assert json.loads((out / "verify.json").read_text())["outcome"] == "failed"
    assert not (out / "bench.json").exists()


def test_an_error_is_a_sentence_and_no_empty_result(runner: Runner) -> None:
    code, said = runner.run(bundle="my new", reference="none; touch stolen")
    assert code == 2
    assert "No kept reference at none; touch stolen" in said
    assert list((runner.folder / "moedge-gate").iterdir()) == []
    assert not (runner.folder / "stolen").exists()


def test_a_job_summary_that_cannot_be_written_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))  # a folder
    ci.step_summary("### moedge verify: passed")
    assert capsys.readouterr().err.startswith("warning: the job's summary was not written (GITHUB_STEP_SUMMARY): ")
