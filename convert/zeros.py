"""Weights of an FFN that a plan sets to zero, as bits: which of them, how many, and where they go.

A zero is stored like any other weight: a file and a dense product are as large as before. What zeros save depends on a
runtime that skips them (docs/results.md, "MLPMoE").

D neurons, H hidden. ``zeros`` is uint8 [3, D, ceil(H / 8)]: neuron j's row of gate, its row of up and its column of
down, eight weights a byte, the first weight in the highest bit. A set bit is a weight that becomes zero; bits behind
the H-th are not set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moedge import MoEdgeError

if TYPE_CHECKING:
    import torch


def pack(masks: np.ndarray) -> np.ndarray | None:
    """Turn masks bool [3, D, H] (gate, up, down transposed; True becomes zero) into bits, or None when none is set."""
    return np.packbits(masks, axis=2) if masks.any() else None


def unpack(zeros: np.ndarray, hidden: int) -> np.ndarray:
    """Undo :func:`pack`: bool [3, D, ``hidden``]."""
    return np.unpackbits(zeros, axis=2, count=hidden).view(bool)


def counts(zeros: np.ndarray) -> np.ndarray:
    """How many of each neuron's 3 H weights become zero, int64 [D]."""
    parts = (np.unpackbits(part, axis=1).sum(axis=1, dtype=np.int64) for part in zeros)
    return np.sum(list(parts), axis=0)


def check(zeros: np.ndarray, width: int, hidden: int | None, where: str) -> None:
    """Check bits against an FFN of ``width`` neurons and, if it is known, ``hidden`` inputs.

    Raises:
        MoEdgeError: another type or shape, or a bit that belongs to no weight.
    """
    size = zeros.shape[-1] if hidden is None else -(-hidden // 8)
    if zeros.dtype != np.uint8 or zeros.shape != (3, width, size):
        raise MoEdgeError(
            f"{where}: zeros are {zeros.dtype} {list(zeros.shape)}, not uint8 {[3, width, size]}; the plan is for "
            "another model."
        )
    if hidden is not None and hidden % 8 and (zeros[..., -1] & (0xFF >> hidden % 8)).any():
        raise MoEdgeError(f"{where}: zeros name a weight behind the last of {hidden}; the plan is damaged.")


def clear(
    zeros: np.ndarray, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return copies of gate [D, H], up [D, H] and down [H, D] with the weights that ``zeros`` names set to zero."""
    import torch

    masks = (torch.from_numpy(part).to(gate.device) for part in unpack(zeros, gate.shape[1]))
    one, two, three = (weight.masked_fill(mask, 0) for weight, mask in zip((gate, up, down.T), masks, strict=True))
    return one, two, three.T
