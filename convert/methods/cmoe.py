"""CMoE: Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis (arXiv 2502.04416v3).

From the ATopK marks of each layer:

1. shared block: the neurons with the highest activation rate mu (sec. 3.2);
2. routed experts: balanced K-means on the activation signatures of the rest, started from the E signatures with the
   highest rates, assigned by Jonker-Volgenant (sec. 3.2);
3. router: score of an expert = activation of its representative neuron, the member nearest to the cluster mean
   (sec. 3.3); the top experts are added with weight 1.

The released code (commit 42dfc94) differs from the paper: marks and router rows from L2-normalised weights, L1
distances, absolute scores, one round of clustering. ``variant`` names the two versions (:data:`VARIANTS`); which is
better, docs/results.md says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from moedge import MoEdgeError
from moedge._progress import reported
from moedge.convert import adapters, partition
from moedge.convert.methods.layers import Layers, measured
from moedge.convert.methods.layout import LayoutParams
from moedge.convert.plan import LayerPlan, RouterPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.calibration import LayerStatistics


Variant = Literal["paper", "released"]
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"profile": "raw", "distance": "l2", "score": "signed", "max_iters": 20},
    "released": {"profile": "normalised", "distance": "l1", "score": "abs", "max_iters": 1},
}
"""What each version of CMoE chooses: the paper, and the code that its authors released."""


class CMoEParams(LayoutParams):
    """Typed parameters."""

    variant: Variant = "paper"
    """Whose profile, distance, score and max_iters are used, where they are not given: those of the paper, or of the
    code that its authors released."""
    k_a: int = Field(default=10, ge=1)
    """Strongest neurons that a token marks, K_a."""
    profile: Literal["raw", "normalised"] = "raw"
    """Mark by abs(h), or by normalised inputs and weights (the released code)."""
    distance: Literal["l2", "l1"] = "l2"
    """Between marks, for the clustering: l2 (paper) or l1 (released code)."""
    score: Literal["signed", "abs"] = "signed"
    """Router score of an expert's representative neuron: signed (paper) or abs (released code)."""
    max_iters: int = Field(default=20, ge=1)
    """Most rounds of balanced K-means (the released code does 1)."""

    @model_validator(mode="before")
    @classmethod
    def _by_variant(cls, data: Any) -> Any:
        """Fill in what the variant chooses, so that every parameter stands in the plan."""
        chosen = data.get("variant") if isinstance(data, dict) else None
        return {**VARIANTS.get(chosen, {}), **data} if isinstance(chosen, str) else data


def plan(
    statistics: list[LayerStatistics], model: PreTrainedModel, params: CMoEParams, progress: Progress | None = None
) -> Layers:
    """Plan every FFN.

    Args:
        statistics: one entry a layer, collected with the parameters' ``k_a`` and ``profile``.
        model: the dense parent (representatives' rows are copied from it).

    Raises:
        MoEdgeError: a width that the experts do not divide, or statistics of another model, ``k_a`` or profile.
    """
    pairs = measured(model, statistics)
    for block, layer in pairs:
        if (layer.k_a, layer.profile) != (params.k_a, params.profile):
            raise MoEdgeError(
                f"Statistics of {block.name} were made with k_a={layer.k_a}, profile={layer.profile}; "
                f"the plan asks for k_a={params.k_a}, profile={params.profile}. Calibrate again."
            )
    return Layers([layer_plan(layer, block, params) for block, layer in reported(pairs, progress)])


def layer_plan(statistics: LayerStatistics, block: adapters.FFN, params: CMoEParams) -> LayerPlan:
    """Make the plan of one FFN from its statistics, which must be of the parameters' ``k_a`` and ``profile``."""
    distance = params.distance
    shared_width, widths = partition.group_widths(statistics.width, params.shared, params.experts, params.padding)
    counts = statistics.counts
    order = partition.by_rate(counts)
    rest = np.sort(order[shared_width:])
    points = partition.signatures(statistics.top_neurons, statistics.width)[rest]
    initial = np.searchsorted(rest, order[shared_width : shared_width + len(widths)])
    clusters = partition.balanced_kmeans(points, initial, widths, distance, params.max_iters)
    nearest = rest[partition.representatives(points, clusters.labels, clusters.centroids, distance)]
    return LayerPlan(
        shared=np.sort(order[:shared_width]).astype(np.int32),
        experts=[rest[clusters.labels == e].astype(np.int32) for e in range(len(widths))],
        top_k=params.active,
        router=representative_router(block, nearest, params.score, normalised=statistics.profile == "normalised"),
        selection_bias=np.zeros(len(widths), dtype=np.float32),
        report={
            "dead_share": round(float(np.mean(counts == 0)), 6),
            "dead_share_of_routed": round(float(np.mean(counts[rest] == 0)), 6),
            "representatives": nearest.tolist(),
            "dead_representatives": int(np.sum(counts[nearest] == 0)),
            "iterations": clusters.iterations,
            "converged": clusters.converged,
        },
    )


def representative_router(block: adapters.FFN, neurons: np.ndarray, score: str, *, normalised: bool) -> RouterPlan:
    """Copy the gate and up rows of the representative neurons, float32 [E, H] each, and their biases if there are any.

    ``normalised`` scales every row to length 1, as CMoE's released code does.
    """
    tensors = {name: getattr(block, name)[neurons].float().cpu().numpy() for name in ("gate", "up")}
    if normalised:
        # The floor is that of ``F.normalize``, by which calibration normalises: rows of a pruned neuron are zero.
        tensors = {
            name: rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            for name, rows in tensors.items()
        }
    options: dict[str, Any] = {"score": score}
    if block.gate_bias is not None or block.up_bias is not None:
        options["bias"] = True
        for name, bias in (("gate_bias", block.gate_bias), ("up_bias", block.up_bias)):
            zeros = np.zeros(len(neurons), dtype=np.float32)
            tensors[name] = zeros if bias is None else bias[neurons].float().cpu().numpy()
    return RouterPlan("representative", tensors, options)
