"""Measure latency, throughput, memory and load time of several engines in one run.

Engines are timed in turn, round by round, and the order rotates, so that a slow minute of the machine hits all of them.
Ratios are paired by round. Memory and load time are taken in a fresh process per engine, where no other engine lives.

TTFT  time to first token: prefill of the prompt and choice of the next token, in ms. The commands open engines with
      ``last_logits``: as in generation, the output projection reads the last position of the prompt alone.
TPOT  time per output token: one decode step and choice of the next token, in ms.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.runtime.bench.footprint import footprint
from moedge.runtime.bench.guard import Observer
from moedge.runtime.bench.identity import identity
from moedge.runtime.bench.machine import commit, created
from moedge.runtime.bench.machine import machine as machine
from moedge.runtime.bench.peers import Peers
from moedge.runtime.bench.points import BATCH_ROUNDS, BATCHES, Point, tokens_of
from moedge.runtime.bench.results import (
    METRICS,
    SCHEMA,
    Bench,
    BenchProtocol,
    EngineEntry,
    Metric,
    PointResult,
    Ratio,
    Row,
    Times,
    Verdict,
)
from moedge.runtime.bench.stats import mean_ends, percentiles, quantile_ends, speedup
from moedge.runtime.bench.timing import Rules, Timed, time_rounds
from moedge.runtime.bench.warmup import STEADY
from moedge.runtime.engines import Engine

_PERCENTILES = (50, 90, 99)

Openers = Mapping[str, Callable[..., Engine]]
"""Label -> what opens an engine; called with ``threads=`` at a point that says how many."""


def bench(
    engines: Openers,
    ids: np.ndarray,
    points: Sequence[Point],
    *,
    repeats: int,
    warmup: int = 1,
    min_duration: float = 0.0,
    memory: bool = True,
    batches: bool = False,
    peers: Peers | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Benchmark engines, greedy, end-of-text ignored.

    Args:
        engines: label -> callable that opens the engine. Memory, load time and hash need
            ``functools.partial(open_engine, path, **options)``, which can be repeated in another process; for any other
            callable these are None, with the reason.
        ids: integers, at least as many as the largest point reads, real text: the first ``depth + prompt`` of them are
            the first row, and so on.
        points: what is timed, see :func:`moedge.runtime.bench.points.grid`; those of equal ``threads`` together.
        repeats: rounds of a point that count, at least. One tells no interval; fewer than 6 none of a median, 36 no
            upper end of p90, 368 none of p99.
        warmup: rounds that do not, at least; see :mod:`moedge.runtime.bench.warmup`.
        min_duration: seconds that the rounds of a point take, at least.
        memory: measure memory and load time, at the first point.
        batches: also look at decoding at batch 1, 2, 4 and 8, in few rounds.
        peers: which of the engines are other programs, and the dense parent whose tokens they must choose, too.
        progress: called with (engine runs done, in all); a warm-up that takes longer makes them more.

    Returns:
        JSON-ready, see :class:`moedge.runtime.bench.results.Bench`: ``engines`` by label, and ``points`` with ``rows``
        (one per engine, in the order given) and ``ratios`` (``speedup`` of ``label`` over ``baseline``, > 1 is faster:
        geometric mean over rounds of the ratio of their medians, with its 95% interval). Ends of intervals that the
        rounds do not tell are None.

    Raises:
        MoEdgeError: nothing to measure, too few ids, a point beyond what an engine can hold, or an engine that fails.
    """
    if not engines or not points or repeats < 1 or warmup < 0:
        raise MoEdgeError("A benchmark needs at least one engine, one point and one round.")
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    for point in points:
        _rows_of(ids, point)  # too few ids are told before anything is timed
    rules = Rules(repeats, warmup, min_duration)
    runs = len(points) * (warmup + repeats) + batches * len(BATCHES) * (1 + BATCH_ROUNDS) + bool(memory)
    advance = _counter(len(engines) * runs, progress)
    # First, while this process is small and the cores are idle.
    entries = {label: _entry(opener, ids, points[0], memory, advance) for label, opener in engines.items()}
    facts = {**machine(), "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    timed: list[PointResult] = []
    for threads, group in itertools.groupby(points, key=lambda point: point.threads):
        with _opened(engines, threads) as live:
            for label, engine in live.items():
                entries[label].setdefault("info", cast("Any", engine.info.as_json()))
            if peers and not timed:  # calls that also let a peer compile before anything is timed
                for label, asked in peers.ask(live, _rows_of(ids, points[0])[:1], points[0].decode + 1).items():
                    entries[label]["peer"] = asked
            timed += [_timed(live, ids, point, rules, advance) for point in _fitting(live, list(group))]
    result: Bench = {
        "schema": SCHEMA,
        "created": created(),
        "commit": commit(),
        "protocol": _protocol(rules),
        "machine": facts,
        "engines": cast("dict[str, EngineEntry]", entries),
        "points": timed,
    }
    if batches:
        with _opened(engines, points[0].threads) as live:
            # A short text begins again; its rows differ all the same.
            enough = np.resize(ids, tokens_of(BATCHES))
            result["batches"], result["not_batched"] = _batches(live, enough, points[0].threads, advance)
    return result


def _protocol(rules: Rules) -> BenchProtocol:
    """How it is measured, in words too."""
    return {
        "repeats": rules.repeats,
        "warmup": rules.warmup,
        "min_duration_s": rules.min_duration,
        "order": "round-robin over engines in one process, start rotated each round",
        "sampling": "greedy, end of text ignored, choice of the token timed",
        "steady": STEADY,
        "intervals": "95%; percentiles between two of the sorted samples (binomial; those of one round count as fewer "
        "where they are alike), means by Student's t over rounds, ratios by Student's t over the logarithms of each "
        "round's ratio of medians; null: the rounds are too few to know that end",
        "memory": "peak resident memory and load time (imports included) in a fresh process per engine at the first "
        "point; on a GPU also the peak of PyTorch's allocator there, without what CUDA takes for itself",
    }


def _rows_of(ids: np.ndarray, point: Point) -> np.ndarray:
    """Return what a point reads, int64 [batch, depth + prompt]."""
    if len(ids) < point.tokens:
        length = f"{point.depth} + {point.prompt}" if point.depth else f"{point.prompt}"
        wanted = f"the prompt of {length}" if point.batch == 1 else f"{point.batch} prompts of {length}"
        raise MoEdgeError(f"The benchmark text has {len(ids)} tokens, fewer than {wanted}.")
    return ids[: point.tokens].reshape(point.batch, -1)


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    """Return what is called after each of ``total`` pieces of work, which may become more."""
    done = itertools.count(1)

    def advance() -> None:
        number = next(done)
        if progress:
            progress(number, max(number, total))

    return advance


def _entry(
    opener: Callable[..., Engine], ids: np.ndarray, point: Point, memory: bool, advance: Callable[[], None]
) -> dict[str, Any]:
    """What is known of an engine before it is opened here."""
    found: dict[str, Any] = {"peak_rss_mib": None, "load_s": None, "reason": "not measured"}
    if memory:
        found = footprint(opener, _rows_of(ids, point), point.depth, point.threads)
        advance()
    return {"sha256": identity(opener), **found}


@contextmanager
def _opened(engines: Openers, threads: int | None) -> Iterator[dict[str, Engine]]:
    """Open all engines, and close what was opened."""
    opened: dict[str, Engine] = {}
    ours = not gc.get_freeze_count()  # else the calling program has frozen what is there, and keeps it so
    try:
        for label, opener in engines.items():
            opened[label] = opener() if threads is None else opener(threads=threads)
        if ours:
            gc.freeze()  # what is there stays: the collections before each run then look at that run's objects only
        yield opened
    finally:
        if ours:
            gc.unfreeze()
        for engine in opened.values():
            engine.close()


def _fitting(engines: Mapping[str, Engine], points: list[Point]) -> list[Point]:
    """Return the points, after checking that every engine can hold them.

    Raises:
        MoEdgeError: names the engine and the point, before hours of a sweep have passed.
    """
    for label, engine in engines.items():
        longest = engine.info.model.longest
        for point in points:
            if longest is not None and point.length > longest:
                raise MoEdgeError(
                    f"{label} holds at most {longest} tokens, fewer than the {point.length} of {point.words()}; ask "
                    "for less, or export it with a longer --max-length."
                )
    return points


def _timed(
    engines: Mapping[str, Engine], ids: np.ndarray, point: Point, rules: Rules, advance: Callable[[], None]
) -> PointResult:
    """Time all engines at one point, and watch the machine meanwhile."""
    observer = Observer({label: engine.info for label, engine in engines.items()})
    try:
        found = time_rounds(engines, _rows_of(ids, point), point.depth, point.decode, rules, advance, observer)
    finally:
        observer.close()
    result = _summed_up(found, point)
    for row in result["rows"]:
        seconds = found.samples["tpot_ms"][row["label"]].sum(axis=1) / 1e3
        sizes = {"tokens": point.decode, "batch": point.batch}
        row["energy"] = observer.energy(row["label"], seconds.tolist(), **sizes)
    rounds = {row["label"]: cast("dict[str, list[float]]", row["rounds"]) for row in result["rows"]}
    result["guard"] = observer.guard(rounds, found.dropped)
    return result


def _summed_up(found: Timed, point: Point) -> PointResult:
    """What was timed of all engines at one point."""
    labels = list(found.samples["ttft_ms"])
    return {
        **asdict(point),  # type: ignore[typeddict-item]  # the fields of a point are the first keys of its result
        "rounds": len(next(iter(found.samples["ttft_ms"].values()))),
        "warmup_rounds": found.dropped,
        "settled": found.settled,
        "seconds": found.seconds,
        "rows": [_row(label, found, point) for label in labels],
        "ratios": _ratios(labels, found.samples),
    }


def _batches(
    engines: Mapping[str, Engine], ids: np.ndarray, threads: int | None, advance: Callable[[], None]
) -> tuple[list[PointResult], dict[str, str]]:
    """Look at decoding in batches; engines that refuse the largest are left out, with what they say."""
    refused: dict[str, str] = {}
    largest = BATCHES[-1]
    for label, engine in engines.items():
        try:
            _fitting({label: engine}, [largest])
            engine.prefill(_rows_of(ids, largest))
        except MoEdgeError as error:
            refused[label] = str(error)
    rest = {label: engine for label, engine in engines.items() if label not in refused}
    points = [replace(point, threads=threads) for point in BATCHES] if rest else []
    look = Rules(BATCH_ROUNDS)  # too few rounds to judge the machine by
    timed = [
        (point, time_rounds(rest, _rows_of(ids, point), point.depth, point.decode, look, advance)) for point in points
    ]
    return [_summed_up(found, point) for point, found in timed], refused


def _row(label: str, timed: Timed, point: Point) -> Row:
    """What was timed of one engine: a step reads all prompts at first, and then decodes a token of each row."""
    ttft, tpot = (timed.samples[metric][label] for metric in METRICS)
    first, step = _times(ttft), _times(tpot)
    return {
        "label": label,
        "ttft_ms": first,
        "tpot_ms": step,
        "prefill_tokens_per_s": 1e3 * point.batch * point.prompt / first["p50"],
        "decode_tokens_per_s": 1e3 * point.batch / step["p50"],
        "rounds": {"ttft_ms": np.median(ttft, axis=1).tolist(), "tpot_ms": np.median(tpot, axis=1).tolist()},
    }


def _times(rounds: np.ndarray) -> Times:
    """Percentiles and mean of all samples of ``rounds`` [rounds, samples], and their intervals."""
    found = percentiles(rounds.reshape(-1), _PERCENTILES)
    middle, p90, p99 = (quantile_ends(rounds, q / 100) for q in _PERCENTILES)
    return {
        "p50": found["p50"],
        "p90": found["p90"],
        "p99": found["p99"],
        "mean": float(rounds.mean()),
        "ci95": middle,
        "ci95_of": {"p90": p90, "p99": p99, "mean": mean_ends(rounds.mean(axis=1))},
    }


def _ratios(labels: list[str], times: dict[Metric, dict[str, np.ndarray]]) -> list[Ratio]:
    """Speed-up of every engine over every other, for each metric; samples [rounds, samples]."""
    ratios: list[Ratio] = []
    for metric, samples in times.items():
        for baseline, label in itertools.permutations(labels, 2):
            value, ends, verdict = speedup(samples[baseline], samples[label])
            ratios.append(
                {
                    "metric": metric,
                    "label": label,
                    "baseline": baseline,
                    "speedup": value,
                    "ci95": ends,
                    "verdict": cast("Verdict", verdict),
                }
            )
    return ratios
