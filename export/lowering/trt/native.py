"""``TRT_MoE``: TensorRT's own MoE layer, for the GPUs that have it; elsewhere its function body.

The schema is not published; this is what NVIDIA's parser makes of a node (TensorRT for RTX 1.7, docs/node-forms.md 5):

* inputs x [B, S, H], experts int32 [B, S, k], scores [B, S, k] of x's type, gate and up [E, H, I], down [E, I, H];
* ``activation_type`` is an integer, 1 for SiLU. Without it, and with the string ``"silu"``, the layer applies no
  activation and nobody says so. :func:`node_attributes` is the one place that writes it, and every build asks the
  parsed layer (``moedge_trt.check_moe_layers``);
* the node is taken in any domain, and before a model-local function of its name: so the function stays in the file, and
  ONNX Runtime and ``onnx.reference`` run the graph.

Routing stays outside, so any router, rule and weight fits, also a weight of zero or below.

Shapes: T tokens, H hidden, I expert width, E experts, k active.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from moedge.export.functions import DOMAIN, OPSET
from moedge.export.graph.nodes import KEEPS, keeps_large, nodes_of
from moedge.runtime.device.moedge_trt import MOE_CAPABILITIES

OPERATOR = "TRT_MoE"
OLDEST = (11, 0)
"""The first TensorRT whose parser knows the operator (the layer is older: 10.16)."""
SILU = 1
"""``MoEActType.SILU``."""

_BODY = """
<domain: "moedge", opset_import: ["" : 18]>
TRT_MoE <activation_type> (x, experts, scores, gate, up, down) => (y) {
    first = Constant <value_ints = [0]> ()
    index = Cast <to = 7> (experts)
    tokens = Shape <start = 0, end = 2> (x)
    count = Shape <start = 0, end = 1> (gate)
    full = Concat <axis = 0> (tokens, count)
    none32 = ConstantOfShape <value = float[1] {0.0}> (full)
    none = CastLike (none32, scores)
    mask = ScatterElements <axis = 2> (none, index, scores)
    by_expert = Transpose <perm = [2, 1, 0]> (mask)
    g = MatMul (x, gate)
    u = MatMul (x, up)
    s = Sigmoid (g)
    a = Mul (g, s)
    h = Mul (a, u)
    each = MatMul (h, down)
    weighted = Mul (each, by_expert)
    y = ReduceSum <keepdims = 1> (weighted, first)
}"""


def node_attributes() -> dict[str, int]:
    """Attributes of every node."""
    return {"activation_type": SILU}


def attach(model: ir.Model) -> None:
    """Give the nodes their function body, for everyone who is not TensorRT. B is 1 in it."""
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_BODY))
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])


def refusal(model: ir.Model, tensorrt: tuple[int, int] | None) -> str | None:
    """Return why the layer cannot be used, or None.

    Args:
        model: the float32 graph.
        tensorrt: version on the device, None for TensorRT for RTX.
    """
    sm = ", ".join("SM" + capability.replace(".", "") for capability in MOE_CAPABILITIES)
    if tensorrt is None:
        return f"TensorRT for RTX cannot build TensorRT's MoE layer ({sm} only)"
    if tensorrt < OLDEST:
        found, oldest = (".".join(map(str, version)) for version in (tensorrt, OLDEST))
        return f"TensorRT {found} does not read {OPERATOR}, {oldest} is the first that does"
    activations = {node.attributes["activation"].as_string() for node in nodes_of(model, "SparseGLU")}
    if activations - {"silu"}:
        return f"TensorRT's MoE layer gates with SiLU only, the model uses {', '.join(sorted(activations))}"
    if keeps_large(model):
        return f"TensorRT's MoE layer has no thresholds: {KEEPS}"
    stacks = [
        (node.inputs[3], node.inputs[5]) for node in nodes_of(model, "SparseGLU")
    ]  # gate [E, I, H], down [E, H, I]
    if any(gate and down and gate.shape and down.shape and gate.shape[2] != down.shape[1] for gate, down in stacks):
        return "TensorRT's MoE layer has no biases, the model's experts have some"
    return None
