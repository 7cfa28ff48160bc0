"""Combine: each token's weighted sum over its experts' rows, plus what its unselected experts contribute on average.

A program owns a block of tokens and columns and adds in the order of the choices, in float32: equal inputs give equal
bits. The compensation is the product of a 0/1 matrix (exact in every type) with [E, H]; with every expert selected the
matrix is zero and nothing is added.

Bytes: T*k*H read and T*H written in the activations' type, E*H for the compensation once a block of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels.launch import Launch, cover, fixed, power_of_two


@triton.jit
def _combine(
    rows_ptr, inverse_ptr, indices_ptr, weights_ptr, compensation_ptr, tokens, y_ptr,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, COMPENSATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    valid = token < tokens
    in_row = h < HIDDEN
    mask = valid[:, None] & in_row[None, :]
    choice = token.to(tl.int64) * TOP_K
    y = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for j in range(TOP_K):
        row = tl.load(inverse_ptr + choice + j, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + choice + j, mask=valid, other=0.0)
        part = tl.load(rows_ptr + row[:, None] * HIDDEN + h[None, :], mask=mask, other=0.0)
        y += weight[:, None] * part.to(tl.float32)
    if COMPENSATE:
        for first in range(0, EXPERTS, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            # int32, not a mask: a loop-carried value of one type in the interpreter and in the compiler
            omitted = tl.full([BLOCK_T, BLOCK_E], 1, tl.int32)
            for j in range(TOP_K):
                index = tl.load(indices_ptr + choice + j, mask=valid, other=-1)
                omitted = tl.where(index[:, None] == e[None, :], 0, omitted)
            vectors = tl.load(
                compensation_ptr + e.to(tl.int64)[:, None] * HIDDEN + h[None, :],
                mask=(e < EXPERTS)[:, None] & in_row[None, :],
                other=0.0,
            )
            y += tl.dot(omitted.to(vectors.dtype), vectors, input_precision="ieee")
    tl.store(y_ptr + token.to(tl.int64)[:, None] * HIDDEN + h[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def combine(
    rows_ptr, inverse_ptr, indices_ptr, weights_ptr, tokens, y_ptr,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows [T*k, H], inverse int32 [T*k], indices int32 [T, k], weights float32 [T, k] -> y [T, H]."""
    _combine(
        rows_ptr, inverse_ptr, indices_ptr, weights_ptr, rows_ptr, tokens, y_ptr,
        HIDDEN, EXPERTS, TOP_K, False, BLOCK_T, BLOCK_E, BLOCK_H,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def combine_compensated(
    rows_ptr, inverse_ptr, indices_ptr, weights_ptr, compensation_ptr, tokens, y_ptr,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The same with compensation [E, H] in the rows' type."""
    _combine(
        rows_ptr, inverse_ptr, indices_ptr, weights_ptr, compensation_ptr, tokens, y_ptr,
        HIDDEN, EXPERTS, TOP_K, True, BLOCK_T, BLOCK_E, BLOCK_H,
    )  # fmt: skip


def launch(*, hidden: int, experts: int, top_k: int, dtype: str, compensated: bool) -> Launch:
    """Return the launch for T = n tokens; ``dtype`` is Triton's name of the rows' type.

    With compensation a block holds 16 tokens, the least that a tensor core takes; without, 4, to fill more programs.
    """
    block_t, block_h = (16 if compensated else 4), power_of_two(hidden, least=16, most=128 if compensated else 512)
    inputs = {"rows_ptr": dtype, "inverse_ptr": "i32", "indices_ptr": "i32", "weights_ptr": "fp32"}
    return Launch(
        kernel="combine.combine_compensated" if compensated else "combine.combine",
        inputs=inputs | ({"compensation_ptr": dtype} if compensated else {}),
        scalars=("tokens",),
        outputs={"y_ptr": dtype},
        constants={
            "HIDDEN": hidden,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "BLOCK_T": block_t,
            "BLOCK_E": power_of_two(experts, least=16, most=64),
            "BLOCK_H": block_h,
        },
        grid=(cover(block_t), fixed(-(-hidden // block_h))),
    )


def cost(*, tokens: int, hidden: int, experts: int, top_k: int, itemsize: int, compensated: bool) -> tuple[int, int]:
    """Return (bytes moved, operations) of one call."""
    rows = tokens * top_k
    moved = (rows + tokens) * hidden * itemsize + 12 * rows
    operations = 2 * rows * hidden
    if compensated:
        moved += experts * hidden * itemsize
        operations += 2 * tokens * experts * hidden
    return moved, operations
