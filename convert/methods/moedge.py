"""MoEdge's own method: energy partition, closed-form router, mean compensation, least-squares refit.

What a token loses when neuron i is replaced by its mean is its energy ``(h_i - mean_i)^2 * |down_i|^2`` (neurons taken
as uncorrelated); FLAP (arXiv 2312.11983) ranks neurons by the mean of it. Everything here spends or predicts energy:

1. shared block: the neurons with the highest mean energy;
2. experts: the balanced partition whose top-k experts capture the most energy (:mod:`moedge.convert.energy`), then a
   few rounds with the selections of a fitted router in place of the best ones, so that experts are predictable;
3. router: ridge regression from the FFN input to each expert's energy or output norm (docs/methods.md 6);
4. compensation: an expert that is left out contributes its mean output over the tokens that leave it out;
5. refit: new down projections and compensations by least squares under the actual routing, anchored to the old ones.

Layers may differ: ``budget: measured`` spreads the active experts over them by what skipping costs the model
(:mod:`moedge.convert.budgets`), ``layouts`` lets each layer choose how many experts it has and shares.

Each step is a switch of :class:`MoEdgeParams`; settings within a step are chosen on held-out calibration tokens.
The work on one layer is in :mod:`moedge.convert.methods.moedge_layer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from moedge.convert import adapters
from moedge.convert.methods.layout import BudgetParams, LayoutParams
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from moedge.convert.streaming import Progress


class MoEdgeParams(BudgetParams, LayoutParams):
    """Typed parameters; every ingredient is a switch."""

    partition: Literal["energy", "correlation", "cmoe"] = "energy"
    """``energy``: coordinate ascent; ``correlation``: its start only; ``cmoe``: CMoE's shared set and clusters."""
    iterations: int = Field(default=10, ge=1)
    """Most rounds of the ascent."""
    router_rounds: int = Field(default=3, ge=0)
    """Rounds of reassignment under a fitted router's selections, kept while they help on held-out tokens."""
    partition_tokens: int = Field(default=8192, ge=1)
    """Tokens that the partition looks at, evenly spaced (memory: this times the FFN width, float32)."""
    loss: Literal["mean", "shared"] = "shared"
    """Energy is counted about a neuron's mean, or about its best linear prediction from the shared neurons, which a
    refit can make up for; without a refit, ``mean`` is the one that says what is lost."""
    router_target: Literal["energy", "root_energy", "norm"] = "root_energy"
    """What the router predicts for an expert: its energy, the root of it, or the norm of its centred output."""
    calibrate_scores: bool = False
    """Rescale each expert's score so that it regresses its target with slope 1 on held-out tokens."""
    compensation: Literal["none", "mean", "unselected"] = "unselected"
    """An expert left out adds nothing, its mean output, or its mean output over the tokens that leave it out."""
    refit: bool = True
    """Fit the down projections again by least squares."""
    token_weight: Literal["none", "residual"] = "residual"
    """Weight of a token in every sum: 1, or by what an error does to the residual stream
    (:attr:`moedge.convert.streaming.LayerTokens.weight`)."""
    sequential: bool = True
    """Later layers are fitted on what the converted earlier ones produce."""
    fit_to: Literal["ffn", "stream"] = "ffn"
    """Target of the refit: the dense FFN on the same input, or the dense model's hidden states (needs sequential)."""

    layouts: list[Annotated[str, Field(pattern=r"^S\d+E[1-9]\d*$")]] = Field(default=[])
    """Other numbers of shared experts and of experts, e.g. ``[S2E16, S16E128]``: every layer is converted by each, at
    the same active width, and keeps what misses least of its output on held-out tokens."""

    @model_validator(mode="after")
    def _fits(self) -> MoEdgeParams:
        for layout in self.layouts:
            if self.variant(layout).active < 1:
                raise ValueError(f"layouts: {layout} shares more experts than are to be active.")
        if self.fit_to == "stream" and not (self.sequential and self.refit):
            raise ValueError("fit_to: stream corrects earlier layers; it needs sequential: true and refit: true.")
        return self

    def variant(self, layout: str) -> MoEdgeParams:
        """Return these parameters with another layout of the same active width."""
        shared, experts = map(int, layout[1:].split("E"))
        share = (self.shared + self.active) / self.experts
        changed = {"shared": shared, "experts": experts, "active": round(share * experts) - shared}
        return self.model_copy(update=changed)

    def variants(self) -> list[MoEdgeParams]:
        """Return these parameters by each of ``layouts``, without those that would have no routed expert active."""
        return [one for one in map(self.variant, self.layouts) if one.active >= 1]


def plan(
    token_windows: np.ndarray,
    model: PreTrainedModel,
    *,
    source_sha256: str = "",
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MoEPlan:
    """Make a plan.

    Args:
        token_windows: calibration ids, int64 [N, L], N at least 2; one window in five is held out to choose settings.
        model: the dense parent; it is not changed.
        settings: the fields of :class:`MoEdgeParams`.
        source_sha256: identity of the parent; ``provenance``: JSON about the calibration. Both are stored in the plan.
        progress: called with (layers done, layers).

    Raises:
        MoEdgeError: a width that does not divide, too few windows, or a model without GLU FFNs.
    """
    from moedge.convert import modeling, streaming
    from moedge.convert.methods.moedge_layer import make_layer

    params = MoEdgeParams(**settings)
    active = [params.active] * len(adapters.ffns(model))
    if params.budget == "measured":
        active = _measured(model, token_windows, params)
    layers = []
    stream = params.fit_to == "stream"
    for tokens in streaming.walk(model, token_windows, dense_stream=stream, progress=progress):
        here = params.model_copy(update={"active": active[tokens.block.index]})
        tried = [make_layer(tokens, one) for one in (here, *here.variants())]
        layer = min(tried, key=lambda one: one.report["held_out_error"])
        layers.append(layer)
        if params.sequential:
            tokens.replacement = modeling.build_ffn(tokens.block, layer)
    return MoEPlan("moedge", params.model_dump(), adapters.describe(model, source_sha256), layers, provenance or {})


def _measured(model: PreTrainedModel, token_windows: np.ndarray, params: MoEdgeParams) -> list[int]:
    """Return the active experts of each layer."""
    from moedge.convert import budgets, partition

    curves = budgets.calibration_curves(model, token_windows, params.budget_tokens)
    shared, widths = partition.group_widths(len(curves[0]) - 1, params.shared, params.experts, params.padding)
    return budgets.spread(curves, shared, widths, params.active, params.most_skipped)
