"""The types of what a benchmark finds beside its times: guard, energy, headroom. Part of :mod:`.results`."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from moedge.runtime.parity.figures import Count, closed

Phase = Literal["prompt", "decode"]


@closed
class MachineSettings(TypedDict):
    """:class:`moedge.runtime.device.moedge_sensors.Settings`; null is not told."""

    cores: Count
    physical_cores: Count | None
    quota_cores: float | None
    governors: list[str]
    max_mhz: float | None
    boost: bool | None
    virtual: bool | None
    load_average: float | None
    power_mode: str | None
    clocks_locked: bool | None


@closed
class Spread(TypedDict):
    """How much the rounds of one engine differ."""

    label: str
    metric: str
    cv: float
    resolution: float


@closed
class Concern(TypedDict):
    """Something that can move the times by more than ``wanted``."""

    kind: str
    says: str


@closed
class Guard(TypedDict):
    """:class:`moedge.runtime.device.moedge_guard.Verdict`; null is not told."""

    trusted: bool
    concerns: list[Concern]
    notes: list[str]
    settings: MachineSettings
    spread: list[Spread]
    drift: float | None
    seconds: float
    readings: Count
    reading_ms: float
    own_cores: float | None
    others_cores: float | None
    stolen_cores: float | None
    held_back_s: float | None
    mhz: list[float] | None
    throttled: Count | None
    hottest_c: float | None
    gpu_mhz: list[float] | None
    gpu_reasons: list[str]
    wanted: float


@closed
class Energy(TypedDict):
    """What one engine took; every number is None where the machine does not tell, and ``reason`` says why."""

    source: str | None
    """The counter, such as ``RAPL (dram, package-0)``."""
    reason: str | None
    joules_per_prompt: float | None
    joules_per_token: float | None
    """Of decoding, mean over rounds, for one row of the batch."""
    ci95: list[float] | None
    """Of ``joules_per_token``, by Student's t over rounds; None of one round."""
    watts: float | None
    """Mean while decoding."""


@closed
class Reached(TypedDict):
    """One phase of one engine."""

    bytes: float
    """That the step reads, at least."""
    multiplications: float
    least_ms: float
    bound: Literal["memory", "arithmetic"]
    """Which of the two the least time comes from."""
    ms: float
    """Measured median."""
    reached: float
    """``least_ms / ms``."""
    gb_s: float
    """Needed bytes over the measured time."""


@closed
class HeadroomRow(TypedDict):
    """One engine; with a ``reason`` instead of the phases where it cannot be told."""

    label: str
    stored_bytes: NotRequired[float]
    bandwidth_gb_s: NotRequired[float]
    """Measured here, at the bytes that a token needs."""
    gmul_s: NotRequired[float]
    """10^9 multiplications a second, measured here at the engine's bits."""
    prompt: NotRequired[Reached]
    decode: NotRequired[Reached]
    reason: NotRequired[str]


@closed
class Gain(TypedDict):
    """A converted model beside its dense parent of the same target."""

    phase: Phase
    label: str
    dense: str
    ideal: float
    """Ratio of least times, both under the dense engine's roof."""
    measured: float
    reached: float
    """``measured / ideal``."""


@closed
class Lost(TypedDict):
    """Where the time of a decode step went: one part of one engine's profile."""

    label: str
    part: str
    ms: float
    least_ms: float
    """Its weights, and for attention the cache, at the measured bandwidth."""


@closed
class Headroom(TypedDict):
    """All engines at one point of a benchmark."""

    threads: int
    rows: list[HeadroomRow]
    gains: list[Gain]
    lost: NotRequired[list[Lost]]
