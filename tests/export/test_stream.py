"""The stream between layers is found in every graph, shown as PyTorch has it, and replaced without a trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moedge import MoEdgeError
from moedge.convert import modeling
from moedge.export.graph import stream
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine

IDS = np.random.default_rng(0).integers(0, 256, (2, 12))
TARGETS = ["ort-cpu", "ort-cpu-int8", "openvino", "tensorrt-rtx"]
LAYERS = 3
KINDS = ["llama", "gemma2", "gemma3_text", "olmo2", "phi3", "routed", "gathered"]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, gather_only: Any, convert_tiny: Any
) -> Callable[[str, str], Path]:
    """Return a function (kind of model, ``checkpoint`` or a target) -> its folder."""
    root = tmp_path_factory.mktemp("stream")

    def folder(kind: str, name: str) -> Path:
        checkpoint = root / kind / "checkpoint"
        if not checkpoint.exists():
            model = tiny_model("llama" if kind in ("routed", "gathered") else kind, layers=LAYERS)
            if kind in ("routed", "gathered"):
                plan = convert_tiny(model, "cmoe") if kind == "routed" else gather_only(model, linears="all")
                modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, checkpoint)
            else:
                model.save_pretrained(checkpoint)
                tiny_tokenizer.save_pretrained(checkpoint)
            targets = TARGETS if kind in ("llama", "routed", "gathered") else TARGETS[:1]
            export(checkpoint, root / kind / "bundles", targets, label="tiny")
        return checkpoint if name == "checkpoint" else root / kind / "bundles" / name

    return folder


def shown(folder: Path) -> list[list[np.ndarray]]:
    """The stream of a prefill and of two decode steps."""
    engine: Any = open_engine(folder, streams="show", threads=1)
    step = engine.prefill(IDS[:, :10])
    found = [step.streams]
    for at in (10, 11):
        step = engine.decode(IDS[:, at : at + 1], step.cache)
        found.append(step.streams)
    engine.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_bundle_shows_the_stream_that_pytorch_has(folders: Any, kind: str, target: str) -> None:
    for one, two in zip(shown(folders(kind, "checkpoint")), shown(folders(kind, target)), strict=True):
        assert len(one) == len(two) == LAYERS + 1
        for a, b in zip(one, two, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("kind", ["llama", "routed", "gathered"])
@pytest.mark.parametrize("target", ["portable", *TARGETS])
def test_its_own_stream_in_its_place_changes_nothing(folders: Any, kind: str, target: str) -> None:
    streams = shown(folders(kind, target))
    plain: Any = open_engine(folders(kind, target), threads=1)
    given: Any = open_engine(folders(kind, target), streams="replace", threads=1)
    one, two = plain.prefill(IDS[:, :10]), given.prefill(IDS[:, :10], streams=streams[0])
    for at in (10, 11, 12):
        scale = np.abs(one.logits).max()
        # The norm alone takes the place of the node that adds and normalises: the last bit may differ.
        np.testing.assert_allclose(two.logits, one.logits, rtol=0, atol=(1e-2 if "rtx" in target else 1e-5) * scale)
        for a, b in zip(streams[at - 10], two.streams, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=(1e-2 if "rtx" in target else 1e-5) * np.abs(a).max())
        if at < 12:
            ids = IDS[:, at : at + 1]
            one, two = plain.decode(ids, one.cache), given.decode(ids, two.cache, streams=streams[at - 9])


@pytest.mark.parametrize("target", ["portable", "ort-cpu", "ort-cpu-int8"])
def test_a_layer_sees_its_own_stream_alone(folders: Any, target: str) -> None:
    streams = shown(folders("routed", target))[0]
    given: Any = open_engine(folders("routed", target), streams="replace", threads=1)
    right = given.prefill(IDS[:, :10], streams=streams).streams
    other = [values + (layer == 1) for layer, values in enumerate(streams)]
    found = given.prefill(IDS[:, :10], streams=other).streams
    changed = [not np.array_equal(a, b) for a, b in zip(right, found, strict=True)]
    assert changed == [False, False, True, False]


def test_what_cannot_be_taken_apart_or_is_given_wrongly_is_refused(folders: Any, tmp_path: Path) -> None:
    given: Any = open_engine(folders("llama", "ort-cpu"), streams="replace", threads=1)
    with pytest.raises(MoEdgeError, match=re.escape(f"reads {LAYERS + 1} streams of the caller's, 0 are given")):
        given.prefill(IDS)
    plain: Any = open_engine(folders("llama", "ort-cpu"), threads=1)
    with pytest.raises(MoEdgeError, match="reads 0 streams"):
        plain.prefill(IDS, streams=[IDS[..., None].astype(np.float32)])
    model = onnx.load(folders("llama", "portable") / "model.onnx", load_external_data=False)
    with pytest.raises(MoEdgeError, match="layer 3 reads cannot be found"):
        stream.show(model, LAYERS + 1, "a graph")
    del model.graph.node[-1]
    with pytest.raises(MoEdgeError, match="cannot be found"):
        stream.show(model, LAYERS, "a graph")
