"""MLPMoE, a reconstruction: static branches without a router or calibration (arXiv 2511.21089).

Only the paper's abstract could be read. Number of branches, fade schedule, pruning criterion and compensation formula
below are ours (methods.md 3.2), and the plan says so.

1. slice: the FFN's neurons are cut into B contiguous branches whose outputs are summed; exact by itself;
2. order: branches by decreasing data-free score, the mean over neurons of |gate_j| |up_j| |down_j|;
3. Fractal Fade: branch b loses the share p_b of its neurons, the lowest scores first; p_b rises from 0 to p_max;
4. Compensated Pruning: only the first B' branches stay, and what is left is multiplied: by sqrt(B / B'), which keeps
   the variance of a sum of independent zero-mean branches, or by B / B', which keeps its mean.

Every branch that stays runs for every token with weight 1, so the plan is a narrower FFN: what is dropped is saved, in
parameters and in FLOPs, and no zeros are stored. ``p_max=0`` with every branch kept is the dense model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge import MoEdgeError
from moedge.convert import adapters
from moedge.convert.plan import LayerPlan, MoEPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.convert.calibration import LayerStatistics, Progress

RECONSTRUCTION = "reconstruction from the abstract of arXiv 2511.21089; schedule, criterion and factor are MoEdge's"


class MLPMoEParams(BaseModel):
    """Typed parameters; by default 16 branches fade linearly to 0.4, which drops about 20% of the FFN.

    ``fade``: ``linear`` p_b = p_max b / (B-1); ``geometric`` 1 - 2^(-b s) with s so that the last branch has p_max.
    ``keep`` is B', all branches when None. ``order``: ``branches`` sorts the contiguous branches by score, ``neurons``
    sorts the neurons before they are cut, ``none`` leaves the model's order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    branches: int = Field(default=16, ge=1)
    """Contiguous parts that the FFN is cut into, B."""
    fade: Literal["linear", "geometric"] = "linear"
    """How the pruned share grows over the branches: linear, or 1 - 2^(-b s)."""
    p_max: float = Field(default=0.4, ge=0, lt=1)
    """Share that the last branch loses."""
    keep: int | None = Field(default=None, ge=1)
    """Branches that stay, B'; all when null."""
    compensation: Literal["sqrt", "mean", "none"] = "sqrt"
    """What makes up for branches that are dropped: the output times sqrt(B / B'), times B / B', or nothing."""
    order: Literal["branches", "neurons", "none"] = "branches"
    """Sort the branches by score, the neurons before they are cut, or keep the model's order."""

    @model_validator(mode="after")
    def _fits(self) -> MLPMoEParams:
        if self.keep is not None and self.keep > self.branches:
            raise ValueError(f"keep: {self.keep} exceeds branches = {self.branches}.")
        return self


def plan(
    statistics: list[LayerStatistics] | None,
    model: PreTrainedModel,
    *,
    source_sha256: str = "",
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **params: Any,
) -> MoEPlan:
    """Make an MLPMoE plan; ``params`` are the fields of :class:`MLPMoEParams`, ``statistics`` is not read.

    ``provenance["mlpmoe"]`` says what is saved over all layers; each layer's report lists its branches.

    Raises:
        MoEdgeError: more branches than neurons.
    """
    settings = MLPMoEParams(**params)
    blocks = adapters.ffns(model)
    layers = []
    for block in blocks:
        layers.append(_layer(block, settings))
        if progress:
            progress(len(layers), len(blocks))
    described = adapters.describe(model, source_sha256)
    # A neuron is three vectors of H weights; a multiplication and an addition for each weight and token.
    before, after = (3 * described["hidden_size"] * neurons for neurons in _widths(described, layers))
    saved = {"ffn_parameters": [before, after], "ffn_flops_per_token": [2 * before, 2 * after]}
    saved["saved_share"] = round(1 - after / before, 6)
    named = {**settings.model_dump(mode="json"), "reconstruction": RECONSTRUCTION}
    return MoEPlan("mlpmoe", named, described, layers, {**(provenance or {}), "mlpmoe": saved})


def schedule(settings: MLPMoEParams) -> np.ndarray:
    """Return p_b, the share of neurons that branch b loses, float64 [B]."""
    rise = np.linspace(0, 1, settings.branches)
    if settings.fade == "linear":
        return settings.p_max * rise
    return 1 - (1 - settings.p_max) ** rise


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
    if settings.order == "branches":
        branches = sorted(branches, key=lambda branch: -score[branch].mean())  # stable
    keep = settings.keep or settings.branches
    kept, rows = [], []
    for number, (branch, share) in enumerate(zip(branches, schedule(settings), strict=True)):
        left = len(branch) - round(share * len(branch)) if number < keep else 0
        best = branch[np.argsort(-score[branch], kind="stable")[:left]]
        kept.append(best)
        rows.append({"neurons": len(branch), "kept": len(best), "score": float(f"{score[branch].mean():.6g}")})
    gain = factor(settings.branches, keep, settings.compensation)
    return LayerPlan(
        shared=np.sort(np.concatenate(kept)).astype(np.int32),
        experts=[],
        top_k=0,
        down=None if gain == 1 else block.down.float().cpu().numpy() * np.float32(gain),
        report={"branches": rows, "factor": gain},
    )


def _widths(described: dict[str, Any], layers: list[LayerPlan]) -> tuple[int, int]:
    return described["intermediate_size"] * len(layers), sum(len(layer.shared) for layer in layers)
