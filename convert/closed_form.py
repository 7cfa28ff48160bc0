"""Least-squares fits on one layer's tokens: a linear router, and new down projections under the actual routing.

Both are ridge regressions solved by their normal equations. The strength of the ridge is chosen on tokens that the fit
has not seen (``LayerTokens.held``); the solution is then made from all tokens. q tokens, H hidden, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import moedge.convert.ops  # noqa: F401  registers torch.ops.moedge
from moedge.convert import processes, routers
from moedge.convert.plan import LayerPlan
from moedge.convert.rounding import six
from moedge.convert.streaming import LayerTokens

ROUTER_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
REFIT_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges to choose from, in units of the mean second moment of the features."""
_FREE = 1e-4
"""Ridge of intercepts, whose feature is 0 or 1: next to none, but an expert that is never left out stays solvable."""


_TILE = 192
"""Least rows of a block of a second moment: narrower products are slow."""


class Moments:
    """Weighted second moments of features z [n] and targets y [m] over tokens, float64 accumulators.

    The products of one block of rows have the features' dtype.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self.square = 0.0
        self.total = 0.0

    def add(self, z: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *, gram: bool = True) -> None:
        """Add rows z [T, n], y [T, m] of the same dtype with weights [T]; ``gram=False`` leaves z'z as it is."""
        weighted = z * weight.to(z)[:, None]
        if gram:
            self._add_gram(weighted, z)
        self.cross += (weighted.T @ y).double()
        self.square += float((y.double().square().sum(dim=1) * weight.double()).sum())
        self.total += float(weight.double().sum())

    def _add_gram(self, weighted: torch.Tensor, z: torch.Tensor) -> None:
        """Add weighted'z, which is symmetric: blocks on and below the diagonal are computed, the others copied."""
        n = z.shape[1]
        step = max(_TILE, -(-n // 8))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            block = (weighted[:, rows].T @ z[:, : rows.stop]).double()
            self.gram[rows, : rows.stop] += block
            self.gram[:start, rows] += block[:, :start].T

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.cross.shape[0], self.cross.shape[1], self.gram.device)
        for name in ("gram", "cross", "square", "total"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def of_all(self) -> Moments:
        """Make these the moments over the tokens of all processes; return them."""
        self.gram, self.cross = processes.total(self.gram), processes.total(self.cross)
        self.square, self.total = processes.added(self.square), processes.added(self.total)
        return self

    def solve(self, ridge: float, intercepts: int) -> torch.Tensor:
        """Return B [n, m] that minimises the weighted sum of |y - B^T z|^2 plus the ridge on B.

        Args:
            ridge: in units of the mean diagonal of the features' moments; the last ``intercepts`` features are
                intercepts and have next to none.
        """
        diagonal = self.gram.diagonal()
        slopes = len(diagonal) - intercepts
        penalty = torch.full_like(diagonal, _FREE * self.total)
        penalty[:slopes] = ridge * diagonal[:slopes].mean().clamp_min(1e-30)
        regular = self.gram.clone()
        regular.diagonal().add_(penalty)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(regular))

    def loss(self, solution: torch.Tensor) -> float:
        """Return the weighted sum of |y - B^T z|^2."""
        return self.square - float((solution * (2 * self.cross - self.gram @ solution)).sum())


# --- router ---------------------------------------------------------------------------------------------------------


def select(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return 1 for the ``top_k`` highest scores of each row and 0 elsewhere, float32 [q, E]."""
    return torch.zeros_like(scores, dtype=torch.float32).scatter_(1, scores.topk(top_k, dim=1).indices, 1.0)


@dataclass
class LinearScores:
    """Scores ``x @ weight.T + bias``; weight float32 [E, H], bias float32 [E]."""

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float
    held_out_share: float
    """Gain of the selected experts over that of the best ``top_k`` on held-out tokens."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [T, E] for x [T, H]."""
        return F.linear(x.float(), self.weight, self.bias)


class RouterFit:
    """Ridge regressions from x to targets of each expert that share one set of tokens; all sums in float64."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, held: torch.Tensor) -> None:
        """Keep x [q, H], token weights [q] and the mask of held-out tokens [q]."""
        self.x, self.weight, self.held = x, weight, held
        self._grams: dict[bool, torch.Tensor] = {}  # second moments of x, the same for all targets

    def fit(
        self, targets: torch.Tensor, gains: torch.Tensor, top_k: int, ridges: tuple[float, ...] = ROUTER_RIDGES
    ) -> LinearScores:
        """Regress targets [q, E] on x; choose the ridge whose ``top_k`` selection gains most on held-out tokens.

        Args:
            gains: what selecting an expert is worth, [q, E] float32, zero or more.
        """
        fitted, held = self._moments(targets, held=False), self._moments(targets, held=True)
        x, gains = self.x[self.held], gains[self.held]
        best = processes.added(float((select(gains, top_k) * gains).sum(dtype=torch.float64))) or 1.0
        shares = {}
        for ridge in ridges:
            scores = self._scores(fitted.solve(ridge, 1))
            gained = float((select(scores(x), top_k) * gains).sum(dtype=torch.float64))
            shares[ridge] = processes.added(gained) / best
        ridge = max(ridges, key=lambda r: shares[r])
        result = self._scores((fitted + held).solve(ridge, 1))
        return replace(result, ridge=ridge, held_out_share=shares[ridge])

    def calibrated(self, scores: LinearScores, targets: torch.Tensor) -> LinearScores:
        """Rescale each expert's score to regress its target with slope 1 and no offset on held-out tokens."""
        score, target = scores(self.x[self.held]).double(), targets[self.held].double()
        w = self.weight[self.held].double()[:, None] / processes.total(self.weight[self.held].double().sum())
        score_mean, target_mean = processes.total((w * score).sum(0)), processes.total((w * target).sum(0))
        covariance = processes.total((w * (score - score_mean) * (target - target_mean)).sum(0))
        variance = processes.total((w * (score - score_mean).square()).sum(0))
        slope = (covariance / variance.clamp_min(1e-30)).clamp(0.1, 10)
        bias = slope * scores.bias.double() + target_mean - slope * score_mean
        return replace(scores, weight=(scores.weight.double() * slope[:, None]).float(), bias=bias.float())

    def _moments(self, targets: torch.Tensor, *, held: bool) -> Moments:
        moments = Moments(self.x.shape[1] + 1, targets.shape[1], self.x.device)
        known = self._grams.get(held)
        for rows in torch.nonzero(self.held == held).squeeze(1).split(4096):
            z = F.pad(self.x[rows].double(), (0, 1), value=1.0)
            moments.add(z, targets[rows].double(), self.weight[rows], gram=known is None)
        whole = moments.of_all()
        whole.gram = self._grams.setdefault(held, whole.gram)
        return whole

    @staticmethod
    def _scores(solution: torch.Tensor) -> LinearScores:
        return LinearScores(solution[:-1].T.float().contiguous(), solution[-1].float(), 0.0, 0.0)


# --- down projections -----------------------------------------------------------------------------------------------


def gates(x: torch.Tensor, layer: LayerPlan, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight of each expert, 1 where it is left out), float32 [T, E] each, as the converted FFN routes x."""
    if layer.router is None:
        return x.new_zeros(len(x), 0, dtype=torch.float32), x.new_zeros(len(x), 0, dtype=torch.float32)
    router = routers.from_plan(layer.router, layer.num_experts, x.shape[1], activation).to(x.device)
    with torch.no_grad():
        scores = router(x.float())
    bias, scale = (
        None if value is None else torch.from_numpy(value).to(x.device) for value in (layer.selection_bias, layer.scale)
    )
    indices, weights = torch.ops.moedge.route(scores, bias, scale, layer.top_k, layer.combine)
    zeros = torch.zeros_like(scores)
    return zeros.scatter(1, indices.long(), weights), (zeros + 1).scatter(1, indices.long(), 0.0)


def _residuals(
    tokens: LayerTokens, layer: LayerPlan
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (rows, features, what the converted FFN still misses, target), block by block.

    Features [T, n]: h of the kept neurons, times the weight of their expert, then the intercepts: an indicator of each
    expert left out if the layer compensates, else a constant.
    """
    down, neurons, intercepts = _solution(tokens, layer)
    kept = torch.from_numpy(neurons).to(tokens.x.device)
    expert = np.repeat(np.arange(layer.num_experts), [len(e) for e in layer.experts])
    owner = torch.from_numpy(expert).to(tokens.x.device)
    bias = 0.0 if layer.output_bias is None else torch.from_numpy(layer.output_bias).to(tokens.x.device)
    for part in tokens.parts():
        weights, omitted = gates(tokens.x[part], layer, tokens.block.hidden_act)
        z = tokens.hidden(part)[:, kept]
        z[:, len(layer.shared) :] *= weights[:, owner]
        z = torch.cat([z, omitted if layer.compensation is not None else torch.ones_like(z[:, :1])], dim=1)
        target = tokens.target(part)
        current = z[:, : len(neurons)] @ down + (z[:, len(neurons) :] @ intercepts if intercepts is not None else 0)
        if layer.compensation is not None:
            current = current + bias
        yield part, z, target - current, target


def _solution(tokens: LayerTokens, layer: LayerPlan) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
    """Return (down rows of the kept neurons [n, H], the neurons, intercepts [1 or E, H])."""
    device = tokens.x.device
    neurons = np.concatenate([layer.shared, *layer.experts]).astype(np.int64)
    down = tokens.block.down.float() if layer.down is None else torch.from_numpy(layer.down).to(device)
    if layer.compensation is not None:
        intercepts = torch.from_numpy(layer.compensation).to(device)
    elif layer.output_bias is not None:
        intercepts = torch.from_numpy(layer.output_bias).to(device)[None]
    else:
        intercepts = None
    return down.T[torch.from_numpy(neurons).to(device)], neurons, intercepts


@torch.no_grad()
def relative_error(tokens: LayerTokens, layer: LayerPlan) -> float:
    """Return the weighted |target - FFN|^2 / |target|^2 of a layer plan on the held-out tokens."""
    missed = wanted = 0.0
    for part, _, residual, target in _residuals(tokens, layer):
        weight = (tokens.weight * tokens.held)[part].double()
        missed += float((weight * residual.double().square().sum(dim=1)).sum())
        wanted += float((weight * target.double().square().sum(dim=1)).sum())
    missed, wanted = processes.added(missed), processes.added(wanted)
    return missed / wanted if wanted else 0.0


@torch.no_grad()
def refit(tokens: LayerTokens, layer: LayerPlan) -> LayerPlan:
    """Fit down projections and biases to the tokens' target under the layer's own routing.

    The unknown is the change from the present weights, so the ridge anchors to them. The strength, or no change at all,
    is what misses least on the held-out tokens; weaker ones are tried for as long as they miss less. Neurons that the
    plan prunes keep their columns.

    ``report["refit"]`` holds the ridge, or None, and ``held_out_error``: the :func:`relative_error` before, and after a
    fit to the other tokens alone.
    """
    down, neurons, intercepts = _solution(tokens, layer)
    free = layer.num_experts if layer.compensation is not None else 1
    sums = [Moments(len(neurons) + free, down.shape[1], tokens.x.device) for _ in range(2)]
    wanted = 0.0
    for part, z, residual, target in _residuals(tokens, layer):
        held = tokens.held[part]
        wanted += float((tokens.weight[part][held].double() * target[held].double().square().sum(dim=1)).sum())
        for mask, moments in ((~held, sums[0]), (held, sums[1])):
            if mask.any():
                moments.add(z[mask], residual[mask], tokens.weight[part][mask])
    fitted, held_out = (moments.of_all() for moments in sums)
    wanted = processes.added(wanted)
    ridge, lost = _best_ridge(fitted, held_out, free)
    before, after = (six(value / (wanted or 1.0)) for value in (held_out.square, lost))
    report: dict[str, Any] = {"ridge": ridge, "held_out_error": {"before": before, "after": after}}
    if lost >= held_out.square:
        report = {"ridge": None, "held_out_error": {"before": before, "after": before}}
        return replace(layer, report={**layer.report, "refit": report})
    change = (fitted + held_out).solve(ridge, free).float()
    whole = tokens.block.down.float().clone() if layer.down is None else torch.from_numpy(layer.down).clone()
    whole[:, torch.from_numpy(neurons).to(whole.device)] += change[: len(neurons)].T.to(whole.device)
    moved = change[len(neurons) :] if intercepts is None else change[len(neurons) :] + intercepts
    result = replace(layer, down=whole.cpu().numpy(), report={**layer.report, "refit": report})
    if layer.compensation is not None:
        result.compensation = moved.cpu().numpy()
    else:
        result.output_bias = moved[0].cpu().numpy()
    return result


def _best_ridge(fitted: Moments, held_out: Moments, free: int) -> tuple[float, float]:
    """Return (ridge, its held-out loss): the first from the strongest on whose weaker neighbour misses more.

    What is missed falls and then rises with the ridge, and each one costs a factorisation.
    """
    best = (max(REFIT_RIDGES), float("inf"))
    for ridge in sorted(REFIT_RIDGES, reverse=True):
        lost = held_out.loss(fitted.solve(ridge, free))
        if lost > best[1]:
            break
        best = (ridge, lost)
    return best
