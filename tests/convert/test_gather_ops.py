"""``keep_large``, and thresholds inside the routed FFN: values, gradients, number types, hostile inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moedge.convert import ops
from moedge.convert.ops import sparse
from moedge.convert.ops.gathered import limits_of

moedge = torch.ops.moedge
RAMP = 0.1


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def limits(*shape: int, seed: int = 9) -> torch.Tensor:
    return 0.2 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def keep(x: torch.Tensor, threshold: torch.Tensor, ramp: float = RAMP) -> torch.Tensor:
    """The formula in plain torch, in the type of x, so that autograd sees through it; the factor is held fixed."""
    factor = ((x.abs() - threshold) / (threshold * ramp)).clamp(0, 1).detach()
    return x * factor


def test_values_below_the_threshold_are_zero_above_the_ramp_whole_and_between_on_the_line() -> None:
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    x = torch.tensor([[0.5, 1.0, 1.05, 1.1, 3.0, -2.1], [-0.5, -1.0, -1.05, -1.2, -3.0, 1.9]])
    want = torch.tensor([[0.0, 0.0, 0.525, 1.1, 3.0, -1.05], [0.0, 0.0, -0.525, -1.2, -3.0, 0.0]])
    # 1.05 - 1 is exact to 2^-24 and is divided by .1: an error of 10 * 2^-24 of the value.
    torch.testing.assert_close(moedge.keep_large(x, threshold, RAMP), want, rtol=16 * 2.0**-24, atol=0)


def test_exactly_at_the_threshold_nothing_is_kept_and_at_the_end_of_the_ramp_all() -> None:
    threshold = torch.tensor([0.5, 0.25, 8.0])
    x = threshold * torch.tensor([[1.0], [1.5], [-1.0], [-1.5]])  # exact in binary with a ramp of 1/2
    want = torch.stack([0 * threshold, 1.5 * threshold, 0 * threshold, -1.5 * threshold])
    assert torch.equal(moedge.keep_large(x, threshold, 0.5), want)
    below = torch.nextafter(x, torch.zeros(()))
    assert torch.equal(moedge.keep_large(below[::2], threshold, 0.5), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_a_number_stays_one_infinities_pass_and_zeros_stay_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30]], dtype=dtype)
    got = moedge.keep_large(x, torch.full((6,), 0.3), RAMP)
    assert got.dtype == dtype
    assert got[0, 0].isnan()
    assert got[0, 1:].tolist() == [float("inf"), -float("inf"), 0.0, 0.0, 0.0]
    assert not moedge.keep_large(torch.zeros(3, 6, dtype=dtype), torch.full((6,), 0.3), RAMP).any()
    assert not moedge.keep_large(torch.zeros(3, 6, dtype=dtype), torch.full((6,), 1e-30), RAMP).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_once(dtype: torch.dtype) -> None:
    """The factor is computed in float32, so the result is the rounded exact product, not a product of two roundings."""
    x, threshold = draw(64, 40, dtype=dtype), limits(40)
    got = moedge.keep_large(x, threshold, RAMP)
    assert torch.equal(got, keep(x.float(), threshold).to(dtype))
    assert 0.1 < float((got == 0).float().mean()) < 0.9


def test_double_is_not_rounded_to_single() -> None:
    x, threshold = draw(16, 40, dtype=torch.float64), limits(40)
    got = moedge.keep_large(x, threshold, RAMP)
    torch.testing.assert_close(got, keep(x, threshold.double()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("threshold", [1e-30, 1e30])
@pytest.mark.parametrize("ramp", [1e-3, 10.0])
def test_the_smallest_threshold_keeps_every_number_and_the_largest_none(threshold: float, ramp: float) -> None:
    x = torch.cat([draw(8, 16), draw(8, 16) * 1e-20, draw(8, 16) * 1e20])
    got = moedge.keep_large(x, torch.full((16,), threshold), ramp)
    assert torch.equal(got, x if threshold < 1 else torch.zeros_like(x))


def test_the_gradient_is_that_of_a_mask() -> None:
    x, threshold = draw(12, 20).requires_grad_(), limits(20)
    d_y = draw(12, 20, seed=1)
    (got,) = torch.autograd.grad((moedge.keep_large(x, threshold, RAMP) * d_y).sum(), x)
    (want,) = torch.autograd.grad((keep(x, threshold) * d_y).sum(), x)
    torch.testing.assert_close(got, want)
    between = (want != 0) & (want != d_y)
    assert between.any(), "some value lies on the ramp, where mask and slope differ"


def test_every_shape_that_broadcasts_and_every_layout() -> None:
    x, threshold = draw(2, 5, 8), limits(8)
    want = keep(x, threshold)
    torch.testing.assert_close(moedge.keep_large(x, threshold, RAMP), want)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(moedge.keep_large(turned, threshold, RAMP), want)
    assert moedge.keep_large(x[:0], threshold, RAMP).shape == (0, 5, 8)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_the_gathered_operators_are_the_products_of_kept_values(activation: str) -> None:
    """What a gathered FFN is in PyTorch, with weights by channel."""
    x, gate, up, down = (draw(*s, seed=i).double() for i, s in enumerate(((6, 8), (10, 8), (10, 8), (8, 10))))
    kept = moedge.keep_large(x, limits(8), RAMP)
    h = ops.activate(F.linear(kept, gate), activation) * F.linear(kept, up)
    threshold = limits(10, seed=3)
    want = F.linear(moedge.keep_large(h, threshold, RAMP), down)
    table = torch.stack([threshold.double(), threshold.double() * RAMP])
    got = moedge.gathered_linear(moedge.gathered_glu(kept, gate.T, up.T, table, activation), down.T)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got, F.linear(h, down), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gathered_operators_pass_opcheck_and_round_as_keep_large_does(dtype: torch.dtype) -> None:
    x, gate, up = draw(6, 8, dtype=dtype), draw(8, 10, seed=1, dtype=dtype), draw(8, 10, seed=2, dtype=dtype)
    table = limits_of(limits(10), RAMP)
    torch.library.opcheck(moedge.gathered_glu.default, (x, gate, up, table, "silu"))
    torch.library.opcheck(moedge.gathered_linear.default, (x, gate))
    h = F.silu(x @ gate) * (x @ up)
    assert torch.equal(moedge.gathered_glu(x, gate, up, table, "silu"), moedge.keep_large(h, limits(10), RAMP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    x, threshold = draw(6, 8, dtype=dtype).requires_grad_(), limits(8)
    torch.library.opcheck(moedge.keep_large.default, (x, threshold, RAMP))
    given = problem(dtype=dtype)
    torch.library.opcheck(moedge.sparse_glu.default, (*given.values(), "silu", limits(5, 4), RAMP))
    rows, offsets, _ = moedge.dispatch(given["x"], given["indices"], 5)
    arguments = (rows, offsets, given["gate"], given["up"], "silu", limits(5, 4), RAMP)
    torch.library.opcheck(moedge.grouped_glu.default, arguments)


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.floats(-1024.0, 1024.0, width=32),
    st.floats(2.0**-10, 128.0, width=32),
    st.sampled_from([0.05, 0.1, 0.5, 2.0]),
    st.integers(-64, 64),
)
def test_rounding_moves_a_value_by_at_most_1_plus_2_over_ramp_of_it(x: float, t: float, ramp: float, ulps: int) -> None:
    """Continuous: no decision turns, so parity holds without replay. The steepest slope is at the end of the ramp."""
    one = torch.tensor([[x]], dtype=torch.float32)
    two = one + ulps * torch.finfo(torch.float32).eps * one.abs().clamp(min=t)
    threshold = torch.tensor([t])
    moved = float((two.double() - one.double()).abs())
    y, z = (moedge.keep_large(v.double(), threshold, ramp) for v in (one, two))
    # d/dx x (|x| - t) / (ramp t) = (2|x| - t) / (ramp t), largest at |x| = (1 + ramp) t.
    assert float((y - z).abs()) <= moved * (1 + 2 * ramp) / ramp + moved + 1e-12 * abs(x)


# --- thresholds of hidden values ---


def problem(tokens: int = 6, top_k: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """E=5 experts of I=4 on H=8; expert 4 is selected by no token."""
    scores = draw(tokens, 5, seed=7)
    scores[:, 4:] -= 100.0
    indices, weights = moedge.route(scores, None, None, top_k, "softmax")
    return {
        "x": draw(tokens, 8, seed=seed, dtype=dtype),
        "indices": indices,
        "weights": weights,
        "gate": draw(5, 4, 8, seed=1, dtype=dtype),
        "up": draw(5, 4, 8, seed=2, dtype=dtype),
        "down": draw(5, 8, 4, seed=3, dtype=dtype),
        "compensation": draw(5, 8, seed=4, dtype=dtype),
    }


def naive(x, indices, weights, gate, up, down, compensation, activation, h_threshold):  # type: ignore[no-untyped-def]
    """Every expert on every token, mixed by a dense [T, E] matrix of weights; autograd sees through it."""
    hidden = ops.activate(torch.einsum("th,eih->tei", x, gate), activation) * torch.einsum("th,eih->tei", x, up)
    each = torch.einsum("tei,ehi->teh", keep(hidden, h_threshold), down)
    mix = torch.zeros(len(x), len(gate), dtype=x.dtype).scatter(1, indices.long(), weights.to(x.dtype))
    y = torch.einsum("te,teh->th", mix, each)
    return y if compensation is None else y + torch.ones_like(mix).scatter(1, indices.long(), 0.0) @ compensation


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_form_of_the_routed_ffn_leaves_out_the_same_values(activation: str, compensated: bool) -> None:
    """Grouped rows, all experts at once, and the chain of operators; a whole is 2 sums of 8 terms, 16 * 2^-24."""
    for tokens in (6, 40):
        given, limit = problem(tokens), limits(5, 4)
        given["compensation"] = given["compensation"] if compensated else None
        assert sparse.all_at_once(given["x"], given["gate"], 2) == (tokens == 40)
        want = naive(**{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()},
                     activation=activation, h_threshold=limit.double())  # fmt: skip
        rows, offsets, inverse = moedge.dispatch(given["x"], given["indices"], 5)
        hidden = moedge.grouped_glu(rows, offsets, given["gate"], given["up"], activation, limit, RAMP)
        assert 0.1 < float((hidden == 0).float().mean()) < 0.9
        out = moedge.grouped_linear(hidden, offsets, given["down"])
        chain = moedge.combine(out, inverse, given["indices"], given["weights"], given["compensation"])
        whole = moedge.sparse_glu(*given.values(), activation, limit, RAMP)
        for got in (chain, whole, sparse.masked(*given.values(), activation, limit, RAMP)):
            # On the ramp a rounding of h counts (1 + 2 ramp) / ramp times.
            assert float((got - want).abs().max() / want.abs().max()) < 16 * 2.0**-24 * (1 + 2 * RAMP) / RAMP
        plain = moedge.sparse_glu(*given.values(), activation)
        assert float((whole - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_types_the_forms_agree_with_keep_large_after_the_product(dtype: torch.dtype) -> None:
    given, limit = problem(dtype=dtype), limits(5, 4)
    rows, offsets, _ = moedge.dispatch(given["x"], given["indices"], 5)
    got = moedge.grouped_glu(rows, offsets, given["gate"], given["up"], "silu", limit, RAMP)
    plain = moedge.grouped_glu(rows, offsets, given["gate"], given["up"], "silu")
    owner = torch.repeat_interleave(offsets.diff().long())
    assert torch.equal(got, moedge.keep_large(plain, limit[owner], RAMP))


@pytest.mark.parametrize("tokens", [6, 40])
def test_gradients_of_the_routed_ffn_are_those_of_the_masked_reference(tokens: int) -> None:
    given, limit, target = problem(tokens, dtype=torch.float64), limits(5, 4).double(), draw(tokens, 8, seed=5)
    names = ("x", "weights", "gate", "up", "down", "compensation")

    def gradients(form: Any) -> tuple[torch.Tensor, ...]:
        ready = {k: v.detach().clone().requires_grad_(k in names) for k, v in given.items()}
        return torch.autograd.grad((form(**ready) * target).sum(), [ready[name] for name in names])

    want = gradients(lambda **ready: naive(**ready, activation="silu", h_threshold=limit))
    got = gradients(lambda **ready: moedge.sparse_glu(*ready.values(), "silu", limit, RAMP))
    _, offsets, inverse = moedge.dispatch(given["x"], given["indices"], 5)

    def chain(x, indices, weights, gate, up, down, compensation):  # type: ignore[no-untyped-def]
        hidden = moedge.grouped_glu(moedge.dispatch(x, indices, 5)[0], offsets, gate, up, "silu", limit, RAMP)
        return moedge.combine(moedge.grouped_linear(hidden, offsets, down), inverse, indices, weights, compensation)

    for a, b, c in zip(got, gradients(chain), want, strict=True):
        # float64 but for the weights, which route gives in float32.
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-7)


def test_hidden_values_that_are_no_numbers_are_not_hidden() -> None:
    given = problem()
    given["x"][0, 0] = float("nan")
    y = moedge.sparse_glu(*given.values(), "silu", limits(5, 4), RAMP)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


def test_linear_layers_of_a_gathered_ffn_under_autocast_run_in_half() -> None:
    """Autocast does not see into operators of ours: what they give keeps the type of what they were given."""
    x, threshold, weight = draw(6, 8), limits(8), draw(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        kept = moedge.keep_large(x, threshold, RAMP)
        assert kept.dtype == torch.float32
        y = F.linear(kept, weight)
    assert y.dtype == torch.bfloat16
