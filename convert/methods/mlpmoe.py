"""MLPMoE, a reconstruction: static branches without a router or calibration (arXiv 2511.21089).

Only the paper's abstract could be read: "differential branch sparsity" that removes about 20% of the MLP's parameters
at about 2% of perplexity. Number of branches, fade schedule, pruning criterion and compensation formula below are ours
(docs/methods.md 3.2), and the plan says so.

1. slice: the FFN's neurons are cut into B contiguous branches whose outputs are summed; exact by itself;
2. order: as the model has its neurons, or branches by a data-free score, the mean over neurons of
   |gate_j| |up_j| |down_j|;
3. Fractal Fade: branch b loses the share p_b, which rises from 0 to p_max. Of what, is a reading (``structure``):

   * ``unstructured``, ``2:4`` and ``block`` set weights of gate, up and down to zero, the smallest magnitudes first
     (:mod:`moedge.convert.methods.mlpmoe_zeros`). Every neuron still runs, and zeros are stored like any weight: they
     save something only in a runtime that skips them;
   * ``neurons`` drops whole neurons, the lowest scores first: a narrower FFN, saved in parameters and in FLOPs. It
     destroys a model long before 20%, so it cannot be what the abstract means (docs/results.md);

4. Compensated Pruning: only the first B' branches stay, and what is left is multiplied: by sqrt(B / B'), which keeps
   the variance of a sum of independent zero-mean branches, or by B / B', which keeps its mean. Neurons of the branches
   that go are dropped, whatever the structure.

Every branch that stays runs for every token with weight 1. ``p_max=0`` with every branch kept is the dense model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge import MoEdgeError
from moedge._progress import reported
from moedge.convert import adapters, zeros
from moedge.convert.methods import mlpmoe_zeros
from moedge.convert.methods.layers import Layers
from moedge.convert.plan import LayerPlan, zero_share
from moedge.convert.rounding import six

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

RECONSTRUCTION = "reconstruction from the abstract of arXiv 2511.21089; schedule, criterion and factor are MoEdge's"
READINGS = {
    "unstructured": "branch sparsity as single weights by magnitude; zeros save nothing in dense storage",
    "2:4": "branch sparsity as 2 of 4 neighbouring weights of the last branches; zeros save nothing in dense storage",
    "block": "branch sparsity as blocks of weights by magnitude; zeros save nothing in dense storage",
    "neurons": "branch sparsity as whole neurons by the product of their norms",
}
"""What "differential branch sparsity" is taken for, by structure; the plan says it."""


class MLPMoEParams(BaseModel):
    """Typed parameters; by default 16 branches fade linearly to 0.4, which zeroes 20% of the FFN's weights.

    ``fade``: ``linear`` p_b = p_max b / (B-1); ``geometric`` 1 - 2^(-b s) with s so that the last branch has p_max;
    ``flat`` p_max / 2 in every branch: as much as ``linear``, without a fade, which a fade has to beat.
    ``keep`` is B', all branches when None. ``order``: ``none`` leaves the model's order; ``branches`` sorts the
    contiguous branches by falling score, so that the weakest fade most, ``rising`` the other way round, which costs
    less where weights are pruned; ``neurons`` sorts the neurons before they are cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    branches: int = Field(default=16, ge=1)
    """Contiguous parts that the FFN is cut into, B."""
    structure: Literal["unstructured", "neurons", "2:4", "block"] = "unstructured"
    """What the fade takes from a branch: its smallest weights (set to zero: nothing is saved in dense storage), whole
    neurons (really removed), two of every four weights along the inputs, or whole blocks of weights. A reading of the
    abstract."""
    block: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] = [16, 16]
    """Outputs and inputs of a block of weights (structure: block)."""
    fade: Literal["linear", "geometric", "flat"] = "linear"
    """How the pruned share grows over the branches: linear, 1 - 2^(-b s), or not at all (half of p_max in each)."""
    p_max: float = Field(default=0.4, ge=0, le=1)
    """Share that the last branch loses. 2:4 takes one half or nothing: the last branches get it, as many as come
    nearest the mean share."""
    keep: int | None = Field(default=None, ge=1)
    """Branches that stay, B'; all when null."""
    compensation: Literal["sqrt", "mean", "none"] = "sqrt"
    """What makes up for branches that are dropped: the output times sqrt(B / B'), times B / B', or nothing."""
    order: Literal["none", "branches", "rising", "neurons"] = "none"
    """Keep the model's order, sort the branches by falling or rising score, or the neurons before they are cut."""

    @model_validator(mode="after")
    def _fits(self) -> MLPMoEParams:
        if self.keep is not None and self.keep > self.branches:
            raise ValueError(f"keep: {self.keep} exceeds branches = {self.branches}.")
        asked = "p_max" in self.model_fields_set and self.p_max > 0
        if self.branches == 1 and self.fade != "flat" and asked:
            raise ValueError(
                f"p_max: a {self.fade} fade over one branch takes nothing; set fade: flat, or more branches."
            )
        if self.p_max == 1 and self.fade == "geometric":
            raise ValueError("p_max: a geometric fade to 1 leaves nothing; make it less than 1.")
        if self.order == "neurons" and self.structure in ("2:4", "block"):
            raise ValueError(f"order: neurons scatters a branch, which structure: {self.structure} needs in one piece.")
        return self


