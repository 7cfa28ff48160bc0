"""Experts from the weights alone: LLaMA-MoE v1 and MoEfication (docs/methods.md 5.2, 5.3).

Neither has shared experts. D neurons, H hidden, E experts, k active.

LLaMA-MoE (arXiv 2406.16554) splits the neurons at random or by balanced K-means on the L2-normalised up rows, and puts
an untrained gate in front: it is the start of a continued pre-training on 200B tokens, not a training-free method.

MoEfication (arXiv 2110.01786) splits by balanced K-means on the L2-normalised gate rows (W_in of its ReLU FFNs; the
gate decides here what fires) and trains a small router for each layer on recorded activations. G-MoEfication adds the
mean activation of the experts that are left out, for activations that are not zero most of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge._progress import reported
from moedge.convert import adapters, partition
from moedge.convert.methods.baselines.routing import control, with_gather
from moedge.convert.methods.cmoe import representative_router
from moedge.convert.methods.layers import Layers
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.streaming import LayerTokens


class _SplitParams(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    experts: int = Field(default=16, ge=2)
    """Experts in all, E."""
    active: int = Field(default=12, ge=1)
    """Experts that run for a token."""
    seed: int = Field(default=0, ge=0)
    """Of everything that is random."""
    max_iters: int = Field(default=20, ge=1)
    """Most rounds of K-means."""
    padding: partition.Padding = "none"
    """``uneven`` allows any width: experts then differ by one neuron."""

    @model_validator(mode="after")
    def _active_exist(self) -> _SplitParams:
        if self.active > self.experts:
            raise ValueError(f"active: {self.active} exceeds experts = {self.experts}.")
        return self


class LlamaMoEParams(_SplitParams):
    """Parameters of LLaMA-MoE; ``max_iters`` bounds the K-means of ``split="clustering"``.

    ``weights``: ``unit`` adds the selected experts as they are, which is what the dense FFN does; ``softmax`` is the
    published rule, softmax over the selected scores times experts/active, meant for training. With an untrained gate it
    weights an expert by about experts/active^2.
    """

    split: Literal["random", "clustering"] = "random"
    """Neurons are dealt at random, or clustered by their up rows."""
    weights: Literal["unit", "softmax"] = "unit"
    """Add the selected experts as they are, or by softmax times experts / active (published; for training)."""


class MoEficationParams(_SplitParams):
    """Parameters of MoEfication.

    ``router``: ``mlp`` is the published one, trained on the calibration tokens; ``centre`` scores by the mean of an
    expert's normalised gate rows, without any data; ``representative`` is CMoE's router on this partition.
    ``compensation``: ``mean`` adds the mean output of the experts left out (G-MoEfication), and the router then
    predicts an expert's deviation from its mean.
    """

    router: Literal["mlp", "centre", "representative"] = "mlp"
    """``mlp`` is trained on the calibration tokens; ``centre`` is the mean gate row; ``representative`` is CMoE's."""
    compensation: Literal["none", "mean"] = "none"
    """Add the mean output of the experts left out (G-MoEfication)."""
    epochs: int = Field(default=30, ge=1)
    """Of the router's training."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Of the router's training."""


def llamamoe_plan(
    data: None, model: PreTrainedModel, params: LlamaMoEParams, progress: Progress | None = None
) -> Layers:
    """Plan every FFN by LLaMA-MoE; no data is read.

    Raises:
        MoEdgeError: a width that the experts do not divide.
    """
    layers = []
    for block in reported(adapters.ffns(model), progress):
        widths = partition.group_widths(block.width, 0, params.experts, params.padding)[1]
        layers.append(_llamamoe_layer(block, widths, params))
    return Layers(layers)


