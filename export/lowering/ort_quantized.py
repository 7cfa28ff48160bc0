"""Targets ``ort-cpu-int8`` and ``ort-cpu-int4``: ONNX Runtime's CPU kernels on block-quantised weights.

Norms and attention are rewritten as for ``ort-cpu``; then experts -> QMoE, every other matrix -> MatMulNBits, the
embedding -> GatherBlockQuantized, all in one block format (:mod:`moedge.export.quantize`). The router stays in float32:
a flipped expert costs more than a few kilobytes.

Two errors are kept apart. Kernel error: the rewritten block against the same block in float32 on the *de-quantised*
weights, once with float32 activations (layout and arithmetic, 2e-6) and once as it will run, with int8 activations.
Quantisation error: the block on de-quantised weights against the block on the original ones; it is reported, not
judged, because it is a property of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.lowering import (
    Lowered,
    Rewrite,
    legality,
    mistakes,
    ort_matmul,
    ort_nbits,
    ort_products,
    ort_qmoe,
    selftest,
    weights,
)
from moedge.export.lowering import onnxruntime as ort_cpu
from moedge.export.lowering.graph import array_of, remove_unused
from moedge.export.nodes import has_biases, layer_of, nodes_of, routed_directly
from moedge.export.quantize import BLOCK, QUANTISED, Quantized, account, quantize, stored_bytes

INT8_LIMIT = 4e-2
"""Largest relative error of a block that runs with int8 activations. A block of 32 is rounded in steps of max|x| / 127,
an error of max|x| / (127 * sqrt(12)) per element. For normal x, max|x| of 32 is about 2.1 standard deviations: 0.5 % of
each product's input. An FFN has three such inputs in a chain and SiLU's slope: about 1.2 % (measured 1.0 to 1.6 % of
the largest output, H 32 to 576). Two and a half times that; every known mistake gives more than 10 %."""


def lower(
    model: ir.Model,
    *,
    max_length: int,
    bits: int,
    method: str = "rtn",
    moments: Mapping[str, np.ndarray] | None = None,
) -> Lowered:
    """Rewrite ``model`` in place for ONNX Runtime's CPU provider with weights of ``bits`` bits.

    Args:
        moments: of the inputs by weight, for method ``gptq``; a weight without (the embedding) is rounded to the
            nearest.

    Raises:
        MoEdgeError: the model cannot be quantised (the message says why), a block does not compute what it replaced,
            or a tensor class that should be quantised is not.
    """
    target = f"ort-cpu-int{bits}"
    before = model.clone()
    unfit = _check(before, target)
    table = weights.collect(before)
    narrow = min((weight.columns for weight in table.values() if weight.tensor_class == "experts"), default=2 * BLOCK)
    if method == "rtn-asymmetric" and narrow <= BLOCK and not unfit:
        raise MoEdgeError(
            f"Cannot lower for {target}: experts of {narrow} neurons are one block, whose zero points QMoE reads in "
            "another layout; use symmetric blocks (rtn)."
        )
    chosen = {name: weight for name, weight in table.items() if weight.tensor_class in QUANTISED}
    values = before.graph.initializers
    known = moments or {}
    packed = {
        name: quantize(weights.array(values[name], weight), bits, method, known.get(name))
        for name, weight in chosen.items()
    }
    reference = dequantized_graph(before, packed, table)

    rewrites, cache = ort_cpu.lower_norms_and_attention(model, before, max_length)
    classes = {name: weight.tensor_class for name, weight in chosen.items()}
    routed = [str(node.outputs[0].name) for node in nodes_of(model, "SparseGLU")]
    if unfit:
        parts = _experts(packed, [name for name, found in classes.items() if found == "experts"])
        count, taps = ort_products.fuse(model)
        edges = ort_nbits.fuse(model, {**packed, **parts}, {**classes, **dict.fromkeys(parts, "experts")})
    else:
        count, taps = ort_qmoe.fuse(model, packed)
        edges = ort_nbits.fuse(model, packed, classes)
    edges.pop("experts", None)  # inside of an FFN, which is tested whole
    sizes = _account(before, model, table, bits, method, padded=not unfit)
    merged, _ = ort_matmul.merge_siblings(model)
    remove_unused(model)

    exact = ort_nbits.with_accuracy(model, 0)
    test = partial(_test, before, reference, exact, model)
    if count:
        # 8-bit experts have no kernel with float32 activations (docs/quantization.md); products have.
        exact_too = bits == 4 or bool(unfit)
        blocks = [_ffn(before, name, packed, exact_too) for name in dict.fromkeys((routed[0], routed[-1]))]
        if unfit:
            rewrites.append(Rewrite(_KERNEL, 0, "refused", unfit))
        name = ort_products.REWRITE if unfit else _KERNEL
        rewrites.append(Rewrite(name, count, "applied", self_test=test(name.rpartition("-> ")[2], blocks)))
    for tensor_class, groups in edges.items():
        kind = "GatherBlockQuantized" if tensor_class == "embedding" else "MatMulNBits"
        ends = [groups[0]] if len(groups) == 1 else [groups[0], groups[-1]]
        blocks = [{"names": names, "inputs": _inputs(before, names)} for names in ends]
        name = f"{tensor_class} -> {kind}"
        if tensor_class == "embedding" and len(groups) > 1:
            name = "embedding -> GatherBlockQuantized, tied output projection -> MatMulNBits"
        rewrites.append(Rewrite(name, len(groups), "applied", self_test=test(name, blocks)))
    if merged:
        rewrites.append(Rewrite("products of the router -> one MatMul + Split", merged, "applied"))
    limits = ort_cpu.limits(cache)
    if count and not unfit:
        limits.append("equal router scores go to the higher expert index, in PyTorch to the lower (QMoE)")
    quantization = {
        "bits": bits,
        "block": BLOCK,
        "method": method,
        "classes": [{**vars(size), "bits_per_weight": size.bits_per_weight} for size in sizes],
        "tensors": _where(model, chosen, before),
    }
    return Lowered(rewrites, {layer: vars(tap) for layer, tap in taps.items()}, cache, limits, quantization)


_KERNEL = "Route + SparseGLU -> QMoE"


def _check(model: ir.Model, target: str) -> str | None:
    """Refuse what the kernels cannot hold; see :mod:`legality`. Return why ``QMoE`` alone cannot, or None."""
    experts = nodes_of(model, "SparseGLU")
    if not all(map(routed_directly, experts)):
        raise MoEdgeError(f"Cannot lower experts inside experts for {target}; export a hierarchical model to ort-cpu.")
    dtypes = {value.dtype for value in model.graph.initializers.values() if value.dtype}
    floats = {dtype.name for dtype in dtypes if dtype.is_floating_point()}
    reason = legality.runtime() or legality.quantized_cpu(
        dtypes=floats, hidden_sizes={int(array_of(node.inputs[5]).shape[1]) for node in experts}
    )
    if reason:
        raise MoEdgeError(f"Cannot lower for {target}: {reason}.")
    return legality.qmoe_cpu(
        activations={node.attributes["activation"].as_string() for node in experts},
        smallest_weight=ort_cpu.smallest_weight(model),
        biased=any(map(has_biases, experts)),
    )


def _experts(packed: Mapping[str, Quantized], stacks: Sequence[str]) -> dict[str, Quantized]:
    """Each expert of the quantised stacks, by the name of its matrix in :mod:`ort_products`."""
    return {
        ort_products.matrix_name(name, expert): packed[name].expert(expert)
        for name in stacks
        for expert in range(len(packed[name].packed))
    }


def dequantized_graph(model: ir.Model, packed: dict[str, Quantized], table: dict[str, weights.Weight]) -> ir.Model:
    """Return a copy of a float graph with the de-quantised values of ``packed``, made when they are read."""
    copy = model.clone()
    weights.set_dequantized(copy, packed, table)
    return copy


def _ffn(model: ir.Model, routed: str, packed: dict[str, Quantized], exact: bool) -> dict[str, Any]:
    node = mistakes.FFN.find(model, routed).node
    stacks = [packed[str(value.name)] for value in node.inputs[3:6] if value is not None]
    return {"routed": routed, "weights": stacks, "exact": exact}


def _inputs(model: ir.Model, names: Sequence[str]) -> list[str]:
    """The value that the products (or the lookup) called ``names`` read."""
    node = next(node for node in model.graph if any(output.name == names[0] for output in node.outputs))
    value = node.inputs[1] if node.op_type == "Gather" else node.inputs[0]
    assert value is not None
    return [str(value.name)]


def _test(
    before: ir.Model, reference: ir.Model, exact: ir.Model, model: ir.Model, name: str, blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run the self-tests of one rewrite and return its entry for the manifest.

    Raises:
        MoEdgeError: kernel error above its limit.
    """
    found: dict[str, list[selftest.SelfTest]] = {"exact": [], "int8": [], "quantisation": []}
    exact_limit = ort_cpu.block_limit(before)
    for block in blocks:
        for kind, one, two, limit in (
            ("exact", reference, exact, exact_limit),
            ("int8", reference, model, INT8_LIMIT),
            ("quantisation", before, reference, float("inf")),
        ):
            if kind == "exact" and not block.get("exact", True):
                continue
            if "routed" in block:
                test = selftest.compare_ffn(name, one, two, block["routed"], limit, block["weights"])
            else:
                test = selftest.compare(name, one, two, block["names"], limit, inputs=block["inputs"])
            if not test.passed:
                raise MoEdgeError(f"{test.failure()} Use --target ort-cpu and report the runtime version.")
            found[kind].append(test)
    int8 = max(found["int8"], key=lambda test: test.max_rel_error)
    entry = {**int8.to_json(), "quantisation_error": max(test.max_rel_error for test in found["quantisation"])}
    if found["exact"]:
        entry["float32_activations"] = max(test.max_rel_error for test in found["exact"])
    return entry


