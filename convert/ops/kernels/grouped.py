"""What the grouped products share: which expert owns a tile, one step of a product, shapes.

Rows lie grouped by expert (``offsets`` int32 [E+1]); how many each expert owns is known on the device only. The grid is
therefore the most tiles that any split of n rows into E groups can need, and a program without a tile returns.

Two paths compute the same:
  ``gemm``  tiles of BLOCK_M rows on tensor cores; for prefill.
  ``gemv``  one row a program, products on CUDA cores; for decode (T <= 8), where reading the weights is all the work.

Weights are [E, N, K] in the activations' type; sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels.launch import Extent, fixed, power_of_two

GEMV_TOKENS = 8
"""Most tokens for which PyTorch takes the ``gemv`` path; TensorRT measures instead."""

PATHS = {"gemv": 0, "gemm16": 16, "gemm32": 32, "gemm64": 64}
"""Path -> rows of its tile (0: one row a program)."""


@triton.jit
def owner_of_row(offsets_ptr, row, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the expert that owns a row: the number of experts that end at or before it."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(offsets_ptr + 1 + e, mask=e < EXPERTS, other=2147483647)
    return tl.sum((end <= row).to(tl.int32), 0)


@triton.jit
def owner_of_tile(offsets_ptr, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (expert, first row, end of the expert's rows) of a tile; expert >= EXPERTS: there is no such tile."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + e, mask=e < EXPERTS, other=0)
    end = tl.load(offsets_ptr + 1 + e, mask=e < EXPERTS, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    mine = e == expert
    tile_in_expert = tile - tl.sum(tl.where(e < expert, tiles, 0), 0)
    first = tl.sum(tl.where(mine, begin, 0), 0) + tile_in_expert * BLOCK_M
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def gemm_step(
    acc, x, weight_ptr, n, start, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add x [M, BLOCK_K] times the weights at columns start.. to acc [M, BLOCK_N]; ``weight_ptr`` is the expert's."""
    k = start + tl.arange(0, BLOCK_K)
    mask = (n < N)[None, :] & (k < K)[:, None]
    w = tl.load(weight_ptr + n[None, :].to(tl.int64) * K + k[:, None], mask=mask, other=0.0)
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def gemm_rows(x_ptr, row, valid, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load columns start.. of x [*, K] for one step: BLOCK_K of them."""
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(
        x_ptr + row.to(tl.int64)[:, None] * K + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0
    )


@triton.jit
def gemv_step(
    acc, x_ptr, weight_ptr, n, start, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of one row of x and BLOCK_K weights a column to acc [BLOCK_N, BLOCK_K], all float32."""
    k = start + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(weight_ptr + n[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return acc + x[None, :] * w.to(tl.float32)


def path_for(tokens: int, top_k: int, experts: int) -> str:
    """Return the path for T tokens: ``gemv`` up to 8, else the tile that an even split of the rows fills."""
    if tokens <= GEMV_TOKENS:
        return "gemv"
    even = tokens * top_k / experts
    return next((path for path, rows in PATHS.items() if rows and even <= rows), "gemm64")


def shapes(
    *, path: str, n: int, k: int, experts: int, dtype: str, products: int
) -> tuple[dict[str, int], tuple[Extent, Extent], int, int]:
    """Return (block constants, grid over n rows, warps, stages) of a path for weights [E, n, k].

    ``products`` is how many weights share the rows (GroupedGLU: 2); more of them, narrower tiles.

    Raises:
        ValueError: a path or a type that no kernel has.
    """
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}; known: {', '.join(PATHS)}")
    if dtype not in ("fp32", "fp16", "bf16"):
        raise ValueError(f"activations of type {dtype}; known: fp32, fp16, bf16")
    block_e = power_of_two(experts, least=2)
    if path == "gemv":
        # Weights a step: 32 a thread, so that the float32 sums stay in registers.
        block_k = power_of_two(k, least=16, most=512)
        block_n = power_of_two(n, least=1, most=max(1, 4096 // products // block_k))
        blocks = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_E": block_e}
        return blocks, (Extent(1, 0, 1), fixed(-(-n // block_n))), 4, 1
    block_m = PATHS[path]
    block_k = power_of_two(k, least=16, most=32 if dtype == "fp32" else 64)
    # float32 products run on CUDA cores, operands and sums in registers: a narrower tile, or they spill.
    block_n = power_of_two(n, least=16, most=32 if dtype == "fp32" else 64 if products == 2 else 128)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_E": block_e}
    # n rows in E groups: a group of r rows takes at most (r + block_m - 1) / block_m tiles
    grid = (Extent(1, experts * (block_m - 1), block_m), fixed(-(-n // block_n)))
    return blocks, grid, 4, 3


def reads(*, rows: int, experts: int) -> int:
    """Return how many experts a call reads: the design assumes an even spread, and reuse within a call."""
    return min(rows, experts)
