"""One text read by one engine in several ways: at once, in a batch with others, in pieces on a growing cache.

A *reading* is a :class:`moedge.runtime.engines.Step` of one text: logits [1, n, V] and, where the engine shows them,
its choices [n, ...], position by position, without padding and without a cache. Attention is causal and nothing else
mixes tokens, so every way of reading gives a token the same logits, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moedge.runtime.engines import Engine, Step
from moedge.runtime.engines.steps import joined, part

AFTER = (1, 1, 3)
"""Tokens of each call after a batch's prompts: single steps, then several at once."""
SHORTEST = 4 + sum(AFTER)
"""Tokens of the shortest text of which every way of reading is another one."""


@dataclass(frozen=True)
class Plan:
    """Which texts are read, and in which pieces."""

    prompts: tuple[int, ...]
    """Tokens of each row of a batch before decoding, the longest first; the last one is a single token."""
    pieces: tuple[int, ...]
    """Tokens of each call in which the first row's text is read, prompt and all."""

    @classmethod
    def of(cls, longest: int, *, thorough: bool) -> Plan:
        """Return the default plan or the thorough one, scaled to texts of ``longest`` tokens, :data:`SHORTEST` or more.

        Lengths are odd on purpose: kernels read in blocks of 8, 16 or 64, and the last block is where they fail. A row
        of a single token is nearly all padding.
        """
        prompt = min(longest - sum(AFTER), 181 if thorough else 21)
        shares = (1.0, 0.53, 0.18, 0.04) if thorough else (1.0, 0.57)
        prompts = [*(max(2, round(prompt * share)) for share in shares), 1]
        pieces = [max(1, round(prompt * share)) for share in (0.43, 0.0, 0.28)]
        return cls(tuple(prompts), (*pieces, prompt + sum(AFTER) - sum(pieces)))

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return self.prompts[0] + sum(AFTER)


def texts(windows: np.ndarray, count: int, length: int) -> list[np.ndarray]:
    """Return ``count`` texts int64 [length] from places of ``windows`` int64 [N, L] that are evenly apart."""
    stream = windows.reshape(-1)
    starts = np.linspace(0, stream.size - length, count).astype(int)
    return [stream[start : start + length] for start in starts]


def at_once(engine: Engine, ids: np.ndarray) -> Step:
    """Read one text int64 [L] in one prefill, alone in its batch."""
    return _row(engine.prefill(ids[None]), 0, len(ids))


def in_calls(
    engine: Engine, rows: Sequence[np.ndarray], prompts: Sequence[int], after: Sequence[int]
) -> list[list[Step]]:
    """Read several texts in one batch: a prefill of their beginnings, padded on the left, then pieces of all of them.

    Args:
        engine: it gets no mask where the prompts are equally long.
        rows: int64 [L] each.
        prompts: tokens of each row in the prefill.
        after: tokens of each row in every further call.

    Returns:
        For every call the readings of its rows, without padding.
    """
    longest = max(prompts)
    # A word of the row's own text, not id 0: attention that looks at padding must see something.
    ids = np.stack([np.pad(row[:prompt], (longest - prompt, 0), constant_values=row[prompt - 1])
                    for row, prompt in zip(rows, prompts, strict=True)])  # fmt: skip
    mask = np.arange(longest)[None] >= longest - np.array(prompts)[:, None]
    step = engine.prefill(ids, None if mask.all() else mask.astype(np.int64))
    calls = [[_row(step, index, prompt) for index, prompt in enumerate(prompts)]]
    done = 0
    for new in after:
        piece = [row[prompt + done : prompt + done + new] for row, prompt in zip(rows, prompts, strict=True)]
        step = engine.decode(np.stack(piece), step.cache)
        calls.append([_row(step, index, new) for index in range(len(rows))])
        done += new
    return calls


def of_row(calls: Sequence[Sequence[Step]], row: int) -> Step:
    """The reading of one row, of all calls."""
    return joined([call[row] for call in calls])


def _row(step: Step, index: int, last: int) -> Step:
    """The last ``last`` positions of row ``index`` of a call."""
    return replace(part(step, slice(-last, None), slice(index, index + 1)), cache=None)
