"""GroupedLinear: ``weight_e row`` with the expert e that owns the row; the down projection of the experts.

Bytes: weights of the experts that own rows, once; rows T*k*I read, T*k*H written. FLOPs: 2*T*k*I*H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels import grouped
from moedge.convert.ops.kernels.grouped import (
    expert_of,
    gemm_rows,
    gemm_step,
    gemv_step,
    owner_of_row,
    owner_of_tile,
    scales_of,
)
from moedge.convert.ops.kernels.launch import Launch


@triton.jit
def _gemv(
    rows_ptr, offsets_ptr, weight_ptr, scales_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    expert = owner_of_row(offsets_ptr, row, EXPERTS, BLOCK_E)
    if expert < EXPERTS:
        weight_ptr = expert_of(weight_ptr, expert, HIDDEN, WIDTH, BITS, GROUP)
        scales_ptr = scales_of(scales_ptr, expert, HIDDEN, WIDTH, GROUP)
        rows_ptr += row.to(tl.int64) * WIDTH
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        stored: tl.constexpr = ((WIDTH + GROUP - 1) // GROUP) * (GROUP // 2) if BITS == 4 else WIDTH
        for start in range(0, stored, BLOCK_K):
            acc = gemv_step(acc, rows_ptr, weight_ptr, scales_ptr, n, start, HIDDEN, WIDTH, BITS, GROUP, BLOCK_K)
        y = tl.sum(acc, 1).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row.to(tl.int64) * HIDDEN + n, y, mask=n < HIDDEN)


@triton.jit
def _gemm(
    rows_ptr, offsets_ptr, weight_ptr, scales_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    expert, first, end = owner_of_tile(offsets_ptr, tl.program_id(0), EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        weight_ptr = expert_of(weight_ptr, expert, HIDDEN, WIDTH, BITS, GROUP)
        scales_ptr = scales_of(scales_ptr, expert, HIDDEN, WIDTH, GROUP)
        row = first + tl.arange(0, BLOCK_M)
        valid = row < end
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            x = gemm_rows(rows_ptr, row, valid, start, WIDTH, BITS, BLOCK_K, 0)
            x_high = x
            if BITS == 4:
                x_high = gemm_rows(rows_ptr, row, valid, start, WIDTH, BITS, BLOCK_K, 1)
            acc = gemm_step(acc, x, x_high, weight_ptr, scales_ptr, n, start, HIDDEN, WIDTH, BITS, GROUP, BLOCK_K)
        target = y_ptr + row.to(tl.int64)[:, None] * HIDDEN + n[None, :]
        tl.store(target, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (n < HIDDEN)[None, :])


@triton.jit
def gemv(
    rows_ptr, offsets_ptr, weight_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows [R, I], offsets int32 [E+1], weight [E, H, I] -> y [R, H]; one row a program."""
    _gemv(
        rows_ptr, offsets_ptr, weight_ptr, weight_ptr, y_ptr,
        WIDTH, HIDDEN, EXPERTS, BITS, GROUP, BLOCK_N, BLOCK_K, BLOCK_E,
    )  # fmt: skip


@triton.jit
def gemv_scaled(
    rows_ptr, offsets_ptr, weight_ptr, scales_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The same with int8 or packed int4 weights and scales [E, H, groups]."""
    _gemv(
        rows_ptr, offsets_ptr, weight_ptr, scales_ptr, y_ptr,
        WIDTH, HIDDEN, EXPERTS, BITS, GROUP, BLOCK_N, BLOCK_K, BLOCK_E,
    )  # fmt: skip


@triton.jit
def gemm(
    rows_ptr, offsets_ptr, weight_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows [R, I], offsets int32 [E+1], weight [E, H, I] -> y [R, H]; BLOCK_M rows a program."""
    _gemm(
        rows_ptr, offsets_ptr, weight_ptr, weight_ptr, y_ptr,
        WIDTH, HIDDEN, EXPERTS, BITS, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E,
    )  # fmt: skip


@triton.jit
def gemm_scaled(
    rows_ptr, offsets_ptr, weight_ptr, scales_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The same with int8 or packed int4 weights and scales [E, H, groups]."""
    _gemm(
        rows_ptr, offsets_ptr, weight_ptr, scales_ptr, y_ptr,
        WIDTH, HIDDEN, EXPERTS, BITS, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E,
    )  # fmt: skip


def launch(*, hidden: int, width: int, experts: int, dtype: str, path: str, bits: int = 16, group: int = 32) -> Launch:
    """Return the launch for R = n rows; the arguments are those of ``grouped_glu.launch``."""
    grouped.check_weights(bits=bits, group=group, dtype=dtype)
    blocks, grid, warps, stages = grouped.shapes(
        path=path, n=hidden, k=width, experts=experts, bits=bits, group=group, dtype=dtype, products=1
    )
    weights = {"weight_ptr": dtype} if bits == 16 else {"weight_ptr": "i8", "scales_ptr": dtype}
    return Launch(
        kernel="grouped_linear." + ("gemv" if path == "gemv" else "gemm") + ("" if bits == 16 else "_scaled"),
        inputs={"rows_ptr": dtype, "offsets_ptr": "i32"} | weights,
        outputs={"y_ptr": dtype},
        constants={"WIDTH": width, "HIDDEN": hidden, "EXPERTS": experts, "BITS": bits, "GROUP": group} | blocks,
        grid=grid,
        warps=warps,
        stages=stages,
    )


def cost(*, rows: int, hidden: int, width: int, experts: int, bits: int, group: int, itemsize: int) -> tuple[int, int]:
    """Return (bytes moved, FLOPs) of one call."""
    weights = grouped.weight_bytes(n=hidden, k=width, bits=bits, group=group, itemsize=itemsize)
    moved = grouped.reads(rows=rows, experts=experts) * weights + rows * (hidden + width) * itemsize
    return moved, 2 * rows * hidden * width
