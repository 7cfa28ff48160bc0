"""Parameters of MoEdge's own method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moedge.convert.methods.layout import BudgetParams, LayoutParams


class MoEdgeParams(BudgetParams, LayoutParams):
    """Typed parameters; every ingredient is a switch."""

    budget: Literal["uniform", "measured"] = "measured"
    """The same active width in every layer, or on average, by each layer's measured cost of skipping: that takes one
    more pass forwards and backwards, and a quarter of the KL less is what it is worth (docs/results.md)."""
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
    the same active width or the next one below that it has, and keeps what misses least of its output on held-out
    tokens."""

    @model_validator(mode="after")
    def _fits(self) -> MoEdgeParams:
        for layout in self.layouts:
            if self.variant(layout).active < 1:
                raise ValueError(f"layouts: {layout} shares more experts than are to be active.")
        if self.fit_to == "stream" and not (self.sequential and self.refit):
            raise ValueError("fit_to: stream corrects earlier layers; it needs sequential: true and refit: true.")
        return self

    def variant(self, layout: str) -> MoEdgeParams:
        """Return these parameters with another layout of the same active width, or the next one below it.

        Never a wider one: that misses less because it reads more.
        """
        shared, experts = map(int, layout[1:].split("E"))
        active = (self.shared + self.active) * experts // self.experts
        changed = {"shared": shared, "experts": experts, "active": active - shared}
        return self.model_copy(update=changed)

    def variants(self) -> list[MoEdgeParams]:
        """Return these parameters by each of ``layouts``, without those that would have no routed expert active."""
        return [one for one in map(self.variant, self.layouts) if one.active >= 1]
