"""``moedge bench`` as it is called: lists, names, files, the gate's verdict as an exit code."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moedge import MoEdgeError
from moedge.runtime.bench import latency, timing
from moedge.runtime.cli import app
from moedge.runtime.commands import bench as command
from moedge.runtime.run.refs import EngineRef

QUICK = ("--prompt", "8", "--decode", "2", "--repeats", "6", "--threads", "1")


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in processes of their own, which test_bench.py starts."""
    unknown = {"peak_rss_mib": None, "load_s": None, "reason": "a test"}
    monkeypatch.setattr(latency, "footprint", lambda *_: unknown)


@pytest.fixture
def home(toy_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``one``, ``two``, ``dense`` and ``slow``, whose calls take a fifth longer by a scripted clock; a text."""
    for name, source in (("one", "concat"), ("two", "concat"), ("slow", "concat"), ("dense", "shared_buffer")):
        shutil.copytree(toy_bundles[source], tmp_path / name)
    (tmp_path / "text.txt").write_text("some words " * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    plain, noise = timing.timed_run, np.random.default_rng(0)

    def scripted(engine: Any, ids: np.ndarray, depth: int, decode: int, mark: Any) -> tuple[float, list[float]]:
        plain(engine, ids, depth, decode, mark)
        pace = (1.2 if engine._path.name == "slow" else 1.0) * noise.normal(1, 0.002)
        return pace * ids.size, [pace * len(ids)] * decode

    monkeypatch.setattr(timing, "timed_run", scripted)
    return tmp_path


def bench(*arguments: str, text: str = "text.txt") -> Result:
    return CliRunner().invoke(app, ["bench", *arguments, "--text", text])


def test_a_sweep_is_one_call_and_writes_every_file(home: Path) -> None:
    files = {name: str(home / f"out.{name}") for name in ("json", "csv", "md", "svg")}
    outputs = ("--save", files["json"], "--csv", files["csv"], "--markdown", files["md"], "--plot", files["svg"])
    found = bench("one", "dense", "--prompt", "4,8", *QUICK[2:], "--batch", "1,2", *outputs)
    assert found.exit_code == 0, found.output
    result = json.loads(Path(files["json"]).read_text(encoding="utf-8"))
    assert len(result["points"]) == 4
    assert "batches" not in result
    deep = bench("one", "dense", *QUICK, "--depth", "0,3", "--batch", "1,2")
    assert deep.exit_code == 0, deep.output
    assert "batch 2, prompt 8, decode 2, depth 3, 1 threads, 6 rounds after " in deep.output
    assert {point["threads"] for point in result["points"]} == {1}
    assert len(Path(files["csv"]).read_text(encoding="utf-8").splitlines()) == 9
    assert Path(files["svg"]).read_text(encoding="utf-8").startswith("<?xml")
    assert "batch 2, prompt 8, decode 2, 1 threads, 6 rounds after " in found.output


def test_without_a_batch_the_report_looks_at_batches(home: Path) -> None:
    result = json.loads(bench("one", *QUICK, "--json").stdout)
    assert [look["batch"] for look in result["batches"]] == [1, 2, 4, 8]
    assert "batch 8" in bench("one", *QUICK).output


def test_the_older_engine_is_timed_beside_the_new_one(home: Path) -> None:
    junit = home / "bench.xml"
    found = bench("slow", "--against", "one", *QUICK, "--junit", str(junit))
    assert found.exit_code == 1, found.output
    assert "regression: time per token" in found.output
    assert "paired by round" in found.output
    assert "verdict: FAILED" in found.output
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("moedge bench", "2", "2")
    assert "regression" in str(suite[0][0].get("message"))
    found = bench("one", "--against", "slow", *QUICK)
    assert found.exit_code == 0, found.output
    assert "faster" in found.output
    assert "verdict: passed" in found.output


def test_a_stored_result_is_a_baseline_and_its_unchanged_engine_the_control(home: Path) -> None:
    assert bench("moe=one", "dense=dense", *QUICK, "--save", "old.json").exit_code == 0
    found = bench("moe=two", "dense=dense", *QUICK, "--baseline", "old.json", "--json")
    assert found.exit_code == 0, found.output
    gate = json.loads(found.stdout)["gate"]
    assert gate["outcome"] == "passed"
    assert {(check["label"], check["control"]) for check in gate["checks"]} == {("moe", "dense"), ("dense", "moe")}
    stored = json.loads((home / "old.json").read_text(encoding="utf-8"))
    stored["engines"]["moe"]["sha256"] = "another build"
    (home / "old.json").write_text(json.dumps(stored), encoding="utf-8")
    found = bench("moe=slow", "dense=dense", *QUICK, "--baseline", "old.json")
    assert found.exit_code == 1, found.output
    assert "moe: regression: time per token" in found.output
    assert "dense did not change; others are compared by it" in found.output


def test_a_limit_that_is_broken_is_an_exit_code_and_the_summary_of_a_job(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(home / "summary.md"))
    (home / "summary.md").write_text("before\n", encoding="utf-8")
    found = bench("one", *QUICK, "--fail-if", "tpot > 60s", "--fail-if", "one: ttft.p99 > 0.001us")
    assert found.exit_code == 1
    assert "within the limit" in found.output
    assert "beyond the limit" in found.output
    summary = (home / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("before\n### moedge bench: FAILED\n")
    found = bench("one", *QUICK, "--fail-if", "peak_rss > 1GiB")
    assert found.exit_code == 1
    assert "verdict: NOT DECIDED, not a pass" in found.output


def test_a_run_without_a_checkpoint_of_its_own_is_timed_by_its_bundles(home: Path) -> None:
    """As `moedge tune` and `moedge frontier` leave one."""
    (home / "run").mkdir()
    (home / "run" / "run.json").write_text("{}", encoding="utf-8")
    found = bench("run", *QUICK)
    assert (found.exit_code, "run has no engines yet" in found.stderr) == (2, True)
    shutil.copytree(home / "dense", home / "run" / "export-dense" / "ort-cpu")
    found = bench("run", *QUICK, "--json")
    assert found.exit_code == 0, found.output
    assert list(json.loads(found.stdout)["engines"]) == ["ort-cpu dense"]


def test_what_this_machine_does_not_execute_is_not_timed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = {EngineRef("ort-cpu", "moe"): home / "one", EngineRef("tensorrt-rtx", "moe"): home / "two"}
    (home / "run").mkdir()
    (home / "run" / "run.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(command.run_folder, "engines", lambda _: refs)
    monkeypatch.setattr(command.run_folder, "tokenizer", lambda _: home / "one")
    found = bench("run", *QUICK, "--json")
    assert found.exit_code == 0, found.output
    assert list(json.loads(found.stdout)["engines"]) == ["ort-cpu moe"]
    assert "tensorrt-rtx moe: not executed here" in found.stderr


def test_a_file_that_fails_costs_no_measurement(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "old.json")

    monkeypatch.setattr(command, "write_json", full)
    found = bench("one", *QUICK, "--json", "--save", "old.json")
    assert (found.exit_code, json.loads(found.stdout)["schema"]) == (2, "moedge.bench/2")
    assert "error: No space left on device (old.json);" in found.stderr


def test_what_follows_the_timing_costs_no_measurement(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate and a profile that fail: said last, after times and files."""

    def broken(*_: Any, **__: Any) -> None:
        raise MoEdgeError("no node was recorded")

    monkeypatch.setattr(command, "judge", broken)
    found = bench("one", *QUICK, "--save", "a.json", "--fail-if", "tpot > 1s", "--junit", "a.xml")
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (2, "error: no node was recorded")
    assert "per token" in found.stdout
    assert "gate" not in json.loads((home / "a.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(command, "profiles", broken)
    found = bench("one", *QUICK, "--save", "b.json", "--profile")
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (2, "error: no node was recorded")
    assert "per token" in found.stdout
    assert len(json.loads((home / "b.json").read_text(encoding="utf-8"))["points"]) == 1


def test_engines_that_are_not_timed_are_named_before_the_timing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench("one", *QUICK, "--save", "saved.json").exit_code == 0
    monkeypatch.setattr(latency, "bench", lambda *_, **__: pytest.fail("timed"))
    found = bench("one", "--fail-if", "other: tpot > 1s")
    said = "error: --fail-if 'other: tpot > 1s' names an engine that is not timed; there are: one."
    assert (found.exit_code, said in found.stderr) == (2, True)
    found = bench("new=one", "--baseline", "saved.json")
    assert (found.exit_code, "error: The baseline has no engine of the same name" in found.stderr) == (2, True)
    found = bench("one", "--baseline", "saved.json", "--save", "saved.json")
    assert (found.exit_code, "error: --save saved.json is read by this command; name" in found.stderr) == (2, True)


def test_a_profile_of_nothing_is_refused_before_the_timing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "bench", lambda *_, **__: pytest.fail("timed"))
    for folder in ("one", "dense"):  # as if both were checkpoints
        (home / folder / "manifest.json").unlink()
    found = bench("one", "dense", *QUICK, "--profile")
    assert found.exit_code == 2
    assert "error: Only bundles that ONNX Runtime runs can be profiled" in found.stderr


def test_a_profile_without_onnx_is_refused_before_the_timing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "bench", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = bench("one", *QUICK, "--profile")
    assert (found.exit_code, "error: Profiling needs the onnx package" in found.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("one", "--save", "two"), "--save two is a folder; name a file to write."),
        (("one", "--markdown", "text.txt/x.md"), "--markdown text.txt/x.md cannot be written: Not a directory;"),
        (("one", "--baseline", "none.json"), "none.json is missing; measure it again with `moedge bench --save`."),
        (
            ("one", "--baseline", "old.json"),
            "old.json is no result of `moedge bench`, its schema is not moedge.bench/2;",
        ),
        (("one", "--baseline", "bad.json"), "bad.json is damaged: protocol is not what it should be;"),
        (("one", "--junit", "x.xml"), "--junit writes checks; give --against, --baseline or --fail-if"),
        (("one", "--plot", "x.gif"), "--plot x.gif ends in .gif; give a name with .svg, .png, .pdf."),
        (("one", "two", "--against", "slow"), "--against slow is the older one of which engine?"),
        (("x=one", "x=two"), "x is given twice; name each engine once."),
        (("one", "--max-slowdown", "5", "--against", "slow"), "--max-slowdown '5' is not a share such as 5%."),
        (("one", "--max-slowdown", "5%"), "--max-slowdown compares with something: give --baseline or --against."),
        (("one", "--save", "one/manifest.json"), "which this command reads; name a file elsewhere."),
        (("one", "--text", "text.txt", "--csv", "text.txt"), "--csv text.txt is read by this command; name another"),
        (("one", "--prompt", "8,8"), "prompt is a list of different numbers, not [8, 8]; name each value once."),
    ],
)
def test_bad_input_is_one_sentence(home: Path, arguments: tuple[str, ...], said: str) -> None:
    (home / "old.json").write_text('{"schema": "moedge.bench/1"}', encoding="utf-8")
    (home / "bad.json").write_text('{"schema": "moedge.bench/2"}', encoding="utf-8")
    found = bench(*arguments)
    assert found.exit_code == 2
    assert " ".join(found.stderr.split()).startswith("error: ")
    assert said in " ".join(found.stderr.split())


def test_numbers_are_lists_of_whole_numbers(home: Path) -> None:
    for wrong in ("1,a", "", "1,,2", "0", "-1", "1.5"):
        found = bench("one", "--prompt", wrong)
        assert found.exit_code == 2
        assert "is not a list of numbers of at least 1" in " ".join(found.output.replace("│", "").split())


def test_a_stored_result_is_what_the_gate_reads(home: Path) -> None:
    assert bench("one", *QUICK, "--save", "old.json").exit_code == 0
    stored = json.loads((home / "old.json").read_text(encoding="utf-8"))
    rounds = stored["points"][0]["rows"][0]["rounds"]
    assert len(rounds["ttft_ms"]) == len(rounds["tpot_ms"]) == stored["points"][0]["rounds"]
    assert np.median(rounds["ttft_ms"]) == pytest.approx(stored["points"][0]["rows"][0]["ttft_ms"]["p50"])
