"""Float32 products as multiply and add, for GPUs on which TensorRT for RTX has no float32 matrix product (SM75).

Routers stay in float32, and TensorRT for RTX 1.7.1 refuses their products for Turing ("FP32 GEMM is not supported"),
while it builds ``ReduceSum(x * w)`` for it. That form computes [T, E, H] numbers, so only an engine for such a GPU gets
it: ``moedge build`` rewrites the graph of the bundle that it reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from moedge.export.lowering.graph import Builder, array_of, constant_of, remove_unused


def rewrite(model: ir.Model) -> int:
    """Replace every float32 product with a constant matrix in place; return how many."""
    count = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        matrix = array_of(weight)
        turned = "transB" in node.attributes and node.attributes["transB"].as_int()
        builder = Builder(model, before=node)
        rows = builder.initializer(f"{node.outputs[0].name}.rows", np.array(matrix if turned else matrix.T))
        column = builder.node("Unsqueeze", [node.inputs[0], constant_of(builder, [-2])])
        y = builder.node("Mul", [column, rows])
        y = builder.node("ReduceSum", [y, constant_of(builder, [-1])], attributes={"keepdims": 0})
        if len(node.inputs) > 2:
            y = builder.node("Add", [y, node.inputs[2]])
        builder.replace_output(node.outputs[0], y)
        count += 1
    remove_unused(model)
    return count


def write(source: Path, folder: Path) -> Path:
    """Write the graph ``source`` with its float32 products rewritten into ``folder``; return the new file."""
    model = ir.load(source)
    rewrite(model)
    folder.mkdir()
    ir.save(model, folder / source.name, external_data=f"{source.name}.data")
    return folder / source.name
