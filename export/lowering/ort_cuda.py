"""Target ``ort-cuda``: ONNX Runtime's fused CUDA kernels, float16.

The rewrites are those of ``ort-cpu`` with three differences, each a row of docs/lowering.md:

* attention without the padding bias: the CUDA kernel refused that input up to 1.28 and takes its slowest path with it
  since, so rows of a batch must be equally long;
* experts as ``com.microsoft.MoE`` by the log-weight adapter, which makes its normalisation exact;
* half precision is typed last (``half.py``), the router stays float32.

No CUDA device is needed to lower. Every rewrite is executed in float32 on the CPU provider beside what it replaced; the
typed attention and FFN of one layer are then executed there in float16. What the CPU cannot show is the CUDA kernels
themselves: tests marked ``gpu`` run the whole file there, the others run a small one on the CPU.
"""

from __future__ import annotations

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.lowering import Lowered, Rewrite, half, legality, onnxruntime, ort_matmul, portable, selftest
from moedge.export.lowering.graph import remove_unused
from moedge.export.lowering.tensorrt import HALF_LIMIT
from moedge.export.nodes import nodes_of


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Rewrite ``model`` in place for ONNX Runtime's CUDA provider.

    Raises:
        MoEdgeError: no runtime here to execute the self-tests, a graph without the fused forms, or a block that does
            not compute what it replaced.
    """
    if reason := legality.runtime():
        raise MoEdgeError(f"Cannot lower for ort-cuda: {reason}.")
    before = model.clone()
    experts = nodes_of(before, "SparseGLU")
    rewrites, cache = onnxruntime.lower_norms_and_attention(model, before, max_length, padding=False)
    if cache["kind"] != "shared_buffer":
        raise MoEdgeError(f"Cannot lower for ort-cuda: {rewrites[-1].reason}; use --target ort-cpu or tensorrt.")
    taps: dict[int, dict[str, object]] = {}
    edges: list[str] = []
    if experts:
        illegal = legality.moe_cuda(
            activations={node.attributes["activation"].as_string() for node in experts},
            smallest_weight=onnxruntime.smallest_weight(before),
        )
        rewrites.append(onnxruntime.fuse_experts(model, before, illegal, taps))
        if not taps:
            raise MoEdgeError(f"Cannot lower for ort-cuda: {rewrites[-1].reason}; use --target portable or tensorrt.")
        edges.append(str(experts[0].outputs[0].name))
    else:
        taps = portable.taps(model)
    edges += onnxruntime.attention_edges(before)
    rewrites.append(
        onnxruntime.apply(
            model, before, "tied output projection -> FusedMatMul", None,
            lambda: ort_matmul.fuse_transposed(model), lambda: ["logits"],
        )
    )  # fmt: skip
    remove_unused(model)
    typed = half.convert(model)
    cases = [case for case in selftest.attention_cases(before) if not case.padding]
    name = "float32 -> float16; the router stays float32"
    test = selftest.compare(name, before, model, edges, HALF_LIMIT, cases)
    if not test.passed:
        raise MoEdgeError(test.failure())
    rewrites.append(Rewrite(name, typed, "applied", "", test.to_json()))
    cache["dtype"] = "float16"
    limits = [
        *onnxruntime.limits(cache),
        "rows of a batch must be equally long: the attention kernel takes no mask (padding)",
        "executed on the CPU provider only when it was exported; no CUDA device was used",
    ]
    return Lowered(rewrites, taps, cache, limits=limits)
