"""What is timed: one setting of prompt, answer, batch, context and threads is a point; a sweep is several."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moedge import MoEdgeError


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        prompt: tokens that are read at once, timed as TTFT.
        decode: tokens decoded after the first one, each timed as TPOT.
        batch: rows that are read and decoded together, each with a prompt of its own.
        depth: tokens of each row that are in the cache before the prompt is read, and not timed.
        threads: of engines on the CPU; None: each engine's own choice.
    """

    prompt: int
    decode: int
    batch: int = 1
    depth: int = 0
    threads: int | None = None

    @property
    def length(self) -> int:
        """Positions of a cache that one row fills: the last token that is chosen is not read."""
        return self.depth + self.prompt + self.decode

    @property
    def tokens(self) -> int:
        """Tokens of text that it reads."""
        return self.batch * (self.depth + self.prompt)

    def words(self) -> str:
        """The point in words, for a title or a sentence."""
        said = [f"batch {self.batch}", f"prompt {self.prompt}", f"decode {self.decode}"]
        said += [f"depth {self.depth}"] if self.depth else []
        said += [f"{self.threads} threads"] if self.threads else []
        return ", ".join(said)


BATCHES = tuple(Point(prompt=8, decode=3, batch=batch) for batch in (1, 2, 4, 8))
"""The look at decoding in batches: a short prompt and few tokens, so that it costs little."""
BATCH_ROUNDS = 3


def tokens_of(points: Iterable[Point]) -> int:
    """Return how much text points need."""
    return max(point.tokens for point in points)


def grid(
    prompt: Sequence[int],
    decode: Sequence[int],
    batch: Sequence[int] = (1,),
    depth: Sequence[int] = (0,),
    threads: Sequence[int | None] = (None,),
) -> list[Point]:
    """Return every combination; threads change last, so that engines are opened once for each number of them.

    Raises:
        MoEdgeError: a list is empty or names a value twice, or a value is too small.
    """
    lists = {"prompt": prompt, "decode": decode, "batch": batch, "depth": depth, "threads": threads}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise MoEdgeError(f"{name} is a list of different numbers, not {list(values)}; name each value once.")
        least = 0 if name == "depth" else 1
        if wrong := [value for value in values if value is not None and value < least]:
            raise MoEdgeError(f"{name} must be at least {least}, not {wrong[0]}.")
    found = itertools.product(threads, depth, batch, prompt, decode)
    return [Point(prompt=p, decode=n, batch=b, depth=d, threads=t) for t, d, b, p, n in found]
