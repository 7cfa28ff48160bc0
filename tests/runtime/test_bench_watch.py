"""A benchmark watches the machine between its timed parts: what it stores is typed, and the clock never sees it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from moedge.runtime.bench import latency, timing
from moedge.runtime.bench.guard import Observer
from moedge.runtime.bench.points import Point
from moedge.runtime.bench.results import Bench
from moedge.runtime.bench.watched import Guard
from moedge.runtime.engines import Step
from moedge.runtime.engines.info import EngineInfo, EngineModel


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


class Scripted:
    """Prefill takes 50 ms, a step 10."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.info = clock, EngineInfo("one", "script", "CPU", "float32", 1, EngineModel(vocab_size=7))

    def _step(self, seconds: float) -> Step:
        self.clock.now += seconds
        return Step(np.zeros((1, 1, 7), np.float32), 0)

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        return self._step(0.05)

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        return self._step(0.01)

    def close(self) -> None:
        pass


def test_what_watches_is_never_inside_a_timed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look takes 7 seconds of the scripted clock, and no time holds one."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda _: None))
    seen: list[str] = []

    class Slow(Observer):
        def mark(self, label: str) -> None:
            clock.now += 7.0
            seen.append("mark")
            super().mark(label)

        def end(self, label: str) -> None:
            clock.now += 7.0
            seen.append("end")
            super().end(label)

    monkeypatch.setattr(latency, "Observer", Slow)
    point = Point(prompt=4, decode=3)
    result = latency.bench({"one": lambda: Scripted(clock)}, np.arange(8), [point], repeats=4, warmup=1, memory=False)
    (found,) = result["points"]
    (row,) = found["rows"]
    assert row["ttft_ms"]["p50"] == pytest.approx(50)
    assert row["tpot_ms"]["p99"] == pytest.approx(10)
    assert seen == ["mark", "mark", "mark", "end"] * 5
    assert found["guard"]["readings"] == 1 + 4, "the round of the warm-up is not judged"


def test_the_result_is_what_its_types_say(tmp_path: Path) -> None:
    clock = Clock()
    result = latency.bench({"one": lambda: Scripted(clock)}, np.arange(8), [Point(4, 3)], repeats=3, memory=False)
    stored = json.loads(json.dumps(result, allow_nan=False))
    assert TypeAdapter(Bench).validate_python(stored) == stored
    guard = TypeAdapter(Guard).validate_python(stored["points"][0]["guard"])
    assert guard["settings"]["cores"] >= 1
    assert guard["reading_ms"] < 50
    energy = stored["points"][0]["rows"][0]["energy"]
    assert (energy["joules_per_token"] is None) == (energy["reason"] is not None)


def test_a_look_at_batches_is_not_judged() -> None:
    clock = Clock()

    class Rows(Scripted):
        def _step(self, seconds: float) -> Step:
            return Step(np.zeros((8, 1, 7), np.float32), 0)

    result = latency.bench(
        {"one": lambda: Rows(clock)}, np.arange(8), [Point(4, 3)], repeats=3, memory=False, batches=True
    )
    assert "guard" in result["points"][0]
    assert all("guard" not in point for point in result["batches"])
