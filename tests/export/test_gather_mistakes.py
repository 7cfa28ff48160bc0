"""Mistakes in what leaves small values out: ``moedge verify`` and the self-tests catch each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moedge import MoEdgeError
from moedge.export.graph.build import Builder, array_of, constant_of
from moedge.export.lowering import gather
from moedge.export.lowering.ort import products
from moedge.export.lowering.trt import gathered as trt_gathered
from moedge.export.pipeline import lower
from moedge.tests.export.gathered_models import Folders, verified


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("kind", ["gather only", "routed"])
def test_verify_passes_in_float32(folders: Folders, kind: str, target: str) -> None:
    path = folders.portable(kind) if target == "portable" else folders.bundle(kind, target)
    entry = verified(folders.checkpoint(kind), path)
    assert entry["verdict"]["passed"], [check for check in entry["verdict"]["checks"] if not check["passed"]]


def thresholds(name: str, change: Any) -> Any:
    def apply(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name.endswith(f".{name}"):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(array)), tensor.name))

    return apply


def router_reads_what_is_kept(graph: onnx.GraphProto) -> None:
    for keep in [node for node in graph.node if node.op_type == "KeepLarge" and "x_threshold" in node.input[1]]:
        for node in graph.node:
            if keep.input[0] in node.input and node is not keep:
                node.input[:] = [keep.output[0] if name == keep.input[0] else name for name in node.input]
    nodes = ordered(list(graph.node), graph)
    del graph.node[:]
    graph.node.extend(nodes)


def up_reads_everything(graph: onnx.GraphProto) -> None:
    """Of the shared block: gate reads the masked inputs, up all of them."""
    for keep in [node for node in graph.node if node.op_type == "KeepLarge" and "x_threshold" in node.input[1]]:
        readers = [node for node in graph.node if node.op_type == "Gemm" and node.input[0] == keep.output[0]]
        assert [node.input[1].rpartition(".")[2] for node in readers] == ["shared_gate", "shared_up"]
        readers[1].input[0] = keep.input[0]


def ordered(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in an order in which every value is made before it is read."""
    made = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    done: list[onnx.NodeProto] = []
    while len(done) < len(nodes):
        for node in nodes:
            if made.issuperset(node.input) and not made.issuperset(node.output):
                made |= set(node.output)
                done.append(node)
    return done


MISTAKES = {
    "channels of x in another order": thresholds("x_threshold", lambda t: t[::-1]),
    "channels of h in another order": thresholds("h_threshold", lambda t: t[..., ::-1]),
    "channels of the shared h in another order": thresholds("shared_h_threshold", lambda t: t[::-1]),
    "thresholds of x ignored": thresholds("x_threshold", lambda t: np.full_like(t, 1e-30)),
    "thresholds of h ignored": thresholds("h_threshold", lambda t: np.full_like(t, 1e-30)),
    "each x has its neighbour's threshold": thresholds("x_threshold", lambda t: np.roll(t, 1)),
    "each h has its neighbour's threshold": thresholds("h_threshold", lambda t: np.roll(t, 1, axis=-1)),
    "the score is ignored: one threshold a layer": thresholds("x_threshold", lambda t: np.full_like(t, np.median(t))),
    "the router reads the masked inputs": router_reads_what_is_kept,
    "gate reads the masked inputs and up does not": up_reads_everything,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_catches_a_mistake(folders: Folders, tmp_path: Path, broken_copy: Any, mistake: str) -> None:
    broken = broken_copy(folders.portable("routed"), tmp_path / "broken", MISTAKES[mistake])
    assert not verified(folders.checkpoint("routed"), broken)["verdict"]["passed"]


def wrong(change: Any) -> Any:
    """``lowering.gather.keep_large`` with thresholds that are changed."""
    right = gather.keep_large

    def keep_large(builder: Any, x: Any, threshold: Any, ramp: float) -> Any:
        array = np.ascontiguousarray(change(array_of(threshold)))
        return right(builder, x, builder.initializer(f"{threshold.name}.wrong", array), ramp)

    return keep_large


CHANGES = {
    "the thresholds of hidden values are in another order": lambda t: t[..., ::-1],
    "each hidden value has the threshold of its neighbour": lambda t: np.roll(t, 1, axis=-1),
    "the small hidden values are kept": lambda t: np.full_like(t, 1e-30),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_the_experts_fails_the_self_test_by_its_name(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, without_compiler: Any
) -> None:
    monkeypatch.setattr(products, "keep_large", wrong(CHANGES[name]))
    with without_compiler(), pytest.raises(MoEdgeError, match=f"Self-test of .* failed: .*It looks like: .*{name}"):
        lower("ort-cpu", folders.portable("routed"), tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_standard_operators_fails_the_self_test(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(gather, "keep_large", wrong(CHANGES[name]))
    with pytest.raises(MoEdgeError, match="Self-test of 'KeepLarge -> Abs, Sub, Div, Clip, Mul' failed"):
        lower("tensorrt-rtx", folders.portable("gather only"), tmp_path)


def limits_of(change: Any) -> Any:
    """The thresholds of hidden values, changed, and the ramps that belong to them."""
    right = trt_gathered._limits

    def limits(builder: Any, keep: Any) -> Any:
        value = right(builder, keep)
        array = array_of(value)
        wrong = np.ascontiguousarray(change(array[0])).astype(np.float32)
        return builder.initializer(f"{value.name}.wrong", np.stack([wrong, wrong * np.float32(0.1)]))

    return limits


BY_CHANNEL = trt_gathered._by_channel


def unturned(builder: Any, product: Any) -> Any:
    """The numbers of a weight in the order in which they were, one row for each output."""
    right = BY_CHANNEL(builder, product)
    array = array_of(right)
    return builder.initializer(f"{right.name}.wrong", np.ascontiguousarray(array.T).reshape(array.shape))


PLUGIN_MISTAKES = {
    **{name: ("_limits", limits_of(change)) for name, change in CHANGES.items()},
    "the weights are not turned": ("_by_channel", unturned),
}


@pytest.mark.parametrize("name", PLUGIN_MISTAKES)
def test_a_mistake_in_plugins_fails_the_self_test(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trt_gathered, *PLUGIN_MISTAKES[name])
    with pytest.raises(MoEdgeError, match=r"Self-test of 'KeepLarge, products -> GatheredGLU.*' failed"):
        lower("tensorrt", folders.portable("gather only"), tmp_path, tensorrt="10.13")


def test_a_tied_embedding_that_is_looked_up_wrongly_fails_the_self_test(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trt_gathered._looked_up

    def next_token(graph: Any, product: Any) -> list[str]:
        names = right(graph, product)
        for node in [node for node in graph.graph if node.op_type == "Gather" and "axis" in node.attributes]:
            if names and node.inputs[0].name.endswith(".by_channel"):
                builder = Builder(graph, before=node)
                node.replace_input_with(1, builder.node("Sub", [node.inputs[1], constant_of(builder, 1)]))
        return names

    monkeypatch.setattr(trt_gathered, "_looked_up", next_token)
    with pytest.raises(MoEdgeError, match=r"Self-test of 'KeepLarge, products -> GatheredGLU.*' failed"):
        lower("tensorrt", folders.portable("gather only, every linear layer"), tmp_path, tensorrt="10.13")
