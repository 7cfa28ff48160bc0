"""The types of frontier.json, and its JSON schema, which is made from them.

``python -m moedge.runtime.frontier.schema`` writes ``frontier.schema.json`` again after a change of a type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from moedge._files import write_json
from moedge.runtime.parity.figures import Count, closed

Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
SCHEMA = "moedge.frontier/1"
SCHEMA_FILE = Path(__file__).with_name("frontier.schema.json")


@closed
class Estimate(TypedDict):
    """A number and its 95 % interval; an end is None where windows or rounds are too few to know it."""

    value: float
    ci95: Interval


@closed
class TextQuality(TypedDict):
    """Quality on one held-out text; KL to the dense parent in nats a token, intervals over windows."""

    ppl: float
    ppl_ratio: Estimate
    kl: Estimate
    ffn_read_share: float


@closed
class VariantFacts(TypedDict):
    """One conversion: quality measured in PyTorch, the same for every target; ``kl`` is the mean of the texts."""

    label: str
    convert: dict[str, Any]
    notation: str
    plan_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    ffn_read_share: float
    kl: Estimate
    ppl_ratio: Estimate
    texts: dict[str, TextQuality]


@closed
class Row(TypedDict):
    """One engine of a target, timed; ``variant`` is None for the dense parent.

    Speed-ups are over the dense parent on the same target, paired by round; above 1 is faster. ``dominated_by`` names
    the variants with a KL that is shown to be lower and a decode speed that is not shown to be lower.
    """

    label: str
    variant: str | None
    target: str
    bits: int | None
    bytes: Count
    ttft_ms: Estimate
    tpot_ms: Estimate
    prompt_speedup: Estimate
    decode_speedup: Estimate
    dominated_by: list[str]


@closed
class Verdict(TypedDict):
    """Which variant has the lowest KL at equal measured decode speed: ``winner``, or None where that is not shown.

    ``speedup``: the decode speed at which variants are compared; ``candidates``: those that reach it, lowest KL first.
    """

    speedup: float
    reached: bool
    winner: str | None
    candidates: list[str]
    sentence: str


@closed
class Measured(TypedDict):
    """All engines of one target, timed in turns in one run; the dense parents are the last rows."""

    target: str
    batch: Count
    prompt: Count
    decode: Count
    repeats: Count
    threads: Count
    load_average_before: float | None
    rows: Annotated[list[Row], Field(min_length=2)]
    verdict: Verdict


@closed
class FrontierProtocol(TypedDict):
    """On what quality was measured; ``tokens`` predicted tokens by text."""

    window: Count
    bos: bool
    dtype: str
    tokens: dict[str, int]


@closed
class Frontier(TypedDict):
    """Variants on targets: quality beside measured speed.

    Times are in the unit their name ends with; KL is in nats per token, of the float32 conversion: what a target's own
    rounding of the weights costs is not in it.
    """

    schema: Literal["moedge.frontier/1"]
    name: str
    created: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    model: str
    protocol: FrontierProtocol
    dense_ppl: dict[str, float]
    variants: Annotated[list[VariantFacts], Field(min_length=1)]
    measured: Annotated[list[Measured], Field(min_length=1)]
    machine: dict[str, Any]
    text: str


def generate() -> dict[str, Any]:
    """Return the JSON schema of frontier.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:moedge:frontier:1",
        **TypeAdapter(Frontier).json_schema(),
        "title": f"MoEdge frontier: quality beside speed, {SCHEMA}",
    }


if __name__ == "__main__":
    write_json(SCHEMA_FILE, generate())
