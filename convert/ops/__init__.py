"""The ``moedge::`` operators in PyTorch: what a converted FFN runs, and what the exporter sees.

``moedge::route`` and ``moedge::sparse_glu`` appear in a traced graph. ``sparse_glu`` is the chain ``dispatch`` ->
``grouped_glu`` -> ``grouped_linear`` -> ``combine``; the links are operators too because a TensorRT plugin is built
for each of them. Every operator has a fake (shapes for ``torch.export``) and an implementation in plain torch calls
that runs on any device: tokens are sorted by expert once, and each expert is one matrix product.

All of them have gradients, by the same sorted products. The gradient reaches the scores through the weights: rules
all but ``unit`` pass it on, ``unit`` has none, and the choice of experts has none.
``sparse_glu`` keeps its inputs only and computes the hidden activations again in the backward pass.

Shapes: T tokens, H hidden, I expert width, E experts, k active experts for a token. Importing this module registers
the operators; it needs torch only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moedge.convert.ops.activations import ACTIVATIONS, activate
from moedge.convert.ops.gather import factors, keep_large, kept
from moedge.convert.ops.gathered import gathered_glu, gathered_linear

__all__ = ["ACTIVATIONS", "RULES", "activate", "combine", "dispatch", "gathered_glu", "gathered_linear", "grouped_glu",
           "grouped_linear", "keep_large", "route", "sparse_glu"]  # fmt: skip

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
    return _gather_sum(d_rows, inverse, ctx.tokens), None, None


def _gather_sum(rows: torch.Tensor, inverse: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sum the rows of each token, [T*k, H] -> [T, H], in the order of its choices."""
    return rows.index_select(0, inverse).view(tokens, -1, rows.shape[1]).sum(1)


dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_context)


def _groups(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
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
    for e, start, end in _groups(offsets):
        part = rows[start:end]
        torch.mul(activate(F.linear(part, gate[e]), activation), F.linear(part, up[e]), out=out[start:end])
        if h_threshold is not None:
            out[start:end] = kept(out[start:end], h_threshold[e], ramp)
    return out


@grouped_glu.register_fake
def _(rows, offsets, gate, up, activation, h_threshold=None, ramp=0.0):  # type: ignore[no-untyped-def]
    return rows.new_empty((rows.shape[0], gate.shape[1]))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors among the inputs for the backward pass, the activation and the ramp where there are such."""
    ctx.activation = next((value for value in inputs if isinstance(value, str)), None)
    ctx.ramp = inputs[-1] if isinstance(inputs[-1], float) else 0.0
    ctx.save_for_backward(*(value for value in inputs if value is None or isinstance(value, torch.Tensor)))


def _activate_backward(d_out: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(d_out, x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(d_out, x, approximate=approximate)


def _outer(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None, e: int) -> None:
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
    for e, start, end in _groups(offsets):
        part = rows[start:end]
        g, u = F.linear(part, gate[e]), F.linear(part, up[e])
        a, d_part = activate(g, ctx.activation), d_hidden[start:end]
        if h_threshold is not None:
            d_part = d_part * factors(a * u, h_threshold[e], ctx.ramp).to(d_part.dtype)
        d_g, d_u = _activate_backward(d_part * u, g, ctx.activation), d_part * a
        if d_rows is not None:
            torch.addmm(d_g @ gate[e], d_u, up[e], out=d_rows[start:end])
        _outer(d_g, part, d_gate, e)
        _outer(d_u, part, d_up, e)
    return d_rows, None, d_gate, d_up, None, None, None


grouped_glu.register_autograd(_grouped_glu_backward, setup_context=_keep_inputs)


@torch.library.custom_op("moedge::grouped_linear", mutates_args=())
def grouped_linear(rows: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``weight_e row`` with the expert e that owns the row: [R, I] x [E, H, I] -> [R, H]."""
    out = rows.new_empty((rows.shape[0], weight.shape[1]))
    for e, start, end in _groups(offsets):
        torch.mm(rows[start:end], weight[e].T, out=out[start:end])
    return out


@grouped_linear.register_fake
def _(rows, offsets, weight):  # type: ignore[no-untyped-def]
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _grouped_linear_backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, offsets, weight = ctx.saved_tensors
    d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
    d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
    for e, start, end in _groups(offsets):
        if d_rows is not None:
            torch.mm(d_out[start:end], weight[e], out=d_rows[start:end])
        _outer(d_out[start:end], rows[start:end], d_weight, e)
    return d_rows, None, d_weight


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_keep_inputs)


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
        y = torch.addmm(y, _omitted(indices, compensation.shape[0], y), compensation.to(rows.dtype))
    return y


