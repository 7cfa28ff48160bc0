"""Attention as one operator: ``moedge::attention``, plugged into transformers through its attention registry.

Tracing a model with ``attn_implementation="moedge"`` leaves one node a layer where scaled-dot-product attention would
leave some thirty, so a lowering replaces it whole (GroupQueryAttention) instead of guessing it back from a pattern.

Shapes: B batch, S new tokens, L past + new tokens, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

IMPLEMENTATION = "moedge"


@torch.library.custom_op("moedge::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Causal grouped-query attention over a cache.

    Query position s (of S) sees key position l (of L) when ``l <= L - S + s`` and ``attention_mask[b, l]`` is true;
    with a window W also ``l > L - S + s - W``, so W positions, its own one included. Positions count padding, as the
    masks of transformers do. A row that sees nothing (a padding token) returns some mean of values, never NaN.

    Args:
        query: [B, N, S, D], rotary applied.
        key: [B, G, L, D], past and new.
        value: [B, G, L, D].
        attention_mask: bool [B, L], false for padding.
        scale: factor of query times key.
        window: W of a sliding-window layer, 0 for full attention.
        softcap: c of ``c tanh(scores / c)`` before the mask (Gemma 2), 0 for none.

    Returns:
        [B, S, N, D].
    """
    new, total = query.shape[2], key.shape[2]
    position = torch.arange(total, device=query.device)
    own = position[total - new :, None]
    causal = position[None, :] <= own
    if window:
        causal = causal & (position[None, :] > own - window)
    visible = causal[None, None] & attention_mask[:, None, None, :]
    # In float32 where something is added to it: the lowest float16 less anything is -inf, and a row of those is NaN.
    dtype = torch.promote_types(query.dtype, torch.float32) if softcap else query.dtype
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    if softcap:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap + bias
        y = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    else:
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).contiguous()


@attention.register_fake
def _(query, key, value, attention_mask, scale, window, softcap):  # type: ignore[no-untyped-def]
    batch, heads, new, size = query.shape
    return query.new_empty((batch, new, heads, size))


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window, softcap = int(kwargs.get("sliding_window") or 0), float(kwargs.get("softcap") or 0)
    return torch.ops.moedge.attention(query, key, value, attention_mask, scale, window, softcap), None


def _mask(attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    return attention_mask


def register() -> None:
    """Make ``attn_implementation="moedge"`` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
