"""Headroom is what was needed over what was measured, pair by pair, and says where the rest went."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from moedge import MoEdgeError
from moedge.export.manifest import CacheFacts, IOFacts, LayerFacts, Manifest, ModelFacts, MoEFacts
from moedge.export.needs import of_folder
from moedge.runtime.bench import roofline
from moedge.runtime.bench.headroom import Sizes, Timed, add_headroom, headroom
from moedge.runtime.bench.profiling import group_weights
from moedge.runtime.bench.roofline import Roof, measure_bandwidth, measure_rate
from moedge.runtime.report.headroom import show

H, V, REST, E, K, WIDTH = 8, 100, 1000, 6, 2, 50
ROUTED = 3 * E * WIDTH * H


def bundle(folder: Path, kind: str, target: str = "ort-cpu", **changed: Any) -> Path:
    """A folder with a manifest of one layer whose FFN is all routed experts."""
    layer = LayerFacts(num_experts=E, top_k=K, shared_width=0, expert_width=WIDTH)
    model = ModelFacts(
        model_type="llama",
        hidden_size=H,
        vocab_size=V,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        eos_token_ids=[],
        parameters=V * H + REST + ROUTED,
        tied_embedding=True,
    )
    facts: dict[str, Any] = {
        "schema": "moedge.bundle/1",
        **{"target": target, "kind": kind, "label": "x", "model": model},
        "moe": MoEFacts(layers={0: layer}) if kind == "moe" else None,
        **{"taps": {}, "versions": {}, "files": {}, "lowering": []},
        "io": IOFacts(model="model.onnx", inputs=[], outputs=[]),
        "cache": CacheFacts(kind="concat"),
    }
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(Manifest(**{**facts, **changed}).document()))
    return folder


class Scripted(Roof):
    """1 MB/s, and 500,000 multiplications a second."""

    def __init__(self) -> None:
        super().__init__(threads=2)
        self.asked: list[int] = []

    def bandwidth(self, size: float) -> float:
        return 1e6

    def rate(self, rows: int, bits: int) -> float:
        self.asked.append(bits)
        return 5e5


def timed(folder: Path, prompt: float, decode: float, **changed: str) -> Timed:
    facts = {"device": "CPU", "dtype": "float32", "target": "ort-cpu", **changed}
    return Timed(folder, facts["device"], facts["dtype"], facts["target"], {"prompt": prompt, "decode": decode})


SIZES = Sizes(prompt=10, decode=4)


def test_reached_is_the_least_time_over_the_measured_one(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "moe", "moe")
    needs, roof = of_folder(folder), Scripted()
    found = headroom({"moe": timed(folder, 100.0, 50.0)}, SIZES, roof, {})
    (row,) = found["rows"]
    assert SIZES.context == 12.5, "a step sees 11 to 14 tokens, itself included"
    read = needs.decode_bytes(12.5)
    assert row["decode"]["bytes"] == read
    assert row["decode"]["least_ms"] == pytest.approx(1e3 * read / 1e6)
    assert row["decode"]["reached"] == pytest.approx(read / 1e3 / 50)
    assert row["decode"]["bound"] == "memory"
    assert row["decode"]["gb_s"] == pytest.approx(read / 50 / 1e6)
    products = needs.prompt_products(10)
    assert row["prompt"]["multiplications"] == products
    assert row["prompt"]["bound"] == "arithmetic"
    assert row["prompt"]["least_ms"] == pytest.approx(1e3 * products / 5e5)
    assert found["gains"] == [], "there is no dense parent"
    assert roof.asked == [32]


def test_the_gain_of_a_conversion_is_compared_with_the_ideal_one(tmp_path: Path) -> None:
    moe, dense = bundle(tmp_path / "moe", "moe"), bundle(tmp_path / "dense", "dense")
    other = bundle(tmp_path / "other", "dense", target="portable")
    entries = {
        "moe": timed(moe, 100.0, 50.0),
        "dense": timed(dense, 150.0, 60.0),
        "other": timed(other, 1.0, 1.0, target="portable"),
    }
    # Geometric means over rounds, which are not the ratios of the medians 150 / 100 and 60 / 50.
    paired = {("ttft_ms", "moe", "dense"): 1.4, ("tpot_ms", "moe", "dense"): 1.1, ("tpot_ms", "dense", "moe"): 1 / 1.1}
    found = headroom(entries, SIZES, Scripted(), paired)
    prompt, decode = found["gains"]

    class Noisy(Scripted):
        def bandwidth(self, size: float) -> float:
            return 1e6 if size > of_folder(moe).decode_bytes(12.5) else 0.7e6

    again = headroom(entries, SIZES, Noisy(), paired)["gains"][1]
    assert again["ideal"] == decode["ideal"], "a roof that was measured twice does not move a ratio"
    assert {gain["dense"] for gain in found["gains"]} == {"dense"}, "its parent on the same target"
    ideal = of_folder(dense).decode_bytes(12.5) / of_folder(moe).decode_bytes(12.5)
    assert decode["ideal"] == pytest.approx(ideal)
    assert ideal > 1.5
    assert decode["measured"] == 1.1, "what tables and sentences say"
    assert decode["reached"] == pytest.approx(1.1 / ideal)
    assert prompt["measured"] == 1.4


def test_the_products_of_a_quantised_engine_are_measured_at_its_bits(tmp_path: Path) -> None:
    roof = Scripted()
    folder = bundle(tmp_path / "a", "moe", target="ort-cpu-int4")
    headroom({"a": timed(folder, 1.0, 1.0, target="ort-cpu-int4")}, SIZES, roof, {})
    assert roof.asked == [4]


def test_what_cannot_be_told_says_why_and_the_others_are_told(tmp_path: Path) -> None:
    moe = bundle(tmp_path / "moe", "moe")
    entries = {
        "gpu": timed(moe, 1.0, 1.0, device="NVIDIA H200"),
        "gone": timed(tmp_path / "gone", 1.0, 1.0),
        "moe": timed(moe, 1.0, 1.0),
    }
    gpu, gone, told = headroom(entries, SIZES, Scripted(), {})["rows"]
    assert "moedge estimate" in gpu["reason"]
    assert "config.json" in gone["reason"]
    assert "decode" in told


def test_a_profile_says_where_the_rest_went(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "moe", "moe")
    groups = [
        {"name": name, "ms": ms}
        for name, ms in (("experts", 9.0), ("attention", 5.0), ("outside", 3.0), ("input", 0.1))
    ]
    profiles = {"moe": {"weights": {"experts": 6000, "attention": 2000, "input": 900}, "decode": {"groups": groups}}}
    found = headroom({"moe": timed(folder, 1.0, 1.0)}, SIZES, Scripted(), {}, profiles)
    lost = {part["part"]: part for part in found["lost"]}
    assert lost["experts"]["least_ms"] == pytest.approx(6000 * K / E / 1e3)
    assert lost["attention"]["least_ms"] == pytest.approx((2000 + 12.5 * of_folder(folder).cache_bytes) / 1e3)
    assert (lost["outside"]["ms"], lost["outside"]["least_ms"]) == (3.0, 0)
    assert lost["input"]["least_ms"] == 0, "a row of the table is looked up"
    order = [part["part"] for part in found["lost"]]
    assert order == ["experts", "outside", "attention", "input"], "the largest loss first"


def test_weights_belong_to_the_part_that_reads_them_whole() -> None:
    def tensor(name: str, kind: int, *dims: int) -> Any:
        return helper.make_tensor(name, kind, dims, np.zeros(dims).flatten().tolist())

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="lookup"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="ffn"),
        helper.make_node("MatMul", ["y", "table"], ["logits"], name="head"),
        helper.make_node("Mul", ["y", "odd"], ["z"], name="nobody's"),
    ]
    weights = [
        tensor("table", TensorProto.FLOAT, 10, 4),
        tensor("w", TensorProto.UINT8, 4, 4),
        tensor("odd", TensorProto.FLOAT, 3),
    ]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    assert group_weights(graph, {"lookup": "input", "ffn": "dense FFN", "head": "head"}) == {
        "head": 160,
        "dense FFN": 16,
    }


def test_a_result_gets_its_headroom_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Scripted):
        def __init__(self, threads: int) -> None:
            super().__init__()
            self.threads = threads
            made.append(threads)

    monkeypatch.setattr("moedge.runtime.bench.headroom.Roof", Counted)
    moe, dense = bundle(tmp_path / "moe", "moe"), bundle(tmp_path / "dense", "dense")
    info = {"device": "CPU", "dtype": "float32", "threads": 2, "model": {"target": "ort-cpu"}}
    times = {"ttft_ms": {"p50": 20.0}, "tpot_ms": {"p50": 10.0}}
    energy = {"joules_per_token": None, "reason": "no counter", "source": None}

    def point(batch: int, threads: int | None) -> dict[str, Any]:
        rows = [{"label": label, **times, "energy": energy} for label in ("moe", "dense")]
        ratios = [
            {"metric": metric, "label": "moe", "baseline": "dense", "speedup": 1.25}
            for metric in ("ttft_ms", "tpot_ms")
        ]
        sizes = {"prompt": 10, "decode": 4, "batch": batch, "depth": 0, "threads": threads}
        return {**sizes, "rounds": 400, "rows": rows, "ratios": ratios}

    result: Any = {
        "engines": {label: {"info": info} for label in ("moe", "dense")},
        "points": [point(1, None), point(8, None), point(1, 1)],
    }
    add_headroom(result, {"moe": moe, "dense": dense})
    one, eight, single = (entry["headroom"] for entry in result["points"])
    assert sorted(set(made)) == [1, 2]
    assert (one["threads"], eight["threads"], single["threads"]) == (2, 2, 1)
    assert eight["rows"][0]["decode"]["bytes"] == pytest.approx(of_folder(moe).decode_bytes(12.5, 8))
    assert [gain["phase"] for gain in one["gains"]] == ["prompt", "decode"]
    shown = io.StringIO()
    show(result, Console(file=shown, width=120))
    said = shown.getvalue()
    assert "moe, decode: 1.25 times dense's speed, " in said
    assert "Energy not told: no counter." in said
    assert "batch 8" in said


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_bytes_read_over_seconds(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is scripted: the warm-up and each try take a second, the second try half of one."""
    ticks = iter([0.0, 1.0, 2.0, 2.5, 3.0, 4.0])
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(ticks))
    assert measure_bandwidth(4_000_000, threads, tries=3) == 4_000_000 / 0.5


