"""Versions and limits of runtimes that several rules ask for. What one rule alone cannot do is in its ``refuse``.

Facts tagged [M] were measured by executing the node, [R] read; see docs/lowering.md for the table.
"""

from __future__ import annotations

from moedge._versions import installed

OLDEST_ORT = (1, 23)
"""The oldest ONNX Runtime whose MoE and GroupQueryAttention were executed with these node forms."""


def onnxruntime_version() -> tuple[int, ...] | None:
    """Return the installed ONNX Runtime's (major, minor), or None."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        if version := installed(name):
            return tuple(int(part) for part in version.split(".")[:2])
    return None


def runtime() -> str | None:
    """Whether an ONNX Runtime is here to execute the self-tests, and new enough."""
    found = onnxruntime_version()
    if found is None:
        return "onnxruntime is not installed to execute the rewrites; pip install 'moedge[cpu]'"
    if found < OLDEST_ORT:
        return f"onnxruntime {'.'.join(map(str, found))} is older than {'.'.join(map(str, OLDEST_ORT))}"
    return None


def half_source(dtypes: set[str]) -> str | None:
    """Typing a graph as half precision. ``dtypes``: the weights' dtypes, integers included."""
    floats = {name for name in dtypes if "float" in name}
    return None if floats <= {"float"} else f"the portable graph must be float32, it holds {', '.join(sorted(floats))}"


WEIGHT_BLOCKS = (128, 64, 32, 16)
"""Blocks of 4-bit weights, the first that divides a row is taken. NVIDIA documents 128 and 64 for TensorRT; all four
build for SM80, 86, 89, 120 and 121 on TensorRT-RTX 1.7.1, inside the product [M]. A last block that is not whole is
refused by the parser [M], and so are unsigned integers [M]: blocks are symmetric."""
DOCUMENTED_BLOCK = 64


def weight_block(columns: int) -> int:
    """Block of 4-bit rows of ``columns`` inputs; 0 where none divides them."""
    return next((block for block in WEIGHT_BLOCKS if columns % block == 0), 0)


def weights_rtx(*, columns: int) -> str | None:
    """``DequantizeLinear`` of 4-bit blocks in TensorRT for RTX. Rows of 8 bits have one scale and any width."""
    if weight_block(columns):
        return None
    return (
        f"its rows of {columns} inputs are no whole number of blocks of {WEIGHT_BLOCKS[-1]}, and the parser refuses a "
        "last block that is not whole [M]; take tensorrt-rtx-int8, which takes any width, or tensorrt-rtx"
    )
