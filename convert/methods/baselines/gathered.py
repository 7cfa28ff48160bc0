"""TEAL and WINA as controls: small values are left out token by token, and all tokens are, those of a prompt too.

Both leave small values out where the plan under test does: in the FFNs, or in every linear layer, as both were
published. They keep the same share of the values of every place ("uniform"; TEAL's greedy allocation over blocks is not
made), by hard thresholds that are quantiles over the calibration windows, and read as many weights as the plan under
test. Neither needs a router, and neither is faster without a kernel that skips weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moedge.convert import reads
from moedge.convert.plan import SMALLEST_RAMP, MoEPlan

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

_HARD = SMALLEST_RAMP
"""Width of a ramp that is nearly the published step: one value in thousands stands on it."""


def teal(plan: MoEPlan, model: PreTrainedModel, token_windows: np.ndarray) -> MoEPlan:
    """TEAL (arXiv 2408.14690): the inputs and hidden values with the largest magnitude stay."""
    return _gathered(plan, model, token_windows, "TEAL", "magnitude")


def wina(plan: MoEPlan, model: PreTrainedModel, token_windows: np.ndarray) -> MoEPlan:
    """WINA (arXiv 2505.19427): as TEAL, magnitude times the norm of the weights that read the value."""
    return _gathered(plan, model, token_windows, "WINA", "norms")


def _gathered(
    plan: MoEPlan, model: PreTrainedModel, token_windows: np.ndarray, name: str, scores: Literal["magnitude", "norms"]
) -> MoEPlan:
    from moedge.convert import gather, kept_inputs, levels
    from moedge.convert.methods import gather as method

    share = reads.of_plan(plan)
    if share is None:  # thresholds from elsewhere
        share = levels.read_share(model, plan.layers, method.measured_on(token_windows, method.GatherParams()))
    outside = any(kept_inputs.wanted(plan.layers))
    linears: gather.Linears = "all" if outside or not any(layer.gathers for layer in plan.layers) else "ffn"
    params = method.GatherParams(share=min(share, 1.0), scores=scores, ramp=_HARD, linears=linears)
    made = method.plan(token_windows, model, params)
    own = {"control_of": plan.sha256, **params.model_dump(mode="json")}
    return MoEPlan(name, own, plan.model, made.layers, {**plan.provenance, **made.provenance})
