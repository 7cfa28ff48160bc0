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
from moedge.convert import adapters, partition
from moedge.convert.methods.layout import LayoutParams
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.convert.calibration import LayerStatistics, Profile, Progress


Variant = Literal["paper", "released"]
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"profile": "raw", "distance": "l2", "score": "signed", "max_iters": 20},
    "released": {"profile": "normalised", "distance": "l1", "score": "abs", "max_iters": 1},
}
"""What each version of CMoE chooses: the paper, and the code that its authors released."""


class CMoEParams(LayoutParams):
    """Typed parameters; see :func:`plan` for each."""

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
    statistics: list[LayerStatistics],
    model: PreTrainedModel,
    *,
    shared: int,
    active: int,
    experts: int,
    variant: Variant = "paper",
    k_a: int = 10,
    profile: Profile | None = None,
    distance: partition.Distance | None = None,
    score: Literal["signed", "abs"] | None = None,
    max_iters: int | None = None,
    padding: partition.Padding = "none",
    source_sha256: str = "",
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> MoEPlan:
    """Make a CMoE plan.

    Args:
        statistics: one entry a layer, collected with this ``k_a`` and ``profile``.
        model: the dense parent (representatives' rows are copied from it).
        shared, active, experts: the layout SxAyEz, in units of one expert.
        variant: whose ``profile``, ``distance``, ``score`` and ``max_iters`` are used where they are None.
        padding: ``uneven`` allows a width that ``experts`` does not divide; routed experts then differ by one neuron.
        source_sha256: identity of the parent; ``provenance``: JSON about the calibration. Both are stored in the plan.

    Raises:
        MoEdgeError: impossible layout, or statistics of another model, ``k_a`` or profile.
    """
    if shared < 0 or active < 1 or shared + active > experts:
        raise MoEdgeError(
            f"Layout S{shared}A{active}E{experts} is impossible: shared + active must be at most experts."
        )
    given: dict[str, Any] = {"profile": profile, "distance": distance, "score": score, "max_iters": max_iters}
    params = CMoEParams(
        shared=shared,
        active=active,
        experts=experts,
        variant=variant,
        k_a=k_a,
        padding=padding,
        **{name: value for name, value in given.items() if value is not None},
    )
    blocks = adapters.ffns(model)
    if len(blocks) != len(statistics):
        raise MoEdgeError(f"Statistics have {len(statistics)} layers, the model {len(blocks)}; calibrate this model.")
    layers = []
    for block, layer in zip(blocks, statistics, strict=True):
        if (layer.k_a, layer.profile, layer.width) != (k_a, params.profile, block.gate.shape[0]):
            raise MoEdgeError(
                f"Statistics of {block.name} were made with k_a={layer.k_a}, profile={layer.profile}, "
                f"width {layer.width}; the plan asks for k_a={k_a}, profile={params.profile}. Calibrate again."
            )
        layers.append(layer_plan(layer, block, params))
        if progress:
            progress(len(layers), len(blocks))
    return MoEPlan("cmoe", params.model_dump(), adapters.describe(model, source_sha256), layers, provenance or {})


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
        tensors = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in tensors.items()}
    options: dict[str, Any] = {"score": score}
    if block.gate_bias is not None or block.up_bias is not None:
        options["bias"] = True
        for name, bias in (("gate_bias", block.gate_bias), ("up_bias", block.up_bias)):
            zeros = np.zeros(len(neurons), dtype=np.float32)
            tensors[name] = zeros if bias is None else bias[neurons].float().cpu().numpy()
    return RouterPlan("representative", tensors, options)
