"""Gradients of what a model predicts, one layer at a time, from the last to the first.

Differentiated is the log-probability of tokens that are drawn from the model's own predictions. The mean square of its
gradient is the Fisher information: half of ``E[(gradient . change)^2]`` is the KL that a small change costs (Theis et
al., arXiv 1801.05787, eq. 4).

A first pass keeps the hidden states in front of every layer; then each layer runs again, window by window, for its
gradients. In memory are those states (layers x q tokens x H in float32), one layer, and the activations of one window
in it: less than one backward pass through the whole model holds, and of a model whose layers are on disk
(:mod:`moedge.convert.offload`) no more.

N windows of L tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moedge.convert import adapters, offload, processes, streaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0
"""Of the tokens that are drawn from the model's predictions."""

Watch = Callable[[int, dict[str, torch.Tensor]], AbstractContextManager[None]]
"""``watch(layer, seen)``: a context in which that layer puts the values to differentiate by into ``seen``, under keys
of its own; the number of layers is what follows the last one."""


@dataclass(frozen=True)
class Step:
    """One window in one layer.

    Attributes:
        layer: its position, or the number of layers for what follows the last one.
        window: its number, over all processes.
        values: what was seen, by key; ``gradients``: of the same shapes.
    """

    layer: int
    window: int
    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


@torch.no_grad()
def steps(model: PreTrainedModel, token_windows: np.ndarray, watch: Watch) -> Iterator[Step]:
    """Yield what ``watch`` sees in every layer and window of this process, with its gradients; the last layer first.

    Args:
        token_windows: int64 [N, L], the same in every process.
    """
    own = processes.span(len(token_windows))
    blocks = adapters.ffns(model)
    with _frozen(model):
        runner = streaming.Runner(model, token_windows[own])
        before = [runner.embed()]
        for block in blocks:
            with offload.loaded(runner.layers[block.index]):
                before.append(runner.forward(block, before[-1]))
        last = before.pop()
        gradient = torch.empty_like(last)
        with offload.loaded(model.get_output_embeddings()):
            for window, states in enumerate(last):
                score = partial(_score, runner, window, own.start + window)
                gradient[window], step = _differentiated(watch, score, states, len(blocks), own.start + window)
                yield step
        for block in reversed(blocks):
            before_it = before.pop()
            with offload.loaded(runner.layers[block.index]):
                for window, states in enumerate(before_it):
                    score = partial(_weighted, runner, block, gradient[window].clone())
                    gradient[window], step = _differentiated(watch, score, states, block.index, own.start + window)
                    yield step


def _score(runner: streaming.Runner, window: int, number: int, states: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability of drawn tokens, of hidden states [1, L, H] behind the last layer."""
    return drawn_score(runner.logits(window, states)[0], generator(number))


def _weighted(
    runner: streaming.Runner, block: adapters.FFN, gradient: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """Return what has the gradient of the whole model's score by hidden states [1, L, H] in front of a layer."""
    return (runner.one(block, states)[0] * gradient).sum()


def _differentiated(
    watch: Watch, value: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, layer: int, window: int
) -> tuple[torch.Tensor, Step]:
    """Return the gradient of ``value(states)`` by hidden states [L, H], and by what was seen on the way."""
    seen: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        leaf = states[None].clone().requires_grad_()
        with watch(layer, seen):
            result = value(leaf)
        first, *others = torch.autograd.grad(result, [leaf, *seen.values()])
    values = {key: one.detach() for key, one in seen.items()}
    return first[0], Step(layer, window, values, dict(zip(seen, others, strict=True)))


def drawn_score(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return the summed log-probability of tokens drawn from logits [L, V]."""
    logits = logits.float()
    drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=draw).to(logits.device)
    return logits.log_softmax(dim=-1).gather(1, drawn).sum()


def generator(window: int) -> torch.Generator:
    """Return what draws the tokens of a window of that number, whichever process reads it."""
    # On a CPU 32 bits of a seed count.
    return torch.Generator().manual_seed((SEED * 1_000_003 + window) % 2**32)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter gets a gradient while the block runs."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
