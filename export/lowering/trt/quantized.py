"""Targets ``tensorrt-rtx-int8`` and ``tensorrt-rtx-int4``: the graph of ``tensorrt-rtx`` on weight-only integers.

Every matrix of a quantised class becomes ``DequantizeLinear`` of its integers (``weights.py``): attention, head,
embedding, shared and routed experts, unconverted FFNs. Activations, norms and biases are float16 as for
``tensorrt-rtx``, the router float32. A tied embedding is one table that lookup and output projection read, as for
``ort-cpu-int4``.

Two errors are kept apart. The engine's graph, float16 on integers, against float32 on the *de-quantised* weights:
judged by the half-precision limit. The de-quantised weights against the original ones: reported, a property of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import weights
from moedge.export.graph.nodes import nodes_of, routed_directly
from moedge.export.lowering import Lowered, Rewrite, capabilities
from moedge.export.lowering.accounting import account_for
from moedge.export.lowering.check import selftest
from moedge.export.lowering.trt import rtx as tensorrt_rtx
from moedge.export.lowering.trt import weights as trt_weights
from moedge.export.lowering.trt.engine import HALF_LIMIT
from moedge.export.lowering.trt.weights import Matrix
from moedge.export.manifest import LinearPlace, Quantization
from moedge.export.quantize.format import QUANTISED


def lower(
    model: ir.Model,
    *,
    max_length: int,
    bits: int,
    method: str = "rtn",
    moments: Mapping[str, np.ndarray] | None = None,
) -> Lowered:
    """Rewrite ``model`` in place for TensorRT for RTX with weights of ``bits`` bits.

    Args:
        moments: of the inputs by weight, for method ``gptq`` (4 bits); a weight without is rounded to the nearest.

    Raises:
        MoEdgeError: the model cannot be quantised or typed as half precision, a block does not compute what it
            replaced, or a tensor class that should be quantised is not.
    """
    before = model.clone()
    _check(before, f"tensorrt-rtx-int{bits}")
    table = weights.collect(before)
    downs = {str(node.inputs[5].name) for node in nodes_of(before, "SparseGLU") if node.inputs[5] is not None}
    values, known = before.graph.initializers, moments or {}
    matrices = {
        name: trt_weights.quantized(
            weight, weights.array(values[name], weight), bits, method, known.get(name), name in downs
        )
        for name, weight in table.items()
        if weight.tensor_class in QUANTISED
    }
    weights.set_dequantized(model, {name: matrix.rows for name, matrix in matrices.items()}, table)
    reference = model.clone()
    lowered = tensorrt_rtx.lower(model, max_length=max_length)
    trt_weights.write(model, matrices)
    should = _stored(table, matrices, bits)
    sizes = account_for(before, model, table, bits, should=should, base_name=trt_weights.base_name)
    lowered.rewrites += _tested(before, reference, model, matrices)
    blocks = sorted({matrix.block for matrix in matrices.values()}, reverse=True)
    lowered.limits += _limits(blocks) if bits == 4 else []
    lowered.quantization = Quantization(
        form="DequantizeLinear",
        bits=bits,
        block="a row" if bits == 8 else " or ".join(map(str, blocks)),
        method=method,
        classes=sizes,
        tensors={
            name: LinearPlace(
                tensor=f"{matrix.weight.tensor_class}.{name}",
                axis=matrix.axis,
                block=matrix.block,
                shape=list(matrix.weight.shape),
                merged=name in downs,
            )
            for name, matrix in matrices.items()
        },
    )
    return lowered


def _limits(blocks: list[int]) -> list[str]:
    """What holds for 4-bit weights; ``blocks`` from the longest to the shortest."""
    limits = ["TensorRT for RTX builds 4-bit weights for SM80 and newer; for SM75 take tensorrt-rtx-int8"]
    if blocks[-1] < capabilities.DOCUMENTED_BLOCK:
        limits.append(
            f"some rows hold no whole number of blocks of {capabilities.DOCUMENTED_BLOCK} and have blocks of "
            f"{blocks[-1]}, which the builder takes and NVIDIA does not document"
        )
    return limits


def _check(model: ir.Model, target: str) -> None:
    if not all(map(routed_directly, nodes_of(model, "SparseGLU"))):
        raise MoEdgeError(f"Cannot lower experts inside experts for {target}; export a hierarchical model to ort-cpu.")
    dtypes = {value.dtype.name.lower() for value in model.graph.initializers.values() if value.dtype is not None}
    if reason := capabilities.runtime() or capabilities.half_source(dtypes):
        raise MoEdgeError(f"Cannot lower for {target}: {reason}.")


def _tested(before: ir.Model, reference: ir.Model, model: ir.Model, matrices: Mapping[str, Matrix]) -> list[Rewrite]:
    """Execute the first and the last block of every class; one entry a class.

    Raises:
        MoEdgeError: a block is beyond the half-precision limit.
    """
    counts: dict[str, int] = {}
    tests: dict[str, list[Any]] = {}  # by rewrite: a callable (name, one, two, limit) a block
    for node in reference.graph:
        lookup = weights.is_embedding(node)
        product = None if lookup else weights.product_weight(node)
        value = node.inputs[0] if lookup else product[0] if product else None
        source = node.inputs[1 if lookup else 0] if value is not None else None
        if value is None or source is None or str(value.name) not in matrices:
            continue
        matrix = matrices[str(value.name)]
        kind = _rewrite("embedding, lookup" if lookup else matrix.weight.tensor_class, matrix)
        if matrix.weight.tensor_class == "embedding" and not lookup:
            kind = _rewrite("embedding, tied output projection", matrix)
        counts[kind] = counts.get(kind, 0) + 1
        tests.setdefault(kind, []).append(
            partial(_product, output=str(node.outputs[0].name), source=str(source.name), weight=matrix.rows)
        )
    # Whole FFNs last: a mistake in one of its products has a name by then.
    for node in nodes_of(reference, "SparseGLU"):
        parts = [matrices[str(value.name)] for value in node.inputs[3:6] if value is not None]
        stacks = [part.rows for part in parts]
        kind = _rewrite("experts", *parts)
        counts[kind] = counts.get(kind, 0) + 3
        routed = str(node.outputs[0].name)
        tests.setdefault(kind, []).append(
            lambda name, one, two, limit, routed=routed, stacks=stacks: selftest.compare_ffn(
                name, one, two, routed, limit, stacks
            )
        )
    made = []
    for kind, blocks in tests.items():
        ends = blocks[:1] + blocks[-1:] if len(blocks) > 1 else blocks
        found = [test(kind, reference, model, HALF_LIMIT) for test in ends]
        worst = max(found, key=lambda test: test.max_rel_error)
        for test in found:
            if not test.passed:
                raise MoEdgeError(f"{test.failure()} The integers do not compute what their de-quantised values do.")
        lost = max(test(kind, before, reference, float("inf")).max_rel_error for test in ends)
        made.append(Rewrite(kind, counts[kind], "applied", self_test={**worst.to_json(), "quantisation_error": lost}))
    return made


def _product(
    name: str, one: ir.Model, two: ir.Model, limit: float, *, output: str, source: str, weight: Any
) -> selftest.SelfTest:
    return selftest.compare_product(name, one, two, output, source, limit, weight)


def _rewrite(what: str, *matrices: Matrix) -> str:
    blocks = " and ".join(map(str, sorted({matrix.block for matrix in matrices}, reverse=True)))
    form = f"int4 in blocks of {blocks}" if matrices[0].rows.bits == 4 else "int8 with a scale a row"
    return f"{what}: float16 -> {form}"


def _stored(table: Mapping[str, weights.Weight], matrices: Mapping[str, Matrix], bits: int) -> Callable[[str], int]:
    """Return the bytes that a weight takes as ``DequantizeLinear`` of its integers."""

    def should(name: str) -> int:
        down = name in matrices and isinstance(matrices[name].rows, trt_weights.MergedDown)
        return trt_weights.stored_bytes(table[name], bits, down)

    return should
