"""Tables on a terminal of 80 columns: nothing is cut, no word is broken."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moedge.configs.recipe import parse_recipe
from moedge.runtime import doctor
from moedge.runtime.commands import bench, build, diagnose, evaluate, methods, verify
from moedge.runtime.report.bench import show as show_bench
from moedge.runtime.report.build import build as build_report
from moedge.runtime.report.summary import show
from moedge.runtime.tables import Sheet

WIDTHS = (80, 100, 120)
LABELS = ("ort-cpu-int4 moe", "tensorrt-rtx-int8 dense", "portable moe")


@pytest.fixture
def report(tmp_path: Path, sample_runs: Any) -> dict[str, Any]:
    sample = sample_runs("c4")
    root = sample.make(tmp_path)
    found = build_report(root, parse_recipe("model: {source: x}", name="toy").model_dump())
    quality, verification, speed = (found[name] for name in ("quality", "verification", "speed"))
    quality["rows"].append({**quality["rows"][2], "label": "static mask, best of 16 seeds by calibration"})
    for label in LABELS:
        verification["identity"].append({**verification["identity"][0], "name": f"{label} = torch dense"})
        entry = sample.parity(label, f"torch {label.split()[1]}")
        checks = [
            {**entry["verdict"]["checks"][0], "name": "arithmetic.prefill.kl_test_ref.mean", "passed": False},
            {**entry["verdict"]["checks"][0], "name": "free.perplexity.drift_beyond_errors", "decided": False},
        ]
        entry["verdict"]["checks"] = checks
        entry["replay"] = {"overall": entry["overall"], "router": {"agreement": 1.0}, "phases": entry["phases"]}
        verification["parity"].append(entry)
        for point in (*speed["points"], *speed["batches"]):
            point["rows"].append({**point["rows"][0], "label": label})
        speed["engines"][label] = copy.deepcopy(speed["engines"]["ort-cpu moe"])
    return found


def words(text: str) -> set[str]:
    return {word.strip(".,;:()") for word in text.split()}


def check(printed: Callable[[Console], None], expected: str) -> None:
    for width in WIDTHS:
        console = Console(width=width, force_terminal=False)
        with console.capture() as captured:
            printed(console)
        text = captured.get()
        assert "…" not in text
        missing = words(expected) - words(text)
        assert not missing, f"broken at {width} columns: {sorted(missing)}"
        table = [line.rstrip() for line in text.splitlines() if "  " in line.strip()]
        assert table
        assert max(map(len, table)) <= width


def test_the_summary_of_a_run(report: dict[str, Any]) -> None:
    check(
        lambda console: show(report, console),
        " ".join(LABELS) + " all experts same tokens/s comparison PyTorch sets calibration FAILED passed 100.0000%",
    )


def test_doctor() -> None:
    result = doctor.examine()
    reasons = [reason for entry in result["targets"] for reason in entry["run"]["reasons"] if "(" not in reason]
    names = " ".join(entry["target"] for entry in result["targets"])
    check(lambda console: console.print(doctor.render(result)), f"{names} {' '.join(reasons).replace(';', '')}")


def printing(monkeypatch: pytest.MonkeyPatch, module: Any, call: Callable[[], object]) -> Callable[[Console], None]:
    def printed(console: Console) -> None:
        monkeypatch.setattr(module, "Console", lambda: console)
        call()

    return printed


def test_verify(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = {**copy.deepcopy(report["verification"]), "outcome": "failed"}
    for entry in result["parity"]:
        entry["replay"], entry["verdict"]["notes"] = None, []
    printed = printing(monkeypatch, verify, lambda: verify._print(result))
    check(printed, "arithmetic.prefill.kl_test_ref.mean free.perplexity.drift_beyond_errors check value limit")


def test_bench(report: dict[str, Any]) -> None:
    speed = copy.deepcopy(report["speed"])
    for engine in speed["engines"].values():
        engine["info"]["device"] = "NVIDIA H200"
        engine["peak_gpu_mib"] = 12345.0
    check(lambda console: show_bench(speed, console), " ".join(LABELS) + " tokens/s 19.50-20.40 12345 MiB p99 batch")
    cell = [{"name": "attention", "nodes": 2, "ms": 1234.5, "share": 0.75}]
    phase = {"ms": 1234.5, "groups": cell, "operators": [{**cell[0], "name": "SkipSimplifiedLayerNormalization"}]}
    profiles = {label: {"prefill": phase, "decode": phase} for label in (*LABELS, "ort-cpu moe", "ort-cpu dense")}
    check(lambda console: bench.show_profiles(profiles, console), "SkipSimplifiedLayerNormalization 1234.50 75%")


def test_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a-text-of-{name}" for name in ("wiki", "c4", "code", "law", "medicine", "mathematics")]
    metrics = {"acc,none": {"value": 0.51234, "stderr": 0.01234}}
    rows = [
        {
            "model": name,
            "engine": {"runtime": "onnxruntime 1.31.1", "dtype": "int8 weights"},
            "bos": name == "build/other",
            "perplexity": {text: {"ppl": 123.456, "tokens": 9, "ffn_read_share": 0.754} for text in texts},
            "tasks": [
                {"task": "arc_challenge", "questions": 1172, "metrics": metrics, "version": 1, "shots": 0, "data": "x"}
            ],
        }
        for name in ("build/moe/checkpoint", "SmolLM2-135M-Instruct", "build/tuned", "build/other")
    ]
    protocol = {"window": 512, "dtype": "float32", "documents": dict.fromkeys(texts, "x"), "shots": 0}
    found = {"questions": 1172, "agreement": 0.976, "test_accuracy": 0.51, "drop": 0.0123, "mcnemar_p": 0.03}
    found |= {"drop_interval": [-0.0012, 0.0234]}
    pair = {"test": "build/other", "reference": "build/tuned", "tasks": {"arc_challenge": found, "piqa": found}}
    result = {"protocol": protocol, "rows": rows, "paired": [{**pair, "overall": found}]}
    expected = " ".join(texts) + " build/moe/checkpoint SmolLM2-135M-Instruct arc_challenge 0.5123 0.0123 75.4%"
    expected += " 97.6% +1.23% -0.12% +2.34% 0.03"
    check(printing(monkeypatch, evaluate, lambda: evaluate._print(result)), expected)


def test_diagnose(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = dict.fromkeys(("router", "oracle", "random", "static"), 0.123)
    layer = {"layer": 29, "top_k": 12, "experts": 48, "agreement": 1.0, "captured": 1.0, "load_cv": 1.234}
    layer |= {"dead_experts": 10, "dead_neurons": 1.0, "relative_error": errors}
    text = {"documents": "d", "tokens": 4096, "reference": "dense", "layers": [layer]}
    text["mean"] = {**layer, "agreement_by_chance": 0.5}
    result = {"method": "cmoe", "protocol": {"window": 512, "dtype": "float32"}, "texts": {"wiki": text}}
    printed = printing(monkeypatch, diagnose, lambda: diagnose._print({**result, "stability": None}))
    check(printed, "layer 12 of 48 100.0% 1.234 0.123 static oracle")


@pytest.mark.parametrize("name", [None, "moedge", "cmoe"])
def test_methods(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = printing(monkeypatch, methods, lambda: methods.methods(name, as_json=False))
    check(printed, "parameter default values shared experts")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    check(printing(monkeypatch, build, build.list_devices), "device SM memory GB/s engines")


def test_what_cannot_stand_side_by_side_is_printed_below_with_its_first_column() -> None:
    sheet = Sheet(title="wide")
    sheet.add_column("name")
    for i in range(12):
        sheet.add_column(f"a-column-{i}", justify="right")
    sheet.add_row("first", *(f"{i}{i}{i}" for i in range(12)), style="bold")
    check(lambda console: console.print(sheet), " ".join(f"a-column-{i} {i}{i}{i}" for i in range(12)))
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(sheet)
    assert len(re.findall("^first", captured.get(), re.MULTILINE)) == 2
