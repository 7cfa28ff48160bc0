"""The gate on answers: three outcomes, how many questions would decide, and the commands that ask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import moedge
from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.convert.tasks import Answers, Questions, TaskScore
from moedge.runtime.accuracy.paired import Paired
from moedge.runtime.cli import app
from moedge.runtime.parity import accuracy
from moedge.runtime.parity.accuracy import Gate
from moedge.runtime.parity.verdict import Outcome, run_outcome

pytestmark = pytest.mark.usefixtures("no_survey")

LIMITS = tolerances.load().profile("float32", "ort-cpu")


def test_the_limits_are_those_of_the_file_for_every_profile() -> None:
    for name, profile in tolerances.load().profiles.items():
        assert (profile.task_agreement, profile.task_accuracy_drop) == (0.98, 0.01), name


def paired(questions: int, same: float, only_reference: float, only_test: float) -> Paired:
    """Shares to counts."""
    counts = [round(questions * share) for share in (same, only_reference, only_test)]
    return Paired(questions, *counts, both=questions // 2)


@pytest.mark.parametrize(
    ("questions", "same", "lost", "won", "outcomes"),
    [
        (2000, 1.0, 0.0, 0.0, (Outcome.PASSED, Outcome.PASSED)),
        (100, 1.0, 0.0, 0.0, (Outcome.NOT_DECIDED, Outcome.NOT_DECIDED)),
        (250, 1.0, 0.0, 0.0, (Outcome.PASSED, Outcome.NOT_DECIDED)),
        (2000, 0.9, 0.005, 0.005, (Outcome.FAILED, Outcome.PASSED)),
        (4000, 0.995, 0.04, 0.001, (Outcome.PASSED, Outcome.FAILED)),
        (2000, 0.98, 0.01, 0.0, (Outcome.NOT_DECIDED, Outcome.NOT_DECIDED)),
        # Better than the reference is no drop, but other answers are other answers.
        (2000, 0.9, 0.0, 0.08, (Outcome.FAILED, Outcome.PASSED)),
    ],
)
def test_three_outcomes(questions: int, same: float, lost: float, won: float, outcomes: tuple[Outcome, ...]) -> None:
    found = accuracy.judge({"piqa": paired(questions, same, lost, won)}, LIMITS)
    assert tuple(check.outcome for check in found.checks) == outcomes
    assert [check.name for check in found.checks] == ["agreement.low_95", "accuracy_drop.high_95"]


def test_one_broken_task_fails_among_many() -> None:
    """Together 1.4 % of 3,000 questions are lost, which is not decided; of one task 20 % are."""
    tasks = {
        "piqa": paired(1800, 1.0, 0.0, 0.0),
        "sciq": paired(1000, 1.0, 0.0, 0.0),
        "copa": paired(200, 0.8, 0.2, 0.0),
    }
    found = accuracy.judge(tasks, LIMITS)
    assert {check.name for check in found.checks if check.outcome is Outcome.FAILED} >= {
        "copa.agreement.high_95",
        "copa.accuracy_drop.low_95",
    }
    assert all(check.passed for check in found.checks if check.name.startswith(("piqa", "sciq")))


def scores(*available: int) -> Sequence[TaskScore]:
    answers = Answers("acc", (0,), np.array([True]), "q")
    return [TaskScore(f"t{i}", "1", 10, held, 0, "x", {}, answers) for i, held in enumerate(available)]


def test_it_says_how_many_questions_would_do() -> None:
    (agreement, drop) = accuracy.undecided(paired(100, 1.0, 0.0, 0.0), LIMITS, scores(300, 100))
    assert "equal answers is not decided: 96.30% to 100.00% holds the limit, 98.00%, after 100 questions" in agreement
    assert "about 189 would decide if the shares stay: --limit 95." in agreement
    assert "about 381 would decide if the shares stay: --limit 281." in drop
    (_, drop) = accuracy.undecided(paired(100, 1.0, 0.0, 0.0), LIMITS, scores(200, 100))
    assert "more than the 300 of these tasks: name more." in drop
    (drop,) = accuracy.undecided(paired(2000, 1.0, 0.015, 0.005), LIMITS, scores(2000))
    assert "no number of questions decides" in drop
    assert accuracy.undecided(paired(2000, 1.0, 0.0, 0.0), LIMITS, scores(2000)) == []


def limits_file(path: Path, **limits: Any) -> Path:
    profiles = {f"float32/{target}": limits for target in ("ort-cpu", "torch", "portable")}
    path.write_text(yaml.safe_dump({"schema": "moedge.tolerances/1", "profiles": profiles}), encoding="utf-8")
    return path


WIDE = {"task_agreement": 0.5, "task_accuracy_drop": 0.5}
"""Limits that 16 questions can decide."""


@pytest.fixture
def asked(task_files: dict[str, Path], moedge_cache: Path) -> list[str]:
    return ["--tasks", "sciq,arc_easy", *(f"--task-data={name}={path}" for name, path in task_files.items())]


def invoke(*arguments: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "200"})
    return found.exit_code, found.output


def test_verify_gates_a_bundle_on_answers(
    asked: list[str], checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    pair = ["verify", checkpoints["moe"], bundles["moe/ort-cpu"], "--tokens", "0", *asked]
    junit = tmp_path / "junit.xml"
    code, printed = invoke(*pair, "--junit", junit)
    assert code == 1
    assert "100.0% of 16 answers are the same (80.6% to 100.0%)" in printed
    assert "16 questions of sciq, arc_easy:" in printed
    assert "verdict: NOT DECIDED" in printed
    said = [case.find("failure") for case in ElementTree.parse(junit).iter("testcase")]
    assert len(said) == 6
    assert sum(one is not None and str(one.get("message")).startswith("not decided") for one in said) == 2

    code, printed = invoke(*pair, "--json", "--tolerances", limits_file(tmp_path / "wide.yaml", **WIDE))
    result = json.loads(printed[printed.index("{") :])
    assert (code, result["outcome"], result["text"], result["parity"]) == (0, "passed", "no text", [])
    (entry,) = result["accuracy"]
    assert entry["overall"]["agreement"] == 1.0
    assert entry["tolerances"] == WIDE
    assert result["tolerances"]["profiles"]["float32/ort-cpu"] == WIDE
    assert [(task["task"], task["questions"], task["metric"]) for task in entry["tasks"]] == [
        ("sciq", 8, "acc"),
        ("arc_easy", 8, "acc"),
    ]


def test_another_model_fails(asked: list[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The conversion of random weights answers other than its parent: 0.98 is surely not held after 16 questions."""
    code, printed = invoke("verify", checkpoints["dense"], checkpoints["moe"], "--tokens", "0", *asked)
    assert code == 1
    assert "verdict: FAILED" in printed


