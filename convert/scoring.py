"""What a model says of held-out windows of ids: perplexity, last hidden states, KL to the dense parent.

Protocol: fixed windows of ids, each scored on its own; the negative log-likelihood is averaged over every id but the
first of a window (the BOS token when the protocol has one).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, kept_inputs, modeling, offload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.plan import LayerPlan, MoEPlan

_CHUNK = 256
"""Positions whose logits [256, V] exist at a time."""


def perplexity(
    model: PreTrainedModel, token_windows: np.ndarray, *, batch_size: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Return ``{"ppl", "nll", "tokens"}`` of a model on windows int64 [N, L]; ``nll`` in nats a token.

    Args:
        batch_size: windows in one forward pass.
        progress: called with (windows done, windows in all).
    """
    nll, tokens = 0.0, 0
    for start, hidden in _hidden_states(model, token_windows, batch_size):
        targets = torch.from_numpy(token_windows[start : start + len(hidden), 1:])
        nll += score_all(model, targets.numpy(), hidden, [])[0][0] * targets.numel()
        tokens += targets.numel()
        if progress:
            progress(start + len(hidden), len(token_windows))
    return {"ppl": math.exp(nll / tokens), "nll": nll / tokens, "tokens": tokens}


def last_hidden_states(
    model: PreTrainedModel,
    texts: Mapping[str, np.ndarray],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Return what the output projection multiplies at every position that predicts a next id, [N, L-1, H] per text.

    Args:
        texts: name -> windows int64 [N, L].
        progress: called with (windows done, windows in all).
    """
    found, done, total = {}, 0, sum(map(len, texts.values()))
    for name, ids in texts.items():
        parts = []
        for _, hidden in _hidden_states(model, ids, batch_size):
            parts.append(hidden)
            done += len(hidden)
            if progress:
                progress(done, total)
        found[name] = torch.cat(parts)
    return found


@contextmanager
def swapped(model: PreTrainedModel, plan: MoEPlan) -> Iterator[PreTrainedModel]:
    """Run a block with the plan's FFNs in the dense model; its own FFNs come back afterwards."""
    modeling.check_fits(plan, model)
    with in_place(model, plan.layers):
        yield model


@contextmanager
def in_place(model: PreTrainedModel, layers: list[LayerPlan]) -> Iterator[None]:
    """Run a block with some layers' FFNs and thresholds in a dense model; what was there comes back afterwards."""
    blocks = adapters.ffns(model)
    if offload.is_offloaded(model) and any(kept_inputs.wanted(layers)):
        raise MoEdgeError("Thresholds of attention need a model that is in memory; open it with load_model.")
    try:
        for block, layer in zip(blocks, layers, strict=True):
            model.set_submodule(block.name, modeling.build_ffn(block, layer))
        kept_inputs.apply(model, layers)
        yield
    finally:
        kept_inputs.restore(model)
        for block in blocks:
            model.set_submodule(block.name, block.module)


def _hidden_states(model: PreTrainedModel, ids: np.ndarray, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first window, what the output projection multiplies [b, L-1, H], of each position with a next id)."""
    adapters.check_ids(model, ids)
    for start in range(0, len(ids), batch_size):
        with torch.inference_mode():
            batch = torch.from_numpy(ids[start : start + batch_size]).to(model.device)
            hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
            hidden = kept_inputs.keep_for_head(model, hidden)
        yield start, hidden


@torch.inference_mode()
def score_all(
    model: PreTrainedModel, targets: np.ndarray, dense: torch.Tensor, others: list[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Return the mean NLL of dense and every other variant, and the mean KL(dense || variant), nats a token.

    With logits z and v of dense and variant, ``KL = sum_i p_i (z_i - v_i) - lse(z) + lse(v)``, ``p = exp(z - lse(z))``:
    one product over the vocabulary per variant.

    Args:
        targets: int64 [N, L-1]. dense: :func:`last_hidden_states` [N, L-1, H]; others: the same of each variant.
    """
    flat = [states.reshape(-1, states.shape[-1]) for states in (dense, *others)]
    wanted = torch.from_numpy(np.ascontiguousarray(targets)).reshape(-1, 1).to(dense.device)
    nll, kl = np.zeros(len(flat)), np.zeros(len(others))
    for start in range(0, len(wanted), _CHUNK):
        part = slice(start, start + _CHUNK)
        for i, states in enumerate(flat):
            logits = kept_inputs.project(model, states[part]).float()
            lse = logits.logsumexp(dim=-1, keepdim=True)
            nll[i] += float((lse - logits.gather(-1, wanted[part])).sum(dtype=torch.float64))
            if i == 0:
                p = (logits - lse).exp_()
                negative_entropy = _dot(p, logits) - lse
            else:
                kl[i - 1] += float((negative_entropy - _dot(p, logits) + lse).sum(dtype=torch.float64))
    return (nll / len(wanted)).tolist(), (kl / len(wanted)).tolist()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise dot product of [T, V] and [T, V] without a [T, V] intermediate."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)
