"""Float32 matrix products as sums, for GPUs that TensorRT for RTX gives no float32 matrix product (SM75, Turing).

Routers stay in float32 in a half-precision graph, and their products are the only ones that do. The product of x [T, K]
and a constant W [N, K] is the sum over k of x[t, 1, k] * W[n, k]: the same terms, perhaps in another order, without a
matrix product. It costs [T, N, K] terms in memory where the builder does not fuse them, so other GPUs keep the product.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from moedge._files import link_or_copy
from moedge.export.bundle import MODEL, Bundle
from moedge.export.graph.build import Builder, constant_of, remove_unused


def write_without_products(bundle: Bundle, folder: Path) -> tuple[Path, int]:
    """Write the bundle's graph to ``folder`` with every float32 product as a sum; return its path and how many."""
    model = ir.load(bundle.model_path)
    count = products_as_sums(model)
    for name in bundle.manifest.weight_files:
        link_or_copy(bundle.path / name, folder / name)
    ir.save(model, folder / MODEL)  # the weights stay where they are, so nothing is copied
    return folder / MODEL, count


def products_as_sums(model: ir.Model) -> int:
    """Replace every float32 product of an activation [..., K] and a constant matrix, in place; return how many."""
    count = 0
    for node in [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]:
        x, weight = node.inputs[:2]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        rows_first = bool(settings.pop("transB", 0))
        if any(settings.get(name, kept) != kept for name, kept in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))):
            continue  # no router is traced to such a product
        builder = Builder(model, node)
        if not rows_first:
            weight = builder.node("Transpose", [weight], attributes={"perm": [1, 0]})
        terms = builder.node("Mul", [builder.node("Unsqueeze", [x, constant_of(builder, [-2])]), weight])
        y = builder.node("ReduceSum", [terms, constant_of(builder, [-1])], attributes={"keepdims": 0})
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            y = builder.node("Add", [y, node.inputs[2]])
        builder.replace_output(node.outputs[0], y)
        count += 1
    remove_unused(model)
    return count