def _account(
    before: ir.Model, model: ir.Model, table: dict[str, weights.Weight], bits: int, method: str, *, padded: bool
) -> list[Any]:
    """Account for every initializer of both graphs; ``padded``: experts are as wide as QMoE needs them.

    Raises:
        MoEdgeError: a class that should be quantised is not, or not as it should be.
    """

    def kept(name: str) -> str:
        if name in table:
            return table[name].tensor_class
        if ".router" in name or name.endswith("selection_bias"):
            return "router"
        return "norms" if "norm" in name else "other"

    rows = []
    for name, value in before.graph.initializers.items():
        assert value.const_value is not None
        size = int(value.const_value.nbytes)
        count = int(value.const_value.size)
        should = size
        if kept(name) in QUANTISED:
            weight = table[name]
            # QMoE's expert widths are padded to whole blocks: rows of gate and up, inputs of down.
            grown = padded and _is_gate_or_up(before, name)
            extra = ort_qmoe.padded_width(weight.shape[1]) / weight.shape[1] if grown else 1
            should = stored_bytes(round(weight.rows * extra), weight.columns, bits, method)
        rows.append((kept(name), count, size, should))
    after = [
        (ort_nbits.tensor_class(name) or kept(name), int(value.const_value.nbytes))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    ]
    sizes, wrong = account(rows, after)
    if wrong:
        raise MoEdgeError(f"Quantisation to {bits} bits is incomplete: {'; '.join(wrong)}. This is a bug; report it.")
    return sizes


