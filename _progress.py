"""How work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Progress = Callable[[int, int], None]
"""Called with (done, in all), in whatever is counted."""

Steps = Callable[[str, int, int], None]
"""Called with (what is done next, steps done, steps in all), for work whose steps have names."""

_Item = TypeVar("_Item")


def named(progress: Progress, note: Callable[[str], None]) -> Steps:
    """Return what reports named steps to a counter, and the name of each to ``note`` when it begins."""

    def step(what: str, done: int, total: int) -> None:
        progress(done, total)
        if done < total:
            note(what)

    return step


def reported(items: Sequence[_Item], progress: Progress | None) -> Iterator[_Item]:
    """Yield the items, and report each when the work on it is done."""
    for done, item in enumerate(items, 1):
        yield item
        if progress:
            progress(done, len(items))
