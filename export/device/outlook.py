"""What a model may do on a device before anything is built for it: does it fit, how fast can it be at best.

A roofline (Williams et al., 2009): a step takes at least as long as its bytes take at the device's peak bandwidth, and
as its multiplications take at its peak rate. Nothing is fitted to measurements. docs/estimate.md compares the bounds
with published measurements, row by row.

Weights of 8 and 4 bits are unpacked to half precision, in which every target here multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moedge.configs import devices
from moedge.configs.devices import Device
from moedge.export import needs, targets
from moedge.export.device.estimate import fit
from moedge.export.manifest import ModelFacts, MoEFacts
from moedge.export.needs import Needs
from moedge.export.targets import Target
from moedge.runtime.device.moedge_plugins import refusal as plugins_refused


@dataclass(frozen=True)
class Precision:
    """How weights are stored."""

    name: str
    bytes: float
    """Of one weight, its share of scales included."""
    bits: int | None
    """Of integers, as :class:`moedge.export.targets.Target` has them."""


PRECISIONS = (
    Precision("float16", 2.0, None),
    # A scale a row is nothing beside its weights; of four bits there is a half-precision scale for 128 weights.
    *(Precision(f"int{bits}", size, bits) for bits, size in ((8, 1.0), (4, 0.5 + 2 / 128))),
)
_CACHED = 2.0
"""Bytes of a cached number: half precision."""


Kind = Literal["moe", "moe, all weights", "dense"]
"""``moe``: a token reads the experts that it selects, and of a gathered FFN the weights of what it keeps. ``moe, all
weights``: an engine reads everything, for its runtime takes no kernels of ours (docs/tensorrt.md). ``dense``: the same
weights, before they were converted."""


@dataclass(frozen=True)
class Work:
    """What is asked of a device."""

    batch: int = 1
    context: int = 4096
    """Tokens in the cache of each row when a token is decoded; the cache is made for so many."""
    prompt: int = 2048
    """Tokens that are read at once."""


@dataclass(frozen=True)
class Bound:
    """The least time of a step."""

    ms: float
    memory_ms: float
    arithmetic_ms: float | None
    """None where the profile does not tell the device's rate: the step may take longer than ``ms``."""

    @property
    def by(self) -> str:
        """What bounds the step."""
        return "memory" if self.arithmetic_ms is None or self.memory_ms >= self.arithmetic_ms else "arithmetic"


@dataclass(frozen=True)
class Outlook:
    """One kind of model in one precision on one device."""

    model: Kind
    precision: str
    targets: tuple[str, ...]
    """That give such an engine for the device, with what to ask of the export; none: there is no such engine."""
    weights: float
    needed: float
    """Bytes of weights, both halves of the cache, and a prompt's logits; work space and the system are not counted."""
    memory: float
    ttft: Bound
    tpot: Bound
    tokens_per_s: float
    """At most, all rows together."""

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.needed <= self.memory


def outlooks(model: ModelFacts, moe: MoEFacts | None, share: float | None, device: Device, work: Work) -> list[Outlook]:
    """Return what a model and its dense parent may do in every precision, the model first.

    Args:
        model: of a manifest or a checkpoint, with its parameters.
        moe: of a converted model.
        share: of the FFN weights that a token reads, where values are left out.
        device: the profile.
        work: what is asked.

    Raises:
        MoEdgeError: the model's files do not say enough; see :mod:`moedge.export.needs`.
    """
    routed = moe is not None and any(layer.num_experts for layer in moe.layers.values())
    converted = routed or share is not None
    found = []
    for precision in PRECISIONS:
        rows = engines_for(device, precision.bits)
        sparse = needs.of_model(model, moe, weight=precision.bytes, cached=_CACHED, share=share)
        whole = needs.of_model(model, None, weight=precision.bytes, cached=_CACHED)
        selected = {row.name: asked for row in rows if (asked := selects(row, device)) is not None}
        if routed and share is not None:  # experts with thresholds have no kernel (docs/gather.md)
            selected = {}
        kinds: list[tuple[Kind, Needs, tuple[str, ...]]] = []
        if converted and (selected or not rows):
            kinds.append(("moe", sparse, tuple(f"{name}{asked}" for name, asked in selected.items())))
        if converted and len(selected) < len(rows):
            rest = tuple(row.name for row in rows if row.name not in selected)
            kinds.append(("moe, all weights", whole, rest))
        kinds.append(("dense", whole, tuple(row.name for row in rows)))
        found += [_outlook(kind, model, need, precision, names, device, work) for kind, need, names in kinds]
    return found


def _outlook(
    kind: Kind,
    model: ModelFacts,
    need: Needs,
    precision: Precision,
    names: tuple[str, ...],
    device: Device,
    work: Work,
) -> Outlook:
    tpot = step_bound(
        need.decode_bytes(work.context, work.batch), need.decode_products(work.context, work.batch), device
    )
    return Outlook(
        model=kind,
        precision=precision.name,
        targets=names,
        weights=need.stored,
        needed=fit(
            model, int(need.stored), device, max_length=work.context, max_prompt=work.prompt, batch=work.batch
        ).needed,
        memory=device.memory_gib * 2**30,
        ttft=step_bound(
            need.prompt_bytes(work.prompt, work.batch), need.prompt_products(work.prompt, work.batch), device
        ),
        tpot=tpot,
        tokens_per_s=1e3 * work.batch / tpot.ms,
    )


def step_bound(read: float, multiplied: float, device: Device) -> Bound:
    """Return the least time of a step that reads so many bytes and makes so many multiplications."""
    memory = 1e3 * read / (device.bandwidth_gb_s * 1e9)
    # A multiplication and its addition are two operations of the vendors' count.
    arithmetic = None if device.fp16_tflops is None else 1e3 * 2 * multiplied / (device.fp16_tflops * 1e12)
    return Bound(max(memory, arithmetic or 0.0), memory, arithmetic)


def engines_for(device: Device, bits: int | None) -> list[Target]:
    """Targets whose engines have weights of so many bits and run on a device."""
    rows = [row for row in targets.every() if row.engine is not None and row.bits == bits]
    return [row for row in rows if devices.refusal(row.name, device) is None]


def selects(row: Target, device: Device) -> str | None:
    """Whether an engine leaves weights out: what to ask of the export, "" for nothing; None where it reads all.

    As ``choose`` and ``gather_refusal`` of :mod:`moedge.export.lowering.trt.experts` decide it, but for what only a
    graph tells.
    """
    if "plugins" not in row.expert_forms:
        return None
    if row.versioned:
        return "" if device.tensorrt and plugins_refused(device.tensorrt) is None else None
    return None if device.compute_capability == "7.5" else " (--expert-form plugins)"


def best(found: Sequence[Outlook]) -> Outlook | None:
    """Return the fastest at a token that fits and for which there is a target; of equal ones the converted model's."""
    return min((one for one in found if one.fits and one.targets), key=lambda one: one.tpot.ms, default=None)
