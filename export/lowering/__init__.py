"""Lowering: rewrite the portable graph for one target, with a legality check and an executed self-test.

:data:`TARGETS` maps a target's name to the module that lowers for it; adding a target is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moedge import MoEdgeError

TARGETS = {
    "portable": "moedge.export.lowering.portable",
    "ort-cpu": "moedge.export.lowering.onnxruntime",
    "ort-cuda": "moedge.export.lowering.ort_cuda",
    "ort-cpu-int8": "moedge.export.lowering.ort_int8",
    "ort-cpu-int4": "moedge.export.lowering.ort_int4",
    "openvino": "moedge.export.lowering.openvino",
    "tensorrt": "moedge.export.lowering.tensorrt",
    "tensorrt-rtx": "moedge.export.lowering.tensorrt_rtx",
    "tensorrt-rtx-int8": "moedge.export.lowering.trt_int8",
    "tensorrt-rtx-int4": "moedge.export.lowering.trt_int4",
}

HALF_TARGETS = ("tensorrt", "tensorrt-rtx")
"""Targets whose half-precision type can be chosen."""

_NO_CUDA_QMOE = (
    "{} does not exist: ONNX Runtime's CUDA kernel for quantised experts lays weights out on the GPU when it loads "
    "them, which cannot be checked without one (docs/lowering.md). Take ort-cuda (float16) on a GPU, or {} on the CPU."
)
REFUSED = {f"ort-cuda-{kind}": _NO_CUDA_QMOE.format(f"ort-cuda-{kind}", f"ort-cpu-{kind}") for kind in ("int4", "int8")}
"""Targets that one may expect and that are left out on purpose: name -> why, and what to take instead."""


EXPERT_FORMS = ("plugins", "native", "merged")
"""Forms of the experts that one may ask for with a TensorRT target; see ``trt_experts``."""


def check_targets(names: Iterable[str]) -> None:
    """Check that every name is a target.

    Raises:
        MoEdgeError: one is not; why it is refused, or which there are.
    """
    for name in names:
        if name in REFUSED:
            raise MoEdgeError(f"Target {REFUSED[name]}")
        if name not in TARGETS:
            raise MoEdgeError(f"Unknown target {name!r}; known: {', '.join(TARGETS)}.")


def check_form(experts: str | None) -> None:
    """Check that a form of experts is one.

    Raises:
        MoEdgeError: it is not.
    """
    if experts is not None and experts not in EXPERT_FORMS:
        raise MoEdgeError(f"No form of experts is called {experts!r}; known: {', '.join(EXPERT_FORMS)}.")


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of a lowering, for the manifest and the report. ``status`` is ``applied`` or ``refused``."""

    rewrite: str
    nodes: int
    status: str
    reason: str = ""
    self_test: dict[str, Any] | None = None


@dataclass
class Lowered:
    """What a lowering gives back beside the rewritten graph: for the manifest's entries of the same names."""

    rewrites: list[Rewrite]
    taps: dict[int, dict[str, Any]]
    cache: dict[str, Any]
    limits: list[str] = field(default_factory=list)
    quantization: dict[str, Any] | None = None
    plugins: dict[str, Any] | None = None
    """For ``tensorrt``: the kernels that its nodes need (``kernels``: plugin and options) and the oldest TensorRT."""
    experts: str | None = None
    """For TensorRT targets: the form of the experts, see ``trt_experts``."""