def test_text_and_answers_stand_in_one_result(
    asked: list[str], checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 40, encoding="utf-8")
    data = dict(one.removeprefix("--task-data=").split("=") for one in asked[2:])
    result = moedge.verify(
        checkpoints["moe"],
        bundles["moe/ort-cpu"],
        text=text,
        tokens=64,
        window=32,
        prefill=24,
        tolerances=limits_file(tmp_path / "wide.yaml", **WIDE),
        tasks=["sciq", "arc_easy"],
        task_data=data,
        limit=8,
    )
    assert len(result["parity"]) == len(result["accuracy"]) == 1
    assert result["outcome"] == "passed"
    from pydantic import TypeAdapter

    from moedge.runtime.parity.results import Verification

    TypeAdapter(Verification).validate_python(result)
    # One failed answer check is enough, whatever the text says.
    result["accuracy"][0]["verdict"]["checks"][0] |= {"passed": False, "decided": True}
    assert run_outcome(result) is Outcome.FAILED


def test_what_cannot_be_asked_is_refused_before_an_engine_is_opened(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(MoEdgeError, match="has no packaged data"):
        Gate.of(gone, gone, Questions(("lambada",)))
    with pytest.raises(MoEdgeError, match="what a device said to its prompts"):
        Gate.of(gone, tmp_path / "answers.npz", Questions(("sciq",)))
    with pytest.raises(MoEdgeError, match="not a run folder"):
        Gate.of(gone, None, Questions(("sciq",)))
    assert Gate.of(gone, gone, Questions()) is None
    data = tmp_path / "sciq.jsonl"
    data.write_text("{}", encoding="utf-8")
    none = limits_file(tmp_path / "none.yaml", task_agreement=None, task_accuracy_drop=None)
    with pytest.raises(MoEdgeError, match="name neither task_agreement nor task_accuracy_drop"):
        Gate.of(gone, gone, Questions(("sciq",), {"sciq": data}), none)
    half = limits_file(tmp_path / "half.yaml", task_agreement=None)
    with pytest.raises(MoEdgeError, match="give task_agreement and task_accuracy_drop together"):
        tolerances.load(half)
    with pytest.raises(MoEdgeError, match="nothing to compare"):
        moedge.verify(gone, gone, tokens=0)
    code, printed = invoke("verify", gone, gone, "--tokens", "0")
    assert code == 2
    assert "There is nothing to compare" in printed


def test_evaluate_starts_windows_as_the_tokenizer_does_or_as_asked(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the cat sat on the mat" for _ in range(40)), encoding="utf-8")
    adding = tmp_path / "adding"
    shutil.copytree(checkpoints["dense"], adding)
    files = json.loads((adding / "tokenizer.json").read_text(encoding="utf-8"))
    start: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    files["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    (adding / "tokenizer.json").write_text(json.dumps(files), encoding="utf-8")
    options: dict[str, Any] = {"texts": text, "tokens": 128, "window": 64}
    found = [
        [(row["bos"], row["perplexity"]["text"]["nll"]) for row in result["rows"]]
        for result in (
            moedge.evaluate([checkpoints["dense"], adding, bundles["dense/ort-cpu"]], **options),
            moedge.evaluate([checkpoints["dense"], adding, bundles["dense/ort-cpu"]], bos=True, **options),
        )
    ]
    (without, with_bos, bundle), asked = found
    assert (without[0], with_bos[0], bundle[0]) == (False, True, False)
    assert bundle[1] == pytest.approx(without[1], abs=1e-4)
    assert with_bos[1] != pytest.approx(without[1], abs=1e-3)
    assert asked[:2] == [with_bos, with_bos]
    assert asked[2] == (True, pytest.approx(with_bos[1], abs=1e-4))
    short = ["--text", text, "--tokens", "128", "--window", "64"]
    code, printed = invoke("evaluate", checkpoints["dense"], *short, "--bos")
    assert code == 0
    assert "windows of 64 tokens that start with BOS" in " ".join(printed.split())


def test_evaluate_sets_bundles_beside_the_checkpoint_and_the_dense_parent(
    asked: list[str], checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the cat sat on the mat" for _ in range(40)), encoding="utf-8")
    models = [checkpoints["dense"], checkpoints["moe"], bundles["moe/ort-cpu"]]
    options = ["--shots", "2", "--limit", "4", "--text", text, "--tokens", "256", "--window", "64"]
    code, printed = invoke("evaluate", *models, *asked, *options, "--save", tmp_path / "scores.json")
    assert code == 0, printed
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["protocol"]["documents"] == {"text": "40 documents"}
    assert [row["model"] for row in result["rows"]] == list(map(str, models))
    dense, moe, bundle = result["rows"]
    assert dense["perplexity"]["text"]["tokens"] == bundle["perplexity"]["text"]["tokens"] == 4 * 63
    assert dense["perplexity"]["text"]["ppl"] != moe["perplexity"]["text"]["ppl"]
    assert bundle["perplexity"]["text"]["nll"] == pytest.approx(moe["perplexity"]["text"]["nll"], abs=1e-4)
    assert [row["perplexity"]["text"]["ffn_read_share"] is None for row in result["rows"]] == [False, False, True]
    assert [row["engine"]["name"] for row in result["rows"]] == ["torch dense", "torch moe", "ort-cpu moe"]
    assert [row["bos"] for row in result["rows"]] == [False, False, False]  # their tokenizer adds none
    for row in result["rows"]:
        assert [(task["task"], task["questions"], task["shots"]) for task in row["tasks"]] == [
            ("sciq", 4, 2),
            ("arc_easy", 4, 2),
        ]
        assert set(row["tasks"][1]["metrics"]) == {"acc", "acc_norm"}
    pairs = [(pair["reference"], pair["test"]) for pair in result["paired"]]
    one, two, three = map(str, models)
    assert pairs == [(one, two), (one, three), (two, three)]
    assert result["paired"][2]["overall"]["agreement"] == 1.0
    assert result["paired"][0]["overall"]["reference_accuracy"] == pytest.approx(
        np.mean([task["metrics"]["acc"]["value"] for task in dense["tasks"]])
    )
    assert "2 shots" in printed
    assert "40 documents" in printed
    assert f"answers of {three} beside {two}:" in " ".join(printed.split())


def test_a_model_that_is_not_there_is_said_before_others_are_scored(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 40, encoding="utf-8")
    models = [str(checkpoints["moe"]), str(tmp_path / "gone")]
    result = CliRunner().invoke(app, ["evaluate", *models, "--text", str(tmp_path / "text.txt"), "--tokens", "64"])
    assert result.exit_code != 0
    assert "gone: the folder does not exist." in " ".join(result.stderr.split())
    assert "perplexity on" not in result.stderr


def test_a_bundle_alone_is_not_scored_on_text_that_its_model_may_have_seen(
    bundles: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, make_run: Any
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 40, encoding="utf-8")
    with pytest.raises(MoEdgeError, match="name its checkpoint as well"):
        moedge.evaluate(bundles["moe/ort-cpu"], [text], tokens=64, window=32)
    dense = moedge.evaluate(bundles["dense/ort-cpu"], [text], tokens=64, window=32)
    assert dense["rows"][0]["perplexity"]["text"]["tokens"] == 62
    run = make_run(tmp_path / "run")
    found = moedge.evaluate(run / "export" / "ort-cpu", [text], tokens=64, window=32)
    assert found["rows"][0]["engine"]["name"] == "ort-cpu moe"


@pytest.fixture
def make_run(bundles: dict[str, Path], checkpoints: dict[str, Path]) -> Any:
    """Return a function that lays the checkpoint and the bundle out as a run folder."""

    def make(root: Path) -> Path:
        for place, folder in (("convert/checkpoint", checkpoints["moe"]), ("export/ort-cpu", bundles["moe/ort-cpu"])):
            shutil.copytree(folder, root / place)
        (root / "run.json").write_text("{}", encoding="utf-8")
        return root

    return make


def test_a_run_folder_asks_each_engine_once(
    asked: list[str], make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    true = accuracy.open_engine
    monkeypatch.setattr(
        accuracy, "open_engine", lambda path, **more: (opened.append(Path(path).name), true(path, **more))[1]
    )
    wide = limits_file(tmp_path / "wide.yaml", **WIDE)
    code, printed = invoke("verify", make_run(tmp_path / "run"), "--tokens", "0", *asked, "--tolerances", wide)
    assert code == 0, printed
    assert "ort-cpu moe vs torch moe, answers" in printed
    assert opened == ["checkpoint", "ort-cpu"]
