"""Time engines in turn on a device, and sum the rounds up; ratios are paired by round.

Intervals are those of :mod:`moedge_stats`, as in ``runtime/bench`` where MoEdge is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_stats
else:  # in an archive the files lie side by side
    import moedge_stats

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


def summary(rounds: np.ndarray) -> dict[str, Any]:
    """Percentiles of all samples of ``rounds`` [rounds, samples] in ms, and the 95 % interval of their median.

    Fewer than 6 rounds tell no interval; its ends are None.
    """
    p50, p90, p99 = np.percentile(rounds, [50, 90, 99])
    low, high = moedge_stats.quantile_ends(rounds, 0.5)
    return {
        **{"p50": float(p50), "p90": float(p90), "p99": float(p99), "mean": float(rounds.mean())},
        **{"ci95_low": low, "ci95_high": high, "samples": float(rounds.size), "rounds": float(len(rounds))},
    }


def speedup(slow: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    """:func:`moedge_stats.speedup` of two engines timed in the same rounds, [rounds, samples] each, as JSON."""
    value, (low, high), verdict = moedge_stats.speedup(slow, fast)
    return {"speedup": value, "ci95_low": low, "ci95_high": high, "verdict": verdict}