def _is_gate_or_up(model: ir.Model, name: str) -> bool:
    value = model.graph.initializers[name]
    return any(use.node.op_type == "SparseGLU" and use.idx in (3, 4) for use in value.uses())


def _where(model: ir.Model, chosen: dict[str, weights.Weight], before: ir.Model) -> dict[str, dict[str, Any]]:
    """Say for each weight of the portable graph where its quantised rows lie, so that a reader can de-quantise it."""
    made = [name.removesuffix(".q") for name in model.graph.initializers if name.endswith(".q")]
    places: dict[str, dict[str, Any]] = {}
    divided = {  # matrix of one expert -> its stack
        ort_products.matrix_name(name, expert): name
        for name, weight in chosen.items()
        if weight.layout == "ENK"
        for expert in range(weight.shape[0])
    }
    for tensor in made:
        rest = tensor.split(".", 1)[1]
        row = 0
        for name in rest.split("+"):
            if name in divided:
                experts = chosen[divided[name]]
                rows = experts.shape[1]
                place = places.setdefault(experts.name, {"layout": "ENK", "columns": experts.columns, "experts": []})
                place["experts"].append({"tensor": tensor, "rows": [row, row + rows]})
                row += rows
            elif name in chosen:
                rows = chosen[name].rows
                places[name] = {"tensor": tensor, "rows": [row, row + rows], "layout": chosen[name].layout}
                places[name]["columns"] = chosen[name].columns
                row += rows
    for node in nodes_of(before, "SparseGLU"):
        layer = layer_of(node)
        if str(getattr(node.inputs[3], "name", "")) in places:
            continue
        for part, value in zip(("gate", "up", "down"), node.inputs[3:6], strict=True):
            assert value is not None
            shape = chosen[str(value.name)].shape
            stack = "down" if part == "down" else "gate_up"
            places[str(value.name)] = {"tensor": f"experts.layers.{layer}.{stack}", "part": part, "layout": "ENK"}
            places[str(value.name)]["rows"], places[str(value.name)]["columns"] = [0, shape[1]], shape[2]
    if missing := set(chosen) - set(places):
        name = sorted(missing)[0]
        raise MoEdgeError(f"{name} was quantised but is not in the lowered graph. This is a bug; report it.")
    return places
