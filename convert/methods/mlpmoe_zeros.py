"""Which weights of an MLPMoE branch become zero, by magnitude alone.

Matrices are as they are stored, outputs x inputs. A branch of n neurons is n rows of gate and up and n columns of down;
each of the three loses its share on its own. Structures:

* ``unstructured``: the smallest weights of all;
* ``2:4``: of four neighbours along the inputs the two smallest, which is what sparse tensor cores read. The share is
  one half, so the schedule decides how many branches are pruned, not how much of each (:func:`half_pruned`);
* ``block``: whole blocks of r outputs x c inputs, those with the smallest sum of magnitudes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moedge import MoEdgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moedge.convert import adapters


def half_pruned(shares: np.ndarray) -> np.ndarray:
    """Turn the shares of all branches into 0 or one half: the last branches get it, as many as come nearest the mean.

    Raises:
        MoEdgeError: the mean is more than one half.
    """
    if shares.mean() > 0.5:
        raise MoEdgeError(
            f"The schedule removes {shares.mean():.1%} on average, and 2:4 at most half; make p_max smaller."
        )
    pruned = math.floor(2 * float(shares.sum()) + 0.5)
    return np.where(np.arange(len(shares)) < len(shares) - pruned, 0.0, 0.5)


def check(block: adapters.FFN, branches: int, shape: Sequence[int]) -> None:
    """Check that blocks of ``shape`` (outputs, inputs) tile every branch of an FFN.

    Raises:
        MoEdgeError: they do not, with what would.
    """
    width, hidden = block.gate.shape
    unit = math.lcm(*shape)
    if hidden % unit or width % (unit * branches):
        fit = [count for count in range(branches, 0, -1) if width % (unit * count) == 0]
        choose = f"choose {fit[0]} branches" if fit and not hidden % unit else "choose other blocks"
        raise MoEdgeError(
            f"{block.name} has {hidden} inputs and {width} neurons; {branches} branches are not made of blocks of "
            f"{shape[0]} x {shape[1]}: {choose}, or structure: unstructured."
        )


def masks(parts: Sequence[np.ndarray], share: float, structure: str, shape: Sequence[int]) -> np.ndarray:
    """Return which weights of one branch become zero.

    Args:
        parts: gate, up and transposed down of the branch, float32 [n, H] each.
        share: of each of them. ``2:4`` takes 0 for no weight, and anything else for one half.
        shape: of a block, (outputs, inputs).

    Returns:
        bool [3, n, H].
    """
    found = np.zeros((3, *parts[0].shape), dtype=bool)
    for number, part in enumerate(parts if share else ()):
        down = number == 2
        size = np.abs(part.T if down else part)
        mask = _neighbours(size) if structure == "2:4" else _blocks(size, share, shape)
        found[number] = mask.T if down else mask
    return found


def _neighbours(size: np.ndarray) -> np.ndarray:
    """The two smallest of every four along the last axis; of equal ones the first."""
    groups = size.reshape(len(size), -1, 4)
    ranks = groups.argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    return (ranks < 2).reshape(size.shape)


def _blocks(size: np.ndarray, share: float, shape: Sequence[int]) -> np.ndarray:
    """The share of all blocks with the smallest sums, rounded to whole blocks; of equal ones the first."""
    rows, columns = size.shape[0] // shape[0], size.shape[1] // shape[1]
    sums = size.reshape(rows, shape[0], columns, shape[1]).sum(axis=(1, 3))
    flat, count = sums.ravel(), round(share * sums.size)
    mask = np.zeros(sums.size, dtype=bool)
    if count:
        limit = np.partition(flat, count - 1)[count - 1]
        mask = flat < limit
        mask[np.flatnonzero(flat == limit)[: count - mask.sum()]] = True
    return np.repeat(np.repeat(mask.reshape(rows, columns), shape[0], axis=0), shape[1], axis=1)
