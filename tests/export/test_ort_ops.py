"""The CPU operators of domain moedge.cpu: their numbers, on every instruction set at hand, and what they refuse.

Integers are compared with ONNX Runtime's own ``MatMulNBits`` (accuracy level 4) on the masked input: the same levels,
the same rounding of inputs in blocks of 32, exact sums inside a block; only the order of the sums of blocks differs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from onnx import helper, numpy_helper

from moedge import MoEdgeError
from moedge.convert import ops
from moedge.export.ort_ops import library, pack
from moedge.export.quantize.format import Quantized, quantize
from moedge.runtime.engines import ort_session

ISAS = ("avx512-vnni", "avx-vnni", "avx2", "neon-dot", "portable")
TOKENS = (1, 2, 3, 5, 16, 17, 49)
"""Each way through the kernels: one token, few, more than a tile, many."""

SAME = 5e-6
"""Of the largest result: float32 sums of up to a hundred blocks in another order."""


@pytest.fixture(scope="module")
def built() -> Path:
    """The library, compiled once for this machine."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return library.compiled()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, built: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor, in use for the nodes that are made while it is set."""
    monkeypatch.setenv("MOEDGE_CPU_ISA", request.param)
    try:
        linear(built, pack.pack_floats(np.ones((2, 2), np.float32)), None)
    except Exception as error:
        if "this processor runs" not in str(error):
            raise
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


