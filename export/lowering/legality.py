"""When a rewrite may be used: one predicate a rewrite, each returning None (legal) or the reason it is refused.

Facts tagged [M] were measured by executing the node, [R] read; see docs/lowering.md for the table.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST_ORT = (1, 23)
"""The oldest ONNX Runtime whose MoE and GroupQueryAttention were executed with these node forms."""


def onnxruntime_version() -> tuple[int, ...] | None:
    """Return the installed ONNX Runtime's (major, minor), or None."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return tuple(int(part) for part in version(name).split(".")[:2])
        except PackageNotFoundError:
            continue
    return None


OLDEST_QUANTISED_ORT = (1, 31)
"""QMoE with ``router_weights`` and ``accuracy_level``: 1.23 refuses the first, 1.27 the second (peers.md 5.3)."""


def runtime() -> str | None:
    """Whether an ONNX Runtime is here to execute the self-tests, and new enough."""
    installed = onnxruntime_version()
    if installed is None:
        return "onnxruntime is not installed to execute the rewrites; pip install 'moedge[cpu]'"
    if installed < OLDEST_ORT:
        return f"onnxruntime {'.'.join(map(str, installed))} is older than {'.'.join(map(str, OLDEST_ORT))}"
    return None


def moe_cpu(*, dtype: str, activations: set[str], smallest_weight: float) -> str | None:
    """``com.microsoft.MoE`` on the CPU provider.

    Args:
        dtype: weight dtype, e.g. ``float32``.
        activations: gate activations of the model's experts.
        smallest_weight: lower bound of the combination weights; the log-weight form needs it positive.
    """
    if dtype == "float16":
        return "the CPU kernel's float16 path returns zeros without normalisation and loses 3 digits with it [M]"
    if dtype != "float32":
        return f"the CPU kernel has no {dtype} implementation [M]"
    if activations - {"silu"}:
        return f"the CPU kernel gates with SiLU only, the model uses {', '.join(sorted(activations))} [M]"
    if not smallest_weight > 0:
        return "an expert weight can be zero or negative, which no logit expresses"
    return None


def moe_cuda(*, activations: set[str], smallest_weight: float) -> str | None:
    """``com.microsoft.MoE`` on the CUDA provider, float16, ``normalize_routing_weights=1`` with the log-weight form.

    Before 1.28 the kernel's SwiGLU had gpt-oss constants, whatever the attributes said (onnxruntime-genai #2062) [R];
    the extra ``moedge[cuda]`` asks for 1.31.
    """
    if activations - {"silu"}:
        return f"the node form gates with SiLU only, the model uses {', '.join(sorted(activations))}"
    if not smallest_weight > 0:
        return "an expert weight can be zero or negative, which no logit expresses"
    return None


def attention_cpu(*, dtype: str) -> str | None:
    """``com.microsoft.GroupQueryAttention`` on the CPU provider."""
    return None if dtype == "float32" else f"only float32 was executed on the CPU kernel, the model is {dtype}"


def half_source(dtypes: set[str]) -> str | None:
    """Typing a graph as half precision. ``dtypes``: the weights' dtypes, integers included."""
    floats = {name for name in dtypes if "float" in name}
    return None if floats <= {"float"} else f"the portable graph must be float32, it holds {', '.join(sorted(floats))}"


SMALLEST_HEAD = 16
"""Head sizes 16 to 256 built for SM75, 86 and 120 on TensorRT-RTX 1.7.1, float16; 8 did not [M]."""


def attention_operator(*, head_dim: int) -> str | None:
    """ONNX ``Attention`` (opset 23) in TensorRT-RTX, float16. In float32 no head size has a kernel [M]."""
    if head_dim < SMALLEST_HEAD:
        return f"the Attention operator has no kernel for heads of {head_dim} (at least {SMALLEST_HEAD}) [M]"
    return None


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


def quantized_cpu(*, dtypes: set[str], hidden_sizes: set[int]) -> str | None:
    """Block-quantised weights on the CPU provider (``MatMulNBits``, ``QMoE``), blocks of 32.

    Args:
        dtypes: dtypes of the float weights.
        hidden_sizes: H of the layers with experts.
    """
    installed = onnxruntime_version()
    if installed is not None and installed < OLDEST_QUANTISED_ORT:
        oldest, found = (".".join(map(str, version)) for version in (OLDEST_QUANTISED_ORT, installed))
        return f"quantised experts need onnxruntime {oldest}, this is {found}; pip install -U onnxruntime"
    if dtypes - {"FLOAT"}:
        return f"weights are quantised from float32, the model holds {', '.join(sorted(dtypes)).lower()}"
    if odd := sorted(size for size in hidden_sizes if size % 32):
        return f"the hidden size {odd[0]} is not a multiple of the block of 32, which the QMoE kernel needs [R]"
    return None


def qmoe_cpu(*, activations: set[str], smallest_weight: float, biased: bool) -> str | None:
    """``com.microsoft.QMoE`` on the CPU provider; where it is illegal, experts are products of their own.

    Args:
        activations: gate activations of the model's experts.
        smallest_weight: lower bound of the combination weights.
        biased: whether experts have biases in gate or up.
    """
    if activations - {"silu"}:
        return f"the QMoE kernel gates with SiLU only, the model uses {', '.join(sorted(activations))} [M]"
    if not smallest_weight > 0:
        return "an expert weight can be zero or negative; the QMoE kernel drops such experts without an error [M]"
    if biased:
        return "the experts have biases in gate or up, kept as a further input that the kernel has no place for"
    return None
