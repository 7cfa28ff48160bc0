"""Lowering: rewrite the portable graph for one target, with a capabilities check and an executed self-test.

Which function lowers for which target is in :mod:`moedge.export.targets`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moedge.export.manifest import CacheFacts, Kept, Operators, Plugins, Quantization, Tap, Which


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
    taps: dict[int, Tap]
    cache: CacheFacts
    limits: list[str] = field(default_factory=list)
    quantization: Quantization | None = None
    plugins: Plugins | None = None
    """For ``tensorrt``: the kernels that its nodes need, and the oldest TensorRT."""
    operators: Operators | None = None
    """The library of our own operators that the graph needs; set when the bundle is written."""
    experts: str | None = None
    """For TensorRT targets: the form of the experts, see :mod:`moedge.export.lowering.trt.experts`."""
    keeps: dict[int, dict[Which, Kept]] | None = None
    """Layers that leave small values out: where the graph shows it; set when the bundle is written."""
