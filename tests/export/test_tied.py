"""A tied embedding and the output projection of our own operators: one stored matrix, looked up by columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.lowering.ort.tied import LookUpColumns, held, positions
from moedge.export.manifest import PackedPlace
from moedge.export.ort_ops import pack
from moedge.export.pipeline import export
from moedge.export.quantize.format import quantize


def test_positions_are_those_of_the_stored_rows() -> None:
    levels = np.random.default_rng(0).normal(size=(260, 64)).astype(np.float32)
    value = quantize(levels, 8, "rtn", None)
    made = pack.pack(value)
    assert made.scales is not None
    columns = made.weights[:, positions(260)].astype(np.float32) - 128
    np.testing.assert_array_equal((columns * np.repeat(made.scales[:, :260], 32, axis=0)).T, value.dequantized())


@pytest.mark.parametrize(
    ("place", "bits", "right"),
    [
        (PackedPlace(tensor="t", outputs=(0, 8), total=8, layout="NK"), 8, True),
        (PackedPlace(tensor="t", outputs=(0, 8), total=8, layout="NK"), 32, True),
        (PackedPlace(tensor="t", outputs=(0, 8), total=8, layout="NK"), 4, False),
        (PackedPlace(tensor="t", outputs=(0, 8), total=9, layout="NK"), 8, False),
    ],
)
def test_what_can_be_looked_up_in(place: PackedPlace, bits: int, right: bool) -> None:
    assert held(place, bits) == right


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, gather_only: Any) -> Path:
    root: Path = tmp_path_factory.mktemp("tied")
    model = tiny_model("llama")
    plan = gather_only(model, linears="all")
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    export(root / "moe", root / "bundles", ["ort-cpu", "ort-cpu-int8", "ort-cpu-int4"], label="tiny")
    return root / "bundles"


@pytest.mark.parametrize(
    ("target", "elements"),
    [
        ("ort-cpu", 260 * 32),
        ("ort-cpu-int8", 320 * 32),  # columns padded to whole lines
        ("ort-cpu-int4", 384 * 16 + 260 * 16),  # two weights a byte, and the table that is looked up in
    ],
)
def test_the_table_is_stored_once_where_columns_can_be_read(bundles: Path, target: str, elements: int) -> None:
    import onnx

    graph = onnx.load(bundles / target / "model.onnx", load_external_data=False).graph
    sizes = [int(np.prod(tensor.dims)) for tensor in graph.initializer]
    assert sum(size for size in sizes if size >= 260 * 16) == elements, "nothing else is as large"
    done = open_bundle(bundles / target).manifest.document()["lowering"]
    rewrites = {one["rewrite"]: one["status"] for one in done}
    assert rewrites.get(LookUpColumns.name) == (None if target.endswith("int4") else "applied")
