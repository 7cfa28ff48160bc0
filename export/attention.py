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
) -> torch.Tensor:
    """Causal grouped-query attention over a cache.

    Query position s (of S) sees key position l (of L) when ``l <= L - S + s`` and ``attention_mask[b, l]`` is true.
    A row that sees nothing (a padding token) returns the mean of its values, never NaN.

    Args:
        query: [B, N, S, D], rotary applied.
        key: [B, G, L, D], past and new.
        value: [B, G, L, D].
        attention_mask: bool [B, L], false for padding.
        scale: factor of query times key.

    Returns:
        [B, S, N, D].
    """
    new, total = query.shape[2], key.shape[2]
    position = torch.arange(total, device=query.device)
    causal = position[None, :] <= position[total - new :, None]
    visible = causal[None, None] & attention_mask[:, None, None, :]
    bias = torch.where(visible, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).contiguous()


@attention.register_fake
def _(query, key, value, attention_mask, scale):  # type: ignore[no-untyped-def]
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
    if kwargs.get("sliding_window") or kwargs.get("softcap"):
        raise NotImplementedError("moedge::attention has no sliding window and no soft cap")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return torch.ops.moedge.attention(query, key, value, attention_mask, scale), None


def _mask(attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    return attention_mask


def register() -> None:
    """Make ``attn_implementation="moedge"`` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
