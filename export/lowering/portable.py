"""Target ``portable``: standard operators only, in any ONNX runtime and in ``onnx.reference``.

The graph keeps its ``moedge::`` nodes; only the body of SparseGLU changes, from the reference chain to the form that
runs every expert on every token. The chain gathers a weight matrix per row (T*k*I*H floats), which at prefill costs
more memory than the model.
"""

from __future__ import annotations

import onnx_ir as ir

from moedge.export.graph.nodes import active_of, attach, holds_experts, layer_of, nodes_of
from moedge.export.lowering import Lowered, Rewrite
from moedge.export.manifest import CacheFacts, Tap


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Give SparseGLU its dense-all body, in place. The weights are untouched."""
    attach(model, form="dense")
    found = taps(model)
    rewrites = [Rewrite("SparseGLU body -> every expert on every token", len(found), "applied")] if found else []
    return Lowered(rewrites, found, CacheFacts(kind="concat", max_length=max_length))


def taps(model: ir.Model) -> dict[int, Tap]:
    """Say where each layer's routing can be read: the indices of the SparseGLU that holds its routed experts."""
    found: dict[int, Tap] = {}
    for node in filter(holds_experts, nodes_of(model, "SparseGLU")):
        indices = node.inputs[1]
        assert indices is not None
        found[layer_of(node)] = Tap(output=str(indices.name), kind="indices", top_k=active_of(node))
    return found
