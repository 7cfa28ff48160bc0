"""How fast this machine reads memory and multiplies, measured in about a second: the roof over a benchmark's times.

Bandwidth is that of reading as many bytes as a token needs, again and again: what fits into a cache is read from there,
as it is when an engine decodes. The rate is that of ONNX Runtime's own product at the same number of bits, a prompt's
rows by a square matrix, with the options of every session. Both take the best of several tries: a roof is what can be
reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moedge import MoEdgeError

TRIES = 7
_LARGEST = 2**30
"""Bytes read at most; no cache is near that."""
_WIDE = 2048
"""Inputs and outputs of the product."""
_MOST_ROWS = 512
_BLOCK = 32
"""Inputs that share a scale, as in our bundles."""


class Roof:
    """Measurements of this machine with so many threads, each made once."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._bandwidths: dict[int, float] = {}
        self._rates: dict[tuple[int, int], float] = {}

    def bandwidth(self, size: float) -> float:
        """Bytes a second of reading ``size`` bytes again and again."""
        # Not by what is spare: that changes all the time, and one size would be measured again and again.
        whole = int(min(max(size, 2**16), _LARGEST))
        if whole not in self._bandwidths:
            self._bandwidths[whole] = measure_bandwidth(min(whole, _spare()), self.threads)
        return self._bandwidths[whole]

    def rate(self, rows: int, bits: int) -> float:
        """Multiplications a second of ``rows`` tokens by weights of ``bits`` bits (32: float32).

        Raises:
            MoEdgeError: a package for it is not installed, or ONNX Runtime has no such product here.
        """
        key = (min(rows, _MOST_ROWS), bits)
        if key not in self._rates:
            self._rates[key] = measure_rate(*key, self.threads)
        return self._rates[key]


def _spare() -> int:
    """Bytes that may be taken for a moment: a quarter of what is free."""
    import psutil

    return max(2**16, int(psutil.virtual_memory().available) // 4)


def measure_bandwidth(size: int, threads: int, tries: int = TRIES) -> float:
    """Bytes a second at which ``threads`` threads read ``size`` bytes, each its part; best of ``tries``.

    ``numpy.max`` of integers reads as fast as the memory gives: it compares whole vectors and keeps nothing. It lets
    other Python threads run meanwhile.
    """
    # Written, so that every page exists: pages of zeros that nobody wrote are one page of the system's.
    whole = np.ones(size // 4, np.int32)
    parts = np.array_split(whole, threads)

    def passes(pool: ThreadPoolExecutor | None) -> None:
        if pool is None:
            parts[0].max()
        else:
            list(pool.map(np.max, parts))

    if threads == 1:
        seconds = _best(lambda: passes(None), tries)
    else:
        with ThreadPoolExecutor(threads) as pool:
            seconds = _best(lambda: passes(pool), tries)
    return whole.nbytes / seconds


def measure_rate(rows: int, bits: int, threads: int, tries: int = TRIES) -> float:
    """Multiplications a second of ONNX Runtime's product of float32 [rows, 2048] by weights [2048, 2048].

    Args:
        rows: tokens.
        bits: 32, or 8 and 4: blocks of 32 inputs, activations rounded to 8 bits (``accuracy_level`` 4).
        threads: of the session.
        tries: of which the best counts.

    Raises:
        MoEdgeError: see :meth:`Roof.rate`.
    """
    from moedge.runtime.engines.ort_session import session_options

    try:
        import onnxruntime

        model = _product(bits)
    except ImportError as error:
        raise MoEdgeError(f"measuring it needs {error.name}: pip install 'moedge[cpu]'") from error
    try:
        session = onnxruntime.InferenceSession(model, session_options(threads), ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises one class per status code, without a base class of its own
        raise MoEdgeError(f"ONNX Runtime has no product of {bits} bits here ({str(error).splitlines()[0]})") from error
    feeds = {"x": np.random.default_rng(0).standard_normal((rows, _WIDE), dtype=np.float32)}
    return rows * _WIDE * _WIDE / _best(lambda: session.run(None, feeds), tries)


def _best(call: Callable[[], Any], tries: int) -> float:
    """Shortest of ``tries`` calls after one that warms up, seconds."""
    call()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _product(bits: int) -> bytes:
    """Make a graph of one product."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(1)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _WIDE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", _WIDE])]
    opsets = [helper.make_opsetid("", 21)]
    weights: dict[str, np.ndarray]
    if bits == 32:
        weights = {"w": draw.standard_normal((_WIDE, _WIDE), dtype=np.float32)}
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    else:
        blocks = _WIDE // _BLOCK
        weights = {
            "w": draw.integers(0, 256, (_WIDE, blocks, _BLOCK * bits // 8), dtype=np.uint8),
            "scales": np.full((_WIDE, blocks), 0.01, np.float32),
        }
        sizes: dict[str, Any] = {"K": _WIDE, "N": _WIDE, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **sizes)
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "product", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())
