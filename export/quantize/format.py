"""Block-quantised weights: the format, ONNX Runtime's quantisers behind it, and the accounting of what was quantised.

One format for every matrix of a model, dense products (``MatMulNBits``) and experts (``QMoE``) alike: blocks of 32
consecutive inputs of one output row share a float32 scale, ``w = (q - zero_point) * scale`` with unsigned q of 4 or 8
bits. Symmetric blocks have the fixed zero point 2**(bits-1) and a signed scale. Targets of TensorRT for RTX have blocks
of another size, or one scale a row, with scales that float16 holds (:mod:`moedge.export.lowering.trt.weights`).

The numbers come from ``onnxruntime.quantization.MatMulNBitsQuantizer``. De-quantised weights are computed here, by the
formula above, from the packed bytes: they are what a kernel is judged against, so no kernel is asked for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export.manifest import ClassSize

BLOCK = 32
BITS = (4, 8)
METHODS = ("rtn", "rtn-asymmetric", "gptq")
"""``rtn`` rounds to the nearest of 2**bits levels around zero; ``rtn-asymmetric`` fits the levels to each block's range
and stores a zero point a block (4 or 8 bits more). ``gptq`` has the format and size of ``rtn`` and moves the error of
each input to those that are still to be rounded (Frantar et al., 2023); it needs the second moments of the inputs
(:mod:`moedge.export.quantize.moments`)."""


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K], or a stack of them [E, N, K], in blocks of B along K.

    ``packed`` uint8 [..., N, K/B, B*bits/8] (4 bits: low nibble first), ``scales`` float32 [..., N, K/B],
    ``zero_points`` uint8 [..., N, ceil(K/B*bits/8)] packed like the values, or None (symmetric). K counts the padding
    of the last block.
    """

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    columns: int
    """K before padding."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(array.nbytes for array in (self.packed, self.scales, self.zero_points) if array is not None)

    def dequantized(self) -> np.ndarray:
        """Return float32 [..., N, K], K without padding."""
        zero = np.float32(2 ** (self.bits - 1))
        if self.zero_points is not None:
            zero = unpack(self.zero_points, self.bits)[..., : self.scales.shape[-1], None].astype(np.float32)
        values = (unpack(self.packed, self.bits).astype(np.float32) - zero) * self.scales[..., None]
        return np.ascontiguousarray(values.reshape(*self.packed.shape[:-2], -1)[..., : self.columns])

    def expert(self, number: int) -> Quantized:
        """Return one matrix of a stack."""
        zero_points = None if self.zero_points is None else self.zero_points[number]
        return Quantized(self.packed[number], self.scales[number], zero_points, self.bits, self.columns)

    def rows(self, *parts: Quantized) -> Quantized:
        """Return this matrix [N, K] with the rows of ``parts`` below its own."""
        every = [self, *parts]
        zero_points = [part.zero_points for part in every if part.zero_points is not None]
        return Quantized(
            np.concatenate([part.packed for part in every]),
            np.concatenate([part.scales for part in every]),
            np.concatenate(zero_points) if zero_points else None,
            self.bits,
            self.columns,
        )


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., n] -> values [..., n * 8/bits], low nibble first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def quantize(
    weight: np.ndarray, bits: int, method: str = "rtn", moments: np.ndarray | None = None, block: int = BLOCK
) -> Quantized:
    """Quantise float32 [N, K] or [E, N, K] with ONNX Runtime's own quantiser, one matrix after the other.

    Args:
        block: inputs that share a scale, a power of two.
        moments: of the inputs, float32 [K, K] (for every matrix of a stack) or [E, K, K]. With method ``gptq``; without
            them it rounds to the nearest.

    Raises:
        MoEdgeError: unknown bits or method, a value that is not finite, or GPTQ with 8 bits.
    """
    if bits not in BITS or method not in METHODS:
        raise MoEdgeError(f"Weights cannot be quantised to {bits} bits by {method!r}; known: 4 and 8, {METHODS}.")
    if not np.isfinite(weight).all():
        raise MoEdgeError("A weight is NaN or infinite; it cannot be quantised. Check the checkpoint.")
    if weight.ndim == 3:
        shared = moments is None or moments.ndim == 2
        each = [moments] * len(weight) if shared or moments is None else list(moments)
        parts = [quantize(matrix, bits, method, inputs, block) for matrix, inputs in zip(weight, each, strict=True)]
        zero_points = [part.zero_points for part in parts if part.zero_points is not None]
        return Quantized(
            np.stack([part.packed for part in parts]),
            np.stack([part.scales for part in parts]),
            np.stack(zero_points) if zero_points else None,
            bits,
            weight.shape[2],
        )
    if method == "gptq" and moments is not None:
        return _gptq(weight, bits, moments, block)
    packed, scales, zero_points_2d = _block_quantizer(bits, method, block)(np.ascontiguousarray(weight.T, np.float32))
    return Quantized(packed, scales, zero_points_2d if method == "rtn-asymmetric" else None, bits, weight.shape[1])


SMALLEST_SCALE = np.float32(2.0**-24)
"""The smallest positive float16."""


def quantize_rows(weight: np.ndarray) -> Quantized:
    """Round float32 [N, K] to 8 bits with one scale a row, max|w| / 127, positive and in float16: no block, any K.

    Raises:
        MoEdgeError: a value is not finite.
    """
    if not np.isfinite(weight).all():
        raise MoEdgeError("A weight is NaN or infinite; it cannot be quantised. Check the checkpoint.")
    peak = np.abs(weight).max(1, initial=0.0, keepdims=True)
    # TensorRT takes positive scales only, so a row of zeros has one too.
    with np.errstate(over="ignore"):  # infinite: the caller says which weight it was
        scales = np.maximum((peak / 127).astype(np.float16).astype(np.float32), SMALLEST_SCALE)
    q = np.clip(np.rint(weight / scales), -127, 127) + 128
    return Quantized(q.astype(np.uint8)[:, None], scales, None, 8, weight.shape[1])


DAMPING = 0.01
"""Added to the diagonal of the moments, as a share of its mean: GPTQ's own default."""


