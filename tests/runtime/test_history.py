"""Stored results over time: read by their schema, joined on one machine only, steps marked."""

from __future__ import annotations

import itertools
import json
import os
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner, Result

from moedge.runtime.bench import machine
from moedge.runtime.cli import app
from moedge.runtime.history import page, read, steps
from moedge.runtime.history.schema import History

HERE = {"processor": "Here", "cores": 2, "memory_gib": 23.5}
THERE = {"processor": "There", "cores": 64, "memory_gib": 512.0}
needs_ruptures = pytest.mark.skipif(not steps.available(), reason="ruptures is not installed")


def bench(day: int, tpot: float, where: dict[str, Any] = HERE, **more: Any) -> dict[str, Any]:
    times = {"p50": tpot, "ci95": [0.98 * tpot, 1.02 * tpot]}
    info = {"device": "CPU", "threads": 2}
    return {
        "schema": "moedge.bench/2",
        "created": f"2026-11-{day:02d}T12:00:00+00:00",
        "commit": f"{day:02d}abcdef0123",
        "machine": where,
        "engines": {"moe": {"info": info}},
        "points": [
            {
                **{"batch": 1, "prompt": 512, "decode": 64, "depth": 0},
                "rows": [{"label": "moe", "ttft_ms": times, "tpot_ms": times}],
            }
        ],
        **more,
    }


def verification(kl: float, **more: Any) -> dict[str, Any]:
    overall = {"tokens": 510, "kl_ref_test": {"mean": kl, "standard_error": kl / 20}}
    task = {"task": "piqa", "questions": 200, "metric": "acc", "test_accuracy": 0.7}
    entry = {"name": "int8 vs torch", "shots": 0, "tasks": [task]}
    tokens = {"windows": 2, "window": 256, "prefill": 224}
    parity = [{"name": "int8 vs torch", "tokens": tokens, "overall": overall}]
    return {"schema": "moedge.verify/1", "text": "wiki", "parity": parity, "accuracy": [entry], **more}


def write(folder: Path, **documents: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["history", *map(str, arguments)], env={"COLUMNS": "200"})


def said(found: Result) -> str:
    return " ".join(found.output.split())


def test_results_become_series_by_time_whatever_their_files_are_called(tmp_path: Path) -> None:
    write(tmp_path / "b", zz=bench(3, 9.0), aa=bench(20, 12.0), mm=bench(7, 10.0))
    write(tmp_path, v=verification(1e-3, created="2026-11-05T00:00:00+00:00", machine=HERE))
    write(tmp_path, scores={
        "schema": "moedge.scores/1", "created": "2026-11-06T00:00:00Z", "machine": HERE,
        "rows": [{"model": "moe", "tasks": [
            {"task": "arc_easy", "questions": 100, "shots": 0, "metrics": {"acc": {"value": 0.5, "stderr": 0.05}}}
        ]}],
    })  # fmt: skip
    write(tmp_path, other={"schema": "moedge.stage/1"}, none=[1, 2])
    found = run(tmp_path, "--json")
    assert found.exit_code == 0, found.output
    history = TypeAdapter(History).validate_python(json.loads(found.stdout))
    assert history["files"] == 5
    assert [one["metric"] for one in history["series"]] == ["kl", "accuracy", "accuracy", "ttft_ms", "tpot_ms"]
    tpot = history["series"][-1]
    assert [point["value"] for point in tpot["points"]] == [9.0, 10.0, 12.0]
    assert tpot["points"][0]["commit"] == "03abcdef0123"
    assert tpot["setting"] == "batch 1, prompt 512, decode 64, 2 threads"
    assert history["series"][0]["points"][0]["ci95"] == pytest.approx([1e-3 * (1 - 0.098), 1e-3 * (1 + 0.098)])
    table = said(run(tmp_path))
    assert "9 (2026-11-03) 12 (2026-11-20, 20abcdef) +33.3%" in table
    assert "70.0% (2026-11-05)" in table


