"""One FFN by MoEdge's own method; :mod:`moedge.convert.methods.moedge` says what the steps are.

q tokens, D neurons, H hidden, E routed experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge.convert import closed_form, energy, partition
from moedge.convert.calibration import LayerStatistics
from moedge.convert.methods import cmoe
from moedge.convert.plan import LayerPlan, RouterPlan

if TYPE_CHECKING:
    from moedge.convert.methods.moedge import MoEdgeParams
    from moedge.convert.streaming import LayerTokens


@torch.no_grad()
def make_layer(tokens: LayerTokens, params: MoEdgeParams) -> LayerPlan:
    """Convert one FFN."""
    if params.token_weight == "none":
        tokens.weight = torch.ones_like(tokens.weight)
    mean, mean_energy, norms = neuron_energy(tokens)
    shared, experts, report = _partition(tokens, params, mean, mean_energy, norms)
    targets, gains = _expert_targets(tokens, experts, mean, norms, params.router_target)
    weight = tokens.weight if params.router_target != "energy" else tokens.weight.square()
    fit = closed_form.RouterFit(tokens.x, weight, tokens.held)
    scores = fit.fit(targets, gains, params.active)
    if params.calibrate_scores:
        scores = fit.calibrated(scores, targets)
    router = RouterPlan(
        "linear", {"weight": scores.weight.cpu().numpy(), "bias": scores.bias.cpu().numpy()}, {"bias": True}
    )
    report["router"] = {"ridge": scores.ridge, "held_out_share_of_oracle": _round(scores.held_out_share)}
    layer = LayerPlan(shared, experts, params.active, router, report=report)
    if params.compensation != "none":
        chosen = closed_form.select(scores(tokens.x), params.active)
        layer.compensation = _compensation(tokens, experts, mean, chosen, params.compensation)
    report["held_out_error"] = {"before_refit": _round(closed_form.relative_error(tokens, layer))}
    if params.refit:
        layer = closed_form.refit(tokens, layer)
        layer.report["held_out_error"]["after_refit"] = _round(closed_form.relative_error(tokens, layer))
    return layer


def neuron_energy(tokens: LayerTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each neuron's weighted mean h, weighted mean energy, and |down|^2, float32 [D] each."""
    down = tokens.block.down.float()
    mean = torch.zeros(down.shape[1], dtype=torch.float64, device=down.device)
    for part in tokens.parts():
        mean += tokens.weight[part].double() @ tokens.hidden(part).double()
    mean = (mean / tokens.weight.sum(dtype=torch.float64)).float()
    variance = torch.zeros_like(mean, dtype=torch.float64)
    for part in tokens.parts():
        variance += (tokens.weight[part] @ (tokens.hidden(part) - mean).square()).double()
    norms = down.square().sum(dim=0)
    return mean, (variance / tokens.weight.sum(dtype=torch.float64)).float() * norms, norms


