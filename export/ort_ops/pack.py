"""Weights as the CPU operators read them: one row for each *input*, so that an input that is zero costs nothing.

Float32 [N, K] becomes [K, N]: the bytes of a ``MatMul``'s weight. Integers of 8 and 4 bits keep the numbers of
:class:`~moedge.export.quantize.format.Quantized` (unsigned, zero point 2**(bits-1), a scale for 32 inputs of one
output) in rows of one input each, columns padded to whole lines of 64 bytes:

- 8 bits: 64 columns a line; byte ``16 l + 4 i + e`` holds column ``16 i + 4 l + e`` (l, i, e in 0..3). The kernels
  interleave four rows with instructions that work inside 16 bytes; with this order the sums come out in order.
- 4 bits: 128 columns a line; the low halves of its bytes are columns 0 to 63 in that order, the high halves 64 to 127.

A row whose length is a multiple of 16 lines has one more, of zeros: rows a multiple of 1 KiB apart fall on few places
of a cache, and the 32 that a kernel reads side by side throw each other out of it (a product took 1.5 times as long).

Scales are [ceil(K / 32), columns], float32 or float16, 0 in the padding.

Experts that are too narrow for rows of whole lines are stored *interleaved*, the way the kernels interleave rows
themselves: a cell has 4 inputs of every column side by side, [ceil(K / 32) * bits, columns * 4] with columns padded to
16. Its bytes are one input each (8 bits), or that of cell 2c in the low and of cell 2c + 1 in the high half (4 bits).
No input can then be left out; of a narrow row no cache line could be either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moedge import MoEdgeError
from moedge.export.quantize.format import BLOCK, Quantized, unpack

LINE = 64
"""Bytes of a row that a kernel takes at once."""
CROWDED_LINES = 16
"""Rows that are a multiple of so many lines long get one line more."""
ZERO_POINTS = "the operators take symmetric integers, these have zero points"
CELL_COLUMNS = 16
"""Columns of interleaved weights are padded to a multiple of this."""


@dataclass(frozen=True)
class Packed:
    """A weight [N, K], or a stack of them, in the layout of the operators.

    ``weights`` float32 [..., K, N] or uint8 [..., K, :func:`row_bytes`]; ``scales`` float32 or float16
    [..., ceil(K / 32), columns] or None (float32 weights).
    """

    weights: np.ndarray
    scales: np.ndarray | None
    bits: int
    outputs: int
    """N, without padding."""
    interleaved_inputs: int = 0
    """K of interleaved weights, which have padding along it too; 0: rows."""

    @property
    def interleaved(self) -> bool:
        """Whether the weights are interleaved."""
        return self.interleaved_inputs > 0

    @property
    def inputs(self) -> int:
        """K."""
        return self.interleaved_inputs or self.weights.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantized(self) -> np.ndarray:
        """Return the weight, float32 [..., N, K], read back from the stored bytes."""
        if self.scales is None:
            return np.ascontiguousarray(np.swapaxes(self.weights, -1, -2))
        levels = (_from_cells if self.interleaved else _in_order)(self.weights, self.bits)
        levels = levels[..., : self.inputs, : self.scales.shape[-1]]
        values = levels.astype(np.float32) - np.float32(2 ** (self.bits - 1))
        values *= np.repeat(self.scales.astype(np.float32), BLOCK, axis=-2)[..., : self.inputs, :]
        return np.ascontiguousarray(np.swapaxes(values[..., : self.outputs], -1, -2))


def pack_floats(weight: np.ndarray) -> Packed:
    """Pack float32 [..., N, K]."""
    rows = np.ascontiguousarray(np.swapaxes(weight, -1, -2), np.float32)
    return Packed(rows, None, 32, weight.shape[-2])


def pack(value: Quantized, half_scales: bool = False, interleaved: bool = False) -> Packed:
    """Pack a quantised matrix or stack.

    Args:
        value: symmetric, blocks of 32.
        interleaved: see above; gate and up of narrow experts (:func:`narrow`).
        half_scales: store scales as float16; they must be ones that float16 holds, see :func:`round_scales`.

    Raises:
        MoEdgeError: blocks of another size, zero points, or a scale that float16 changes.
    """
    if value.zero_points is not None:
        raise MoEdgeError("The CPU operators take symmetric weights; quantise with method rtn or gptq.")
    levels = unpack(value.packed, value.bits)
    if levels.shape[-1] != BLOCK:
        raise MoEdgeError(f"The CPU operators take blocks of {BLOCK} inputs; these are {levels.shape[-1]}.")
    outputs = levels.shape[-3]
    rows = np.swapaxes(levels.reshape(*levels.shape[:-2], -1), -1, -2)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -outputs % (CELL_COLUMNS if interleaved else LINE * 8 // value.bits))]
    rows = np.pad(rows, padding, constant_values=2 ** (value.bits - 1))
    scales = np.pad(np.swapaxes(value.scales, -1, -2), padding)
    if half_scales:
        if not fits_half(value):
            raise MoEdgeError("A scale is none that float16 holds; round the scales first (round_scales).")
        scales = scales.astype(np.float16)
    stored = _cells(rows, value.bits) if interleaved else _permuted(rows[..., : value.columns, :], value.bits)
    return Packed(stored, np.ascontiguousarray(scales), value.bits, outputs, value.columns if interleaved else 0)


def row_bytes(outputs: int, bits: int) -> int:
    """Return the bytes of a stored row of ``outputs`` columns of 8 or 4 bits, padding included."""
    lines = -(-outputs * bits // (8 * LINE))
    return LINE * (lines + (lines % CROWDED_LINES == 0))


def narrow(outputs: int, bits: int) -> bool:
    """Whether rows of ``outputs`` columns are better stored interleaved: under four lines, where padding costs most."""
    return bits != 32 and outputs * bits // 8 < 4 * LINE


HALF_LIMIT = 2.0**-10
"""How far float16 may move a scale, as a part of the largest in its row (output). Rounding moves one of 2^-14 and more
by up to 2^-11 of itself; below, float16 is spaced by 2^-24 and moves it by up to 2^-25, so the limit bites where the
largest is under 2^-15. A small scale beside a large one may move further: that is less than the integers beside the
large one lose, half a step each."""


def round_scales(value: Quantized) -> Quantized:
    """Return the same levels with the nearest scales of float16: the weights that ``half_scales`` stores.

    Where float16 loses them, as :data:`HALF_LIMIT` says or because they are too large, they stay as they are.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scales = value.scales.astype(np.float16).astype(np.float32)
        moved = np.abs(scales - value.scales)
    largest = np.abs(value.scales).max(axis=-1, keepdims=True)
    if (moved > HALF_LIMIT * largest).any():
        return value
    return Quantized(value.packed, scales, value.zero_points, value.bits, value.columns)


