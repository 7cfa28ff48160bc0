"""The timing loop: engines in turn, round by round, until enough settled rounds are there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from moedge.runtime.bench.results import METRICS, Metric
from moedge.runtime.bench.warmup import unsettled
from moedge.runtime.engines import Engine

_SETTLE = 0.02  # seconds between engines: worker threads of the last one (OpenMP spins for some ms) go to sleep


@dataclass(frozen=True)
class Rules:
    """When a point is finished.

    Args:
        repeats: rounds that count, at least.
        warmup: rounds dropped, at least.
        min_duration: seconds that the rounds that count take, at least.
    """

    repeats: int
    warmup: int = 1
    min_duration: float = 0.0


@dataclass(frozen=True)
class Timed:
    """What the rounds of one point took.

    Args:
        samples: metric -> label -> milliseconds, float64 [rounds, samples of a round].
        dropped: rounds before them.
        settled: whether the criterion of :mod:`moedge.runtime.bench.warmup` was met.
        seconds: all rounds.
    """

    samples: dict[Metric, dict[str, np.ndarray]]
    dropped: int
    settled: bool
    seconds: float


class Watching(Protocol):
    """What looks at the machine and its energy, between timed parts (:class:`moedge.runtime.bench.guard.Observer`)."""

    def mark(self, label: str) -> None:
        """Called before an engine's prompt, between its prompt and its decoding, and after it."""
        ...

    def end(self, label: str) -> None:
        """Called when its turn has ended."""
        ...


def time_rounds(
    engines: Mapping[str, Engine],
    ids: np.ndarray,
    depth: int,
    decode: int,
    rules: Rules,
    advance: Callable[[], None],
    watching: Watching | None = None,
) -> Timed:
    """Time engines in turn; the first one of a round rotates.

    A round that belongs to the warm-up (:mod:`moedge.runtime.bench.warmup`) is made up for by another one. At most half
    of the rounds can belong to it, so at most twice as many are run as were asked for.

    Args:
        ids: int64 [B, depth + S].
        advance: called after each run of an engine.
        watching: what looks at the machine meanwhile.
    """
    labels = list(engines)
    times: dict[Metric, dict[str, list[list[float]]]] = {metric: {name: [] for name in labels} for metric in METRICS}
    starts: list[float] = []
    number = dropped = slow = 0
    while number - dropped < rules.repeats or time.perf_counter() - starts[dropped] < rules.min_duration:
        starts.append(time.perf_counter())
        shift = number % len(labels)
        for label in labels[shift:] + labels[:shift]:
            time.sleep(_SETTLE)
            mark = partial(watching.mark, label) if watching else _nothing
            first, steps = timed_run(engines[label], ids, depth, decode, mark)
            if watching:
                watching.end(label)
            times["ttft_ms"][label].append([first])
            times["tpot_ms"][label].append(steps)
            advance()
        number += 1
        dropped = min(rules.warmup, number)
        if number >= rules.warmup + rules.repeats:
            runs = (rounds[rules.warmup :] for found in times.values() for rounds in found.values())
            slow = unsettled([np.median(rounds, axis=1) for rounds in runs])
            dropped = rules.warmup + slow
    samples = {m: {name: np.array(found[dropped:]) for name, found in of.items()} for m, of in times.items()}
    # All of the earlier half may belong to a warm-up that is longer than that.
    settled = slow == 0 or slow < (number - rules.warmup) // 2
    return Timed(samples, dropped, settled, time.perf_counter() - starts[0])


def _nothing() -> None:
    pass


def timed_run(
    engine: Engine, ids: np.ndarray, depth: int, decode: int, mark: Callable[[], None] = _nothing
) -> tuple[float, list[float]]:
    """Read the prompts and decode: (TTFT, TPOT of each step) in ms.

    Args:
        ids: int64 [B, depth + S], of which the first ``depth`` are read before the clock starts.
        decode: steps after the first token, each fed the tokens chosen before it.
        mark: called before the prompt, between prompt and decoding, and after it; not in a timed part.
    """
    gc.collect()  # not inside the timed part
    cache = engine.prefill(ids[:, :depth]).cache if depth else None
    clock = time.perf_counter
    mark()
    start = clock()
    step = engine.decode(ids[:, depth:], cache) if depth else engine.prefill(ids)
    # Every engine returns float32 logits in C order, so the choice of the token costs each the same (about 20 us for
    # a vocabulary of 50,000).
    tokens = step.logits[:, -1].argmax(axis=-1)[:, None]
    first = 1e3 * (clock() - start)
    mark()
    times = []
    for _ in range(decode):
        start = clock()
        step = engine.decode(tokens, step.cache)
        tokens = step.logits[:, -1].argmax(axis=-1)[:, None]
        times.append(1e3 * (clock() - start))
    mark()
    return first, times
