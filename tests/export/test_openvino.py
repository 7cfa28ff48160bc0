"""Target openvino without OpenVINO: standard operators only, the same numbers, limits that follow the model's width."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.export.lowering import openvino
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import cpu as onnxruntime
from moedge.export.pipeline import lower
from moedge.runtime.engines import open_engine


def test_no_function_is_left_and_the_numbers_are_the_same(bundles, tmp_path) -> None:
    with atomic_dir(tmp_path / "openvino") as partial:
        lower("openvino", bundles["moe/portable"], partial)
    model = onnx.load(tmp_path / "openvino" / "model.onnx", load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    ids = np.random.default_rng(0).integers(0, 256, (2, 12))
    want = open_engine(bundles["moe/portable"], taps=True).prefill(ids)
    got = open_engine(tmp_path / "openvino", taps=True).prefill(ids)
    # Two layers: four blocks, each within the block limit of its own output, added to one residual stream.
    limit = 4 * onnxruntime.BLOCK_LIMIT * np.abs(want.logits).max()
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=limit)
    for layer, experts in want.routes.items():
        np.testing.assert_array_equal(got.routes[layer], experts)


def test_the_limit_is_that_of_the_widest_sum(bundles, monkeypatch) -> None:
    """A wide model is not refused for the rounding of its long sums: every self-test gets the derived limit."""
    limits = []

    def compare(block, before, after, names, limit, *more):
        limits.append(limit)
        return selftest.SelfTest(block, 1, 0.0 if len(limits) < 3 else 1.0, limit)

    monkeypatch.setattr(selftest, "compare", compare)
    monkeypatch.setattr(selftest, "compare_ffn", compare)
    monkeypatch.setattr(onnxruntime, "BLOCK_LIMIT", 0.0)
    model = ir.load(bundles["moe/portable"] / "model.onnx")
    with pytest.raises(MoEdgeError, match=r"Self-test of .* failed"):
        openvino.lower(model, max_length=64)
    assert limits == [32**0.5 * 2.0**-24] * 3, "the widest product of the tiny model sums 32 columns"
