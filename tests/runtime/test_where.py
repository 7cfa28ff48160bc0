"""A failed check is located: mistakes in a whole bundle are found in the layer, the part and the phase they are in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.convert import modeling
from moedge.export.graph import layers as points
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine
from moedge.runtime.parity import where
from moedge.runtime.parity.given import pair
from moedge.runtime.report.checks import junit_xml
from moedge.runtime.report.verification import page

HIDDEN, LAYERS, EXPERTS, TOP_K, VOCAB, HEAD = 64, 3, 6, 2, 260, 16
PREFILL = 24
BEGIN = 256
"""The token that begins a text."""
WINDOWS = np.random.default_rng(1).integers(0, 256, (2, 40))
WINDOWS[:, 0] = BEGIN
TARGETS = ["ort-cpu", "ort-cpu-int8", "tensorrt-rtx"]

Graph = onnx.GraphProto
Change = Callable[[Graph], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any, tiny_llama: Any, tiny_tokenizer: Any, gather_only: Any) -> dict[str, Path]:
    """``routed/...`` and ``gathered/...``: a checkpoint and its bundles, by target. No output projection is tied."""
    from moedge.convert import calibration, methods

    root = tmp_path_factory.mktemp("where")
    model = tiny_llama(layers=LAYERS, hidden=HIDDEN, width=256, tie_word_embeddings=False)
    model.model.norm.weight.data *= 2  # logits with a standard deviation of 3, which the limits are derived for
    for layer in model.model.layers:  # random weights of 0.2 make attention sharper than training does
        layer.self_attn.q_proj.weight.data *= 0.25
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    routed = methods.convert(
        "cmoe", calibration.collect(model, tokens, k_a=8), model, shared=2, active=TOP_K, experts=8, k_a=8
    )
    found = {}
    for kind, plan in (("routed", routed), ("gathered", gather_only(model))):
        modeling.save(modeling.apply(plan, copy.deepcopy(model)), plan, tiny_tokenizer, root / kind / "checkpoint")
        found[f"{kind}/checkpoint"] = root / kind / "checkpoint"
        targets = TARGETS if kind == "routed" else TARGETS[:2]
        for target, path in export(found[f"{kind}/checkpoint"], root / kind / "bundles", targets, label="tiny").items():
            found[f"{kind}/{target}"] = path
    return found


def verified(reference: Path, test: Path, prefill: int = PREFILL) -> dict[str, Any]:
    """The comparison with the checkpoint or the portable bundle."""
    result = pair(reference, test, "random", WINDOWS, prefill, "float32", {"threads": 1}, lambda *_: None)
    entry: dict[str, Any] = result["parity"][0]
    return entry


# The graph of a bundle: who makes a value, what its points are called.


def maker(graph: Graph, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)


def point(graph: Graph, layer: int, spot: Any) -> str:
    return points.find(graph, LAYERS).names[layer, spot]


def attention(graph: Graph, layer: int) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type in ("GroupQueryAttention", "CausalAttention")][layer]


def tensor(graph: Graph, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def change(*patterns: str, by: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the weights whose names hold all patterns."""

    def apply(graph: Graph) -> None:
        for each in graph.initializer:
            if all(pattern in each.name for pattern in patterns):
                rewrite(each, by)

    return apply


def rewrite(each: onnx.TensorProto, by: Callable[[np.ndarray], np.ndarray]) -> None:
    array = numpy_helper.to_array(each)
    each.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(by(array.copy())).astype(array.dtype), each.name))


def swapped(array: np.ndarray, one: Any, two: Any) -> np.ndarray:
    array[one], array[two] = array[two].copy(), array[one].copy()
    return array


def inserted(graph: Graph, name: str, nodes: Callable[[str], list[onnx.NodeProto]]) -> None:
    """Put nodes behind the value ``name``: they get its former value's name and make it anew."""
    node = maker(graph, name)
    place, before = list(graph.node).index(node), f"{name}.before"
    node.output[list(node.output).index(name)] = before
    for offset, new in enumerate(nodes(before)):
        graph.node.insert(place + 1 + offset, new)


