"""Weights as the CPU operators read them: read back, laid out for a cache, and what cannot be packed."""

from __future__ import annotations

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.export.ort_ops import pack
from moedge.export.quantize.format import Quantized, quantize
from moedge.tests.export.cpu_nodes import random


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(50, 70), (3, 48, 33), (2000, 33), (3, 2000, 33)])
def test_packed_bytes_are_read_back(shape: tuple[int, ...], interleaved: bool, bits: int, half: bool) -> None:
    value = pack.round_scales(quantize(random(1, *shape), bits))
    packed = pack.pack(value, half, interleaved)
    assert np.array_equal(packed.dequantized(), value.dequantized())
    assert packed.scales is not None
    assert packed.scales.dtype == (np.float16 if half else np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs", [64, 576, 960, 1024, 1536, 2048, 3072, 8192, 49152, 151936])
def test_rows_of_a_block_lie_on_many_places_of_a_cache(outputs: int, bits: int) -> None:
    """A first level of 32 KiB has 64 places of 8 lines: 32 rows that fall on fewer than 4 of them do not stay."""
    stored = pack.pack(quantize(random(1, outputs, 32), bits)).weights.shape[-1]
    assert stored == pack.row_bytes(outputs, bits)
    assert len({row * stored // 64 % 64 for row in range(32)}) >= 8
    assert outputs * bits / 8 <= stored < outputs * bits / 8 + 128


def test_what_cannot_be_packed_is_refused() -> None:
    weight = random(1, 8, 64)
    with pytest.raises(MoEdgeError, match="symmetric"):
        pack.pack(quantize(weight, 4, "rtn-asymmetric"))
    with pytest.raises(MoEdgeError, match="blocks of 32 inputs; these are 64"):
        pack.pack(quantize(weight, 4, block=64))
    with pytest.raises(MoEdgeError, match="round the scales first"):
        pack.pack(quantize(weight, 4), half_scales=True)


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        ([0.01, 2.0**-15, 0.0], False),
        ([2.0**-15, 3e-8], False),  # 3e-8 becomes 6e-8, and counts for nothing beside the other
        ([2.0**-16 * (1 + 2.0**-9), 0.0], True),  # half way between two that float16 has: moved by 2^-25
        ([3e-8, 0.0], True),
        ([0.0, 0.0], False),
        ([65536.0, 1.0], True),
    ],
)
def test_scales_that_float16_loses_stay(row: list[float], stays: bool) -> None:
    scales = np.array([[0.01] * len(row), row], np.float32)
    value = Quantized(np.zeros((*scales.shape, 32), np.uint8), scales, None, 8, 32 * len(row))
    rounded = pack.round_scales(value)
    assert np.array_equal(rounded.scales, scales if stays else scales.astype(np.float16))
    assert pack.fits_half(rounded) is not stays
