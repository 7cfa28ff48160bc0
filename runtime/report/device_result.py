"""What ``verify.py`` and ``bench.py`` of a device archive wrote: its types, and reading it back.

An archive carries the scripts of its own version. So only what is read here is asked for, and everything is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from moedge import MoEdgeError
from moedge._files import read_json
from moedge.runtime.device.moedge_archive import RESULT_SCHEMA
from moedge.runtime.parity.figures import opened

Milliseconds = Annotated[float, Field(gt=0)]
Least1 = Annotated[int, Field(ge=1)]
Span = Annotated[list[float], Field(min_length=2, max_length=2)]
"""Least and greatest."""


@opened
class Memory(TypedDict):
    """Bytes."""

    total: Annotated[int, Field(ge=0)]


@opened
class DeviceFacts(TypedDict):
    """What the numbers were measured on."""

    name: str
    compute_capability: str
    runtime: str
    system: str
    memory_bytes: Memory


@opened
class Engine(TypedDict):
    """``engine.json`` of the archive."""

    dtype: NotRequired[str | None]


@opened
class Check(TypedDict):
    """One figure and its limit."""

    name: str
    value: float | None
    relation: str
    limit: float
    passed: bool
    decided: NotRequired[bool]


@opened
class Verified(TypedDict):
    """``verify-result.json``."""

    kind: Literal["verify"]
    label: str
    device: DeviceFacts
    engine: Engine
    logits: dict[str, Any]
    routing: dict[str, Any]
    checks: Annotated[list[Check], Field(min_length=1)]
    passed: bool


@opened
class Times(TypedDict):
    """Milliseconds over all samples; the interval is that of ``p50``, None where the rounds are too few."""

    p50: Milliseconds
    p90: Milliseconds
    p99: Milliseconds
    ci95_low: float | None
    ci95_high: float | None


@opened
class Rounds(TypedDict):
    """Milliseconds of each round: medians, and the whole of each answer."""

    ttft_ms: Annotated[list[Milliseconds], Field(min_length=1)]
    tpot_ms: Annotated[list[Milliseconds], Field(min_length=1)]
    e2e_ms: Annotated[list[Milliseconds], Field(min_length=1)]


def _as_many(rounds: Rounds) -> Rounds:
    if not len(rounds["ttft_ms"]) == len(rounds["tpot_ms"]) == len(rounds["e2e_ms"]):
        raise ValueError("of different numbers of rounds")
    return rounds


@opened
class Energy(TypedDict):
    """Joules; None where the device does not tell, and ``reason`` says why."""

    source: str | None
    reason: str | None
    joules_per_token: float | None


@opened
class Protocol(TypedDict):
    """What was timed: tokens, rounds that count, and what the user noted."""

    prompt: Least1
    decode: Least1
    repeats: Least1
    note: str


@opened
class Concern(TypedDict):
    """Something that can move the times."""

    says: str


@opened
class Settings(TypedDict):
    """How the device was set up; None is not told."""

    power_mode: str | None
    clocks_locked: bool | None


@opened
class Spread(TypedDict):
    """How much the rounds of one engine differ."""

    cv: float


@opened
class Guard(TypedDict):
    """:class:`moedge.runtime.device.moedge_guard.Verdict`; None is not told."""

    trusted: bool
    concerns: list[Concern]
    notes: list[str]
    settings: Settings
    spread: list[Spread]
    others_cores: float | None
    stolen_cores: float | None
    mhz: Span | None
    gpu_mhz: Span | None
    hottest_c: float | None


def _with_reasons(guard: Guard) -> Guard:
    if guard["trusted"] is bool(guard["concerns"]):
        raise ValueError("trusted is not what its concerns say")
    return guard


@opened
class Environment(TypedDict):
    """What was seen while the rounds ran."""

    guard: Annotated[Guard, AfterValidator(_with_reasons)]
    l4t: NotRequired[str | None]
    """Version of Jetson Linux."""


@opened
class Gain(TypedDict):
    """Above 1 the archive's engine is faster than its dense parent."""

    speedup: float
    ci95_low: float | None
    ci95_high: float | None


@opened
class Gains(TypedDict):
    """Of both times."""

    ttft_ms: Gain
    tpot_ms: Gain


@opened
class Dense(TypedDict):
    """The dense parent, timed in the same rounds."""

    label: str
    dtype: NotRequired[str | None]
    ttft_ms: Times
    tpot_ms: Times
    speedup: Gains


@opened
class Benched(TypedDict):
    """``bench-result.json``; archives of older versions lack what is not required."""

    kind: Literal["bench"]
    label: str
    device: DeviceFacts
    engine: Engine
    protocol: Protocol
    ttft_ms: Times
    tpot_ms: Times
    rounds: NotRequired[Annotated[Rounds, AfterValidator(_as_many)]]
    energy: NotRequired[Energy]
    environment: NotRequired[Environment]
    dense: NotRequired[Dense]


DeviceResult = Verified | Benched
_KINDS: dict[str, Any] = {"verify": Verified, "bench": Benched}


def read(path: Path) -> DeviceResult:
    """Read one result.

    Raises:
        MoEdgeError: it is missing, damaged or not a device result.
    """
    mend = "copy the device's result again, or run the script there again"
    absent = f"{path} does not exist; verify.py and bench.py of an archive write such files."
    value = read_json(path, mend, missing=absent)
    kind = _KINDS.get(str(value.get("kind")))
    if value.get("schema") != RESULT_SCHEMA or kind is None:
        raise MoEdgeError(f"{path} is not a result of verify.py or bench.py (schema {RESULT_SCHEMA}).")
    try:
        json.dumps(value, allow_nan=False)  # a script writes no NaN, and what is asked for may not be one
        # Strict: the file is what its script wrote, so a number is no text. What is returned is the file's own value.
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        places = [(problem["type"], ".".join(map(str, problem["loc"]))) for problem in error.errors()]
        if lacking := [place for type_, place in places if type_ == "missing"]:
            raise MoEdgeError(f"{path} lacks {', '.join(lacking)}; {mend}.") from None
        raise MoEdgeError(f"{path} is damaged: {places[0][1]} is not what it should be; {mend}.") from None
    except ValueError:
        raise MoEdgeError(f"{path} is damaged: a number in it is not finite; {mend}.") from None
    found = cast("DeviceResult", value)
    if found["kind"] == "verify" and found["passed"] is not all(check["passed"] for check in found["checks"]):
        raise MoEdgeError(f"{path} is damaged: passed is not what its checks say; {mend}.")
    return found
