from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedge import MoEdgeError
from moedge.convert import partition


def marks(seed: int, tokens: int, width: int, k_a: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([np.sort(generator.choice(width, k_a, replace=False)) for _ in range(tokens)])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), widths=st.lists(st.integers(1, 3), min_size=2, max_size=3).filter(lambda w: sum(w) < 8)
)
def test_assignment_is_optimal_and_balanced(seed: int, widths: list[int]) -> None:
    n = sum(widths)
    cost = np.random.default_rng(seed).random((n, len(widths)))
    labels = partition.assign_balanced(cost, widths)
    assert np.bincount(labels, minlength=len(widths)).tolist() == widths
    slots = np.repeat(np.arange(len(widths)), widths)
    brute = min(sum(cost[i, slots[p]] for i, p in enumerate(order)) for order in permutations(range(n)))
    # Both are sums of the same at most 8 numbers in [0, 1]; only the order of addition differs.
    assert cost[np.arange(n), labels].sum() == pytest.approx(brute, abs=8 * np.finfo(float).eps * n)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_assignment_is_never_better(seed: int) -> None:
    cost = np.random.default_rng(seed).random((12, 3))
    free, greedy = [4, 4, 4], 0.0
    for row in cost:
        best = min((value, e) for e, value in enumerate(row) if free[e])
        free[best[1]] -= 1
        greedy += best[0]
    optimal = cost[np.arange(12), partition.assign_balanced(cost, [4, 4, 4])].sum()
    assert optimal <= greedy


def test_signatures_mark_exactly_the_top_neurons() -> None:
    top = marks(1, tokens=9, width=12, k_a=3)
    dense = partition.signatures(top, 12).toarray()
    assert dense.shape == (12, 9)
    for token, neurons in enumerate(top):
        assert np.flatnonzero(dense[:, token]).tolist() == neurons.tolist()


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_distances_equal_the_definition(distance: partition.Distance) -> None:
    points = partition.signatures(marks(2, tokens=20, width=10, k_a=4), 10)
    centroids = np.random.default_rng(3).random((3, 20))
    difference = points.toarray()[:, None, :] - centroids[None]
    order = 1 if distance == "l1" else 2
    expected = np.linalg.norm(difference, ord=order, axis=-1)
    # l2 subtracts numbers of size <= 40 before the root: error sqrt(40 * 2^-52) at worst, 1e-7.
    np.testing.assert_allclose(partition.distances(points, centroids, distance), expected, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    ties=st.booleans(),
    gain=st.booleans(),
)
def test_the_transport_solver_finds_the_optimum_of_the_square_problem(
    seed: int, widths: list[int], ties: bool, gain: bool
) -> None:
    generator = np.random.default_rng(seed)
    cost = generator.random((sum(widths), len(widths))) - gain  # gains to maximise are negative costs
    cost = np.round(cost * 2) if ties else cost
    square = partition.assign_balanced(cost, widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "_SQUARE", 0)
        labels = partition.assign_balanced(cost, widths)
    assert labels.dtype == np.int32
    assert np.bincount(labels, minlength=len(widths)).tolist() == widths
    rows = np.arange(len(cost))
    # float64 sums of at most 45 costs below 2.
    assert cost[rows, labels].sum() == pytest.approx(cost[rows, square].sum(), abs=1e-12)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_kmeans_finds_planted_clusters(distance: partition.Distance) -> None:
    # 3 groups of 4 neurons that always fire together, dealt in a mixed order.
    group = np.random.default_rng(4).permutation(np.repeat(np.arange(3), 4))
    tokens = np.arange(30) % 3
    top = np.stack([np.flatnonzero(group == token) for token in tokens])
    points = partition.signatures(top, 12)
    initial = np.array([np.flatnonzero(group == e)[0] for e in range(3)])
    clusters = partition.balanced_kmeans(points, initial, [4, 4, 4], distance)
    assert clusters.converged
    np.testing.assert_array_equal(clusters.labels, group)


def test_kmeans_stops_at_max_iters() -> None:
    points = partition.signatures(marks(5, tokens=40, width=24, k_a=6), 24)
    once = partition.balanced_kmeans(points, np.arange(4), [6] * 4, "l2", max_iters=1)
    assert once.iterations == 1
    assert not once.converged
    np.testing.assert_allclose(once.centroids, partition.means(points, once.labels, 4))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_representative_is_the_nearest_member_of_its_own_cluster(seed: int) -> None:
    points = partition.signatures(marks(seed, tokens=25, width=15, k_a=5), 15)
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(3), 5))
    centroids = partition.means(points, labels, 3)
    chosen = partition.representatives(points, labels, centroids)
    assert labels[chosen].tolist() == [0, 1, 2]
    cost = partition.distances(points, centroids, "l2")
    for e, neuron in enumerate(chosen):
        assert cost[neuron, e] == cost[labels == e, e].min()


@given(width=st.integers(12, 400), experts=st.integers(2, 12), data=st.data())
def test_uneven_widths_drop_no_neuron(width: int, experts: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, experts - 1))
    shared_width, widths = partition.group_widths(width, shared, experts, "uneven")
    assert shared_width + sum(widths) == width
    assert len(widths) == experts - shared
    assert 1 <= min(widths) <= max(widths) <= min(widths) + 1
    if width % experts == 0:
        assert shared_width == shared * width // experts
        assert set(widths) == {width // experts}


def test_indivisible_width_is_refused_without_padding() -> None:
    with pytest.raises(MoEdgeError, match=r"1537 does not divide into 16 experts; .*padding: uneven"):
        partition.group_widths(1537, 6, 16)


@pytest.mark.parametrize("padding", ["none", "uneven"])
def test_an_expert_without_a_neuron_is_refused(padding: partition.Padding) -> None:
    with pytest.raises(MoEdgeError, match="17 experts are more than the FFN's 16 neurons; choose fewer"):
        partition.group_widths(16, 2, 17, padding)


def test_rate_order_breaks_ties_by_index() -> None:
    assert partition.by_rate(np.array([1, 3, 3, 0, 5])).tolist() == [4, 1, 2, 0, 3]
