"""Lowering: rewrite the portable graph for one target, with a legality check and an executed self-test.

:data:`TARGETS` maps a target's name to the module that lowers for it; adding a target is one file and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TARGETS = {
    "portable": "moedge.export.lowering.portable",
    "ort-cpu": "moedge.export.lowering.onnxruntime",
    "ort-cuda": "moedge.export.lowering.ort_cuda",
    "ort-cpu-int8": "moedge.export.lowering.ort_int8",
    "ort-cpu-int4": "moedge.export.lowering.ort_int4",
    "openvino": "moedge.export.lowering.openvino",
    "tensorrt": "moedge.export.lowering.tensorrt",
    "tensorrt-rtx": "moedge.export.lowering.tensorrt_rtx",
}


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
