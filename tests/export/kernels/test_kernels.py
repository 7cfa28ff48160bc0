"""Every kernel against the operator's PyTorch implementation in float64, with bounds from floating-point analysis.

Bounds: u = 2^-24 is float32's unit roundoff, a sum of n products in any order errs by at most gamma(n) times the sum of
their magnitudes (Higham, Accuracy and Stability, sec. 3.1), and the result is rounded once to its own type. Products of
float16 or bfloat16 are exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moedge.convert import ops
from moedge.tests.export.kernels.bounds import DTYPES, gamma, many, random, rounding, within

pytest.importorskip("triton")  # Linux only

SPREADS = ("random", "one expert", "two experts", "last expert")


def choices(tokens: int, experts: int, top_k: int, spread: str, seed: int = 0) -> torch.Tensor:
    """Indices int32 [T, k] of distinct experts a token; ``spread`` puts all tokens on the same few."""
    scores = random(tokens, experts, seed=seed)
    favourites = {"one expert": [0], "two experts": [1, 0], "last expert": [experts - 1]}.get(spread, [])
    for place, expert in enumerate(favourites):
        scores[:, min(expert, experts - 1)] = 100.0 - place
    return scores.argsort(-1, descending=True)[:, :top_k].to(torch.int32)


def groups(rows: int, experts: int, spread: str, seed: int = 0) -> torch.Tensor:
    """Offsets int32 [E+1] of ``rows`` rows; some experts own none."""
    index = choices(rows, experts, 1, spread, seed).flatten().long()
    if spread == "random":
        index = index // 2 * 2  # every other expert is empty
    counts = torch.bincount(index, minlength=experts)
    return torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32)


# ---- route


def check_route(place: str, tokens: int, experts: int, top_k: int, rule: str, *, bias: bool, ties: bool) -> None:
    from moedge.convert.ops.kernels import cuda

    scores = random(tokens, experts, seed=1, size=3.0)
    if ties:
        scores = scores.round()
    if rule == "normalised":
        scores = torch.sigmoid(scores)  # it divides by their sum
    offset = random(experts, seed=2).round() if bias else None
    scale = random(experts, seed=3)
    on = [t if t is None else t.to(place) for t in (scores, offset, scale)]
    indices, weights = cuda.route(*on, top_k, rule)
    expected = ops.route._init_fn(scores, offset, scale, top_k, rule)[0]
    # The key is one float32 addition on both sides: the choice is equal, ties included.
    assert torch.equal(indices.cpu(), expected)
    # exp on the device: 2^-22 relative and |argument| * 2^-23 from its scaled argument; then a sum of E and a division
    wide = scores.double()
    reference = ops.route._init_fn(wide, None if offset is None else offset.double(), scale.double(), top_k, rule)[1]
    span = (wide.amax(-1) - wide.amin(-1)).unsqueeze(-1)
    relative = 2 * (2.0**-22 + span * 2.0**-23) + gamma(experts + 4)
    if rule == "scaled":
        p = (torch.softmax(wide, -1) * scale.double()).gather(-1, expected.long())
        bound = p.abs() * relative + rounding(reference.double(), torch.float32)
    else:
        bound = reference.double() * relative + rounding(reference.double(), torch.float32)
    within(weights, reference.double(), bound)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rule", "bias", "ties"),
    [
        (1, 2, 1, "unit", True, False),
        (3, 8, 8, "softmax", False, True),
        (5, 7, 3, "scaled", True, True),
        (2, 64, 6, "softmax", True, False),
        (2, 12, 4, "probability", True, False),
        (3, 9, 4, "normalised", True, True),
        (2, 65, 33, "scaled", False, True),
        (1, 512, 10, "softmax", True, True),
    ],
)
def test_route(place: str, tokens: int, experts: int, top_k: int, rule: str, bias: bool, ties: bool) -> None:
    check_route(place, tokens, experts, top_k, rule, bias=bias, ties=ties)


def test_route_keeps_within_its_slots_when_scores_are_not_numbers(place: str) -> None:
    """NaN and infinities still give k distinct experts: later kernels index memory with them."""
    from moedge.convert.ops.kernels import cuda

    scores = torch.tensor([[math.nan, 1.0, math.inf, -math.inf, math.nan], [-math.inf] * 5])
    for top_k in (1, 3, 5):
        indices, _ = cuda.route(scores.to(place), None, None, top_k, "unit")
        assert all(len(set(row)) == top_k and set(row) <= set(range(5)) for row in indices.tolist())
    assert indices.tolist()[1] == [0, 1, 2, 3, 4]


# ---- dispatch


def check_dispatch(place: str, tokens: int, hidden: int, experts: int, top_k: int, dtype: str, spread: str) -> None:
    from moedge.convert.ops.kernels import cuda

    x = random(tokens, hidden, seed=4, dtype=DTYPES[dtype])
    indices = choices(tokens, experts, top_k, spread)
    expected = ops.dispatch._init_fn(x, indices, experts)
    actual = cuda.dispatch(x.to(place), indices.to(place), experts)
    for name, a, b in zip(("rows", "offsets", "inverse"), actual, expected, strict=True):
        assert torch.equal(a.cpu(), b), name  # copies and counts: exact


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "top_k", "dtype", "spread"),
    [
        (1, 5, 2, 2, "fp32", "random"),
        (7, 33, 6, 3, "fp16", "one expert"),
        (60, 17, 5, 1, "bf16", "last expert"),
        (41, 9, 64, 27, "fp32", "random"),  # 1,107 rows: two rounds of counting
    ],
)
def test_dispatch(place: str, tokens: int, hidden: int, experts: int, top_k: int, dtype: str, spread: str) -> None:
    check_dispatch(place, tokens, hidden, experts, top_k, dtype, spread)


# ---- grouped products


def check_grouped(
    place: str,
    *,
    rows: int,
    hidden: int,
    width: int,
    experts: int,
    activation: str | None,
    dtype: str,
    path: str,
    spread: str,
) -> None:
    """GroupedGLU, or GroupedLinear for ``activation`` None (then ``hidden`` is the number of inputs all the same)."""
    from moedge.convert.ops.kernels import cuda, grouped_glu, grouped_linear

    kind = DTYPES[dtype]
    offsets = groups(rows, experts, spread)
    x = random(rows, hidden, seed=5, dtype=kind)
    size = 1.5 / math.sqrt(hidden)
    names = ("gate", "up") if activation else ("weight",)
    weights = [random(experts, width, hidden, seed=6 + i, dtype=kind, size=size) for i, _ in enumerate(names)]
    y = torch.empty(rows, width, dtype=kind, device=place)
    options: dict[str, Any] = {"experts": experts, "dtype": dtype, "path": path}
    if activation:
        launch = grouped_glu.launch(hidden=hidden, width=width, activation=activation, **options)
    else:
        launch = grouped_linear.launch(hidden=width, width=hidden, **options)
    inputs = [x, offsets, *weights]
    cuda.run(launch, [tensor.to(place) for tensor in inputs], [y], rows)

    wide = x.double()
    exact = [weight.double() for weight in weights]
    terms = gamma(hidden + 4)  # one rounding a product and a sum
    values = [ops.grouped_linear._init_fn(wide, offsets, weight) for weight in exact]
    errors = [terms * ops.grouped_linear._init_fn(wide.abs(), offsets, weight.abs()) for weight in exact]
    if activation is None:
        within(y, values[0], errors[0] + rounding(values[0], kind))
        return
    g, u = values
    expected = ops.grouped_glu._init_fn(wide, offsets, *exact, activation)
    a = ops.activate(g, activation)
    if activation == "gelu":
        # erf's absolute error 2^-22 times |g|
        evaluation = g.abs() * 2.0**-22
    else:
        # g / (1 + exp(-z)): exp errs by 2^-22 and 2^-22 |z|, and z itself by a few roundings
        z = g if activation == "silu" else 1.5957691216057308 * (g + 0.044715 * g**3)
        evaluation = a.abs() * (2.0**-21 + z.abs() * 2.0**-21)
    # Every activation's slope is below 1.13.
    da, du = 1.13 * errors[0] + evaluation, errors[1]
    within(y, expected, da * (u.abs() + du) + a.abs() * du + gamma(2) * expected.abs() + rounding(expected, kind))


GROUPED = [
    # rows hidden width experts activation dtype path spread
    (1, 33, 21, 3, "silu", "fp32", "gemv", "random"),
    (16, 64, 10, 8, "gelu_tanh", "fp16", "gemv", "two experts"),
    (6, 70, 17, 4, "silu", "bf16", "gemv", "one expert"),
    (5, 100, 9, 4, "gelu", "fp32", "gemv", "random"),
    (33, 75, 37, 5, "silu", "fp32", "gemm16", "random"),
    (70, 64, 40, 3, "gelu_tanh", "fp16", "gemm64", "one expert"),
    (40, 130, 19, 6, "silu", "bf16", "gemm32", "last expert"),
    (21, 90, 33, 4, "gelu", "fp16", "gemm16", "random"),
    (9, 45, 70, 64, None, "fp32", "gemv", "random"),
    (8, 61, 19, 4, None, "bf16", "gemv", "random"),
    (80, 45, 131, 7, None, "fp16", "gemm32", "random"),
    (40, 70, 50, 2, None, "fp32", "gemm64", "two experts"),
]


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: "-".join(map(str, case)))
def test_grouped(place: str, case: tuple[Any, ...]) -> None:
    names = ("rows", "hidden", "width", "experts", "activation", "dtype", "path", "spread")
    check_grouped(place, **dict(zip(names, case, strict=True)))


# ---- combine


def check_combine(
    place: str, tokens: int, hidden: int, experts: int, top_k: int, dtype: str, compensated: bool
) -> None:
    from moedge.convert.ops.kernels import cuda

    kind = DTYPES[dtype]
    rows = random(tokens * top_k, hidden, seed=8, dtype=kind)
    indices = choices(tokens, experts, top_k, "random", seed=9)
    inverse = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(10)).to(torch.int32)
    weights = random(tokens, top_k, seed=11)
    vectors = random(experts, hidden, seed=12, dtype=kind) if compensated else None
    on = [t if t is None else t.to(place) for t in (rows, inverse, indices, weights, vectors)]
    y = cuda.combine(*on)
    wide = None if vectors is None else vectors.double()
    expected = ops.combine._init_fn(rows.double(), inverse, indices, weights.double(), wide)
    magnitude = ops.combine._init_fn(
        rows.double().abs(), inverse, indices, weights.double().abs(), None if wide is None else wide.abs()
    )
    within(y, expected, gamma(top_k + experts + 2) * magnitude + rounding(expected, kind))


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "top_k", "dtype", "compensated"),
    [
        (1, 33, 4, 2, "fp32", True),
        (19, 17, 6, 6, "fp16", True),
        (6, 130, 70, 3, "bf16", True),
        (9, 40, 8, 1, "fp16", False),
        (5, 7, 8, 5, "bf16", False),
    ],
)
def test_combine(place: str, tokens: int, hidden: int, experts: int, top_k: int, dtype: str, compensated: bool) -> None:
    check_combine(place, tokens, hidden, experts, top_k, dtype, compensated)


def test_compensation_adds_exactly_nothing_when_every_expert_is_selected(place: str) -> None:
    from moedge.convert.ops.kernels import cuda

    rows, weights = random(12, 33, seed=0), random(3, 4, seed=1)
    inverse = torch.arange(12, dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32).repeat(3, 1)
    on = [t.to(place) for t in (rows, inverse, indices, weights)]
    with_vectors = cuda.combine(*on, random(4, 33, seed=2).to(place))
    assert torch.equal(with_vectors, cuda.combine(*on, None))


# ---- the chain


@pytest.mark.parametrize(("tokens", "top_k", "rule"), [(1, 2, "scaled"), (9, 3, "softmax"), (0, 2, "unit")])
def test_the_chain_is_the_operator(place: str, tokens: int, top_k: int, rule: str) -> None:
    """Route and SparseGLU on kernels, against the same operators in float64; at T = 0 nothing is launched."""
    from moedge.convert.ops.kernels import cuda

    hidden, width, experts = 33, 21, 6
    x, scores = random(tokens, hidden, seed=0), random(tokens, experts, seed=1)
    bias, scale = random(experts, seed=2), random(experts, seed=3)
    gate, up = (random(experts, width, hidden, seed=s, size=0.2) for s in (4, 5))
    down, vectors = random(experts, hidden, width, seed=6, size=0.2), random(experts, hidden, seed=7)
    on = [t.to(place) for t in (scores, bias, scale)]
    indices, weights = cuda.route(*on, top_k, rule)
    arguments = [t.to(place) for t in (x, indices, weights, gate, up, down, vectors)]
    y = cuda.sparse_glu(*arguments, "silu")
    wide = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in arguments]
    expected = ops.sparse_glu._init_fn(*wide, "silu")
    assert y.shape == x.shape
    # The parts have their own bounds; a wiring mistake is of the size of y itself.
    assert tokens == 0 or (y.cpu().double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 2), (13, 3)])
def test_the_chain_leaves_small_hidden_values_out(place: str, tokens: int, top_k: int) -> None:
    """With thresholds, an expert's own for each of its rows; the operator in float64 has the same."""
    from moedge.convert.ops.kernels import cuda

    hidden, width, experts = 33, 21, 6
    x, gate = random(tokens, hidden, seed=0), random(experts, width, hidden, seed=4, size=0.2)
    up, down = random(experts, width, hidden, seed=5, size=0.2), random(experts, hidden, width, seed=6, size=0.2)
    indices, weights = choices(tokens, experts, top_k, "random"), random(tokens, top_k, seed=1)
    limits = 0.1 + random(experts, width, seed=8).abs()
    arguments = [t.to(place) for t in (x, indices, weights, gate, up, down)]
    y = cuda.sparse_glu(*arguments, None, "silu", limits.to(place), 0.1)
    wide = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in arguments]
    expected = ops.sparse_glu._init_fn(*wide, None, "silu", limits.double(), 0.1)
    plain = ops.sparse_glu._init_fn(*wide, None, "silu")
    assert y.shape == x.shape
    if tokens:  # a rounding on the ramp counts 2 + 1 / 0.1 times
        assert (y.cpu().double() - expected).abs().max() < 12e-5 * expected.abs().max()
        assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