def session(
    built: Path | None,
    nodes: list[onnx.NodeProto],
    weights: dict[str, Any],
    inputs: int,
    outputs: int,
    threads: int = 1,
    more: Sequence[onnx.ValueInfoProto] = (),
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None), *more],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if value is not None],
    )
    opsets = [helper.make_opsetid(*pair) for pair in (("", 21), (library.DOMAIN, 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if built is not None:
        options.register_custom_ops_library(str(built))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def run(made: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    return np.asarray(made.run(None, {"x": x})[0])


def names(weights: dict[str, Any], *wanted: str) -> list[str]:
    """Names of inputs, empty where there is none."""
    return [name if name == "x" or weights.get(name) is not None else "" for name in wanted]


def linear(
    built: Path, weight: pack.Packed, threshold: np.ndarray | None, bias: np.ndarray | None = None, **changes: Any
) -> onnxruntime.InferenceSession:
    weights = {"t": threshold, "w": weight.weights, "s": weight.scales, "b": bias, **changes.pop("weights", {})}
    inputs = weight.weights.shape[0]
    attributes = {"K": inputs, "N": weight.outputs, "bits": weight.bits, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node(
        "GatherLinear", names(weights, "x", "t", "w", "s", "b"), ["y"], domain=library.DOMAIN, **attributes
    )
    return session(built, [node], weights, inputs, weight.outputs)


def glu(
    built: Path,
    gate_up: pack.Packed,
    down: pack.Packed,
    x_threshold: np.ndarray | None,
    h_threshold: np.ndarray | None,
    activation: str = "silu",
    threads: int = 1,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
) -> onnxruntime.InferenceSession:
    weights = {"xt": x_threshold, "gu": gate_up.weights, "gs": gate_up.scales, "ht": h_threshold}
    weights |= {"d": down.weights, "ds": down.scales, "gb": gate_up_bias, "db": down_bias}
    sizes = {"hidden": down.outputs, "inner": gate_up.outputs // 2, "bits": down.bits}
    inputs = names(weights, "x", "xt", "gu", "gs", "ht", "d", "ds", "gb", "db")
    node = helper.make_node("GatherGLU", inputs, ["y"], domain=library.DOMAIN, activation=activation, **sizes)
    return session(built, [node], weights, down.outputs, down.outputs, threads)


def routed(
    built: Path,
    gate_up: pack.Packed,
    down: pack.Packed,
    x_threshold: np.ndarray | None = None,
    h_threshold: np.ndarray | None = None,
    compensation: np.ndarray | None = None,
    threads: int = 1,
    **changes: Any,
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    weights = {"xt": x_threshold, "gu": gate_up.weights, "gs": gate_up.scales, "ht": h_threshold}
    weights |= {"d": down.weights, "ds": down.scales, "c": compensation}
    sizes = {"hidden": down.outputs, "width": down.inputs, "num_experts": len(down.weights), "bits": down.bits}
    sizes |= {"interleaved": int(gate_up.interleaved), **changes}
    inputs = ["x", "indices", "weights", *names(weights, "xt", "gu", "gs", "ht", "d", "ds", "c")]
    node = helper.make_node("RoutedGLU", inputs, ["y"], domain=library.DOMAIN, activation="silu", **sizes)
    more = [
        helper.make_tensor_value_info("indices", onnx.TensorProto.INT32, None),
        helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, None),
    ]
    made = session(built, [node], weights, down.outputs, down.outputs, threads, more)
    return lambda x, indices, weights: np.asarray(made.run(None, {"x": x, "indices": indices, "weights": weights})[0])


def routes(seed: int, tokens: int, top_k: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    indices = np.stack([generator.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    return indices, generator.random((tokens, top_k), np.float32) + np.float32(0.5)


def nbits(value: Quantized) -> Callable[[np.ndarray], np.ndarray]:
    """ONNX Runtime's own product."""
    rows = value.packed.shape[0]
    sizes = {"K": value.columns, "N": rows, "bits": value.bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **sizes)
    made = session(None, [node], {"q": value.packed, "s": value.scales}, value.columns, rows)
    return lambda x: run(made, x)


def mask(x: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < threshold, np.float32(0), x)


def activate(gate: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate))
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return 0.5 * gate * (1 + np.vectorize(math.erf)(gate / np.sqrt(2)))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def difference(y: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(y - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("inputs", "outputs"), [(70, 50), (160, 192), (70, 2000), (70, 8400)])  # padded rows; windows
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_those_of_onnx_runtime(
    built: Path, isa: str, bits: int, half: bool, inputs: int, outputs: int
) -> None:
    value = quantize(random(1, outputs, inputs), bits)
    value = pack.round_scales(value) if half else value
    threshold = np.abs(random(2, inputs)) * np.float32(0.7)
    ours, theirs = linear(built, pack.pack(value, half), threshold), nbits(value)
    for tokens in TOKENS:
        x = random(tokens, tokens, inputs)
        assert difference(run(ours, x), theirs(mask(x, threshold))) < SAME, tokens


@pytest.mark.parametrize(("inputs", "outputs"), [(70, 50), (600, 130), (70, 8405)])
def test_floats_are_right_to_their_rounding(built: Path, isa: str, inputs: int, outputs: int) -> None:
    weight, bias = random(1, outputs, inputs), random(3, outputs)
    threshold = np.abs(random(2, inputs)) * np.float32(0.7)
    ours = linear(built, pack.pack_floats(weight), threshold, bias)
    for tokens in TOKENS:
        x = random(tokens, tokens, inputs)
        kept = mask(x, threshold).astype(np.float64)
        # Each of K additions and products rounds to 2**-24 of what was summed so far.
        bound = (inputs + 2) * 2.0**-24 * (np.abs(kept) @ np.abs(weight.T) + np.abs(bias))
        assert (np.abs(run(ours, x) - (kept @ weight.T + bias)) <= bound).all(), tokens


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_the_whole_ffn_in_float32(built: Path, isa: str, activation: str) -> None:
    hidden, inner = 48, 90
    gate_up, down = random(1, 2 * inner, hidden) / 7, random(2, hidden, inner) / 9
    thresholds = np.abs(random(3, hidden)) / 2, np.abs(random(4, inner)) / 20
    biases = random(5, 2 * inner) / 10, random(6, hidden)
    made = glu(built, pack.pack_floats(gate_up), pack.pack_floats(down), *thresholds, activation, 1, *biases)
    for tokens in TOKENS:
        x = random(tokens, tokens, hidden) * 2
        both = mask(x, thresholds[0]).astype(np.float64) @ gate_up.T + biases[0]
        h = activate(both[:, :inner], activation) * both[:, inner:]
        near = np.abs(np.abs(h) - thresholds[1]) < 1e-6  # kept or not by rounding alone: either is right
        wanted = np.where(np.abs(h) < thresholds[1], 0, h) @ down.T + biases[1]
        slack = (near * np.abs(h)) @ np.abs(down.T)
        assert (np.abs(run(made, x) - wanted) <= 3e-6 * np.abs(wanted).max() + slack).all(), tokens


@pytest.mark.parametrize("inner", [150, 1000])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_whole_ffn_in_integers(built: Path, isa: str, bits: int, inner: int) -> None:
    hidden = 96
    gate_up, down = (quantize(random(n, *shape) / 10, bits) for n, shape in enumerate(((2 * inner, 96), (96, inner))))
    thresholds = np.abs(random(3, hidden)) / 2, np.abs(random(4, inner)) / 20
    made = glu(built, pack.pack(gate_up), pack.pack(down), *thresholds)
    first, second = nbits(gate_up), nbits(down)
    for tokens in TOKENS:
        x = random(tokens, tokens, hidden)
        both = first(mask(x, thresholds[0]))
        h = mask(activate(both[:, :inner], "silu") * both[:, inner:], thresholds[1])
        y, wanted = run(made, x), second(h)
        # Where h lies between two levels, the last bit of a float32 decides: one level of one input of the product.
        level = np.abs(h).max() / 127 * np.abs(down.dequantized()).max()
        assert np.abs(y - wanted).max() <= 2 * level, tokens
        assert np.median(np.abs(y - wanted)) < SAME * np.abs(wanted).max(), tokens


@pytest.mark.parametrize("width", [24, 150])
def test_routed_experts_in_float32(built: Path, isa: str, width: int) -> None:
    """The operator that the checkpoint computes, with thresholds of channels and of hidden units."""
    experts, hidden, top_k = 6, 48, 4
    gate, up = (random(n, experts, width, hidden) / 7 for n in (1, 2))
    down, compensation = random(3, experts, hidden, width) / 9, random(4, experts, hidden)
    x_threshold, h_threshold = np.abs(random(5, hidden)) / 2, np.abs(random(6, experts * width)) / 20
    weights = pack.pack_floats(np.concatenate([gate, up], 1)), pack.pack_floats(down)
    plain = routed(built, *weights, compensation=compensation)
    gathered = routed(built, *weights, x_threshold, h_threshold)
    for tokens in (1, 3, 7, 90):
        x = random(tokens, tokens, hidden)
        indices, scales = routes(tokens, tokens, top_k, experts)
        arguments = [torch.from_numpy(each) for each in (x, indices, scales, gate, up, down, compensation)]
        assert difference(plain(x, indices, scales), ops.sparse_glu(*arguments, "silu").numpy()) < 2e-6, tokens
        wanted = np.zeros((tokens, hidden))
        slack = np.zeros((tokens, hidden))
        for t, k in np.ndindex(tokens, top_k):
            e, kept = indices[t, k], mask(x[t], x_threshold).astype(np.float64)
            h = activate(gate[e] @ kept, "silu") * (up[e] @ kept)
            limit = h_threshold[e * width : (e + 1) * width]
            wanted[t] += scales[t, k] * (down[e] @ np.where(np.abs(h) < limit, 0, h))
            slack[t] += scales[t, k] * (np.abs(down[e]) @ (np.abs(h) * (np.abs(np.abs(h) - limit) < 1e-6)))
        assert (np.abs(gathered(x, indices, scales) - wanted) <= 3e-6 * np.abs(wanted).max() + slack).all(), tokens


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "interleaved"), [(24, True), (40, True), (40, False), (150, False), (1000, False)])
def test_routed_experts_in_integers(
    built: Path, isa: str, width: int, interleaved: bool, bits: int, half: bool
) -> None:
    """Each expert is ONNX Runtime's products of its own weights."""
    experts, hidden, top_k = 5, 70, 3
    gate_up = pack.round_scales(quantize(random(1, experts, 2 * width, hidden) / 7, bits))
    down = pack.round_scales(quantize(random(2, experts, hidden, width) / 9, bits))
    x_threshold, h_threshold = np.abs(random(5, hidden)) / 2, np.abs(random(6, experts * width)) / 20
    weights = pack.pack(gate_up, half, interleaved), pack.pack(down, half)
    assert np.array_equal(weights[0].dequantized(), gate_up.dequantized())
    made = routed(built, *weights, x_threshold, h_threshold)
    first, second = ([nbits(value.expert(e)) for e in range(experts)] for value in (gate_up, down))
    for tokens in (1, 3, 7, 60):
        x = random(tokens, tokens, hidden)
        indices, scales = routes(tokens, tokens, top_k, experts)
        wanted, level = np.zeros((tokens, hidden)), 0.0
        for t, k in np.ndindex(tokens, top_k):
            e = indices[t, k]
            both = first[e](mask(x[t : t + 1], x_threshold))
            h = mask(activate(both[:, :width], "silu") * both[:, width:], h_threshold[e * width : (e + 1) * width])
            wanted[t] += second[e](h * scales[t, k])[0]
            level = max(level, float(np.abs(h).max() * 1.5 / 127 * np.abs(down.dequantized()).max()))
        y = made(x, indices, scales)
        assert np.abs(y - wanted).max() <= 2 * level, tokens
        assert np.median(np.abs(y - wanted)) < SAME * np.abs(wanted).max(), tokens


def test_routed_mistakes_are_seen_and_said(built: Path) -> None:
    experts, hidden, width = 4, 64, 24
    gate_up, down = quantize(random(1, experts, 2 * width, hidden), 8), quantize(random(2, experts, hidden, width), 8)
    weights = pack.pack(gate_up, interleaved=True), pack.pack(down)
    x, (indices, scales) = random(3, 2, hidden), routes(4, 2, 2, experts)
    threshold = np.abs(random(5, hidden))
    made = routed(built, *weights, threshold)
    right = made(x, indices, scales)
    assert difference(routed(built, *weights)(x, indices, scales), right) > 1e-2
    assert difference(made(x, indices[:, ::-1].copy(), scales), right) > 1e-2
    twice = np.repeat(indices[:, :1], 2, 1)
    assert np.isfinite(made(x, twice, scales)).all(), "an expert may stand twice"
    assert np.isnan(made(np.full_like(x, np.nan), indices, scales)).all()
    for wrong, sentence in (
        ((x, indices + experts, scales), "an index is [4-7]; experts are 0 to 3"),
        ((x, indices - experts, scales), "an index is -[1-4]; experts are 0 to 3"),
        ((x, indices[:1], scales), r"input indices is int32 \[1, 2\]; it has to be int32 \[T, k\], T 2"),
        ((x, indices, scales[:, :1]), r"input weights is float32 \[2, 1\]; it has to be float32 \[2, 2\]"),
    ):
        with pytest.raises(Exception, match=f"moedge::RoutedGLU: {sentence}"):
            made(*wrong)
    with pytest.raises(Exception, match=r"input gate_up is uint8 .*; it has to be uint8 \[4, 64, 64\]"):
        routed(built, *weights, interleaved=0)(x, indices, scales)


def test_three_dimensions_and_none(built: Path) -> None:
    weight = pack.pack_floats(random(1, 12, 20))
    made, x = linear(built, weight, None), random(2, 6, 20)
    assert np.array_equal(run(made, x.reshape(2, 3, 20)), run(made, x).reshape(2, 3, 12))
    assert run(made, x[:0]).shape == (0, 12)


def test_mistakes_are_seen(built: Path) -> None:
    """A wrong order of channels, a threshold that is ignored, one on the wrong input: each far outside the limits."""
    hidden = inner = 64
    gate_up, down = (quantize(random(n, *shape), 8) for n, shape in enumerate(((128, 64), (64, 64))))
    a, b = pack.pack(gate_up), pack.pack(down)
    x_threshold, h_threshold = np.abs(random(3, hidden)), np.abs(random(4, inner)) * 30
    x = random(5, 3, hidden)
    right = run(glu(built, a, b, x_threshold, h_threshold), x)
    shuffled = dataclasses.replace(a, weights=a.weights[::-1].copy())
    for wrong in (
        glu(built, shuffled, b, x_threshold, h_threshold),
        glu(built, a, b, x_threshold[::-1].copy(), h_threshold),
        glu(built, a, b, None, h_threshold),
        glu(built, a, b, x_threshold, None),
        glu(built, a, b, h_threshold, x_threshold),
    ):
        assert difference(run(wrong, x), right) > 1e-2


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_hostile_values(built: Path, isa: str, bits: int) -> None:
    weight = random(1, 40, 64)
    packed = pack.pack_floats(weight) if bits == 32 else pack.pack(quantize(weight, bits))
    everything = run(linear(built, packed, None), random(2, 4, 64))
    assert np.array_equal(run(linear(built, packed, np.zeros(64, np.float32)), random(2, 4, 64)), everything)
    nothing = np.full(64, np.inf, np.float32)
    for tokens in (1, 4, 20, 60):
        x = random(2, tokens, 64)
        assert not run(linear(built, packed, nothing), x).any()
        made = linear(built, packed, None)
        assert not run(made, np.zeros_like(x)).any()
        clean = run(made, x)
        for value in (np.nan, np.inf, -np.inf):
            x[0, 33] = value
            y = run(made, x)
            assert not np.isfinite(y[0]).any(), "what is not finite stays so"
            assert np.array_equal(y[1:], clean[1:]), "and in its own token"
        x[0, 33] = np.nan
        assert np.isnan(run(linear(built, packed, nothing), x)[0]).all(), "a NaN is below no threshold"
        tiny = np.full_like(x, 1e-42)
        assert np.isfinite(run(made, tiny)).all()


def test_numbers_do_not_depend_on_threads(built: Path) -> None:
    gate_up, down = (quantize(random(n, *shape), 8) for n, shape in enumerate(((2048, 512), (512, 1024))))
    one, two = (glu(built, pack.pack(gate_up), pack.pack(down), None, None, threads=count) for count in (1, 2))
    for tokens in (1, 3, 20):
        x = random(tokens, tokens, 512)
        assert np.array_equal(run(one, x), run(two, x))
    gate_up, down = quantize(random(1, 24, 80, 512), 8), quantize(random(2, 24, 512, 40), 8)
    weights = pack.pack(gate_up, interleaved=True), pack.pack(down)
    first, second = (routed(built, *weights, threads=count) for count in (1, 2))
    for tokens in (1, 3, 40):
        x, chosen = random(tokens, tokens, 512), routes(tokens, tokens, 12, 24)
        assert np.array_equal(first(x, *chosen), second(x, *chosen))


@pytest.mark.parametrize("bits", [32, 8])
def test_many_tokens_of_an_expert_are_shared_by_threads(built: Path, bits: int) -> None:
    """Thresholds, means of what is not selected, and an expert that every token has twice."""
    hidden, width, experts, tokens = 512, 40, 6, 64
    stacks = random(1, experts, 2 * width, hidden), random(2, experts, hidden, width)
    packed = [pack.pack_floats(w) if bits == 32 else pack.pack(quantize(w, bits)) for w in stacks]
    limits = np.full(hidden, 0.3, np.float32), np.full(experts * width, 0.05, np.float32)
    x, indices = random(3, tokens, hidden), np.zeros((tokens, 3), np.int32)
    indices[:, 2] = 1 + np.arange(tokens) % (experts - 1)
    weights = np.abs(random(4, tokens, 3))
    one, two = (
        routed(built, *packed, *limits, compensation=random(5, experts, hidden), threads=count) for count in (1, 2)
    )
    wanted = one(x, indices, weights)
    for _ in range(20):
        assert np.array_equal(two(x, indices, weights), wanted)
    alone = np.concatenate([one(x[t : t + 1], indices[t : t + 1], weights[t : t + 1]) for t in range(tokens)])
    assert difference(wanted, alone) < SAME


def test_threads_share_a_session(built: Path) -> None:
    made = linear(built, pack.pack(quantize(random(1, 96, 256), 4)), np.full(256, 0.5, np.float32))
    inputs = [random(n, 1 + n % 3, 256) for n in range(4)]
    wanted = [run(made, x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(run(made, inputs[number]), wanted[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_sessions_leave_nothing_behind(built: Path) -> None:
    packed, x = pack.pack_floats(random(1, 512, 1024)), random(2, 1, 1024)  # 2 MiB
    memory: list[int] = []
    for _ in range(24):
        run(linear(built, packed, None), x)
        memory.append(psutil.Process().memory_info().rss)
    assert memory[-1] - memory[8] < 8 << 20


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"K": None}, "attribute K is missing"),
        ({"K": 0}, "attribute K is 0; it has to be 1 to"),
        ({"bits": 3}, "attribute bits is 3; it has to be 32"),
        ({"weights": {"t": np.zeros(7, np.float32)}}, r"input threshold is float32 \[7\]; it has to be float32 \[64\]"),
        ({"weights": {"w": np.zeros((64, 64), np.int8)}}, r"input weight is .*; it has to be uint8 \[64, 64\]"),
        ({"weights": {"w": np.zeros((64, 63), np.uint8)}}, r"input weight is uint8 \[64, 63\]; it has to be uint8"),
        ({"weights": {"s": None}}, r"input weight_scales is missing; it has to be float32 \[2, 64\]"),
        ({"weights": {"s": np.zeros((2, 40), np.float32)}}, r"input weight_scales is float32 \[2, 40\]"),
        ({"weights": {"s": np.zeros((2, 64), np.int32)}}, r"input weight_scales is int32 \[2, 64\]"),
        ({"weights": {"b": np.zeros(41, np.float32)}}, r"input bias is float32 \[41\]; it has to be float32 \[40\]"),
        ({"bits": 32}, "input weight is uint8 .*; it has to be float32"),
    ],
)
def test_what_is_wrong_is_said(built: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=f"moedge::GatherLinear: {sentence}"):
        run(linear(built, pack.pack(quantize(random(1, 40, 64), 8)), None, **changes), random(2, 1, 64))


def test_an_input_of_another_shape_is_refused(built: Path) -> None:
    made = linear(built, pack.pack_floats(random(1, 12, 20)), None)
    for shape in ((20,), (3, 19), (1, 2, 3, 20)):
        with pytest.raises(Exception, match=r"input x is float32 .*; it has to be float32 \[T, 20\] or \[B, S, 20\]"):
            run(made, np.zeros(shape, np.float32))


def test_an_unknown_activation_or_instruction_set_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack.pack_floats(random(1, 8, 4)), pack.pack_floats(random(2, 4, 4))
    with pytest.raises(Exception, match="attribute activation is 'relu'; it has to be silu"):
        glu(built, *packed, None, None, "relu")
    monkeypatch.setenv("MOEDGE_CPU_ISA", "z80")
    with pytest.raises(Exception, match=r"MOEDGE_CPU_ISA is 'z80'; this processor runs .*portable"):
        glu(built, *packed, None, None)


def test_the_interface_is_the_one_that_was_declared(built: Path) -> None:
    """``abi.h`` is right for this release of ONNX Runtime: version 17 of the table is there, and a small model runs."""
    (extension,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*")
    loaded = ctypes.CDLL(str(extension))
    if hasattr(loaded, "OrtGetApiBase"):
        loaded.OrtGetApiBase.restype = ctypes.POINTER(ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32))
        assert loaded.OrtGetApiBase()[0](17)
    made = linear(built, pack.pack_floats(np.array([[1, 2], [3, 4]], np.float32)), np.array([0, 2], np.float32))
    assert run(made, np.array([[1, 1], [1, 2]], np.float32)).tolist() == [[1, 3], [5, 11]]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(50, 70), (3, 48, 33), (2000, 33), (3, 2000, 33)])
def test_packed_bytes_are_read_back(shape: tuple[int, ...], interleaved: bool, bits: int, half: bool) -> None:
    value = pack.round_scales(quantize(random(1, *shape), bits))
    packed = pack.pack(value, half, interleaved)
    assert np.array_equal(packed.dequantized(), value.dequantized())
    assert packed.scales is not None
    assert packed.scales.dtype == (np.float16 if half else np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs", [64, 576, 960, 1024, 1536, 2048, 3072, 8192, 49152, 151936])
def test_rows_of_a_block_lie_on_many_places_of_a_cache(outputs: int, bits: int) -> None:
    """A first level of 32 KiB has 64 places of 8 lines: 32 rows that fall on fewer than 4 of them do not stay."""
    stored = pack.pack(quantize(random(1, outputs, 32), bits)).weights.shape[-1]
    assert stored == pack.row_bytes(outputs, bits)
    assert len({row * stored // 64 % 64 for row in range(32)}) >= 8
    assert outputs * bits / 8 <= stored < outputs * bits / 8 + 128


def test_what_cannot_be_packed_is_refused() -> None:
    weight = random(1, 8, 64)
    with pytest.raises(MoEdgeError, match="symmetric"):
        pack.pack(quantize(weight, 4, "rtn-asymmetric"))
    with pytest.raises(MoEdgeError, match="blocks of 32 inputs; these are 64"):
        pack.pack(quantize(weight, 4, block=64))
    with pytest.raises(MoEdgeError, match="round the scales first"):
        pack.pack(quantize(weight, 4), half_scales=True)
    with pytest.raises(MoEdgeError, match="above 65504"):
        pack.round_scales(quantize(weight * 1e8, 4))


def test_a_library_is_compiled_once(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "compile_library", lambda *_: pytest.fail("compiled again"))
    assert library.cached_library(built.parent) == built
    for name, path in library.sources().items():
        shutil.copy(path, tmp_path / name)
    assert library.key(library.sources(tmp_path)) in (key := library.key(library.sources()))
    (tmp_path / "ops.cc").write_text("// another\n", encoding="utf-8")
    assert library.key(library.sources(tmp_path)) != key


NAMED_BY_GCC_9 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}
"""Of gcc 9's manual, "X86 Built-in Functions", what is asked for; another name is an error there, such as f16c."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
def test_an_older_compiler_is_not_asked_for_what_it_does_not_know(built: Path) -> None:
    """g++ 10 knows no AVX-VNNI: neither as a target nor to ask the processor for."""
    for version, known in ((10, False), (11, True)):
        for name in ("isa_avx_vnni.cc", "kernels.cc"):
            command = ["g++", "-w", "-E", "-std=c++17", "-U__GNUC__", f"-D__GNUC__={version}", library.FOLDER / name]
            seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert ("avxvnni" in seen, "AVX_VNNI, avx2" in seen) == (known, known and name == "kernels.cc")
            assert set(re.findall(r'__builtin_cpu_supports\("(\w+)"', seen)) <= NAMED_BY_GCC_9 | {"avxvnni"}


def test_the_library_shows_nothing_and_needs_no_libstdcxx(built: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-D", built], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[-1] for line in symbols if " T " in line] == ["RegisterCustomOps"]
    archive = subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True, check=True)
    if Path(archive.stdout.strip()).is_absolute():  # g++ has it
        assert not any("GLIBCXX" in line for line in symbols)


def test_a_library_that_does_not_load_is_compiled_from_its_sources(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = library.write(tmp_path)
    (tmp_path / facts.library).write_bytes(b"made for another C library")
    node = helper.make_node("GatherLinear", ["x", "", "w"], ["y"], domain=library.DOMAIN, K=8, N=8, bits=32)
    options = onnxruntime.SessionOptions()
    ort_session._register(options, tmp_path, facts)
    made = session(None, [node], {"w": np.eye(8, dtype=np.float32)}, 8, 8, options=options)
    assert np.array_equal(run(made, np.ones((1, 8), np.float32)), np.ones((1, 8)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoEdgeError, match=r"cannot load the operators of .*, nor compiled here .*: .* install it"):
        ort_session._register(onnxruntime.SessionOptions(), tmp_path, facts)


def test_what_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops.cc").write_text("int nothing = ;\n", encoding="utf-8")
    if shutil.which("g++"):
        with pytest.raises(MoEdgeError, match=r"cannot compile the library of CPU operators in .*error"):
            library.compile_library(tmp_path / "ops.so", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoEdgeError, match="compiled with g\\+\\+, which is not here: install it"):
        library.compile_library(tmp_path / "ops.so")


def test_values_grow_over_a_ramp_as_in_pytorch(built: Path) -> None:
    inputs, outputs = 96, 64
    weight, threshold = random(1, outputs, inputs), np.abs(random(2, inputs)) * np.float32(0.7) + np.float32(0.01)
    x = random(3, 5, inputs)
    x[0], x[1, 0], x[2] = threshold, np.inf, threshold * np.float32(1.05)  # at the foot and in the middle of the ramp
    made = linear(built, pack.pack_floats(weight), threshold, ramp=0.1)
    kept = torch.ops.moedge.keep_large(torch.from_numpy(x), torch.from_numpy(threshold), 0.1).numpy()
    assert not kept[0].any()
    np.testing.assert_allclose(kept[2], x[2] * 0.5, rtol=1e-4)
    rows = [0, 2, 3, 4]
    assert difference(run(made, x)[rows], kept[rows].astype(np.float64) @ weight.T) < SAME
    for limit, wanted in ((0.0, x[3:]), (np.inf, np.zeros_like(x[3:]))):  # all or none, and never 0 / 0
        x[4, 7] = 0
        y = run(linear(built, pack.pack_floats(weight), np.full(inputs, limit, np.float32), ramp=0.1), x[3:])
        assert np.abs(y - wanted @ weight.T).max() < 1e-4
    with pytest.raises(Exception, match=r"attribute ramp is -1\.0+; it has to be 0 to 10"):
        run(linear(built, pack.pack_floats(weight), threshold, ramp=-1.0), x)


@pytest.mark.slow
def test_the_arm_table_agrees_with_the_portable_one(tmp_path: Path) -> None:
    """Compiled for 64-bit Arm and run under an emulator (Debian: apt install g++-aarch64-linux-gnu qemu-user)."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if any(shutil.which(program) is None for program in (compiler, emulator)):
        pytest.skip(f"needs {compiler} and {emulator}")
    files = [str(path) for path in library.FOLDER.glob("*.cc") if path.stem.startswith(("isa_", "kernels"))]
    files.append(str(Path(__file__).with_name("ort_ops_tables.cc")))
    flags = [flag for flag in library.FLAGS if flag != "-shared" and not flag.startswith("-Wl")]
    program = str(tmp_path / "tables")
    subprocess.run([compiler, *flags, "-static", f"-I{library.FOLDER}", *files, "-o", program], check=True, timeout=600)
    done = subprocess.run([emulator, "-cpu", "max", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("neon-dot")
