"""The CPU operators of domain moedge.cpu: their numbers, on every instruction set at hand, and what they refuse.

Integers are compared with ONNX Runtime's own ``MatMulNBits`` (accuracy level 4) on the masked input: the same levels,
the same rounding of inputs in blocks of 32, exact sums inside a block; only the order of the sums of blocks differs.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from moedge.convert import ops
from moedge.export.ort_ops import pack
from moedge.export.quantize.format import Quantized, quantize
from moedge.tests.export.cpu_nodes import (
    SAME,
    TOKENS,
    activate,
    difference,
    glu,
    linear,
    mask,
    nbits,
    random,
    routed,
    routes,
    run,
)

ISAS = ("avx512-vnni", "avx-vnni", "avx2", "neon-dot", "portable")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, cpu_library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor, in use for the nodes that are made while it is set."""
    monkeypatch.setenv("MOEDGE_CPU_ISA", request.param)
    try:
        linear(cpu_library, pack.pack_floats(np.ones((2, 2), np.float32)), None)
    except Exception as error:
        if "this processor runs" not in str(error):
            raise
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize(("inputs", "outputs"), [(70, 50), (160, 192), (70, 2000), (70, 8400)])  # padded rows; windows
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_those_of_onnx_runtime(
    cpu_library: Path, isa: str, bits: int, half: bool, inputs: int, outputs: int
) -> None:
    value = quantize(random(1, outputs, inputs), bits)
    value = pack.round_scales(value) if half else value
    threshold = np.abs(random(2, inputs)) * np.float32(0.7)
    ours, theirs = linear(cpu_library, pack.pack(value, half), threshold), nbits(value)
    for tokens in TOKENS:
        x = random(tokens, tokens, inputs)
        assert difference(run(ours, x), theirs(mask(x, threshold))) < SAME, tokens


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_sums_are_exact(cpu_library: Path, isa: str, bits: int) -> None:
    """Of either sign, for tokens of all forms: 16 bits must hold what a kernel adds up in them."""
    inputs, outputs, most = 96, 2048, 2**bits - 1
    levels = np.where(np.arange(outputs)[:, None] % 2, np.uint8(most), np.uint8(0)).repeat(inputs, 1)
    levels[::3] = np.random.default_rng(0).integers(0, most + 1, levels[::3].shape)
    blocks = levels.reshape(outputs, -1, 32)
    packed = blocks if bits == 8 else blocks[..., ::2] | blocks[..., 1::2] << 4
    value = Quantized(packed, np.full((outputs, inputs // 32), 0.5, np.float32), None, bits, inputs)
    made = linear(cpu_library, pack.pack(value), None)
    for tokens in (1, 3, 16, 49):
        x = np.ones((tokens, inputs), np.float32)
        x[:, :32], x[:, 64::2] = -1, -1
        # Every input has level 127 or -127; all that follows is whole numbers below 2**24, times 0.5 / 127.
        exact = (x.astype(np.int64) * 127) @ (levels.astype(np.int64) - 2 ** (bits - 1)).T
        assert difference(run(made, x), exact * 0.5 / 127) < 1e-6, tokens


@pytest.mark.parametrize(("inputs", "outputs"), [(70, 50), (600, 130), (70, 8405), (700, 1003)])  # windows; panels
def test_floats_are_right_to_their_rounding(cpu_library: Path, isa: str, inputs: int, outputs: int) -> None:
    weight, bias = random(1, outputs, inputs), random(3, outputs)
    threshold = np.abs(random(2, inputs)) * np.float32(0.7)
    ours = linear(cpu_library, pack.pack_floats(weight), threshold, bias)
    for tokens in (*TOKENS, 100):
        x = random(tokens, tokens, inputs)
        kept = mask(x, threshold).astype(np.float64)
        # Each of K additions and products rounds to 2**-24 of what was summed so far.
        bound = (inputs + 2) * 2.0**-24 * (np.abs(kept) @ np.abs(weight.T) + np.abs(bias))
        assert (np.abs(run(ours, x) - (kept @ weight.T + bias)) <= bound).all(), tokens


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_the_whole_ffn_in_float32(cpu_library: Path, isa: str, activation: str) -> None:
    hidden, inner = 48, 90
    gate_up, down = random(1, 2 * inner, hidden) / 7, random(2, hidden, inner) / 9
    thresholds = np.abs(random(3, hidden)) / 2, np.abs(random(4, inner)) / 20
    biases = random(5, 2 * inner) / 10, random(6, hidden)
    made = glu(cpu_library, pack.pack_floats(gate_up), pack.pack_floats(down), *thresholds, activation, 1, *biases)
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
def test_the_whole_ffn_in_integers(cpu_library: Path, isa: str, bits: int, inner: int) -> None:
    hidden = 96
    gate_up, down = (quantize(random(n, *shape) / 10, bits) for n, shape in enumerate(((2 * inner, 96), (96, inner))))
    thresholds = np.abs(random(3, hidden)) / 2, np.abs(random(4, inner)) / 20
    made = glu(cpu_library, pack.pack(gate_up), pack.pack(down), *thresholds)
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
def test_routed_experts_in_float32(cpu_library: Path, isa: str, width: int) -> None:
    """The operator that the checkpoint computes, with thresholds of channels and of hidden units."""
    experts, hidden, top_k = 6, 48, 4
    gate, up = (random(n, experts, width, hidden) / 7 for n in (1, 2))
    down, compensation = random(3, experts, hidden, width) / 9, random(4, experts, hidden)
    x_threshold, h_threshold = np.abs(random(5, hidden)) / 2, np.abs(random(6, experts * width)) / 20
    weights = pack.pack_floats(np.concatenate([gate, up], 1)), pack.pack_floats(down)
    plain = routed(cpu_library, *weights, compensation=compensation)
    gathered = routed(cpu_library, *weights, x_threshold, h_threshold)
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
    cpu_library: Path, isa: str, width: int, interleaved: bool, bits: int, half: bool
) -> None:
    """Each expert is ONNX Runtime's products of its own weights."""
    experts, hidden, top_k = 5, 70, 3
    gate_up = pack.round_scales(quantize(random(1, experts, 2 * width, hidden) / 7, bits))
    down = pack.round_scales(quantize(random(2, experts, hidden, width) / 9, bits))
    x_threshold, h_threshold = np.abs(random(5, hidden)) / 2, np.abs(random(6, experts * width)) / 20
    weights = pack.pack(gate_up, half, interleaved), pack.pack(down, half)
    assert np.array_equal(weights[0].dequantized(), gate_up.dequantized())
    made = routed(cpu_library, *weights, x_threshold, h_threshold)
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


def test_routed_mistakes_are_seen_and_said(cpu_library: Path) -> None:
    experts, hidden, width = 4, 64, 24
    gate_up, down = quantize(random(1, experts, 2 * width, hidden), 8), quantize(random(2, experts, hidden, width), 8)
    weights = pack.pack(gate_up, interleaved=True), pack.pack(down)
    x, (indices, scales) = random(3, 2, hidden), routes(4, 2, 2, experts)
    threshold = np.abs(random(5, hidden))
    made = routed(cpu_library, *weights, threshold)
    right = made(x, indices, scales)
    assert difference(routed(cpu_library, *weights)(x, indices, scales), right) > 1e-2
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
        routed(cpu_library, *weights, interleaved=0)(x, indices, scales)


def test_three_dimensions_and_none(cpu_library: Path) -> None:
    weight = pack.pack_floats(random(1, 12, 20))
    made, x = linear(cpu_library, weight, None), random(2, 6, 20)
    assert np.array_equal(run(made, x.reshape(2, 3, 20)), run(made, x).reshape(2, 3, 12))
    assert run(made, x[:0]).shape == (0, 12)


def test_mistakes_are_seen(cpu_library: Path) -> None:
    """A wrong order of channels, a threshold that is ignored, one on the wrong input: each far outside the limits."""
    hidden = inner = 64
    gate_up, down = (quantize(random(n, *shape), 8) for n, shape in enumerate(((128, 64), (64, 64))))
    a, b = pack.pack(gate_up), pack.pack(down)
    x_threshold, h_threshold = np.abs(random(3, hidden)), np.abs(random(4, inner)) * 30
    x = random(5, 3, hidden)
    right = run(glu(cpu_library, a, b, x_threshold, h_threshold), x)
    shuffled = dataclasses.replace(a, weights=a.weights[::-1].copy())
    for wrong in (
        glu(cpu_library, shuffled, b, x_threshold, h_threshold),
        glu(cpu_library, a, b, x_threshold[::-1].copy(), h_threshold),
        glu(cpu_library, a, b, None, h_threshold),
        glu(cpu_library, a, b, x_threshold, None),
        glu(cpu_library, a, b, h_threshold, x_threshold),
    ):
        assert difference(run(wrong, x), right) > 1e-2


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_hostile_values(cpu_library: Path, isa: str, bits: int) -> None:
    weight = random(1, 40, 64)
    packed = pack.pack_floats(weight) if bits == 32 else pack.pack(quantize(weight, bits))
    everything = run(linear(cpu_library, packed, None), random(2, 4, 64))
    assert np.array_equal(run(linear(cpu_library, packed, np.zeros(64, np.float32)), random(2, 4, 64)), everything)
    nothing = np.full(64, np.inf, np.float32)
    for tokens in (1, 4, 20, 60):
        x = random(2, tokens, 64)
        assert not run(linear(cpu_library, packed, nothing), x).any()
        made = linear(cpu_library, packed, None)
        assert not run(made, np.zeros_like(x)).any()
        clean = run(made, x)
        for value in (np.nan, np.inf, -np.inf):
            x[0, 33] = value
            y = run(made, x)
            assert not np.isfinite(y[0]).any(), "what is not finite stays so"
            assert np.array_equal(y[1:], clean[1:]), "and in its own token"
        x[0, 33] = np.nan
        assert np.isnan(run(linear(cpu_library, packed, nothing), x)[0]).all(), "a NaN is below no threshold"
        tiny = np.full_like(x, 1e-42)
        assert np.isfinite(run(made, tiny)).all()


def test_numbers_do_not_depend_on_threads(cpu_library: Path) -> None:
    gate_up, down = (quantize(random(n, *shape), 8) for n, shape in enumerate(((2048, 512), (512, 1024))))
    one, two = (glu(cpu_library, pack.pack(gate_up), pack.pack(down), None, None, threads=count) for count in (1, 2))
    for tokens in (1, 3, 20):
        x = random(tokens, tokens, 512)
        assert np.array_equal(run(one, x), run(two, x))
    gate_up, down = quantize(random(1, 24, 80, 512), 8), quantize(random(2, 24, 512, 40), 8)
    weights = pack.pack(gate_up, interleaved=True), pack.pack(down)
    first, second = (routed(cpu_library, *weights, threads=count) for count in (1, 2))
    for tokens in (1, 3, 40):
        x, chosen = random(tokens, tokens, 512), routes(tokens, tokens, 12, 24)
        assert np.array_equal(first(x, *chosen), second(x, *chosen))


@pytest.mark.parametrize("bits", [32, 8])
def test_many_tokens_of_an_expert_are_shared_by_threads(cpu_library: Path, bits: int) -> None:
    """Thresholds, means of what is not selected, and an expert that every token has twice."""
    hidden, width, experts, tokens = 512, 40, 6, 64
    stacks = random(1, experts, 2 * width, hidden), random(2, experts, hidden, width)
    packed = [pack.pack_floats(w) if bits == 32 else pack.pack(quantize(w, bits)) for w in stacks]
    limits = np.full(hidden, 0.3, np.float32), np.full(experts * width, 0.05, np.float32)
    x, indices = random(3, tokens, hidden), np.zeros((tokens, 3), np.int32)
    indices[:, 2] = 1 + np.arange(tokens) % (experts - 1)
    weights = np.abs(random(4, tokens, 3))
    compensation = random(5, experts, hidden)
    one, two = (routed(cpu_library, *packed, *limits, compensation=compensation, threads=count) for count in (1, 2))
    wanted = one(x, indices, weights)
    for _ in range(20):
        assert np.array_equal(two(x, indices, weights), wanted)
    alone = np.concatenate([one(x[t : t + 1], indices[t : t + 1], weights[t : t + 1]) for t in range(tokens)])
    assert difference(wanted, alone) < SAME


def test_threads_share_a_session(cpu_library: Path) -> None:
    made = linear(cpu_library, pack.pack(quantize(random(1, 96, 256), 4)), np.full(256, 0.5, np.float32))
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


def test_sessions_leave_nothing_behind(cpu_library: Path) -> None:
    packed, x = pack.pack_floats(random(1, 512, 1024)), random(2, 1, 1024)  # 2 MiB
    memory: list[int] = []
    for _ in range(24):
        run(linear(cpu_library, packed, None), x)
        memory.append(psutil.Process().memory_info().rss)
    # Of 8 sessions in between each would leave its 2 MiB; a single one sees what an allocator gives back.
    assert np.median(memory[16:]) - np.median(memory[8:16]) < 8 << 20


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
def test_what_is_wrong_is_said(cpu_library: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=f"moedge::GatherLinear: {sentence}"):
        run(linear(cpu_library, pack.pack(quantize(random(1, 40, 64), 8)), None, **changes), random(2, 1, 64))


def test_an_input_of_another_shape_is_refused(cpu_library: Path) -> None:
    made = linear(cpu_library, pack.pack_floats(random(1, 12, 20)), None)
    for shape in ((20,), (3, 19), (1, 2, 3, 20)):
        with pytest.raises(Exception, match=r"input x is float32 .*; it has to be float32 \[T, 20\] or \[B, S, 20\]"):
            run(made, np.zeros(shape, np.float32))


def test_an_unknown_activation_or_instruction_set_is_refused(
    cpu_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack.pack_floats(random(1, 8, 4)), pack.pack_floats(random(2, 4, 4))
    with pytest.raises(Exception, match="attribute activation is 'relu'; it has to be silu"):
        glu(cpu_library, *packed, None, None, "relu")
    monkeypatch.setenv("MOEDGE_CPU_ISA", "z80")
    with pytest.raises(Exception, match=r"MOEDGE_CPU_ISA is 'z80'; this processor runs .*portable"):
        glu(cpu_library, *packed, None, None)


def test_values_grow_over_a_ramp_as_in_pytorch(cpu_library: Path) -> None:
    inputs, outputs = 96, 64
    weight, threshold = random(1, outputs, inputs), np.abs(random(2, inputs)) * np.float32(0.7) + np.float32(0.01)
    x = random(3, 5, inputs)
    x[0], x[1, 0], x[2] = threshold, np.inf, threshold * np.float32(1.05)  # at the foot and in the middle of the ramp
    made = linear(cpu_library, pack.pack_floats(weight), threshold, ramp=0.1)
    kept = torch.ops.moedge.keep_large(torch.from_numpy(x), torch.from_numpy(threshold), 0.1).numpy()
    assert not kept[0].any()
    np.testing.assert_allclose(kept[2], x[2] * 0.5, rtol=1e-4)
    rows = [0, 2, 3, 4]
    assert difference(run(made, x)[rows], kept[rows].astype(np.float64) @ weight.T) < SAME
    for limit, wanted in ((0.0, x[3:]), (np.inf, np.zeros_like(x[3:]))):  # all or none, and never 0 / 0
        x[4, 7] = 0
        y = run(linear(cpu_library, pack.pack_floats(weight), np.full(inputs, limit, np.float32), ramp=0.1), x[3:])
        assert np.abs(y - wanted @ weight.T).max() < 1e-4
    with pytest.raises(Exception, match=r"attribute ramp is -1\.0+; it has to be 0 to 10"):
        run(linear(cpu_library, pack.pack_floats(weight), threshold, ramp=-1.0), x)
