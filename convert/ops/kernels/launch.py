"""What it takes to launch one kernel: constants, argument types and a grid that is a formula of one size.

The same record serves PyTorch (:func:`run`), the ahead-of-time compiler (``compile.py``), the TensorRT plugin
(``moedge_plugins.py``) and the tests, so the grid that is tested is the grid that runs. This module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moedge.runtime.device.moedge_plugins import DTYPES, Extent

__all__ = ["DTYPES", "Extent", "Launch", "cover", "fixed", "power_of_two"]


def cover(block: int, *, times: int = 1) -> Extent:
    """``ceil(times * n / block)``."""
    return Extent(times, block - 1, block)


def fixed(size: int) -> Extent:
    """A dimension that does not depend on n."""
    return Extent(0, size, 1)


@dataclass(frozen=True)
class Launch:
    """One compiled variant of one kernel.

    Attributes:
        kernel: name of the operator's module and function, ``module.function``.
        inputs: parameter name -> element type, the tensors that are read, in order.
        scalars: parameter names of the 32-bit integers that follow them: nothing, or the dynamic size n.
        outputs: parameter name -> element type, the tensors that are written, in order.
        constants: compile-time parameters; an operator's attributes and fixed dimensions are folded in here.
        grid: one :class:`Extent` a dimension.
        warps: warps of 32 threads in a program.
        stages: depth of the software pipeline over the reduction.
    """

    kernel: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    constants: Mapping[str, Any]
    grid: tuple[Extent, ...]
    scalars: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 1
    label: str = field(default="", compare=False)

    def programs(self, n: Any) -> tuple[Any, ...]:
        """Return the launch grid for the dynamic size n."""
        return tuple(extent(n) for extent in self.grid)


def power_of_two(n: int, *, least: int = 1, most: int | None = None) -> int:
    """Return the smallest power of two >= n, within [least, most]."""
    size = max(least, 1 << max(0, n - 1).bit_length())
    return size if most is None else min(size, most)