def test_machines_are_never_joined(tmp_path: Path) -> None:
    write(tmp_path, a=bench(1, 10.0), b=bench(2, 1.0, THERE), c=bench(3, 10.1), d=bench(4, 1.1, THERE))
    series, files, _ = read.collect([tmp_path])
    assert files == 4
    assert [(one["machine"], len(one["points"])) for one in series if one["metric"] == "tpot_ms"] == [
        ("Here, 2 cores, 24 GiB", 2),
        ("There, 64 cores, 512 GiB", 2),
    ]
    write(tmp_path, e=verification(1e-3), f=verification(1e-3, machine=HERE))
    kl = [one["machine"] for one in read.collect([tmp_path])[0] if one["metric"] == "kl"]
    assert sorted(kl) == ["Here, 2 cores, 24 GiB", read.NOT_TOLD]
    drawn = page.page({"schema": "moedge.history/1", "series": series, "files": 4, "notes": []})
    assert drawn.count("<svg") == 4, "a plot for each figure and machine"


def test_other_settings_are_never_joined(tmp_path: Path) -> None:
    short, few = bench(2, 5.0), bench(3, 5.0)
    short["points"][0]["decode"] = 8
    few["points"][0]["rows"][0]["tpot_ms"]["ci95"] = [None, None]
    write(tmp_path, a=bench(1, 10.0), b=short, c=few)
    tpot = [one for one in read.collect([tmp_path])[0] if one["metric"] == "tpot_ms"]
    assert [one["setting"] for one in tpot] == [f"batch 1, prompt 512, decode {n}, 2 threads" for n in (64, 8)]
    assert [point["ci95"] for point in tpot[0]["points"]] == [pytest.approx([9.8, 10.2]), None]
    other, more, third = verification(1e-3), verification(1e-3), verification(1e-3)
    other["parity"][0]["tokens"] = {"windows": 1, "window": 512, "prefill": 480}
    more["accuracy"][0]["shots"] = 5
    third["accuracy"][0]["tasks"][0]["metric"] = "acc_norm"
    write(tmp_path / "v", a=verification(1e-3), b=other, c=more, d=third)
    found = read.collect([tmp_path / "v"])[0]
    assert [(one["metric"], one["setting"], len(one["points"])) for one in found] == [
        ("kl", "wiki, 510 tokens, windows 1, window 512, prefill 480", 1),
        ("kl", "wiki, 510 tokens, windows 2, window 256, prefill 224", 3),
        ("accuracy", "piqa, 200 questions, 0 shots, acc", 2),
        ("accuracy", "piqa, 200 questions, 0 shots, acc_norm", 1),
        ("accuracy", "piqa, 200 questions, 5 shots, acc", 1),
    ]


def test_a_frontier_s_settings_are_whole(tmp_path: Path) -> None:
    estimate = {"value": 1.0, "ci95": [0.9, 1.1]}
    document = {
        "schema": "moedge.frontier/1",
        "machine": HERE,
        "protocol": {"window": 64, "tokens": {"wiki": 300, "c4": 300}},
        "variants": [{"label": "half", "kl": {"value": 0.1, "ci95": [None, None]}}],
        "measured": [
            {
                **{"target": "ort-cpu", "batch": 1, "prompt": 32, "decode": 3, "threads": 1},
                "rows": [{"label": "half", "ttft_ms": estimate, "tpot_ms": estimate}],
            }
        ],
    }
    series = read.collect([write(tmp_path, f=document)])[0]
    assert [one["setting"] for one in series] == [
        "to dense, wiki and c4, 600 tokens, window 64",
        *["batch 1, prompt 32, decode 3, 1 threads"] * 2,
    ]
    assert series[0]["points"][0]["ci95"] is None


