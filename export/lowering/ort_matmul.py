"""MatMul(x, Transpose(W)) -> com.microsoft.FusedMatMul(x, W, transB=1).

A tied output projection reaches the graph as the transpose of the embedding. ONNX Runtime would fold the transpose at
load and hold the largest matrix of a small model twice.
"""

from __future__ import annotations

import onnx_ir as ir

from moedge.export.lowering.graph import Builder, remove_unused


def fuse_transposed(model: ir.Model) -> tuple[int, str]:
    """Fuse every MatMul whose second input is a transposed weight; return how many."""
    count = 0
    for node in list(model.graph):
        transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is None or weight.const_value is None or list(transpose.attributes["perm"].as_ints()) != [1, 0]:
            continue
        builder = Builder(model, before=node)
        product = builder.node(
            "FusedMatMul", [node.inputs[0], weight], domain="com.microsoft", attributes={"transA": 0, "transB": 1}
        )
        builder.replace_output(node.outputs[0], product)
        count += 1
    remove_unused(model)
    return count, "" if count else "no transposed weight"
