"""Target ``openvino``: the portable graph with its function bodies put in place of the ``moedge::`` nodes.

OpenVINO reads no model-local functions ("No conversion rule found for operations: moedge.CausalAttention", 2026.4).
Nothing else changes: every node is a standard operator of one opset, and any ONNX runtime runs the result.
"""

from __future__ import annotations

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.functions import DOMAIN
from moedge.export.graph.nodes import attach, attention_kinds, nodes_of
from moedge.export.lowering import Lowered, Rewrite, gather, portable
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort.cpu import block_limit
from moedge.export.manifest import CacheFacts


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Inline every function of ``model``, in place. Weights and the names of routing taps stay.

    Raises:
        MoEdgeError: an inlined block does not compute what its function did; the message names the block.
    """
    import onnx_ir.passes.common as passes

    before = model.clone()
    found = portable.taps(model)
    nodes = [node for node in before.graph if node.domain == DOMAIN]
    attach(model, form="tiled")
    passes.InlinePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.NameFixPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    name = "moedge:: nodes -> their bodies in standard operators"
    attention = [str(node.outputs[0].name) for node in attention_kinds(before)]
    routed = [str(node.outputs[0].name) for node in nodes_of(before, "SparseGLU")]
    limit = block_limit(before)
    tests = [selftest.compare(name, before, model, attention, limit, selftest.attention_cases(before))]
    if kept := gather.outputs(before):
        tests.append(selftest.compare(name, before, model, kept, limit))
    ends = dict.fromkeys(routed[:1] + routed[-1:])
    tests += [selftest.compare_ffn(name, before, model, ffn, limit) for ffn in ends]
    worst = max(tests, key=lambda test: (not test.passed, test.max_rel_error))
    if not worst.passed:
        raise MoEdgeError(f"{worst.failure()} Use --target portable and report the version of onnx-ir.")
    rewrite = Rewrite(name, len(nodes), "applied", self_test=worst.to_json())
    return Lowered([rewrite], found, CacheFacts(kind="concat", max_length=max_length))
