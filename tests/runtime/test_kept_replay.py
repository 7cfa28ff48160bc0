"""Replay of kept values: what an engine leaves out is judged as a decision, and its arithmetic under that decision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moedge import MoEdgeError
from moedge.convert import modeling
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine, ort
from moedge.runtime.parity.given import pair
from moedge.runtime.parity.shapes import Asked
from moedge.runtime.report.checks import explained

WINDOWS = np.random.default_rng(1).integers(0, 256, (2, 48))
TARGETS = ["ort-cpu", "ort-cpu-int8", "tensorrt-rtx", "openvino"]
RAMPS = {"narrow": 0.001, "0.1": 0.1, "0.5": 0.5}
GELU = "GELU and biases"
"""Its FFNs are no GatherGLU: two GatherLinears each."""
ALL, TIED = "every linear layer", "every linear layer, tied"
KINDS = [*RAMPS, GELU, "routed, x alone", ALL, TIED, "routed, every linear layer"]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, gather_only: Any, gathered: Any, convert_tiny: Any
) -> Callable[[str, str], Path]:
    """Return a function (kind of model, ``checkpoint`` or a target) -> its folder."""
    root = tmp_path_factory.mktemp("kept")

    def folder(kind: str, name: str) -> Path:
        if not (root / kind).exists():
            more = {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": True} if kind == GELU else {}
            model = tiny_model("llama", **more, tie_word_embeddings="tied" in kind)
            linears = "all" if "every" in kind else "ffn"
            model.model.norm.weight.data *= 2
            if "routed" not in kind:
                plan = gather_only(model, ramp=RAMPS.get(kind, 0.1), linears=linears)
            else:
                plan = gathered(convert_tiny(model, "cmoe"), model, h=False, linears=linears)
            modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / kind / "checkpoint")
            targets = TARGETS if kind == "0.1" else TARGETS[:2]
            export(root / kind / "checkpoint", root / kind / "bundles", targets, label="tiny")
        return root / kind / name if name == "checkpoint" else root / kind / "bundles" / name

    return folder


def verified(reference: Path, test: Path) -> list[dict[str, Any]]:
    found = pair(reference, test, "random", WINDOWS, 24, "float32", {"threads": 1}, lambda *_: None)
    entries: list[dict[str, Any]] = found["parity"]
    return entries


def missed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in entry["verdict"]["checks"] if not check["passed"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["checkpoint", "portable"])
@pytest.mark.parametrize("target", ["portable", *TARGETS[:2]])
def test_a_healthy_engine_passes_whatever_the_ramp(folders: Any, kind: str, reference: str, target: str) -> None:
    entries = verified(folders(kind, reference), folders(kind, target))
    assert len(entries) == (2 if "int8" in target else 1)
    if (kind, target) == (GELU, "ort-cpu-int8"):
        del entries[0]  # what 8 bits cost random weights turns one token of 46: that says nothing
    for entry in entries:
        parts = ["arithmetic", *(["router"] if "routed" in kind else []), "kept", "free"]
        assert list(entry["verdict"]["parts"]) == parts
        assert not missed(entry)
        kept = entry["replay"]["kept"]
        assert entry["replay"]["tokens"] == WINDOWS.size
        assert kept["wrong"] == 0
        assert 0.3 < kept["kept"] < 0.9
        values = 2 * (32 if "routed" in kind else 32 + 64)
        values += 2 * (32 + 32) + 32 if "every" in kind else 0
        assert kept["decisions"] == values * WINDOWS.size
        assert "100.0000% of values rightly kept" in explained(entry, entry["replay"])


def in_shapes(reference: Path, test: Path) -> dict[str, Any]:
    asked = Asked(long=WINDOWS.reshape(-1)[:64])
    found = pair(reference, test, "random", WINDOWS, 24, "float32", {"threads": 1}, lambda *_: None, asked=asked)
    (entry,) = found["shapes"]
    return dict(entry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["portable", *TARGETS[:2]])
def test_a_healthy_engine_is_itself_in_every_shape(folders: Any, kind: str, target: str) -> None:
    entry = in_shapes(folders(kind, "checkpoint"), folders(kind, target))
    assert not missed(entry)
    assert not entry["not_run"]
    assert "kept" in entry["verdict"]["parts"]
    assert all(case["replayed"] == case["tokens"] for case in entry["cases"].values())


def test_padding_that_is_seen_is_found_under_the_engines_own_choices(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "check_batch", lambda ids, mask, vocab_size: np.ones_like(ids))
    entry = in_shapes(folders("0.1", "checkpoint"), folders("0.1", "ort-cpu"))
    wrong = {"batch.padding.prefill", "batch.padding.decode", "batch.chunked"}
    assert {name for name, passed in entry["verdict"]["parts"].items() if not passed} >= wrong
    assert entry["verdict"]["parts"]["batch.equal"]


def test_operators_that_stand_for_it_show_it_too(folders: Any) -> None:
    (entry,) = verified(folders("0.1", "checkpoint"), folders("0.1", "openvino"))
    assert entry["verdict"]["parts"] == {"arithmetic": True, "kept": True, "free": True}


def test_half_precision_shows_nothing_and_says_so(folders: Any) -> None:
    """It would round before it compares."""
    (entry,) = verified(folders("0.1", "checkpoint"), folders("0.1", "tensorrt-rtx"))
    assert entry["replay"] is None
    shaped = in_shapes(folders("0.1", "checkpoint"), folders("0.1", "tensorrt-rtx"))
    assert shaped["verdict"]["outcome"] != "failed"  # what cannot be replayed is not decided at worst
    assert any("does not show all of the small values" in note for note in entry["verdict"]["notes"])


def test_what_is_kept_changes_nothing_when_the_model_itself_would_keep_it(folders: Any) -> None:
    """Factors are followed to the letter: those of the own thresholds give the same logits, others do not."""
    for name in ("checkpoint", "portable"):
        engine: Any = open_engine(folders("0.1", name), taps=True, replay=True, threads=1)
        free = engine.prefill(WINDOWS[:1, :12])
        assert set(free.left_out_of) == {(layer, which) for layer in (0, 1) for which in ("x", "h")}
        factors = engine.factors(free.left_out_of)
        again = engine.prefill(WINDOWS[:1, :12], factors=factors)
        np.testing.assert_allclose(again.logits, free.logits, rtol=1e-5, atol=1e-5)
        everything = {place: np.ones_like(factor) for place, factor in factors.items()}
        assert np.abs(engine.prefill(WINDOWS[:1, :12], factors=everything).logits - free.logits).max() > 0.1
        with pytest.raises(MoEdgeError, match="in one engine only"):
            engine.factors({(7, "x"): free.left_out_of[0, "x"]})
        engine.close()
        closed: Any = open_engine(folders("0.1", name), threads=1)
        with pytest.raises(MoEdgeError, match=r"not opened with replay|in one engine only"):
            closed.prefill(WINDOWS[:1, :12], factors=factors)


def thresholds(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.GraphProto], None]:
    def apply(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name.endswith(name):
                array = change(numpy_helper.to_array(tensor))
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))

    return apply


def another_layers_thresholds(graph: onnx.GraphProto) -> None:
    nodes = [node for node in graph.node if node.op_type == "GatherGLU"]
    first, second = (node.input[1] for node in nodes)
    nodes[0].input[1], nodes[1].input[1] = second, first


def another_ramp(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "ramp":
                attribute.f *= 2


def one_row_of_down_swapped(graph: onnx.GraphProto) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("shared_down.rows"))
    rows = numpy_helper.to_array(tensor).copy()
    rows[[3, 4]] = rows[[4, 3]]
    tensor.CopyFrom(numpy_helper.from_array(rows, tensor.name))


def the_next_layer_reads_the_same(graph: onnx.GraphProto) -> None:
    """What the second FFN reads is what the first one read; it leaves out rightly of that."""
    first, second = (node.input[0] for node in graph.node if node.op_type == "GatherGLU")
    maker = next(node for node in graph.node if second in node.output)
    maker.output[list(maker.output).index(second)] = f"{second}.unused"
    graph.node.insert(list(graph.node).index(maker) + 1, onnx.helper.make_node("Identity", [first], [second]))


def one_threshold(values: np.ndarray) -> np.ndarray:
    changed = values.copy()
    changed[5] *= 1.01
    return changed


MUTATIONS: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "each x has its neighbour's threshold": (thresholds("x_threshold", lambda t: np.roll(t, 1)), "kept"),
    "each h has its neighbour's threshold": (thresholds("shared_h_threshold", lambda t: np.roll(t, 1)), "kept"),
    "thresholds of h ignored": (thresholds("shared_h_threshold", lambda t: np.full_like(t, 1e-30)), "kept"),
    "one threshold of 32 is 1 % higher": (thresholds("x_threshold", one_threshold), "kept"),
    "another layer's thresholds": (another_layers_thresholds, "kept"),
    "another ramp": (another_ramp, "kept"),
    "one row of down swapped": (one_row_of_down_swapped, "arithmetic"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_fails_the_part_that_it_is_in(folders: Any, tmp_path: Path, broken_copy: Any, name: str) -> None:
    change, part = MUTATIONS[name]
    broken = broken_copy(folders("0.1", "ort-cpu"), tmp_path / "broken", change)
    for reference in ("checkpoint", "portable"):
        (entry,) = verified(folders("0.1", reference), broken)
        assert not entry["verdict"]["parts"][part]
        assert entry["verdict"]["outcome"] == "failed"
        if part == "kept":
            assert any("its thresholds or its ramp are others" in note for note in entry["verdict"]["notes"])


def test_leaving_out_of_another_value_is_found(folders: Any, tmp_path: Path, broken_copy: Any) -> None:
    """What it shows is kept as the thresholds say: only it is not what the FFN should read."""
    broken = broken_copy(folders("0.1", "ort-cpu"), tmp_path / "broken", the_next_layer_reads_the_same)
    (entry,) = verified(folders("0.1", "checkpoint"), broken)
    assert entry["replay"]["kept"]["wrong"] == 0
    assert "kept.input_rel_error" in {check["name"] for check in missed(entry)}
    assert entry["replay"]["kept"]["layers"]["0.x"]["input_rel_error"] < 1e-5