def test_a_larger_buffer_is_not_read_faster_than_a_cache() -> None:
    """A check of scale on the real clock: between what a slow board's memory gives and what no cache gives."""
    assert 1e8 < measure_bandwidth(2**22, 1) < 1e13


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_rates_of_products_are_measured_in_every_precision(bits: int) -> None:
    assert 1e8 < measure_rate(8, bits, 1, tries=1) < 1e14


def test_each_measurement_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda *given: calls.append(given) or 7.0)
    monkeypatch.setattr(roofline, "measure_rate", lambda *given: calls.append(given) or 9.0)
    roof = Roof(2)
    for _ in range(2):
        assert roof.bandwidth(1e6) == 7.0
        assert roof.rate(100, 8) == 9.0
        assert roof.rate(10_000, 32) == 9.0
    assert calls == [(1_000_000, 2), (100, 8, 2), (512, 32, 2)]
    monkeypatch.setattr(roofline, "_spare", lambda: 2**20)
    roof.bandwidth(1e12)
    assert calls[-1] == (2**20, 2), "never more than a quarter of what is free"
    monkeypatch.setattr(roofline, "_spare", lambda: 2**19)
    roof.bandwidth(1e12)
    assert len(calls) == 4, "not again where a little less is free"


def test_without_onnx_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(bits: int) -> bytes:
        raise ImportError("no onnx", name="onnx")

    monkeypatch.setattr(roofline, "_product", missing)
    with pytest.raises(MoEdgeError, match=r"measuring it needs onnx: pip install 'moedge\[cpu\]'"):
        measure_rate(1, 32, 1)