def _partition(
    tokens: LayerTokens, params: MoEdgeParams, mean: torch.Tensor, mean_energy: torch.Tensor, norms: torch.Tensor
) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """Return (shared neurons, experts, report)."""
    width = len(mean)
    if params.partition == "cmoe":
        layout = (params.shared, params.active, params.experts)
        found = cmoe.layer_plan(_marks(tokens, mean), tokens.block, *layout, "l2", "signed", 20, params.padding)
        return found.shared, found.experts, {}
    shared_width, widths = partition.group_widths(width, params.shared, params.experts, params.padding)
    order = mean_energy.argsort(descending=True, stable=True).cpu().numpy()
    shared, rest = np.sort(order[:shared_width]), np.sort(order[shared_width:])

    rows = slice(0, None, max(1, tokens.count // params.partition_tokens))
    kept = torch.from_numpy(rest).to(mean.device)
    energies = (tokens.hidden(rows)[:, kept] - mean[kept]).square_().mul_(norms[kept])
    energies.mul_(tokens.weight[rows][:, None])
    labels = energy.by_correlation(energies, widths)
    report: dict[str, Any] = {"energy_shared": _round(float(mean_energy[shared].sum() / mean_energy.sum()))}
    if params.partition == "energy":
        ascent = energy.ascend(energies, labels, widths, params.active, params.iterations)
        labels = ascent.labels
        total = float(energies.sum(dtype=torch.float64)) or 1.0
        report["captured"] = [_round(value / total) for value in ascent.objective[::2]]
        if params.router_rounds:
            labels, report["router_rounds"] = _predictable(tokens, rows, energies, labels, widths, params)
    experts = [rest[labels == e].astype(np.int32) for e in range(len(widths))]
    return shared.astype(np.int32), experts, report


def _predictable(
    tokens: LayerTokens,
    rows: slice,
    energies: torch.Tensor,
    labels: np.ndarray,
    widths: list[int],
    params: MoEdgeParams,
) -> tuple[np.ndarray, list[float]]:
    """Reassign neurons under the selections of a router fitted to the partition; return (labels, captured shares).

    The shares are of the held-out energy; a round that lowers it ends the search and is not kept.
    """
    held = tokens.held[rows]
    fit = closed_form.RouterFit(tokens.x[rows], torch.ones_like(tokens.weight[rows]), held)
    total = float(energies[held].sum(dtype=torch.float64)) or 1.0
    best, shares = labels, []
    for _ in range(params.router_rounds + 1):
        gains = energy.by_expert(energies, labels, len(widths))
        scores = fit.fit(gains.sqrt(), gains, params.active)
        mask = closed_form.select(scores(fit.x), params.active)
        shares.append(_round(float((mask * gains)[held].sum(dtype=torch.float64)) / total))
        if len(shares) > 1 and shares[-1] <= max(shares[:-1]):
            break
        best = labels
        labels, _ = energy.reassign(energies[~held], mask[~held], widths)
    return best, shares


def _marks(tokens: LayerTokens, mean: torch.Tensor, k_a: int = 10) -> LayerStatistics:
    """Return CMoE's statistics of these tokens."""
    top = [tokens.hidden(part).abs().topk(k_a, dim=1).indices.sort(dim=1).values for part in tokens.parts()]
    marks = torch.cat(top).cpu().numpy().astype(np.int32)
    return LayerStatistics(marks, mean.cpu().numpy(), np.zeros(len(mean), dtype=np.float32))


def _expert_targets(
    tokens: LayerTokens, experts: list[np.ndarray], mean: torch.Tensor, norms: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (regression targets [q, E] of a kind, weighted energies [q, E])."""
    device, down = mean.device, tokens.block.down.float()
    energies = torch.empty(tokens.count, len(experts), device=device)
    exact = torch.empty_like(energies) if kind == "norm" else None
    indices = [torch.from_numpy(expert.astype(np.int64)).to(device) for expert in experts]
    for part in tokens.parts():
        centred = tokens.hidden(part) - mean
        for e, neurons in enumerate(indices):
            own = centred[:, neurons]
            energies[part, e] = own.square() @ norms[neurons]
            if exact is not None:
                exact[part, e] = (own @ down[:, neurons].T).norm(dim=1)
    if exact is not None:
        return exact, exact.square() * tokens.weight[:, None]
    return energies.sqrt() if kind == "root_energy" else energies, energies * tokens.weight[:, None]


def _compensation(
    tokens: LayerTokens, experts: list[np.ndarray], mean: torch.Tensor, chosen: torch.Tensor, kind: str
) -> np.ndarray:
    """Return the mean output of each expert, float32 [E, H]: over all tokens, or over those that leave it out.

    An expert that no token leaves out has the mean over all tokens.
    """
    down, device = tokens.block.down.float(), mean.device
    hidden = mean.expand(len(experts), -1)
    if kind == "unselected":
        weights = (1 - chosen) * tokens.weight[:, None]
        sums = torch.zeros(len(experts), len(mean), dtype=torch.float64, device=device)
        for part in tokens.parts():
            sums += (weights[part].T @ tokens.hidden(part)).double()
        total = weights.sum(dim=0, dtype=torch.float64)[:, None]
        hidden = torch.where(total > 0, sums / total.clamp_min(1e-30), mean.double()).float()
    rows = []
    for e, expert in enumerate(experts):
        neurons = torch.from_numpy(expert.astype(np.int64)).to(device)
        rows.append(down[:, neurons] @ hidden[e, neurons])
    return torch.stack(rows).cpu().numpy()


def _round(value: float) -> float:
    return float(f"{value:.6g}")
