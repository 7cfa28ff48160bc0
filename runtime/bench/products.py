"""What a product takes by the share of its inputs that are kept: timed alone, in the operators of a CPU target.

For each size there is a graph with enough products, of different weights, that no cache holds them; all read the same
token, and a threshold that is an input of the graph decides how many of its values are kept. The shares take turns.
That is what a gather can save on this machine (:mod:`moedge.convert.costs`), and no more: what is around the products
in a model is not in it.

K inputs, N outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moedge import MoEdgeError
from moedge.convert import costs
from moedge.convert.costs import Product
from moedge.export import targets
from moedge.export.ort_ops import library, pack
from moedge.export.quantize import format as quantize
from moedge.runtime.bench.machine import machine
from moedge.runtime.engines.calls import default_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

KEPT = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CHAIN_BYTES = 96 << 20
"""Of weights that are read before the same ones are read again."""
MOST_PRODUCTS = 256
"""In one graph: the weights of a model so small that these do not fill a cache lie in one as well."""
ROUNDS = 21


def measure(
    sizes: Sequence[tuple[int, int]],
    bits: int,
    threads: int,
    *,
    rounds: int = ROUNDS,
    chain_bytes: int = CHAIN_BYTES,
    progress: Progress | None = None,
) -> list[Product]:
    """Time products of one token.

    Args:
        sizes: (K, N) of each.
        bits: of the weights, 32, 8 or 4.
        threads: of ONNX Runtime.
        rounds: how often each share is timed; one round before them is not counted.
        chain_bytes: of the weights of one graph, about.
        progress: called with (sizes done, sizes).

    Raises:
        MoEdgeError: there is no compiler for the operators.
    """
    found, operators = [], library.compiled()
    for number, (inputs, outputs) in enumerate(sizes):
        products = _Products(inputs, outputs, bits, threads, operators, chain_bytes)
        times = np.array([products.round(order) for order in _orders(rounds + 1)])[1:]
        medians = np.median(times, axis=0) / products.count * 1e3
        found.append(Product(inputs=inputs, outputs=outputs, kept=list(KEPT), ms=[round(one, 6) for one in medians]))
        if progress:
            progress(number + 1, len(sizes))
    return found


def _orders(rounds: int) -> Iterator[list[int]]:
    """Orders of the shares; every second one is turned around, so that a drift of the machine falls on all alike."""
    for number in range(rounds):
        order = list(range(len(KEPT)))
        yield order[:: -1 if number % 2 else 1]


def of_model(
    model: PreTrainedModel,
    target: str,
    threads: int | None,
    *,
    linears: Literal["all", "ffn"] = "all",
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the products of a dense model in the operators of a target.

    Args:
        model: nothing but the sizes of its layers is read.
        target: one that has operators of ours (``own_operators``).
        threads: of ONNX Runtime; None: all physical cores.
        linears: as :func:`moedge.convert.gather.places` has it.
        rounds: see :func:`measure`.

    Returns:
        JSON of schema ``moedge.costs/1``: target, threads, machine and products.

    Raises:
        MoEdgeError: a target without operators of ours, or no compiler for them.
    """
    from moedge.convert import gather

    row = targets.find(target)
    if not row.own_operators:
        names = ", ".join(targets.names(lambda one: one.own_operators))
        raise MoEdgeError(f"Products of target {target} cannot be timed here; take one of {names}.")
    threads = threads or default_threads()
    sizes = costs.sizes(gather.places(model, linears))
    found = measure(sizes, row.bits or 32, threads, rounds=rounds, progress=progress)
    products = [one.model_dump(mode="json") for one in found]
    return {
        **{"schema": costs.SCHEMA, "target": target, "threads": threads, "rounds": rounds},
        **{"machine": machine(), "products": products},
    }


class _Products:
    """Products of one size with different weights, in one session."""

    def __init__(self, inputs: int, outputs: int, bits: int, threads: int, operators: Path, chain_bytes: int) -> None:
        self._random = np.random.default_rng(0)
        weight = self._random.standard_normal((outputs, inputs), dtype=np.float32)
        if bits == 32:
            one = pack.pack_floats(weight)
        else:
            one = pack.pack(pack.round_scales(quantize.quantize(weight, bits)), half_scales=True)
        self.count = min(max(2, round(chain_bytes / one.nbytes)), MOST_PRODUCTS)
        self._inputs = inputs
        self.one = one
        self._session = self._opened(one, threads, operators)
        self._thresholds = [np.full(inputs, _above(share), np.float32) for share in KEPT]

    def _opened(self, one: pack.Packed, threads: int, operators: Path) -> Any:
        from onnx import TensorProto, helper, numpy_helper
        from onnxruntime import InferenceSession

        from moedge.runtime.engines.ort_session import session_options

        nodes, weights, names = [], [], [f"y{number}" for number in range(self.count)]
        for number, name in enumerate(names):  # equal weights could be stored, and cached, once
            given = [(f"w{number}", np.roll(one.weights, number, axis=0))]
            given += [] if one.scales is None else [(f"s{number}", one.scales)]
            weights += [numpy_helper.from_array(value, key) for key, value in given]
            sizes: dict[str, Any] = {"bits": one.bits, "K": self._inputs, "N": one.outputs}
            read = ["x", "threshold", *(key for key, _ in given)]
            nodes.append(helper.make_node("GatherLinear", read, [name], domain=library.DOMAIN, **sizes))
        graph = helper.make_graph(
            nodes,
            "products",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, self._inputs]),
                helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [self._inputs]),
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, one.outputs]) for name in names],
            weights,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(library.DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = session_options(threads)
        options.register_custom_ops_library(str(operators))
        return InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def round(self, order: list[int]) -> list[float]:
        """Return seconds of all products for each share, timed in this order."""
        found = [0.0] * len(order)
        binding = self._session.io_binding()
        for name in (f"y{number}" for number in range(self.count)):
            binding.bind_output(name)
        binding.bind_cpu_input("x", self._random.standard_normal((1, self._inputs), dtype=np.float32))
        for number in order:
            binding.bind_cpu_input("threshold", self._thresholds[number])
            start = time.perf_counter()
            self._session.run_with_iobinding(binding)
            found[number] = time.perf_counter() - start
        return found


def _above(share: float) -> float:
    """Return what ``share`` of normal values exceed in size."""
    return NormalDist().inv_cdf(1 - share / 2)
