"""A part of a graph, opened in ONNX Runtime's CPU provider with its weights beside the message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from moedge.export.graph.build import Part
from moedge.export.ort_ops import library


@dataclass(frozen=True)
class Session:
    """An opened part; ``values`` are the weights that ONNX Runtime reads in place, so they have to stay alive."""

    session: Any
    values: Sequence[Any]

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return every output; what is fed beyond the inputs is ignored, and each is cast to its input's type."""
        given = {i.name: feeds[i.name].astype(dtype_of(i.type)) for i in self.session.get_inputs()}
        return list(self.session.run(None, given))


def open_part(part: Part) -> Session:
    """Open a part; what it computes is what its nodes say, on one thread.

    Raises:
        MoEdgeError: it has nodes of our own operators, and their library cannot be compiled here.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1  # a pool of idle threads takes longer to make than a block to run
    # De-quantised weights are constants. ONNX Runtime would run products with them on int8 activations instead.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if library.DOMAIN in {node.domain for node in part.model.graph.node}:
        options.register_custom_ops_library(str(library.compiled()))
    given = {
        tensor.name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            part.weights[tensor.external_data[0].value], tensor.data_type
        )
        for tensor in part.model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    if given:
        options.add_external_initializers(list(given), list(given.values()))
    session = onnxruntime.InferenceSession(part.model.SerializeToString(), options, ["CPUExecutionProvider"])
    return Session(session, list(given.values()))


def dtype_of(ort_type: str) -> np.dtype[Any]:
    """Return the numpy dtype of an ONNX Runtime type such as ``tensor(float16)``."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
