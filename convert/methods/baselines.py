"""Controls at the active width of a plan: what a routed conversion has to beat.

A method that loses to one of these adds nothing (methods.md 1.8: the published router barely beats a static mask, and
FLAP wins at 50% sparsity). Each function reads the layout from the plan under test, layer by layer, so both run the
same number of neurons a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from moedge.convert import adapters, partition
from moedge.convert.methods.cmoe import representative_router
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.convert.calibration import LayerStatistics, Progress

Statistics = list["LayerStatistics"]
_Make = Callable[[MoEPlan, Statistics, "PreTrainedModel", int], MoEPlan]


def random_partition(plan: MoEPlan, statistics: Statistics, model: PreTrainedModel, seed: int) -> MoEPlan:
    """Keep the layout and the router rule, but deal all neurons, the shared ones too, at random (LLaMA-MoE's split)."""
    generator = np.random.default_rng(seed)
    score, distance = plan.params.get("score", "signed"), plan.params.get("distance", "l2")

    def deal(layer: LayerPlan, block: adapters.FFN, facts: LayerStatistics) -> LayerPlan:
        if not layer.experts:
            return LayerPlan(np.sort(generator.permutation(facts.width)[: len(layer.shared)]).astype(np.int32), [], 0)
        neurons = generator.permutation(facts.width).astype(np.int32)
        widths = [len(expert) for expert in layer.experts]
        parts = np.split(neurons, np.cumsum([len(layer.shared), *widths]))
        shared, *experts = (np.sort(part) for part in parts[:-1])
        routed = np.concatenate(experts)
        labels = np.repeat(np.arange(len(widths)), widths)
        points = partition.signatures(facts.top_neurons, facts.width)[routed]
        centroids = partition.means(points, labels, len(widths))
        nearest = routed[partition.representatives(points, labels, centroids, distance)]
        router = representative_router(block, nearest, score, normalised=facts.profile == "normalised")
        return LayerPlan(shared, experts, layer.top_k, router)

    blocks = adapters.ffns(model)
    layers = [deal(*item) for item in zip(plan.layers, blocks, statistics, strict=True)]
    return _control(plan, "random partition", layers, seed=seed)


def random_router(plan: MoEPlan, seed: int) -> MoEPlan:
    """Keep the partition, but score the experts by a fixed random projection of x."""
    generator = np.random.default_rng(seed)
    hidden = plan.model["hidden_size"]

    def reroute(layer: LayerPlan) -> LayerPlan:
        if not layer.experts:
            return layer
        weight = generator.standard_normal((layer.num_experts, hidden), dtype=np.float32)
        return replace(layer, router=RouterPlan("random", {"weight": weight}, {"seed": seed}), selection_bias=None)

    return _control(plan, "random router", [reroute(layer) for layer in plan.layers], seed=seed)


def oracle(plan: MoEPlan) -> MoEPlan:
    """Keep the partition, but choose the experts with the largest true output norm (they are all computed)."""
    layers = [
        replace(layer, router=RouterPlan("oracle"), selection_bias=None) if layer.experts else layer
        for layer in plan.layers
    ]
    return _control(plan, "oracle router", layers)


def static_mask(plan: MoEPlan, statistics: Statistics) -> MoEPlan:
    """Keep the neurons with the highest activation rate, drop the rest: the shared block grown to the active width."""
    layers = []
    for layer, facts in zip(plan.layers, statistics, strict=True):
        kept = partition.by_rate(facts.counts)[: round(layer.active_width)]
        layers.append(LayerPlan(np.sort(kept).astype(np.int32), [], 0))
    return _control(plan, "static mask", layers)


def flap(plan: MoEPlan, statistics: Statistics, model: PreTrainedModel) -> MoEPlan:
    """FLAP on the FFN only, uniform over layers (arXiv 2312.11983, "WIFV" and "UL").

    Keep the neurons with the largest ``variance_j * |W_down[:, j]|^2``; the others are replaced by their mean, which
    becomes the output bias ``sum over dropped j of mean_j W_down[:, j]``. Exact when the dropped ones are constant.
    """
    layers = []
    for layer, block, facts in zip(plan.layers, adapters.ffns(model), statistics, strict=True):
        importance = facts.variance * np.square(block.down.float().cpu().numpy()).sum(axis=0)
        layers.append(_flap_layer(block, facts.mean, importance, round(layer.active_width)))
    return _control(plan, "FLAP-MLP", layers)


def _flap_layer(block: adapters.FFN, mean: np.ndarray, importance: np.ndarray, width: int) -> LayerPlan:
    down = block.down.float().cpu().numpy()
    order = np.argsort(-importance, kind="stable")
    dropped = np.sort(order[width:])
    bias = (down[:, dropped].astype(np.float64) @ mean[dropped]).astype(np.float32)
    return LayerPlan(np.sort(order[:width]).astype(np.int32), [], 0, output_bias=bias)


def flap_refit(
    plan: MoEPlan,
    token_windows: np.ndarray,
    model: PreTrainedModel,
    *,
    refit: bool = True,
    token_weight: Literal["none", "residual"] = "residual",
    sequential: bool = True,
    progress: Progress | None = None,
) -> MoEPlan:
    """FLAP on the FFN with the help that our own method gets: token weights, sequential conversion, and a refit.

    Without any of the three it is :func:`flap` on these tokens. The kept neurons' down projections and the bias are
    fitted to the dense FFN's output by least squares (:func:`moedge.convert.closed_form.refit`).

    Args:
        plan: gives the active width of each layer.
        token_windows: calibration ids, int64 [N, L].
    """
    from moedge.convert import closed_form, modeling, streaming
    from moedge.convert.methods.moedge_layer import neuron_energy

    layers = []
    for tokens in streaming.walk(model, token_windows, progress=progress):
        if token_weight == "none":
            tokens.weight = tokens.weight.new_ones(tokens.count)
        mean, importance, _ = (value.cpu().numpy() for value in neuron_energy(tokens))
        layer = _flap_layer(tokens.block, mean, importance, round(plan.layers[tokens.block.index].active_width))
        if refit:
            layer = closed_form.refit(tokens, layer)
        if sequential:
            tokens.replacement = modeling.build_ffn(tokens.block, layer)
        layers.append(layer)
    settings = {"refit": refit, "token_weight": token_weight, "sequential": sequential}
    return _control(plan, "FLAP-MLP + refit" if refit else "FLAP-MLP", layers, **settings)


CONTROLS: dict[str, _Make] = {
    "static mask": lambda plan, statistics, model, seed: static_mask(plan, statistics),
    "FLAP-MLP": lambda plan, statistics, model, seed: flap(plan, statistics, model),
    "random router": lambda plan, statistics, model, seed: random_router(plan, seed),
    "random partition": random_partition,
    "oracle router": lambda plan, statistics, model, seed: oracle(plan),
}
"""Control name -> function of (plan under test, statistics, dense model, seed)."""

SEEDED = ("random router", "random partition")
"""Controls that are reported as mean and standard deviation over seeds."""


ROUTED = ("random router", "random partition", "oracle router")
"""Controls that vary the routing or the experts."""


def refusal(name: str, plan: MoEPlan) -> str | None:
    """Say why a control makes no sense for a plan, or return None when it does."""
    return "the plan has no routed experts" if name in ROUTED and not any(x.experts for x in plan.layers) else None


def controls(
    plan: MoEPlan, statistics: Statistics, model: PreTrainedModel, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, list[MoEPlan]]:
    """Make every control that makes sense for a plan: one plan each, or one a seed for those that are seeded."""
    return {
        name: [make(plan, statistics, model, seed) for seed in (seeds if name in SEEDED else (0,))]
        for name, make in CONTROLS.items()
        if refusal(name, plan) is None
    }


def _control(plan: MoEPlan, method: str, layers: list[LayerPlan], **params: int | str) -> MoEPlan:
    return MoEPlan(method, {"control_of": plan.sha256, **params}, plan.model, layers, plan.provenance)