def moefication_plan(
    token_windows: np.ndarray, model: PreTrainedModel, params: MoEficationParams, progress: Progress | None = None
) -> Layers:
    """Plan every FFN by MoEfication.

    Args:
        token_windows: calibration ids, int64 [N, L], N at least 2; the router is chosen on one token in ten.

    Raises:
        MoEdgeError: a width that the experts do not divide, or too few windows.
    """
    from moedge.convert import streaming

    layers = []
    for tokens in streaming.walk(model, token_windows, progress=progress):
        widths = partition.group_widths(tokens.block.width, 0, params.experts, params.padding)[1]
        experts, nearest, report = _clusters(tokens.block.gate, widths, params.seed, params.max_iters)
        mean = _mean_hidden(tokens)
        if params.router == "mlp":
            router, report["router"] = _trained_router(tokens, experts, mean, params)
        elif params.router == "centre":
            router = _centre_router(tokens.block, experts)
        else:
            router = representative_router(tokens.block, nearest, "signed", normalised=False)
        compensation = None
        if params.compensation == "mean":
            down = tokens.block.down.double().cpu().numpy()
            compensation = np.stack([down[:, expert] @ mean[expert] for expert in experts]).astype(np.float32)
        layers.append(_layer(experts, params.active, router, compensation=compensation, report=report))
    return Layers(layers)


def llamamoe(plan: MoEPlan, model: PreTrainedModel, seed: int, split: Literal["random", "clustering"]) -> MoEPlan:
    """LLaMA-MoE at the layout of a plan, whose shared block becomes ordinary experts; untrained gate, unit weights."""
    layers = []
    for (widths, active), block in zip(layouts(plan), adapters.ffns(model), strict=True):
        params = LlamaMoEParams(experts=len(widths), active=active, split=split, seed=seed)
        layers.append(_llamamoe_layer(block, widths, params))
    return control(plan, f"LLaMA-MoE {split}", with_gather(plan, layers), seed=seed)


def moefication(plan: MoEPlan, model: PreTrainedModel, seed: int) -> MoEPlan:
    """MoEfication's clusters at the layout of a plan, with the centre router: a control reads no tokens to train on."""
    layers = []
    for (widths, active), block in zip(layouts(plan), adapters.ffns(model), strict=True):
        experts, _, report = _clusters(block.gate, widths, seed, MoEficationParams().max_iters)
        layers.append(_layer(experts, active, _centre_router(block, experts), report=report))
    return control(plan, "MoEfication, centre router", with_gather(plan, layers), seed=seed)


def layouts(plan: MoEPlan) -> list[tuple[list[int], int]]:
    """Return (expert widths, active experts) of each layer when the shared block is cut into experts like the others.

    Experts are as wide as the plan's on average (a layer without experts takes those of the first layer that has
    some), and as many run as come nearest to the layer's active width.
    """
    width = int(plan.model["intermediate_size"])
    first = next(layer for layer in plan.layers if layer.experts)
    found = []
    for layer in plan.layers:
        experts = layer.experts or first.experts
        count = round(width * len(experts) / sum(map(len, experts)))
        widths = partition.group_widths(width, 0, count, "uneven")[1]
        found.append((widths, min(max(round(layer.active_width * count / width), 1), count)))
    return found


def _llamamoe_layer(block: adapters.FFN, widths: list[int], params: LlamaMoEParams) -> LayerPlan:
    import torch

    generator = np.random.default_rng([params.seed, block.index])
    report: dict[str, Any] = {}
    if params.split == "random":
        neurons = generator.permutation(block.width).astype(np.int32)
        experts = [np.sort(part) for part in np.split(neurons, np.cumsum(widths)[:-1])]
    else:
        experts, _, report = _clusters(block.up, widths, params.seed, params.max_iters, block.index)
    # The gate of the released code, Linear - tanh - Linear without biases, at its initialisation.
    noise = torch.Generator().manual_seed(int(generator.integers(1 << 62)))
    sizes = {"first": (len(widths), block.gate.shape[1]), "second": (len(widths), len(widths))}
    gate = {
        name: ((torch.rand(size, generator=noise) * 2 - 1) / size[1] ** 0.5).numpy() for name, size in sizes.items()
    }
    router = RouterPlan("mlp", gate, {"normalise": False})
    layer = _layer(experts, params.active, router, report=report)
    if params.weights == "softmax":
        layer.combine = "softmax"
        layer.down = block.down.float().cpu().numpy() * np.float32(params.experts / params.active)
    return layer


def _layer(experts: list[np.ndarray], active: int, router: RouterPlan, **more: Any) -> LayerPlan:
    balance = np.zeros(len(experts), dtype=np.float32)
    return LayerPlan(np.zeros(0, dtype=np.int32), experts, active, router, selection_bias=balance, **more)


