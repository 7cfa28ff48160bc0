"""Target ``portable``: standard operators only, in any ONNX runtime and in ``onnx.reference``.

The graph keeps its ``moedge::`` nodes; only the body of SparseGLU changes, from the reference chain to the form that
runs every expert on every token. The chain gathers a weight matrix per row (T*k*I*H floats), which at prefill costs
more memory than the model.
"""

from __future__ import annotations

import onnx_ir as ir

from moedge.export.functions import DOMAIN, attach
from moedge.export.lowering import Lowered, Rewrite
from moedge.export.lowering.graph import layer_of


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Give SparseGLU its dense-all body, in place. The weights are untouched."""
    attach(model, form="dense")
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "SparseGLU"]
    taps = {}
    for node in nodes:
        route = node.inputs[1].producer() if node.inputs[1] is not None else None
        assert route is not None
        name = str(node.inputs[1].name)
        taps[layer_of(node)] = {"output": name, "kind": "indices", "top_k": route.attributes["top_k"].as_int()}
    rewrites = [Rewrite("SparseGLU body -> every expert on every token", len(nodes), "applied")] if nodes else []
    return Lowered(rewrites, taps, {"kind": "concat", "max_length": max_length})