def fits_half(value: Quantized) -> bool:
    """Whether float16 holds every scale as it is; of a weight that :func:`round_scales` left alone it does not."""
    with np.errstate(over="ignore"):
        return np.array_equal(value.scales.astype(np.float16).astype(np.float32), value.scales)


def _permuted(rows: np.ndarray, bits: int) -> np.ndarray:
    """Levels [..., columns] to stored bytes."""
    cells = np.swapaxes(rows.reshape(*rows.shape[:-1], -1, 4, 4, 4), -2, -3)
    lines = cells.reshape(*rows.shape[:-1], -1, LINE)
    if bits == 4:
        lines = lines[..., ::2, :] | (lines[..., 1::2, :] << 4)
    stored = lines.reshape(*rows.shape[:-1], -1)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, row_bytes(rows.shape[-1], bits) - stored.shape[-1])]
    return np.ascontiguousarray(np.pad(stored, padding))


def _in_order(stored: np.ndarray, bits: int) -> np.ndarray:
    """Stored bytes to levels [..., columns]."""
    lines = stored.reshape(*stored.shape[:-1], -1, LINE)
    if bits == 4:
        lines = np.stack([lines & 15, lines >> 4], axis=-2)
    cells = lines.reshape(*stored.shape[:-1], -1, 4, 4, 4)
    return np.swapaxes(cells, -2, -3).reshape(*stored.shape[:-1], -1)


def _cells(rows: np.ndarray, bits: int) -> np.ndarray:
    """Levels [..., K padded to blocks, columns] to interleaved bytes."""
    *stack, inputs, columns = rows.shape
    cells = np.swapaxes(rows.reshape(*stack, inputs // 4, 4, columns), -1, -2).reshape(*stack, inputs // 4, -1)
    if bits == 4:
        cells = cells[..., ::2, :] | (cells[..., 1::2, :] << 4)
    return np.ascontiguousarray(cells)


def _from_cells(stored: np.ndarray, bits: int) -> np.ndarray:
    """Interleaved bytes to levels [..., K padded to blocks, columns]."""
    *stack, cells, size = stored.shape
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-2).reshape(*stack, 2 * cells, size)
    rows = np.swapaxes(stored.reshape(*stack, -1, size // 4, 4), -1, -2)
    return rows.reshape(*stack, -1, size // 4)
