"""SparseGLU for TensorRT: which form it takes, and the two forms in standard operators.

``plugins`` the selected experts only, in kernels of our own that become part of the engine (``plugins.py``).
``native``  TensorRT's own MoE layer, where it was asked for (``native.py``).
``merged``  every expert on every token, as one FFN of width E*I whose hidden units are multiplied by their expert's
            weight (zero where it is not selected). Three plain products of the size of a dense FFN; no [E, T, H]
            intermediate and no sum over experts, which happens inside the last product, in its accumulator.

Shapes: T tokens, H hidden (of gate and up H + 1 where the FFN has biases), I expert width, E experts, k active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.functions import DOMAIN
from moedge.export.graph.build import Builder, array_of, constant_of, remove_unused, required, size, sizes
from moedge.export.graph.nodes import active_of, compensation_of, h_threshold_of, nodes_of
from moedge.export.lowering.rule import Applied, Block
from moedge.export.lowering.trt import native as trt_native
from moedge.export.lowering.trt import plugins as trt_plugins
from moedge.export.targets import check_form
from moedge.runtime.device.moedge_plugins import refusal
from moedge.runtime.device.moedge_trt import DeviceError

Form = Literal["plugins", "native", "merged"]


def choose(model: ir.Model, tensorrt: str | None, wanted: str | None = None) -> tuple[Form, str]:
    """Choose the form of a model's experts for an engine, and say why: the one place where this is decided.

    An engine holds prefill and decode in one graph. Gathering the matrices of each token would copy more than the model
    holds for a prompt, so without plugins all experts are computed.

    Args:
        model: the float32 graph.
        tensorrt: version of TensorRT on the device (from its profile), or None for a runtime that takes no plugins.
        wanted: ``plugins``, ``native`` or ``merged``; by default ``plugins`` where they can be, else ``merged``.

    Raises:
        MoEdgeError: no such version, or a form that cannot be; the message names one that can.
    """
    check_form(wanted)
    reason = _no_plugins(tensorrt) or trt_plugins.refusal(model)
    if wanted == "native":
        parts = None if tensorrt is None else tuple(int(part) for part in tensorrt.split(".")[:2])
        if illegal := trt_native.refusal(model, parts):  # type: ignore[arg-type]
            raise MoEdgeError(f"{illegal}; take --expert-form {'merged' if reason else 'plugins'}.")
        return "native", "asked for"
    if wanted == "plugins" and tensorrt is None and not trt_plugins.refusal(model):
        return "plugins", "asked for: a plugin library launches the kernels"
    if wanted == "plugins" and reason:
        raise MoEdgeError(f"{reason if tensorrt else trt_plugins.refusal(model)}; take --expert-form merged.")
    if wanted == "merged":
        return "merged", "asked for"
    if reason is None:
        return "plugins", f"TensorRT {tensorrt} takes kernels compiled ahead of time"
    read = {
        f"a token reads {size(n.inputs[3], 0)} experts and needs {active_of(n)}" for n in nodes_of(model, "SparseGLU")
    }
    return "merged", "; ".join([reason, *sorted(read)])


def _no_plugins(tensorrt: str | None) -> str | None:
    """Say why an engine has no plugins unless they are asked for, or None.

    Raises:
        MoEdgeError: no such version.
    """
    try:
        return "TensorRT for RTX takes kernels from a plugin library only" if tensorrt is None else refusal(tensorrt)
    except DeviceError as error:
        raise MoEdgeError(str(error)) from None


def gather_refusal(tensorrt: str | None, wanted: str | None) -> str | None:
    """Say why the products of gathered FFNs cannot be plugins, or None; the arguments are those of :func:`choose`."""
    if wanted == "merged":
        return "standard operators were asked for"
    reason = _no_plugins(tensorrt)
    if tensorrt is None:
        return None if wanted == "plugins" else f"{reason}, which --expert-form plugins asks for"
    return reason


@dataclass(frozen=True)
class RewriteExperts:
    """Rule for every SparseGLU, in a form that :func:`choose` gave with its reason ``why``.

    Plugins need a graph whose types are known, the other forms are typed after them (``half.py``).
    """

    form: Form
    why: str = ""

    @property
    def name(self) -> str:
        """Named after the form."""
        return NAMES[self.form]

    def refuse(self, graph: ir.Model) -> str | None:
        """Nothing is refused: :func:`choose` has done that."""
        return None

    def apply(self, graph: ir.Model) -> Applied:
        """Replace every node; the first and the last are tested together."""
        nodes = nodes_of(graph, "SparseGLU")
        if not nodes:
            return Applied(0, reason="the graph has no SparseGLU node")
        outputs = tuple(str(node.outputs[0].name) for node in nodes[:1] + nodes[-1:])
        if self.form == "plugins":
            trt_plugins.rewrite(graph)
        else:
            for node in nodes:
                _Layer(graph, node).rewrite(self.form)
            remove_unused(graph)
        return Applied(len(nodes), [Block(outputs)], reason=self.why)


NAMES: dict[Form, str] = {
    "plugins": "SparseGLU -> Dispatch, GroupedGLU, GroupedLinear, Combine as plugins",
    "native": "SparseGLU -> TRT_MoE",
    "merged": "SparseGLU -> every expert as one FFN",
}
"""The rule's name by form."""


