"""DIVE: a pruned copy of every FFN for each group of domains, and a router between them (ACL 2025, 2025.acl-long.951).

1. domain affinity mining groups named texts (:mod:`moedge.convert.domains`);
2. for each group and layer FLAP keeps the neurons that matter on the group's text; what the others contribute on
   average becomes the expert's own bias. Statistics of all layers come from the unpruned model, and every expert has
   exactly the same width. Experts overlap: with E experts that keep a share r, E*r FFNs are stored and k*r run;
3. a linear router chooses ``active`` experts for a token.

The paper starts the router at random and trains it (stage 1 of ``convert/train/retrain.py``): ``router: random``. By
default the router is instead fitted in closed form, a ridge regression from the FFN input to the error that each expert
would make, so that a checkpoint is of use before any training.

A selected expert has the weight of a softmax over the selected ones, which is 1 for ``active: 1``. That weight gives a
top-1 router no gradient (docs/methods.md 4.3); retraining then takes the straight-through one, and ``weights: all``
keeps the softmax over all experts instead.

Released code: yuchenblah/DIVE 3381a93 (docs/dive.md). Its statistics count a group's data sets alike, as is
done here; its threshold on ties and its mean update are not repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge import MoEdgeError
from moedge.convert import adapters, domains, partition
from moedge.convert.methods.layers import Layers
from moedge.convert.plan import CombineRule, LayerPlan, RouterPlan
from moedge.convert.rounding import six

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.domains import Affinity, DomainText, Linkage, Moments
    from moedge.convert.streaming import LayerTokens

DOMAINS = {
    "encyclopedia": "asset:wiki",
    "web": "asset:c4",
    "code": "asset:code",
    "technical": "asset:technical",
    "fiction": "asset:fiction",
    "law": "asset:law",
}
"""The texts that a run uses unless it names its own."""


class DiveParams(BaseModel):
    """Typed parameters. The paper: 24 domains, 8 experts; ``keep`` 0.5 with 1 active, or 0.25 with 2 active."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    domains: dict[str, str] = DOMAINS
    """Name -> text, at least two; a text is what ``--text`` takes."""
    experts: int = Field(default=4, ge=2)
    """Groups of domains, so at most one a domain."""
    active: int = Field(default=1, ge=1)
    """Experts that run for a token."""
    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of the neurons that each expert keeps."""
    grouping: Literal["affinity", "random"] = "affinity"
    """``random`` deals the domains out by ``seed``: the control for the mining."""
    linkage: Literal["average", "complete", "single"] = "average"
    """Of the hierarchical clustering of domains."""
    router: Literal["ridge", "random"] = "ridge"
    """Fitted to each expert's error in closed form, or random (the paper's start)."""
    weights: Literal["selected", "all"] = "selected"
    """Softmax over the selected experts (the released code), or over all of them without renormalising: a router that
    training has not made sure of itself then scales the output down."""
    samples: int = Field(default=16, ge=2)
    """Windows of each domain to prune with (the paper: 1024 an expert, split over its domains)."""
    score_samples: int = Field(default=4, ge=1)
    """Windows of each domain, of other documents, to measure perplexity on."""
    length: int = Field(default=256, ge=8)
    """Tokens of a window."""
    seed: int = Field(default=42, ge=0)
    """Of the order of documents, of a random grouping and of a random router."""

    @model_validator(mode="after")
    def _fits(self) -> DiveParams:
        if len(self.domains) < 2:
            raise ValueError("domains: give at least two named texts.")
        if self.experts > len(self.domains):
            raise ValueError(
                f"experts: {self.experts} experts need as many domains; {len(self.domains)} are named in domains."
            )
        if self.active > self.experts:
            raise ValueError(f"active: {self.active} of {self.experts} experts cannot be chosen.")
        return self


def plan(
    texts: dict[str, DomainText], model: PreTrainedModel, params: DiveParams, progress: Progress | None = None
) -> Layers:
    """Plan every FFN; the affinity of the domains goes into ``provenance["affinity"]``.

    Args:
        texts: windows of each domain, in order (:func:`moedge.convert.domains.read`).
        model: the dense parent; it is not changed.
        params: those about texts are only recorded.
        progress: called with (windows done, windows in all).

    Raises:
        MoEdgeError: other domains than those of the settings, or a model without GLU FFNs.
    """
    if list(texts) != list(params.domains):
        raise MoEdgeError(f"The windows are of {', '.join(texts)}, the settings of {', '.join(params.domains)}.")
    mined, statistics = mine(texts, model, params, progress=progress)
    pools = [[domains.pooled(layer) for layer in zip(*(statistics[n] for n in g), strict=True)] for g in mined.groups]
    layers = [_experts(block, [pool[block.index] for pool in pools], params) for block in adapters.ffns(model)]
    if params.router == "ridge":
        _route_by_error(texts, model, layers, progress=_after(params, len(texts), progress))
    else:
        generator = np.random.default_rng(params.seed)
        for layer in layers:
            shape = (len(layer.experts), model.config.hidden_size)
            weight = generator.normal(0, model.config.initializer_range, shape).astype(np.float32)
            layer.router = RouterPlan("linear", {"weight": weight})
    return Layers(layers, provenance={"affinity": mined.to_json()})


def mine(
    texts: dict[str, DomainText], model: PreTrainedModel, params: DiveParams, *, progress: Progress | None = None
) -> tuple[Affinity, dict[str, list[Moments]]]:
    """Return the affinity of the domains with their groups, and the activation statistics of every domain and layer.

    Raises:
        MoEdgeError: the layers of the model are on disk.
    """
    from moedge.convert import offload

    if offload.is_offloaded(model):
        raise MoEdgeError(
            "dive measures whole pruned models, and this one is larger than half of the free memory; give it more "
            "memory, or choose another method."
        )
    total = _windows(params, len(texts))
    statistics = {}
    for number, (name, text) in enumerate(texts.items()):
        report = _shifted(progress, number * params.samples, total)
        statistics[name] = domains.moments(model, text.prune, progress=report)
    width = partition.kept_width(model.config.intermediate_size, params.keep)
    plans = [domains.pruned(model, statistics[name], width) for name in texts]
    report = _shifted(progress, len(texts) * params.samples, total)
    matrix, dense = domains.perplexities(model, plans, texts, progress=report)
    linkage: Linkage = params.linkage
    found = domains.affinity(list(texts), matrix, params.experts, method=linkage, dense=dense)
    if params.grouping == "random":
        found = domains.regrouped(found, params.experts, params.seed)
    return found, statistics


def _experts(block: adapters.FFN, pools: list[Moments], params: DiveParams) -> LayerPlan:
    """Return a layer of one expert a pool, without a router."""
    down = block.down.float().cpu().numpy()
    width = partition.kept_width(down.shape[1], params.keep)
    combine: CombineRule = "probability" if params.weights == "all" else "softmax" if params.active > 1 else "unit"
    parts = [partition.flap(down, pool.mean, pool.variance, width) for pool in pools]
    experts = [kept for kept, _ in parts]
    union = np.unique(np.concatenate(experts))
    return LayerPlan(
        shared=np.zeros(0, np.int32),
        experts=experts,
        top_k=params.active,
        combine=combine,
        selection_bias=np.zeros(len(experts), np.float32),
        expert_bias=np.stack([bias for _, bias in parts]),
        report={"common_share": _common(experts), "union_share": six(len(union) / down.shape[1])},
        overlapping=True,
    )


def _common(experts: list[np.ndarray]) -> float:
    """Mean share of its neurons that an expert has in common with another one."""
    pairs = [len(np.intersect1d(a, b)) / len(a) for i, a in enumerate(experts) for j, b in enumerate(experts) if i != j]
    return six(float(np.mean(pairs)))


# --- router ---------------------------------------------------------------------------------------------------------


def _route_by_error(
    texts: dict[str, DomainText], model: PreTrainedModel, layers: list[LayerPlan], *, progress: Progress | None
) -> None:
    """Give every layer a linear router fitted on the domains' windows: scores are minus the root of an expert's error.

    The error is ``|F(x) - E_e(x) - bias_e|^2``, what the dropped neurons contribute beyond their mean. The strength of
    the ridge is chosen on held-out tokens (:class:`moedge.convert.closed_form.RouterFit`).
    """
    from moedge.convert import streaming
    from moedge.convert.closed_form import RouterFit

    windows = np.concatenate([text.prune for text in texts.values()])
    for tokens in streaming.walk(model, windows, progress=progress):
        layer = layers[tokens.block.index]
        errors, whole = _errors(tokens, layer)
        fit = RouterFit(tokens.x, tokens.weight, tokens.held)
        gains = errors.amax(dim=1, keepdim=True) - errors
        scores = fit.fit(-errors.sqrt(), gains, layer.top_k)
        tensors = {"weight": scores.weight.cpu().numpy(), "bias": scores.bias.cpu().numpy()}
        layer.router = RouterPlan("linear", tensors, {"bias": True})
        layer.report |= _routing_report(tokens, errors, whole, scores(tokens.x))
        layer.report |= {"ridge": scores.ridge, "held_out_gain_share": six(scores.held_out_share)}


def _errors(tokens: LayerTokens, layer: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each expert's squared error [q, E] and the dense output's squared norm [q], float32."""
    import torch

    down = tokens.block.down.float().T
    assert layer.expert_bias is not None
    bias = torch.from_numpy(layer.expert_bias).to(down.device)
    everything = np.arange(len(down))
    dropped = [torch.from_numpy(np.setdiff1d(everything, kept)).to(down.device) for kept in layer.experts]
    errors = down.new_empty(tokens.count, len(dropped))
    whole = down.new_empty(tokens.count)
    for part in tokens.parts():
        h = tokens.hidden(part)
        whole[part] = (h @ down).square().sum(dim=1)
        for e, neurons in enumerate(dropped):
            errors[part, e] = (h[:, neurons] @ down[neurons] - bias[e]).square().sum(dim=1)
    return errors, whole


