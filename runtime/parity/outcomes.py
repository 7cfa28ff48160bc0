"""The words and colours of an outcome: one owner, so that a terminal, HTML, Markdown, JUnit and exit codes agree."""

from __future__ import annotations

from dataclasses import dataclass

from moedge.runtime.parity.verdict import Outcome


@dataclass(frozen=True)
class Mark:
    """How an outcome is written."""

    word: str
    """Beside one check or comparison."""
    verdict: str
    """Of a whole result: a heading or the last line."""
    style: str
    """Of rich."""
    css: str
    """Class of a chip in report.html."""
    exit_code: int

    @property
    def cell(self) -> str:
        """The word with rich's markup."""
        return f"[{self.style}]{self.word}[/{self.style}]"

    @property
    def line(self) -> str:
        """The last line of a command, with rich's markup."""
        return f"[{self.style}]verdict: {self.verdict}[/{self.style}]"


_MARKS = {
    Outcome.PASSED: Mark("passed", "passed", "green", "good", 0),
    Outcome.FAILED: Mark("FAILED", "FAILED", "red", "bad", 1),
    Outcome.NOT_DECIDED: Mark("not decided", "NOT DECIDED, not a pass", "yellow", "open", 1),
}


def mark(outcome: Outcome | str) -> Mark:
    """Return the mark of an outcome, or of its value as JSON holds it."""
    return _MARKS[Outcome(outcome)]
