"""Controls that read as many weights as a plan: what a conversion has to beat.

A method that loses to one of these adds nothing (docs/methods.md 1.4: the published router does not beat a static
mask, and FLAP wins at 50% sparsity). Each function reads the layout from the plan under test, layer by layer, so both
run the same number of neurons a token; where the plan leaves out small values, static controls keep as many neurons as
it reads weights, and those that change experts or router take its thresholds. Those that can be deployed are also
methods of their own in :data:`moedge.convert.methods.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moedge.convert.methods.baselines.gathered import teal, wina
from moedge.convert.methods.baselines.routing import griffin, neuron_top_k, oracle, random_partition, random_router
from moedge.convert.methods.baselines.splits import llamamoe, moefication
from moedge.convert.methods.baselines.static import flap, static_mask, wanda
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from moedge.convert.calibration import LayerStatistics

Statistics = list["LayerStatistics"]
_Make = Callable[[MoEPlan, Statistics, "PreTrainedModel", int, "np.ndarray"], MoEPlan]

CONTROLS: dict[str, _Make] = {
    "static mask": lambda plan, statistics, model, seed, windows: static_mask(plan, statistics),
    "FLAP-MLP": lambda plan, statistics, model, seed, windows: flap(plan, statistics, model),
    "Wanda-structured": lambda plan, statistics, model, seed, windows: wanda(plan, statistics, model),
    "random router": lambda plan, statistics, model, seed, windows: random_router(plan, seed),
    "random partition": lambda plan, statistics, model, seed, windows: random_partition(plan, statistics, model, seed),
    "LLaMA-MoE random": lambda plan, statistics, model, seed, windows: llamamoe(plan, model, seed, "random"),
    "LLaMA-MoE clustering": lambda plan, statistics, model, seed, windows: llamamoe(plan, model, seed, "clustering"),
    "MoEfication, centre router": lambda plan, statistics, model, seed, windows: moefication(plan, model, seed),
    "TEAL": lambda plan, statistics, model, seed, windows: teal(plan, model, windows),
    "WINA": lambda plan, statistics, model, seed, windows: wina(plan, model, windows),
    "GRIFFIN": lambda plan, statistics, model, seed, windows: griffin(plan),
    "oracle router": lambda plan, statistics, model, seed, windows: oracle(plan),
    "neuron top-k": lambda plan, statistics, model, seed, windows: neuron_top_k(plan),
}
"""Control name -> function of (plan under test, statistics, dense model, seed, calibration windows int64 [N, L])."""

READ_STATISTICS = ("static mask", "FLAP-MLP", "Wanda-structured", "random partition")
"""Controls that read the second argument."""

STANDARD = ("static mask", "FLAP-MLP", "random router", "random partition", "oracle router")
"""The controls that a recipe asks for unless it says otherwise; the others cost more or show less."""

SEEDED = (
    "random router",
    "random partition",
    "LLaMA-MoE random",
    "LLaMA-MoE clustering",
    "MoEfication, centre router",
)
"""Controls that are reported as mean and standard deviation over seeds."""

ROUTED = (*SEEDED, "oracle router")
"""Controls that vary the routing or the experts."""

PARTITIONS = tuple(name for name in ROUTED if name != "random router")
"""Controls that make a partition of their own, or take an expert's output for what is missed without it."""

CEILINGS = ("oracle router", "neuron top-k")
"""Controls that no router can be asked to beat: they compute every expert, or every neuron, to choose."""

__all__ = [
    "CEILINGS",
    "CONTROLS",
    "PARTITIONS",
    "ROUTED",
    "SEEDED",
    "STANDARD",
    "flap",
    "griffin",
    "llamamoe",
    "moefication",
    "neuron_top_k",
    "oracle",
    "random_partition",
    "random_router",
    "refusal",
    "static_mask",
    "teal",
    "wanda",
    "wina",
]


def refusal(name: str, plan: MoEPlan) -> str | None:
    """Say why a control makes no sense for a plan, or return None when it does."""
    if name in ROUTED and not any(layer.experts for layer in plan.layers):
        return "the plan has no routed experts"
    if name not in ROUTED and _runs_everything(plan):
        return "the plan reads every weight, and a control that does is the dense parent"
    if name in PARTITIONS and any(layer.overlapping for layer in plan.layers):
        return "the plan's experts overlap, they are no partition"
    return None


def _runs_everything(plan: MoEPlan) -> bool:
    width = int(plan.model["intermediate_size"])
    return all(layer.children is None and len(layer.shared) == width and not layer.gathers for layer in plan.layers)
