"""Time engines in turn on a device, and sum the rounds up: intervals over whole rounds, ratios paired by round.

Samples of one round share the machine's mood, so an interval from single samples would be too narrow: whole rounds are
drawn. (``runtime/bench`` does the same where MoEdge is installed.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

RESAMPLES = 2000
Mark = Callable[[str, str], None]
"""Called with an engine's label and ``begin``, ``between`` (prompt and decoding) or ``end``: never in a timed part."""


@dataclass(frozen=True)
class Protocol:
    """What is timed, at batch 1: ``prompt`` tokens read, ``decode`` more fed back as chosen, so many rounds."""

    prompt: int
    decode: int
    repeats: int
    warmup: int


@dataclass
class Times:
    """Of one engine, milliseconds by round: ``ttft`` float64 [rounds, 1], ``tpot`` [rounds, decode]."""

    first: list[list[float]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)

    @property
    def ttft(self) -> np.ndarray:
        """Time to first token."""
        return np.asarray(self.first, np.float64)

    @property
    def tpot(self) -> np.ndarray:
        """Time per token of each step."""
        return np.asarray(self.steps, np.float64)

    def rounds(self) -> dict[str, list[float]]:
        """Medians of each round, and the whole of each answer, ms."""
        ttft, tpot = self.ttft, self.tpot
        return {
            "ttft_ms": ttft[:, 0].tolist(),
            "tpot_ms": np.median(tpot, axis=1).tolist(),
            "e2e_ms": (ttft[:, 0] + tpot.sum(axis=1)).tolist(),
        }


def time_engines(
    sessions: Mapping[str, Any], ids: np.ndarray, protocol: Protocol, mark: Mark, after: Callable[[], None]
) -> dict[str, Times]:
    """Time sessions in turn; the first one of a round rotates.

    Args:
        sessions: label -> :class:`moedge_session.Session`.
        ids: int64 [1, prompt].
        protocol: what is timed.
        mark: see :data:`Mark`.
        after: called after each turn, outside of timed parts.
    """
    labels = list(sessions)
    found = {label: Times() for label in labels}
    for number in range(protocol.warmup + protocol.repeats):
        shift = number % len(labels)
        for label in labels[shift:] + labels[:shift]:
            mark(label, "begin")
            first, steps = _turn(sessions[label], ids, protocol.decode, partial(mark, label, "between"))
            mark(label, "end")
            after()
            if number >= protocol.warmup:
                found[label].first.append([first])
                found[label].steps.append(steps)
    return found


def _turn(session: Any, ids: np.ndarray, decode: int, between: Callable[[], None]) -> tuple[float, list[float]]:
    """Milliseconds to the first token, and of each step after it."""
    start = time.perf_counter()
    logits, _, cache = session.start(ids, np.ones_like(ids), last=True)
    token = int(logits[0, -1].argmax())
    first = 1e3 * (time.perf_counter() - start)
    between()
    steps = []
    for _ in range(decode):
        start = time.perf_counter()
        logits, _, cache = session.step(np.array([[token]]), cache)
        token = int(logits[0, -1].argmax())
        steps.append(1e3 * (time.perf_counter() - start))
    return first, steps


def summary(rounds: np.ndarray) -> dict[str, float]:
    """Percentiles of all samples of ``rounds`` [rounds, samples] in ms, and a 95 % interval of their median.

    The interval is of whole rounds drawn with replacement; of one round none can be known, and it is the median.
    """
    p50, p90, p99 = np.percentile(rounds, [50, 90, 99])
    low, high = _interval(len(rounds), lambda drawn: _medians(rounds, drawn))
    return {
        **{"p50": float(p50), "p90": float(p90), "p99": float(p99), "mean": float(rounds.mean())},
        **{"ci95_low": low, "ci95_high": high, "samples": float(rounds.size), "rounds": float(len(rounds))},
    }


def speedup(slow: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    """Ratio of medians of two engines timed in the same rounds, [rounds, samples] each; above 1 ``fast`` is faster."""
    low, high = _interval(len(slow), lambda drawn: _medians(slow, drawn) / _medians(fast, drawn))
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
    return {
        "speedup": float(np.median(slow) / np.median(fast)),
        **{"ci95_low": low, "ci95_high": high, "verdict": verdict},
    }


def _medians(rounds: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Median of all samples of each drawing of rounds, int64 [N, rounds]."""
    return np.asarray(np.median(rounds[drawn], axis=(-2, -1)))


def _interval(rounds: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    draws = np.random.default_rng(0).integers(0, rounds, (RESAMPLES, rounds))
    values = np.concatenate([statistic(draws[start : start + 100]) for start in range(0, RESAMPLES, 100)])
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
