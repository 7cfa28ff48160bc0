"""What the gathered products share: which rows of a weight are read, one step of a product, shapes.

Weights are [K, N], one row for each input, in the activations' type; sums are float32. A row whose input is zero for
every token of a program is not read: its lanes of the load are masked off and cause no memory traffic. A program owns
16 or 32 columns, one or two sectors of 32 bytes of every row (16-bit weights), so a skipped row skips whole sectors,
and no list of the kept rows has to be made first. Masked-off lanes still take an instruction slot, which is of no
weight: at one token a kernel waits for memory (docs/kernels.md has the arithmetic).

Paths that compute the same:
  ``gemv``    one token a program, CUDA cores; rows that the token drops are skipped. For one token.
  ``gemm16``  16 tokens a program, tensor cores; rows that all of them drop are skipped. For few tokens.
  ``gemm64``, ``gemm128``  tiles of that many tokens, nothing is skipped: of so many tokens one keeps almost any input.

No path splits a sum between programs: every result is written once, by one program, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels.launch import Extent, cover, fixed, power_of_two

PATHS = {"gemv": 1, "gemm16": 16, "gemm64": 64, "gemm128": 128}
"""Path -> tokens of a program."""

MOST_TOKENS = {"gemv": 1, "gemm16": 16, "gemm64": 256}
"""Most tokens for which PyTorch and TensorRT for RTX take a path, ``gemm128`` above; TensorRT measures instead."""

WARPS, PROGRAMS = 2048, 128
"""Warps and programs that ``gemv`` aims at: 4 KiB of loads a warp, so 8 MiB in flight if every row is kept. An H200
needs half of that (4.8 TB/s times 0.8 microseconds) and has 132 SMs, an Orin a fiftieth and 8 or 16."""


@triton.jit
def rows(weight_ptr, k, n, keep, N: tl.constexpr):
    """Load columns n of the rows k of a weight [K, N] that are kept, zeros for the others, [len(k), len(n)]."""
    at = k[:, None].to(tl.int64) * N + n[None, :]
    return tl.load(weight_ptr + at, mask=keep[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def values(x_ptr, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load one token's inputs start.. in float32 [BLOCK_K], zero behind the last; ``x_ptr`` is the token's."""
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def tile(x_ptr, row, valid, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the inputs start.. of a tile of tokens, [BLOCK_M, BLOCK_K], zero where there is no token or no input."""
    k = start + tl.arange(0, BLOCK_K)
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(x_ptr + at, mask=valid[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def kept_rows(x, start, K: tl.constexpr, BLOCK_K: tl.constexpr, SKIP: tl.constexpr):
    """Return which rows start.. of the weight a tile of tokens needs [BLOCK_K]; NaN counts as kept."""
    k = start + tl.arange(0, BLOCK_K)
    if SKIP:
        return tl.max((x.to(tl.float32) != 0).to(tl.int32), 0) > 0
    else:
        return k < K


def path_for(tokens: int) -> str:
    """Return the path for T tokens where nothing can be measured."""
    return next((path for path, most in MOST_TOKENS.items() if tokens <= most), "gemm128")


def shapes(
    *, path: str, n: int, k: int, dtype: str, products: int
) -> tuple[dict[str, int | bool], tuple[Extent, Extent], int, int]:
    """Return (block constants, grid over T = n tokens, warps, stages) of a path for weights [k, n].

    Args:
        products: how many weights share the inputs (GatheredGLU: 2); more of them, smaller tiles.

    Raises:
        ValueError: a path or a type that no kernel has.
    """
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}; known: {', '.join(PATHS)}")
    if dtype not in ("fp32", "fp16", "bf16"):
        raise ValueError(f"activations of type {dtype}; known: fp32, fp16, bf16")
    wide = dtype == "fp32"
    if path == "gemv":
        block_n = power_of_two(n, least=2, most=32 if n >= 32 * PROGRAMS else 16)
        warps = power_of_two(WARPS // -(-n // block_n), least=4, most=16)
        # Sums of a thread, and half of the weights that it has in flight: two blocks of rows at a time. Fewer of
        # float32 weights, which take twice the registers.
        sums = (16 if wide else 32) // products
        block_k = power_of_two(-(-k // 2), least=16, most=32 * warps * sums // block_n)
        return {"BLOCK_N": block_n, "BLOCK_K": block_k}, (Extent(1, 0, 1), fixed(-(-n // block_n))), warps, 1
    block_m = PATHS[path]
    if wide:  # float32 products run on CUDA cores, operands and sums in registers: a narrower tile, or they spill
        most_n, most_k = 32, 32
    elif path == "gemm16":  # many programs, so narrow ones; many rows in flight
        most_n, most_k = 32 if n >= 32 * PROGRAMS else 16, 128
    else:
        most_n, most_k = 128 // products, 64 if path == "gemm64" else 32
    block_k, block_n = power_of_two(k, least=16, most=most_k), power_of_two(n, least=16, most=most_n)
    blocks: dict[str, int | bool] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    blocks["SKIP"] = path == "gemm16"
    return blocks, (cover(block_m), fixed(-(-n // block_n))), 8 if path == "gemm128" else 4, 3


def reads(*, keep: float, tokens: int) -> float:
    """Return the share of the rows that a call reads when each token keeps a share of its inputs, by itself."""
    return 1 - (1 - keep) ** tokens
