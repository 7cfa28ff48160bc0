"""No experts: every layer reads the weights of large inputs and large hidden values alone, token by token.

What the published training-free methods do (TEAL, WINA), with one choice of our own: by default a value's worth is the
KL that it costs to leave it out, and one price for the whole model decides (:mod:`moedge.convert.gather`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moedge.convert import adapters, processes
from moedge.convert import costs as _costs
from moedge.convert.costs import Product
from moedge.convert.methods.layers import Layers
from moedge.convert.plan import RAMP, SMALLEST_RAMP, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.gather import Ladder


_ANY = 1.0
"""With costs a place may go from all of its values to many fewer at one price, so no price reads some shares."""


def _products(value: Any) -> Any:
    """Read the file that is named in place of products."""
    return _costs.read(Path(value)) if isinstance(value, str) else value


class GatherParams(BaseModel):
    """Which values are left out, and how many."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    share: float = Field(default=0.75, gt=0, le=1, allow_inf_nan=False)
    """Share of the dense FFN weights that a token reads on average over the calibration text. What is left out of
    attention and of the output projection counts as FFN weights that are not read: equal shares save equal bytes."""
    linears: Literal["all", "ffn"] = "all"
    """Where small values are left out: everywhere (attention and the output projection too), or in the FFNs alone."""
    scores: Literal["fisher", "norms", "magnitude"] = "fisher"
    """What a value is worth: the KL that it costs to leave it out (one price for all layers), its size times the norm
    of the weights that read it (WINA), or its size (TEAL); the last two keep the same share in every layer."""
    score_tokens: int = Field(default=4096, ge=1)
    """Tokens of the calibration text on which the scores, and how much is read, are measured: of every window in turn,
    in pieces of at most 512."""
    ramp: float = Field(default=RAMP, ge=SMALLEST_RAMP, le=10, allow_inf_nan=False)
    """A value grows from 0 at its threshold t to its own at (1 + ramp) t, so that rounding turns no decision."""
    costs: Annotated[list[Product], BeforeValidator(_products)] = []
    """What products of the model take by how many of their inputs are kept: a file of ``moedge costs``, whose products
    are stored here. One price, KL for each millisecond, then decides in place of KL for each weight. ``share`` stays
    what is read; the nearest one is taken where a step of the costs lies between. Empty: all weights cost the same."""

    @model_validator(mode="after")
    def _costs_have_a_price(self) -> GatherParams:
        if self.costs and self.scores != "fisher":
            raise ValueError("costs are weighed against KL, which only the scores 'fisher' estimate")
        return self

    def measured(self) -> dict[str, Any]:
        """Return those that :func:`measure` reads; the same for every share."""
        return self.model_dump(mode="json", include={"linears", "scores", "score_tokens"})


def plan(
    token_windows: np.ndarray,
    model: PreTrainedModel,
    params: GatherParams,
    progress: Progress | None = None,
    *,
    ladders: list[Ladder] | None = None,
) -> Layers:
    """Plan every FFN: all neurons are shared, and thresholds say what is read.

    Args:
        token_windows: calibration ids, int64 [N, L].
        model: the dense parent; it is not changed.
        progress: called with (steps done, steps).
        ladders: what :func:`measure` found on the same windows; None: it is measured.

    Raises:
        MoEdgeError: no thresholds read the share that was asked for, or a model without GLU FFNs.
    """
    everything = [LayerPlan(np.arange(block.width, dtype=np.int32), [], 0) for block in adapters.ffns(model)]
    return on_top(everything, token_windows, model, params, progress, ladders=ladders)


def measure(
    token_windows: np.ndarray, model: PreTrainedModel, params: GatherParams, progress: Progress | None = None
) -> list[Ladder]:
    """Measure what values are worth and how large they are: the same for every share.

    Args:
        token_windows: calibration ids, int64 [N, L].
        progress: called with (steps done, steps).
    """
    from moedge.convert import gather

    some = measured_on(token_windows, params)
    if params.scores == "fisher":
        return gather.fisher(model, some, params.linears, progress)
    return gather.ladders(model, gather.static_scores(model, params.scores, params.linears), some)


def on_top(
    layers: list[LayerPlan],
    token_windows: np.ndarray,
    model: PreTrainedModel,
    params: GatherParams,
    progress: Progress | None = None,
    *,
    ladders: list[Ladder] | None = None,
) -> Layers:
    """Give converted layers thresholds, so that the whole model reads ``params.share`` of its dense parent's FFNs.

    Raises:
        MoEdgeError: the layers read less than that already.
    """
    from moedge.convert import gather, levels

    some = measured_on(token_windows, params)
    before = len(layers) + 1 if ladders is None else 0

    def advance(done: int) -> None:
        if progress:
            progress(done, before + levels.ROUNDS)

    steps = ladders if ladders is not None else measure(token_windows, model, params, lambda done, _: advance(done))

    def cuts(log_level: float) -> list[float]:
        level = math.exp(log_level)
        if params.costs:
            return _costs.cuts(steps, params.costs, level)
        return gather.cuts(steps, level) if params.scores == "fisher" else gather.cuts_of_share(steps, 1 / (1 + level))

    hidden, width = (int(adapters.describe(model)[name]) for name in ("hidden_size", "intermediate_size"))
    choice = levels.Levels(
        make=lambda level: gather.with_cuts(layers, steps, cuts(level), params.ramp),
        expected=lambda level: gather.expected_share(layers, steps, cuts(level), hidden, width),
        tolerance=_ANY if params.costs else levels.TOLERANCE,
    )
    made, found = levels.fit(model, choice, some, params.share, progress=lambda done, _: advance(before + done))
    advance(before + levels.ROUNDS)
    return Layers(made, {"gather": {"share": round(found, 4), "tokens": int(some.size)}})


def measured_on(token_windows: np.ndarray, params: GatherParams) -> np.ndarray:
    """Return the pieces of windows, of int64 [N, L], on which the scores and what is read are measured."""
    return processes.of_tokens(token_windows, params.score_tokens)
