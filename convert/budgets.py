"""Spread one budget of active neurons over the layers by what each layer's FFN costs the model when it skips some.

The cost is an estimate of KL(dense || pruned), second order in the change of an FFN's output: ``KL = 1/2 E[(g . d)^2]``
with d the change and g the gradient of the log-probability of tokens drawn from the dense model's own predictions
(Fisher information; Theis et al., arXiv 1801.05787, eq. 4, use it for single channels). Two forward passes and one
backward pass over a few windows, one layer at a time (:mod:`moedge.convert.backward`), give the whole curve "cost by
kept neurons" of every layer.

T tokens of a window, D neurons, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge.convert import adapters, allocation, backward, offload, processes, streaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_WAYS = 257
"""Counts of active experts that a layer may choose from, evenly spaced, beside the mean one."""


@torch.no_grad()
def loss_curves(model: PreTrainedModel, token_windows: np.ndarray) -> list[np.ndarray]:
    """Estimate, layer by layer, the KL of the model's predictions when this FFN alone keeps its n best neurons.

    Best is FLAP's order (variance times ``|down_i|^2``); the others are replaced by their mean over the windows. The
    estimate takes tokens one by one: it leaves out what errors at two tokens of a window do together.

    Args:
        token_windows: int64 [N, L].

    Returns:
        float64 [D + 1] for each layer, nats a token; entry n belongs to n kept neurons, the last one is 0.
    """
    tokens = token_windows.size
    orders, means = _by_importance(model, token_windows)
    blocks = adapters.ffns(model)
    curves = [
        torch.zeros(block.width + 1, dtype=torch.float64, device=mean.device)
        for block, mean in zip(blocks, means, strict=True)
    ]
    inputs: list[torch.Tensor] = []

    @contextmanager
    def watch(layer: int, seen: dict[str, torch.Tensor]) -> Iterator[None]:
        def see(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs[:] = [args[0].detach().flatten(0, -2)]
            seen["y"] = output

        with streaming.hooked(*(block.module.register_forward_hook(see) for block in blocks[layer : layer + 1])):
            yield

    for step in backward.steps(model, token_windows, watch):
        if step.layer == len(blocks):
            continue
        block, gradient = blocks[step.layer], step.gradients["y"]
        h = block.hidden(inputs[0]) - means[step.layer].float()
        change = h * (gradient.flatten(0, -2).float() @ block.down.float())
        # Entry n of the cumulative sum: the n worst neurons are left out.
        together = change[:, orders[step.layer]].cumsum(dim=1)
        curves[step.layer][1:] += together.square().sum(dim=0).double() / 2
    return [(processes.total(curve) / tokens).flip(0).cpu().numpy() for curve in curves]


@torch.no_grad()
def _by_importance(model: PreTrainedModel, token_windows: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return by layer FLAP's order of the neurons, the least important first, and their means; both [D]."""
    runner = streaming.Runner(model, token_windows[processes.span(len(token_windows))])
    states, tokens = runner.embed(), token_windows.size
    orders, means = [], []
    for block in adapters.ffns(model):
        with offload.loaded(runner.layers[block.index]):
            x, states = runner.run(block, states)
            total = torch.zeros(2, block.width, dtype=torch.float64, device=x.device)
            for window in x.unflatten(0, states.shape[:2]):
                h = block.hidden(window)
                total += torch.stack([h.sum(dim=0), h.square().sum(dim=0)]).double()
            total = processes.total(total)
            mean = total[0] / tokens
            score = (total[1] / tokens - mean.square()) * block.down.double().square().sum(dim=0)
        orders.append(score.argsort(descending=False, stable=True))
        means.append(mean)
    return orders, means


def calibration_curves(model: PreTrainedModel, token_windows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """:func:`loss_curves` on about ``tokens`` tokens of those calibration windows [N, L] that no fit is judged on."""
    seen = token_windows[~streaming.held_out(len(token_windows))]
    return loss_curves(model, processes.of_tokens(seen, tokens))


def spread(curves: list[np.ndarray], shared: int, widths: list[int], active: int, most_skipped: float) -> list[int]:
    """Return the active experts of each layer, on average ``active`` at most, that lose least by the layers' curves.

    Args:
        curves: of :func:`loss_curves`.
        shared: neurons of the shared block; ``widths``: neurons of each routed expert.
        active: mean number of active experts.
        most_skipped: no layer skips more than this times the mean skipped share.
    """
    routed = len(widths)
    least = max(1, math.ceil(routed - most_skipped * (routed - active)))
    kept = np.round(shared + np.arange(routed + 1) * np.mean(widths)).astype(int)
    # Neuron by neuron a wide layer would have thousands of ways, and the solver no answer.
    some = np.linspace(least, routed, min(_WAYS, routed - least + 1)).round().astype(int)
    counts = np.unique(np.append(some, active))
    menus = [allocation.Menu(counts.astype(np.float64), curve[kept[counts]]) for curve in curves]
    # What is found before the solver's time is up depends on the process.
    found = torch.zeros(len(curves), dtype=torch.int64)
    if processes.rank() == 0:
        found += torch.from_numpy(counts[allocation.cheapest(menus, len(curves) * active)])
    return [int(count) for count in processes.total(found)]