def constants(graph: Graph, **values: Any) -> None:
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def past_tokens() -> list[onnx.NodeProto]:
    """Nodes that make ``fault.past`` int64 [1]: tokens in the cache."""
    return [
        helper.make_node("Shape", ["input_ids"], ["fault.new"], start=1, end=2),
        helper.make_node("Shape", ["attention_mask"], ["fault.all"], start=1, end=2),
        helper.make_node("Sub", ["fault.all", "fault.new"], ["fault.past"]),
    ]


# Mistakes, and what is said of them.


def a_head_exchanged(graph: Graph) -> None:
    """Queries of heads 0 and 1 of layer 1, in a merged float product or in blocks of integers."""
    read = point(graph, 1, "attention_input")
    product = next(node for node in graph.node if read in node.input and "MatMul" in node.op_type)
    one, two = slice(0, HEAD), slice(HEAD, 2 * HEAD)
    if product.op_type == "MatMul":
        rewrite(tensor(graph, product.input[1]), lambda w: swapped(w.T.copy(), one, two).T)
    else:
        for name in product.input[1:3]:
            rewrite(tensor(graph, name), lambda w: swapped(w, one, two))


def slots_off_by_one(*layers: int) -> Change:
    """While decoding, these layers take the cache for one token shorter: each key overwrites the one before."""

    def apply(graph: Graph) -> None:
        constants(graph, **{"fault.one": np.array([1], np.int64)})
        lengths = attention(graph, 0).input[5]
        place = 1 + list(graph.node).index(maker(graph, lengths))
        new = [
            *past_tokens(),
            helper.make_node("Min", ["fault.past", "fault.one"], ["fault.short"]),
            helper.make_node("Cast", ["fault.short"], ["fault.short32"], to=onnx.TensorProto.INT32),
            helper.make_node("Sub", [lengths, "fault.short32"], ["fault.lengths"]),
        ]
        for offset, node in enumerate(new):
            graph.node.insert(place + offset, node)
        for layer in layers:
            attention(graph, layer).input[5] = "fault.lengths"

    return apply


def a_cache_rolled(graph: Graph) -> None:
    """Layer 1 of a portable graph reads its cached keys one slot further on: the first comes last."""
    concat = next(node for node in graph.node if "past_key_values.1.key" in node.input)
    constants(graph, **{"fault.axis": np.array([2], np.int64), "fault.0": np.array([0], np.int64)})
    constants(graph, **{"fault.1": np.array([1], np.int64), "fault.end": np.array([1 << 40], np.int64)})
    place, past = list(graph.node).index(concat), "past_key_values.1.key"
    for offset, new in enumerate(
        [
            helper.make_node("Slice", [past, "fault.1", "fault.end", "fault.axis"], ["fault.rest"]),
            helper.make_node("Slice", [past, "fault.0", "fault.1", "fault.axis"], ["fault.first"]),
            helper.make_node("Concat", ["fault.rest", "fault.first"], ["fault.rolled"], axis=2),
        ]
    ):
        graph.node.insert(place + offset, new)
    concat.input[list(concat.input).index(past)] = "fault.rolled"


def a_norm_scaled(layer: int, spot: Any, by: float = 1.2) -> Change:
    def apply(graph: Graph) -> None:
        norm = maker(graph, point(graph, layer, spot))
        weight = next(name for name in norm.input if any(name == each.name for each in graph.initializer))
        constants(graph, **{"fault.weight": numpy_helper.to_array(tensor(graph, weight)) * np.float32(by)})
        norm.input[list(norm.input).index(weight)] = "fault.weight"  # norms of equal weights share them

    return apply


def head_rows_swapped(graph: Graph) -> None:
    """Two tokens have each other's logit."""
    for name in filter(None, maker(graph, "logits").input[1:3]):
        rewrite(
            tensor(graph, name),
            lambda w: swapped(w, 3, 7) if w.shape[0] == VOCAB else swapped(w.T.copy(), 3, 7).T,
        )


def embedding_rows_swapped(graph: Graph) -> None:
    """One token of the first window's prefill has the row of another."""
    (lookup,) = [node for node in graph.node if "Gather" in node.op_type and "input_ids" in node.input]
    rewrite(tensor(graph, lookup.input[0]), lambda w: swapped(w, int(WINDOWS[0, 5]), VOCAB - 1))


def first_row_swapped(graph: Graph) -> None:
    """The token that both windows begin with, and that is nowhere else, has the row of another."""
    (lookup,) = [node for node in graph.node if "Gather" in node.op_type and "input_ids" in node.input]
    rewrite(tensor(graph, lookup.input[0]), lambda w: swapped(w, BEGIN, VOCAB - 1))


