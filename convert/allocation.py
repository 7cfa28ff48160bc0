"""One budget for all layers: of every layer's ways to be converted one is taken, so that together they lose least.

Each layer has a menu: what a way costs (bytes, milliseconds, active neurons: any unit, the same in all menus) and the
KL that it is estimated to lose. Losses of layers add up, as second-order estimates do. This is the multiple-choice
knapsack problem, solved as a mixed-integer linear program by HiGHS (``scipy.optimize.milp``); NVIDIA's Puzzle (arXiv
2411.19146) allocates whole blocks so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moedge import MoEdgeError

_GAP = 1e-6
"""The loss found is the least one, up to this part of it."""


@dataclass(frozen=True)
class Menu:
    """The ways to convert one layer: float64 [n] each."""

    costs: np.ndarray
    losses: np.ndarray

    def worth_taking(self) -> np.ndarray:
        """Return the ways that no other one beats in both, cheapest first, int64 [m]; of equal ones the first."""
        order = np.lexsort((self.losses, self.costs))
        lowest = np.minimum.accumulate(self.losses[order])
        better = np.append(True, lowest[1:] < lowest[:-1])
        return order[better]


def cheapest(menus: Sequence[Menu], most: float) -> list[int]:
    """Return the way of each layer, as number in its menu, with the least loss in all at a cost of at most ``most``.

    Raises:
        MoEdgeError: even the cheapest ways cost more.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    ways = [menu.worth_taking() for menu in menus]
    costs = [menu.costs[way] for menu, way in zip(menus, ways, strict=True)]
    least = sum(float(cost[0]) for cost in costs)
    room = most - least + 1e-12 * abs(most)  # sums of costs are rounded
    if room <= 0:
        raise MoEdgeError(f"The budget of {most:g} is less than {least:g}, what the cheapest choices cost together.")
    # What a way costs beyond the cheapest of its layer, as share of the room: the solver has absolute tolerances.
    extra = np.concatenate([cost - cost[0] for cost in costs]) / room
    losses = np.concatenate([menu.losses[way] for menu, way in zip(menus, ways, strict=True)])
    owner = np.repeat(np.arange(len(ways)), [len(way) for way in ways])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(ways), len(owner)))
    found = milp(
        losses / (np.abs(losses).max() or 1.0),
        integrality=np.ones(len(losses), dtype=np.int64),
        bounds=Bounds(0, np.where(extra > 1, 0.0, 1.0)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(extra[None], -np.inf, 1.0)],
        options={"mip_rel_gap": _GAP, "time_limit": 60.0},
    )
    if found.x is None:
        raise MoEdgeError(f"No allocation was found in a minute ({found.message}); make the menus shorter.")
    taken = [int(np.argmax(part)) for part in np.split(found.x, np.flatnonzero(np.diff(owner)) + 1)]
    return [int(way[number]) for way, number in zip(ways, taken, strict=True)]
