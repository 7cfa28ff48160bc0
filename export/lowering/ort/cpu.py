"""Target ``ort-cpu``: ONNX Runtime's fused CPU kernels, float32.

A list of rules: norms, attention, experts, tied output projection, products of one value. Each is refused or applied to
every layer, and one layer of it is executed beside what it replaced. What is refused stays standard operators.
"""

from __future__ import annotations

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import weights
from moedge.export.graph.build import remove_unused
from moedge.export.graph.nodes import nodes_of
from moedge.export.lowering import Lowered, capabilities, portable
from moedge.export.lowering.ort.attention import FuseAttention
from moedge.export.lowering.ort.gathered import FuseGather
from moedge.export.lowering.ort.matmul import FuseTransposed, MergeSiblings
from moedge.export.lowering.ort.moe import FuseMoE
from moedge.export.lowering.ort.norms import FuseNorms, mark_rotary
from moedge.export.lowering.ort.products import ExpertProducts, preferred
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.lowering.ort.tied import LookUpColumns
from moedge.export.lowering.rule import Work
from moedge.export.manifest import CacheFacts

# Two float32 evaluations of one block differ by the order of their sums: about sqrt(n) * 2^-24 of the largest output
# with n terms. n is the widest product of a block: 5.4e-6 for n = 8192 (2.2e-6 measured). Up to n = 1126 it stays.
BLOCK_LIMIT = 2e-6

ADVICE = "This runtime computes the block wrongly; use --target portable and report the runtime version."


def block_limit(model: ir.Model) -> float:
    """Largest relative error of a float32 block of ``model``, a portable graph, against another order of its sums."""
    widest = max((weight.columns for weight in weights.collect(model).values()), default=1)
    return max(BLOCK_LIMIT, float(widest**0.5) * 2.0**-24)


def lower(model: ir.Model, *, max_length: int) -> Lowered:
    """Rewrite ``model`` in place for ONNX Runtime's CPU provider.

    Raises:
        MoEdgeError: a rewritten block does not compute what it replaced; the message names the block and the error.
    """
    if reason := capabilities.runtime():
        raise MoEdgeError(f"Cannot lower for ort-cpu: {reason}.")
    work = Work(model, block_limit(model), ADVICE)
    cache = norms_and_attention(work, max_length)
    if nodes_of(model, "SparseGLU"):
        work.first(FuseRouted(), FuseMoE(slower=preferred(model)), ExpertProducts())
        work.taps = work.taps or portable.taps(model)
    if nodes_of(model, "KeepLarge"):
        gather = FuseGather()
        if work.run(gather):
            work.run(LookUpColumns(gather.stored))
    work.run(FuseTransposed())
    work.run(MergeSiblings())
    remove_unused(model)
    return Lowered(work.rewrites, work.taps, cache, limits=limits(cache))


def norms_and_attention(work: Work, max_length: int, *, padding: bool = True) -> CacheFacts:
    """Run the rules that touch no weight matrix; return the cache's manifest entry.

    ``padding=False`` gives attention no bias that hides left padding.
    """
    work.run(FuseNorms())
    mark_rotary(work.model)
    fused = work.run(FuseAttention(max_length, padding))
    return CacheFacts(kind="shared_buffer" if fused else "concat", max_length=max_length)


def limits(cache: CacheFacts) -> list[str]:
    """What the lowered graph cannot do, for the manifest."""
    if cache.kind != "shared_buffer":
        return []
    return ["after its prefill, a batch larger than 1 takes one new token at a time (GroupQueryAttention)"]
