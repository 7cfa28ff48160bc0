"""The benchmark's arithmetic is exact on an engine with a scripted clock; its memory figure comes from a real child."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from pydantic import TypeAdapter

from moedge import MoEdgeError
from moedge.runtime.bench import footprint, timing
from moedge.runtime.bench import latency as module
from moedge.runtime.bench.points import Point
from moedge.runtime.bench.results import Bench
from moedge.runtime.bench.stats import (
    binomial_cdf,
    mean_ends,
    percentiles,
    quantile_ends,
    rounds_needed,
    speedup,
    t_quantile,
)
from moedge.runtime.engines import Step, open_engine
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.report import bench as shown

IDS = np.arange(20) % 7


def bench(engines: Any, ids: Any, *, prompt: int, decode: int, **options: Any) -> Bench:
    """A benchmark of one point."""
    return module.bench(engines, ids, [Point(prompt=prompt, decode=decode)], **options)


class Clock:
    """Time that passes only when a scripted engine works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []


class Scripted:
    """Prefill takes ``prefill`` ms and the i-th decode step of a run ``steps[i]`` ms, times the drift of the round."""

    def __init__(self, clock: Clock, name: str, prefill: float, steps: list[float], drift: list[float] | None = None):
        self.clock, self.name, self.prefill_ms, self.steps, self.drift = clock, name, prefill, steps, drift or [1.0]
        self.runs, self.fed, self.closed = -1, [], False
        self.info = EngineInfo(name, "script", "CPU", "float32", 1, EngineModel(vocab_size=7))

    def _spend(self, milliseconds: float, token: int) -> Step:
        self.clock.now += milliseconds * self.drift[self.runs % len(self.drift)] / 1e3
        logits = np.zeros((1, 1, 7), dtype=np.float32)
        logits[0, 0, token % 7] = 1
        return Step(logits, token)

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        self.runs += 1
        self.clock.log.append(self.name)
        assert ids.shape == (1, 10)
        return self._spend(self.prefill_ms, 3)

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        self.fed.append(int(ids[0, 0]))
        return self._spend(self.steps[(len(self.fed) - 1) % len(self.steps)], cache + 1)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(timing, "time", fake)
    return clock


