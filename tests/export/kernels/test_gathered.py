"""The kernels that skip the weights of values that were left out, against the operators in float64.

Bounds as in ``test_kernels.py``: u = 2^-24 is float32's unit roundoff, a sum of n products errs by at most gamma(n)
times the sum of their magnitudes, and a result is rounded to its own type. A value on the ramp of its threshold carries
an error on at most 2 + 1 / ramp times (docs/gather.md).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedge.convert import ops
from moedge.convert.ops.gather import kept
from moedge.convert.ops.gathered import limits_of
from moedge.convert.plan import SMALLEST_THRESHOLD
from moedge.tests.export.kernels.bounds import DTYPES, gamma, many, random, rounding, within

pytest.importorskip("triton")  # Linux only

SKIP = ("gemv", "gemm16")
"""Paths that skip rows."""
NAN = float("nan")


def left_out(tokens: int, inputs: int, keep: float, dtype: torch.dtype) -> torch.Tensor:
    """Inputs [T, K] of which each token keeps about a share, some of the zeros negative."""
    x, drawn = random(tokens, inputs, seed=5, dtype=dtype), torch.Generator().manual_seed(6)
    return torch.where(torch.rand(x.shape, generator=drawn) < keep, x, x.sign() * 0.0)


def weights(*shape: int, seed: int, dtype: torch.dtype, x: torch.Tensor, path: str) -> torch.Tensor:
    """A weight by channel, not a number where no token keeps the input: a path that skips must not have read it."""
    made = random(*shape, seed=seed, dtype=dtype, size=1.5 / math.sqrt(shape[0]))
    if path in SKIP:
        made[(x == 0).all(0)] = NAN
    return made


def run(launch: Any, inputs: list[torch.Tensor], outputs: int, place: str) -> torch.Tensor:
    from moedge.convert.ops.kernels import cuda

    x = inputs[0]
    y = torch.empty(len(x), outputs, dtype=x.dtype, device=place)
    cuda.run(launch, [tensor.to(place) for tensor in inputs], [y], len(x))
    return y


def check_linear(place: str, tokens: int, inputs: int, outputs: int, dtype: str, path: str, keep: float) -> None:
    from moedge.convert.ops.kernels import gathered_linear

    kind = DTYPES[dtype]
    x = left_out(tokens, inputs, keep, kind)
    weight = weights(inputs, outputs, seed=7, dtype=kind, x=x, path=path)
    launch = gathered_linear.launch(inputs=inputs, outputs=outputs, dtype=dtype, path=path)
    y = run(launch, [x, weight], outputs, place)
    wide, exact = x.double(), weight.double().nan_to_num()
    expected = wide @ exact
    within(y, expected, gamma(inputs + 4) * (wide.abs() @ exact.abs()) + rounding(expected, kind))


LINEAR = [
    # tokens inputs outputs dtype path keep
    (1, 33, 21, "fp32", "gemv", 0.5),
    (1, 300, 70, "fp16", "gemv", 0.3),
    (3, 64, 32, "bf16", "gemv", 1.0),
    (2, 5000, 20, "fp16", "gemv", 0.5),  # three steps of 2,048 rows
    (2, 130, 19, "fp16", "gemm16", 0.2),
    (16, 45, 33, "fp32", "gemm16", 0.1),
    (19, 61, 40, "bf16", "gemm16", 0.05),
    (70, 45, 131, "fp16", "gemm64", 0.5),
    (65, 40, 17, "fp32", "gemm64", 0.5),
    (130, 50, 20, "bf16", "gemm128", 0.5),
]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: "-".join(map(str, case)))
def test_linear(place: str, case: tuple[Any, ...]) -> None:
    check_linear(place, *case)


def check_glu(
    place: str,
    tokens: int,
    hidden: int,
    width: int,
    activation: str,
    dtype: str,
    path: str,
    keep: float,
    ramp: float | None,
) -> None:
    """``ramp`` None: the smallest thresholds, which leave out zeros alone."""
    from moedge.convert.ops.kernels import gathered_glu

    kind = DTYPES[dtype]
    x = left_out(tokens, hidden, keep, kind)
    gate, up = (weights(hidden, width, seed=s, dtype=kind, x=x, path=path) for s in (8, 9))
    limits = limits_of(torch.full((width,), SMALLEST_THRESHOLD), 0.1)
    if ramp is not None:
        limits = limits_of(0.05 + 0.3 * random(width, seed=10).abs(), ramp)
    launch = gathered_glu.launch(hidden=hidden, width=width, activation=activation, dtype=dtype, path=path)
    y = run(launch, [x, gate, up, limits], width, place)

    wide, exact = x.double(), [weight.double().nan_to_num() for weight in (gate, up)]
    g, u = (wide @ weight for weight in exact)
    dg, du = (gamma(hidden + 4) * (wide.abs() @ weight.abs()) for weight in exact)
    a = ops.activate(g, activation)
    if activation == "gelu":
        evaluation = g.abs() * 2.0**-22  # erf's absolute error times |g|
    else:  # g / (1 + exp(-z)): exp errs by 2^-22 and 2^-22 |z|, and z itself by a few roundings
        z = g if activation == "silu" else 1.5957691216057308 * (g + 0.044715 * g**3)
        evaluation = a.abs() * (2.0**-21 + z.abs() * 2.0**-21)
    da = 1.13 * dg + evaluation  # every activation's slope is below 1.13
    h = a * u
    bound = da * (u.abs() + du) + a.abs() * du + gamma(2) * h.abs() + rounding(h, kind)
    expected = ops.gathered_glu._init_fn(wide, *exact, limits.double(), activation)
    # What is kept has its own rounding, and so has its factor (float32).
    slope = 1.0 if ramp is None else 2 + 1 / ramp
    within(y, expected, slope * (bound + gamma(4) * h.abs()) + rounding(h, kind))


GLU = [
    # tokens hidden width activation dtype path keep ramp
    (1, 33, 21, "silu", "fp32", "gemv", 0.5, 0.1),
    (1, 600, 40, "silu", "fp16", "gemv", 0.4, 0.1),
    (3, 64, 70, "gelu_tanh", "bf16", "gemv", 1.0, None),
    (2, 2500, 20, "silu", "fp16", "gemv", 0.5, 0.1),  # three steps of 1,024 rows
    (2, 130, 19, "silu", "fp16", "gemm16", 0.2, 0.5),
    (16, 45, 33, "gelu", "fp32", "gemm16", 0.1, 0.1),
    (19, 61, 40, "silu", "bf16", "gemm16", 0.05, 1.0),
    (70, 45, 131, "silu", "fp16", "gemm64", 0.5, 0.1),
    (130, 50, 20, "silu", "bf16", "gemm128", 0.5, 0.3),
    (130, 33, 40, "silu", "fp32", "gemm128", 0.5, 0.3),
]


@pytest.mark.parametrize("case", GLU, ids=lambda case: "-".join(map(str, case)))
def test_glu(place: str, case: tuple[Any, ...]) -> None:
    check_glu(place, *case)


# ---- what is left out


def launches(path: str, dtype: str, inputs: int, outputs: int) -> list[tuple[Any, int]]:
    """The launches of both kernels, with the number of their weights."""
    from moedge.convert.ops.kernels import gathered_glu, gathered_linear

    glu = gathered_glu.launch(hidden=inputs, width=outputs, activation="silu", dtype=dtype, path=path)
    return [(gathered_linear.launch(inputs=inputs, outputs=outputs, dtype=dtype, path=path), 1), (glu, 2)]


def given_to(launch: Any, x: torch.Tensor, weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    width = weight.shape[1]
    limits = [limits_of(torch.full((width,), SMALLEST_THRESHOLD), 0.1)] if count == 2 else []
    return [x, *[weight] * count, *limits]


@pytest.mark.parametrize("path", SKIP)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_where_nothing_is_kept_nothing_is_read_and_the_result_is_zero(place: str, path: str, dtype: str) -> None:
    kind = DTYPES[dtype]
    x = left_out(3, 50, 0.0, kind)
    for launch, count in launches(path, dtype, 50, 36):
        y = run(launch, given_to(launch, x, torch.full((50, 36), NAN, dtype=kind), count), 36, place)
        assert not y.cpu().any()


@pytest.mark.parametrize("path", ["gemv", "gemm16", "gemm64", "gemm128"])
def test_a_token_without_numbers_touches_no_other(place: str, path: str) -> None:
    x = left_out(5, 40, 0.5, torch.float16)
    x[1, 3], x[3, 7], x[3, 30] = NAN, math.inf, -math.inf
    weight = random(40, 24, seed=1, dtype=torch.float16)
    for launch, count in launches(path, "fp16", 40, 24):
        y = run(launch, given_to(launch, x, weight, count), 24, place).cpu()
        clean = x.clone()
        clean[1], clean[3] = 0.0, 0.0
        same = run(launch, given_to(launch, clean, weight, count), 24, place).cpu()
        assert y[1].isnan().all()
        assert not y[3].isfinite().any()
        assert torch.equal(y[[0, 2, 4]], same[[0, 2, 4]])
        assert y[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("path", ["gemv", "gemm16", "gemm64"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_hidden_values_are_left_out_as_keep_large_does_it(place: str, path: str, dtype: str) -> None:
    """Bit for bit: the hidden value is rounded to its type and multiplied by the factor that its threshold gives."""
    kind, width = DTYPES[dtype], 80
    x, threshold = left_out(4, 60, 0.6, kind), 0.02 + 0.4 * random(width, seed=4).abs()
    gate, up = (random(60, width, seed=s, dtype=kind, size=0.2) for s in (2, 3))
    _, (launch, _) = launches(path, dtype, 60, width)
    everything = limits_of(torch.full((width,), SMALLEST_THRESHOLD), 0.1)
    h = run(launch, [x, gate, up, everything], width, place).cpu()
    y = run(launch, [x, gate, up, limits_of(threshold, 0.5)], width, place).cpu()
    want = kept(h, threshold, 0.5)
    assert torch.equal(y, want)
    assert 0.1 < float((want == 0).float().mean()) < 0.9
    assert ((want != 0) & (want != h)).any(), "some value lies on its ramp"


# ---- the operators


@pytest.mark.parametrize(("tokens", "path"), [(0, None), (1, "gemv"), (2, "gemm16"), (17, "gemm64"), (257, "gemm128")])
def test_the_operators_take_the_path_of_their_tokens(
    place: str, monkeypatch: pytest.MonkeyPatch, tokens: int, path: str | None
) -> None:
    """The whole FFN on kernels, against the operators in float64; at T = 0 nothing is launched."""
    from moedge.convert.ops.kernels import cuda, gathered

    assert path is None or gathered.path_for(tokens) == path
    seen: list[int] = []
    plain = cuda.run
    monkeypatch.setattr(
        cuda, "run", lambda launch, *rest: (seen.append(launch.constants["BLOCK_K"]), plain(launch, *rest))
    )
    x = left_out(tokens, 20, 0.5, torch.float32)
    gate, up, down = (random(*shape, seed=s, size=0.3) for s, shape in ((1, (20, 18)), (2, (20, 18)), (3, (18, 20))))
    limits = limits_of(0.05 + random(18, seed=4).abs() / 10, 0.5)
    arguments = [t.to(place) for t in (x, gate, up, limits)]
    y = cuda.gathered_linear(cuda.gathered_glu(*arguments, "silu"), down.to(place))
    hidden = ops.gathered_glu._init_fn(x.double(), gate.double(), up.double(), limits.double(), "silu")
    expected = hidden @ down.double()
    assert (y.shape, len(seen)) == ((tokens, 20), 2)
    # The parts have their own bounds; a wiring mistake is of the size of y itself.
    assert tokens == 0 or (y.cpu().double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_equal_inputs_give_equal_bits(place: str) -> None:
    x = left_out(2, 300, 0.5, torch.float16)
    weight = random(300, 40, seed=1, dtype=torch.float16)
    for path in ("gemv", "gemm16"):
        for launch, count in launches(path, "fp16", 300, 40):
            one, two = (run(launch, given_to(launch, x, weight, count), 40, place) for _ in range(2))
            assert torch.equal(one, two)


# ---- shapes


@pytest.mark.parametrize(
    ("outputs", "programs", "warps"),
    [(576, 36, 16), (2048, 128, 16), (4096, 128, 16), (8192, 256, 8), (14336, 448, 4), (65536, 2048, 4)],
)
def test_one_token_has_programs_and_warps_for_the_memory(outputs: int, programs: int, warps: int) -> None:
    from moedge.convert.ops.kernels import gathered_linear

    launch = gathered_linear.launch(inputs=8192, outputs=outputs, dtype="fp16", path="gemv")
    assert (launch.programs(1), launch.warps) == ((1, programs), warps)
    # Eight loads of 16 bytes in flight a thread: the two blocks of one step, fp16.
    assert launch.constants["BLOCK_N"] * 2 * launch.constants["BLOCK_K"] * 2 == 32 * warps * 8 * 16


def test_a_launch_that_no_kernel_has_is_refused() -> None:
    from moedge.convert.ops.kernels import gathered_glu, gathered_linear

    with pytest.raises(ValueError, match="unknown path 'gemm32'; known: gemv, gemm16, gemm64, gemm128"):
        gathered_linear.launch(inputs=8, outputs=8, dtype="fp16", path="gemm32")
    with pytest.raises(ValueError, match="activations of type fp64"):
        gathered_linear.launch(inputs=8, outputs=8, dtype="fp64", path="gemv")
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        gathered_glu.launch(hidden=8, width=8, activation="relu", dtype="fp16", path="gemv")


# ---- the whole grid

PATHS = st.sampled_from(("gemv", "gemm16", "gemm64", "gemm128"))
KEEP = st.sampled_from((0.0, 0.05, 0.5, 1.0))


@pytest.mark.slow
@many
@given(
    tokens=st.integers(1, 150),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 140),
    dtype=st.sampled_from(sorted(DTYPES)),
    path=PATHS,
    keep=KEEP,
)
def test_linear_grid(place: str, tokens: int, inputs: int, outputs: int, dtype: str, path: str, keep: float) -> None:
    check_linear(place, min(tokens, 8) if path == "gemv" else tokens, inputs, outputs, dtype, path, keep)


@pytest.mark.slow
@many
@given(
    tokens=st.integers(1, 150),
    hidden=st.integers(1, 200),
    width=st.integers(1, 140),
    activation=st.sampled_from(ops.ACTIVATIONS),
    dtype=st.sampled_from(sorted(DTYPES)),
    path=PATHS,
    keep=KEEP,
    ramp=st.sampled_from((None, 0.1, 1.0)),
)
def test_glu_grid(place: str, tokens: int, path: str, **size: Any) -> None:
    check_glu(place, tokens=min(tokens, 8) if path == "gemv" else tokens, path=path, **size)


@pytest.mark.gpu
def test_half_of_the_weights_take_less_time_than_all() -> None:
    """One token of a large FFN, beside PyTorch's dense products: the reason for these kernels.

    Three quarters of the dense time at half of the bytes: what is left over is the launch and the end of each kernel.
    """
    program = Path(__file__).parents[2] / "benchmarks" / "gpu_gather.py"
    sizes = ["--hidden", "4096", "--width", "14336", "--keep", "1,.5", "--tokens", "1", "--json"]
    done = subprocess.run([sys.executable, program, *sizes], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    everything, half = json.loads(done.stdout)
    assert half["gathered_us"] < 0.75 * everything["dense_us"]
