"""Types and shapes of every value of a lowered graph, so that viewers and other tools need not guess.

A traced value keeps its type through a rewrite, for names survive. What a lowering adds in between has none: standard
operators get theirs from ONNX's shape inference, contrib operators and our own, which ONNX does not know, from the
rules here.
"""

from __future__ import annotations

import onnx_ir as ir

_CONTRIB = "com.microsoft"
_OWN = "moedge.cpu"
# (domain, operator): outputs with the type and shape of the first input. None of these is in ONNX's own schemas;
# ONNX Runtime keeps SimplifiedLayerNormalization in the default domain.
_SAME_AS_FIRST_INPUT = {
    (_CONTRIB, "MoE"): (0,),
    (_CONTRIB, "QMoE"): (0,),
    (_CONTRIB, "RotaryEmbedding"): (0,),
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): (0, 3),
    ("", "SimplifiedLayerNormalization"): (0,),
    (_OWN, "GatherGLU"): (0,),
    (_OWN, "RoutedGLU"): (0,),
}


def complete(model: ir.Model) -> None:
    """Give the values of the main graph the type and shape that inference finds; drop unused optional outputs."""
    import onnx_ir.passes.common as passes

    _drop_unused_optional_outputs(model)
    infer = passes.ShapeInferencePass(check_type=False, strict_mode=False)
    infer(model)
    while sum(_infer_contrib(node) for node in model.graph):  # not any(): every node gets its turn
        infer(model)


def _infer_contrib(node: ir.Node) -> bool:
    """Apply the rule for one node; return whether that told anything new."""
    first = node.inputs[0] if node.inputs else None
    if first is None or first.shape is None or first.dtype is None:
        return False
    operator = (node.domain, node.op_type)
    found = {index: first.shape for index in _SAME_AS_FIRST_INPUT.get(operator, ()) if index < len(node.outputs)}
    if operator in ((_CONTRIB, "MatMulNBits"), (_OWN, "GatherLinear")):
        found = {0: ir.Shape([*list(first.shape)[:-1], node.attributes["N"].as_int()])}
    new = False
    for index, shape in found.items():
        output = node.outputs[index]
        if output.name and (output.shape is None or output.dtype is None):
            output.shape, output.dtype, new = shape.copy(), first.dtype, True
    return new


def _drop_unused_optional_outputs(model: ir.Model) -> None:
    """Leave out what no node reads, such as the mean and deviation that a fused norm can give for training."""
    for node in model.graph:
        if node.domain == _CONTRIB:
            for output in node.outputs[1:]:
                if not output.uses() and not output.is_graph_output():
                    output.name = ""
