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

from dataclasses import dataclass

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import half
from moedge.export.graph.build import remove_unused
from moedge.export.graph.nodes import attention_kinds, nodes_of
from moedge.export.lowering import Lowered, capabilities, gather, portable
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import cpu as onnxruntime
from moedge.export.lowering.ort.attention import edges
from moedge.export.lowering.ort.matmul import FuseTransposed
from moedge.export.lowering.ort.moe import FuseMoE
from moedge.export.lowering.rule import Applied, Block, Work
from moedge.export.lowering.trt.engine import HALF_LIMIT


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Rewrite ``model`` in place for ONNX Runtime's CUDA provider.

    Raises:
        MoEdgeError: no runtime here to execute the self-tests, a graph without the fused forms, or a block that does
            not compute what it replaced.
    """
    if reason := capabilities.runtime():
        raise MoEdgeError(f"Cannot lower for ort-cuda: {reason}.")
    work = Work(model, onnxruntime.block_limit(model), onnxruntime.ADVICE)
    cache = onnxruntime.norms_and_attention(work, max_length, padding=False)
    if cache.kind != "shared_buffer":
        raise MoEdgeError(f"Cannot lower for ort-cuda: {work.rewrites[-1].reason}; use --target ort-cpu or tensorrt.")
    experts = nodes_of(work.before, "SparseGLU")
    if experts and not work.run(FuseMoE("cuda")):
        raise MoEdgeError(f"Cannot lower for ort-cuda: {work.rewrites[-1].reason}; use --target portable or tensorrt.")
    taps = work.taps or portable.taps(model)
    work.run(FuseTransposed())
    remove_unused(model)
    work.limit, work.advice = HALF_LIMIT, "The float16 graph does not compute what it replaced."
    outputs = [*(str(node.outputs[0].name) for node in experts[:1]), *edges(attention_kinds(work.before))]
    outputs += gather.outputs(work.before)
    work.run(ToHalf(outputs, [case for case in selftest.attention_cases(work.before) if not case.padding]))
    cache = cache.model_copy(update={"dtype": "float16"})
    limits = [
        *onnxruntime.limits(cache),
        "rows of a batch must be equally long: the attention kernel takes no mask (padding)",
        "executed on the CPU provider only when it was exported; no CUDA device was used",
    ]
    return Lowered(work.rewrites, taps, cache, limits=limits)


@dataclass(frozen=True)
class ToHalf:
    """Rule that types the graph as float16, last of all; the blocks that give ``outputs`` are executed on ``cases``."""

    outputs: list[str]
    cases: list[selftest.Case]
    name: str = "float32 -> float16; the router stays float32"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused: what does not fit float16 is an error."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Type every value."""
        return Applied(half.convert(graph), [Block(tuple(self.outputs))], cases=self.cases)
