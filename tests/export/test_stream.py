"""The stream between layers is found in every graph, shown as PyTorch has it, and given without a trace."""

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
from moedge.export.graph import layers as graph_layers
from moedge.export.graph.layers import STREAM
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine

IDS = np.random.default_rng(0).integers(0, 256, (2, 12))
TARGETS = ["ort-cpu", "ort-cpu-int8", "openvino", "tensorrt-rtx"]
LAYERS = 2
"""As most tests have: the traces are then shared with theirs."""
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


Stream = dict[tuple[int, str], np.ndarray]


def shown(folder: Path) -> list[Stream]:
    """The stream of a prefill and of two decode steps, float32 [B*S, H] by layer."""
    engine: Any = open_engine(folder, layers="shown", spots=STREAM, threads=1)
    step = engine.prefill(IDS[:, :10])
    found = [step.layers]
    for at in (10, 11):
        step = engine.decode(IDS[:, at : at + 1], step.cache)
        found.append(step.layers)
    engine.close()
    return found


def given_stream(folder: Path) -> Any:
    return open_engine(folder, layers="given", spots=STREAM, threads=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_bundle_shows_the_stream_that_pytorch_has(folders: Any, kind: str, target: str) -> None:
    for one, two in zip(shown(folders(kind, "checkpoint")), shown(folders(kind, target)), strict=True):
        assert one.keys() == two.keys() == {(layer, "stream") for layer in range(LAYERS + 1)}
        for point, a in one.items():
            b = two[point]
            assert a.shape == b.shape
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("kind", ["llama", "routed", "gathered"])
@pytest.mark.parametrize("target", ["portable", *TARGETS])
def test_its_own_stream_in_its_place_changes_nothing(folders: Any, kind: str, target: str) -> None:
    streams = shown(folders(kind, target))
    plain: Any = open_engine(folders(kind, target), threads=1)
    given = given_stream(folders(kind, target))
    one, two = plain.prefill(IDS[:, :10]), given.prefill(IDS[:, :10], given=streams[0])
    for at in (10, 11, 12):
        scale = np.abs(one.logits).max()
        # The norm alone takes the place of the node that adds and normalises: the last bit may differ.
        np.testing.assert_allclose(two.logits, one.logits, rtol=0, atol=(1e-2 if "rtx" in target else 1e-5) * scale)
        assert two.layers.keys() == streams[at - 10].keys()
        for point, a in streams[at - 10].items():
            b = two.layers[point]
            np.testing.assert_allclose(b, a, rtol=0, atol=(1e-2 if "rtx" in target else 1e-5) * np.abs(a).max())
        if at < 12:
            ids = IDS[:, at : at + 1]
            one, two = plain.decode(ids, one.cache), given.decode(ids, two.cache, given=streams[at - 9])


@pytest.mark.parametrize("target", ["portable", "ort-cpu", "ort-cpu-int8"])
def test_a_layer_sees_its_own_stream_alone(folders: Any, target: str) -> None:
    streams = shown(folders("routed", target))[0]
    given = given_stream(folders("routed", target))
    right = given.prefill(IDS[:, :10], given=streams).layers
    for changed in range(LAYERS):
        other = {point: values + (point[0] == changed) for point, values in streams.items()}
        found = given.prefill(IDS[:, :10], given=other).layers
        moved = {layer for (layer, spot), values in right.items() if not np.array_equal(values, found[layer, spot])}
        assert moved == {changed + 1}


def test_what_cannot_be_taken_apart_or_is_given_wrongly_is_refused(folders: Any, tmp_path: Path) -> None:
    given = given_stream(folders("llama", "ort-cpu"))
    with pytest.raises(MoEdgeError, match=re.escape(f"takes layers for {LAYERS + 1} points, not for 0")):
        given.prefill(IDS)
    plain: Any = open_engine(folders("llama", "ort-cpu"), threads=1)
    with pytest.raises(MoEdgeError, match="takes layers for 0 points, not for 1"):
        plain.prefill(IDS, given={(0, "stream"): IDS[..., None].astype(np.float32)})
    model = onnx.load(folders("llama", "portable") / "model.onnx", load_external_data=False)
    start = "a graph does not show its layers: "
    with pytest.raises(MoEdgeError, match=f"{start}its graph is no chain of {LAYERS + 1} layers"):
        graph_layers.show(model, Path("a graph"), LAYERS + 1, spots=STREAM)
    del model.graph.node[-1]
    with pytest.raises(MoEdgeError, match=f"no chain of {LAYERS} layers"):
        graph_layers.show(model, Path("a graph"), LAYERS, spots=STREAM)