def test_equal_inputs_give_equal_bits(place: str) -> None:
    from moedge.convert.ops.kernels import cuda

    x, indices = random(30, 24, seed=0, dtype=torch.float16), choices(30, 5, 3, "random")
    weights = random(30, 3, seed=1)
    gate, up = (random(5, 16, 24, seed=s, dtype=torch.float16) for s in (2, 3))
    down, vectors = random(5, 24, 16, seed=4, dtype=torch.float16), random(5, 24, seed=5, dtype=torch.float16)
    arguments = [t.to(place) for t in (x, indices, weights, gate, up, down, vectors)]
    assert torch.equal(cuda.sparse_glu(*arguments, "silu"), cuda.sparse_glu(*arguments, "silu"))


# ---- the whole grid


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which need not be the one that the tensors are on."""
    from moedge.convert.ops.kernels import cuda

    events: list[Any] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        events.append(chosen)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda, "kernel_of", lambda _: {(2,): lambda *_, **__: events.append("launched")})
    launch: Any = SimpleNamespace(programs=lambda n: (n,), scalars=(), constants={}, warps=1, stages=1)
    second: Any = SimpleNamespace(device=torch.device("cuda", 1))
    cuda.run(launch, [second], [], 2)
    assert events == [second.device, "launched", "left"]
    cuda.run(launch, [torch.ones(1)], [], 2)
    assert events[3:] == ["launched"]


@st.composite
def sizes(draw: Any, *, most_rows: int = 700) -> dict[str, Any]:
    experts = draw(st.integers(2, 64))
    top_k = draw(st.integers(1, experts))
    return {
        "tokens": draw(st.integers(1, max(1, min(300, most_rows // top_k)))),
        "hidden": draw(st.integers(1, 140)),
        "experts": experts,
        "top_k": top_k,
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "spread": draw(st.sampled_from(SPREADS)),
    }


# The fixture is a hook that is the same for every example.


@pytest.mark.slow
@many
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(2, 130),
    k=st.integers(1, 130),
    rule=st.sampled_from(ops.RULES),
    bias=st.booleans(),
    ties=st.booleans(),
)
@example(tokens=300, experts=16, k=16, rule="softmax", bias=True, ties=True)
@example(tokens=2, experts=512, k=512, rule="scaled", bias=True, ties=True)
def test_route_grid(place: str, tokens: int, experts: int, k: int, rule: str, bias: bool, ties: bool) -> None:
    check_route(place, tokens, experts, min(k, experts), rule, bias=bias, ties=ties)


@pytest.mark.slow
@many
@given(size=sizes(most_rows=2500))
def test_dispatch_grid(place: str, size: dict[str, Any]) -> None:
    check_dispatch(place, **size)


@pytest.mark.slow
@many
@given(size=sizes(), compensated=st.booleans())
def test_combine_grid(place: str, size: dict[str, Any], compensated: bool) -> None:
    size.pop("spread")
    check_combine(place, **size, compensated=compensated)


@pytest.mark.slow
@many
@given(
    size=sizes(),
    width=st.integers(1, 140),
    activation=st.sampled_from((None, *ops.ACTIVATIONS)),
    path=st.sampled_from(("gemv", "gemm16", "gemm32", "gemm64")),
)
def test_grouped_grid(place: str, size: dict[str, Any], width: int, activation: str | None, path: str) -> None:
    rows = size.pop("tokens") * size.pop("top_k")
    rows = min(rows, 64) if path == "gemv" else rows
    check_grouped(place, rows=rows, width=width, activation=activation, path=path, **size)
