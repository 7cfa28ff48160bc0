"""The types of report.json, and the JSON schemas that are made from types: of a report and of a verification.

``python -m moedge.runtime.report.schema`` writes ``report.schema.json`` and ``verify.schema.json`` again after a change
of a type.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from moedge._files import write_json
from moedge.convert.forms import Form
from moedge.runtime.bench.results import Bench
from moedge.runtime.frontier.schema import Frontier
from moedge.runtime.parity.figures import Count, Outcome, closed, opened
from moedge.runtime.parity.results import Verification

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
ByText = dict[str, float]


@closed
class Source(TypedDict):
    """The dense model."""

    label: str
    spec: str
    kind: Literal["folder", "gguf", "hub", "asset"]
    sha256: Sha256
    config: dict[str, Any]


@closed
class ConvertedLayer(TypedDict):
    """One layer of the plan."""

    layer: Count
    shared_width: Count
    experts: Count
    expert_width: Count
    top_k: Count
    active_fraction: float
    report: dict[str, Any]


@closed
class Conversion(TypedDict):
    """The plan in numbers."""

    method: str
    notation: Annotated[str, Field(min_length=1)]
    params: dict[str, Any]
    affinity: NotRequired[dict[str, Any]]
    plan_sha256: Sha256
    active_fraction: Share
    ffn_read_share: Annotated[float, Field(ge=0)]
    zero_fraction: NotRequired[Share]
    calibration: dict[str, Any]
    layers: Annotated[list[ConvertedLayer], Field(min_length=1)]


@opened
class QualityProtocol(TypedDict):
    """On what quality was measured; ``tokens`` by text."""

    window: Count
    bos: bool
    dtype: str
    texts: Annotated[list[str], Field(min_length=1)]
    tokens: dict[str, Count]


@opened
class QualityRow(TypedDict):
    """Perplexity, and KL to the dense parent in nats a token, by text."""

    label: str
    kind: Literal["dense", "method", "control"]
    form: Form
    active_width_fraction: float
    ffn_read_share: Annotated[float, Field(ge=0)]
    ffn_read_shares: NotRequired[ByText]
    zero_weight_fraction: NotRequired[float]
    ppl: ByText
    ppl_std: NotRequired[ByText | None]
    kl_to_dense: ByText | None
    seeds: list[int] | None


@opened
class SecondHalf(TypedDict):
    """The same rows over the second half of every window, and those that its first half chooses for; tokens by text."""

    tokens: dict[str, int]
    rows: Annotated[list[QualityRow], Field(min_length=2)]


@closed
class QualityVerdict(TypedDict):
    """Which controls the router beats, and that in sentences."""

    router_beats: dict[str, bool]
    sentences: list[str]


@opened
class Quality(TypedDict):
    """The method beside its parent and the controls."""

    schema: Literal["moedge.evaluation/1"]
    protocol: QualityProtocol
    rows: Annotated[list[QualityRow], Field(min_length=2)]
    second_half: NotRequired[SecondHalf]
    verdict: QualityVerdict
    where: list[str]


@closed
class Cache(TypedDict):
    """How a graph takes its keys and values."""

    kind: Literal["concat", "shared_buffer"]
    max_length: int | None
    dtype: NotRequired[str | None]


@closed
class LoweringStep(TypedDict):
    """One rewrite of a bundle's graph and its executed self-test."""

    rewrite: str
    nodes: int | list[Any]
    status: Literal["applied", "refused"]
    reason: str | None
    self_test: dict[str, Any] | None


@closed
class BundleFacts(TypedDict):
    """One exported bundle; ``files`` by their hashes."""

    label: str
    target: str
    kind: Literal["moe", "dense"]
    bytes: Count
    cache: Cache
    lowering: list[LoweringStep]
    files: dict[str, Sha256]


@closed
class RoutedLayer(TypedDict):
    """What one router does."""

    layer: int
    experts: int
    top_k: int
    load: list[float]
    load_cv: NotRequired[float | None]
    dead_experts: NotRequired[int]
    dead_neurons: float
    agreement: float | None
    agreement_by_chance: NotRequired[float | None]
    captured: float | None
    relative_error: dict[str, float | None]


@closed
class TextDiagnosis(TypedDict):
    """Routing on one text."""

    documents: NotRequired[str]
    tokens: Annotated[int, Field(ge=1)]
    reference: str
    layers: list[RoutedLayer]
    mean: dict[str, Any]


@closed
class Diagnostics(TypedDict):
    """Routing of every layer, if the recipe asks for it; see convert/diagnostics.py."""

    schema: Literal["moedge.diagnostics/1"]
    texts: dict[str, TextDiagnosis]


@closed
class StageFacts(TypedDict):
    """One stage of the run."""

    stage: str
    key: Sha256
    seconds: float
    bytes: Count


@opened
class RecipeFacts(TypedDict):
    """The recipe as it ran."""

    name: str


@closed
class Report(TypedDict):
    """Numbers that could not be measured are null.

    Times are in the unit their name ends with; KL is in nats per token.
    """

    schema: Literal["moedge.report/1"]
    name: str
    created: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    passed: Annotated[
        bool,
        Field(description="Every identity and parity check passed. Quality and speed are reported, not judged."),
    ]
    outcome: NotRequired[
        Annotated[
            Outcome,
            Field(
                description="The verdict: not decided is no pass, nothing was found wrong but something could not be "
                "judged."
            ),
        ]
    ]
    sentences: Annotated[list[str], Field(min_length=1)]
    model: Source
    conversion: Conversion
    quality: Quality
    verification: Verification
    speed: Bench
    bundles: list[BundleFacts]
    machine: dict[str, Any]
    versions: dict[str, str]
    stages: list[StageFacts]
    recipe: RecipeFacts
    diagnostics: NotRequired[Diagnostics]
    frontier: NotRequired[Frontier]


def verification() -> dict[str, Any]:
    """Return the JSON schema of what ``moedge verify --json`` prints."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:moedge:verify:1",
        **TypeAdapter(Verification).json_schema(),
        "title": "Result of moedge verify, moedge.verify/1",
    }


def generate() -> dict[str, Any]:
    """Return the JSON schema of report.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:moedge:report:1",
        **TypeAdapter(Report).json_schema(),
        "title": "MoEdge report of one run, moedge.report/1",
    }


if __name__ == "__main__":
    from moedge.runtime.report import SCHEMA_FILE, VERIFY_SCHEMA_FILE

    write_json(SCHEMA_FILE, generate())
    write_json(VERIFY_SCHEMA_FILE, verification())