class _Layer:
    """One SparseGLU node and the nodes that take its place; new values are float32 until half.py types the graph."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.builder = Builder(model, before=node)
        self.node = node
        self.x, self.indices, self.weights, self.gate, self.up, self.down = node.inputs[:6]
        self.compensation, self.h_threshold = compensation_of(node), h_threshold_of(node)
        self.experts, self.width, self.inputs = sizes(self.gate)
        self.hidden = size(self.down, 1)
        self._tokens = (required(self.x).shape or [None])[0]

    def float(self, op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        """Insert a node with a float32 result."""
        value: ir.Value = self.builder.node(op_type, inputs, attributes=attributes)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value

    def rewrite(self, form: Form) -> None:
        """Replace the node."""
        y = self._native() if form == "native" else self._merged()
        if self.compensation is not None:
            omitted = self.float("Sub", [constant_of(self.builder, 1.0, np.float32), self._selected(None)])
            y = self.float("Add", [y, self.float("MatMul", [omitted, self.compensation])])
        self.builder.replace_output(self.node.outputs[0], y)

    def _rows(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Gate and up [E*I, H], down transposed [E*I, H]: the layout of both forms, so that they can share a file."""
        rows, made = self.experts * self.width, []
        for value, columns in ((self.gate, self.inputs), (self.up, self.inputs), (self.down, self.hidden)):
            assert value is not None
            made.append(_lazy(self.builder, value, (rows, columns), turn=value is self.down))
        return made[0], made[1], made[2]

    def _activate(self, g: ir.Value) -> ir.Value:
        kind = self.node.attributes["activation"].as_string()
        if kind == "silu":
            return self.float("Mul", [g, self.float("Sigmoid", [g])])
        self.builder.model.opset_imports[""] = max(20, self.builder.model.opset_imports[""])  # Gelu
        return self.float("Gelu", [g], approximate="tanh" if kind == "gelu_tanh" else "none")

    def _selected(self, weights: ir.Value | None) -> ir.Value:
        """Weight of each expert, 0 where it is not selected, float32 [T, E]; ones for weights when None is given."""
        b = self.builder
        experts = constant_of(b, np.arange(self.experts)[None, None], np.int32)
        hit = b.node("Equal", [b.node("Unsqueeze", [self.indices, constant_of(b, [2])]), experts])
        chosen = self.float("Cast", [hit], to=int(ir.DataType.FLOAT))
        if weights is not None:
            chosen = self.float("Mul", [chosen, self.float("Unsqueeze", [weights, constant_of(b, [2])])])
        return self.float("ReduceSum", [chosen, constant_of(b, [1])], keepdims=0)

    def _merged(self) -> ir.Value:
        b, (gate, up, down) = self.builder, self._rows()
        factor = self.float("Unsqueeze", [self._selected(self.weights), constant_of(b, [2])])
        g, u = (self.float("Gemm", [self.x, matrix], transB=1) for matrix in (gate, up))
        h = self.float("Mul", [self._activate(g), u])
        by_expert = self.float("Reshape", [h, constant_of(b, [-1, self.experts, self.width])])
        if self.h_threshold is not None:
            by_expert = self._keep_large(by_expert, self.h_threshold)
        weighted = self.float("Mul", [by_expert, factor])
        flat = self.float("Reshape", [weighted, constant_of(b, [-1, self.experts * self.width])])
        return self.float("MatMul", [flat, down])

    def _keep_large(self, h: ir.Value, threshold: ir.Value) -> ir.Value:
        """Leave small hidden values out; the node is expanded when the graph is typed (``lowering/gather.py``)."""
        facts = {"ramp": self.node.attributes["ramp"].as_float()}
        kept: ir.Value = self.builder.node("KeepLarge", [h, threshold], domain=DOMAIN, attributes=facts)
        kept.type = ir.TensorType(ir.DataType.FLOAT)
        return kept

    def _native(self) -> ir.Value:
        b, first = self.builder, constant_of(self.builder, [0])
        x, scores = (self.float("Unsqueeze", [value, first]) for value in (self.x, self.weights))
        indices = b.node("Unsqueeze", [self.indices, first])
        matrices = [_turned(b, value) for value in (self.gate, self.up, self.down)]
        inputs = [x, indices, scores, *matrices]
        y = b.node(trt_native.OPERATOR, inputs, domain=DOMAIN, attributes=trt_native.node_attributes())
        y.type, y.shape = (
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape([1, self._tokens, self.hidden]),
        )
        return self.float("Squeeze", [y, first])


def _turned(builder: Builder, source: ir.Value | None) -> ir.Value:
    """Return a stack of matrices [E, N, K] as [E, K, N]."""
    experts, rows, columns = sizes(source)
    return _lazy(builder, required(source), (experts, columns, rows), turn=True, suffix="turned")


def _lazy(builder: Builder, source: ir.Value, shape: tuple[int, ...], turn: bool, suffix: str = "rows") -> ir.Value:
    """Return an initializer of ``shape`` with a stacked weight; it is laid out when it is written, one at a time."""
    name = f"{source.name}.{suffix}"
    existing = builder.graph.initializers.get(name)
    if existing is not None:
        return existing

    def make() -> np.ndarray:
        array = array_of(source)
        return (array.transpose(0, 2, 1) if turn else array).reshape(shape)

    assert source.dtype is not None
    return builder.lazy(name, shape, source.dtype, make)
