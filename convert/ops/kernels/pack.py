"""Group-quantised expert weights in the layout of the kernels.

Symmetric: ``w = q * scale`` with one scale for ``group`` consecutive columns of a row. ``bits`` 8: int8 [..., N, K].
``bits`` 4: q in -8..7, two a byte: byte j of a group holds column j in its low nibble and column j + group/2 in its
high one, so that both are read with consecutive addresses; K is padded to whole groups with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def quantize(weight: torch.Tensor, *, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest: float [..., N, K] -> (int8 q [..., N, K], scales [..., N, ceil(K / group)] in its dtype)."""
    columns = weight.shape[-1]
    padded = F.pad(weight, (0, -columns % group)).float().unflatten(-1, (-1, group))
    most = 2 ** (bits - 1) - 1
    # The scale as it is stored, so that q belongs to the rounded scale.
    scales = (padded.abs().amax(-1) / most).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    q = (padded / scales.float().unsqueeze(-1)).round().clamp(-most - 1, most)
    return q.flatten(-2)[..., :columns].to(torch.int8).contiguous(), scales


def pack_int4(q: torch.Tensor, *, group: int) -> torch.Tensor:
    """Pack int8 values in -8..7, [..., N, K] -> int8 [..., N, ceil(K / group) * group / 2]."""
    halves = F.pad(q, (0, -q.shape[-1] % group)).unflatten(-1, (-1, 2, group // 2))
    return ((halves[..., 0, :] & 0xF) | (halves[..., 1, :] << 4)).flatten(-2).contiguous()


def unpack_int4(packed: torch.Tensor, *, columns: int, group: int) -> torch.Tensor:
    """Undo :func:`pack_int4`; ``columns`` is K."""
    groups = packed.unflatten(-1, (-1, group // 2))
    low = (groups << 4) >> 4
    return torch.stack((low, groups >> 4), -2).flatten(-3)[..., :columns].contiguous()


def dequantize(q: torch.Tensor, scales: torch.Tensor, *, group: int) -> torch.Tensor:
    """Return ``q * scale`` in the dtype of the scales, for q [..., N, K] (unpacked)."""
    return q.to(scales.dtype) * scales.repeat_interleave(group, -1)[..., : q.shape[-1]]
