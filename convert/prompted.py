"""GRIFFIN: neurons that a prompt chooses for its whole answer (arXiv 2404.01365), on a dense model, for evaluation.

Of a window of L tokens the first ``L // 2`` are the prompt: every neuron runs there, as published. The rows of its
activations h [P, D] are scaled to length 1; a neuron's statistic is the length of its column, and the ``k`` neurons
with the largest ones run for the tokens behind the prompt. So a window is what prompting with its first half and
forcing its second half gives, and only the second half says anything about the method.

A plan of this kind names how many neurons an answer runs, and no more: which ones, no plan can know. It is applied to
the dense model by hooks, never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moedge.convert import adapters, streaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.convert.plan import LayerPlan


def prompt_length(length: int) -> int:
    """Return P, the tokens of a window of ``length`` that are its prompt; one at least is left to be scored."""
    return max(0, min(length // 2, length - 2))


@contextmanager
def in_place(model: PreTrainedModel, layers: list[LayerPlan]) -> Iterator[None]:
    """Run a block in which the FFNs of a dense model leave out what each window's prompt does not choose.

    Its inputs are whole windows [B, L]; each row chooses for itself.
    """
    downs = [block.module.get_submodule("down_proj") for block in adapters.ffns(model)]
    hooks = [down.register_forward_pre_hook(_left_out(layer.top_k)) for down, layer in zip(downs, layers, strict=True)]
    with streaming.hooked(*hooks):
        yield


def _left_out(keep: int) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        prompt = prompt_length(hidden.shape[-2])
        kept = chosen(hidden[..., :prompt, :], keep)[..., None, :]
        answer = torch.where(kept, hidden[..., prompt:, :], torch.zeros_like(hidden[..., :1, :]))
        return (torch.cat([hidden[..., :prompt, :], answer], dim=-2), *args[1:])

    return hook


def chosen(hidden: torch.Tensor, keep: int) -> torch.Tensor:
    """Return which neurons a prompt's activations [..., P, D] choose, bool [..., D]; ties go to the lower index."""
    rows = torch.nn.functional.normalize(hidden.float(), dim=-1)
    best = rows.norm(dim=-2).argsort(dim=-1, descending=True, stable=True)[..., :keep]
    mask = torch.zeros(best.shape[:-1] + hidden.shape[-1:], dtype=torch.bool, device=hidden.device)
    return mask.scatter(-1, best, True)
