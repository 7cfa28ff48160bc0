"""What ONNX Runtime's CPU kernels do wrongly without an error, executed, and what refuses or routes around it.

Others are where they belong: ignored normalisation and dropped weights of QMoE in quantized/, ignored positions
of GroupQueryAttention in the left-padded batches of test_export.py, CUDA's constants in test_ort_cuda.py, TensorRT's
dropped activation and plugins in test_tensorrt.py and kernels/test_plugin_graph.py. A test here fails when a newer
ONNX Runtime does better: then the refusal can go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import moe as ort_moe
from moedge.runtime.ranges import satisfies

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 5, 32, 16, 4, 2
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
LOGITS = GENERATOR.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
GATE, UP = (GENERATOR.normal(0, 0.2, (EXPERTS, WIDTH, HIDDEN)).astype(np.float32) for _ in range(2))
DOWN = GENERATOR.normal(0, 0.2, (EXPERTS, HIDDEN, WIDTH)).astype(np.float32)
GOOD = {
    "k": TOP_K,
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
}


def wanted(normalise: bool) -> np.ndarray:
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    chosen = np.argsort(-LOGITS, axis=1)[:, :TOP_K]
    mask = np.zeros_like(p)
    np.put_along_axis(mask, chosen, np.take_along_axis(p, chosen, 1), 1)
    mask = mask / mask.sum(1, keepdims=True) if normalise else mask
    g, u = (np.einsum("th,eih->tei", X, weight) for weight in (GATE, UP))
    each: np.ndarray = np.einsum("tei,ehi->teh", g / (1 + np.exp(-g)) * u, DOWN)
    return np.einsum("te,teh->th", mask, each)


def run(dtype: Any, **changes: Any) -> np.ndarray:
    """One com.microsoft.MoE node on the CPU provider."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    fc1 = np.stack([GATE, UP], axis=2).reshape(EXPERTS, 2 * WIDTH, HIDDEN)
    weights = [numpy_helper.from_array(a.astype(dtype), n) for n, a in (("fc1", fc1), ("fc2", DOWN))]
    attributes = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    node = helper.make_node("MoE", ["x", "logits", "fc1", "", "fc2"], ["y"], domain="com.microsoft", **attributes)
    values = [helper.make_tensor_value_info(n, kind, a.shape) for n, a in (("x", X), ("logits", LOGITS))]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", kind, X.shape)], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X.astype(dtype), "logits": LOGITS.astype(dtype)})[0], np.float32)


def test_the_form_that_is_written_is_right() -> None:
    # Two float32 sums of up to 32 terms in another order.
    assert 0 < selftest.relative_error(run(np.float32), wanted(True)) < 2e-6


def test_half_precision_without_normalisation_gives_zeros_before_1_32_and_is_refused() -> None:
    error = selftest.relative_error(run(np.float16, normalize_routing_weights=0), wanted(False))
    if satisfies(onnxruntime.__version__, ">=1.32"):
        # Mended, and as exact as four roundings to float16 (x, hidden, each expert's output, y), 2^-11 each.
        assert 2**-13 < error < 4 * 2**-11
    else:
        assert error == 1
    assert "zeros" in str(ort_moe.cpu_refusal(dtype="float16", activations={"silu"}, smallest_weight=1.0))


@pytest.mark.parametrize("changes", [{"activation_alpha": 1.702, "activation_beta": 1.0}, {"swiglu_limit": 0.5}])
def test_constants_of_another_model_are_caught(changes: dict[str, Any]) -> None:
    """gpt-oss multiplies by a sigmoid of 1.702 x, adds 1 and clamps: the attributes are obeyed, so none is left out."""
    assert selftest.relative_error(run(np.float32, **changes), wanted(True)) > 1e-2


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": "bfloat16"}, "no bfloat16 implementation"),
        ({"activations": {"gelu_tanh"}}, "gates with SiLU only, the model uses gelu_tanh"),
        ({"smallest_weight": 0.0}, "zero or negative"),
    ],
)
def test_what_the_cpu_kernel_lacks_is_refused(facts: dict[str, Any], reason: str) -> None:
    fine: dict[str, Any] = {"dtype": "float32", "activations": {"silu"}, "smallest_weight": 1.0}
    assert ort_moe.cpu_refusal(**fine) is None
    assert reason in str(ort_moe.cpu_refusal(**{**fine, **facts}))


def test_bfloat16_has_no_cpu_kernel() -> None:
    kind = TensorProto.BFLOAT16
    node = helper.make_node("MoE", ["x", "l", "a", "", "b"], ["y"], domain="com.microsoft", **GOOD)
    shapes = {"x": X.shape, "l": LOGITS.shape, "a": (EXPERTS, 2 * WIDTH, HIDDEN), "b": DOWN.shape}
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", kind, X.shape)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