def ffn_scaled(only: str) -> Change:
    """Layer 1's FFN gives 1.3 times what it should where it gets many tokens (``prefill``), or one (``decode``)."""

    def apply(graph: Graph) -> None:
        name = point(graph, 1, "ffn")
        constants(graph, **{"fault.one": np.array([1], np.int64)})
        factors = np.float32((1.0, 1.3) if only == "decode" else (1.3, 1.0))
        constants(graph, **{"fault.many": factors[0], "fault.single": factors[1]})

        def nodes(before: str) -> list[onnx.NodeProto]:
            return [
                helper.make_node("Shape", ["input_ids"], ["fault.new"], start=1, end=2),
                helper.make_node("Greater", ["fault.new", "fault.one"], ["fault.reading"]),
                helper.make_node("Where", ["fault.reading", "fault.many", "fault.single"], ["fault.factor"]),
                helper.make_node("Mul", [before, "fault.factor"], [name]),
            ]

        inserted(graph, name, nodes)

    return apply


def exchanged(one: int, two: int) -> Change:
    return change("experts.", "layers.1.", by=lambda w: swapped(w, one, two))


def permuted_router(graph: Graph) -> None:
    """Rows of experts 0 and 1 of layer 1's router; in int8 the router's products are all that is merged."""
    rewrite(
        tensor(graph, "merged.1"),
        lambda w: w.reshape(HIDDEN, 2, EXPERTS)[:, :, [1, 0, *range(2, EXPERTS)]].reshape(HIDDEN, -1),
    )


