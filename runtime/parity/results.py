"""The results of comparisons as types: what ``moedge verify --json``, verify.json and report.json hold.

Made of the figures of :mod:`.figures`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from moedge.runtime.engines.info import EngineFacts
from moedge.runtime.parity.figures import (
    ByWindow,
    Count,
    KeptReferenceFacts,
    LayersFacts,
    Measured,
    Outcome,
    Phase,
    Phases,
    Relation,
    Replayed,
    Routing,
    VerdictFacts,
    closed,
    opened,
)

PhaseName = Literal["prefill", "decode"]
Fault = Literal["prefill", "decode", "cache", "prefill and decode"]
PartName = Literal["embedding", "norm", "attention", "cache", "router", "experts", "FFN", "residual sum", "head"]


@closed
class WorstToken(TypedDict):
    """The token that is furthest off, and where it stands; ``text`` and the text before it where a tokenizer is."""

    window: Count
    position: Count
    phase: PhaseName
    kl: Measured
    """Null where its logits are no numbers, or all alike."""
    id: NotRequired[int]
    text: NotRequired[str]
    before: NotRequired[str]


@closed
class PartError(TypedDict):
    """A part whose output departs, see :mod:`moedge.runtime.parity.parts`."""

    layer: int | None
    """None for the embedding and the head."""
    part: PartName
    what: str
    """The value, in words."""
    error: float | None
    """Relative, of the kind that is furthest beyond its limit; null: no number."""
    limit: float
    kind: Literal["median", "mean", "largest"]
    phases: list[PhaseName]
    first_position: Count
    """The first token whose error is beyond what one token may have."""
    tokens: Count
    """How many are."""
    experts: NotRequired[list[int]]
    """Experts that every such token chose one of, where they are few."""


@closed
class HeatMap(TypedDict):
    """Relative errors over their limits, the largest of a row's parts and of a column's tokens."""

    rows: list[str]
    positions: list[Count]
    """First position of each column."""
    ratios: list[list[float | None]]
    """log10; null: no number, and far beyond any limit."""


@closed
class Location(TypedDict):
    """Where a comparison that failed departs, see :mod:`moedge.runtime.parity.where`."""

    sentence: str
    fault: Fault | None
    """None: could not be told."""
    first: PartError | None
    """The first part that departs, in the order in which a model computes; None: no single one does."""
    departing: list[PartError]
    """All parts that do, the first 20."""
    heat: NotRequired[HeatMap]


@opened
class Parity(TypedDict):
    """One engine beside its reference, schema ``moedge.parity/1``."""

    schema: Literal["moedge.parity/1"]
    reference: EngineFacts
    test: EngineFacts
    tokens: dict[str, Count]
    phases: Phases
    overall: Phase
    routing: Routing
    by_window: NotRequired[ByWindow]
    replay: NotRequired[Replayed | None]
    """Where that is judged; None elsewhere."""
    kept_reference: NotRequired[KeptReferenceFacts]
    """Where the reference did not run: a file of its answers."""
    by_layer: NotRequired[LayersFacts | None]
    """Beside a kept reference; None where the engine's layers cannot be run one by one."""
    tolerances: dict[str, float | None]
    text_sha256: NotRequired[str]
    """Of the token ids that were read (:func:`moedge.runtime.parity.metrics.text_sha256`); older results have none."""
    verdict: VerdictFacts
    worst: NotRequired[WorstToken]
    location: NotRequired[Location]
    """Where it failed."""


@opened
class Identity(TypedDict):
    """One MoE with every expert selected beside its dense parent, schema ``moedge.identity/1``."""

    schema: Literal["moedge.identity/1"]
    reference: EngineFacts
    test: EngineFacts
    tokens: Count
    text_sha256: NotRequired[str]
    """Of the token ids that were read (:func:`moedge.runtime.parity.metrics.text_sha256`); older results have none."""
    max_rel_error: Measured
    limit: float
    passed: bool
    worst: NotRequired[WorstToken]
    location: NotRequired[Location]
    """Where it failed."""


@closed
class Place(TypedDict):
    """Where two readings of a text differ most; counted from 0, padding not counted."""

    row: Count
    position: Count
    rel_error: Measured


@closed
class ShapeCase(TypedDict):
    """One way of reading beside the same text read at once and alone, see :mod:`moedge.runtime.parity.shapes`."""

    tokens: Count
    identical: Count
    """Tokens whose logits are the same bits."""
    replayed: Count
    """Tokens compared with the reference under the engine's own choices, for one of them changed."""
    excused: Count
    """Tokens not compared: they follow a changed choice, and there was nothing to replay it."""
    rel_error: dict[str, Measured]
    kl: dict[str, Measured]
    worst: NotRequired[Place]


