"""Which engines of a run are compared with which, and how much text each comparison gets.

* identity: a MoE with every expert selected is its dense parent (:func:`.compare.identity_all`). A plan that
  prunes or refits is not; its exports are then compared, every expert selected, with the same MoE in PyTorch;
* parity: an exported bundle computes what PyTorch computes (:func:`moedge.runtime.parity.compare`), the MoE bundles
  with their routing, the dense bundles without. A routed bundle whose arithmetic is not float32 is compared under its
  own choice of experts (:mod:`moedge.runtime.parity.replay`): rounding turns close decisions;
* kernels: a quantised bundle is another model than its checkpoint, and against PyTorch it is held to the looser limits
  of what quantisation costs. Against the portable graph that runs on the bundle's own de-quantised weights in float32
  it is held to what its kernels may do (profiles ``dequantized/...``). Nothing is identical to the dense parent after
  quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moedge.export.targets import PORTABLE
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

Kind = Literal["identity", "parity", "kernels"]
IDENTITY_WINDOWS = 2
DENSE_WINDOWS = 2
"""Identity and the dense parents are checked on fewer windows: a wrong kernel shows in the first one, and what the run
must prove on 2,048 tokens is the sparse model."""


@dataclass(frozen=True)
class Comparison:
    """One engine under test beside its reference."""

    kind: Kind
    reference: EngineRef
    test: EngineRef

    @property
    def name(self) -> str:
        """What people read, and ``name`` of the entry in a verify result."""
        if self.kind == "kernels":
            return f"{self.test} vs its de-quantised weights"
        return f"{self.test} {'=' if self.kind == 'identity' else 'vs'} {self.reference}"

    def windows(self, given: int) -> int:
        """How many of the windows it is made on."""
        if self.kind != "parity":
            return min(IDENTITY_WINDOWS, given)
        return min(DENSE_WINDOWS, given) if self.test.role == "dense" else given


@dataclass(frozen=True)
class Group:
    """Comparisons that share one run of a reference, on the first ``windows`` windows."""

    kind: Kind
    reference: EngineRef
    windows: int
    rounded: EngineRef | None = None
    """The engine whose de-quantised weights the reference runs on: each test of ``kernels`` has a group of its own."""

    def comparison(self, test: EngineRef) -> Comparison:
        """The comparison of one of its tests."""
        return Comparison(self.kind, self.reference, test)


def identity_reference(engines: Mapping[EngineRef, Path]) -> tuple[EngineRef | None, str | None]:
    """Return which engine every MoE with all experts selected must equal, and a sentence when it is not the parent."""
    from moedge.convert.plan import MoEPlan  # numpy and safetensors only

    plan = MoEPlan.load(engines[TORCH_MOE]) if TORCH_MOE in engines else None
    differs = plan.differs_from_dense() if plan else None
    if plan is None or differs is None:
        return TORCH_DENSE, None
    said = f"Even with every expert selected this plan is not its dense parent, by design ({differs})"
    if any(layer.experts for layer in plan.layers):
        return TORCH_MOE, f"{said}; the identity check compares with the same MoE in PyTorch instead."
    return None, f"{said}, and it has no experts: parity with PyTorch is the whole check."


def comparisons(engines: Iterable[EngineRef], identity: EngineRef | None) -> list[Comparison]:
    """Every comparison of a run, ordered by reference so that each is opened once.

    Args:
        engines: what there is.
        identity: see :func:`identity_reference`.
    """
    there = list(engines)
    found = []
    if identity is not None and identity in there:
        exact = [ref for ref in there if ref.role == "moe" and not ref.quantised]
        found += [Comparison("identity", identity, ref) for ref in exact]
    for torch in (TORCH_DENSE, TORCH_MOE):
        if torch in there:
            found += [Comparison("parity", torch, ref) for ref in there if ref.role == torch.role]
    for ref in there:
        portable = EngineRef(PORTABLE, ref.role)
        if ref.quantised and portable in there:
            found.append(Comparison("kernels", portable, ref))
    return [one for one in found if one.reference != one.test]


def grouped(found: Iterable[Comparison], windows: int) -> dict[Group, list[EngineRef]]:
    """Group -> engines under test: a reference runs once for all of them."""
    groups: dict[Group, list[EngineRef]] = {}
    for one in found:
        rounded = one.test if one.kind == "kernels" else None
        groups.setdefault(Group(one.kind, one.reference, one.windows(windows), rounded), []).append(one.test)
    return groups
