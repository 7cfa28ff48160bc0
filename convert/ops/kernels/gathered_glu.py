"""GatheredGLU: ``act(x gate) * (x up)`` of the inputs that are kept, then the thresholds of the hidden values.

Gate and up share one pass over x and one mask of rows. What the thresholds leave out of the result is exactly zero, and
GatheredLinear reads no weight for it. The result is rounded to its own type before it is compared with its threshold,
as the operators that this one takes the place of do.

Bytes: the rows of gate and up whose input is kept, T*H of x, 8*I of limits; T*I written. FLOPs: 4*T*I a row of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels import gathered
from moedge.convert.ops.kernels.gathered import kept_rows, rows, tile, values
from moedge.convert.ops.kernels.grouped_glu import ACTIVATIONS, activate
from moedge.convert.ops.kernels.launch import Launch


@triton.jit
def keep_large(h, limits_ptr, n, N: tl.constexpr):
    """Leave small values out of h [.., len(n)], float32 that holds numbers of the result's type."""
    limit = tl.load(limits_ptr + n, mask=n < N, other=1.0)
    width = tl.load(limits_ptr + N + n, mask=n < N, other=1.0)
    # Rounded as IEEE says: a factor of the reference, to the bit. NaN times any factor is NaN.
    part = tl.div_rn(tl.abs(h) - limit, width)
    return h * tl.minimum(tl.maximum(part, 0.0), 1.0)


@triton.jit
def gemv(
    x_ptr, gate_ptr, up_ptr, limits_ptr, y_ptr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [T, H], gate and up [H, I], limits float32 [2, I] -> y [T, I]; one token a program."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * HIDDEN
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    x0, x1 = values(x_ptr, 0, HIDDEN, BLOCK_K), values(x_ptr, BLOCK_K, HIDDEN, BLOCK_K)
    for start in range(0, HIDDEN, 2 * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        g0, u0 = rows(gate_ptr, k, n, x0 != 0, WIDTH), rows(up_ptr, k, n, x0 != 0, WIDTH)
        k += BLOCK_K
        g1, u1 = rows(gate_ptr, k, n, x1 != 0, WIDTH), rows(up_ptr, k, n, x1 != 0, WIDTH)
        # The next masks are known before the next loads.
        ahead0 = values(x_ptr, start + 2 * BLOCK_K, HIDDEN, BLOCK_K)
        ahead1 = values(x_ptr, start + 3 * BLOCK_K, HIDDEN, BLOCK_K)
        g += x0[:, None] * g0.to(tl.float32)
        u += x0[:, None] * u0.to(tl.float32)
        g += x1[:, None] * g1.to(tl.float32)
        u += x1[:, None] * u1.to(tl.float32)
        x0, x1 = ahead0, ahead1
    h = (activate(tl.sum(g, 0), ACTIVATION) * tl.sum(u, 0)).to(y_ptr.dtype.element_ty).to(tl.float32)
    y = keep_large(h, limits_ptr, n, WIDTH)
    tl.store(y_ptr + row * WIDTH + n, y.to(y_ptr.dtype.element_ty), mask=n < WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def gemm(
    x_ptr, gate_ptr, up_ptr, limits_ptr, tokens, y_ptr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """X [T, H], gate and up [H, I], limits float32 [2, I] -> y [T, I]; BLOCK_M tokens a program."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tokens
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        x = tile(x_ptr, row, valid, start, HIDDEN, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)
        keep = kept_rows(x, start, HIDDEN, BLOCK_K, SKIP)
        g = tl.dot(x, rows(gate_ptr, k, n, keep, WIDTH), g, input_precision="ieee")
        u = tl.dot(x, rows(up_ptr, k, n, keep, WIDTH), u, input_precision="ieee")
    h = (activate(g, ACTIVATION) * u).to(y_ptr.dtype.element_ty).to(tl.float32)
    y = keep_large(h, limits_ptr, n[None, :], WIDTH)
    target = y_ptr + row.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (n < WIDTH)[None, :])


def launch(*, hidden: int, width: int, activation: str, dtype: str, path: str) -> Launch:
    """Return the launch for T = n tokens.

    Args:
        hidden: H. width: I.
        activation: a name in :data:`ACTIVATIONS`.
        dtype: Triton's name of the activations' and weights' type.
        path: a name in ``gathered.PATHS``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    blocks, grid, warps, stages = gathered.shapes(path=path, n=width, k=hidden, dtype=dtype, products=2)
    return Launch(
        kernel="gathered_glu." + ("gemv" if path == "gemv" else "gemm"),
        inputs={"x_ptr": dtype, "gate_ptr": dtype, "up_ptr": dtype, "limits_ptr": "fp32"},
        outputs={"y_ptr": dtype},
        constants={"HIDDEN": hidden, "WIDTH": width, "ACTIVATION": activation} | blocks,
        grid=grid,
        scalars=() if path == "gemv" else ("tokens",),
        warps=warps,
        stages=stages,
    )


def cost(*, tokens: int, hidden: int, width: int, itemsize: int, keep: float) -> tuple[int, int]:
    """Return (bytes moved, FLOPs) of one call; ``keep``: share of the inputs that a token keeps."""
    channels = round(gathered.reads(keep=keep, tokens=tokens) * hidden)
    moved = (channels * 2 * width + tokens * (hidden + width)) * itemsize + 8 * width
    return moved, 4 * tokens * channels * width