def _omitted(indices: torch.Tensor, num_experts: int, like: torch.Tensor) -> torch.Tensor:
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
        d_compensation = (_omitted(indices, len(compensation), d_y).T @ d_y).to(compensation.dtype)
    return d_rows, None, None, d_weights, d_compensation


combine.register_autograd(_combine_backward, setup_context=_keep_inputs)


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
    if _all_at_once(x, gate, indices.shape[1]):
        return _masked(x, indices, weights, gate, up, down, compensation, activation, h_threshold, ramp)
    # The eager bodies are called directly: dispatching five operators costs more than a small expert at T = 1.
    rows, offsets, inverse = dispatch._init_fn(x, indices, gate.shape[0])
    hidden = grouped_glu._init_fn(rows, offsets, gate, up, activation, h_threshold, ramp)
    return combine._init_fn(grouped_linear._init_fn(hidden, offsets, down), inverse, indices, weights, compensation)


def _all_at_once(x: torch.Tensor, gate: torch.Tensor, top_k: int) -> bool:
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


def _masked(
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
        y = torch.addmm(y, _omitted(indices, experts, y), compensation.to(y.dtype))
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
    for e, start, end in _groups(offsets):
        part, d_part, weight = rows[start:end], d_out[start:end], row_weights[start:end]
        g, u = F.linear(part, gate[e]), F.linear(part, up[e])
        a = activate(g, ctx.activation)
        hidden, d_hidden = a * u, d_part @ down[e]
        factor = None if h_threshold is None else factors(hidden, h_threshold[e], ctx.ramp).to(hidden.dtype)
        if h_threshold is not None:
            hidden = kept(hidden, h_threshold[e], ctx.ramp)
        if d_row_weights is not None:  # before the mask: it is in hidden already
            torch.sum(hidden * d_hidden, dim=1, out=d_row_weights[start:end])
        _outer(d_part, hidden * weight, d_down, e)
        if d_rows is None and d_gate is None and d_up is None:
            continue
        d_hidden = d_hidden * weight if factor is None else d_hidden * weight * factor
        d_g, d_u = _activate_backward(d_hidden * u, g, ctx.activation), d_hidden * a
        if d_rows is not None:
            torch.addmm(d_g @ gate[e], d_u, up[e], out=d_rows[start:end])
        _outer(d_g, part, d_gate, e)
        _outer(d_u, part, d_up, e)
    d_x = None if d_rows is None else _gather_sum(d_rows, inverse, tokens)
    d_weights = None
    if d_row_weights is not None:
        d_weights = d_row_weights.index_select(0, inverse).view(tokens, top_k).to(weights.dtype)
    d_compensation = None
    if need_compensation:
        d_compensation = (_omitted(indices, len(compensation), d_y).T @ d_y).to(compensation.dtype)
    return d_x, None, d_weights, d_gate, d_up, d_down, d_compensation, None, None, None


sparse_glu.register_autograd(_sparse_glu_backward, setup_context=_keep_inputs)


def _on_cuda(operator: Any) -> None:
    """Give an operator its Triton kernel on CUDA devices; Triton is imported at the first call there.

    Without Triton, and for what the kernels do not take (float64, over 512 experts, GPUs before SM80), the one above
    runs there too.
    """

    def run(*arguments: Any) -> Any:
        try:
            from moedge.convert.ops.kernels import cuda
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            return operator._init_fn(*arguments)
        if not cuda.supports(operator._name, arguments):
            return operator._init_fn(*arguments)
        return getattr(cuda, operator._name)(*arguments)

    operator.register_kernel("cuda", run)


for _operator in (route, dispatch, grouped_glu, grouped_linear, combine, sparse_glu, gathered_glu, gathered_linear):
    _on_cuda(_operator)
