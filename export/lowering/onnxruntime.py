"""Target ``ort-cpu``: ONNX Runtime's fused CPU kernels, float32.

Rewrites, in order: norms -> (Skip)SimplifiedLayerNormalization and rotary recognition (onnxscript's own rules),
attention -> GroupQueryAttention, routed FFN -> MoE, tied output projection -> FusedMatMul, products of one value ->
one product. Each is checked for legality, applied to every layer, and one layer of it is executed beside what it
replaced. A refused rewrite leaves standard operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.lowering import (
    Lowered,
    Rewrite,
    legality,
    ort_attention,
    ort_matmul,
    ort_moe,
    ort_products,
    portable,
    selftest,
    weights,
)
from moedge.export.lowering.graph import array_of, remove_unused, required
from moedge.export.nodes import attention_kinds, nodes_of

# Two float32 evaluations of one block differ by the order of their sums: about sqrt(n) * 2^-24 of the largest output
# with n terms. n is the widest product of a block: 5.4e-6 for n = 8192 (2.2e-6 measured). Up to n = 1126 it stays.
BLOCK_LIMIT = 2e-6


def block_limit(model: ir.Model) -> float:
    """Largest relative error of a float32 block of ``model``, a portable graph, against another order of its sums."""
    widest = max((weight.columns for weight in weights.collect(model).values()), default=1)
    return max(BLOCK_LIMIT, float(widest**0.5) * 2.0**-24)


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Rewrite ``model`` in place for ONNX Runtime's CPU provider.

    Raises:
        MoEdgeError: a rewritten block does not compute what it replaced; the message names the block and the error.
    """
    if reason := legality.runtime():
        raise MoEdgeError(f"Cannot lower for ort-cpu: {reason}.")
    before = model.clone()
    rewrites, cache = lower_norms_and_attention(model, before, max_length)
    taps: dict[int, dict[str, object]] = {}
    experts = nodes_of(before, "SparseGLU")
    if experts:
        illegal = legality.moe_cpu(
            dtype=_dtype(before),
            activations={node.attributes["activation"].as_string() for node in experts},
            smallest_weight=smallest_weight(before),
        )
        rewrites += _lower_experts(model, before, illegal, taps)
        taps = taps or portable.taps(model)
    rewrites.append(
        apply(
            model, before, "tied output projection -> FusedMatMul", None,
            lambda: ort_matmul.fuse_transposed(model), lambda: ["logits"],
        )
    )  # fmt: skip
    siblings: list[str] = []

    def merge() -> tuple[int, str]:
        count, outputs = ort_matmul.merge_siblings(model)
        siblings.extend(outputs)
        return count, "no value is multiplied by several matrices"

    rewrites.append(apply(model, before, "sibling MatMuls -> one MatMul + Split", None, merge, lambda: siblings))
    remove_unused(model)
    return Lowered(rewrites, taps, cache, limits=limits(cache))


def lower_norms_and_attention(
    model: ir.Model, before: ir.Model, max_length: int, *, padding: bool = True
) -> tuple[list[Rewrite], dict[str, object]]:
    """Apply the rewrites that touch no weight matrix; return them and the cache's manifest entry.

    ``padding=False`` gives attention no bias that hides left padding.
    """
    cache: dict[str, object] = {"kind": "concat", "max_length": max_length}
    rewrites = [_norms(model, before)]
    rewrites.append(
        apply(
            model, before, "CausalAttention -> GroupQueryAttention", legality.attention_cpu(dtype=_dtype(before)),
            lambda: ort_attention.fuse(model, max_length, padding=padding), lambda: attention_edges(before),
            [case for case in selftest.attention_cases(before) if padding or not case.padding],
        )
    )  # fmt: skip
    if rewrites[-1].status == "applied":
        cache["kind"] = "shared_buffer"
    return rewrites, cache


def _dtype(model: ir.Model) -> str:
    dtype = next(value for value in model.graph.initializers.values() if value.dtype is not None).dtype
    assert dtype is not None
    return "float32" if dtype in (ir.DataType.FLOAT, ir.DataType.INT64) else str(dtype.name).lower()


_KERNEL = "Route + SparseGLU -> MoE"


def _lower_experts(
    model: ir.Model, before: ir.Model, illegal: str | None, taps: dict[int, dict[str, object]]
) -> list[Rewrite]:
    """Rewrite the experts in the form that is faster, or in the one that is possible."""
    if not illegal and ort_products.preferred(before):
        illegal = "products of each expert are faster where experts are few and wide"
    kernel = fuse_experts(model, before, illegal, taps)
    if kernel.status == "applied":
        return [kernel]
    if reason := ort_products.illegal(before):
        return [kernel, Rewrite(ort_products.REWRITE, 0, "refused", reason)]
    count, found = ort_products.fuse(model)
    taps.update({layer: vars(tap) for layer, tap in found.items()})
    return [
        kernel,
        Rewrite(ort_products.REWRITE, count, "applied", self_test=_test_experts(ort_products.REWRITE, before, model)),
    ]