def test_times_are_what_the_engines_took(clock: Clock) -> None:
    engine = Scripted(clock, "one", 50, [10, 20, 30, 40])
    seen: list[tuple[int, int]] = []
    result = bench(
        {"one": lambda: engine},
        IDS,
        prompt=10,
        decode=4,
        repeats=3,
        memory=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    row = result["points"][0]["rows"][0]
    assert row["ttft_ms"]["p50"] == pytest.approx(50)
    assert row["ttft_ms"]["ci95"] == [None, None], "three rounds tell nothing of a median"
    assert row["ttft_ms"]["ci95_of"]["mean"] == pytest.approx([50, 50])
    assert row["tpot_ms"]["p50"] == pytest.approx(25)
    assert row["tpot_ms"]["mean"] == pytest.approx(25)
    assert row["tpot_ms"]["p90"] == pytest.approx(np.percentile([10, 20, 30, 40] * 3, 90))
    assert row["tpot_ms"]["p99"] == pytest.approx(np.percentile([10, 20, 30, 40] * 3, 99))
    assert row["prefill_tokens_per_s"] == pytest.approx(10 / 0.05)
    assert row["decode_tokens_per_s"] == pytest.approx(1 / 0.025)
    assert engine.fed[:4] == [3, 4, 5, 6], "each step must be fed the token chosen before it"
    assert engine.runs + 1 == 4, "one warm-up round that does not count, three that do"
    assert engine.closed
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    TypeAdapter(Bench).validate_python(json.loads(json.dumps(result, allow_nan=False)))


def test_engines_take_turns_and_the_first_place_rotates(clock: Clock) -> None:
    engines = {name: functools.partial(Scripted, clock, name, 1, [1]) for name in "abc"}
    bench(engines, IDS, prompt=10, decode=1, repeats=3, warmup=1, memory=False)
    assert "".join(clock.log) == "abc" + "bca" + "cab" + "abc"


def test_ratios_are_paired_by_round(clock: Clock) -> None:
    """A machine that slows down and recovers hits both engines: the ratio must not feel it, the single times must."""
    drift = [1, 1, 3, 1, 2, 5, 1]
    engines = {
        "slow": lambda: Scripted(clock, "slow", 40, [20], drift),
        "fast": lambda: Scripted(clock, "fast", 10, [10], drift),
    }
    result = bench(engines, IDS, prompt=10, decode=2, repeats=6, warmup=1, memory=False)
    low, high = result["points"][0]["rows"][0]["tpot_ms"]["ci95"]
    assert high > 2 * low
    found = {(r["metric"], r["label"], r["baseline"]): r for r in result["points"][0]["ratios"]}
    assert len(found) == 4
    assert found["tpot_ms", "fast", "slow"]["speedup"] == pytest.approx(2)
    assert found["tpot_ms", "fast", "slow"]["ci95"] == pytest.approx([2, 2])
    assert found["tpot_ms", "fast", "slow"]["verdict"] == "faster"
    assert found["ttft_ms", "slow", "fast"]["speedup"] == pytest.approx(0.25)
    assert found["ttft_ms", "slow", "fast"]["verdict"] == "slower"


def test_equal_engines_show_no_difference(clock: Clock) -> None:
    noise = np.random.default_rng(0).uniform(1, 1.5, (2, 9)).tolist()
    engines = {name: functools.partial(Scripted, clock, name, 10, [10], noise[i]) for i, name in enumerate("ab")}
    result = bench(engines, IDS, prompt=10, decode=2, repeats=8, memory=False)
    assert {ratio["verdict"] for ratio in result["points"][0]["ratios"]} == {"no difference shown"}


def test_engines_are_closed_when_one_fails(clock: Clock) -> None:
    good = Scripted(clock, "good", 1, [1])

    def broken() -> Any:
        raise MoEdgeError("cannot open")

    with pytest.raises(MoEdgeError, match="cannot open"):
        bench({"good": lambda: good, "bad": broken}, IDS, prompt=10, decode=1, repeats=1, memory=False)
    assert good.closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 21}, "20 tokens, fewer than the prompt of 21"),
        ({"repeats": 0}, "at least one engine, one point and one round"),
    ],
)
def test_impossible_protocols_are_refused(options: dict[str, int], message: str, clock: Clock) -> None:
    engines = {"a": functools.partial(Scripted, clock, "a", 1, [1])}
    with pytest.raises(MoEdgeError, match=message):
        bench(engines, IDS, **{"prompt": 10, "decode": 1, "repeats": 1, **options}, memory=False)


def test_memory_belongs_to_the_engines_own_process(toy_bundles: dict[str, Path]) -> None:
    """getrusage would report this process's size here; an engine of 100 kB cannot need it."""
    ballast = np.ones(600 * 2**20, dtype=np.uint8)
    engines = {
        "toy": functools.partial(open_engine, toy_bundles["concat"], threads=1),
        "lambda": lambda: open_engine(toy_bundles["shared_buffer"], threads=1),
    }
    result = bench(engines, np.arange(30), prompt=16, decode=4, repeats=2)
    measured, unknown = (result["engines"][label] for label in ("toy", "lambda"))
    assert 20 < measured["peak_rss_after_load_mib"] <= measured["peak_rss_mib"] < 400 < ballast.nbytes / 2**20
    assert 0 < measured["load_s"] < 60
    assert unknown["peak_rss_mib"] is None
    assert "functools.partial" in unknown["reason"]
    assert measured["info"]["runtime"].startswith("onnxruntime 1.")
    assert len(str(measured["sha256"])) == 64
    assert unknown["sha256"] is None
    assert result["machine"]["cores"] >= 1
    json.dumps(result, allow_nan=False)


def gpu_engine(runtime: str, **told: Any) -> Any:
    info = EngineInfo(runtime.split()[0], runtime, "NVIDIA Stand-in (cuda:1)", "bfloat16", 1, EngineModel(vocab_size=7))
    step = Step(np.zeros((1, 1, 7), np.float32), 0)
    return SimpleNamespace(info=info, prefill=lambda ids: step, decode=lambda ids, cache: step, **told)


