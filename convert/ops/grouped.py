"""``moedge::grouped_glu``, ``grouped_linear`` and ``combine``: experts on rows that are sorted by them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moedge.convert.ops.activations import activate, activate_backward
from moedge.convert.ops.gather import factors, kept


def groups(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """List (expert, first row, end row) of the experts that own at least one row."""
    bounds = offsets.tolist()
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]


@torch.library.custom_op("moedge::grouped_glu", mutates_args=())
def grouped_glu(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    h_threshold: torch.Tensor | None = None,
    ramp: float = 0.0,
) -> torch.Tensor:
    """``act(gate_e row) * (up_e row)`` with the expert e that owns the row: [R, H] x [E, I, H] -> [R, I].

    With ``h_threshold`` float32 [E, I] small values are left out, as by :func:`keep_large` with ``ramp``.
    """
    out = rows.new_empty((rows.shape[0], gate.shape[1]))
    for e, start, end in groups(offsets):
        part = rows[start:end]
        torch.mul(activate(F.linear(part, gate[e]), activation), F.linear(part, up[e]), out=out[start:end])
        if h_threshold is not None:
            out[start:end] = kept(out[start:end], h_threshold[e], ramp)
    return out


@grouped_glu.register_fake
def _(rows, offsets, gate, up, activation, h_threshold=None, ramp=0.0):  # type: ignore[no-untyped-def]
    return rows.new_empty((rows.shape[0], gate.shape[1]))


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors among the inputs for the backward pass, the activation and the ramp where there are such."""
    ctx.activation = next((value for value in inputs if isinstance(value, str)), None)
    ctx.ramp = inputs[-1] if isinstance(inputs[-1], float) else 0.0
    ctx.save_for_backward(*(value for value in inputs if value is None or isinstance(value, torch.Tensor)))


def outer(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None, e: int) -> None:
    """Write ``a^T b``, [n, A] x [n, B], into matrix e of ``out`` where that gradient is wanted."""
    if out is not None:
        torch.mm(a.T, b, out=out[e])


def _grouped_glu_backward(ctx: Any, d_hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, offsets, gate, up, h_threshold = ctx.saved_tensors
    need_rows, _, need_gate, need_up, *_ = ctx.needs_input_grad
    # An expert without a row has a zero gradient.
    d_rows = torch.empty_like(rows) if need_rows else None
    d_gate = torch.zeros_like(gate) if need_gate else None
    d_up = torch.zeros_like(up) if need_up else None
    for e, start, end in groups(offsets):
        part = rows[start:end]
        g, u = F.linear(part, gate[e]), F.linear(part, up[e])
        a, d_part = activate(g, ctx.activation), d_hidden[start:end]
        if h_threshold is not None:
            d_part = d_part * factors(a * u, h_threshold[e], ctx.ramp).to(d_part.dtype)
        d_g, d_u = activate_backward(d_part * u, g, ctx.activation), d_part * a
        if d_rows is not None:
            torch.addmm(d_g @ gate[e], d_u, up[e], out=d_rows[start:end])
        outer(d_g, part, d_gate, e)
        outer(d_u, part, d_up, e)
    return d_rows, None, d_gate, d_up, None, None, None


grouped_glu.register_autograd(_grouped_glu_backward, setup_context=keep_inputs)


@torch.library.custom_op("moedge::grouped_linear", mutates_args=())
def grouped_linear(rows: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``weight_e row`` with the expert e that owns the row: [R, I] x [E, H, I] -> [R, H]."""
    out = rows.new_empty((rows.shape[0], weight.shape[1]))
    for e, start, end in groups(offsets):
        torch.mm(rows[start:end], weight[e].T, out=out[start:end])
    return out


@grouped_linear.register_fake
def _(rows, offsets, weight):  # type: ignore[no-untyped-def]
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _grouped_linear_backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, offsets, weight = ctx.saved_tensors
    d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
    d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
    for e, start, end in groups(offsets):
        if d_rows is not None:
            torch.mm(d_out[start:end], weight[e], out=d_rows[start:end])
        outer(d_out[start:end], rows[start:end], d_weight, e)
    return d_rows, None, d_weight


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=keep_inputs)


@torch.library.custom_op("moedge::combine", mutates_args=())
def combine(
    rows: torch.Tensor,
    inverse: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    compensation: torch.Tensor | None,
) -> torch.Tensor:
    """Sum each token's expert outputs, and what its unselected experts contribute on average.

    ``y_t = sum_j weights[t, j] * rows[inverse[t*k + j]] + sum_{e not selected} compensation[e]``; the order of the sum
    is fixed, so equal inputs give equal bits.

    Args:
        rows: [T*k, H].
        inverse: int32 [T*k], from ``dispatch``.
        indices: int32 [T, k]. weights: float32 [T, k].
        compensation: [E, H] or None.
    """
    tokens, top_k = weights.shape
    chosen = rows.index_select(0, inverse).view(tokens, top_k, rows.shape[1])
    y = torch.bmm(weights.to(rows.dtype).unsqueeze(1), chosen).squeeze(1)
    if compensation is not None:
        y = torch.addmm(y, omitted(indices, compensation.shape[0], y), compensation.to(rows.dtype))
    return y


def omitted(indices: torch.Tensor, num_experts: int, like: torch.Tensor) -> torch.Tensor:
    """1 for the experts a token has not selected, 0 for the others, [T, E]."""
    # A 0/1 mask, not total minus selected: exactly zero when every expert is selected (the identity test).
    return like.new_ones((indices.shape[0], num_experts)).scatter_(1, indices.long(), 0)


@combine.register_fake
def _(rows, inverse, indices, weights, compensation):  # type: ignore[no-untyped-def]
    return rows.new_empty((weights.shape[0], rows.shape[1]))


def _combine_backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, inverse, indices, weights, compensation = ctx.saved_tensors
    tokens, top_k = weights.shape
    d_rows = d_weights = d_compensation = None
    if ctx.needs_input_grad[0]:
        spread = weights.to(d_y.dtype).unsqueeze(2) * d_y.unsqueeze(1)
        d_rows = torch.empty_like(rows).index_copy_(0, inverse.long(), spread.view(tokens * top_k, -1))
    if ctx.needs_input_grad[3]:
        chosen = rows.index_select(0, inverse).view(tokens, top_k, -1)
        d_weights = torch.bmm(chosen, d_y.unsqueeze(2)).squeeze(2).to(weights.dtype)
    if ctx.needs_input_grad[4]:
        d_compensation = (omitted(indices, len(compensation), d_y).T @ d_y).to(compensation.dtype)
    return d_rows, None, None, d_weights, d_compensation


combine.register_autograd(_combine_backward, setup_context=keep_inputs)
