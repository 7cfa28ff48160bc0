"""The weights of a quantised bundle, read back from its stored bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moedge import MoEdgeError
from moedge.export.manifest import LinearPlace, PackedPlace, Rows, StackPlace
from moedge.export.ort_ops.pack import Packed
from moedge.export.quantize.format import Quantized

if TYPE_CHECKING:
    from moedge.export.bundle import Bundle


def dequantized_weights(bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in the portable graph, float32 array in that graph's layout) for every quantised weight of a bundle.

    Read from the stored bytes by the formula of :mod:`moedge.export.quantize.format`: a mistake in packing shows.

    Raises:
        MoEdgeError: the bundle is not quantised.
    """
    from moedge.export.graph.build import array_of, load

    section = bundle.manifest.quantization
    if section is None:
        raise MoEdgeError(f"{bundle.path} holds float weights; there is nothing to de-quantise.")
    stored = load(bundle.model_path).graph.initializers

    def read(name: str) -> np.ndarray:
        return array_of(stored[name])

    def blocks(place: Rows, columns: int, layout: str = "", part: str | None = None) -> np.ndarray:
        scales = read(f"{place.tensor}.scales")
        packed = read(f"{place.tensor}.q").reshape(*scales.shape, -1)
        zero_points = read(f"{place.tensor}.zero_points") if f"{place.tensor}.zero_points" in stored else None
        whole: list[np.ndarray | None] = [packed, scales, zero_points]
        if part in ("gate", "up"):  # row pairs gate, up
            first = 0 if part == "gate" else 1
            whole = [None if array is None else array[:, first::2] for array in whole]
        rows = slice(*place.rows)
        axis = (slice(None), rows) if layout == "ENK" else (rows,)
        values_part, scales_part, zeros_part = (None if array is None else array[axis] for array in whole)
        assert values_part is not None
        assert scales_part is not None
        return Quantized(values_part, scales_part, zeros_part, section.bits, columns).dequantized()

    for name, place in section.tensors.items():
        if isinstance(place, PackedPlace):  # in the layout of our own operators
            arrays = read(f"{place.tensor}.q"), read(f"{place.tensor}.scales")
            rows = Packed(*arrays, section.bits, place.total, place.interleaved_inputs).dequantized()
            values = rows[..., slice(*place.outputs), :]
            yield name, np.ascontiguousarray(values.T if place.layout == "KN" else values)
        elif isinstance(place, LinearPlace):
            yield name, _dequantize_linear(read(f"{place.tensor}.q"), read(f"{place.tensor}.scales"), place)
        elif isinstance(place, StackPlace):  # each in a matrix of its own (lowering/ort/products.py)
            yield name, np.stack([blocks(part, place.columns) for part in place.experts])
        else:
            values = blocks(place, place.columns, place.layout, place.part)
            yield name, np.ascontiguousarray(values.T if place.layout == "KN" else values)


def _dequantize_linear(q: np.ndarray, scales: np.ndarray, place: LinearPlace) -> np.ndarray:
    """What DequantizeLinear makes of q [N, K] or [K, N], in float32 and in the shape of the portable graph's weight."""
    if scales.ndim == 1:  # one a row
        scales = scales[:, None] if place.axis else scales
    else:
        scales = np.repeat(scales, place.block, axis=place.axis)
    values = q.astype(np.float32) * scales.astype(np.float32)
    shape = place.shape
    if place.merged:  # [E*I, H] of a stack [E, H, I]
        return np.ascontiguousarray(values.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2))
    return values.reshape(shape)
