"""RMS norms -> (Skip)SimplifiedLayerNormalization, by onnxscript's own rules, which also mark rotary embeddings."""

from __future__ import annotations

import onnx_ir as ir

from moedge.export.lowering.rule import Applied, Block


class FuseNorms:
    """Rule for the norms of a graph. The marks of rotary embeddings are what the attention rule consumes."""

    name = "RMS norms -> (Skip)SimplifiedLayerNormalization"

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused: what is not recognised stays as it is."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Fuse every norm; the first and the last are tested together."""
        from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
        from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

        fuse_rms_normalization(graph)
        fuse_skip_rms_normalization(graph)
        fused = [node for node in graph.graph if node.op_type.endswith("SimplifiedLayerNormalization")]
        if not fused:
            return Applied(0, reason="no RMS normalisation was recognised")
        return Applied(len(fused), [Block(tuple(str(node.outputs[0].name) for node in (fused[0], fused[-1])))])


def mark_rotary(graph: ir.Model) -> None:
    """Mark rotary embeddings as nodes of their own (x, cos, sin)."""
    from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding

    fuse_rotary_embedding(graph)
