"""``runtime/run/run_folder.py``: what lies in a run folder belongs together, or is left out and said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moedge._files import digest, write_json
from moedge.runtime.run import run_folder
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

MOE, DENSE = EngineRef("ort-cpu", "moe"), EngineRef("ort-cpu", "dense")


def stage(run: Path, name: str, output: str, **inputs: str) -> str:
    """Write a finished stage; return what later stages see of it."""
    outputs = {"f": {"sha256": output, "size": 1}}
    write_json(run / name / "stage.json", {"stage": name, "parts": {"inputs": inputs}, "outputs": outputs})
    return digest(outputs)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model: dict[str, Any] = {"sha256": "1", "label": "m", "folder": str(tmp_path)}
    write_json(tmp_path / "source" / "source.json", model)
    source = run_folder.source_digest(model)
    (tmp_path / "convert" / "checkpoint").mkdir(parents=True)
    converted = stage(tmp_path, "convert", "a", source=source)
    stage(tmp_path, "export", "b", source=source, convert=converted)
    stage(tmp_path, "export-dense", "c", source=source)
    for folder in ("export", "export-dense"):
        write_json(tmp_path / folder / "ort-cpu" / "manifest.json", {})
    return tmp_path


def test_what_belongs_together_is_found(run: Path) -> None:
    assert run_folder.leftovers(run) == {}
    assert list(run_folder.engines(run)) == [TORCH_DENSE, TORCH_MOE, MOE, DENSE]
    assert list(run_folder.engines(run, dense_bundles=False)) == [TORCH_DENSE, TORCH_MOE, MOE]


def test_bundles_of_an_older_conversion_are_left_out(run: Path) -> None:
    """A run that stopped after it converted anew: its bundles are of the conversion before."""
    stage(run, "convert", "another", source=run_folder.source_digest(run_folder.source(run)))
    assert run_folder.leftovers(run) == {"export": "export is of another conversion than this run has now"}
    assert list(run_folder.engines(run)) == [TORCH_DENSE, TORCH_MOE, DENSE]


def test_all_that_was_made_of_another_model_is_left_out(run: Path) -> None:
    write_json(run / "source" / "source.json", {**run_folder.source(run), "sha256": "2"})
    left = run_folder.leftovers(run)
    assert list(left) == ["convert", "export", "export-dense"]
    assert all(reason.endswith("is of another dense model than this run has now") for reason in left.values())
    assert list(run_folder.engines(run)) == [TORCH_DENSE]


def test_a_bundle_of_a_conversion_that_is_left_out_goes_with_it(run: Path) -> None:
    """The export knows its conversion, which is of another model than the run has now."""
    before = run_folder.source_digest(run_folder.source(run))
    write_json(run / "source" / "source.json", {**run_folder.source(run), "label": "n"})
    now = run_folder.source_digest(run_folder.source(run))
    converted = stage(run, "convert", "a", source=before)
    stage(run, "export", "b", source=now, convert=converted)
    assert run_folder.leftovers(run)["export"] == "export is of another conversion than this run has now"
