"""Static pruning of the FFN: one set of neurons for every token, no router.

Each exists twice: as a control at the active width of a plan, and as a method of its own that keeps a share of each
FFN. D neurons, H hidden, W_down [H, D]; uniform over layers, as "UL" in FLAP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moedge import MoEdgeError
from moedge._progress import reported
from moedge.convert import adapters, partition
from moedge.convert.methods.baselines.routing import control, equal_widths
from moedge.convert.methods.layers import Layers, measured
from moedge.convert.methods.layout import BudgetParams
from moedge.convert.plan import LayerPlan, MoEPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.calibration import LayerStatistics


class KeepParams(BaseModel):
    """``keep`` is the share of each FFN's neurons that stay, rounded to whole neurons."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    keep: float = Field(default=0.75, gt=0, le=1)
    """Share of each FFN's neurons that stay."""


class ATopKParams(KeepParams):
    """Parameters of the static mask; a token marks its ``k_a`` strongest neurons, see CMoE for ``profile``."""

    k_a: int = Field(default=10, ge=1)
    """Strongest neurons that a token marks."""
    profile: Literal["raw", "normalised"] = "raw"
    """Mark by abs(h), or by normalised inputs and weights."""


class FlapParams(BudgetParams, KeepParams):
    """Parameters of FLAP on the FFN; the published method ("WIFV", "UL") has the switches off."""

    refit: bool = False
    """Fit the down projection again by least squares."""
    token_weight: Literal["none", "residual"] = "none"
    """Weight of a token in every mean: 1 (published), or by what an error does to the residual stream."""
    sequential: bool = False
    """Later layers are measured on what the pruned earlier ones produce."""


def atopk_plan(
    statistics: list[LayerStatistics], model: PreTrainedModel, params: ATopKParams, progress: Progress | None = None
) -> Layers:
    """Keep the neurons of each FFN that the most tokens mark; a token marks its ``k_a`` largest ``|h|``.

    Raises:
        MoEdgeError: statistics of another model, or made with another ``k_a`` or ``profile``.
    """
    pairs = measured(model, statistics)
    for block, facts in pairs:
        if (facts.k_a, facts.profile) != (params.k_a, params.profile):
            raise MoEdgeError(
                f"Statistics of {block.name} have k_a={facts.k_a} and profile={facts.profile}; the plan needs "
                f"k_a={params.k_a} and profile={params.profile}. Calibrate again."
            )
    return Layers(
        [_most_active(facts, partition.kept_width(facts.width, params.keep)) for _, facts in reported(pairs, progress)]
    )


def wanda_plan(
    statistics: list[LayerStatistics], model: PreTrainedModel, params: KeepParams, progress: Progress | None = None
) -> Layers:
    """Keep the neurons of each FFN with the largest structured Wanda score; see :func:`wanda`.

    Raises:
        MoEdgeError: statistics of another model.
    """
    pairs = reported(measured(model, statistics), progress)
    return Layers([_best(wanda_score(*pair), partition.kept_width(pair[1].width, params.keep)) for pair in pairs])


def flap_plan(
    token_windows: np.ndarray, model: PreTrainedModel, params: FlapParams, progress: Progress | None = None
) -> Layers:
    """Keep the neurons of each FFN with the largest FLAP score (:func:`flap`), with or without the help of our method.

    That is token weights, sequential conversion, and a refit: the kept neurons' down projections and the bias are
    fitted to the dense FFN's output by least squares (:func:`moedge.convert.closed_form.refit`).
    With ``budget="measured"`` ``keep`` is the mean share, and layers differ as in our own method
    (:mod:`moedge.convert.budgets`, neuron by neuron).

    Args:
        token_windows: calibration ids, int64 [N, L], N at least 2.
    """
    from moedge.convert import closed_form, modeling, streaming
    from moedge.convert.methods.moedge.layer import neuron_energy

    widths, layers = _flap_widths(token_windows, model, params), []
    for tokens in streaming.walk(model, token_windows, progress=progress):
        if params.token_weight == "none":
            tokens.weight = tokens.weight.new_ones(tokens.count)
        mean, importance, _ = (value.cpu().numpy() for value in neuron_energy(tokens))
        down = tokens.block.down.float().cpu().numpy()
        kept, bias = partition.keep_with_bias(down, mean, importance, widths[tokens.block.index])
        layer = LayerPlan(kept, [], 0, output_bias=bias)
        if params.refit:
            layer = closed_form.refit(tokens, layer)
        if params.sequential:
            tokens.replacement = modeling.build_ffn(tokens.block, layer)
        layers.append(layer)
    return Layers(layers)


def _flap_widths(token_windows: np.ndarray, model: PreTrainedModel, params: FlapParams) -> list[int]:
    """Return how many neurons each layer keeps."""
    widths = [partition.kept_width(block.width, params.keep) for block in adapters.ffns(model)]
    if params.budget == "uniform":
        return widths
    from moedge.convert import budgets

    curves = budgets.calibration_curves(model, token_windows, params.budget_tokens)
    return budgets.spread(curves, 0, [1] * (len(curves[0]) - 1), widths[0], params.most_skipped)


def static_mask(plan: MoEPlan, statistics: list[LayerStatistics]) -> MoEPlan:
    """Keep the neurons with the highest activation rate, drop the rest: the shared block grown to the active width."""
    pairs = zip(equal_widths(plan), statistics, strict=True)
    return control(plan, "static mask", [_most_active(facts, width) for width, facts in pairs])


def wanda(plan: MoEPlan, statistics: list[LayerStatistics], model: PreTrainedModel) -> MoEPlan:
    """Structured Wanda on the FFN, uniform over layers: the "Wanda-sp" that FLAP (arXiv 2312.11983) compares with.

    The score of neuron j is the mean over the rows i of ``|W_down[i, j]| * |h_j|_2``, the norm over all calibration
    tokens. Nothing replaces what is dropped. Inputs are the dense model's; FLAP's code prunes sequentially.
    """
    trios = zip(equal_widths(plan), adapters.ffns(model), statistics, strict=True)
    layers = [_best(wanda_score(block, facts), width) for width, block, facts in trios]
    return control(plan, "Wanda-structured", layers)


def wanda_score(block: adapters.FFN, facts: LayerStatistics) -> np.ndarray:
    """Return the score of each neuron, float64 [D], up to the common factor sqrt(tokens)."""
    norm = np.sqrt(facts.variance.astype(np.float64) + np.square(facts.mean.astype(np.float64)))
    return norm * block.down.double().abs().mean(dim=0).cpu().numpy()


def flap(plan: MoEPlan, statistics: list[LayerStatistics], model: PreTrainedModel) -> MoEPlan:
    """FLAP on the FFN only, uniform over layers (arXiv 2312.11983, "WIFV" and "UL"); see :func:`partition.flap`.

    Exact when the dropped neurons are constant.
    """
    layers = []
    for width, block, facts in zip(equal_widths(plan), adapters.ffns(model), statistics, strict=True):
        down = block.down.float().cpu().numpy()
        kept, bias = partition.flap(down, facts.mean, facts.variance, width)
        layers.append(LayerPlan(kept, [], 0, output_bias=bias))
    return control(plan, "FLAP-MLP", layers)


def _most_active(facts: LayerStatistics, width: int) -> LayerPlan:
    return LayerPlan(np.sort(partition.by_rate(facts.counts)[:width]).astype(np.int32), [], 0)


def _best(score: np.ndarray, width: int) -> LayerPlan:
    return LayerPlan(np.sort(np.argsort(-score, kind="stable")[:width]).astype(np.int32), [], 0)