@closed
class Shapes(TypedDict):
    """One engine beside itself in other shapes of batch and prompt, schema ``moedge.shapes/1``."""

    schema: Literal["moedge.shapes/1"]
    test: EngineFacts
    text_sha256: NotRequired[str]
    """Of the token ids that were read (:func:`moedge.runtime.parity.metrics.text_sha256`); older results have none."""
    prompts: list[Count]
    """Tokens of each row of the batches; a batch is decoded a few tokens further."""
    cases: dict[str, ShapeCase]
    not_run: dict[str, str]
    """Checks that this engine or text does not allow, and why."""
    verdict: VerdictFacts


@closed
class ShapesEntry(Shapes):
    """The shapes of one engine among others."""

    name: str


@opened
class ParityEntry(Parity):
    """A comparison among others: ``name`` says who is compared with whom."""

    name: str


@opened
class IdentityEntry(Identity):
    """An identity check among others."""

    name: str


BaselineOutcome = Literal["worse", "not worse", "not compared"]


@closed
class BaselineCheck(TypedDict):
    """One check beside the same of an older result, see :mod:`moedge.runtime.parity.baseline`."""

    comparison: str
    name: str
    before: float | None
    now: float | None
    relation: Relation
    limit: float
    interval: list[float] | None
    """Of how much further off it is, over windows; so wide that all intervals together are wrong 1 time in 100."""
    worse: bool
    reason: str


@closed
class BaselineFacts(TypedDict):
    """A result beside an older one."""

    file: str
    sha256: str
    outcome: BaselineOutcome
    sentences: list[str]
    checks: list[BaselineCheck]


@closed
class PairedFacts(TypedDict):
    """Two engines' answers to the same questions, see :class:`moedge.runtime.accuracy.paired.Paired`."""

    questions: Count
    agreement: float
    agreement_interval: list[float]
    """Low and high end, 95 %."""
    reference_accuracy: float
    test_accuracy: float
    drop: float
    """Accuracy of the reference less that of the test."""
    drop_interval: list[float]
    only_reference: Count
    """Questions that it alone has right."""
    only_test: Count
    mcnemar_p: float


@closed
class PairedTask(PairedFacts):
    """The same of one lm-eval task; ``metric`` says by what an answer is right."""

    task: str
    version: str
    data: str
    metric: str
    available: Count
    """Questions that the data holds."""


@opened
class AccuracyEntry(TypedDict):
    """One engine's answers to tasks beside its reference's, schema ``moedge.accuracy/1``."""

    schema: Literal["moedge.accuracy/1"]
    name: str
    reference: EngineFacts
    test: EngineFacts
    shots: Count
    limit: int | None
    """Most questions of a task."""
    tasks: Annotated[list[PairedTask], Field(min_length=1)]
    overall: PairedFacts
    """Of all tasks together, every question counted once."""
    tolerances: dict[str, float | None]
    verdict: VerdictFacts


@closed
class Compared(TypedDict):
    """All comparisons of one verification, before anybody says what they come to."""

    schema: Literal["moedge.verify/1"]
    created: NotRequired[str]
    """ISO 8601, UTC; with the two below written by `moedge verify`, for `moedge history`."""
    commit: NotRequired[str | None]
    """Of the working folder, where that is known."""
    machine: NotRequired[dict[str, Any]]
    text: str
    not_executed: NotRequired[dict[str, str]]
    identity_note: NotRequired[str | None]
    identity: list[IdentityEntry]
    parity: list[ParityEntry]
    shapes: NotRequired[list[ShapesEntry]]
    """Results of older versions, and comparisons with a device's answers, have none."""
    accuracy: NotRequired[list[AccuracyEntry]]
    """Where tasks were asked."""
    tolerances: NotRequired[dict[str, Any]]
    """The user's file of limits, where there is one."""


@closed
class Verification(Compared):
    """All comparisons of one verification, schema ``moedge.verify/1``."""

    baseline: NotRequired[BaselineFacts]
    """Beside an older result, where one is given."""
    passed: bool
    outcome: NotRequired[Outcome]


def by_phase(found: Parity | Replayed) -> dict[str, Phase]:
    """Return the phases by name."""
    return cast("dict[str, Phase]", found["phases"])
