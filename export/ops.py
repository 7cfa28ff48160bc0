"""The ``moedge::`` operators in PyTorch: what a converted FFN runs, and what the exporter sees.

``moedge::route`` and ``moedge::sparse_glu`` appear in a traced graph. ``sparse_glu`` is the chain ``dispatch`` ->
``grouped_glu`` -> ``grouped_linear`` -> ``combine``; the links are operators too because a TensorRT plugin is built
for each of them. Every operator has a fake (shapes for ``torch.export``) and an implementation in plain torch calls
that runs on any device: tokens are sorted by expert once, and each expert is one matrix product.

Shapes: T tokens, H hidden, I expert width, E experts, k active experts for a token. Importing this module registers
the operators; it needs torch only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

RULES = ("unit", "scaled", "softmax")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply the gate activation by its name in :data:`ACTIVATIONS`."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


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
        rule: ``unit`` (weight 1), ``scaled`` (1 + scale_e * softmax(scores)_e, CMoE sec. 3.3) or ``softmax`` (over the
            selected scores).

    Returns:
        Indices int32 [T, k] by decreasing biased score, ties to the lower index, and weights float32 [T, k].
    """
    biased = scores if selection_bias is None else scores + selection_bias
    # A stable sort, because torch.topk leaves the order of ties open and ONNX TopK does not.
    chosen = torch.sort(biased, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if rule == "unit":
        weights = torch.ones_like(chosen, dtype=torch.float32)
    elif rule == "scaled":
        if scale is None:
            raise ValueError("rule 'scaled' needs the scale tensor [E]")
        weights = 1 + (torch.softmax(scores, dim=-1) * scale).gather(-1, chosen)
    elif rule == "softmax":
        weights = torch.softmax(scores.gather(-1, chosen), dim=-1)
    else:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    return chosen.to(torch.int32), weights


@route.register_fake
def _(scores, selection_bias, scale, top_k, rule):  # type: ignore[no-untyped-def]
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape, dtype=torch.int32), scores.new_empty(shape, dtype=torch.float32)


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


def _groups(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """List (expert, first row, end row) of the experts that own at least one row."""
    bounds = offsets.tolist()
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]


@torch.library.custom_op("moedge::grouped_glu", mutates_args=())
def grouped_glu(
    rows: torch.Tensor, offsets: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> torch.Tensor:
    """``act(gate_e row) * (up_e row)`` with the expert e that owns the row: [R, H] x [E, I, H] -> [R, I]."""
    out = rows.new_empty((rows.shape[0], gate.shape[1]))
    for e, start, end in _groups(offsets):
        part = rows[start:end]
        torch.mul(activate(F.linear(part, gate[e]), activation), F.linear(part, up[e]), out=out[start:end])
    return out


@grouped_glu.register_fake
def _(rows, offsets, gate, up, activation):  # type: ignore[no-untyped-def]
    return rows.new_empty((rows.shape[0], gate.shape[1]))


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
        # A 0/1 mask, not total minus selected: exactly zero when every expert is selected (the identity test).
        omitted = rows.new_ones((tokens, compensation.shape[0])).scatter_(1, indices.long(), 0)
        y = torch.addmm(y, omitted, compensation.to(rows.dtype))
    return y


@combine.register_fake
def _(rows, inverse, indices, weights, compensation):  # type: ignore[no-untyped-def]
    return rows.new_empty((weights.shape[0], rows.shape[1]))


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
) -> torch.Tensor:
    """Run the selected experts of each token and sum them: the whole routed FFN.

    Args:
        x: [T, H]. indices: int32 [T, k]. weights: float32 [T, k].
        gate: [E, I, H]. up: [E, I, H]. down: [E, H, I].
        compensation: [E, H] or None, see :func:`combine`.
        activation: a name in :data:`ACTIVATIONS`.

    Returns:
        [T, H] in the dtype of ``x``.
    """
    # The eager bodies are called directly: dispatching five operators costs more than a small expert at T = 1.
    rows, offsets, inverse = dispatch._init_fn(x, indices, gate.shape[0])
    hidden = grouped_glu._init_fn(rows, offsets, gate, up, activation)
    return combine._init_fn(grouped_linear._init_fn(hidden, offsets, down), inverse, indices, weights, compensation)


@sparse_glu.register_fake
def _(x, indices, weights, gate, up, down, compensation, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
