"""What a target is stands in one row: commands, recipe, doctor, engines and docs follow it."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import moedge
from moedge import MoEdgeError
from moedge.configs import devices, tolerances
from moedge.configs.recipe import recipe_from
from moedge.export import targets
from moedge.export.lowering import portable
from moedge.export.pipeline import export
from moedge.runtime import doctor
from moedge.runtime.bench import latency as bench
from moedge.runtime.bench.points import Point
from moedge.runtime.cli import app
from moedge.runtime.device import moedge_trt
from moedge.runtime.engines import open_engine
from moedge.runtime.parity import compare as parity

ROOT = Path(moedge.__file__).parent


def lower(model: Any, *, max_length: int) -> Any:
    return portable.lower(model, max_length=max_length)


@pytest.fixture
def toy() -> Iterator[targets.Target]:
    row = targets.Target("toy", "a target of a test", f"{__name__}:lower", "portable", limits="portable")
    targets.register(row)
    yield row
    targets.unregister("toy")


def test_a_new_target_is_one_lowering_and_one_row(
    toy: targets.Target,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(lower=lower))
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    made = export(tmp_path / "dense", tmp_path / "bundles", ["toy"], label="x")
    assert json.loads((made["toy"] / "manifest.json").read_text())["target"] == "toy"

    ids = np.random.default_rng(0).integers(0, 250, (2, 12))
    engine, reference = open_engine(made["toy"]), open_engine(tmp_path / "dense")
    limits = tolerances.load().profile("float32", "toy")
    found = parity.compare(reference, engine, ids, prefill=6, tolerances=limits)
    assert found["verdict"]["outcome"] == "passed"
    opened = {"toy dense": partial(open_engine, made["toy"])}
    timed = bench.bench(opened, ids[0], [Point(prompt=8, decode=2)], repeats=3, warmup=0, memory=False)
    assert [row["label"] for row in timed["points"][0]["rows"]] == ["toy dense"]

    assert "toy" in {entry["target"] for entry in doctor.examine()["targets"]}
    recipe = {"name": "x", "model": {"source": "y"}, "export": {"targets": ["toy"]}}
    assert recipe_from(recipe, where="r").export.targets == ["toy"]


def test_a_name_is_taken_once(toy: targets.Target) -> None:
    with pytest.raises(MoEdgeError, match="called 'toy' exists"):
        targets.register(toy)


def test_help_names_every_target() -> None:
    said = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).output
    assert [name for name in targets.names() if name not in said] == []


def test_devices_and_engines_know_the_same_targets() -> None:
    assert set(moedge_trt.PACKAGES) == set(targets.names(lambda row: row.engine is not None))
    for row in targets.every():
        assert row.lowering().__name__
        assert (row.unquantised is None) == (row.bits is None)
        if row.unquantised:
            assert targets.find(row.unquantised).family == row.family
    for name in devices.names():
        assert set(devices.load(name).targets) <= {row.engine for row in targets.every()}


def test_the_table_in_the_docs_is_that_of_the_rows() -> None:
    text = (ROOT / "docs" / "lowering.md").read_text(encoding="utf-8")
    table = re.search(r"\| target \| what it is \|.*?\n\n", text, re.DOTALL)
    assert table, "docs/lowering.md has no table of targets"
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()[2:]]
    expected = [
        [row.name, row.summary, f"int{row.bits}" if row.bits else " or ".join(row.dtypes), runs_in(row)]
        for row in targets.every()
    ]
    assert rows == expected


def runs_in(row: targets.Target) -> str:
    if row.engine:
        return "TensorRT for RTX" if row.engine == "tensorrt-rtx" else "TensorRT"
    where = "CUDA" if row.provider == targets.CUDA else "CPU"
    return {"portable": "any ONNX runtime", "openvino": "OpenVINO"}.get(row.family, f"ONNX Runtime, {where}")


KEPT = {
    "export/targets.py": "the rows",
    "runtime/device/moedge_trt.py": "a device has no registry; compared above",
    "runtime/device/build_engine.py": "the same",
    "runtime/peers/__init__.py": "the precisions of onnxruntime-genai's own builder",
    "runtime/peers/genai_builder.py": "the same",
}


def test_no_other_file_lists_targets_or_takes_their_names_apart() -> None:
    names, found = set(targets.names()), []
    for path in sorted(
        path for part in ("configs", "convert", "export", "runtime") for path in (ROOT / part).rglob("*.py")
    ):
        if str(path.relative_to(ROOT)) in KEPT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
                items = node.keys if isinstance(node, ast.Dict) else node.elts
                listed = {item.value for item in items if isinstance(item, ast.Constant) and item.value in names}
                if len(listed) > 2:
                    found.append(f"{where} lists {', '.join(sorted(listed))}")
            if isinstance(node, ast.Constant) and node.value in ("-int", "-int4", "-int8", "int4", "ort-"):
                found.append(f"{where} takes a name apart at {node.value!r}")
    assert found == []
