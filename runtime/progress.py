"""Progress for people: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_QUIET_SECONDS = 15.0


class Reporter:
    """Shows one stage at a time; every method may be called whether or not a terminal is attached."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._last = 0.0

    @contextmanager
    def show(self) -> Iterator[Reporter]:
        """Draw bars while the block runs (nothing to do when the output is not a terminal)."""
        if not self.console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            self._bars = bars
            try:
                yield self
            finally:
                self._bars = self._task = None

    def begin(self, name: str, what: str, number: int, total: int) -> None:
        """Start stage ``number`` of ``total``."""
        self._label = f"[{number}/{total}] {name}"
        self._what = what
        self._last = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(escape(self._label), total=None, count="checking")

    def building(self, name: str, reason: str) -> None:
        """Say that the stage is not reused, and why."""
        self.console.print(escape(f"{self._label}: {self._what} ({reason})"), highlight=False)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, count="")

    def progress(self, done: int, total: int) -> None:
        """Report ``done`` of ``total`` steps of the current stage."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, count=f"{done}/{total}")
        elif time.monotonic() - self._last > _QUIET_SECONDS and not self.console.is_terminal:
            self._last = time.monotonic()
            self.console.print(escape(f"{self._label}: {done}/{total}"), highlight=False)

    def note(self, text: str) -> None:
        """Print one line about the current stage."""
        self.console.print(escape(f"{self._label}: {text}"), highlight=False)

    def end(self, name: str, reused: bool, seconds: float) -> None:
        """Finish the current stage."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        how = "reused, nothing changed" if reused else f"done in {seconds:.1f} s"
        self.console.print(escape(f"{self._label}: {how}"), highlight=False)
        sys.stderr.flush()


@contextmanager
def single(name: str, what: str) -> Iterator[Reporter]:
    """Progress for a command that is one stage on its own (``moedge convert``, ``moedge verify``, ...)."""
    reporter = Reporter()
    with reporter.show():
        reporter.begin(name, what, 1, 1)
        reporter._label = name
        yield reporter