BY_BOTH = {
    "one layer's scales halved",
    "a cache slot off by one",
    "an expert exchanged with another",
    "a head exchanged",
}
"""Located beside the checkpoint and beside the portable graph; the others beside the checkpoint alone."""
BOTH = "prefill and decode"
ROUTED: dict[str, tuple[str, Change, int | None, str, str]] = {
    # name: (target, mistake, layer, part, fault)
    "one layer's scales halved": (
        "ort-cpu-int8", change("experts.", "layers.1.", "down.scales", by=lambda w: w / 2), 1, "experts", BOTH,
    ),
    "scales that are no numbers": (
        "ort-cpu-int8", change("experts.", "layers.2.", "down.scales", by=lambda w: w * np.nan), 2, "experts", BOTH,
    ),
    "a head exchanged": ("ort-cpu", a_head_exchanged, 1, "attention", BOTH),
    "a head exchanged, int8": ("ort-cpu-int8", a_head_exchanged, 1, "attention", BOTH),
    "a cache slot off by one": ("ort-cpu", slots_off_by_one(1), 1, "attention", "cache"),
    "a cache slot off by one, int8": ("ort-cpu-int8", slots_off_by_one(*range(LAYERS)), 0, "attention", "cache"),
    "a cache rolled": ("portable", a_cache_rolled, 1, "attention", "cache"),
    "an expert exchanged with another": ("ort-cpu", exchanged(1, 4), 1, "experts", BOTH),
    "an expert exchanged with another, int8": ("ort-cpu-int8", exchanged(1, 4), 1, "experts", BOTH),
    "a norm before attention scaled": ("ort-cpu", a_norm_scaled(1, "attention_input"), 1, "norm", BOTH),
    "a norm before an FFN scaled, int8": ("ort-cpu-int8", a_norm_scaled(2, "ffn_input"), 2, "norm", BOTH),
    "the last norm scaled": ("ort-cpu", a_norm_scaled(LAYERS, "head_input"), None, "norm", BOTH),
    "rows of the head swapped": ("ort-cpu", head_rows_swapped, None, "head", BOTH),
    "rows of the head swapped, int8": ("ort-cpu-int8", head_rows_swapped, None, "head", BOTH),
    "rows of the embedding swapped": ("ort-cpu", embedding_rows_swapped, None, "embedding", BOTH),
    "the first token's row of the embedding swapped": ("ort-cpu", first_row_swapped, None, "embedding", BOTH),
    "experts of another order in the router": ("ort-cpu-int8", permuted_router, 1, "router", BOTH),
    "experts too large, half precision": (
        "tensorrt-rtx", change("layers.1.", "mlp.down", by=lambda w: w * 1.2), 1, "experts", BOTH,
    ),
    "an FFN wrong in the prefill alone": ("ort-cpu", ffn_scaled("prefill"), 1, "experts", "prefill"),
    "an FFN wrong in decode alone": ("ort-cpu", ffn_scaled("decode"), 1, "experts", "decode"),
    "a rotary table wrong from position 30 on": (
        "ort-cpu", change("rotary.sin", by=lambda w: np.where(np.arange(len(w))[:, None] < 30, w, -w)), 0, "attention",
        BOTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ROUTED)
def test_a_mistake_is_located(folders: Any, tmp_path: Path, broken_copy: Any, mistake: str) -> None:
    target, mutation, layer, part, fault = ROUTED[mistake]
    broken = broken_copy(folders[f"routed/{target}"], tmp_path / "broken", mutation)
    for reference in ("checkpoint", "portable") if mistake in BY_BOTH else ("checkpoint",):
        entry = verified(folders[f"routed/{reference}"], broken)
        assert not entry["verdict"]["passed"]
        location = entry["location"]
        first = location["first"]
        assert first is not None, location["sentence"]
        found = (first["layer"], first["part"], location["fault"])
        assert found == (layer, part, fault), location["sentence"]
        assert location["sentence"] in entry["verdict"]["notes"]
        if "exchanged with another" in mistake:
            assert first["experts"] == [1, 4]
        if "position 30" in mistake:
            assert first["first_position"] == 30
        if fault in ("cache", "decode"):
            assert first["phases"] == ["decode"]
            assert "Read in one prefill, it is right there" in location["sentence"]
        if mistake.startswith("a cache slot"):
            assert "slot 23 holds the key of token 24." in location["sentence"]


GATHERED: dict[str, tuple[str, Change, int, str]] = {
    "rows of down swapped": (
        "ort-cpu", change("layers.1.", "shared_down.rows", by=lambda w: swapped(w, 3, 4)), 1, "FFN",
    ),
    "one layer's scales halved": (
        "ort-cpu-int8", change("layers.1.", "shared_down.scales", by=lambda w: w / 2), 1, "FFN",
    ),
    "thresholds of the neighbour": (
        "ort-cpu", change("layers.1.", "x_threshold", by=lambda w: np.roll(w, 1)), 1, "FFN",
    ),
    "a head exchanged": ("ort-cpu", a_head_exchanged, 1, "attention"),
    "a norm scaled": ("ort-cpu", a_norm_scaled(1, "ffn_input"), 1, "norm"),
    "rows of the head swapped, int8": ("ort-cpu-int8", head_rows_swapped, None, "head"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", GATHERED)
def test_a_mistake_in_a_gathered_model_is_located(folders: Any, tmp_path: Path, broken_copy: Any, mistake: str) -> None:
    target, mutation, layer, part = GATHERED[mistake]
    broken = broken_copy(folders[f"gathered/{target}"], tmp_path / "broken", mutation)
    for reference in ("checkpoint", "portable") if mistake in BY_BOTH else ("checkpoint",):
        location = verified(folders[f"gathered/{reference}"], broken)["location"]
        first = location["first"]
        assert (first["layer"], first["part"], location["fault"]) == (layer, part, BOTH), location["sentence"]


@pytest.mark.parametrize("kind", ["routed", "gathered"])
def test_where_all_passed_nothing_runs_again(folders: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(where, "locate", lambda again: pytest.fail("nothing failed"))
    entry = verified(folders[f"{kind}/checkpoint"], folders[f"{kind}/ort-cpu"])
    assert entry["verdict"]["passed"]
    assert "location" not in entry
    assert "text" not in entry["worst"]


@pytest.mark.parametrize("kind", ["routed", "gathered"])
@pytest.mark.parametrize("target", TARGETS[:2])
def test_no_part_of_a_healthy_bundle_departs(folders: Any, kind: str, target: str) -> None:
    """It fails a limit that nothing can keep, and is looked at by the packaged ones."""
    limits = tolerances.load().profiles[f"float32/{target}"].model_copy(update={"mean_kl": 1e-30})
    profiles = {**tolerances.load().profiles, f"float32/{target}": limits}
    impossible = tolerances.Tolerances.model_validate({"schema": "moedge.tolerances/1", "profiles": profiles})
    bundles = folders[f"{kind}/checkpoint"], folders[f"{kind}/{target}"]
    options = {"threads": 1}
    result = pair(*bundles, "random", WINDOWS, PREFILL, "float32", options, lambda *_: None, impossible)
    location = result["parity"][0]["location"]
    assert location["first"] is None
    assert location["sentence"].startswith("No single part departs by itself")
    assert max(ratio for row in location["heat"]["ratios"] for ratio in row) < 0.5


def test_the_worst_token_is_named_with_its_text(folders: Any, tmp_path: Path, broken_copy: Any) -> None:
    mutation = ROUTED["an FFN wrong in decode alone"][1]
    entry = verified(
        folders["routed/checkpoint"], broken_copy(folders["routed/ort-cpu"], tmp_path / "broken", mutation)
    )
    worst = entry["worst"]
    assert worst["phase"] == "decode"
    assert worst["position"] >= PREFILL
    assert worst["id"] == WINDOWS[worst["window"], worst["position"]]
    assert f"position {worst['position']} of window {worst['window']} (decode)" in entry["location"]["sentence"]
    assert worst["text"]
    judged = entry["replay"] or entry
    assert worst["kl"] == pytest.approx(judged["phases"]["decode"]["kl_ref_test"]["max"])


def test_every_surface_says_where(folders: Any, tmp_path: Path, broken_copy: Any) -> None:
    broken = broken_copy(folders["routed/ort-cpu"], tmp_path / "broken", exchanged(1, 4))
    result = pair(
        folders["routed/checkpoint"], broken, "random <text>", WINDOWS, PREFILL, "float32", {"threads": 1},
        lambda *_: None,
    )  # fmt: skip
    sentence = "The first part that departs is the experts of layer 1"
    assert sentence in junit_xml(result)
    html = page(result)
    for text in (sentence, "random &lt;text&gt;", "<svg", "chose expert 1 or 4", "FAILED"):
        assert text in html
    assert "random <text>" not in html
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    rows = result["parity"][0]["location"]["heat"]
    assert rows["rows"] == ["embedding", "0", "1", "2", "head"]
    hottest = int(np.argmax([max(row) for row in rows["ratios"]]))
    assert rows["rows"][hottest] == "1"


@pytest.mark.parametrize(("only", "fault"), [("decode", "decode"), ("prefill", "prefill")])
def test_what_shows_no_layers_says_so_and_in_which_phase_its_logits_depart(
    folders: Any, tmp_path: Path, broken_copy: Any, only: str, fault: str
) -> None:
    """As a built engine: it shows its choices and nothing between its parts."""
    broken = broken_copy(folders["routed/ort-cpu"], tmp_path / "broken", ffn_scaled(only))

    def engine(*, layers: str | None = None) -> Any:
        if layers:
            raise MoEdgeError("an engine shows none.")
        return open_engine(broken, threads=1, taps=True, router_inputs=True)

    reference = partial(open_engine, folders["routed/checkpoint"], threads=1, taps=True, replay=True)
    limits = tolerances.load().profiles["float32/ort-cpu"]
    location = where.locate(where.Again(reference, engine, WINDOWS[0], PREFILL, limits, limits))
    assert location["sentence"].startswith("Which part departs could not be told: an engine shows none. The logits ")
    assert (location["fault"], location["first"], location["departing"]) == (fault, None, [])


def test_what_cannot_even_run_again_says_why() -> None:
    def engine(**_: Any) -> Any:
        raise MoEdgeError("it is gone.")

    limits = tolerances.load().profiles["float32/torch"]
    location = where.locate(where.Again(engine, engine, WINDOWS[0], PREFILL, limits, limits))
    assert location["sentence"] == "Which part departs could not be told: it is gone."
    assert location["fault"] is None


def test_an_explanation_never_costs_the_verdict(tmp_path: Path) -> None:
    def again(_: np.ndarray) -> Any:
        raise KeyError((0, "ffn_normed"))

    worst = {"window": 0, "position": 1, "phase": "decode", "kl": 1.0}
    entry: Any = {"worst": worst, "verdict": {"checks": [{"name": "kl", "passed": False}], "notes": []}}
    found = where.explained(entry, list(WINDOWS), again, tmp_path)
    assert not found["verdict"]["checks"][0]["passed"]
    assert "could not be told: KeyError: (0, 'ffn_normed')" in found["verdict"]["notes"][0]
