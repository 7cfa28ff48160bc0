"""Gradients of the moedge operators: against finite differences and against a naive form that autograd sees through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moedge.convert import ops

moedge = torch.ops.moedge


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def problem(experts: int = 5, top_k: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """T=4, H=3, I=2. Expert 4 is selected by no token."""
    scores = draw(4, experts, seed=7, dtype=dtype).detach()
    scores[:, 4:] -= 100.0
    indices, _ = moedge.route(scores, None, None, top_k, "unit")
    shapes = {"x": (4, 3), "weights": (4, top_k), "gate": (experts, 2, 3), "up": (experts, 2, 3)}
    shapes |= {"down": (experts, 3, 2), "compensation": (experts, 3)}
    tensors: dict[str, Any] = {
        name: draw(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())
    }
    return {**tensors, "indices": indices}


def naive(x, indices, weights, gate, up, down, compensation, activation):
    """Every expert on every token, mixed by a dense [T, E] matrix of weights."""
    hidden = ops.activate(torch.einsum("th,eih->tei", x, gate), activation) * torch.einsum("th,eih->tei", x, up)
    each = torch.einsum("tei,ehi->teh", hidden, down)
    chosen = indices.long()
    mix = torch.zeros(len(x), len(gate), dtype=x.dtype).scatter(1, chosen, weights.to(x.dtype))
    y = torch.einsum("te,teh->th", mix, each)
    if compensation is not None:
        y = y + torch.ones_like(mix).scatter(1, chosen, 0.0) @ compensation
    return y


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("compensated", [False, True])
def test_sparse_glu_against_finite_differences(activation: str, compensated: bool) -> None:
    given = problem()
    if not compensated:
        given["compensation"] = None
    names = ("x", "weights", "gate", "up", "down", *(("compensation",) if compensated else ()))

    def run(*values: torch.Tensor) -> torch.Tensor:
        return moedge.sparse_glu(**{**given, **dict(zip(names, values, strict=True))}, activation=activation)

    assert torch.autograd.gradcheck(run, tuple(given[name] for name in names))


def test_each_link_of_the_chain_against_finite_differences() -> None:
    given = problem()
    indices = given["indices"]
    rows, offsets, inverse = (t.detach() for t in moedge.dispatch(given["x"], indices, 5))
    rows.requires_grad_()
    hidden = draw(len(rows), 2, seed=20)
    check = torch.autograd.gradcheck
    assert check(lambda x: moedge.dispatch(x, indices, 5)[0], (given["x"],))
    for activation in ops.ACTIVATIONS:
        weights = (rows, given["gate"], given["up"])
        assert check(lambda r, g, u, a=activation: moedge.grouped_glu(r, offsets, g, u, a), weights)
    assert check(lambda h, d: moedge.grouped_linear(h, offsets, d), (hidden, given["down"]))
    out = draw(len(rows), 3, seed=21)
    assert check(
        lambda o, w, c: moedge.combine(o, inverse, indices, w, c), (out, given["weights"], given["compensation"])
    )


@pytest.mark.parametrize("rule", ["scaled", "softmax", "probability", "normalised"])
def test_route_passes_the_gradient_of_its_weights_to_scores_and_scale(rule: str) -> None:
    scores, scale, bias = draw(6, 5, seed=3), draw(5, seed=4), draw(5, seed=5).detach() * 3

    def run(scores: torch.Tensor, *scale: torch.Tensor) -> torch.Tensor:
        positive = torch.sigmoid(scores) if rule == "normalised" else scores
        return moedge.route(positive, bias, scale[0] if scale else None, 2, rule)[1]

    assert torch.autograd.gradcheck(run, (scores, scale) if rule == "scaled" else (scores,))


def test_unit_weights_pass_nothing_on() -> None:
    scores = draw(6, 5)
    indices, weights = moedge.route(scores, None, None, 2, "unit")
    assert not indices.requires_grad
    weights.sum().backward()
    assert scores.grad is None or not scores.grad.any()


def test_a_single_softmax_choice_teaches_the_router_nothing_and_a_probability_does() -> None:
    """Softmax over one selected score is 1 whatever the score (docs/methods.md 4.3)."""
    sizes = {}
    for rule in ("softmax", "probability"):
        scores = draw(6, 5)
        moedge.route(scores, None, None, 1, rule)[1].sum().backward()
        sizes[rule] = float(scores.grad.abs().max())
    assert sizes["softmax"] < 1e-15 < 1e-3 < sizes["probability"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_glu_matches_the_naive_gradients(dtype: torch.dtype) -> None:
    """Router, weights and experts together, at a size where every expert has several rows or none."""
    tokens, hidden, width, experts, top_k = 64, 16, 8, 6, 3
    names = ("x", "scores", "gate", "up", "down", "compensation")
    shapes = ((tokens, hidden), (tokens, experts), *[(experts, width, hidden)] * 2, (experts, hidden, width))
    drawn = [draw(*shape, seed=i).detach() for i, shape in enumerate((*shapes, (experts, hidden)))]
    drawn[1][:, -1] -= 100.0  # an expert that no token selects
    target = draw(tokens, hidden, seed=9).detach()

    def gradients(form: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        given = {n: t.to(torch.float32 if n == "scores" else dtype) for n, t in zip(names, drawn, strict=True)}
        if dtype == torch.float64:
            given["scores"] = given["scores"].double()
        given = {name: value.requires_grad_() for name, value in given.items()}
        scores = given.pop("scores")
        indices, weights = moedge.route(scores, None, None, top_k, "softmax")
        y = form(indices=indices, weights=weights, activation="silu", **given)
        return torch.autograd.grad((y.double() * target).sum(), (*given.values(), scores))

    rounded = [t.to(dtype).double() if n != "scores" else t.float().double() for n, t in zip(names, drawn, strict=True)]
    drawn[:] = rounded  # both forms start from the same numbers
    expected = gradients(naive, torch.float64)
    # Every gradient is a chain of three rounded stages (hidden, its gradient, the product), each within a few units
    # of the last place of its largest value.
    tolerance = 16 * torch.finfo(dtype).eps
    for got, want in zip(gradients(moedge.sparse_glu, dtype), expected, strict=True):
        assert got.shape == want.shape
        assert float((got.double() - want).abs().max() / want.abs().max()) < tolerance
    assert not expected[1][-1].any()  # gate of the expert without rows


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    given = problem()
    for frozen in ("gate", "up", "down", "weights", "compensation"):
        given[frozen].requires_grad_(False)
    moedge.sparse_glu(**given, activation="silu").sum().backward()
    assert given["x"].grad is not None
    assert all(given[name].grad is None for name in ("gate", "up", "down", "weights", "compensation"))


def test_nothing_is_kept_without_gradients() -> None:
    given = problem()
    with torch.no_grad():
        y = moedge.sparse_glu(**given, activation="silu")
    assert y.grad_fn is None
    with torch.inference_mode():
        assert moedge.sparse_glu(**given, activation="silu").grad_fn is None
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moedge.sparse_glu(**given, activation="silu")
    # With gradients: the inputs, no hidden activation.
    pointers = {value.data_ptr() for value in given.values()}
    assert {t.data_ptr() for t in kept} <= pointers
