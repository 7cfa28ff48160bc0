"""What the grouped products share: which expert owns a tile, one step of a product with any kind of weights, shapes.

Rows lie grouped by expert (``offsets`` int32 [E+1]); how many each expert owns is known on the device only. The grid is
therefore the most tiles that any split of n rows into E groups can need, and a program without a tile returns.

Two paths compute the same:
  ``gemm``  tiles of BLOCK_M rows on tensor cores; for prefill.
  ``gemv``  one row a program, products on CUDA cores; for decode (T <= 8), where reading the weights is all the work.

Weights are [E, N, K] in the activations' type, or int8 with a scale for each group of consecutive K: ``bits`` 8 holds
one value a byte, ``bits`` 4 two (``pack.py``). Integers are exact in every activation type, so a group's product is
exact up to its float32 sum, and the scale is applied in float32.
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
def low(byte):
    """Return the signed low nibble of int8 values."""
    return (byte.to(tl.int32) << 28) >> 28


@triton.jit
def high(byte):
    """Return the signed high nibble of int8 values."""
    return byte.to(tl.int32) >> 4


@triton.jit
def gemm_step(
    acc, x, x_high, weight_ptr, scales_ptr, n, start,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add x [M, BLOCK_K] times the weights at columns start.. to acc [M, BLOCK_N]; ``weight_ptr`` is the expert's.

    With 4 bits x and x_high are the halves of the group, [M, BLOCK_K / 2] each.
    """
    if BITS == 16:
        k = start + tl.arange(0, BLOCK_K)
        mask = (n < N)[None, :] & (k < K)[:, None]
        w = tl.load(weight_ptr + n[None, :].to(tl.int64) * K + k[:, None], mask=mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    else:
        # BLOCK_K divides GROUP or, with 4 bits, equals it: one scale a row of weights and step.
        groups: tl.constexpr = (K + GROUP - 1) // GROUP
        scale = tl.load(scales_ptr + n.to(tl.int64) * groups + start // GROUP, mask=n < N, other=0.0)
        if BITS == 8:
            k = start + tl.arange(0, BLOCK_K)
            mask = (n < N)[None, :] & (k < K)[:, None]
            q = tl.load(weight_ptr + n[None, :].to(tl.int64) * K + k[:, None], mask=mask, other=0)
            product = tl.dot(x, q.to(x.dtype), input_precision="ieee")
        else:
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            bytes_in_row: tl.constexpr = groups * GROUP // 2
            q = tl.load(
                weight_ptr + n[None, :].to(tl.int64) * bytes_in_row + byte[:, None], mask=(n < N)[None, :], other=0
            )
            product = tl.dot(x, low(q).to(x.dtype), input_precision="ieee")
            product = tl.dot(x_high, high(q).to(x.dtype), product, input_precision="ieee")
        acc += product * scale.to(tl.float32)[None, :]
    return acc


@triton.jit
def gemm_rows(x_ptr, row, valid, start, K: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr):
    """Load columns of x [*, K] for one step: all BLOCK_K of them or, with 4 bits, the half ``HALF`` of the group."""
    columns: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    k = start + HALF * columns + tl.arange(0, columns)
    return tl.load(
        x_ptr + row.to(tl.int64)[:, None] * K + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0
    )


@triton.jit
def gemv_step(
    acc, x_ptr, weight_ptr, scales_ptr, n, start,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of one row of x and BLOCK_K stored weights a column to acc [BLOCK_N, BLOCK_K], all float32."""
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    if BITS == 4:
        half: tl.constexpr = GROUP // 2
        bytes_in_row: tl.constexpr = groups * half
        byte = start + tl.arange(0, BLOCK_K)
        group = byte // half
        k = group * GROUP + byte % half
        mask = (n < N)[:, None] & (byte < bytes_in_row)[None, :]
        q = tl.load(weight_ptr + n[:, None].to(tl.int64) * bytes_in_row + byte[None, :], mask=mask, other=0)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x_high = tl.load(x_ptr + k + half, mask=k + half < K, other=0.0).to(tl.float32)
        product = x[None, :] * low(q).to(tl.float32) + x_high[None, :] * high(q).to(tl.float32)
    else:
        k = start + tl.arange(0, BLOCK_K)
        mask = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight_ptr + n[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        product = x[None, :] * w.to(tl.float32)
        group = k // GROUP
    if BITS != 16:
        scale = tl.load(scales_ptr + n[:, None].to(tl.int64) * groups + group[None, :], mask=mask, other=0.0)
        product *= scale.to(tl.float32)
    return acc + product


@triton.jit
def expert_of(weight_ptr, expert, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Return the pointer to an expert's weights."""
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    if BITS == 4:
        return weight_ptr + expert.to(tl.int64) * (N * (groups * GROUP // 2))
    return weight_ptr + expert.to(tl.int64) * (N * K)


@triton.jit
def scales_of(scales_ptr, expert, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """Return the pointer to an expert's scales [N, groups]."""
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    return scales_ptr + expert.to(tl.int64) * (N * groups)


def path_for(tokens: int, top_k: int, experts: int) -> str:
    """Return the path for T tokens: ``gemv`` up to 8, else the tile that an even split of the rows fills."""
    if tokens <= GEMV_TOKENS:
        return "gemv"
    even = tokens * top_k / experts
    return next((path for path, rows in PATHS.items() if rows and even <= rows), "gemm64")


def shapes(
    *, path: str, n: int, k: int, experts: int, bits: int, group: int, dtype: str, products: int
) -> tuple[dict[str, int], tuple[Extent, Extent], int, int]:
    """Return (block constants, grid over n rows, warps, stages) of a path for weights [E, n, k].

    ``products`` is how many weights share the rows (GroupedGLU: 2); more of them, narrower tiles.
    """
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}; known: {', '.join(PATHS)}")
    block_e = power_of_two(experts, least=2)
    if path == "gemv":
        # Weights a step: 32 a thread, so that the float32 sums stay in registers.
        stored = -(-k // group) * group // 2 if bits == 4 else k
        block_k = power_of_two(stored, least=16, most=512)
        block_n = power_of_two(n, least=1, most=max(1, 4096 // (products * (2 if bits == 4 else 1)) // block_k))
        blocks = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_E": block_e}
        return blocks, (Extent(1, 0, 1), fixed(-(-n // block_n))), 4, 1
    block_m = PATHS[path]
    block_k = 32 if dtype == "fp32" else 64
    if bits == 16:
        block_k = power_of_two(k, least=16, most=block_k)
    elif bits == 8:
        block_k = min(group, block_k)
    else:
        block_k = group
    widest = 64 if products == 2 or block_k > 64 else 128
    # float32 products run on CUDA cores, operands and sums in registers: a narrower tile, or they spill.
    block_n = power_of_two(n, least=16, most=32 if dtype == "fp32" else widest)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_E": block_e}
    # n rows in E groups: a group of r rows takes at most (r + block_m - 1) / block_m tiles
    grid = (Extent(1, experts * (block_m - 1), block_m), fixed(-(-n // block_n)))
    # Integer weights pass through registers on their way to the tensor cores: share them among more threads.
    warps = 8 if bits != 16 and block_m == 64 else 4
    return blocks, grid, warps, 3 if block_k <= 64 else 2


def check_weights(*, bits: int, group: int, dtype: str) -> None:
    """Refuse weight kinds that the kernels do not have."""
    if bits not in (4, 8, 16):
        raise ValueError(f"weights of {bits} bits; known: 4, 8, and 16 for the activations' type")
    if bits != 16 and (group < 32 or group > 256 or group & (group - 1)):
        raise ValueError(f"scale group of {group}: need a power of two in 32..256")
    if dtype not in ("fp32", "fp16", "bf16"):
        raise ValueError(f"activations of type {dtype}; known: fp32, fp16, bf16")


def weight_bytes(*, n: int, k: int, bits: int, group: int, itemsize: int) -> int:
    """Return the bytes of one expert's matrix [n, k], scales included."""
    if bits == 16:
        return n * k * itemsize
    groups = -(-k // group)
    return n * ((groups * group // 2 if bits == 4 else k) + groups * itemsize)


def reads(*, rows: int, experts: int) -> int:
    """Return how many experts a call reads: the design assumes an even spread, and reuse within a call."""
    return min(rows, experts)
