"""``moedge::route`` and ``moedge::dispatch``: which experts a token has, and its rows sorted by them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

RULES = ("unit", "scaled", "softmax", "probability", "normalised")


@torch.library.custom_op("moedge::route", mutates_args=())
def route(
    scores: torch.Tensor,
    selection_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    top_k: int,
    rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select ``top_k`` experts for each token.

    Args:
        scores: float32 [T, E].
        selection_bias: float32 [E], added for the selection only, never to a weight.
        scale: float32 [E], for the rule ``scaled``.
        top_k: k, 1..E.
        rule: ``unit`` (weight 1), ``scaled`` (1 + scale_e * softmax(scores)_e, CMoE sec. 3.3), ``softmax`` (over the
            selected scores), ``probability`` (softmax over all E scores, not renormalised over the selected ones:
            ExpertWeaver sec. 4) or ``normalised`` (score over the sum of the selected scores, which must be positive:
            a sigmoid router, DeepSeek-V3 sec. 2.1.2).

    Returns:
        Indices int32 [T, k] by decreasing biased score, ties to the lower index, and weights float32 [T, k].
    """
    biased = scores if selection_bias is None else scores + selection_bias
    # A stable sort, because torch.topk leaves the order of ties open and ONNX TopK does not.
    chosen = torch.sort(biased, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if rule == "unit":
        weights = torch.ones_like(chosen, dtype=scores.dtype)
    elif rule == "scaled":
        if scale is None:
            raise ValueError("rule 'scaled' needs the scale tensor [E]")
        weights = 1 + (torch.softmax(scores, dim=-1) * scale).gather(-1, chosen)
    elif rule == "softmax":
        weights = torch.softmax(scores.gather(-1, chosen), dim=-1)
    elif rule == "probability":
        weights = torch.softmax(scores, dim=-1).gather(-1, chosen)
    elif rule == "normalised":
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    return chosen.to(torch.int32), weights


@route.register_fake
def _(scores, selection_bias, scale, top_k, rule):  # type: ignore[no-untyped-def]
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape, dtype=torch.int32), scores.new_empty(shape)


def _route_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, _, scale, _, ctx.rule = inputs
    ctx.save_for_backward(scores, scale, *output)


def _route_backward(ctx: Any, _: torch.Tensor, d_weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    scores, scale, indices, weights = ctx.saved_tensors
    chosen = indices.long()
    d_scale = None
    d_scores = torch.zeros_like(scores)  # of "unit"; not None: DDP waits for every gradient
    if ctx.rule == "softmax":
        inner = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True))
        d_scores = torch.zeros_like(scores).scatter_(-1, chosen, inner)
    elif ctx.rule == "normalised":
        inner = d_weights - (d_weights * weights).sum(-1, keepdim=True)
        d_scores = d_scores.scatter_(-1, chosen, inner / scores.gather(-1, chosen).sum(-1, keepdim=True))
    elif ctx.rule in ("scaled", "probability"):
        p = torch.softmax(scores, dim=-1)
        d_p = torch.zeros_like(scores).scatter_(-1, chosen, d_weights)
        if ctx.rule == "scaled":
            d_scale = (d_p * p).sum(0)
            d_p = d_p * scale
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True))
    return d_scores, None, d_scale, None, None


route.register_autograd(_route_backward, setup_context=_route_context)


@torch.library.custom_op("moedge::dispatch", mutates_args=())
def dispatch(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token once per selected expert, grouped by expert, tokens in order within a group.

    Args:
        x: [T, H].
        indices: int32 [T, k].
        num_experts: E.

    Returns:
        Rows [T*k, H]; offsets int32 [E+1], expert e owns rows offsets[e]:offsets[e+1]; inverse int32 [T*k], the row
        that holds (token t, choice j) at t*k + j.
    """
    flat = indices.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = F.pad(torch.cumsum(counts, 0), (1, 0)).to(torch.int32)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    # index_select: on CPU several times faster than indexing with a tensor
    return x.index_select(0, order // indices.shape[1]), offsets, inverse.to(torch.int32)


@dispatch.register_fake
def _(x, indices, num_experts):  # type: ignore[no-untyped-def]
    rows = indices.shape[0] * indices.shape[1]
    return (
        x.new_empty((rows, x.shape[1])),
        indices.new_empty((num_experts + 1,), dtype=torch.int32),
        indices.new_empty((rows,), dtype=torch.int32),
    )


def _dispatch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.tokens = inputs[0].shape[0]
    ctx.save_for_backward(output[2])


def _dispatch_backward(ctx: Any, d_rows: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    (inverse,) = ctx.saved_tensors
    return gather_sum(d_rows, inverse, ctx.tokens), None, None


def gather_sum(rows: torch.Tensor, inverse: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sum the rows of each token, [T*k, H] -> [T, H], in the order of its choices."""
    return rows.index_select(0, inverse).view(tokens, -1, rows.shape[1]).sum(1)


dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_context)
