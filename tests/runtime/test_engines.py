"""Engines keep one promise: prefill and decode give the logits of a plain forward pass over the whole text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.calls import position_ids
from moedge.runtime.engines.ort import OrtEngine

# float32 arithmetic over sums of <= 16 terms of size ~1 against float64: a few ulp of the largest logit (~10).
ATOL = 2e-5
KINDS = ["concat", "shared_buffer"]
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_equal_the_whole_text(kind: str, toy_bundles: dict[str, Path], reference: Any) -> None:
    engine = open_engine(toy_bundles[kind], threads=1)
    want, _ = reference(IDS[0])
    step = engine.prefill(IDS)
    np.testing.assert_allclose(step.logits[0], want, atol=ATOL)
    step = engine.prefill(IDS[:, :9])
    got = [step.logits[0]]
    for position in range(9, 24):
        step = engine.decode(IDS[:, position : position + 1], step.cache)
        got.append(step.logits[0])
    np.testing.assert_allclose(np.concatenate(got), want, atol=ATOL)
    assert step.routes is None


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_can_be_decoded_at_once(kind: str, toy_bundles: dict[str, Path], reference: Any) -> None:
    engine = open_engine(toy_bundles[kind], threads=1)
    step = engine.decode(IDS[:, 9:20], engine.prefill(IDS[:, :9]).cache)
    np.testing.assert_allclose(step.logits[0], reference(IDS[0, :20])[0][9:], atol=ATOL)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_of_several_rows_can_be_decoded_at_once(
    kind: str, last: bool, toy_bundles: dict[str, Path], reference: Any
) -> None:
    """GroupQueryAttention takes them for one row only; padding stays hidden."""
    engine = open_engine(toy_bundles[kind], threads=1, taps=True, last_logits=last)
    ids, mask = np.concatenate([IDS[:, :12], IDS[:, 12:]]), np.ones((2, 9), dtype=np.int64)
    mask[1, :4] = 0
    step = engine.decode(ids[:, 9:], engine.prefill(ids[:, :9], mask).cache)
    assert step.logits.shape[1] == (1 if last else 3)
    assert step.routes is not None
    for row, text in enumerate((ids[0], ids[1, 4:])):
        logits, routes = reference(text)
        np.testing.assert_allclose(step.logits[row], logits[-step.logits.shape[1] :], atol=ATOL)
        np.testing.assert_array_equal(step.routes[0].reshape(2, 3, -1)[row], routes[-3:])


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind: str, toy_bundles: dict[str, Path], reference: Any) -> None:
    engine = open_engine(toy_bundles[kind], threads=1, taps=True)
    rows = [IDS[0, :12], IDS[0, 5:12], IDS[0, 3:4]]
    ids = np.zeros((3, 12), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 12 - len(row) :], mask[i, 12 - len(row) :] = row, 1
    step = engine.prefill(ids, mask)
    for new in (np.array([[7], [8], [9]]), np.array([[1], [2], [3]])):
        step = engine.decode(new, step.cache)
        rows = [np.append(row, token) for row, token in zip(rows, new[:, 0], strict=True)]
        for i, row in enumerate(rows):
            logits, routes = reference(row)
            np.testing.assert_allclose(step.logits[i, -1], logits[-1], atol=ATOL)
            assert step.routes is not None
            assert set(step.routes[0][i]) == set(routes[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_padded_prefill_returns_logits_and_routes_in_the_callers_layout(
    kind: str, toy_bundles: dict[str, Path], reference: Any
) -> None:
    engine = open_engine(toy_bundles[kind], threads=1, taps=True)
    ids, mask = np.zeros((2, 8), dtype=np.int64), np.ones((2, 8), dtype=np.int64)
    ids[0], ids[1, 3:], mask[1, :3] = IDS[0, :8], IDS[0, 8:13], 0
    step = engine.prefill(ids, mask)
    assert step.routes is not None
    logits, routes = reference(IDS[0, 8:13])
    np.testing.assert_allclose(step.logits[1, 3:], logits, atol=ATOL)
    np.testing.assert_array_equal(step.routes[0][8 + 3 :], routes)
    logits, routes = reference(IDS[0, :8])
    np.testing.assert_allclose(step.logits[0], logits, atol=ATOL)
    np.testing.assert_array_equal(step.routes[0][:8], routes)


@pytest.mark.parametrize("name", ["concat", "scores", "shared_buffer"])
def test_taps_return_the_selected_experts_in_order(name: str, toy_bundles: dict[str, Path], reference: Any) -> None:
    step = open_engine(toy_bundles[name], taps=True).prefill(IDS)
    assert step.routes is not None
    assert step.routes[0].dtype == np.int32
    np.testing.assert_array_equal(step.routes[0], reference(IDS[0])[1])


@pytest.mark.parametrize("name", ["concat", "scores", "shared_buffer"])
@pytest.mark.parametrize(("top_k", "effective"), [(1, 1), (6, 6), (99, 6)])
def test_top_k_override_runs_that_many_experts(
    name: str, top_k: int, effective: int, toy_bundles: dict[str, Path], reference: Any
) -> None:
    want, routes = reference(IDS[0], effective)
    assert not np.allclose(want, reference(IDS[0])[0], atol=0.1), (
        "the override must matter for this test to mean anything"
    )
    step = open_engine(toy_bundles[name], taps=True, top_k=top_k).prefill(IDS)
    np.testing.assert_allclose(step.logits[0], want, atol=ATOL)
    assert step.routes is not None
    np.testing.assert_array_equal(step.routes[0], routes)


@pytest.mark.parametrize("kind", KINDS)
def test_two_caches_of_one_engine_do_not_mix(kind: str, toy_bundles: dict[str, Path], reference: Any) -> None:
    engine = open_engine(toy_bundles[kind])
    one, two = engine.prefill(IDS[:, :5]), engine.prefill(IDS[:, 10:18])
    one, two = engine.decode(IDS[:, 5:6], one.cache), engine.decode(IDS[:, 18:19], two.cache)
    np.testing.assert_allclose(one.logits[0, -1], reference(IDS[0, :6])[0][-1], atol=ATOL)
    np.testing.assert_allclose(two.logits[0, -1], reference(IDS[0, 10:19])[0][-1], atol=ATOL)


def test_cache_memory_is_not_copied_through_python(toy_bundles: dict[str, Path]) -> None:
    """The shared buffer stays one piece of memory; the concat cache is the very tensor that the runtime made."""
    engine = open_engine(toy_bundles["shared_buffer"])
    step = engine.prefill(IDS)
    before = [value.data_ptr() for value in step.cache.values]
    step = engine.decode(IDS[:, :1], step.cache)
    assert [value.data_ptr() for value in step.cache.values] == before
    engine = open_engine(toy_bundles["concat"])
    values = engine.prefill(IDS).cache.values
    assert [value.shape() for value in values] == [[1, 2, 24, 8]] * 2
    assert all(type(value).__name__ == "OrtValue" for value in values)


@pytest.mark.parametrize("kind", KINDS)
def test_text_beyond_the_limit_is_refused(kind: str, toy_bundles: dict[str, Path]) -> None:
    engine = open_engine(toy_bundles[kind])
    with pytest.raises(MoEdgeError, match="65 tokens do not fit: this model holds at most 64"):
        engine.prefill(np.ones((1, 65), dtype=np.int64))
    step = engine.prefill(np.ones((1, 64), dtype=np.int64))
    with pytest.raises(MoEdgeError, match="at most 64"):
        engine.decode(np.ones((1, 1), dtype=np.int64), step.cache)


def test_max_length_shrinks_the_shared_buffer(toy_bundles: dict[str, Path]) -> None:
    engine = OrtEngine(toy_bundles["shared_buffer"], max_length=10)
    assert engine.prefill(IDS[:, :4]).cache.values[0].shape() == [1, 2, 10, 8]
    with pytest.raises(MoEdgeError, match="11 tokens do not fit"):
        engine.prefill(IDS[:, :11])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.array([1, 2]), None, "batch, sequence"),
        (np.zeros((1, 0), dtype=np.int64), None, "non-empty"),
        (np.array([[300]]), None, "outside 0..299"),
        (np.array([[-1]]), None, "outside 0..299"),
        (np.array([[1, 2]]), np.array([[1, 0]]), "left only"),
        (np.array([[1, 2]]), np.array([[0, 0]]), "left only"),
        (np.array([[1, 2]]), np.array([[1]]), "left only"),
    ],
)
def test_bad_input_is_one_sentence(
    ids: np.ndarray, mask: np.ndarray | None, message: str, toy_bundles: dict[str, Path]
) -> None:
    with pytest.raises(MoEdgeError, match=message):
        open_engine(toy_bundles["concat"]).prefill(ids, mask)


def test_a_used_or_foreign_cache_and_a_closed_engine_are_refused(toy_bundles: dict[str, Path]) -> None:
    engine = open_engine(toy_bundles["concat"])
    step = engine.prefill(IDS)
    engine.decode(IDS[:, :1], step.cache)
    for cache in (step.cache, None, object()):
        with pytest.raises(MoEdgeError, match="prefill again"):
            engine.decode(IDS[:, :1], cache)
    engine.close()
    with pytest.raises(MoEdgeError, match="closed"):
        engine.prefill(IDS)


def test_a_changed_byte_is_refused(tmp_path: Path, make_toy_bundle: Any) -> None:
    make_toy_bundle(tmp_path / "bundle")
    data = tmp_path / "bundle" / "model.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[100] ^= 1
    data.write_bytes(changed)
    with pytest.raises(MoEdgeError, match=r"model\.onnx\.data"):
        open_engine(tmp_path / "bundle")


def test_a_tap_that_is_not_in_the_graph_is_refused(tmp_path: Path, make_toy_bundle: Any) -> None:
    make_toy_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["taps"]["0"]["output"] = "nowhere"
    path.write_text(json.dumps(manifest))
    with pytest.raises(MoEdgeError, match="nowhere"):
        open_engine(tmp_path / "bundle", taps=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({}, "neither a bundle"),
        ({"manifest.json": "{"}, "not valid JSON"),
        ({"manifest.json": '{"schema": "other"}'}, "not a bundle"),
        ({"manifest.json": '{"schema": "moedge.bundle/1", "target": "npu"}'}, "cannot run"),
        ({"config.json": "{}"}, "model_type"),
    ],
)
def test_open_engine_says_what_is_wrong_with_a_folder(
    content: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(MoEdgeError, match=message):
        open_engine(folder)


def test_positions_count_real_tokens_only() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(position_ids(mask, 5), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(position_ids(mask, 2), [[1, 2], [3, 4]])
