"""Choose shared neurons and cut the rest into balanced groups.

D neurons, q calibration tokens, E routed experts. A neuron's *activation signature* is its row of the binary matrix
[D, q] that marks the tokens for which it was among the K_a largest ``|h|`` (CMoE sec. 3.1, "ATopK"). The matrix holds
K_a ones a token, so it is kept sparse; every distance below comes from one sparse-dense product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moedge import MoEdgeError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Distance = Literal["l2", "l1"]
Padding = Literal["none", "uneven"]


_SQUARE = 2048
"""Most points that are assigned as a square problem; importing the other solver costs more than it saves there."""


def signatures(top_neurons: np.ndarray, width: int) -> csr_matrix:
    """Return the ATopK marks as a sparse 0/1 float64 matrix [D, q].

    Args:
        top_neurons: integer [q, K_a], distinct within a row.
        width: D.
    """
    from scipy.sparse import csr_matrix

    tokens, k_a = top_neurons.shape
    columns = np.repeat(np.arange(tokens, dtype=np.int32), k_a)
    rows = top_neurons.reshape(-1).astype(np.int32)
    return csr_matrix((np.ones(rows.size), (rows, columns)), shape=(width, tokens))


def kept_width(width: int, keep: float) -> int:
    """Return the neurons that stay of ``width``: the nearest whole number, at least one."""
    return max(round(keep * width), 1)


def flap(down: np.ndarray, mean: np.ndarray, variance: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``width`` neurons that FLAP keeps, int32 ascending, and the bias that stands for the others [H].

    FLAP (arXiv 2312.11983, "WIFV") scores ``variance_j * |W_down[:, j]|^2``; a dropped neuron is replaced by its mean.

    Args:
        down: float32 [H, D].
        mean: of h over the calibration tokens [D]; ``variance`` likewise.
    """
    score = variance.astype(np.float64) * np.square(down, dtype=np.float64).sum(axis=0)
    return keep_with_bias(down, mean, score, width)


