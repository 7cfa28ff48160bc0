"""One FFN by MoEdge's own method; the package says what the steps are.

q tokens, D neurons, H hidden, E routed experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge.convert import closed_form, energy, partition, processes
from moedge.convert.calibration import LayerStatistics
from moedge.convert.methods import cmoe
from moedge.convert.methods.layout import LayoutParams
from moedge.convert.plan import LayerPlan, RouterPlan
from moedge.convert.rounding import six

if TYPE_CHECKING:
    from moedge.convert.methods.moedge.params import MoEdgeParams
    from moedge.convert.streaming import LayerTokens


@torch.no_grad()
def make_layer(tokens: LayerTokens, params: MoEdgeParams) -> LayerPlan:
    """Convert one FFN."""
    if params.token_weight == "none":
        tokens.weight = torch.ones_like(tokens.weight)
    mean, mean_energy, norms = neuron_energy(tokens)
    shared, experts, loss, report = _partition(tokens, params, mean, mean_energy, norms)
    targets, gains = _expert_targets(tokens, experts, loss, params.router_target)
    weight = tokens.weight if params.router_target != "energy" else tokens.weight.square()
    fit = closed_form.RouterFit(tokens.x, weight, tokens.held)
    scores = fit.fit(targets, gains, params.active)
    if params.calibrate_scores:
        scores = fit.calibrated(scores, targets)
    router = RouterPlan(
        "linear", {"weight": scores.weight.cpu().numpy(), "bias": scores.bias.cpu().numpy()}, {"bias": True}
    )
    report["router"] = {"ridge": scores.ridge, "held_out_share_of_oracle": six(scores.held_out_share)}
    # A bias of zero for load balancing: exported and trainable, like CMoE's.
    balance = np.zeros(len(experts), dtype=np.float32)
    layer = LayerPlan(shared, experts, params.active, router, selection_bias=balance, report=report)
    if params.compensation != "none":
        chosen = closed_form.select(scores(tokens.x), params.active)
        layer.compensation = _compensation(tokens, experts, mean, chosen, params.compensation)
    if params.refit:
        layer = closed_form.refit(tokens, layer)
        layer.report["held_out_error"] = layer.report["refit"]["held_out_error"]["after"]
    else:
        report["held_out_error"] = six(closed_form.relative_error(tokens, layer))
    return layer


def neuron_energy(tokens: LayerTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each neuron's weighted mean h, weighted mean energy, and |down|^2, float32 [D] each."""
    down = tokens.block.down.float()
    mean = torch.zeros(down.shape[1], dtype=torch.float64, device=down.device)
    for part in tokens.parts():
        mean += tokens.weight[part].double() @ tokens.hidden(part).double()
    whole = processes.total(tokens.weight.sum(dtype=torch.float64))
    mean = (processes.total(mean) / whole).float()
    variance = torch.zeros_like(mean, dtype=torch.float64)
    for part in tokens.parts():
        variance += (tokens.weight[part] @ (tokens.hidden(part) - mean).square()).double()
    norms = down.square().sum(dim=0)
    return mean, (processes.total(variance) / whole).float() * norms, norms


class Loss:
    """What is lost of each routed neuron when it is left out: h less what stands in for it.

    That is its mean or, given ``shared``, its least-squares prediction from the shared neurons (what a refit of their
    down projections can make up for).
    """

    def __init__(
        self,
        tokens: LayerTokens,
        neurons: np.ndarray,
        mean: torch.Tensor,
        norms: torch.Tensor,
        shared: np.ndarray | None,
    ) -> None:
        self.tokens, self.device = tokens, mean.device
        self.neurons = torch.from_numpy(neurons.astype(np.int64)).to(self.device)
        self.mean, self.norms = mean[self.neurons], norms[self.neurons]
        self.shared: torch.Tensor | None = None
        if shared is not None and len(shared):
            self.shared = torch.from_numpy(shared.astype(np.int64)).to(self.device)
            self.centre = mean[self.shared]
            moments = closed_form.Moments(len(shared), len(neurons), self.device)
            for part in tokens.parts():
                h = tokens.hidden(part)
                moments.add(h[:, self.shared] - self.centre, h[:, self.neurons] - self.mean, tokens.weight[part])
            self.predict = moments.of_all().solve(1e-3, 0).float()

    def __call__(self, rows: slice) -> torch.Tensor:
        """Return what is lost of h, [n, routed neurons], without the weights of tokens or neurons."""
        h = self.tokens.hidden(rows)
        lost = h[:, self.neurons] - self.mean
        return lost if self.shared is None else lost - (h[:, self.shared] - self.centre) @ self.predict

    def energy(self, rows: slice) -> torch.Tensor:
        """Return the weighted energy of that, [n, routed neurons]."""
        return self(rows).square_().mul_(self.norms).mul_(self.tokens.weight[rows][:, None])