def _routing_report(
    tokens: LayerTokens, errors: torch.Tensor, whole: torch.Tensor, scores: torch.Tensor
) -> dict[str, Any]:
    """Return what one expert a token misses, weighted and relative to the dense output, by who chooses it."""
    import torch

    weight = tokens.weight.double()
    scale = float((weight * whole.double()).sum())

    def share(missed: torch.Tensor) -> float:
        return six(float((weight * missed.double()).sum()) / scale)

    chosen = scores.argmax(dim=1)
    load = torch.bincount(chosen, minlength=scores.shape[1]).double() / len(chosen)
    return {
        "error_router": share(errors.gather(1, chosen[:, None])[:, 0]),
        "error_best": share(errors.amin(dim=1)),
        "error_any": share(errors.mean(dim=1)),
        "error_one_for_all": min(share(errors[:, e]) for e in range(errors.shape[1])),
        "load": [six(float(value)) for value in load],
    }


# --- progress -------------------------------------------------------------------------------------------------------


def _windows(params: DiveParams, count: int) -> int:
    """Windows that the whole conversion runs: to prune, to measure, and once more for a fitted router."""
    return count * (params.samples * (2 if params.router == "ridge" else 1) + params.score_samples * (1 + count))


def _shifted(progress: Progress | None, first: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(first + done, total)


def _after(params: DiveParams, count: int, progress: Progress | None) -> Progress | None:
    """Progress of the walk for the router, in layers, as windows."""
    if progress is None:
        return None
    total, here = _windows(params, count), count * params.samples
    return lambda done, layers: progress(total - here + here * done // layers, total)
