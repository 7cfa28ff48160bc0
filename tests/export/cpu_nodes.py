"""Sessions of one node of domain moedge.cpu, and what its numbers are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from moedge.export.ort_ops import library, pack
from moedge.export.quantize.format import Quantized

TOKENS = (1, 2, 3, 5, 16, 17, 49)
"""Each way through the kernels: one token, few, more than a tile, many."""

SAME = 5e-6
"""Of the largest result: float32 sums of up to a hundred blocks in another order."""


def session(
    built: Path | None,
    nodes: list[onnx.NodeProto],
    weights: dict[str, Any],
    inputs: int,
    outputs: int,
    threads: int = 1,
    more: Sequence[onnx.ValueInfoProto] = (),
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None), *more],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if value is not None],
    )
    opsets = [helper.make_opsetid(*pair) for pair in (("", 21), (library.DOMAIN, 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if built is not None:
        options.register_custom_ops_library(str(built))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def run(made: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    return np.asarray(made.run(None, {"x": x})[0])


def names(weights: dict[str, Any], *wanted: str) -> list[str]:
    """Names of inputs, empty where there is none."""
    return [name if name == "x" or weights.get(name) is not None else "" for name in wanted]


def linear(
    built: Path, weight: pack.Packed, threshold: np.ndarray | None, bias: np.ndarray | None = None, **changes: Any
) -> onnxruntime.InferenceSession:
    weights = {"t": threshold, "w": weight.weights, "s": weight.scales, "b": bias, **changes.pop("weights", {})}
    inputs = weight.weights.shape[0]
    attributes = {"K": inputs, "N": weight.outputs, "bits": weight.bits, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node(
        "GatherLinear", names(weights, "x", "t", "w", "s", "b"), ["y"], domain=library.DOMAIN, **attributes
    )
    return session(built, [node], weights, inputs, weight.outputs)


def glu(
    built: Path,
    gate_up: pack.Packed,
    down: pack.Packed,
    x_threshold: np.ndarray | None,
    h_threshold: np.ndarray | None,
    activation: str = "silu",
    threads: int = 1,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
) -> onnxruntime.InferenceSession:
    weights = {"xt": x_threshold, "gu": gate_up.weights, "gs": gate_up.scales, "ht": h_threshold}
    weights |= {"d": down.weights, "ds": down.scales, "gb": gate_up_bias, "db": down_bias}
    sizes = {"hidden": down.outputs, "inner": gate_up.outputs // 2, "bits": down.bits}
    inputs = names(weights, "x", "xt", "gu", "gs", "ht", "d", "ds", "gb", "db")
    node = helper.make_node("GatherGLU", inputs, ["y"], domain=library.DOMAIN, activation=activation, **sizes)
    return session(built, [node], weights, down.outputs, down.outputs, threads)


def routed(
    built: Path,
    gate_up: pack.Packed,
    down: pack.Packed,
    x_threshold: np.ndarray | None = None,
    h_threshold: np.ndarray | None = None,
    compensation: np.ndarray | None = None,
    threads: int = 1,
    **changes: Any,
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    weights = {"xt": x_threshold, "gu": gate_up.weights, "gs": gate_up.scales, "ht": h_threshold}
    weights |= {"d": down.weights, "ds": down.scales, "c": compensation}
    sizes = {"hidden": down.outputs, "width": down.inputs, "num_experts": len(down.weights), "bits": down.bits}
    sizes |= {"interleaved": int(gate_up.interleaved), **changes}
    inputs = ["x", "indices", "weights", *names(weights, "xt", "gu", "gs", "ht", "d", "ds", "c")]
    node = helper.make_node("RoutedGLU", inputs, ["y"], domain=library.DOMAIN, activation="silu", **sizes)
    more = [
        helper.make_tensor_value_info("indices", onnx.TensorProto.INT32, None),
        helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, None),
    ]
    made = session(built, [node], weights, down.outputs, down.outputs, threads, more)
    return lambda x, indices, weights: np.asarray(made.run(None, {"x": x, "indices": indices, "weights": weights})[0])


def routes(seed: int, tokens: int, top_k: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    indices = np.stack([generator.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    return indices, generator.random((tokens, top_k), np.float32) + np.float32(0.5)


def nbits(value: Quantized) -> Callable[[np.ndarray], np.ndarray]:
    """ONNX Runtime's own product."""
    rows = value.packed.shape[0]
    sizes = {"K": value.columns, "N": rows, "bits": value.bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **sizes)
    made = session(None, [node], {"q": value.packed, "s": value.scales}, value.columns, rows)
    return lambda x: run(made, x)


def mask(x: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < threshold, np.float32(0), x)


def activate(gate: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate))
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return 0.5 * gate * (1 + np.vectorize(math.erf)(gate / np.sqrt(2)))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def difference(y: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(y - wanted).max() / np.abs(wanted).max())
