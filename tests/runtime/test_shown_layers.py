"""Values between the parts of a model: every runtime shows the same, and computes each part from what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.export.graph.layers import SPOTS, place
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine

IDS = np.random.default_rng(3).integers(0, 256, (1, 12))
FAMILIES = {
    # model type: spots that it lacks
    "llama": {"attention_normed", "ffn_normed"},
    "qwen3": {"attention_normed", "ffn_normed"},
    "phi3": {"attention_normed", "ffn_normed"},
    "gemma3_text": set(),
    "olmo2": {"attention_input", "ffn_input"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request: Any, tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any) -> dict[str, Any]:
    root = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    model.save_pretrained(root / "dense")
    tiny_tokenizer.save_pretrained(root / "dense")
    made = export(root / "dense", root / "bundles", ["ort-cpu", "tensorrt-rtx"], label="tiny")
    return {"family": request.param, "checkpoint": root / "dense", **made}


def shown(folder: Path, **options: Any) -> Any:
    engine = open_engine(folder, threads=1, layers="shown", **options)
    step = engine.prefill(IDS)
    engine.close()
    return step


def distance(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.linalg.norm(one - two) / np.linalg.norm(one))


def test_every_runtime_shows_the_same_values(folders: Any) -> None:
    reference = shown(folders["checkpoint"])
    lacking = FAMILIES[folders["family"]]
    expected = {(layer, spot) for layer in (0, 1) for spot in SPOTS if spot not in lacking and spot != "head_input"}
    assert reference.layers.keys() == expected | {(2, "stream"), (2, "head_input")}
    assert list(reference.layers) == sorted(reference.layers, key=place)
    for target, limit in (("portable", 2e-5), ("ort-cpu", 2e-5), ("tensorrt-rtx", 2e-2)):
        found = shown(folders[target])
        assert found.layers.keys() == reference.layers.keys(), target
        for point, value in reference.layers.items():
            assert found.layers[point].shape == value.shape == (12, 32)
            assert distance(value, found.layers[point]) < limit, (target, point)


@pytest.mark.parametrize("target", ["checkpoint", "portable", "ort-cpu"])
def test_each_part_computes_from_what_it_is_given(folders: Any, target: str) -> None:
    """Its own values give its own results; another value changes what reads it and nothing else."""
    engine: Any = open_engine(folders[target], threads=1, layers="given")
    own = shown(folders["checkpoint"])
    same = engine.prefill(IDS, given=own.layers)
    for point, value in own.layers.items():
        assert distance(value, same.layers[point]) < 2e-5, point
    assert distance(own.logits, same.logits) < 2e-5
    noise = np.random.default_rng(0).normal(0, 1, (12, 32)).astype(np.float32)
    for point in own.layers:
        other = engine.prefill(IDS, given={**own.layers, point: own.layers[point] + noise})
        moved = {each for each in own.layers if distance(same.layers[each], other.layers[each]) > 1e-3}
        after = [each for each in own.layers if place(each) > place(point)]
        assert moved <= set(after), point
        assert moved or distance(same.logits, other.logits) > 1e-3, point
        assert len(moved) <= 3, point  # a stream is read by a norm and by the sum (and in a fused graph by its norm)
    with pytest.raises(MoEdgeError, match=r"takes layers for|not opened to be given"):
        engine.prefill(IDS, given={}) if target != "checkpoint" else open_engine(folders[target]).prefill(
            IDS, given=own.layers
        )


def test_keys_and_values_are_shown(folders: Any) -> None:
    found = {}
    for target in ("checkpoint", "portable", "ort-cpu"):
        engine: Any = open_engine(folders[target], threads=1, layers="shown")
        step = engine.decode(IDS[:, 8:9], engine.prefill(IDS[:, :8]).cache)
        found[target] = engine.cached(step.cache)
    for target in ("portable", "ort-cpu"):
        assert found[target].keys() == found["checkpoint"].keys() == {0, 1}
        for layer, pair in found["checkpoint"].items():
            for mine, its in zip(pair, found[target][layer], strict=True):
                assert mine.shape == its.shape == (1, 2, 9, 8)
                assert distance(mine, its) < 2e-5


def test_half_precision_shows_and_takes_nothing(folders: Any) -> None:
    with pytest.raises(MoEdgeError, match="its parts cannot be given values"):
        open_engine(folders["tensorrt-rtx"], layers="given")
