"""What comparisons measure, as types: the figures that the results of :mod:`.results` are made of.

They are dictionaries, for they are written as JSON and read back; a type checker knows their keys, and
:mod:`moedge.runtime.report.schema` makes the JSON schema of a report from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema, with_config
from typing_extensions import NotRequired, TypedDict

closed = with_config(ConfigDict(extra="forbid"))
"""For an object whose keys are all known."""
opened = with_config(ConfigDict(extra="allow"))
"""For one that holds more than what is promised."""
figures = with_config(
    ConfigDict(extra="allow", json_schema_extra={"additionalProperties": {"type": ["number", "null"]}})
)
"""For one that may hold more figures."""

Measured = Annotated[float, WithJsonSchema({"type": ["number", "null"]})]
"""A number that may not exist: NaN while it is worked with, null in JSON."""
Count = Annotated[int, Field(ge=0)]
Outcome = Literal["passed", "failed", "not decided"]
Relation = Literal["<=", ">="]


@figures
class Distribution(TypedDict):
    """Of one figure over the tokens."""

    mean: Measured
    standard_error: NotRequired[Measured]
    p50: NotRequired[Measured]
    p90: NotRequired[Measured]
    p99: NotRequired[Measured]
    max: Measured


@figures
class SameChoices(TypedDict):
    """The tokens for which every layer chose the same experts: not judged, but they explain."""

    tokens: Count
    rel_error_mean: Measured
    kl_max: Measured
    cosine_min: Measured


@figures
class Agreement(TypedDict):
    """How often the best token is the same, outside near-ties of the reference."""

    agreement: NotRequired[Measured]
    compared: NotRequired[Count]
    disagreements: NotRequired[Count]
    near_ties_excluded: NotRequired[Count]
    near_tie_share: NotRequired[Measured]
    agreement_with_near_ties: NotRequired[Measured]


@figures
class Perplexity(TypedDict):
    """Of both engines on the tokens that follow; ``standard_error`` is that of log(ratio)."""

    tokens: NotRequired[Count]
    reference: NotRequired[Measured]
    test: NotRequired[Measured]
    ratio: NotRequired[Measured]
    standard_error: NotRequired[Measured]


@opened
class Phase(TypedDict):
    """The errors of one phase, see :meth:`moedge.runtime.parity.metrics.TokenErrors.summary`."""

    tokens: Count
    non_finite: Count
    constant: Count
    abs_error: dict[str, Measured]
    rel_error: Distribution
    cosine: dict[str, Measured]
    same_choices: NotRequired[SameChoices]
    kl_ref_test: Distribution
    kl_test_ref: Distribution
    top1: Agreement
    top5: Agreement
    perplexity: Perplexity


@closed
class Phases(TypedDict):
    """Both ways in which tokens are read."""

    prefill: Phase
    decode: Phase


@closed
class CheckFacts(TypedDict):
    """One figure and its limit, see :class:`moedge.runtime.parity.verdict.Check`."""

    name: str
    value: float | None
    relation: Relation
    limit: float
    passed: bool
    decided: NotRequired[bool]


@closed
class VerdictFacts(TypedDict):
    """The judgement of one comparison; older results lack what is not required."""

    passed: bool
    checks: Annotated[list[CheckFacts], Field(min_length=1)]
    parts: NotRequired[Annotated[dict[str, bool], Field(min_length=1)]]
    outcome: NotRequired[Outcome]
    notes: NotRequired[list[str]]


@opened
class Routing(TypedDict):
    """How often both chose the same experts, or why that was not compared."""

    compared: bool
    reason: NotRequired[str]
    decisions: NotRequired[int]
    flips: NotRequired[int]
    agreement: NotRequired[Measured]
    overlap: NotRequired[Measured]
    worst_layer: NotRequired[int]
    worst_agreement: NotRequired[Measured]
    layers: NotRequired[dict[str, dict[str, float]]]


@opened
class RouterFacts(TypedDict):
    """Whether the routers chose right for what they read, see :class:`moedge.runtime.parity.routing.RouterChoices`."""

    compared: bool
    reason: NotRequired[str]
    decisions: NotRequired[int]
    flips: NotRequired[int]
    ties: NotRequired[int]
    agreement: NotRequired[Measured]
    worst_layer: NotRequired[int]
    worst_agreement: NotRequired[Measured]
    layers: NotRequired[dict[str, dict[str, float]]]
    own_order: NotRequired[float | None]
    input_rel_error: NotRequired[float | None]


@opened
class KeptFacts(TypedDict):
    """Whether what was left out is right, see :class:`moedge.runtime.parity.kept.KeptChoices`."""

    compared: bool
    reason: NotRequired[str]
    decisions: NotRequired[int]
    kept: NotRequired[Measured]
    wrong: NotRequired[int]
    flips: NotRequired[int]
    agreement: NotRequired[Measured]
    worst_layer: NotRequired[int]
    worst_agreement: NotRequired[Measured]
    input_rel_error: NotRequired[Measured]
    layers: NotRequired[dict[str, dict[str, Measured]]]


ByWindow = dict[str, dict[str, list[float]]]
"""Phase -> figure, as checks name it -> its value in each window of the text; empty where windows are not alike."""


@opened
class Replayed(TypedDict):
    """The comparison under the test's own choices (:mod:`moedge.runtime.parity.replay`)."""

    tokens: Count
    phases: Phases
    overall: Phase
    router: RouterFacts
    kept: NotRequired[KeptFacts]
    """Of a model that leaves small values out."""
    by_window: NotRequired[ByWindow]


@closed
class LayerErrors(TypedDict):
    """One layer under the reference's stream: error of what it adds, mean over tokens by phase, and the worst token."""

    prefill: Measured
    decode: Measured
    max: Measured
    changed: NotRequired[Count]
    """Tokens for which it chose other experts than the reference; they are not in the errors."""


@closed
class LayersFacts(TypedDict):
    """Every layer by itself, see :mod:`moedge.runtime.parity.against`."""

    tokens: Count
    embedding_rel_error: Measured
    layers: dict[str, LayerErrors]
    worst_layer: int | None
    worst_rel_error: Measured
    router: RouterFacts
    head: Phase
    """The final norm and the output projection by themselves."""


@closed
class KeptReferenceFacts(TypedDict):
    """The file that took the place of a running reference."""

    file: str
    sha256: str
    bytes: Count
    largest: Count
    """Logits of a token that it holds."""
    judged_tokens: Count
    """Tokens of the text that are held to limits of arithmetic: none where choices differ everywhere, else those before
    the first changed choice of their window."""
    probability_left: Measured
    """Of the tokens whose logits it does not hold, on average."""
    known_kl: Measured
    """Mean KL of the text run without what these may hide: it is no less."""
    hidden_kl: Measured
    """Most that these may hide of it; ``kl_ref_test`` is the sum of both: it is no more."""