def _clusters(
    rows: torch.Tensor, widths: list[int], seed: int, max_iters: int, index: int = 0
) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any]]:
    """Cluster L2-normalised weight rows [D, H]; return (experts, member nearest to each centre [E], report)."""
    points = rows.double().cpu().numpy()
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    initial = np.random.default_rng([seed, index]).choice(len(points), len(widths), replace=False)
    found = partition.balanced_kmeans(points, initial, widths, max_iters=max_iters)
    experts = [np.flatnonzero(found.labels == e).astype(np.int32) for e in range(len(widths))]
    nearest = partition.representatives(points, found.labels, found.centroids)
    spread = float(np.square(points - found.centroids[found.labels]).sum())
    whole = float(np.square(points - points.mean(0)).sum()) or 1.0  # 0 where all rows are
    report = {"iterations": found.iterations, "converged": found.converged, "inertia_share": round(spread / whole, 6)}
    return experts, nearest, report


def _centre_router(block: adapters.FFN, experts: list[np.ndarray]) -> RouterPlan:
    rows = block.gate.double().cpu().numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centres = np.stack([rows[expert].mean(axis=0) for expert in experts]).astype(np.float32)
    return RouterPlan("linear", {"weight": centres})


def _mean_hidden(tokens: LayerTokens) -> np.ndarray:
    total = sum(tokens.hidden(part).double().sum(dim=0) for part in tokens.parts())
    mean: np.ndarray = (total / tokens.count).cpu().numpy()  # type: ignore[union-attr]
    return mean


def _trained_router(
    tokens: LayerTokens, experts: list[np.ndarray], mean: np.ndarray, params: MoEficationParams
) -> tuple[RouterPlan, dict[str, Any]]:
    """Train the published router: Linear - tanh - Linear on unit inputs, BCE on mass over the batch's largest mass.

    The mass of an expert at a token is the sum of ``|h_i|`` over its neurons (``|h_i - mean_i|`` with compensation).
    First weights: the cluster centres and the identity. Adam, batches of 512; of all epochs the one is kept whose
    choices hold the most mass on one token in ten.
    """
    import torch
    import torch.nn.functional as F

    device = tokens.x.device
    x = F.normalize(tokens.x.float(), dim=1)
    centre = torch.from_numpy(mean).to(device, torch.float32) if params.compensation == "mean" else 0.0
    member = torch.zeros(len(mean), len(experts), device=device)
    for e, expert in enumerate(experts):
        member[torch.from_numpy(expert.astype(np.int64)), e] = 1
    mass = torch.cat([(tokens.hidden(part) - centre).abs() @ member for part in tokens.parts()])
    held = torch.arange(len(x), device=device) % 10 == 9
    x_fit, x_held, mass_fit, mass_held = x[~held], x[held], mass[~held], mass[held]
    best_mass = mass_held.topk(params.active, dim=1).values.sum(dtype=torch.float64)

    first = torch.from_numpy(_centre_router(tokens.block, experts).tensors["weight"]).to(device)
    weights = [first.clone().requires_grad_(), torch.eye(len(experts), device=device).requires_grad_()]

    @torch.no_grad()
    def share() -> float:
        chosen = (torch.tanh(x_held @ weights[0].T) @ weights[1].T).topk(params.active, dim=1).indices
        return float(mass_held.gather(1, chosen).sum(dtype=torch.float64) / best_mass)

    shares, kept = [share()], [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=params.learning_rate)
    generator = torch.Generator().manual_seed(params.seed)
    for _ in range(params.epochs):
        for rows in torch.randperm(len(x_fit), generator=generator).to(device).split(512):
            target = mass_fit[rows] / mass_fit[rows].max().clamp_min(1e-12)
            with torch.enable_grad():
                logits = torch.tanh(x_fit[rows] @ weights[0].T) @ weights[1].T
                loss = F.binary_cross_entropy_with_logits(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shares.append(share())
        if shares[-1] == max(shares):
            kept = [weight.detach().clone() for weight in weights]
    report = {"held_out_mass_of_oracle": [round(shares[0], 6), round(max(shares), 6)]}
    tensors = {name: weight.cpu().numpy() for name, weight in zip(("first", "second"), kept, strict=True)}
    return RouterPlan("mlp", tensors, {"normalise": True}), report
