"""The types of what ``moedge history --json`` prints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from moedge.runtime.parity.figures import closed

SCHEMA: Literal["moedge.history/1"] = "moedge.history/1"
Metric = Literal["kl", "accuracy", "ttft_ms", "tpot_ms"]
METRICS: dict[Metric, str] = {
    "kl": "KL to the reference, nats a token",
    "accuracy": "accuracy",
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per decoded token, ms",
}
"""In the order of tables and plots, with words for an axis."""


@closed
class Point(TypedDict):
    """One stored figure."""

    when: str
    """ISO 8601, UTC."""
    dated: Literal["told", "file"]
    """By the result itself; or, in results that do not tell, by the time of the file."""
    commit: str | None
    """Of the working tree in which it was measured, where that is known."""
    value: float
    ci95: list[float] | None
    source: str
    """The file."""


@closed
class Step(TypedDict):
    """A change that noise does not explain, between two levels."""

    index: int
    """Of the first point of the new level."""
    when: str
    commit: str | None
    before: float
    """Median of the points since the step before."""
    after: float


@closed
class Series(TypedDict):
    """One figure of one engine, measured alike on one machine: what may be joined by a line."""

    metric: Metric
    engine: str
    setting: str
    """Sizes of a benchmark, or the text or task."""
    machine: str
    points: Annotated[list[Point], Field(min_length=1)]
    """By time."""
    steps: list[Step]


@closed
class History(TypedDict):
    """Everything that was found."""

    schema: Literal["moedge.history/1"]
    series: Annotated[list[Series], Field(min_length=1)]
    files: int
    """Results that were read."""
    notes: list[str]
    """What was left out, and why."""
