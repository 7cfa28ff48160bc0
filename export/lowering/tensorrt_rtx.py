"""Target ``tensorrt-rtx``: the graph of ``tensorrt`` with the ONNX ``Attention`` operator (opset 23).

TensorRT for RTX builds engines on any machine, also one without a GPU. Experts are merged or, with
``experts="plugins"``, nodes that ``moedge build`` gives to a C++ plugin library (:mod:`moedge.export.launcher`).
"""

from __future__ import annotations

import onnx_ir as ir

from moedge.export.lowering import Lowered, Rewrite, legality, trt_attention
from moedge.export.lowering.graph import size
from moedge.export.lowering.tensorrt import lower_half
from moedge.export.nodes import nodes_of


def lower(model: ir.Model, *, max_length: int, experts: str | None = None, dtype: str = "float16") -> Lowered:
    """Rewrite ``model`` in place; see :func:`moedge.export.lowering.tensorrt.lower_half`."""
    heads = {size(node.inputs[0], 3) for node in nodes_of(model, "CausalAttention")}
    illegal = legality.attention_operator(head_dim=min(heads, default=legality.SMALLEST_HEAD))
    attention: trt_attention.Form = "products" if illegal else "operator"
    lowered = lower_half(model, max_length=max_length, attention=attention, experts=experts, dtype=dtype)
    if illegal:
        lowered.rewrites.append(Rewrite("CausalAttention -> Attention operator", 0, "refused", illegal))
    return lowered