def _gptq(weight: np.ndarray, bits: int, moments: np.ndarray, size: int) -> Quantized:
    """GPTQ of one matrix [N, K] by moments [K, K] (Frantar et al., ICLR 2023, algorithm 1; blocks of the format).

    Not ``onnxruntime.quantization``'s ``gptq``: it reads its triangular factor by columns where rows are meant (up to
    1.31.1), so no error is passed on and the result is that of rounding to the nearest.
    """
    if bits != 4:
        raise MoEdgeError("GPTQ is for 4 bits; 8 bits lose nothing that it could win back. Use method rtn.")
    columns = weight.shape[1]
    padding = -columns % size
    rest = np.pad(weight.astype(np.float64), ((0, 0), (0, padding)))
    hessian = np.pad(moments.astype(np.float64), ((0, padding), (0, padding)))
    mean = float(np.diagonal(moments).astype(np.float64).mean())
    hessian[np.diag_indices_from(hessian)] += DAMPING * mean if mean > 0 else 1.0
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    half = 2 ** (bits - 1)
    q = np.empty(rest.shape, np.uint8)
    scales = np.empty((len(rest), rest.shape[1] // size), np.float32)
    passed = np.empty((len(rest), size))
    for block, start in enumerate(range(0, rest.shape[1], size)):
        end = start + size
        now = rest[:, start:end]
        # The largest weight of a block is its lowest level, as in ONNX Runtime's rounding to the nearest.
        peak = np.take_along_axis(now, np.abs(now).argmax(1)[:, None], 1)[:, 0]
        scales[:, block] = np.where(peak == 0, 1, peak / -half)
        scale = scales[:, block].astype(np.float64)
        for place in range(size):
            column = start + place
            level = np.clip(np.round(rest[:, column] / scale), -half, half - 1)
            q[:, column] = level + half
            passed[:, place] = (rest[:, column] - level * scale) / upper[column, column]
            rest[:, column + 1 : end] -= np.outer(passed[:, place], upper[column, column + 1 : end])
        rest[:, end:] -= passed @ upper[start:end, end:]
    grouped = q.reshape(len(rest), -1, size)
    return Quantized(grouped[..., ::2] | (grouped[..., 1::2] << 4), scales, None, bits, columns)


def _block_quantizer(bits: int, method: str, block: int) -> Any:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    root.handlers[:], root.level = handlers, level  # importing that module sets the root logger to INFO
    symmetric = method != "rtn-asymmetric"
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    return DefaultWeightOnlyQuantizer(config).qbits_block_quant


QUANTISED = ("embedding", "head", "attention", "shared", "ffn", "experts")
"""Tensor classes that a quantised export must not leave in float. ``ffn``: FFNs that were not converted."""
KEPT = ("router", "thresholds", "norms", "other")


def stored_bytes(rows: int, columns: int, bits: int, method: str) -> int:
    """Bytes of ``rows`` quantised rows of ``columns`` inputs: values, scales and zero points, whole blocks."""
    blocks = -(-columns // BLOCK)
    zero_points = -(-blocks * bits // 8) if method == "rtn-asymmetric" else 0
    return rows * (blocks * (BLOCK * bits // 8 + 4) + zero_points)


def account(
    before: Iterable[tuple[str, int, int, int]], after: Iterable[tuple[str, int]]
) -> tuple[list[ClassSize], list[str]]:
    """Sum tensors by class and name the classes that are not stored as they should be.

    Args:
        before: (class, parameters, bytes, bytes that it should take after) of each weight of the float graph.
        after: (class, bytes) of each tensor of the quantised graph.

    Returns:
        The sizes in the order of :data:`QUANTISED` and :data:`KEPT`, and one sentence for each class of
        :data:`QUANTISED` that takes more or less than it should: something was skipped, stored twice or lost.
    """
    parameters: dict[str, int] = {}
    floats: dict[str, int] = {}
    wanted: dict[str, int] = {}
    stored: dict[str, int] = {}
    for name, count, size, should in before:
        parameters[name] = parameters.get(name, 0) + count
        floats[name] = floats.get(name, 0) + size
        wanted[name] = wanted.get(name, 0) + should
    for name, size in after:
        stored[name] = stored.get(name, 0) + size
    known = [name for name in (*QUANTISED, *KEPT) if name in parameters or name in stored]
    sizes = [_size(name, parameters.get(name, 0), floats.get(name, 0), stored.get(name, 0)) for name in known]
    wrong = [
        f"{size.tensor_class} takes {size.bytes:,} bytes instead of {wanted.get(size.tensor_class, 0):,} "
        f"({size.bits_per_weight:.1f} bits a weight)"
        for size in sizes
        if size.tensor_class in QUANTISED and size.bytes != wanted.get(size.tensor_class, 0)
    ]
    return sizes, wrong


def _size(name: str, parameters: int, floats: int, stored: int) -> ClassSize:
    bits = 8 * stored / parameters if parameters else 0.0
    return ClassSize(tensor_class=name, parameters=parameters, float_bytes=floats, bytes=stored, bits_per_weight=bits)