def test_gpu_memory_is_pytorchs_peak_and_others_say_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the fresh process answers, with stand-ins for PyTorch on CUDA and for ONNX Runtime on CUDA."""
    from rich.console import Console

    from moedge.runtime.engines.pytorch import TorchEngine
    from moedge.runtime.report.bench import show

    peaks = {0: 7 * 2**20, 1: 1536 * 2**20}
    torch = TorchEngine.__new__(TorchEngine)
    torch._torch = SimpleNamespace(cuda=SimpleNamespace(max_memory_allocated=lambda device: peaks[device.index]))
    torch._module = SimpleNamespace(device=SimpleNamespace(type="cuda", index=1))
    on_cpu = TorchEngine.__new__(TorchEngine)
    on_cpu._torch, on_cpu._module = None, SimpleNamespace(device=SimpleNamespace(type="cpu", index=None))
    assert on_cpu.peak_gpu_mib() is None

    found: dict[str, Any] = {}
    engines = [gpu_engine("torch 2.13", peak_gpu_mib=torch.peak_gpu_mib), gpu_engine("onnxruntime 1.31.1")]
    for engine in engines:
        monkeypatch.setattr(footprint, "open_engine", lambda path, engine=engine: engine)
        request = {"path": "x", "options": {}, "ids": [[1, 2]], "depth": 0}
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request)))
        footprint._child()
        answer = json.loads(capsys.readouterr().out)
        found[engine.info.name] = {"info": engine.info.as_json(), **answer}
    assert [entry["peak_gpu_mib"] for entry in found.values()] == [1536, None]
    assert "gpu_reason" not in found["torch"]
    times = {"p50": 1.0, "p90": 1.0, "p99": 1.0, "ci95": [1.0, 1.0]}
    rows = [{"label": label, "ttft_ms": times, "tpot_ms": times, "decode_tokens_per_s": 1e3} for label in found]
    point = {"prompt": 2, "decode": 1, "batch": 1, "depth": 0, "threads": None, "rows": rows}
    point |= {"rounds": 3, "warmup_rounds": 1, "settled": True}
    result: Any = {"engines": found, "points": [point], "machine": {"processor": "x"}, "text": "t"}
    shown = io.StringIO()
    show(result, Console(file=shown, width=200))
    assert "GPU MiB" in shown.getvalue()
    assert "1536" in shown.getvalue()
    assert "onnxruntime: no GPU MiB, for onnxruntime 1.31.1 does not tell how much" in shown.getvalue()
    for entry in found.values():
        entry["info"]["device"] = "CPU"
    shown = io.StringIO()
    show(result, Console(file=shown, width=200))
    assert "GPU MiB |" not in shown.getvalue().replace("\u2503", "|")


def test_where_no_process_can_be_started_memory_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an emulator, whose Python the kernel cannot start."""
    monkeypatch.setattr("sys.executable", str(tmp_path))
    found = footprint.footprint(functools.partial(open_engine, tmp_path), np.zeros((1, 2), np.int64), 0, None)
    assert (found["peak_rss_mib"], found["load_s"]) == (None, None)
    assert found["reason"].startswith("no process of its own can be started here (")


def test_it_is_told_how_much_memory_lies_in_huge_pages(tmp_path: Path) -> None:
    """Of what is the process's own: pages of mapped files are never huge here. As proc(5) writes it."""
    rollup = tmp_path / "smaps_rollup"
    lines = ["5581e000-7fff1000 ---p 00000000 00:00 0    [rollup]", "Rss:    9000 kB", "Anonymous:    8192 kB"]
    rollup.write_text("\n".join([*lines, "AnonHugePages:    6144 kB", "FilePmdMapped:    0 kB", ""]), encoding="utf-8")
    assert footprint.huge_pages(rollup) == 0.75
    assert footprint.huge_pages(tmp_path / "none") is None
    rollup.write_text("", encoding="utf-8")
    assert footprint.huge_pages(rollup) is None
    engines: Any = [{"huge_pages": 0.0}, {"huge_pages": 0.75}, {}]
    found: Any = {"engines": dict(enumerate(engines))}
    assert shown.pages(found) == ", 0% to 75% of the memory in huge pages"
    assert shown.pages({**found, "engines": {0: engines[1]}}) == ", 75% of the memory in huge pages"
    assert shown.pages({**found, "engines": {0: engines[2]}}) == ""


def test_what_an_engine_refuses_in_its_own_process_is_one_sentence(tmp_path: Path) -> None:
    engines = {"gone": functools.partial(open_engine, tmp_path / "gone")}
    with pytest.raises(MoEdgeError, match=r"^Engine \S+gone: No model at \S+gone: the folder does not exist\.$"):
        bench(engines, np.arange(30), prompt=16, decode=4, repeats=2)


