"""Controls that change how a plan routes: its partition, its router, or the grain at which neurons are chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moedge import MoEdgeError
from moedge.convert import adapters, partition, reads
from moedge.convert.methods.cmoe import representative_router
from moedge.convert.plan import PROMPT_ROUTER, LayerPlan, MoEPlan, RouterPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.convert.calibration import LayerStatistics


def control(plan: MoEPlan, method: str, layers: list[LayerPlan], **params: int | str) -> MoEPlan:
    """Return a plan that names the plan it is a control of."""
    return MoEPlan(method, {"control_of": plan.sha256, **params}, plan.model, layers, plan.provenance)


def with_gather(plan: MoEPlan, layers: list[LayerPlan]) -> list[LayerPlan]:
    """Return the layers of a control with the thresholds of the plan, so that both leave out the same values."""
    return [made.with_thresholds(own.thresholds, own.ramp) for made, own in zip(layers, plan.layers, strict=True)]


def equal_widths(plan: MoEPlan) -> list[int]:
    """Return how many neurons each layer of a control without thresholds runs to read as much as the plan.

    That is the layer's active width, or, where the plan leaves out small values too, the same share of every layer.

    Raises:
        MoEdgeError: it does, and does not say how much is left.
    """
    if not any(layer.gathers for layer in plan.layers):
        return [round(layer.active_width) for layer in plan.layers]
    share = reads.of_plan(plan)
    if share is None:
        raise MoEdgeError("The plan leaves out small values and does not say how much it reads; convert again.")
    width = int(plan.model["intermediate_size"])
    return [max(1, min(round(share * width), width))] * len(plan.layers)


def random_partition(plan: MoEPlan, statistics: list[LayerStatistics], model: PreTrainedModel, seed: int) -> MoEPlan:
    """Keep the layout and the router rule, but deal all neurons, the shared ones too, at random."""
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
    return control(plan, "random partition", with_gather(plan, layers), seed=seed)


def random_router(plan: MoEPlan, seed: int) -> MoEPlan:
    """Keep the partition, but score the experts by a fixed random projection of x."""
    generator = np.random.default_rng(seed)
    hidden = plan.model["hidden_size"]

    def reroute(layer: LayerPlan) -> LayerPlan:
        if not layer.experts:
            return layer
        weight = generator.standard_normal((layer.num_experts, hidden), dtype=np.float32)
        return replace(layer, router=RouterPlan("random", {"weight": weight}, {"seed": seed}), selection_bias=None)

    return control(plan, "random router", [reroute(layer) for layer in plan.layers], seed=seed)


def oracle(plan: MoEPlan) -> MoEPlan:
    """Keep the partition, but choose the experts with the largest true output norm (they are all computed)."""
    layers = [
        replace(layer, router=RouterPlan("oracle"), selection_bias=None) if layer.experts else layer
        for layer in plan.layers
    ]
    return control(plan, "oracle router", layers)


def griffin(plan: MoEPlan) -> MoEPlan:
    """GRIFFIN (arXiv 2404.01365): each prompt chooses the neurons of its answer (:mod:`moedge.convert.prompted`).

    As many as the plan reads weights; the prompt itself runs all of them.
    """
    return control(plan, "GRIFFIN", _single_neurons(plan, PROMPT_ROUTER))


def neuron_top_k(plan: MoEPlan) -> MoEPlan:
    """Keep for each token the k neurons with the largest ``|h_i| |down_i|``, k the active width: a ceiling.

    Every neuron is an expert of its own, chosen by the oracle router. It has strictly more freedom than any choice
    among wider experts (docs/methods.md 5.5), computes every neuron to choose, and is therefore for evaluation only.
    """
    return control(plan, "neuron top-k", _single_neurons(plan, "oracle"))


def _single_neurons(plan: MoEPlan, router: str) -> list[LayerPlan]:
    """Return layers in which every neuron is an expert of its own, as many of them active as the plan reads."""
    width = int(plan.model["intermediate_size"])
    alone = np.arange(width, dtype=np.int32)
    return [
        LayerPlan(alone[:0], np.split(alone, width), min(active, width), RouterPlan(router))
        for active in equal_widths(plan)
    ]
