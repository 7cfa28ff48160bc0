"""The name of an engine of a run: which target, and which of the two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moedge.export import targets

Role = Literal["moe", "dense"]


@dataclass(frozen=True, order=True)
class EngineRef:
    """The converted model (``moe``) or its parent (``dense``), in PyTorch (target ``torch``) or as a bundle.

    ``str(ref)`` is the label that people read and JSON holds: ``"ort-cpu moe"``.
    """

    target: str
    role: Role

    def __str__(self) -> str:
        return f"{self.target} {self.role}"

    @property
    def row(self) -> targets.Target | None:
        """Facts of the target; None for PyTorch and for a target that this version does not know."""
        return targets.known(self.target)

    @property
    def quantised(self) -> bool:
        """Whether its bundle holds integer weights."""
        return is_quantised(self.target)


def is_quantised(target: str) -> bool:
    """Whether bundles of a target hold integer weights."""
    row = targets.known(target)
    return row is not None and row.bits is not None


TORCH_MOE = EngineRef("torch", "moe")
TORCH_DENSE = EngineRef("torch", "dense")