def _partition(
    tokens: LayerTokens, params: MoEdgeParams, mean: torch.Tensor, mean_energy: torch.Tensor, norms: torch.Tensor
) -> tuple[np.ndarray, list[np.ndarray], Loss, dict[str, Any]]:
    """Return (shared neurons, experts, the routed neurons' loss, report); ``loss`` has them in ascending order."""
    shared_width, widths = partition.group_widths(len(mean), params.shared, params.experts, params.padding)
    if params.partition == "cmoe":
        layout = params.model_dump(include=set(LayoutParams.model_fields))
        found = cmoe.layer_plan(_marks(tokens, mean), tokens.block, cmoe.CMoEParams(**layout))
        shared = found.shared
    else:
        order = mean_energy.argsort(descending=True, stable=True).cpu().numpy()
        shared = np.sort(order[:shared_width]).astype(np.int32)
    whole = float(mean_energy.sum()) or 1.0  # 0 where down_proj is: a layer that was added to do nothing
    report: dict[str, Any] = {"energy_shared": six(float(mean_energy[shared].sum()) / whole)}
    rest = np.setdiff1d(np.arange(len(mean), dtype=np.int32), shared)
    loss = Loss(tokens, rest, mean, norms, shared if params.loss == "shared" else None)
    if params.partition == "cmoe":
        return shared, found.experts, loss, report
    rows = tokens.every(max(1, int(processes.added(tokens.count)) // params.partition_tokens))
    own = loss.energy(rows)
    energies = processes.joined(own)
    labels = energy.by_correlation(energies, widths)
    if params.partition == "energy":
        ascent = energy.ascend(energies, labels, widths, params.active, params.iterations)
        labels = ascent.labels
        total = float(energies.sum(dtype=torch.float64)) or 1.0
        report["captured"] = [six(value / total) for value in ascent.objective[::2]]
        if params.router_rounds:
            labels, report["router_rounds"] = _predictable(tokens, rows, own, labels, widths, params)
    return shared, [rest[labels == e] for e in range(len(widths))], loss, report


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
    total = processes.added(float(energies[held].sum(dtype=torch.float64))) or 1.0
    fitted = processes.joined(energies[~held])
    best, shares = labels, []
    for _ in range(params.router_rounds + 1):
        gains = energy.by_expert(energies, labels, len(widths))
        scores = fit.fit(gains.sqrt(), gains, params.active)
        mask = closed_form.select(scores(fit.x), params.active)
        shares.append(six(processes.added(float((mask * gains)[held].sum(dtype=torch.float64))) / total))
        if len(shares) > 1 and shares[-1] <= max(shares[:-1]):
            break
        best = labels
        labels, _ = energy.reassign(fitted, processes.joined(mask[~held]), widths)
    return best, shares


def _marks(tokens: LayerTokens, mean: torch.Tensor, k_a: int = 10) -> LayerStatistics:
    """Return CMoE's statistics of these tokens."""
    top = [tokens.hidden(part).abs().topk(k_a, dim=1).indices.sort(dim=1).values for part in tokens.parts()]
    marks = processes.joined(torch.cat(top)).cpu().numpy().astype(np.int32)
    return LayerStatistics(marks, mean.cpu().numpy(), np.zeros(len(mean), dtype=np.float32))


def _expert_targets(
    tokens: LayerTokens, experts: list[np.ndarray], loss: Loss, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (regression targets [q, E] of a kind, weighted squares [q, E]: what selecting an expert is worth)."""
    down, neurons = tokens.block.down.float(), loss.neurons.cpu().numpy()
    members = [torch.from_numpy(np.searchsorted(neurons, expert)).to(loss.device) for expert in experts]
    labels = np.full(len(neurons), len(experts), dtype=np.int32)  # the last group: of no expert
    for e, expert in enumerate(experts):
        labels[np.searchsorted(neurons, expert)] = e
    worth = torch.empty(tokens.count, len(experts), device=loss.device)
    for part in tokens.parts():
        lost = loss(part)
        if kind != "norm":
            worth[part] = energy.by_expert(lost.square_().mul_(loss.norms), labels, len(experts) + 1)[:, :-1]
            continue
        for e, own in enumerate(members):
            worth[part, e] = (lost[:, own] @ down[:, loss.neurons[own]].T).square().sum(dim=1)
    return worth if kind == "energy" else worth.sqrt(), worth * tokens.weight[:, None]


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
        sums, total = processes.total(sums), processes.total(weights.sum(dim=0, dtype=torch.float64))[:, None]
        hidden = torch.where(total > 0, sums / total.clamp_min(1e-30), mean.double()).float()
    rows = []
    for e, expert in enumerate(experts):
        neurons = torch.from_numpy(expert.astype(np.int64)).to(device)
        rows.append(down[:, neurons] @ hidden[e, neurons])
    return torch.stack(rows).cpu().numpy()
