"""Dispatch: each token's row once per selected expert, grouped by expert, tokens in order within a group.

One launch, no atomics on memory and no hand-over between programs: every program counts the T*k indices by expert
itself (they sit in the L2 cache), so it knows where its own rows go. Integer counts do not depend on the order of
execution, so equal inputs give equal bits.

Bytes: T*H read and T*k*H written, in the activations' type, and the indices once a program. Bandwidth-bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels.launch import Launch, cover, fixed, power_of_two

BLOCK_R = 16
"""Rows a program places."""


@triton.jit(do_not_specialize=["tokens"])
def dispatch(
    x_ptr, indices_ptr, tokens, rows_ptr, offsets_ptr, inverse_ptr,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """X [T, H], indices int32 [T, k] -> rows [T*k, H], offsets int32 [E+1], inverse int32 [T*k]."""
    block = tl.program_id(0)
    total_rows = tokens * TOP_K
    first = block * BLOCK_R
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, total_rows, BLOCK_C):
        position = start + tl.arange(0, BLOCK_C)
        index = tl.load(indices_ptr + position, mask=position < total_rows, other=-1)
        # The histogram lives in shared memory: an index outside [0, E) must not reach it.
        known = (index >= 0) & (index < EXPERTS)
        count += tl.histogram(index, BLOCK_E, mask=known)
        before += tl.histogram(index, BLOCK_E, mask=known & (position < first))
    begin = tl.cumsum(count, 0) - count

    position = first + tl.arange(0, BLOCK_R)
    valid = position < total_rows
    # -1: a row past the end, never equal to an expert
    expert = tl.load(indices_ptr + position, mask=valid, other=-1)
    earlier = (expert[:, None] == expert[None, :]) & (position[None, :] < position[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    target = rank + tl.sum(tl.where(expert[:, None] == e[None, :], (begin + before)[None, :], 0), 1)
    column_block = tl.program_id(1)
    if column_block == 0:
        tl.store(inverse_ptr + position, target, mask=valid)
        if block == 0:
            tl.store(offsets_ptr + e, begin, mask=e < EXPERTS)
            tl.store(offsets_ptr + EXPERTS, total_rows)
    h = column_block * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = valid[:, None] & (h < HIDDEN)[None, :]
    token = (position // TOP_K).to(tl.int64)
    row = tl.load(x_ptr + token[:, None] * HIDDEN + h[None, :], mask=mask)
    tl.store(rows_ptr + target.to(tl.int64)[:, None] * HIDDEN + h[None, :], row, mask=mask)


def launch(*, hidden: int, experts: int, top_k: int, dtype: str) -> Launch:
    """Return the launch for T = n tokens; ``dtype`` is Triton's name of the activations' type."""
    block_h = power_of_two(hidden, most=1024)
    return Launch(
        kernel="dispatch.dispatch",
        inputs={"x_ptr": dtype, "indices_ptr": "i32"},
        scalars=("tokens",),
        outputs={"rows_ptr": dtype, "offsets_ptr": "i32", "inverse_ptr": "i32"},
        constants={
            "HIDDEN": hidden,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "BLOCK_R": BLOCK_R,
            "BLOCK_C": 1024,
            "BLOCK_E": power_of_two(experts, least=2),
            "BLOCK_H": block_h,
        },
        grid=(cover(BLOCK_R, times=top_k), fixed(-(-hidden // block_h))),
    )


def cost(*, tokens: int, hidden: int, experts: int, top_k: int, itemsize: int) -> tuple[int, int]:
    """Return (bytes moved, operations) of one call."""
    rows = tokens * top_k
    return (tokens + rows) * hidden * itemsize + 8 * rows + 4 * (experts + 1), 2 * rows
