"""A verdict has three outcomes, and every surface shows the same one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.configs import tolerances
from moedge.configs.recipe import parse_recipe
from moedge.convert.tasks import Questions
from moedge.runtime import report as reports
from moedge.runtime.commands import run as run_command
from moedge.runtime.commands import verify as verify_command
from moedge.runtime.parity.accuracy import Gate
from moedge.runtime.parity.given import verify_given
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.sample import Sample
from moedge.runtime.parity.suite import finished
from moedge.runtime.parity.verdict import Check, Outcome, Verdict, run_outcome
from moedge.runtime.report.build import build
from moedge.runtime.report.checks import junit_xml

CHECKS = {
    Outcome.PASSED: Check("prefill.top1.agreement", 1.0, ">=", 0.99),
    Outcome.FAILED: Check("prefill.top1.agreement", 0.5, ">=", 0.99),
    Outcome.NOT_DECIDED: Check("prefill.top1.agreement", None, ">=", 0.99, decided=False),
}
WORDS = {Outcome.PASSED: "passed", Outcome.FAILED: "FAILED", Outcome.NOT_DECIDED: "not decided"}


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest, sample_runs: Any) -> Path:
    """A run whose first comparison came to the outcome that the test asks for."""
    root: Path = sample_runs("c4").make(tmp_path)
    verification = json.loads((root / "verify" / "verify.json").read_text())
    entry = verification["parity"][0]
    entry["verdict"] = Verdict({"whole": (CHECKS[request.param],)}).as_json([])
    for each in verification["parity"]:
        each["replay"] = None
        each["verdict"].setdefault("notes", [])
    write_json(root / "verify" / "verify.json", finished(verification, tolerances.load()))
    return root


@pytest.mark.parametrize(("run", "outcome"), [(outcome, outcome) for outcome in Outcome], indirect=["run"])
def test_every_surface_shows_the_same_outcome(
    run: Path, outcome: Outcome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, word, last = 0 if outcome is Outcome.PASSED else 1, WORDS[outcome], f"verdict: {mark(outcome).verdict}"
    others = {other for other in WORDS.values() if other not in (word, "passed")}

    def shows(text: str) -> None:
        assert word in text
        assert not [other for other in others if other in text]

    # moedge run: report.json, Markdown, HTML, terminal, exit code
    (run / "report").mkdir()
    report = reports.write(run, run / "report", recipe=parse_recipe("model: {source: x}", name="toy").model_dump())
    jsonschema.validate(report, json.loads(reports.SCHEMA_FILE.read_text(encoding="utf-8")))
    assert (report["outcome"], report["passed"]) == (outcome.value, code == 0)
    assert report["verification"]["outcome"] == outcome.value
    markdown = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert markdown.splitlines()[0] == f"# toy: {mark(outcome).verdict}"
    shows("\n".join(line for line in markdown.splitlines() if "ort-cpu moe vs" in line or " checks of " in line))
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert f'<span class="chip {mark(outcome).css}">{mark(outcome).verdict}</span></h1>' in page
    rows = [plain(row) for row in re.findall(r"<tr>.*?</tr>", page) if "prefill.top1" in row or "ort-cpu moe vs" in row]
    assert len(rows) == 2
    assert all(row.endswith(word) for row in rows)
    assert run_command.finish(run) == code
    said = capsys.readouterr().out
    assert last in said
    shows("\n".join(line for line in said.splitlines() if line.startswith("ort-cpu moe vs") or " checks of " in line))

    # moedge verify: terminal, JSON, JUnit, exit code
    result = json.loads((run / "verify" / "verify.json").read_text())
    assert (result["outcome"], mark(result["outcome"]).exit_code) == (outcome.value, code)
    verify_command._print(result)
    said = capsys.readouterr().out
    assert last in said
    shows(next(line for line in said.splitlines() if line.startswith("prefill.top1")))
    suite = ElementTree.fromstring(junit_xml(result))
    failures = [found.get("message", "") for found in suite.iter("failure")]
    assert suite.get("failures") == str(len(failures)) == str(code)
    assert all(message.startswith(f"{outcome.value}: ") for message in failures)


def test_one_failure_fails_what_is_not_decided_otherwise() -> None:
    found = Verdict({"whole": tuple(CHECKS.values())})
    assert found.outcome is Outcome.FAILED
    assert Verdict({"whole": (CHECKS[Outcome.PASSED], CHECKS[Outcome.NOT_DECIDED])}).outcome is Outcome.NOT_DECIDED
    assert Verdict({}).outcome is Outcome.NOT_DECIDED  # nothing was compared
    assert [check.name for check in found.missed] == ["prefill.top1.agreement"] * 2
    assert Check("x", float("nan"), "<=", 1.0).outcome is Outcome.FAILED  # nothing compared is within no limit


def test_where_nothing_is_compared_nothing_passes(tmp_path: Path) -> None:
    empty: Any = {"schema": "moedge.verify/1", "text": "none", "identity": [], "parity": []}
    assert finished(empty, tolerances.load())["outcome"] == "not decided"
    write_json(tmp_path / "run.json", {"schema": "moedge.run/1"})  # as an interrupted run leaves it
    (tmp_path / "convert" / "checkpoint").mkdir(parents=True)
    with pytest.raises(MoEdgeError, match="this run has nothing exported; finish it with `moedge run`"):
        verify_given(tmp_path, sample=Sample())
    with pytest.raises(MoEdgeError, match="has nothing exported"):
        Gate._over([], Questions(()), "float32")


def test_a_result_of_an_older_version_has_an_outcome(tmp_path: Path, sample_runs: Any) -> None:
    """verify.json without outcomes, checks without ``decided``."""
    root: Path = sample_runs("c4").make(tmp_path)
    old = json.loads((root / "verify" / "verify.json").read_text())
    assert "outcome" not in old
    report: dict[str, Any] = build(root, parse_recipe("model: {source: x}", name="toy").model_dump())
    assert report["outcome"] == "passed"
    old["parity"][0]["verdict"]["checks"][0]["passed"] = False
    assert run_outcome(old) is Outcome.FAILED
    console = Console(width=80)
    with console.capture() as captured:
        console.print(mark(run_outcome(old)).line)
    assert captured.get().strip() == "verdict: FAILED"