def plan(data: None, model: PreTrainedModel, params: MLPMoEParams, progress: Progress | None = None) -> Layers:
    """Plan every FFN; no data is read, and one layer's weights are copied at a time.

    ``provenance["mlpmoe"]`` says what is saved and what is zero over all layers; each layer's report lists its
    branches.

    Raises:
        MoEdgeError: more branches than neurons, branches that are not made of whole blocks, or 2:4 for more than half.
    """
    blocks = adapters.ffns(model)
    layers = [_layer(block, params) for block in reported(blocks, progress)]
    # A neuron is three vectors of H weights; a multiplication and an addition for each weight and token.
    hidden = int(model.config.hidden_size)
    before = 3 * hidden * sum(block.width for block in blocks)
    after = 3 * hidden * sum(len(layer.shared) for layer in layers)
    saved: dict[str, Any] = {"ffn_parameters": [before, after], "ffn_flops_per_token": [2 * before, 2 * after]}
    saved |= {"saved_share": round(1 - after / before, 6), "zero_share": round(zero_share(layers, hidden), 6)}
    reading = {"reconstruction": RECONSTRUCTION, "reading": READINGS[params.structure]}
    return Layers(layers, provenance={"mlpmoe": saved}, params=reading)


def schedule(settings: MLPMoEParams) -> np.ndarray:
    """Return p_b, the share that branch b loses, float64 [B].

    Raises:
        MoEdgeError: 2:4 for more than half.
    """
    rise = np.linspace(0, 1, settings.branches)
    shares = {
        "linear": settings.p_max * rise,
        "geometric": 1 - (1 - settings.p_max) ** rise,
        "flat": np.full(settings.branches, settings.p_max / 2),
    }[settings.fade]
    return mlpmoe_zeros.half_pruned(shares) if settings.structure == "2:4" else shares


def factor(branches: int, kept: int, rule: str) -> float:
    """Return what the sum of the ``kept`` of ``branches`` branches is multiplied by."""
    return {"sqrt": (branches / kept) ** 0.5, "mean": branches / kept, "none": 1.0}[rule]


def scores(block: adapters.FFN) -> np.ndarray:
    """Return |gate_j| |up_j| |down_j| of each neuron, float64 [D]."""
    gate, up, down = block.gate.double(), block.up.double(), block.down.double()
    result: np.ndarray = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).cpu().numpy()
    return result


def _layer(block: adapters.FFN, settings: MLPMoEParams) -> LayerPlan:
    score = scores(block)
    if settings.branches > len(score):
        raise MoEdgeError(f"{block.name} has {len(score)} neurons; {settings.branches} branches are too many.")
    neurons = np.argsort(-score, kind="stable") if settings.order == "neurons" else np.arange(len(score))
    branches = np.array_split(neurons, settings.branches)  # widths differ by one neuron at most
    if settings.order in ("branches", "rising"):
        sign = 1 if settings.order == "rising" else -1
        branches = sorted(branches, key=lambda branch: sign * score[branch].mean())  # stable
    keep = settings.keep or settings.branches
    # Neurons that stay, of each branch, and the share of the weights of these that become zero.
    staying, shares = branches[:keep], schedule(settings)[:keep]
    if settings.structure == "neurons":
        left = [len(branch) - round(share * len(branch)) for branch, share in zip(staying, shares, strict=True)]
        staying = [
            branch[np.argsort(-score[branch], kind="stable")[:count]]
            for branch, count in zip(staying, left, strict=True)
        ]
        masks = None
    else:
        masks = _masks(block, staying, shares, settings)
    gain = factor(settings.branches, keep, settings.compensation)
    layer = LayerPlan(
        shared=np.sort(np.concatenate(staying)).astype(np.int32),
        experts=[],
        top_k=0,
        down=None if gain == 1 else block.down.float().cpu().numpy() * np.float32(gain),
        zeros=None if masks is None else zeros.pack(masks),
        report={"branches": _report(branches, staying, score, masks), "factor": gain},
    )
    if layer.zeros is not None:
        stored, zero = layer.stored_weights(block.gate.shape[1])
        layer.report["zero_share"] = round(zero / stored, 6)
    return layer


def _masks(block: adapters.FFN, staying: list[np.ndarray], shares: np.ndarray, settings: MLPMoEParams) -> np.ndarray:
    """Return which weights of the branches that stay become zero, bool [3, D, H]."""
    shape = {"2:4": [1, 4], "block": settings.block}.get(settings.structure, [1, 1])
    mlpmoe_zeros.check(block, settings.branches if settings.structure in ("2:4", "block") else 1, shape)
    found = np.zeros((3, *block.gate.shape), dtype=bool)
    weights = [weight.float().cpu().numpy() for weight in (block.gate, block.up, block.down.T)]
    for branch, share in zip(staying, shares, strict=True):
        found[:, branch] = mlpmoe_zeros.masks(
            [weight[branch] for weight in weights], float(share), settings.structure, shape
        )
    return found


def _report(
    branches: list[np.ndarray], staying: list[np.ndarray], score: np.ndarray, masks: np.ndarray | None
) -> list[dict[str, Any]]:
    """One row for each branch, in its place in the schedule."""
    rows = []
    for number, branch in enumerate(branches):
        kept = staying[number] if number < len(staying) else branch[:0]
        row = {"neurons": len(branch), "kept": len(kept), "score": six(score[branch].mean())}
        if masks is not None and len(kept):
            row["zero_share"] = round(float(masks[:, kept].mean()), 6)
        rows.append(row)
    return rows
