"""Sweeps and warm-up: what is timed, in which order, what is dropped, and what each output says of it."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.runtime.bench import latency, results, timing
from moedge.runtime.bench.points import BATCHES, Point, grid
from moedge.runtime.bench.timing import Rules, time_rounds
from moedge.runtime.bench.warmup import unsettled
from moedge.runtime.engines import Step
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.report import bench as tables
from moedge.runtime.report import bench_plot


class Watched:
    """An engine that takes a millisecond for each token and row that it reads, times what ``pace`` says of a round."""

    def __init__(self, clock: SimpleNamespace, pace: list[float] | None = None, **facts: Any) -> None:
        self.clock, self.pace, self.calls, self.runs = clock, pace or [1.0], [], 0
        self.threads = facts.pop("threads", 1)
        model = EngineModel(vocab_size=7, **facts)
        self.info = EngineInfo("watched", "script 1", "CPU", "float32", self.threads, model)

    def _read(self, name: str, ids: np.ndarray, held: int) -> Step:
        self.calls.append((name, ids.shape, held))
        self.clock.now += ids.size * self.pace[min(self.runs, len(self.pace)) - 1] / 1e3
        return Step(np.zeros((len(ids), 1, 7), dtype=np.float32), held + ids.shape[1])

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        self.runs += 1
        return self._read("prefill", ids, 0)

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        return self._read("decode", ids, cache)

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None))
    return clock


def test_a_grid_has_every_combination_and_changes_threads_last() -> None:
    found = grid([8, 16], [4], batch=[1, 2], depth=[0, 32], threads=[1, 2])
    assert len(found) == len(set(found)) == 16
    assert [point.threads for point in found] == [1] * 8 + [2] * 8
    assert found[0] == Point(prompt=8, decode=4, threads=1)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"prompt": [8, 8]}, "prompt is a list of different numbers"),
        ({"prompt": []}, "name each value once"),
        ({"batch": [0]}, "batch must be at least 1, not 0"),
        ({"depth": [-1]}, "depth must be at least 0, not -1"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(lists: dict[str, list[int]], said: str) -> None:
    with pytest.raises(MoEdgeError, match=said):
        grid(**{"prompt": [8], "decode": [4], **lists})


def test_depth_is_read_before_the_clock_starts(clock: SimpleNamespace) -> None:
    engine = Watched(clock)
    point = Point(prompt=4, decode=2, batch=3, depth=20)
    (found,) = latency.bench({"a": lambda: engine}, np.zeros(72), [point], repeats=3, warmup=0, memory=False)["points"]
    assert engine.calls[:4] == [
        ("prefill", (3, 20), 0),
        ("decode", (3, 4), 20),
        ("decode", (3, 1), 24),
        ("decode", (3, 1), 25),
    ]
    row = found["rows"][0]
    assert row["ttft_ms"]["p50"] == pytest.approx(12)
    assert row["tpot_ms"]["p50"] == pytest.approx(3)
    assert row["decode_tokens_per_s"] == pytest.approx(1000), "three rows in three milliseconds"
    assert row["prefill_tokens_per_s"] == pytest.approx(1000)


def test_engines_open_once_for_each_number_of_threads(clock: SimpleNamespace) -> None:
    opened: list[tuple[str, Any]] = []

    def opener(label: str, **options: Any) -> Watched:
        opened.append((label, options.get("threads")))
        return Watched(clock, **options)

    engines = {label: functools.partial(opener, label) for label in "ab"}
    points = grid([2, 4], [2], threads=[1, 2])
    result = latency.bench(engines, np.zeros(4), points, repeats=3, memory=False)
    assert opened == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [(point["threads"], point["prompt"]) for point in result["points"]] == [(1, 2), (1, 4), (2, 2), (2, 4)]


def test_a_point_beyond_an_engine_is_refused_before_the_first_is_timed(clock: SimpleNamespace) -> None:
    engine = Watched(clock, max_length=64)
    points = grid([4], [4], depth=[0, 60])
    with pytest.raises(
        MoEdgeError, match="a holds at most 64 tokens, fewer than the 68 of batch 1, prompt 4, decode 4"
    ):
        latency.bench({"a": lambda: engine}, np.zeros(64), points, repeats=3, memory=False)
    assert engine.calls == []


def test_the_look_at_batches_leaves_out_what_refuses_them(clock: SimpleNamespace) -> None:
    engines = {"long": lambda: Watched(clock), "short": lambda: Watched(clock, max_length=8)}
    point = Point(prompt=4, decode=4)
    result = latency.bench(engines, np.zeros(4), [point], repeats=3, memory=False, batches=True)
    assert [look["batch"] for look in result["batches"]] == [1, 2, 4, 8]
    assert {row["label"] for look in result["batches"] for row in look["rows"]} == {"long"}
    assert result["not_batched"].keys() == {"short"}
    assert "short holds at most 8 tokens" in result["not_batched"]["short"]


# --- warm-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slow", "rounds"), [(0, 10), (1, 10), (3, 10), (5, 10), (2, 6)])
def test_slow_first_rounds_are_the_warm_up(slow: int, rounds: int) -> None:
    noise = np.random.default_rng(rounds).normal(1, 0.01, rounds)
    noise[:slow] *= 2
    assert unsettled([noise]) == slow
    assert unsettled([np.ones(rounds), noise]) == slow, "one engine that warms up is enough"


def test_a_slow_round_later_is_no_warm_up() -> None:
    times = np.random.default_rng(0).normal(1, 0.01, 12)
    times[2] *= 3
    assert unsettled([times]) == 0
    assert unsettled([np.array([5.0, 1.0, 1.0])]) == 0, "three rounds tell nothing"


def test_settled_engines_lose_rounds_as_rarely_as_the_criterion_says() -> None:
    """One-sided 99.9 %: of 2000 normal series the first round lies above in 2; three standard deviations are 4 more."""
    generator = np.random.default_rng(0)
    dropped = sum(unsettled([np.exp(generator.normal(0, 0.02, 10))]) > 0 for _ in range(2000))
    assert dropped <= 6


def test_rounds_of_the_warm_up_are_made_up_for(clock: SimpleNamespace) -> None:
    pace = [9.0, 3.0, 2.0, *[1.0, 1.01] * 10]
    engine = Watched(clock, pace)
    found = time_rounds({"a": engine}, np.zeros((1, 4), dtype=np.int64), 0, 2, Rules(6), lambda: None)
    assert (found.dropped, found.settled) == (3, True)
    assert found.samples["tpot_ms"]["a"].shape == (6, 2)
    assert found.samples["tpot_ms"]["a"].max() == pytest.approx(1.01)
    assert engine.runs == 9


def test_an_engine_that_keeps_getting_faster_is_said_to(clock: SimpleNamespace) -> None:
    engine = Watched(clock, [2.0 ** -min(n, 6) for n in range(30)])
    found = time_rounds({"a": engine}, np.zeros((1, 4), dtype=np.int64), 0, 2, Rules(4, warmup=0), lambda: None)
    assert len(found.samples["ttft_ms"]["a"]) >= 4
    falling = Watched(clock, [*[5.0] * 4, *[1.0] * 4])
    found = time_rounds({"a": falling}, np.zeros((1, 4), dtype=np.int64), 0, 2, Rules(4, warmup=0), lambda: None)
    assert found.dropped + len(found.samples["ttft_ms"]["a"]) == falling.runs


def test_a_minimum_duration_adds_rounds(clock: SimpleNamespace) -> None:
    engine = Watched(clock)  # a round takes 4 + 2 ms
    found = time_rounds({"a": engine}, np.zeros((1, 4), dtype=np.int64), 0, 2, Rules(3, 1, 0.060), lambda: None)
    assert len(found.samples["ttft_ms"]["a"]) == 10


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(clock: SimpleNamespace) -> results.Bench:
    engines = {label: functools.partial(Watched, clock) for label in ("a|b", "c")}
    return latency.bench(engines, np.zeros(64), grid([4], [3], batch=[1, 2], depth=[0, 8]), repeats=3, memory=False)


def test_the_schema_is_made_from_the_types_and_a_result_matches_it(swept: results.Bench) -> None:
    schema = json.loads(results.SCHEMA_FILE.read_text(encoding="utf-8"))
    assert schema == results.generate(), "run python -m moedge.runtime.bench.results"
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(swept)), schema)


def test_csv_has_a_line_for_each_engine_and_point(swept: results.Bench) -> None:
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(swept))))
    assert len(lines) == 8
    assert [(line["batch"], line["depth"]) for line in lines[::2]] == [("1", "0"), ("2", "0"), ("1", "8"), ("2", "8")]
    assert float(lines[2]["ttft_ms_p50"]) == pytest.approx(8)
    assert float(lines[2]["tpot_ms_p99"]) == pytest.approx(2)


def test_markdown_has_a_table_for_each_point_and_escapes_labels(swept: results.Bench) -> None:
    text = tables.markdown(swept)
    assert text.count("| engine |") == 4
    assert "**batch 2, prompt 4, decode 3, depth 8, 3 rounds after 1 of warm-up**" in text
    assert "| a\\|b | 8.0 | 2.00 |" in text


@pytest.mark.parametrize("ending", bench_plot.ENDINGS)
def test_a_plot_is_drawn_over_the_longest_list(swept: results.Bench, tmp_path: Path, ending: str) -> None:
    figure = bench_plot.draw(swept)
    assert figure.axes[0].get_xlabel() == "batch"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "a|b (depth 0)",
        "c (depth 0)",
        "a|b (depth 8)",
        "c (depth 8)",
    ]
    bench_plot.save(swept, tmp_path / f"plot{ending}")
    assert (tmp_path / f"plot{ending}").stat().st_size > 1000


def test_the_look_at_batches_is_what_it_is_called() -> None:
    assert [point.batch for point in BATCHES] == [1, 2, 4, 8]
    assert max(point.length for point in BATCHES) == 11