def test_an_engine_that_fails_in_its_own_process_is_named(toy_bundles: dict[str, Path]) -> None:
    engines = {"odd": functools.partial(open_engine, toy_bundles["concat"], no_such_option=1)}
    with pytest.raises(MoEdgeError, match=r"failed in its own process \(exit 1\).*no_such_option"):
        bench(engines, np.arange(30), prompt=16, decode=4, repeats=2)


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3, 6, 20])
def test_equal_engines_are_called_different_at_the_rate_that_is_said(rounds: int) -> None:
    """Nominal: 5 % with two sides. A percentile bootstrap of rounds has 100, 51, 24, 7 and 6 %."""
    times = np.random.default_rng(rounds).lognormal(sigma=0.1, size=(2, 2000, rounds, 1))
    wrong = [speedup(slow, fast)[2] != "no difference shown" for slow, fast in zip(*times, strict=True)]
    # Three standard deviations of a binomial(2000, 0.05) around 100.
    assert sum(wrong) == 0 if rounds == 1 else 70 <= sum(wrong) <= 130


def test_ratios_hold_the_geometric_mean_of_the_rounds_in_students_interval() -> None:
    slow, fast = np.random.default_rng(0).lognormal(sigma=0.3, size=(2, 7, 5))
    value, ends, _ = speedup(slow, fast)
    logs = np.log(np.median(slow, axis=1) / np.median(fast, axis=1))
    assert value == pytest.approx(scipy.stats.gmean(np.exp(logs)))
    known = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert np.log(np.array(ends, float)) == pytest.approx([known.low, known.high], rel=1e-5)
    assert speedup(slow[:1], fast[:1])[1:] == ([None, None], "no difference shown")


def test_means_that_are_not_paired_are_compared_by_welch() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(5, 1, 6), draw.normal(4, 3, 9)
    known = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert mean_ends(one, other) == pytest.approx([known.low, known.high], rel=1e-5)
    assert mean_ends(one, other[:1]) == [None, None]


@pytest.mark.parametrize("rounds", [1, 5, 6, 10, 35, 36, 367, 368, 500])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_ends_of_a_quantile_are_scipys_and_none_where_rounds_cannot_tell(rounds: int, q: float) -> None:
    """One sample a round, as of a first token: ranks of the binomial."""
    times = np.random.default_rng(rounds).exponential(size=(rounds, 1))
    known = scipy.stats.quantile_test(times[:, 0], q=0, p=q).confidence_interval(0.95)
    wanted = [None if np.isnan(end) else float(end) for end in (known.low, known.high)]
    assert quantile_ends(times, q) == wanted
    assert (wanted[1] is not None) == (rounds >= rounds_needed(q))


def test_samples_of_a_round_count_as_fewer_where_they_are_alike() -> None:
    """Rounds with a mood hold the truth in 95 %; counted as independent, samples would in a quarter of them."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        rounds = draw.normal(size=(20, 1)) + 0.1 * draw.normal(size=(20, 32))
        low, high = quantile_ends(rounds, 0.5)
        hits += low is not None and high is not None and low <= 0 <= high
    assert 274 <= hits <= 298
    free = draw.normal(size=(20, 32))
    assert np.diff(np.array(quantile_ends(free, 0.5), float)) < np.diff(
        np.array(quantile_ends(free[:, :4], 0.5), float)
    )
    assert quantile_ends(draw.normal(size=(20, 1000)), 0.99)[1] is None, "of 20 moods, whatever the samples"


@pytest.mark.parametrize(("count", "p"), [(1, 0.5), (7, 0.9), (5000, 0.99), (120_000, 0.5)])
def test_the_binomial_is_scipys(count: int, p: float) -> None:
    known = scipy.stats.binom.cdf(np.arange(count + 1), count, p)
    assert binomial_cdf(count, p) == pytest.approx(known, rel=1e-6, abs=1e-8)


def test_percentiles_of_nothing_are_nan() -> None:
    assert np.isnan(percentiles(np.zeros(0), (50,))["p50"])
    assert percentiles(np.arange(101.0), (50, 99.9)) == {"p50": 50.0, "p99.9": pytest.approx(99.9)}


@pytest.mark.parametrize("df", [1, 2, 4.7, 9, 30, 400])
@pytest.mark.parametrize("p", [0.75, 0.975, 0.995, 0.9999])
def test_the_quantile_of_student_is_scipys(p: float, df: float) -> None:
    assert t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=2e-5)