def test_numbers_of_steps_do_not_lie_on_each_other() -> None:
    """Eight lines that step on the same day, and on the one after it, in sixty days."""
    days = [datetime(2026, 9, 1, tzinfo=timezone.utc) + timedelta(days=number) for number in range(60)]

    def one(number: int) -> Any:
        points = [
            {"when": day.isoformat(), "dated": "told", "commit": None, "value": 10.0, "ci95": None, "source": "x"}
            for day in days
        ]
        marks = [
            {"index": at, "when": days[at].isoformat(), "commit": None, "before": 10.0, "after": 12.0}
            for at in (30, 31)
        ]
        facts = {"metric": "tpot_ms", "engine": f"engine {number}", "setting": "s", "machine": "m"}
        return {**facts, "points": points, "steps": marks}

    series = [one(number) for number in range(8)]
    figure = page.draw("tpot_ms", series)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 2
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    lines = page.step_lines(series)
    assert lines[0] == "2026-10-01: " + "; ".join(f"engine {number} +20.0%" for number in range(8))
    assert len(lines) == 2


def test_a_result_without_a_date_stands_at_the_time_of_its_file(tmp_path: Path) -> None:
    write(tmp_path, old=verification(1e-3, machine=HERE))
    os.utime(tmp_path / "old.json", (1.7e9, 1.7e9))
    series, _, notes = read.collect([tmp_path / "old.json"])
    assert series[0]["points"][0]["when"] == "2023-11-14T22:13:20+00:00"
    assert series[0]["points"][0]["dated"] == "file"
    assert notes == ["1 of 1 results do not tell when they were made; the time of the file stands in"]


def test_a_report_stands_for_its_run(tmp_path: Path) -> None:
    run_folder = write(tmp_path / "run", run={"schema": "moedge.run/1"})
    parts = {"speed": bench(1, 10.0, THERE), "verification": verification(1e-3)}
    write(
        run_folder,
        report={"schema": "moedge.report/1", "created": "2026-11-09T00:00:00+00:00", "machine": HERE} | parts,
    )
    write(run_folder / "bench", bench=bench(1, 10.0, THERE))
    series, files, _ = read.collect([tmp_path])
    assert files == 1
    assert {one["machine"] for one in series} == {"Here, 2 cores, 24 GiB"}
    points = {one["metric"]: one["points"][0] for one in series}
    own, others = points["tpot_ms"], points["kl"]  # a stage that was reused is older than the report
    assert (own["when"], own["commit"]) == ("2026-11-01T12:00:00+00:00", "01abcdef0123")
    assert (others["when"], others["commit"]) == ("2026-11-09T00:00:00+00:00", None)
    report = json.loads((run_folder / "report.json").read_text(encoding="utf-8"))
    write(run_folder, report=report | {"speed": {"schema": "moedge.bench/1", "rows": []}})
    series, _, notes = read.collect([tmp_path])
    assert {one["metric"] for one in series} == {"kl", "accuracy"}
    assert notes == [f"{run_folder / 'report.json'} holds moedge.bench/1 of an older version, which is left out"]
    (run_folder / "report.json").unlink()  # a run that was stopped before its report
    assert read.collect([tmp_path])[1] == 1


def test_threads_dtypes_and_models_are_never_joined(tmp_path: Path) -> None:
    """Every run folder has an engine of the same name, and one result may have points of several threads."""
    one, other = bench(1, 10.0), bench(2, 90.0)
    one["points"] = [one["points"][0] | {"threads": threads} for threads in (1, 4)]
    for document, label, dtype in ((one, "SmolLM2", "float32"), (other, "Qwen3", "bfloat16")):
        document["engines"]["moe"]["info"] |= {"dtype": dtype, "model": {"label": label}}
    write(tmp_path, one=one, other=other)
    series, _, _ = read.collect([tmp_path])
    point = "batch 1, prompt 512, decode 64"
    assert [found["setting"] for found in series if found["metric"] == "tpot_ms"] == [
        f"{point}, 1 threads, float32; SmolLM2",
        f"{point}, 2 threads, bfloat16; Qwen3",
        f"{point}, 4 threads, float32; SmolLM2",
    ]


