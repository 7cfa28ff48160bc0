"""The gate: how often it errs on rounds whose truth is known, what it compares with what, and limits of one's own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.runtime.bench.latency import _times
from moedge.runtime.gate.judge import judge
from moedge.runtime.gate.limits import parse
from moedge.runtime.gate.slowdown import slowdown
from moedge.runtime.parity.verdict import Outcome
from moedge.runtime.report import bench as tables

CHECKS = 4
"""Comparisons of one gate here: two engines, two times."""


def noise(kind: str, rounds: int, generator: np.random.Generator) -> np.ndarray:
    """Log times of rounds, 2 % noise: independent, neighbours alike, single rounds disturbed."""
    plain = generator.normal(0, 0.02, rounds)
    if kind == "alike":
        for i in range(1, rounds):
            plain[i] = 0.5 * plain[i - 1] + np.sqrt(1 - 0.25) * plain[i]
    if kind == "disturbed":
        plain = plain + (generator.random(rounds) < 0.1) * generator.uniform(0.1, 0.5, rounds)
    return plain


def rates(kind: str, slower: float, *, paired: bool, gates: int = 250, rounds: int = 20) -> dict[Outcome, float]:
    """How a gate over one comparison of ``CHECKS`` ends; both runs lie on a machine that drifts by a tenth."""
    generator = np.random.default_rng(7)
    ends: list[Outcome] = []
    for number in range(gates):
        samples = []
        for shift in (np.log1p(slower), 0.0):
            drift = np.linspace(0, generator.uniform(-0.1, 0.1), rounds) + generator.uniform(-0.1, 0.1)
            engine, control = (noise(kind, rounds, generator) + drift for _ in range(2))
            samples.append(engine - control + shift)
        found = slowdown(samples[0], None if paired else samples[1], CHECKS, seed=number)
        ends.append(found.outcome(0.05))
    return {outcome: ends.count(outcome) / gates for outcome in Outcome}


@pytest.mark.parametrize("paired", [True, False], ids=["in one run", "in two runs"])
@pytest.mark.parametrize("kind", ["independent", "alike", "disturbed"])
def test_an_unchanged_build_raises_no_alarm_and_a_slower_one_does_not_pass(kind: str, paired: bool) -> None:
    """A fourth of one in a hundred each, by the confidence of a gate of four; drift of the machine cancels.

    Of 250 gates 0.6 are expected to err; 4 or more do so once in 300 such tests. Where neighbours are alike by half,
    blocks of three rounds see only a part of it: 2 % of 2000 other gates passed a slow build, which is 5 of 250, and 11
    with three standard deviations more.
    """
    same, slow = (rates(kind, slower, paired=paired) for slower in (0.0, 0.05))
    assert same[Outcome.FAILED] <= 3 / 250
    assert slow[Outcome.PASSED] <= (11 if kind == "alike" else 3) / 250


@pytest.mark.parametrize(("slower", "least"), [(0.05, 0.9), (0.1, 0.99)])
def test_a_real_slow_down_is_found(slower: float, least: float) -> None:
    """20 rounds of 2.8 % noise (two engines of 2 %): the interval is about 4 % wide, so 5 % is told from nothing."""
    assert rates("independent", slower, paired=True)[Outcome.FAILED] >= least


def test_a_coarse_measurement_cannot_tell_and_says_how_many_rounds_would() -> None:
    generator = np.random.default_rng(0)
    coarse = slowdown(generator.normal(0, 0.1, 10), None, CHECKS)
    assert coarse.outcome(0.05) is Outcome.NOT_DECIDED
    needed = coarse.rounds_needed(0.05)
    fine = slowdown(generator.normal(0, 0.1, needed), None, CHECKS)
    assert fine.outcome(0.05) is not Outcome.NOT_DECIDED
    few = slowdown(np.zeros(4), None, CHECKS)
    assert few.outcome(0.05) is Outcome.NOT_DECIDED, "four rounds have no interval"


def test_single_disturbed_rounds_decide_nothing() -> None:
    """Three of twenty rounds take seven times as long: less than the fifth that is left out."""
    sample = np.random.default_rng(0).normal(0, 0.01, 20)
    sample[[3, 9, 15]] += 2
    assert slowdown(sample, None, CHECKS).value == pytest.approx(0, abs=0.01)
    assert slowdown(sample, None, 1).high < 0.3, "by their mean it would be beyond 1"


def test_a_faster_build_passes_and_equal_times_have_no_width() -> None:
    found = slowdown(np.full(10, np.log(0.8)), None, CHECKS)
    assert (found.value, found.low, found.high) == pytest.approx((-0.2, -0.2, -0.2))
    assert found.outcome(0.05) is Outcome.PASSED
    assert slowdown(np.full(10, np.log(1.04)), None, CHECKS).outcome(0.05) is Outcome.PASSED
    assert slowdown(np.full(10, np.log(1.06)), None, CHECKS).outcome(0.05) is Outcome.FAILED


# --- what is compared with what -------------------------------------------------------------------------------------


def result(times: dict[str, float], *, machine: float = 1.0, seed: int = 0, **hashes: str) -> Any:
    """A benchmark: engines take ``times`` ms, on a machine that is slower by ``machine``; ``moe`` is a MoE."""
    generator = np.random.default_rng(seed)
    engines, rows = {}, []
    for label, value in times.items():
        facts = {"name": label, "runtime": "script 1", "device": "CPU", "dtype": "float32", "threads": 2}
        facts["model"] = {"moe": "moe" in label}
        engines[label] = {"sha256": hashes.get(label.replace(" ", "_"), label), "info": facts}
        engines[label] |= {"peak_rss_mib": 900.0, "load_s": 1.5}
        rounds = (value * machine * generator.normal(1, 0.005, 20)).tolist()
        p50 = float(np.median(rounds))
        ends = [0.98 * p50, 1.02 * p50]
        summary = {"p50": p50, "p90": 1.1 * p50, "p99": 1.2 * p50, "mean": p50, "ci95": ends}
        summary["ci95_of"] = {"p90": ends, "p99": [1.1 * p50, 1.4 * p50], "mean": ends}
        row = {"label": label, "ttft_ms": summary, "tpot_ms": summary, "rounds": {"ttft_ms": rounds, "tpot_ms": rounds}}
        rows.append({**row, "prefill_tokens_per_s": 1e3 / p50, "decode_tokens_per_s": 1e3 / p50})
    point = {"prompt": 8, "decode": 4, "batch": 1, "depth": 0, "threads": None, "rounds": 20, "warmup_rounds": 1}
    point |= {"settled": True, "seconds": 1.0, "rows": rows, "ratios": []}
    return {"engines": engines, "points": [point], "machine": {"processor": "x", "logical_cores": 2}}


OLD = {"moe": 10.0, "dense": 20.0}


def outcomes(gate: Any) -> dict[str, str]:
    assert {check["what"] for check in gate["checks"]} == {"ttft_ms", "tpot_ms"}
    return {check["label"]: check["outcome"] for check in gate["checks"] if check["what"] == "tpot_ms"}


def test_a_slower_machine_is_taken_out_by_an_engine_that_did_not_change() -> None:
    gate = judge(result(OLD, machine=1.3, seed=1), baseline=result(OLD))
    assert outcomes(gate) == {"moe": "passed", "dense": "passed"}
    assert {check["label"]: check["control"] for check in gate["checks"]} == {"moe": "dense", "dense": "moe"}
    assert gate["checks"][0]["sentence"].startswith("no regression: time to first token ")
    assert "beside dense" in gate["checks"][0]["sentence"]


def test_a_slower_build_is_found_on_a_faster_machine() -> None:
    slower = result({"moe": 11.0, "dense": 20.0}, machine=0.8, seed=1, moe="rebuilt")
    gate = judge(slower, baseline=result(OLD))
    assert outcomes(gate) == {"moe": "failed"}
    assert gate["notes"] == ["dense did not change; others are compared by it, and it is not judged"]
    assert gate["outcome"] == "failed"
    check = gate["checks"][0]
    assert check["value"] == pytest.approx(0.1, abs=0.01)
    assert "regression: " in check["sentence"]


@pytest.mark.parametrize(("fact", "value"), [("threads", 4), ("device", "CUDA device 0")])
def test_an_engine_that_ran_elsewhere_is_not_compared(fact: str, value: Any) -> None:
    old, new = result({"moe": 10.0, "dense": 10.0}), result({"moe": 8.0, "dense": 10.0})
    new["engines"]["moe"]["info"][fact] = value
    found = judge(new, baseline=old)
    assert {check["label"] for check in found["checks"]} == {"dense"}
    before = old["engines"]["moe"]["info"][fact]
    assert f"moe ran otherwise in the baseline ({fact} {before}, here {value}) and is not compared" in found["notes"][0]
    alone = result({"moe": 10.0})
    alone["engines"]["moe"]["info"][fact] = value
    with pytest.raises(MoEdgeError, match="moe ran otherwise"):
        judge(alone, baseline=result({"moe": 10.0}))


def test_another_type_is_said() -> None:
    """It may be what was changed."""
    old, new = result({"moe": 10.0, "dense": 10.0}), result({"moe": 8.0, "dense": 10.0})
    new["engines"]["moe"]["info"]["dtype"] = "bfloat16"
    assert "moe was float32 in the baseline and is bfloat16" in judge(new, baseline=old)["notes"]


def test_without_a_control_a_slow_down_is_not_the_builds() -> None:
    alone = {"moe": 10.0}
    assert outcomes(judge(result(alone, seed=1), baseline=result(alone))) == {"moe": "passed"}
    gate = judge(result(alone, machine=1.2, seed=1), baseline=result(alone))
    assert gate["outcome"] == "not decided"
    assert "the machine may be what is slower" in gate["checks"][0]["sentence"]
    assert "--against" in gate["checks"][0]["sentence"]


def test_the_dense_parent_of_the_same_runtime_is_the_control() -> None:
    labels = {"moe": 10.0, "moe 2": 11.0, "torch dense": 30.0, "dense": 20.0}
    runs = [result(labels, seed=seed) for seed in range(2)]
    for run in runs:
        run["engines"]["torch dense"]["info"]["runtime"] = "torch 2"
    assert judge(runs[0], baseline=runs[1])["checks"][0]["control"] == "dense"
    runs[1]["engines"]["dense"]["sha256"] = "another"
    assert judge(runs[0], baseline=runs[1])["checks"][0]["control"] == "moe 2"
    runs[1]["engines"]["moe 2"]["info"]["runtime"] = "script 2"
    assert judge(runs[0], baseline=runs[1])["checks"][0]["control"] == "torch dense"


def test_both_builds_in_one_run_are_paired_by_round() -> None:
    both = result({"moe": 10.0, "old moe": 10.0})
    drift = np.linspace(1, 2, 20)
    for row in both["points"][0]["rows"]:
        row["rounds"] = {metric: (np.array(times) * drift).tolist() for metric, times in row["rounds"].items()}
    gate = judge(both, against={"moe": "old moe"})
    assert outcomes(gate) == {"moe": "passed"}
    assert "paired by round" in gate["checks"][0]["sentence"]
    slow = result({"moe": 10.6, "old moe": 10.0})
    assert judge(slow, against={"moe": "old moe"})["outcome"] == "failed"
    assert judge(slow, against={"moe": "old moe"}, max_slowdown=0.1)["outcome"] == "passed"


def test_what_only_one_run_has_is_said_and_nothing_in_common_is_refused() -> None:
    gate = judge(result({"moe": 10.0, "new": 5.0}, seed=1), baseline=result(OLD))
    assert gate["notes"] == ["only the baseline has dense", "the baseline has no new"]
    with pytest.raises(
        MoEdgeError, match=r"no engine of the same name; it has: moe, dense\. Give a name with NAME=PATH"
    ):
        judge(result({"x": 1.0}), baseline=result(OLD))
    other = result(OLD)
    other["points"][0]["batch"] = 4
    with pytest.raises(MoEdgeError, match=r"timed at other points: batch 1, prompt 8, decode 4\. Ask for the same"):
        judge(other, baseline=result(OLD))
    elsewhere = result(OLD)
    elsewhere["machine"]["processor"] = "y"
    with pytest.raises(MoEdgeError, match=r"on another machine \(processor: y, here x\)"):
        judge(result(OLD), baseline=elsewhere)


def test_more_comparisons_make_each_more_careful() -> None:
    sample = np.random.default_rng(0).normal(0, 0.02, 20)
    widths = [found.high - found.low for found in (slowdown(sample, None, checks) for checks in (1, 4, 40))]
    assert widths[0] < widths[1] < widths[2]


# --- limits of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("tpot > 9ms", "failed"),  # 10 ms, 9.8 to 10.2
        ("tpot > 10ms", "not decided"),
        ("tpot > 11ms", "passed"),
        ("tpot.p50 < 11000 us", "failed"),
        ("tpot >= 0.0103 s", "passed"),
        ("ttft.p99 > 12ms", "not decided"),  # 12 ms, 11 to 14
        ("ttft.p99 > 800ms", "passed"),
        ("tokens/s < 95", "passed"),  # 100, 98 to 102
        ("tokens/s < 100", "not decided"),
        ("tokens/s < 110", "failed"),
        ("peak_rss > 899.9MiB", "failed"),
        ("peak_rss > 1 GiB", "passed"),
        ("peak_rss > 944 MB", "passed"),  # 943.7
        ("peak_rss > 943 MB", "failed"),
        ("load > 1s", "failed"),
        ("load > 1501 ms", "passed"),
        ("moe: load > 1s", "failed"),
    ],
)
def test_a_limit_is_held_or_broken_by_the_whole_interval(text: str, outcome: str) -> None:
    found = result({"moe": 10.0})
    times = found["points"][0]["rows"][0]
    exact = {"p50": 10.0, "ci95": [9.8, 10.2], "p99": 12.0, "ci95_of": {"p99": [11.0, 14.0]}}
    times |= {"tpot_ms": exact, "ttft_ms": exact, "decode_tokens_per_s": 100.0}
    (check,) = judge(found, limits=[parse(text)])["checks"]
    assert check["outcome"] == outcome
    words = {"failed": "beyond the limit", "passed": "within the limit", "not decided": "cannot tell"}
    assert check["sentence"].startswith(words[outcome])
    low, high = check["interval"]
    assert low <= check["value"] <= high


@pytest.mark.parametrize(
    ("text", "outcome", "rounds"),
    [
        ("ttft.p99 > 800ms", "not decided", 368),  # ten rounds of 500 to 509 ms do not show that
        ("ttft.p99 > 505ms", "failed", None),
        ("ttft.p90 > 800ms", "not decided", 36),
        ("ttft > 800ms", "passed", None),
        ("ttft < 100ms", "passed", None),
        ("ttft.p99 < 600ms", "not decided", 368),
    ],
)
def test_an_end_that_the_rounds_do_not_tell_decides_nothing(text: str, outcome: str, rounds: int | None) -> None:
    found = result({"moe": 10.0})
    found["points"][0]["rows"][0]["ttft_ms"] = _times(np.arange(500.0, 510.0)[:, None])
    (check,) = judge(found, limits=[parse(text)])["checks"]
    assert check["outcome"] == outcome
    if rounds:
        assert check["interval"][1] is None
        assert f" ms); an end is not known, about {rounds} rounds (--repeats) would tell" in check["sentence"]


def test_a_limit_holds_at_every_point_and_memory_at_the_first() -> None:
    found = result(OLD)
    found["points"].append({**copy.deepcopy(found["points"][0]), "batch": 4})
    gate = judge(found, limits=[parse("tpot > 1s"), parse("peak_rss > 1GiB"), parse("dense: ttft > 1s")])
    assert len(gate["checks"]) == 4 + 2 + 2
    found["engines"]["moe"]["peak_rss_mib"] = None
    gate = judge(found, limits=[parse("moe: peak_rss > 1GiB")])
    assert (gate["outcome"], gate["checks"][0]["sentence"]) == ("not decided", "cannot tell: peak_rss was not measured")
    with pytest.raises(MoEdgeError, match="names an engine that is not timed; there are: moe, dense"):
        judge(found, limits=[parse("mo: tpot > 1s")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpot", r"is not \[label:\] metric"),
        ("tpot = 3ms", r"operators are >, >=, <, <="),
        ("tpot > ms", r"is not \[label:\] metric"),
        ("tpot > 3ms and ttft > 4ms", r"is not \[label:\] metric"),
        ("latency > 3ms", "no metric 'latency'; metrics are ttft, tpot, load, peak_rss, tokens/s"),
        ("tpot.p95 > 3ms", "asks for 'p95' of tpot; p50, p90, p99, mean are there"),
        ("load.p50 > 3ms", "asks for 'p50' of load; none is there"),
        ("tpot > 3", "tpot takes one of us, ms, s, not 'none'"),
        ("tpot > 3MiB", "tpot takes one of us, ms, s, not 'MiB'"),
        ("tokens/s < 3ms", "tokens/s takes no unit, not 'ms'"),
        ("peak_rss > 3KB", "peak_rss takes one of MiB, GiB, MB, GB"),
    ],
)
def test_a_bad_limit_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(MoEdgeError, match=said) as error:
        parse(text)
    assert str(error.value).startswith(f"--fail-if {text!r}")


def test_a_label_may_hold_colons_and_blanks() -> None:
    assert parse("runs/a: b: tpot.p99>8.5ms").label == "runs/a: b"
    assert parse("ort-cpu moe: tokens/s < 10").label == "ort-cpu moe"


def test_the_gate_is_shown_in_markdown() -> None:
    found = result({"moe": 11.0, "dense": 20.0}, moe="rebuilt")
    found["text"] = "wiki"
    found["gate"] = judge(found, baseline=result(OLD))
    text = tables.markdown(found)
    assert text.startswith("### moedge bench: FAILED\n")
    assert "| moe | batch 1, prompt 8, decode 4 | tpot\\_ms | FAILED | regression: " in text
