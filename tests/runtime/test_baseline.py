"""Worse than last time is said, noise and trifles are not."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.configs import tolerances
from moedge.runtime.cli import app
from moedge.runtime.commands import verify
from moedge.runtime.parity import baseline
from moedge.runtime.parity.suite import finished

LIMITS = tolerances.load()
WINDOWS = 8
NOISE = np.random.default_rng(0).normal(0, 1, WINDOWS)


def check(name: str, value: float | None, relation: str, limit: float) -> dict[str, Any]:
    passed = value is not None and (value <= limit if relation == "<=" else value >= limit)
    return {"name": name, "value": value, "relation": relation, "limit": limit, "passed": passed, "decided": True}


def entry(kl: np.ndarray, flips: int = 0, most: float = 1e-3, name: str = "a vs b") -> dict[str, Any]:
    decisions = 600_000
    return {
        "schema": "moedge.parity/1",
        "name": name,
        "reference": {"name": "torch moe", "model": {}},
        "test": {"name": "ort-cpu moe"},
        "tokens": {"windows": WINDOWS, "window": 256, "prefill": 224},
        "overall": {"tokens": WINDOWS * 256},
        "routing": {"compared": True, "decisions": decisions, "flips": 0},
        "replay": {"router": {"compared": True, "decisions": decisions}},
        "by_window": {"prefill": {"kl_ref_test.mean": kl.tolist()}},
        "verdict": {
            "notes": [],
            "checks": [
                check("prefill.kl_ref_test.mean", float(kl.mean()), "<=", 0.03),
                check("decode.rel_error.median", most, "<=", 0.1),
                check("router.expert_set_agreement", 1 - flips / decisions, ">=", 0.9999),
            ],
        },
    }


def result(*entries: dict[str, Any], text: str = "wiki") -> Any:
    identity = {"schema": "moedge.identity/1", "name": "c = d", "tokens": 64, "max_rel_error": 3e-6, "limit": 1e-4}
    identity |= {"reference": {"name": "torch dense", "model": {}}, "test": {"name": "torch moe"}, "passed": True}
    document = {"schema": "moedge.verify/1", "text": text, "identity": [identity], "parity": list(entries)}
    return finished(document, LIMITS)


def beside(old: Any, new: Any) -> Any:
    return baseline.compare(new, baseline.Baseline(Path("old.json"), "0" * 64, old))


KL = 0.004 + 0.0005 * np.linspace(-1, 1, WINDOWS)


def test_a_figure_that_grew_in_every_window_is_worse_though_within_its_limit() -> None:
    found = beside(result(entry(KL)), result(entry(KL * 1.2)))
    assert found["outcome"] == "worse"
    (worse,) = (each for each in found["checks"] if each["worse"])
    assert worse["name"] == "prefill.kl_ref_test.mean"
    assert 0 < worse["interval"][0] < 0.2 * 0.004 < worse["interval"][1]
    (sentence,) = found["sentences"]
    assert "prefill.kl_ref_test.mean is 0.0048, was 0.004 (limit <= 0.03; paired over 8 windows, +0.0007" in sentence


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (KL, "equal"),
        (KL * 0.7, "better"),
        (KL + 0.0012 * NOISE, "windows differ both ways: noise"),
        (KL * 1.05, "in every window, but by less than a hundredth of the limit"),
    ],
)
def test_noise_and_trifles_are_not_worse(new: np.ndarray, why: str) -> None:
    found = beside(result(entry(KL)), result(entry(new)))
    assert found["outcome"] == "not worse", why
    assert not found["sentences"]


def test_rounding_in_another_order_is_not_worse_and_a_jump_far_below_the_limit_is() -> None:
    """Float32: a KL of 1e-11 may double; of 1e-7, a three hundred thousandth of the limit, it must be said."""
    quiet = KL * 1e-9
    assert beside(result(entry(quiet)), result(entry(quiet * 3)))["outcome"] == "not worse"
    assert beside(result(entry(quiet)), result(entry(quiet * 1e4)))["outcome"] == "worse"


def test_without_windows_a_value_must_double() -> None:
    assert beside(result(entry(KL, most=0.002)), result(entry(KL, most=0.0038)))["outcome"] == "not worse"
    found = beside(result(entry(KL, most=0.002)), result(entry(KL, most=0.0041)))
    assert found["outcome"] == "worse"
    assert "decode.rel_error.median is 0.0041, was 0.002" in found["sentences"][0]
    assert "more than 2 times as large" in found["sentences"][0]
    few = copy.deepcopy(entry(KL * 1.2))
    few["by_window"]["prefill"]["kl_ref_test.mean"] = [0.0048] * 4
    assert beside(result(few), result(few))["outcome"] == "not worse"


def test_a_count_must_be_more_than_chance() -> None:
    """Four checks, so each has a chance of 1 in 400: 2^-8 is more, 2^-9 less."""
    assert beside(result(entry(KL, flips=0)), result(entry(KL, flips=8)))["outcome"] == "not worse"
    found = beside(result(entry(KL, flips=0)), result(entry(KL, flips=9)))
    assert found["outcome"] == "worse"
    assert "too many of 600,000 for chance" in found["sentences"][0]


def test_choices_of_an_engine_that_runs_free_are_no_independent_counts() -> None:
    """One that changes early changes the later ones, so a count must double."""

    def free(flips: int) -> Any:
        found = entry(KL)
        found["replay"] = None
        found["verdict"]["checks"][2] = check("routing.expert_set_agreement", 1 - flips / 600_000, ">=", 0.9999)
        return result(found)

    assert beside(free(20), free(39))["outcome"] == "not worse"
    found = beside(free(20), free(41))
    assert found["outcome"] == "worse"
    assert "more than 2 times as large" in found["sentences"][0]


def test_equal_engines_that_round_otherwise_raise_an_alarm_in_less_than_one_verification_in_a_hundred() -> None:
    """Twelve figures of eight windows each are drawn anew: 400 pairs of results."""
    generator = np.random.default_rng(7)

    def drawn() -> Any:
        found = []
        for number in range(12):
            found.append(entry(0.004 * generator.lognormal(0, 0.5, WINDOWS), name=f"{number} vs b"))
            found[-1]["test"] = {"name": str(number)}
        return result(*found)

    alarms = sum(beside(drawn(), drawn())["outcome"] == "worse" for _ in range(400))
    assert alarms <= 9, "of 400; were the chance 1 in 100, more than 9 would come in 8 of 1,000 such tests"


@pytest.mark.parametrize(("old", "new"), [(0, 9), (3, 11), (40, 70)])
def test_the_chance_of_a_count_is_exact(old: int, new: int) -> None:
    exact = sum(math.comb(old + new, count) for count in range(new, old + new + 1)) / 2 ** (old + new)
    assert baseline._chance(old, new) == pytest.approx(exact, rel=1e-9)


def test_the_chance_of_a_large_count_takes_no_minutes() -> None:
    known = stats.binom.sf(31_000 - 1, 61_440, 0.5)
    assert baseline._chance(61_440 - 31_000, 31_000) == pytest.approx(known, rel=1e-6)


def test_a_check_that_passed_before_and_does_not_now_is_worse_whatever_it_is() -> None:
    lost = entry(KL)
    lost["verdict"]["checks"][0] = check("prefill.kl_ref_test.mean", None, "<=", 0.03)
    found = beside(result(entry(KL)), result(lost))
    assert found["outcome"] == "worse"
    assert "is none, was 0.004" in found["sentences"][0]
    assert "it passed before" in found["sentences"][0]
    assert beside(result(lost), result(lost))["outcome"] == "not worse"


def test_a_moved_folder_s_comparison_with_its_own_weights_is_told_from_that_with_the_portable_bundle() -> None:
    def both(folder: str, kl: np.ndarray) -> Any:
        plain, kernels = entry(KL, name=f"{folder} vs portable"), entry(kl, name=f"{folder} vs its own")
        kernels["reference"]["model"]["weights_of"] = "ort-cpu-int8"
        return result(plain, kernels)

    found = beside(both("old", KL), both("new", KL * 9))
    assert found["outcome"] == "worse"
    assert all("new vs its own" in sentence for sentence in found["sentences"]), found["sentences"]


def test_what_has_no_counterpart_is_not_compared() -> None:
    moved = beside(result(entry(KL)), result(entry(KL, name="other/folder vs b")))
    assert moved["outcome"] == "not worse", "a folder may have moved"
    gone = beside(result(entry(KL), entry(KL, name="x vs y")), result(entry(KL)))
    assert gone["outcome"] == "not compared"
    assert gone["sentences"] == ["x vs y is only in the baseline."]
    other = beside(result(entry(KL), text="c4"), result(entry(KL)))
    assert other["outcome"] == "not compared"
    assert not other["checks"]
    named, again = ({**entry(KL), "text_sha256": sha256 * 64} for sha256 in "ab")
    found = beside(result(named), result(again))
    assert (found["outcome"], found["sentences"]) == ("not compared", ["a vs b: not compared: another text."])
    assert beside(result(entry(KL)), result(again))["outcome"] == "not worse", "an older result says only the name"
    short = entry(KL)
    short["tokens"] = {**short["tokens"], "windows": 4}
    assert beside(result(short), result(entry(KL)))["outcome"] == "not compared"
    new = beside(result(entry(KL)), result(entry(KL), entry(KL * 9, name="x vs y")))
    assert new["outcome"] == "not worse", "what the baseline lacks cannot be worse than it"


def test_a_check_that_the_new_result_lacks_is_said_and_leaves_it_not_compared() -> None:
    old, new = entry(KL), entry(KL)
    new["verdict"]["checks"][1]["name"] = "decode.rel_error.renamed"
    found = beside(result(old), result(new))
    assert found["outcome"] == "not compared"
    assert found["sentences"] == ["a vs b: check decode.rel_error.median is only in the baseline."]
    old["verdict"]["checks"] += [check("batch.padding.not_compared", 1, "<=", 0)]
    assert beside(result(old), result(entry(KL)))["outcome"] == "not worse", "now everything was compared"
    replayed = entry(KL)
    for one in replayed["verdict"]["checks"][:2]:
        one["name"] = f"arithmetic.{one['name']}"
    changed = beside(result(entry(KL)), result(replayed))
    assert (changed["outcome"], len(changed["sentences"])) == ("not compared", 2)


@pytest.mark.parametrize(("before", "outcome"), [(0.001, "worse"), (0.004, "not worse")])
def test_the_older_name_of_a_check_is_read(before: float, outcome: str) -> None:
    old, new = entry(KL), entry(KL)
    old["verdict"]["checks"].append(check("free.perplexity.drift_beyond_3_errors", before, "<=", 0.02))
    new["verdict"]["checks"].append(check("free.perplexity.drift_beyond_errors", 0.004, "<=", 0.02))
    found = beside(result(old), result(new))
    assert found["outcome"] == outcome
    assert "free.perplexity.drift_beyond_errors" in [one["name"] for one in found["checks"]]


def shapes(kl: float) -> dict[str, Any]:
    checks = [check("batch.padding.decode.kl.max", kl, "<=", 0.01), check("determinism", 0.0, "<=", 0.0)]
    return {
        **{"schema": "moedge.shapes/1", "name": "b in other shapes", "test": {"name": "ort-cpu moe"}},
        **{"prompts": [40, 31, 12], "cases": {}, "not_run": {}, "verdict": {"notes": [], "checks": checks}},
    }


def answers(differ: int, lost: int, questions: int = 1000) -> dict[str, Any]:
    """One task: so many answers differ from the reference's, and so many it alone has right."""
    facts = {"questions": questions, "agreement": 1 - differ / questions, "only_reference": lost}
    checks = [
        check("agreement.low_95", 1 - differ / questions - 0.01, ">=", 0.9),
        check("accuracy_drop.high_95", lost / questions, "<=", 0.1),
    ]
    return {
        **{"schema": "moedge.accuracy/1", "name": "b on tasks", "reference": {"name": "torch moe", "model": {}}},
        **{"test": {"name": "ort-cpu moe"}, "shots": 0, "limit": None, "overall": facts},
        "tasks": [{**facts, "task": "piqa", "version": "1", "data": "abc"}],
        "verdict": {"notes": [], "checks": checks},
    }