def test_what_a_report_does_not_hold_is_read(tmp_path: Path) -> None:
    run = write(tmp_path / "run", run={"schema": "moedge.run/1"}, mine=bench(2, 11.0))
    write(run, report={"schema": "moedge.report/1", "machine": HERE, "speed": bench(1, 10.0)})
    frontier = {"schema": "moedge.frontier/1", "machine": HERE, "model": "tiny", "measured": []}
    frontier |= {"protocol": {"tokens": {"wiki": 510}, "window": 256}}
    frontier |= {"variants": [{"label": "half", "kl": {"value": 0.1, "ci95": [None, None]}}]}
    write(run, frontier=frontier)
    write(run / "frontier" / "table", frontier=frontier)
    series, files, _ = read.collect([tmp_path])
    assert files == 2
    assert [len(one["points"]) for one in series if one["metric"] == "kl"] == [1]
    assert read.collect([run / "mine.json"])[1] == 1, "a file that is named is read, wherever it lies"


def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    write(tmp_path, good=bench(1, 10.0), bad={"schema": "moedge.bench/2", "points": [{}]})
    (tmp_path / "half.json").write_text('{"schema": "moedge.b', encoding="utf-8")
    found = run(tmp_path)
    assert found.exit_code == 0, found.output
    assert "bad.json is damaged and left out" in said(found)
    assert "half.json is damaged and left out" in said(found)


def test_nothing_to_read_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, stage={"schema": "moedge.stage/1"})
    found = run(tmp_path, "--html", tmp_path / "h.html")
    assert found.exit_code == 2
    assert "holds no stored results: give run folders, or files of `moedge bench --save`" in said(found)
    assert not (tmp_path / "h.html").exists()
    assert "none does not exist; give run folders" in said(run("none"))


@needs_ruptures
def test_a_step_is_marked_where_it_is(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(1, 0.01, 14)
    documents = {f"d{day}": bench(day + 1, 10 * noise[day] * (1.2 if day >= 8 else 1)) for day in range(14)}
    write(tmp_path, **documents)
    found = run(tmp_path, "--html", tmp_path / "h.html")
    assert found.exit_code == 0, found.output
    assert re.search(r"2026-11-09, 09abcdef: \+(18|19|20|21)", said(found))
    html = (tmp_path / "h.html").read_text(encoding="utf-8")
    assert re.search(r"2026-11-09, 09abcdef: \+(18|19|20|21)", html)
    assert "http://" not in html.replace("http://www.w3.org", "")
    series = json.loads(run(tmp_path, "--json").stdout)["series"]
    assert [step["index"] for one in series for step in one["steps"]] == [8, 8]
    assert series[0]["steps"][0]["before"] == pytest.approx(10, rel=0.02)
    assert series[0]["steps"][0]["after"] == pytest.approx(12, rel=0.02)


@needs_ruptures
@pytest.mark.parametrize("count", [6, 8, 12, 24, 48])
def test_steps_are_not_seen_in_noise(count: int) -> None:
    """1,000 series show 8 at most by the measured rates; with a rate of 1 % more than 18 come by chance once in 200."""
    generator = np.random.default_rng(1)
    alarms = sum(bool(steps.found("tpot_ms", list(np.exp(generator.normal(0, 0.02, count))))) for _ in range(1000))
    assert alarms <= 18


@needs_ruptures
def test_what_matters_to_nobody_is_no_step() -> None:
    assert steps.found("kl", [1e-11] * 5 + [1.001e-11] * 5) == []
    assert steps.found("kl", [1e-11] * 5 + [1.1e-11] * 5) == [5]
    assert steps.found("accuracy", [0.7] * 5 + [0.62] * 5) == [5]
    assert steps.found("accuracy", [0.0] * 5 + [0.001] * 5) == []
    assert steps.found("tpot_ms", [10.0] * 9 + [20.0]) == [], "one result is no level"
    assert steps.found("kl", [0.0] * 5 + [1e-3] * 5) == []


def test_without_ruptures_everything_else_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "available", lambda: False)
    write(tmp_path, a=bench(1, 10.0))
    found = run(tmp_path)
    assert found.exit_code == 0
    assert "pip install 'moedge[history]'" in said(found)


def test_the_commit_is_that_of_the_server_or_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None
    monkeypatch.setenv("GITHUB_SHA", "1234")
    assert machine.commit() == "1234"
