"""A graph that works out the last position's logits alone keeps what follows its output projection."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from moedge import MoEdgeError
from moedge.export.graph.taps import edited

PORTABLE: Any = SimpleNamespace(target="portable")
"""What is read of a manifest."""


def _model(text: str, path: Path) -> Path:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[B, S, 4] x) => (float[B, S, 3] logits) {{ {text} }}"""
    )
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    model.graph.initializer.extend(
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(2, np.float32), "cap")]
    )
    onnx.save(model, path)
    return path


def test_a_soft_cap_after_the_projection_stays(tmp_path: Path) -> None:
    body = "a = MatMul (x, w)  b = Div (a, cap)  c = Tanh (b)  logits = Mul (c, cap)"
    path = _model(body, tmp_path / "model.onnx")
    x = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    (full,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    (last,) = ReferenceEvaluator(onnx.load_from_string(edited(path, PORTABLE, {}, None, last_logits=True)[0])).run(
        None, {"x": x}
    )
    np.testing.assert_allclose(last, full[:, -1:], rtol=1e-6)


def test_a_graph_without_a_projection_is_refused(tmp_path: Path) -> None:
    path = _model("p = MatMul (x, w)  logits = Relu (p)", tmp_path / "model.onnx")
    with pytest.raises(MoEdgeError, match="no product makes the logits"):
        edited(path, PORTABLE, {}, None, last_logits=True)
