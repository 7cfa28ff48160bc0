"""The profile counts every node once, in the part of the model that it computes, and keeps prefill and decode apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moedge import MoEdgeError
from moedge.runtime.bench import profiling
from moedge.runtime.bench.profiling import GROUPS, group_nodes, profile, profiles, split_runs, summary
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.report.profile import table


def _event(name: str, start: int, duration: int, kind: str | None = None) -> dict[str, Any]:
    if kind is None:
        return {"cat": "Session", "name": name, "ts": start, "dur": duration, "args": {}}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": kind}}


def test_events_belong_to_the_run_in_which_they_lie() -> None:
    events = [
        _event("a", 5, 3, "MatMul"),  # before any run: initialisation
        _event("model_run", 10, 20),
        _event("a", 12, 4, "MatMul"),
        _event("b", 20, 2, "Add"),
        _event("model_run", 40, 20),
        _event("a", 41, 6, "MatMul"),
    ]
    assert split_runs(events) == [{"a": ("MatMul", 4.0), "b": ("Add", 2.0)}, {"a": ("MatMul", 6.0)}]


def test_rows_are_the_shortest_times_less_the_recording_and_sum_to_the_whole() -> None:
    runs = [
        {"a": ("MatMul", 1003.0), "b": ("MatMul", 503.0), "c": ("Reshape", 3.0)},
        {"a": ("MatMul", 9003.0), "b": ("MatMul", 503.0), "c": ("Reshape", 3.0)},
        {"a": ("MatMul", 1203.0), "b": ("MatMul", 503.0), "c": ("Reshape", 8.0)},
    ]
    found = summary(runs, {"a": "attention", "b": "head", "c": "head"}, 2.0)
    assert found["recording_us"] == 3
    assert [(row["name"], row["nodes"], row["ms"], row["share"]) for row in found["operators"]] == [
        ("MatMul", 2, 1.5, 0.75),
        ("Reshape", 1, 0.0, 0.0),
        ("outside", 0, 0.5, 0.25),
    ]
    assert [(row["name"], row["nodes"], row["ms"]) for row in found["groups"]] == [
        ("attention", 1, 1.0),
        ("head", 2, 0.5),
        ("outside", 0, 0.5),
    ]


def test_a_step_counts_with_its_shortest_time_and_all_steps_count() -> None:
    """A gathered node whose second step has three times the work, disturbed once in each step."""
    work = {1: 1000.0, 2: 3000.0}  # microseconds, as if the machine did nothing else
    disturbed = {(0, 2): 5000.0, (1, 1): 700.0}  # (repeat, step) -> what another program added

    def run(repeat: int, step: int) -> dict[str, tuple[str, float]]:
        more = disturbed.get((repeat, step), 0.0)
        found = {"down": ("GatherLinear", work[step] + more + 2), "shape": ("Shape", 2.0)}
        return found | ({"late": ("If", 102.0)} if step == 2 else {})

    runs = [run(repeat, step) for repeat in range(2) for step in (1, 2)]
    found = summary(runs, {}, 4.0, steps=2)
    assert found["recording_us"] == 2
    # (1000 + 3000) / 2 microseconds; of what runs in every second step, half. The shortest of all would be 1.0.
    assert {row["name"]: row["ms"] for row in found["operators"]} == pytest.approx(
        {"GatherLinear": 2.0, "If": 0.05, "Shape": 0.0, "outside": 1.95}
    )


def _graph(folder: Path, bundle: Path) -> tuple[Any, set[str]]:
    """The optimised graph, and the names of the nodes that ran."""
    engine = OrtEngine(bundle, threads=1, trace=folder)
    engine.prefill(np.arange(8)[None])
    (run,) = split_runs(json.loads(engine.end_trace().read_text(encoding="utf-8")))
    engine.close()
    return onnx.load(folder / "optimized.onnx", load_external_data=False).graph, set(run)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_node_that_runs_is_in_one_group(kind: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    graph, ran = _graph(tmp_path, bundles[f"{kind}/ort-cpu"])
    layers = json.loads((bundles[f"{kind}/ort-cpu"] / "manifest.json").read_text("utf-8"))["model"]["num_layers"]
    groups = group_nodes(graph)
    assert ran == set(groups) == {node.name for node in graph.node}
    kinds: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    for node in graph.node:
        kinds[groups[node.name]][node.op_type] += 1
    assert kinds["attention"]["GroupQueryAttention"] == layers
    assert kinds["attention"]["RotaryEmbedding"] == 2 * layers
    assert kinds["norms"].total() == 2 * layers + 1
    assert kinds["head"].total() == 1
    assert kinds["input"]["Gather"] >= 1, "the embedding"
    products = sum(kinds["dense FFN"][name] for name in ("MatMul", "Gemm"))
    if kind == "dense":
        assert not kinds["experts"]
        assert not kinds["router"]
        assert products == 2 * layers, "gate and up in one, down"
    else:
        assert dict(kinds["experts"]) == {"RoutedGLU": layers}
        assert kinds["router"]["TopK"] == layers
        assert products + sum(kinds["router"][name] for name in ("MatMul", "Gemm")) in (2 * layers, 3 * layers)


def test_a_profile_adds_up(bundles: dict[str, Path]) -> None:
    found = profile(bundles["moe/ort-cpu"], np.arange(12), prompt=10, decode=3, repeats=2, threads=1)
    for phase in ("prefill", "decode"):
        part = found[phase]
        for rows in (part["operators"], part["groups"]):
            assert sum(row["nodes"] for row in rows) == part["nodes"]
            assert sum(row["ms"] for row in rows) == pytest.approx(part["ms"])
            assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert {row["name"] for row in found["decode"]["groups"]} == {*GROUPS, "outside"}
    json.dumps(found, allow_nan=False)


def test_a_profile_takes_the_shortest_of_each_step_and_the_mean_over_steps(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first repeat is dropped; of the others each step's shortest counts: (1 + 4) / 2 and (1.5 + 5) / 2 ms."""
    plain = [(9.0, [0.1, 0.1]), (7.0, [1.5, 6.0]), (8.0, [2.5, 5.0])]
    nodes = [[100.0, 1.0, 1.0], [6002.0, 1002.0, 5002.0], [7002.0, 2002.0, 4002.0]]  # microseconds: prompt, steps
    times = iter([*plain, *plain])
    monkeypatch.setattr(profiling, "_run", lambda *_: next(times))
    runs = [{"a": ("MatMul", us), "b": ("Shape", 2.0)} for repeat in nodes for us in repeat]
    monkeypatch.setattr(profiling, "split_runs", lambda _: runs)
    found = profile(bundles["dense/ort-cpu"], np.arange(12), prompt=10, decode=2, repeats=2, threads=1)
    assert (found["prefill"]["ms"], found["decode"]["ms"]) == (7.0, 3.25)
    assert found["prefill"]["operators"][0]["ms"] == pytest.approx(6.0)
    assert found["decode"]["operators"][0]["ms"] == pytest.approx(2.5)


def test_a_graph_without_fused_norms_has_operators_only(bundles: dict[str, Path]) -> None:
    found = profile(bundles["dense/portable"], np.arange(12), prompt=10, decode=2, repeats=1, threads=1)
    assert found["prefill"]["groups"] == []
    assert {"MatMul", "Softmax"} <= {row["name"] for row in found["prefill"]["operators"]}


def test_checkpoints_are_left_out(bundles: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    folders = {"torch": checkpoints["dense"], "ort": bundles["dense/ort-cpu"]}
    found = profiles(folders, np.arange(12), prompt=8, decode=2, repeats=1, threads=1)
    assert list(found) == ["ort"]
    labels, rows = table(found, "decode", "groups")
    assert labels == ["ort"]
    assert rows[-1] == ("all", [{"ms": found["ort"]["decode"]["ms"], "share": 1.0}])
    assert {name for name, _ in rows} <= {*GROUPS, "outside", "all"}
    with pytest.raises(MoEdgeError, match="none among these"):
        profiles({"torch": checkpoints["dense"]}, np.arange(12), prompt=8, decode=2, repeats=1)
