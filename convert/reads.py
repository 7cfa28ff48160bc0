"""How many weights of its FFNs a converted model reads for a token: the honest axis of every comparison.

At batch 1 a decode step takes as long as it takes to read the weights, and a converted FFN is faster by those that it
does not read. Counted are gate and up of the kept inputs and active neurons, down of the kept neurons, and all of the
router, in units of the dense FFN's 3 H D weights. (Compensation, biases and thresholds are vectors, and left out.)
Where attention and the output projection leave small inputs out too (:mod:`moedge.convert.kept_inputs`), the weights
that they do not read count as FFN weights that are not read: equal shares are equal bytes, wherever they are saved.
Weights that are zero are stored and read like any other. A router that computes every expert to choose (the oracle)
counts as if the choice cost nothing.

Without thresholds the count follows from the plan alone (:func:`of_plan`); with them it is measured, text by text
(:func:`counted`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from moedge.convert.kept_inputs import KeepsLarge
    from moedge.convert.plan import LayerPlan, MoEPlan
    from moedge.convert.sparse_ffn import SparseFFN


@dataclass
class LayerReads:
    """Counts of one FFN, over all tokens that it was called with."""

    tokens: int = 0
    x: float = 0.0
    """Inputs of gate and up that were kept."""
    h: float = 0.0
    """Hidden values of active neurons that were kept."""
    active: int = 0
    """Active neurons: the shared ones, and those of the selected experts without padding."""
    COUNTED = ("tokens", "x", "h", "active")

    def add(self, which: str, values: torch.Tensor, threshold: torch.Tensor | None) -> None:
        """Count values of ``x`` [T, H] (once a token) or ``h``, those above their threshold."""
        kept = values.numel() if threshold is None else int((values.float().abs() > threshold).sum())
        if which == "x":
            self.tokens += len(values)
            self.x += kept
        else:
            self.h += kept
            self.active += values.numel()


@dataclass
class OutsideReads:
    """Counts of values that are read outside the FFNs, over all tokens."""

    weights: int
    """That one value is multiplied by."""
    inputs: int
    """Values of a token."""
    tokens: int = 0
    kept: int = 0
    COUNTED = ("tokens", "kept")

    def add(self, which: str, values: torch.Tensor, threshold: torch.Tensor | None) -> None:
        """Count values [T, K], those above their threshold."""
        self.tokens += len(values)
        self.kept += values.numel() if threshold is None else int((values.float().abs() > threshold).sum())

    @property
    def unread(self) -> float:
        """Weights that a token does not read."""
        return self.weights * (self.inputs - self.kept / self.tokens) if self.tokens else 0.0


@dataclass
class Reads:
    """What a model reads, by layer of its FFNs, and outside."""

    layers: dict[int, LayerReads] = field(default_factory=dict)
    outside: dict[tuple[int, str], OutsideReads] = field(default_factory=dict)
    """(Layer, place) -> what attention and the output projection read, where they leave something out."""
    _router: dict[int, int] = field(default_factory=dict)
    _hidden: int = 0

    def share(self, width: int) -> float:
        """Return the share of the FFN weights that a token reads, against dense FFNs of ``width`` neurons.

        What is not read outside counts as FFN weights that are not read.
        """
        if not self.layers:
            return 1.0
        shares = [self.of_layer(layer, width) for layer in self.layers]
        unread = sum(one.unread for one in self.outside.values()) / (3 * self._hidden * width)
        return (sum(shares) - unread) / len(shares)

    def of_layer(self, layer: int, width: int) -> float:
        """Return :meth:`share` of one layer; 1 where nothing ran."""
        seen = self.layers[layer]
        if not seen.tokens:
            return 1.0
        gate_up = 2 * seen.active / seen.tokens * seen.x / seen.tokens
        down = self._hidden * seen.h / seen.tokens
        return (gate_up + down + self._router[layer]) / (3 * self._hidden * width)

    def kept(self, layer: int) -> tuple[float, float]:
        """Return the shares of x, and of the active neurons' h, that a layer kept."""
        seen = self.layers[layer]
        return seen.x / (seen.tokens or 1) / self._hidden, seen.h / (seen.active or 1)

    def add_up(self) -> None:
        """Add the counts of all processes, which read different tokens."""
        from moedge.convert import processes

        every: list[LayerReads | OutsideReads] = [*self.layers.values(), *self.outside.values()]
        for one in every:
            for name in one.COUNTED:
                kind = type(getattr(one, name))
                setattr(one, name, kind(processes.added(getattr(one, name))))

    def watch(self, ffn: SparseFFN) -> None:
        """Count what ``ffn`` reads from now on."""
        layer = ffn.layer_index
        self._hidden = int(ffn.shared_gate.shape[1])
        self._router[layer] = sum(one.numel() for one in ffn.router.parameters()) if ffn.router is not None else 0
        self.layers[layer] = LayerReads()
        ffn.count = self.layers[layer].add


def of_plan(plan: MoEPlan) -> float | None:
    """Return the share of the dense parent's FFN weights that a token reads, or None where it is not known.

    With thresholds it is what was measured on the calibration text when they were made. Not known are thresholds from
    elsewhere, and experts inside experts.
    """
    if any(layer.children is not None for layer in plan.layers):
        return None
    if any(layer.gathers for layer in plan.layers):
        measured = plan.provenance.get("gather", {}).get("share")
        return None if measured is None else float(measured)
    hidden, width = int(plan.model["hidden_size"]), int(plan.model["intermediate_size"])
    shares = [_of_layer_plan(layer, hidden, width) for layer in plan.layers]
    return sum(shares) / len(shares)


def _of_layer_plan(layer: LayerPlan, hidden: int, width: int) -> float:
    tensors = layer.router.tensors.values() if layer.router and layer.experts else ()
    return (3 * hidden * layer.active_width + sum(tensor.size for tensor in tensors)) / (3 * hidden * width)


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[Reads]:
    """Count what the converted FFNs of ``model`` read while the block runs."""
    from moedge.convert import kept_inputs
    from moedge.convert.sparse_ffn import SparseFFN

    ffns = [module for module in model.modules() if isinstance(module, SparseFFN)]
    outside = [reader for reader in kept_inputs.readers(model) if reader.keeps] if ffns else []
    reads = Reads()
    for ffn in ffns:
        reads.watch(ffn)
    keepers: list[KeepsLarge] = list(ffns)
    for reader in outside:
        counts = reads.outside[reader.layer, reader.place] = OutsideReads(reader.weights, reader.inputs)
        keepers.append(cast("KeepsLarge", reader.module))
        keepers[-1].count = counts.add
    try:
        yield reads
    finally:
        for keeper in keepers:
            keeper.count = None
