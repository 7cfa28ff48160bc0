"""Spread one budget of active neurons over the layers by what each layer's FFN costs the model when it skips some.

The cost is an estimate of KL(dense || pruned), second order in the change of an FFN's output: ``KL = 1/2 E[(g . d)^2]``
with d the change and g the gradient of the log-probability of tokens drawn from the dense model's own predictions
(Fisher information; Theis et al., arXiv 1801.05787, eq. 4, use it for single channels). Two forward passes and one
backward pass over a few windows give the whole curve "cost by kept neurons" of every layer.

T tokens of a window, D neurons, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from moedge.convert import adapters, allocation, processes, streaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SEED = 0
"""Of the tokens that :func:`loss_curves` draws from the model's predictions."""


def loss_curves(model: PreTrainedModel, token_windows: np.ndarray) -> list[np.ndarray]:
    """Estimate, layer by layer, the KL of the model's predictions when this FFN alone keeps its n best neurons.

    Best is FLAP's order (variance times ``|down_i|^2``); the others are replaced by their mean over the windows. The
    estimate takes tokens one by one: it leaves out what errors at two tokens of a window do together.

    Args:
        token_windows: int64 [N, L].

    Returns:
        float64 [D + 1] for each layer, nats a token; entry n belongs to n kept neurons, the last one is 0.
    """
    blocks = adapters.ffns(model)
    own = processes.span(len(token_windows))
    ids, tokens = torch.from_numpy(token_windows[own]).to(model.device), token_windows.size
    sums = [torch.zeros(2, len(block.gate), dtype=torch.float64, device=model.device) for block in blocks]

    def add_moments(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        h = blocks[index].hidden(x)
        sums[index] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)]).double()

    with torch.no_grad(), _watched(blocks, add_moments):
        for window in ids:
            model.base_model(input_ids=window[None], use_cache=False)
    sums = [processes.total(total) for total in sums]
    means = [total[0] / tokens for total in sums]
    orders = []
    for block, total, mean in zip(blocks, sums, means, strict=True):
        score = (total[1] / tokens - mean.square()) * block.down.double().square().sum(dim=0)
        orders.append(score.argsort(descending=False, stable=True))

    curves = [torch.zeros(len(block.gate) + 1, dtype=torch.float64, device=model.device) for block in blocks]
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, window in enumerate(ids):
        with torch.enable_grad(), with_gradients(model), _watched(blocks, lambda i, x, y: seen.update({i: (x, y)})):
            score = drawn_score(model, window, generator(own.start + number))
            gradients = torch.autograd.grad(score, [seen[index][1] for index in range(len(blocks))])
        with torch.no_grad():
            for index, (block, gradient) in enumerate(zip(blocks, gradients, strict=True)):
                h = block.hidden(seen[index][0].detach()) - means[index].float()
                change = h * (gradient.flatten(0, -2).float() @ block.down.float())
                # Entry n of the cumulative sum: the n worst neurons are left out.
                together = change[:, orders[index]].cumsum(dim=1)
                curves[index][1:] += together.square().sum(dim=0).double() / 2
    return [(processes.total(curve) / tokens).flip(0).cpu().numpy() for curve in curves]


def calibration_curves(model: PreTrainedModel, token_windows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """:func:`loss_curves` on about ``tokens`` tokens of those calibration windows [N, L] that no fit is judged on."""
    seen = token_windows[~streaming.held_out(len(token_windows))]
    return loss_curves(model, seen[: max(1, tokens // token_windows.shape[1])])


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
    counts = np.arange(least, routed + 1)
    menus = [allocation.Menu(counts.astype(np.float64), curve[kept[least:]]) for curve in curves]
    return [int(counts[way]) for way in allocation.cheapest(menus, len(curves) * active)]


def generator(window: int) -> torch.Generator:
    """Return what draws the tokens of a window of that number, whichever process reads it."""
    # On a CPU 32 bits of a seed count.
    return torch.Generator().manual_seed((SEED * 1_000_003 + window) % 2**32)


def drawn_score(model: PreTrainedModel, window: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return the summed log-probability of tokens drawn from the model's own predictions on a window of ids [L]."""
    logits = model(input_ids=window[None], use_cache=False).logits[0].float()
    drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=draw).to(logits.device)
    return logits.log_softmax(dim=-1).gather(1, drawn).sum()


@contextmanager
def _watched(blocks: list[adapters.FFN], see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, inputs [T, H], output)`` for every FFN that runs."""

    def hook(index: int) -> Callable[..., None]:
        return lambda module, args, output: see(index, args[0].flatten(0, -2), output)

    handles = [block.module.register_forward_hook(hook(block.index)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients reach the FFNs without those of any parameter: they start at the embeddings."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_()
    )
    try:
        yield
    finally:
        handle.remove()
        for parameter in needed:
            parameter.requires_grad_(True)
