"""An engine opened with ``last_logits`` gives the last row of what it gives without, and works no further rows out."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from moedge import MoEdgeError
from moedge.export.graph.taps import edited
from moedge.runtime.engines import open_engine


@pytest.mark.parametrize("which", ["dense/portable", "moe/portable", "dense/ort-cpu", "moe/ort-cpu", "dense", "moe"])
def test_the_last_row_is_the_same(which: str, bundles: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    folder = bundles[which] if "/" in which else checkpoints[which]
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 60, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :4] = 0  # a padded row ends where the other does
    with (
        closing(open_engine(folder, threads=1)) as one,
        closing(open_engine(folder, threads=1, last_logits=True)) as two,
    ):
        full, last = one.prefill(ids, mask), two.prefill(ids, mask)
        for _ in range(2):
            assert full.logits.shape[1] > 1 or full.logits.shape == last.logits.shape
            assert last.logits.shape == (2, 1, full.logits.shape[2])
            # One product of another height: sums in another order, some 64 terms.
            limit = 64**0.5 * 2**-23 * np.abs(full.logits).max()
            np.testing.assert_allclose(last.logits[:, 0], full.logits[:, -1], rtol=0, atol=limit)
            more = generator.integers(3, 60, (2, 1))
            full, last = one.decode(more, full.cache), two.decode(more, last.cache)


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
    (last,) = ReferenceEvaluator(onnx.load_from_string(edited(path, {}, {}, None, last_logits=True)[0])).run(
        None, {"x": x}
    )
    np.testing.assert_allclose(last, full[:, -1:], rtol=1e-6)


def test_a_graph_without_a_projection_is_refused(tmp_path: Path) -> None:
    path = _model("p = MatMul (x, w)  logits = Relu (p)", tmp_path / "model.onnx")
    with pytest.raises(MoEdgeError, match="no product makes the logits"):
        edited(path, {}, {}, None, last_logits=True)
