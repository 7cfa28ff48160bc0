"""GroupedLinear: ``weight_e row`` with the expert e that owns the row; the down projection of the experts.

Bytes: weights of the experts that own rows, once; rows T*k*I read, T*k*H written. FLOPs: 2*T*k*I*H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels import grouped
from moedge.convert.ops.kernels.grouped import gemm_rows, gemm_step, gemv_step, owner_of_row, owner_of_tile
from moedge.convert.ops.kernels.launch import Launch


@triton.jit
def gemv(
    rows_ptr, offsets_ptr, weight_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows [R, I], offsets int32 [E+1], weight [E, H, I] -> y [R, H]; one row a program."""
    row = tl.program_id(0)
    expert = owner_of_row(offsets_ptr, row, EXPERTS, BLOCK_E)
    if expert < EXPERTS:
        weight_ptr += expert.to(tl.int64) * (HIDDEN * WIDTH)
        rows_ptr += row.to(tl.int64) * WIDTH
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            acc = gemv_step(acc, rows_ptr, weight_ptr, n, start, HIDDEN, WIDTH, BLOCK_K)
        y = tl.sum(acc, 1).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row.to(tl.int64) * HIDDEN + n, y, mask=n < HIDDEN)


@triton.jit
def gemm(
    rows_ptr, offsets_ptr, weight_ptr, y_ptr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows [R, I], offsets int32 [E+1], weight [E, H, I] -> y [R, H]; BLOCK_M rows a program."""
    expert, first, end = owner_of_tile(offsets_ptr, tl.program_id(0), EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        weight_ptr += expert.to(tl.int64) * (HIDDEN * WIDTH)
        row = first + tl.arange(0, BLOCK_M)
        valid = row < end
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            x = gemm_rows(rows_ptr, row, valid, start, WIDTH, BLOCK_K)
            acc = gemm_step(acc, x, weight_ptr, n, start, HIDDEN, WIDTH, BLOCK_K)
        target = y_ptr + row.to(tl.int64)[:, None] * HIDDEN + n[None, :]
        tl.store(target, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (n < HIDDEN)[None, :])


def launch(*, hidden: int, width: int, experts: int, dtype: str, path: str) -> Launch:
    """Return the launch for R = n rows; the arguments are those of ``grouped_glu.launch``."""
    blocks, grid, warps, stages = grouped.shapes(path=path, n=hidden, k=width, experts=experts, dtype=dtype, products=1)
    return Launch(
        kernel="grouped_linear." + ("gemv" if path == "gemv" else "gemm"),
        inputs={"rows_ptr": dtype, "offsets_ptr": "i32", "weight_ptr": dtype},
        outputs={"y_ptr": dtype},
        constants={"WIDTH": width, "HIDDEN": hidden, "EXPERTS": experts} | blocks,
        grid=grid,
        warps=warps,
        stages=stages,
    )


def cost(*, rows: int, hidden: int, width: int, experts: int, itemsize: int) -> tuple[int, int]:
    """Return (bytes moved, FLOPs) of one call."""
    weights = grouped.reads(rows=rows, experts=experts) * hidden * width
    return (weights + rows * (hidden + width)) * itemsize, 2 * rows * hidden * width
