"""Second moments of what every matrix of a portable graph multiplies: what GPTQ weighs rounding errors by.

The portable bundle runs in ONNX Runtime on a calibration text with the inputs of its products as extra outputs. The
experts of a layer share the moments of their input over all tokens (GPTQ of gate and up then does not depend on which
tokens chose an expert); each expert's down has those of its own hidden neurons over the tokens that chose it, times the
square of their routing weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.bundle import Bundle
from moedge.export.functions import DOMAIN
from moedge.export.graph.activations import ACTIVATIONS
from moedge.export.graph.build import array_of, load
from moedge.export.graph.nodes import h_threshold_of
from moedge.export.graph.weights import collect, product_weight
from moedge.export.quantize.format import QUANTISED

Moments = dict[str, np.ndarray]
"""Initializer name -> float32 [K, K], or [E, K, K] for a stack of experts; equal inputs share one array."""


def moments(bundle: Bundle, windows: np.ndarray, progress: Callable[[int, int], None] | None = None) -> Moments:
    """Sum x x^T over the tokens of ``windows`` int64 [N, L] for every quantised product of a float32 portable bundle.

    Raises:
        MoEdgeError: an id outside the vocabulary, or ONNX Runtime cannot run the graph.
    """
    model = load(bundle.model_path)
    # A tied output projection is also looked up by row, where every input counts the same.
    classes = set(QUANTISED) - {"embedding"}
    table = {name: weight for name, weight in collect(model).items() if weight.tensor_class in classes}
    readers: dict[str, list[str]] = {}  # value -> the weights that it is multiplied by
    experts: list[ir.Node] = []
    for node in model.graph:
        if product := product_weight(node):
            if str(product[0].name) in table and node.inputs[0] is not None:
                readers.setdefault(str(node.inputs[0].name), []).append(str(product[0].name))
        elif (node.domain, node.op_type) == (DOMAIN, "SparseGLU"):
            experts.append(node)
            readers.setdefault(_name(node, 0), []).extend(_name(node, number) for number in (3, 4))
    seen = dict.fromkeys([*readers, *(_name(node, number) for node in experts for number in (1, 2))])
    sums: dict[str, np.ndarray] = {}

    def add(key: str, value: np.ndarray) -> None:
        sums[key] = sums[key] + value if key in sums else value

    for number, values in enumerate(_runs(bundle, list(seen), windows)):
        for name in readers:
            x = values[name].reshape(-1, values[name].shape[-1])
            add(name, x.T @ x)
        for node in experts:
            add(_name(node, 5), _hidden_moments(node, *(values[_name(node, place)] for place in (0, 1, 2))))
        if progress:
            progress(number + 1, len(windows))
    found = {weight: sums[value] for value, weights in readers.items() for weight in weights}
    return found | {_name(node, 5): sums[_name(node, 5)] for node in experts}


def _name(node: ir.Node, number: int) -> str:
    return str(getattr(node.inputs[number], "name", ""))


def _hidden_moments(node: ir.Node, x: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[E, I, I] of experts for tokens x [T, H] with their choice [T, k], of hidden values that are kept."""
    gate, up, limits = array_of(node.inputs[3]), array_of(node.inputs[4]), h_threshold_of(node)
    activation = ACTIVATIONS[node.attributes["activation"].as_string()]
    found = np.zeros((len(gate), gate.shape[1], gate.shape[1]), np.float32)
    for expert in range(len(gate)):
        rows, places = np.nonzero(indices == expert)
        if len(rows):
            hidden = activation(x[rows] @ gate[expert].T) * (x[rows] @ up[expert].T)
            if limits is not None:
                limit, ramp = array_of(limits)[expert], node.attributes["ramp"].as_float()
                hidden *= np.clip((np.abs(hidden) - limit) / (limit * ramp), 0, 1)
            hidden *= weights[rows, places, None]
            found[expert] = hidden.T @ hidden
    return found


def _runs(bundle: Bundle, names: list[str], windows: np.ndarray) -> Any:
    """Yield the values called ``names`` for each window, each run from an empty cache."""
    import onnxruntime

    facts = bundle.manifest.model
    if windows.min() < 0 or windows.max() >= facts.vocab_size:
        raise MoEdgeError("The calibration text was tokenized for another model: an id is outside the vocabulary.")
    graph = onnx.load(bundle.model_path, load_external_data=False)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:
        raise MoEdgeError(f"ONNX Runtime cannot load {bundle.model_path}: {str(error).splitlines()[0]}") from error
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_dim), np.float32)
    for window in windows:
        ids = window[None].astype(np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
        past = {name: empty for name in bundle.manifest.io.inputs if name.startswith("past_key_values.")}
        yield dict(zip(names, session.run(names, {**feeds, **past}), strict=True))
