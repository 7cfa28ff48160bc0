"""Targets: one row each, and the only place that knows what a target is.

``--help``, ``moedge doctor``, choices of a recipe, refusals, defaults, engines and the table in docs/lowering.md
ask these rows. A new target is one lowering and one row. Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from moedge import MoEdgeError
from moedge._registry import Registry

PORTABLE = "portable"
"""The traced graph in standard operators, of which every other target is lowered."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ONNXRUNTIME = (("onnxruntime", "onnxruntime-gpu"),)
RTX = (("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),)
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """What one target is: how its bundle is made, what is in it, and what runs it."""

    name: str
    summary: str
    """For people: ``--help``, ``doctor``, docs."""
    lower: str
    """``module:function`` that rewrites the portable graph; called with ``max_length`` and the options below."""
    family: Literal["portable", "ort", "openvino", "tensorrt", "tensorrt-rtx"]
    """The runtime that the bundle is made for."""
    bits: int | None = None
    """Bits of its integer weights; None: floating point. The lowering is called with them."""
    unquantised: str | None = None
    """For integer weights: the target that is the same without them."""
    dtypes: tuple[str, ...] = ("float32",)
    """Floating-point types of its graph, the default first; with several, ``--half`` chooses."""
    calibrated: bool = False
    """Its integers may be chosen on a text (``--gptq``)."""
    zero_points: bool = False
    """Its blocks may have a zero point of their own (``--zero-points``)."""
    expert_forms: tuple[str, ...] = ()
    """Forms of the experts that one may ask for; see ``lowering/trt/experts.py``."""
    versioned: bool = False
    """Its lowering depends on the version of the runtime on the device (``--tensorrt``)."""
    provider: str = CPU
    """ONNX Runtime's provider that executes the bundle."""
    padding: bool = True
    """Rows of a batch may be of different length."""
    engine: Literal["tensorrt", "tensorrt-rtx"] | None = None
    """What ``moedge build`` makes of it; ONNX Runtime then only checks its graph, with every rounding (no timing)."""
    oldest_capability: float = 0.0
    """Compute capability from which on engines are built."""
    needs: tuple[tuple[str, ...], ...] = ONNXRUNTIME
    """Distributions that running it needs; alternatives together."""
    genai: bool = False
    """onnxruntime-genai generated the same tokens with it (docs/interop.md)."""
    limits: str | None = None
    """Target whose profile in configs/tolerances.yaml judges it; None: it has one of its own name."""
    default: bool = False
    """Made when a command or recipe names no target."""

    @property
    def gpu(self) -> bool:
        """Whether it runs on an NVIDIA GPU only."""
        return self.provider == CUDA or self.engine is not None

    @property
    def own_operators(self) -> bool:
        """Whether it may hold operators of ours, which ``--stock-operators`` leaves out."""
        return self.family == "ort" and self.provider == CPU

    @property
    def half(self) -> bool:
        """Whether its graph computes in a 16-bit type."""
        return self.dtypes[0] in HALF

    def lowering(self) -> Callable[..., Any]:
        """Import what lowers for it."""
        module, _, function = self.lower.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found


_LOWERING = "moedge.export.lowering"
_ROWS = (
    Target(
        PORTABLE, "standard ONNX operators, any ONNX runtime",
        f"{_LOWERING}.portable:lower", "portable", genai=True, default=True,
    ),
    Target(
        "ort-cpu", "ONNX Runtime's fused CPU kernels",
        f"{_LOWERING}.ort.cpu:lower", "ort", genai=True, default=True,
    ),
    Target(
        "ort-cpu-int8", "the same with 8-bit weights",
        f"{_LOWERING}.ort.quantized:lower", "ort", bits=8, unquantised="ort-cpu", genai=True,
    ),
    Target(
        "ort-cpu-int4", "the same with 4-bit weights",
        f"{_LOWERING}.ort.quantized:lower", "ort", bits=4, unquantised="ort-cpu", calibrated=True,
        zero_points=True, genai=True,
    ),
    Target(
        "ort-cuda", "ONNX Runtime's CUDA kernels",
        f"{_LOWERING}.ort.cuda:lower", "ort", dtypes=("float16",), provider=CUDA, padding=False,
        needs=(("onnxruntime-gpu",),),
    ),
    Target(
        "openvino", "portable without functions, for OpenVINO",
        f"{_LOWERING}.openvino:lower", "openvino", genai=True,
    ),
    Target(
        "tensorrt", "TensorRT engine with plugins",
        f"{_LOWERING}.trt.engine:lower", "tensorrt", dtypes=HALF, expert_forms=("plugins", "native", "merged"),
        versioned=True, engine="tensorrt", needs=(("tensorrt",),),
    ),
    Target(
        "tensorrt-rtx", "TensorRT for RTX engine",
        f"{_LOWERING}.trt.rtx:lower", "tensorrt-rtx", dtypes=HALF, expert_forms=("plugins", "merged"),
        engine="tensorrt-rtx", needs=RTX,
    ),
    Target(
        "tensorrt-rtx-int8", "the same with 8-bit weights",
        f"{_LOWERING}.trt.quantized:lower", "tensorrt-rtx", bits=8, unquantised="tensorrt-rtx", dtypes=("float16",),
        engine="tensorrt-rtx", needs=RTX,
    ),
    Target(
        "tensorrt-rtx-int4", "the same with 4-bit weights, SM80 and newer",
        f"{_LOWERING}.trt.quantized:lower", "tensorrt-rtx", bits=4, unquantised="tensorrt-rtx", dtypes=("float16",),
        calibrated=True, engine="tensorrt-rtx", oldest_capability=8.0, needs=RTX,
    ),
)  # fmt: skip

_NO_CUDA_QMOE = (
    "{} does not exist: ONNX Runtime's CUDA kernel for quantised experts lays weights out on the GPU when it loads "
    "them, which cannot be checked without one (docs/lowering.md). Take ort-cuda (float16) on a GPU, or {} on the CPU."
)
REFUSED = {f"ort-cuda-{kind}": _NO_CUDA_QMOE.format(f"ort-cuda-{kind}", f"ort-cpu-{kind}") for kind in ("int4", "int8")}
"""Targets that one may expect and that are left out on purpose: name -> why, and what to take instead."""


_ALL = Registry("target", _ROWS, REFUSED)
register, unregister, every = _ALL.register, _ALL.unregister, _ALL.every
names, known, find = _ALL.names, _ALL.known, _ALL.find
"""See :class:`moedge._registry.Registry`; the order is that of tables and of export."""


def check(wanted: Iterable[str]) -> None:
    """Check that every name is a target.

    Raises:
        MoEdgeError: one is not; see :func:`find`.
    """
    for name in wanted:
        find(name)


def default() -> tuple[str, ...]:
    """Return the names of what is made when no target is named."""
    return names(lambda row: row.default)


def expert_forms() -> tuple[str, ...]:
    """Return every form of experts that some target takes."""
    return tuple(dict.fromkeys(form for row in every() for form in row.expert_forms))


def check_form(experts: str | None) -> None:
    """Check that a form of experts is one.

    Raises:
        MoEdgeError: it is not.
    """
    if experts is not None and experts not in expert_forms():
        raise MoEdgeError(f"No form of experts is called {experts!r}; known: {', '.join(expert_forms())}.")


def check_taken(asked: str, takes: Callable[[Target], bool], wanted: Iterable[str]) -> None:
    """Check that at least one of the targets ``wanted`` takes what was asked for.

    Args:
        asked: what a user wrote, for the sentence, such as ``--dtype``.
        takes: whether a target does.
        wanted: names of targets.

    Raises:
        MoEdgeError: none does, or a name is none of a target.
    """
    rows = [find(name) for name in wanted]
    if not any(map(takes, rows)):
        among = ", ".join(row.name for row in rows)
        raise MoEdgeError(f"{asked} is for target {' or '.join(names(takes))}, not among {among}.")


def has_dtypes(row: Target) -> bool:
    """Whether the floating-point type of its graph can be chosen."""
    return len(row.dtypes) > 1


def sibling(row: Target, bits: int) -> Target | None:
    """Return the target that is ``row`` with weights of ``bits`` bits, or None."""
    plain = row.unquantised or row.name
    return next((other for other in every() if other.unquantised == plain and other.bits == bits), None)


def options(
    row: Target, *, tensorrt: str | None = None, experts: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Return what the lowering of ``row`` is called with beside ``max_length``, of what a user asked for.

    An export may name several targets, so what a target does not take is meant for another one.
    """
    asked: dict[str, Any] = {}
    if row.bits:
        asked["bits"] = row.bits
    if row.versioned and tensorrt:
        asked["tensorrt"] = tensorrt
    if experts in row.expert_forms:
        asked["experts"] = experts
    if has_dtypes(row) and dtype:
        asked["dtype"] = dtype
    return asked
