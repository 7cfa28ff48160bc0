"""GatheredLinear: ``x weight`` of the inputs that are kept: the down projection of a gathered FFN, or another product.

Bytes: the rows of the weight whose input is kept, T*K of x; T*N written. FLOPs: 2*T*N for each of those rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels import gathered
from moedge.convert.ops.kernels.gathered import kept_rows, rows, tile, values
from moedge.convert.ops.kernels.launch import Launch


@triton.jit
def gemv(
    x_ptr, weight_ptr, y_ptr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [T, K], weight [K, N] -> y [T, N]; one token a program."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * INPUTS
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    x0, x1 = values(x_ptr, 0, INPUTS, BLOCK_K), values(x_ptr, BLOCK_K, INPUTS, BLOCK_K)
    for start in range(0, INPUTS, 2 * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w0 = rows(weight_ptr, k, n, x0 != 0, OUTPUTS)
        w1 = rows(weight_ptr, k + BLOCK_K, n, x1 != 0, OUTPUTS)
        # The next masks are known before the next loads.
        ahead0 = values(x_ptr, start + 2 * BLOCK_K, INPUTS, BLOCK_K)
        ahead1 = values(x_ptr, start + 3 * BLOCK_K, INPUTS, BLOCK_K)
        acc += x0[:, None] * w0.to(tl.float32)
        acc += x1[:, None] * w1.to(tl.float32)
        x0, x1 = ahead0, ahead1
    y = tl.sum(acc, 0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * OUTPUTS + n, y, mask=n < OUTPUTS)


@triton.jit(do_not_specialize=["tokens"])
def gemm(
    x_ptr, weight_ptr, tokens, y_ptr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """X [T, K], weight [K, N] -> y [T, N]; BLOCK_M tokens a program."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tokens
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        x = tile(x_ptr, row, valid, start, INPUTS, BLOCK_K)
        keep = kept_rows(x, start, INPUTS, BLOCK_K, SKIP)
        w = rows(weight_ptr, start + tl.arange(0, BLOCK_K), n, keep, OUTPUTS)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    target = y_ptr + row.to(tl.int64)[:, None] * OUTPUTS + n[None, :]
    tl.store(target, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (n < OUTPUTS)[None, :])


def launch(*, inputs: int, outputs: int, dtype: str, path: str) -> Launch:
    """Return the launch for T = n tokens.

    Args:
        inputs: K. outputs: N.
        dtype: Triton's name of the activations' and weights' type.
        path: a name in ``gathered.PATHS``.
    """
    blocks, grid, warps, stages = gathered.shapes(path=path, n=outputs, k=inputs, dtype=dtype, products=1)
    return Launch(
        kernel="gathered_linear." + ("gemv" if path == "gemv" else "gemm"),
        inputs={"x_ptr": dtype, "weight_ptr": dtype},
        outputs={"y_ptr": dtype},
        constants={"INPUTS": inputs, "OUTPUTS": outputs} | blocks,
        grid=grid,
        scalars=() if path == "gemv" else ("tokens",),
        warps=warps,
        stages=stages,
    )


def cost(*, tokens: int, inputs: int, outputs: int, itemsize: int, keep: float) -> tuple[int, int]:
    """Return (bytes moved, FLOPs) of one call; ``keep``: share of the inputs that a token keeps."""
    channels = round(gathered.reads(keep=keep, tokens=tokens) * inputs)
    return (channels * outputs + tokens * (inputs + outputs)) * itemsize, 2 * tokens * channels * outputs
