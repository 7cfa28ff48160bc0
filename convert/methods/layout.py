"""Parameters that several methods share: shared and routed experts, and what each layer may spend."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge.convert import partition


class LayoutParams(BaseModel):
    """The layout S6A6E16 is shared=6, active=6, experts=16 (so 10 routed experts, 6 of them run)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shared: int = Field(default=6, ge=0)
    """Always-on experts, S."""
    active: int = Field(default=6, ge=1)
    """Routed experts that run for a token, A."""
    experts: int = Field(default=16, ge=2)
    """Experts in all, E; they must divide the FFN width, unless padding says otherwise."""
    padding: partition.Padding = "none"
    """``uneven`` allows any width: experts then differ by one neuron."""

    @model_validator(mode="after")
    def _exists(self) -> LayoutParams:
        if self.shared + self.active > self.experts:
            raise ValueError(
                f"active: {self.active} active experts cannot be chosen: {self.experts} experts minus {self.shared} "
                f"shared leave {max(self.experts - self.shared, 0)} to route to."
            )
        return self


class BudgetParams(BaseModel):
    """How one active width is spread over the layers; see :mod:`moedge.convert.budgets`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    budget: Literal["uniform", "measured"] = "uniform"
    """The same active width in every layer, or on average, by each layer's measured cost of skipping (this takes one
    more pass forwards and backwards)."""
    budget_tokens: int = Field(default=4096, ge=1)
    """Tokens that the measurement looks at, of every window in turn, in pieces of at most 512."""
    most_skipped: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    """With a measured budget, no layer skips more than this times the mean share of what can be skipped."""