def fuse_experts(model: ir.Model, before: ir.Model, illegal: str | None, taps: dict[int, dict[str, object]]) -> Rewrite:
    """Rewrite the experts as ``MoE``; taps of the layers that hold routed experts are added to ``taps``."""
    if illegal:
        return Rewrite(_KERNEL, 0, "refused", illegal)
    count, reason, found = ort_moe.fuse(model)
    if not count:
        return Rewrite(_KERNEL, 0, "refused", reason)
    taps.update({layer: vars(tap) for layer, tap in found.items()})
    return Rewrite(_KERNEL, count, "applied", self_test=_test_experts(_KERNEL, before, model))


def _test_experts(name: str, before: ir.Model, model: ir.Model) -> dict[str, object]:
    """Execute the first and the last whole FFN, shared expert and router included, beside what it replaced."""
    outputs = [str(node.outputs[0].name) for node in nodes_of(before, "SparseGLU")]
    limit = block_limit(before)
    tests = [selftest.compare_ffn(name, before, model, routed, limit) for routed in {outputs[0], outputs[-1]}]
    worst = max(tests, key=lambda test: (not test.passed, test.max_rel_error))
    _judge(worst)
    return worst.to_json()


def _judge(test: selftest.SelfTest) -> None:
    if not test.passed:
        raise MoEdgeError(
            f"{test.failure()} This runtime computes the block wrongly; use --target portable and report the runtime "
            "version."
        )


def apply(
    model: ir.Model,
    before: ir.Model,
    name: str,
    illegal: str | None,
    rewrite: Callable[[], tuple[int, str]],
    edges: Callable[[], Sequence[str]],
    cases: Sequence[selftest.Case] = selftest.CASES,
) -> Rewrite:
    """Apply one rewrite unless it is illegal, then execute the block that computes ``edges`` before and after."""
    if illegal:
        return Rewrite(name, 0, "refused", illegal)
    count, reason = rewrite()
    if not count:
        return Rewrite(name, 0, "refused", reason)
    test = selftest.compare(name, before, model, edges(), block_limit(before), cases)
    _judge(test)
    return Rewrite(name, count, "applied", self_test=test.to_json())


def _norms(model: ir.Model, before: ir.Model) -> Rewrite:
    from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
    from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding
    from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

    fused: list[ir.Node] = []

    def fuse() -> tuple[int, str]:
        fuse_rms_normalization(model)
        fuse_skip_rms_normalization(model)
        fused.extend(n for n in model.graph if n.op_type.endswith("SimplifiedLayerNormalization"))
        return len(fused), "no RMS normalisation was recognised"

    name = "RMS norms -> (Skip)SimplifiedLayerNormalization"
    rewrite = apply(model, before, name, None, fuse, lambda: [str(n.outputs[0].name) for n in (fused[0], fused[-1])])
    fuse_rotary_embedding(model)  # only marks the pattern; the attention rewrite consumes the marks
    return rewrite


def attention_edges(model: ir.Model) -> list[str]:
    """Name what a block of each kind gives to the rest of the graph: output, present keys and values."""
    names = []
    for node in attention_kinds(model):
        reshape = next(iter(node.outputs[0].uses())).node
        names += [str(value.name) for value in (reshape.outputs[0], *map(required, node.inputs[1:3]))]
    return names


def smallest_weight(model: ir.Model) -> float:
    """Lower bound of the combination weights over all Route nodes (scaled: 1 + u_e * p with p in 0..1)."""
    smallest = 1.0
    for node in nodes_of(model, "Route"):
        rule, scores = node.attributes["rule"].as_string(), node.inputs[0]
        if rule == "scaled":
            smallest = min(smallest, 1.0 + float(np.minimum(array_of(node.inputs[2]), 0).min()))
        producer = scores.producer() if scores is not None else None
        if rule == "normalised" and (producer is None or producer.op_type != "Sigmoid"):
            smallest = 0.0  # nothing says that these scores are positive
    return smallest


def limits(cache: dict[str, object]) -> list[str]:
    """What the lowered graph cannot do, for the manifest."""
    if cache["kind"] != "shared_buffer":
        return []
    return ["after its prefill, a batch larger than 1 takes one new token at a time (GroupQueryAttention)"]
