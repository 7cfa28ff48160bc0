"""The result of a benchmark as types: what ``moedge bench --json``, bench.json and ``speed`` of report.json hold.

They are dictionaries, for they are written as JSON and read back. ``python -m moedge.runtime.bench.results`` writes
``bench.schema.json`` again after a change of a type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from moedge._files import write_json
from moedge.runtime.bench.watched import Energy, Guard, Headroom
from moedge.runtime.engines.info import EngineFacts
from moedge.runtime.parity.figures import Count, Outcome, closed, opened

SCHEMA: Literal["moedge.bench/2"] = "moedge.bench/2"
SCHEMA_FILE = Path(__file__).with_name("bench.schema.json")

Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
"""Low and high end; None is an end that the rounds are too few to know."""
Metric = Literal["ttft_ms", "tpot_ms"]
METRICS: tuple[Metric, ...] = ("ttft_ms", "tpot_ms")
"""Time to first token, time per output token; both in ms."""
Verdict = Literal["faster", "slower", "no difference shown"]


@closed
class Times(TypedDict):
    """Milliseconds over all samples of the rounds that count."""

    p50: float
    p90: float
    p99: float
    mean: float
    ci95: Interval
    """Of ``p50``; None below 6 rounds."""
    ci95_of: dict[Literal["p90", "p99", "mean"], Interval]
    """High end of p90 None below 36 rounds, of p99 below 368."""


@closed
class Rounds(TypedDict):
    """Median of each round that counts, in order, ms: what a later run is compared with."""

    ttft_ms: list[float]
    tpot_ms: list[float]


@opened
class Row(TypedDict):
    """One engine at one point."""

    label: str
    ttft_ms: Times
    tpot_ms: Times
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    rounds: Rounds
    energy: NotRequired[Energy]


@closed
class Ratio(TypedDict):
    """One engine beside another in the same rounds; above 1 ``label`` is faster.

    ``speedup`` is the geometric mean over rounds of the ratio of their medians.
    """

    metric: Metric
    label: str
    baseline: str
    speedup: float
    ci95: Interval
    verdict: Verdict


@opened
class PointResult(TypedDict):
    """All engines, timed in turns, at one setting."""

    prompt: Count
    decode: Count
    batch: Count
    depth: Count
    """Tokens in the cache before the prompt is read."""
    threads: int | None
    """As asked for; None: each engine's own choice, which its ``info`` tells."""
    rounds: Count
    """That count."""
    warmup_rounds: Count
    """Dropped at the start."""
    settled: bool
    """False where engines were still getting faster when the most rounds were reached."""
    seconds: float
    """From the first round to the last, dropped ones included."""
    rows: Annotated[list[Row], Field(min_length=1)]
    ratios: list[Ratio]
    guard: NotRequired[Guard]
    """What the machine did meanwhile, and whether the times are to be trusted."""
    headroom: NotRequired[Headroom]
    """What the models need of this machine at least, beside what they took."""


@closed
class Agreement(TypedDict):
    """Whether a peer runs the model that it is compared with: its choices after the dense parent's own greedy text."""

    parent: str
    """Label of the dense parent that wrote the text."""
    tokens: Count
    same: Count
    """Of them, those that the peer would have chosen, too."""
    first_other: Count | None
    """The first one that it would not, from 0."""


@closed
class PeerFacts(TypedDict):
    """Another program, beside the engines of ours."""

    peer: str
    """Name of its row in :mod:`moedge.runtime.peers`."""
    bits: int | None
    """Of its integer weights; None: floating point, or not told."""
    agreement: Agreement


@opened
class EngineEntry(TypedDict):
    """One engine, and what it needs: memory and load time in a process of its own, at the first point."""

    sha256: str | None
    """Of what it was opened from; None where that cannot be told."""
    info: EngineFacts
    peak_rss_mib: float | None
    load_s: float | None
    peak_rss_after_load_mib: NotRequired[float]
    huge_pages: NotRequired[float]
    """Share of its memory in huge pages, 0 to 1; not there where the system does not tell."""
    peak_gpu_mib: NotRequired[float | None]
    gpu_reason: NotRequired[str]
    reason: NotRequired[str]
    """Why memory and load time are None."""
    peer: NotRequired[PeerFacts]


@opened
class BenchProtocol(TypedDict):
    """How speed was measured."""

    repeats: Count
    warmup: Count
    min_duration_s: float
    order: str
    sampling: str
    steady: str
    intervals: str
    memory: str


@closed
class GateCheck(TypedDict):
    """One engine at one point: slower than before by more than it may, or beyond a limit of one's own."""

    kind: Literal["slow-down", "limit"]
    label: str
    point: str
    what: str
    """The time that is compared, or the limit as it was given."""
    value: float | None
    """Of a slow-down a share: 0.05 is 5 % slower. Of a limit in its unit; None where it was not measured."""
    interval: Interval | None
    limit: float
    control: str | None
    """The unchanged engine by which drift of the machine between two runs is taken out."""
    outcome: Outcome
    sentence: str


@closed
class Gate(TypedDict):
    """What all checks come to."""

    outcome: Outcome
    confidence: float
    """Of the intervals of slow-downs, all together."""
    checks: list[GateCheck]
    notes: list[str]


@opened
class Bench(TypedDict):
    """What :func:`moedge.runtime.bench.latency.bench` returns. The first point is the one that reports print."""

    schema: Literal["moedge.bench/2"]
    created: NotRequired[str]
    """ISO 8601, UTC; results of older versions have none."""
    commit: NotRequired[str | None]
    """Of the working folder, where that is known."""
    protocol: BenchProtocol
    machine: dict[str, Any]
    engines: Annotated[dict[str, EngineEntry], Field(min_length=1)]
    points: Annotated[list[PointResult], Field(min_length=1)]
    batches: NotRequired[list[PointResult]]
    """Decoding at several batch sizes, in few rounds and after a short prompt: a look, not a verdict."""
    not_batched: NotRequired[dict[str, str]]
    """Engines without a row in ``batches``, and why."""
    text: NotRequired[str]
    profiles: NotRequired[dict[str, Any]]
    gate: NotRequired[Gate]
    """Where it was judged (:mod:`moedge.runtime.gate`)."""


def generate() -> dict[str, Any]:
    """Return the JSON schema of a benchmark's result."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:moedge:bench:2",
        **TypeAdapter(Bench).json_schema(),
        "title": "Result of moedge bench, moedge.bench/2",
    }


if __name__ == "__main__":
    write_json(SCHEMA_FILE, generate())
