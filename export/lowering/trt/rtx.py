"""Target ``tensorrt-rtx``: the graph of ``tensorrt`` with the ONNX ``Attention`` operator (opset 23).

TensorRT for RTX builds engines on any machine, also one without a GPU. Experts are merged or, with
``experts="plugins"``, nodes that ``moedge build`` gives to a C++ plugin library (:mod:`moedge.export.device.launcher`).
"""

from __future__ import annotations

import onnx_ir as ir

from moedge.export.lowering import Lowered, Rewrite
from moedge.export.lowering.trt import attention as trt_attention
from moedge.export.lowering.trt.engine import lower_half


def lower(model: ir.Model, *, max_length: int, experts: str | None = None, dtype: str = "float16") -> Lowered:
    """Rewrite ``model`` in place; see :func:`moedge.export.lowering.trt.engine.lower_half`."""
    illegal = trt_attention.operator_refusal(model)
    attention: trt_attention.Form = "products" if illegal else "operator"
    lowered = lower_half(model, max_length=max_length, attention=attention, experts=experts, dtype=dtype)
    if illegal:
        lowered.rewrites.append(Rewrite("CausalAttention -> Attention operator", 0, "refused", illegal))
    return lowered
