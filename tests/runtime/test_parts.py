"""Errors of parts: what is beyond the limits, beside the same part of other layers, and which experts explain it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moedge.configs import tolerances
from moedge.runtime.parity import parts
from moedge.runtime.parity.parts import Allowed, Part, Shown

LIMITS = tolerances.load().profiles["float32/ort-cpu-int8"]
EXACT = tolerances.load().profiles["float32/ort-cpu"]
TOKENS, WIDTH = 16, 32


def shown(layers: int, errors: dict[int, float]) -> tuple[Shown, Shown]:
    """Two engines whose FFNs differ by ``errors`` of layer, relatively, and whose norms are the same."""
    generator = np.random.default_rng(0)

    def values() -> np.ndarray:
        return generator.standard_normal((TOKENS, WIDTH)).astype(np.float32)

    one = {(layer, spot): values() for layer in range(layers) for spot in ("stream", "middle", "ffn_input", "ffn")}
    one |= {(layers, "stream"): values(), (layers, "head_input"): values()}
    two = {
        point: value * np.float32(1 + errors.get(point[0], 0.0)) if point[1] == "ffn" else value
        for point, value in one.items()
    }
    logits = values()
    return Shown(logits, one), Shown(logits, two)  # type: ignore[arg-type]


def departing(layers: int, errors: dict[int, float]) -> list[int | None]:
    reference, test = shown(layers, errors)
    found = parts.errors(test, reference, LIMITS, EXACT, {})
    return [part.layer for part in found if part.departs(slice(0, TOKENS))]


def test_a_part_departs_beyond_the_limits_of_the_whole_model() -> None:
    median = LIMITS.median_rel_error
    assert departing(3, {1: median * 1.2}) == [1]
    assert departing(3, {1: median * 0.9}) == []


def test_a_border_that_the_reference_lacks_is_left_out() -> None:
    reference, test = shown(3, {1: 1.0})
    test.layers[0, "ffn_normed"] = test.layers[0, "ffn"]
    found = parts.errors(test, reference, LIMITS, EXACT, {})
    assert [part.layer for part in found if part.departs(slice(0, TOKENS))] == [1]


def test_what_all_layers_have_is_no_jump_unless_all_fail() -> None:
    """Six robust deviations of the others are allowed where the typical layer keeps the limit."""
    generator = np.random.default_rng(1)
    usual = {layer: 0.03 * math.exp(0.3 * generator.standard_normal()) for layer in range(12)}
    assert departing(12, usual | {5: 0.06}) == []  # beyond the limit, as others nearly are
    assert departing(12, usual | {5: 0.6}) == [5]
    assert departing(12, dict.fromkeys(range(12), 0.1)) == list(range(12))
    calm = {layer: 0.001 * math.exp(0.1 * generator.standard_normal()) for layer in range(12)}
    assert departing(12, calm | {5: 0.02}) == []
    reference, test = shown(12, calm | {5: 0.02})
    odd = parts.standing_out(parts.errors(test, reference, LIMITS, EXACT, {}))
    assert odd is not None
    assert (odd[0].layer, odd[0].part) == (5, "FFN")
    assert odd[1] == pytest.approx(20, rel=0.3)


def test_norms_are_held_to_the_limits_without_quantisation() -> None:
    reference, test = shown(3, {})
    test.layers[1, "ffn_input"] = test.layers[1, "ffn_input"] * np.float32(1.001)
    found = [part for part in parts.errors(test, reference, LIMITS, EXACT, {}) if part.departs(slice(0, TOKENS))]
    assert [(part.layer, part.part) for part in found] == [(1, "norm")]


def test_one_token_is_enough_where_it_alone_would_cost_too_much() -> None:
    allowed = Allowed.of(LIMITS)
    assert allowed.largest == pytest.approx(math.sqrt(2 * 0.75) / 4)
    values = np.zeros(64)
    for error, kind in ((allowed.largest * 0.99, None), (allowed.largest * 1.01, "largest"), (math.inf, "largest")):
        values[7] = error
        found = Part(0, "FFN", "the FFN", values, allowed).departs(slice(0, 64))
        assert (found.kind if found else None) == kind
    assert Part(0, "FFN", "the FFN", values, allowed).departs(slice(8, 64)) is None
    assert Part(0, "FFN", "the FFN", values, allowed).departs(slice(64, 64)) is None


def test_what_is_no_number_is_the_fault_of_the_part_that_makes_it() -> None:
    one = np.ones((4, 8), dtype=np.float32)
    two = one.copy()
    two[1] = np.nan
    np.testing.assert_array_equal(parts.relative(one, two), [0, np.inf, 0, 0])
    np.testing.assert_array_equal(parts.relative(two, two), np.zeros(4))  # it was given what is none
    np.testing.assert_array_equal(parts.relative_logits(one, two), [0, np.inf, 0, 0])


def test_a_small_output_is_measured_by_the_typical_one() -> None:
    one = np.ones((5, 4), dtype=np.float32)
    one[2] *= 1e-6
    two = one + np.float32(1e-4)
    assert parts.relative(one, two) == pytest.approx(np.full(5, 1e-4), rel=0.01)


def test_a_router_may_take_either_of_a_tie_and_nothing_worse() -> None:
    scores = np.array([[1.0, 0.5, 0.5 + 1e-6, 0.0], [1.0, 0.5, 0.2, 0.0]], dtype=np.float32)

    def value(chosen: list[list[int]], own: np.ndarray | None = None) -> Part:
        reference, test = shown(1, {})
        test.routes, test.scores = {0: np.array(chosen)}, None if own is None else {0: own}
        two = Shown(test.logits[:2], {point: array[:2] for point, array in test.layers.items()}, test.routes)
        two.scores = test.scores
        one = Shown(reference.logits[:2], {point: array[:2] for point, array in reference.layers.items()})
        found = parts.errors(two, one, LIMITS, EXACT, {0: scores})
        return next(part for part in found if part.part == "router")

    assert value([[0, 1], [0, 1]]).departs(slice(0, 2)) is None  # 2 was better by less than the margin
    assert value([[0, 1], [0, 2]]).departs(slice(0, 2)) is not None
    assert value([[0, 1], [1, 1]]).departs(slice(0, 2)) is not None  # no choice of two
    assert value([[0, 1], [0, 1]], scores).departs(slice(0, 2)) is not None  # by its own scores 2 is better


def test_few_experts_explain_what_departs_or_none_do() -> None:
    generator = np.random.default_rng(2)
    routes = np.argsort(generator.random((200, 8)), axis=1)[:, :2]
    one_of = (routes == 3).any(1) ^ (routes == 6).any(1)  # both: exchanged, they add up to the same
    assert parts.responsible(routes, one_of) == [3, 6]
    assert parts.responsible(routes, (routes == 5).any(1)) == [5]
    assert parts.responsible(routes, generator.random(200) < 0.5) is None
    assert parts.responsible(routes, np.ones(200, dtype=bool)) is None
    assert parts.responsible(routes, np.zeros(200, dtype=bool)) is None