def keep_with_bias(down: np.ndarray, mean: np.ndarray, score: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``width`` neurons of the highest score, int32 ascending, and a bias [H] for the others.

    The bias is ``sum over dropped j of mean_j W_down[:, j]``. Ties keep the lower index, so the width is exact.
    """
    order = np.argsort(-score, kind="stable")
    dropped = np.sort(order[width:])
    bias = down[:, dropped].astype(np.float64) @ mean[dropped].astype(np.float64)
    return np.sort(order[:width]).astype(np.int32), bias.astype(np.float32)


def by_rate(marks: np.ndarray) -> np.ndarray:
    """Return neuron indices by decreasing activation count, ties to the lower index."""
    return np.argsort(-marks.astype(np.int64), kind="stable")


def group_widths(width: int, shared: int, experts: int, padding: Padding = "none") -> tuple[int, list[int]]:
    """Return the neurons of the shared block and of each routed expert for the layout S(shared) of E(experts).

    With ``padding="uneven"`` a width that does not divide gives routed experts that differ by one neuron (they are
    zero-padded to the widest when the plan is applied); no neuron is dropped.

    Raises:
        MoEdgeError: the width does not divide and no padding was chosen, or some expert would have no neuron.
    """
    if width < experts:
        raise MoEdgeError(f"{experts} experts are more than the FFN's {width} neurons; choose fewer.")
    if width % experts and padding == "none":
        raise MoEdgeError(
            f"FFN width {width} does not divide into {experts} experts; choose a divisor or set padding: uneven."
        )
    shared_width = round(width * shared / experts)
    routed = experts - shared
    quotient, remainder = divmod(width - shared_width, routed)
    return shared_width, [quotient + 1] * remainder + [quotient] * (routed - remainder)


def distances(points: csr_matrix | np.ndarray, centroids: np.ndarray, distance: Distance) -> np.ndarray:
    """Return the distance of each point [n, q] to each centroid [E, q] as float64 [n, E].

    A sparse matrix holds 0/1 signatures. For a binary c and a centroid z in [0, 1]: ``|c - z|_1 = |c| + |z|_1 - 2 c.z``
    and ``|c - z|_2^2 = |c| + |z|_2^2 - 2 c.z``, where ``|c|`` counts the ones. Any other points are a dense array, for
    which there is ``l2`` only.
    """
    if isinstance(points, np.ndarray):
        if distance != "l2":
            raise ValueError("the distance of dense points is l2")
        return np.sqrt(squared_distances(points, centroids))
    ones = np.diff(points.indptr)[:, None].astype(np.float64)
    product = points @ centroids.T
    if distance == "l1":
        return np.maximum(ones + centroids.sum(axis=1) - 2 * product, 0)
    return np.sqrt(np.maximum(ones + np.square(centroids).sum(axis=1) - 2 * product, 0))


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return squared Euclidean distances [n, E] of dense points [n, q] to centroids [E, q]."""
    squares = np.square(points).sum(axis=1)[:, None] + np.square(centroids).sum(axis=1)
    result: np.ndarray = np.maximum(squares - 2 * (points @ centroids.T), 0)
    return result


def assign_balanced(cost: np.ndarray, widths: list[int]) -> np.ndarray:
    """Give each point to one group so that group e holds exactly ``widths[e]`` points and the total cost is least.

    Up to :data:`_SQUARE` points each group's column is repeated once per slot, and the square assignment problem is
    solved by the modified Jonker-Volgenant algorithm (CMoE sec. 3.2). Beyond, that matrix [n, n] takes gigabytes and
    rows that are equal (dead neurons) minutes, and :func:`assign_transport` finds the same optimum.

    Args:
        cost: [n, E] with n = sum(widths).

    Returns:
        int32 [n], the group of each point.

    Raises:
        MoEdgeError: the solver gave up.
    """
    from scipy.optimize import linear_sum_assignment

    if len(cost) > _SQUARE:
        return assign_transport(cost, widths)
    group_of_slot = np.repeat(np.arange(len(widths), dtype=np.int32), widths)
    _, slots = linear_sum_assignment(cost[:, group_of_slot])
    return group_of_slot[slots]


def assign_transport(cost: np.ndarray, widths: list[int]) -> np.ndarray:
    """Solve the problem of :func:`assign_balanced` as a transport problem [n, E], without a column per slot.

    The network simplex is exact, and its vertices are whole numbers, as supplies and demands are. It takes a tenth of
    the time of the square problem at n = 1,344, E = 56; where optima tie, the two may choose differently.

    Raises:
        MoEdgeError: the solver gave up.
    """
    import ot

    sizes = np.asarray(widths, dtype=np.float64)
    # Negative costs make POT's simplex report a feasible problem as infeasible; a shift changes no choice.
    shifted = cost.astype(np.float64) - cost.min()
    flow, log = ot.emd(np.ones(len(cost)), sizes, shifted, numItermax=1_000_000_000, log=True)
    if log["warning"]:
        raise MoEdgeError(f"The assignment of {len(cost)} neurons to experts failed: {log['warning']}.")
    return flow.argmax(axis=1).astype(np.int32)


def assign_greedy(cost: np.ndarray, widths: list[int]) -> np.ndarray:
    """Like :func:`assign_balanced`, but greedy: the cheapest (point, group) pair with a free slot first, and so on.

    Ties go to the lower point, then the lower group. The pairs are not walked one by one: as points and groups both
    prefer the cheaper pair, the greedy result is their only stable matching, which deferred acceptance finds in rounds
    (every point asks its next best group, a group keeps the cheapest that fit and turns the rest away).

    Args:
        cost: [n, E] with n = sum(widths).

    Returns:
        int32 [n], the group of each point.
    """
    n, groups = cost.shape
    rank = np.empty(n * groups, dtype=np.int64)
    rank[np.argsort(cost, axis=None, kind="stable")] = np.arange(n * groups)
    rank = rank.reshape(n, groups)
    preference = np.argsort(rank, axis=1).astype(np.int32)
    refusals = np.zeros(n, dtype=np.int64)
    points, capacity = np.arange(n), np.asarray(widths)
    while True:
        asked = preference[points, refusals]
        order = np.lexsort((rank[points, asked], asked))
        sorted_groups = asked[order]
        place = points - np.searchsorted(sorted_groups, sorted_groups)
        refused = order[place >= capacity[sorted_groups]]
        if not refused.size:
            return asked
        refusals[refused] += 1


@dataclass
class Clusters:
    """Result of :func:`balanced_kmeans`: ``labels`` int32 [n], ``centroids`` float64 [E, q] (means of the members)."""

    labels: np.ndarray
    centroids: np.ndarray
    iterations: int
    converged: bool


def balanced_kmeans(
    points: csr_matrix | np.ndarray,
    initial: np.ndarray,
    widths: list[int],
    distance: Distance = "l2",
    max_iters: int = 20,
) -> Clusters:
    """Balanced K-means on signatures [n, q] (CMoE sec. 3.2): assign, update the means, until nothing moves.

    Dense points are clustered in the same way; see :func:`distances`.

    Args:
        initial: indices of the E points that are the first centroids.
        widths: points in each group.
        max_iters: most assignments; 1 is what CMoE's released code does.
    """
    chosen: Any = points[initial]
    centroids = np.asarray(chosen if isinstance(chosen, np.ndarray) else chosen.todense(), dtype=np.float64)
    labels = np.full(points.shape[0], -1, dtype=np.int32)
    converged = False
    for iteration in range(1, max_iters + 1):  # noqa: B007
        updated = assign_balanced(distances(points, centroids, distance), widths)
        converged = bool(np.array_equal(updated, labels))
        if converged:
            break
        labels = updated
        centroids = means(points, labels, len(widths))
    return Clusters(labels, centroids, iteration, converged)


def means(points: csr_matrix | np.ndarray, labels: np.ndarray, groups: int) -> np.ndarray:
    """Return the mean signature of each group, float64 [E, q]."""
    from scipy.sparse import csr_matrix

    n = len(labels)
    member = csr_matrix((np.ones(n), (labels, np.arange(n))), shape=(groups, n))
    counts = np.bincount(labels, minlength=groups)[:, None]
    sums: Any = member @ points
    return np.asarray((sums if isinstance(sums, np.ndarray) else sums.toarray()) / np.maximum(counts, 1))


def representatives(
    points: csr_matrix | np.ndarray, labels: np.ndarray, centroids: np.ndarray, distance: Distance = "l2"
) -> np.ndarray:
    """Return the member of each group nearest to its centroid (CMoE sec. 3.3), ties to the lower index."""
    cost = distances(points, centroids, distance)
    cost[labels[:, None] != np.arange(len(centroids))] = np.inf
    return np.argmin(cost, axis=0)