def test_other_shapes_and_answers_to_tasks_are_compared_too() -> None:
    def whole(kl: float, differ: int, lost: int, **more: int) -> Any:
        return {**result(entry(KL)), "shapes": [shapes(kl)], "accuracy": [answers(differ, lost, **more)]}

    old = whole(1e-4, 20, 10)
    assert beside(old, whole(3.9e-4, 30, 16))["outcome"] == "not worse", "rounding may do that; 30 after 20 is chance"
    found = beside(old, whole(4.1e-4, 20, 10))
    (said,) = found["sentences"]
    assert said.startswith(
        "b in other shapes: batch.padding.decode.kl.max is 0.00041, was 0.0001 (limit <= 0.01; more th"
    )
    found = beside(old, whole(1e-4, 60, 45))
    assert [one["name"] for one in found["checks"] if one["worse"]] == ["agreement.low_95", "accuracy_drop.high_95"]
    assert "too many of 1,000 for chance" in found["sentences"][0]
    other = beside(old, whole(1e-4, 20, 10, questions=500))
    assert other["sentences"] == ["b on tasks: the baseline has other windows, tokens or questions."]
    gone = beside(old, result(entry(KL)))
    assert gone["outcome"] == "not compared"
    assert gone["sentences"] == [f"{name} is only in the baseline." for name in ("b in other shapes", "b on tasks")]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"schema": "moedge.bench/1"}), "is not of schema moedge.verify/1"),
        (json.dumps({"schema": "moedge.verify/1", "parity": 3}), "is not of schema"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(tmp_path: Path, content: str, match: str) -> None:
    file = tmp_path / "old.json"
    file.write_text(content)
    with pytest.raises(MoEdgeError, match=match):
        baseline.read(file)


def test_a_damaged_baseline_is_refused_in_a_sentence(tmp_path: Path) -> None:
    old = result(entry(KL))
    del old["parity"][0]["verdict"]["checks"][0]["limit"], old["parity"][0]["test"]
    write_json(tmp_path / "old.json", old)
    with pytest.raises(MoEdgeError, match="is damaged"):
        baseline.compare(result(entry(KL, name="z vs b")), baseline.read(tmp_path / "old.json"))


def test_a_damaged_baseline_costs_no_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = result(entry(KL))
    del old["parity"][0]["verdict"]["checks"][0]["limit"], old["parity"][0]["test"]
    write_json(tmp_path / "old.json", old)
    monkeypatch.setattr(verify, "_compared", lambda *_: result(entry(KL, name="z vs b")))
    monkeypatch.setattr(verify.checks, "markdown", lambda _: "")  # of a result with more in it
    options = ["--baseline", str(tmp_path / "old.json"), "--junit", str(tmp_path / "x.xml"), "--json"]
    found = CliRunner().invoke(app, ["verify", "one", "two", *options, "--fail-on-worse"])
    assert (found.exit_code, json.loads(found.stdout)["parity"][0]["name"]) == (2, "z vs b")
    assert "old.json is damaged" in found.stderr
    assert (tmp_path / "x.xml").is_file()
