"""``moedge::sparse_glu``: the whole routed FFN, which a traced graph shows as one node."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moedge.convert.ops.activations import activate, activate_backward
from moedge.convert.ops.gather import factors, kept
from moedge.convert.ops.grouped import combine, grouped_glu, grouped_linear, groups, keep_inputs, omitted, outer
from moedge.convert.ops.routing import dispatch, gather_sum


@torch.library.custom_op("moedge::sparse_glu", mutates_args=())
def sparse_glu(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    compensation: torch.Tensor | None,
    activation: str,
    h_threshold: torch.Tensor | None = None,
    ramp: float = 0.0,
) -> torch.Tensor:
    """Run the selected experts of each token and sum them: the whole routed FFN.

    Args:
        x: [T, H]. indices: int32 [T, k]. weights: float32 [T, k].
        gate: [E, I, H]. up: [E, I, H]. down: [E, H, I]. Experts with biases have them as the weights of one more
            input that is always 1: x is then [T, H + 1] and gate and up [E, I, H + 1].
        compensation: [E, H] or None, see :func:`combine`.
        activation: a name in :data:`ACTIVATIONS`.
        h_threshold: float32 [E, I] or None: hidden values that are small are left out, as by :func:`keep_large` with
            ``ramp``, before they are weighted.

    Returns:
        [T, H] in the dtype of ``x``.
    """
    if all_at_once(x, gate, indices.shape[1]):
        return masked(x, indices, weights, gate, up, down, compensation, activation, h_threshold, ramp)
    # The eager bodies are called directly: dispatching five operators costs more than a small expert at T = 1.
    rows, offsets, inverse = dispatch._init_fn(x, indices, gate.shape[0])
    hidden = grouped_glu._init_fn(rows, offsets, gate, up, activation, h_threshold, ramp)
    return combine._init_fn(grouped_linear._init_fn(hidden, offsets, down), inverse, indices, weights, compensation)


def all_at_once(x: torch.Tensor, gate: torch.Tensor, top_k: int) -> bool:
    """Whether computing every expert takes less time than grouping the rows of the selected ones.

    Grouping copies each row k times, in and out; computing all experts costs ``E - k`` of them for nothing. On a CPU
    the second is less up to about 48 neurons for nothing a copy (measured: E 10 to 56, I 24 to 512, H 576 and 2048).
    Not in float16, where an unselected expert's activation may be infinite, and zero times that is not a number.
    """
    experts, width = gate.shape[:2]
    if width == 1:
        return True
    small = x.device.type == "cpu" and x.shape[0] >= 16 and x.dtype != torch.float16
    return small and width * (experts - top_k) <= 48 * top_k


def masked(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    compensation: torch.Tensor | None,
    activation: str,
    h_threshold: torch.Tensor | None,
    ramp: float,
) -> torch.Tensor:
    """``sparse_glu`` as one wide FFN, its hidden units times the weight of their expert (0: not selected)."""
    experts, width = gate.shape[:2]
    hidden = activate(F.linear(x, gate.flatten(0, 1)), activation).mul_(F.linear(x, up.flatten(0, 1)))
    if h_threshold is not None:
        hidden = kept(hidden, h_threshold.flatten(), ramp)
    # An index may stand twice in a row (with weight 0, where an expert has no parts): the weights add up.
    chosen = x.new_zeros((x.shape[0], experts)).scatter_add_(1, indices.long(), weights.to(x.dtype))
    hidden.view(-1, experts, width).mul_(chosen.unsqueeze(2))
    y = hidden @ down.transpose(1, 2).reshape(experts * width, -1)
    if compensation is not None:
        y = torch.addmm(y, omitted(indices, experts, y), compensation.to(y.dtype))
    return y


@sparse_glu.register_fake
def _(x, indices, weights, gate, up, down, compensation, activation, h_threshold=None, ramp=0.0):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], down.shape[1]))


def _sparse_glu_backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Go back through the chain at once, expert by expert: nothing but the rows of one expert exists at a time.

    With q = d_y down_e, the gradient of a weight is <hidden, q>: the expert's output itself is not needed again.
    """
    x, indices, weights, gate, up, down, compensation, h_threshold = ctx.saved_tensors
    need_x, _, need_weights, need_gate, need_up, need_down, need_compensation, *_ = ctx.needs_input_grad
    tokens, top_k = weights.shape
    rows, offsets, inverse = dispatch._init_fn(x, indices, gate.shape[0])
    position = torch.empty_like(inverse, dtype=torch.long)  # token * k + choice of each row
    position[inverse.long()] = torch.arange(position.numel(), device=position.device)
    d_out = d_y.index_select(0, position // top_k)
    row_weights = weights.to(x.dtype).reshape(-1, 1).index_select(0, position)
    d_rows = torch.empty_like(rows) if need_x else None
    d_row_weights = row_weights.new_empty(position.numel()) if need_weights else None
    d_gate, d_up, d_down = (
        torch.zeros_like(weight) if need else None
        for weight, need in ((gate, need_gate), (up, need_up), (down, need_down))
    )
    for e, start, end in groups(offsets):
        part, d_part, weight = rows[start:end], d_out[start:end], row_weights[start:end]
        g, u = F.linear(part, gate[e]), F.linear(part, up[e])
        a = activate(g, ctx.activation)
        hidden, d_hidden = a * u, d_part @ down[e]
        factor = None if h_threshold is None else factors(hidden, h_threshold[e], ctx.ramp).to(hidden.dtype)
        if h_threshold is not None:
            hidden = kept(hidden, h_threshold[e], ctx.ramp)
        if d_row_weights is not None:  # before the mask: it is in hidden already
            torch.sum(hidden * d_hidden, dim=1, out=d_row_weights[start:end])
        outer(d_part, hidden * weight, d_down, e)
        if d_rows is None and d_gate is None and d_up is None:
            continue
        d_hidden = d_hidden * weight if factor is None else d_hidden * weight * factor
        d_g, d_u = activate_backward(d_hidden * u, g, ctx.activation), d_hidden * a
        if d_rows is not None:
            torch.addmm(d_g @ gate[e], d_u, up[e], out=d_rows[start:end])
        outer(d_g, part, d_gate, e)
        outer(d_u, part, d_up, e)
    d_x = None if d_rows is None else gather_sum(d_rows, inverse, tokens)
    d_weights = None
    if d_row_weights is not None:
        d_weights = d_row_weights.index_select(0, inverse).view(tokens, top_k).to(weights.dtype)
    d_compensation = None
    if need_compensation:
        d_compensation = (omitted(indices, len(compensation), d_y).T @ d_y).to(compensation.dtype)
    return d_x, None, d_weights, d_gate, d_up, d_down, d_compensation, None, None, None


sparse_glu.register_autograd(_sparse_glu_backward, setup_context=keep_inputs)
