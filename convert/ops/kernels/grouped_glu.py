"""GroupedGLU: ``act(gate_e row) * (up_e row)`` with the expert e that owns the row.

Both products share one pass over the rows and end in one multiplication, so the two [T*k, I] intermediates never reach
memory. Decode reads the selected experts' gate and up once (bandwidth-bound); prefill is a matrix product per expert.

Bytes: weights of the experts that own rows, once; rows T*k*H read, T*k*I written. FLOPs: 4*T*k*I*H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels import grouped
from moedge.convert.ops.kernels.grouped import gemm_rows, gemm_step, gemv_step, owner_of_row, owner_of_tile
from moedge.convert.ops.kernels.launch import Launch

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """Apply the gate activation in float32."""
    if ACTIVATION == "silu":
        return g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z), without the cancellation of 1 + tanh for negative z
        return g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))


@triton.jit
def gemv(
    rows_ptr, offsets_ptr, gate_ptr, up_ptr, y_ptr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows [R, H], offsets int32 [E+1], gate and up [E, I, H] -> y [R, I]; one row a program."""
    row = tl.program_id(0)
    expert = owner_of_row(offsets_ptr, row, EXPERTS, BLOCK_E)
    if expert < EXPERTS:
        gate_ptr += expert.to(tl.int64) * (WIDTH * HIDDEN)
        up_ptr += expert.to(tl.int64) * (WIDTH * HIDDEN)
        rows_ptr += row.to(tl.int64) * HIDDEN
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        g = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        u = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            g = gemv_step(g, rows_ptr, gate_ptr, n, start, WIDTH, HIDDEN, BLOCK_K)
            u = gemv_step(u, rows_ptr, up_ptr, n, start, WIDTH, HIDDEN, BLOCK_K)
        y = activate(tl.sum(g, 1), ACTIVATION) * tl.sum(u, 1)
        tl.store(y_ptr + row.to(tl.int64) * WIDTH + n, y.to(y_ptr.dtype.element_ty), mask=n < WIDTH)


@triton.jit
def gemm(
    rows_ptr, offsets_ptr, gate_ptr, up_ptr, y_ptr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows [R, H], offsets int32 [E+1], gate and up [E, I, H] -> y [R, I]; BLOCK_M rows a program."""
    expert, first, end = owner_of_tile(offsets_ptr, tl.program_id(0), EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        gate_ptr += expert.to(tl.int64) * (WIDTH * HIDDEN)
        up_ptr += expert.to(tl.int64) * (WIDTH * HIDDEN)
        row = first + tl.arange(0, BLOCK_M)
        valid = row < end
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            x = gemm_rows(rows_ptr, row, valid, start, HIDDEN, BLOCK_K)
            g = gemm_step(g, x, gate_ptr, n, start, WIDTH, HIDDEN, BLOCK_K)
            u = gemm_step(u, x, up_ptr, n, start, WIDTH, HIDDEN, BLOCK_K)
        y = activate(g, ACTIVATION) * u
        target = y_ptr + row.to(tl.int64)[:, None] * WIDTH + n[None, :]
        tl.store(target, y.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (n < WIDTH)[None, :])


def launch(*, hidden: int, width: int, experts: int, activation: str, dtype: str, path: str) -> Launch:
    """Return the launch for R = n rows.

    Args:
        hidden: H. width: I. experts: E.
        activation: a name in :data:`ACTIVATIONS`.
        dtype: Triton's name of the rows' and weights' type.
        path: a name in ``grouped.PATHS``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    blocks, grid, warps, stages = grouped.shapes(path=path, n=width, k=hidden, experts=experts, dtype=dtype, products=2)
    return Launch(
        kernel="grouped_glu." + ("gemv" if path == "gemv" else "gemm"),
        inputs={"rows_ptr": dtype, "offsets_ptr": "i32", "gate_ptr": dtype, "up_ptr": dtype},
        outputs={"y_ptr": dtype},
        constants={"HIDDEN": hidden, "WIDTH": width, "EXPERTS": experts, "ACTIVATION": activation} | blocks,
        grid=grid,
        warps=warps,
        stages=stages,
    )


def cost(*, rows: int, hidden: int, width: int, experts: int, itemsize: int) -> tuple[int, int]:
    """Return (bytes moved, FLOPs) of one call."""
    weights = grouped.reads(rows=rows, experts=experts) * 2 * hidden * width
    return (weights + rows * (hidden + width)) * itemsize, 4 * rows * hidden * width
