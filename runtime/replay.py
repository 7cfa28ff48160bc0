"""Route replay: one comparison of a sparse model, taken apart into its arithmetic and its router.

A sparse model is a chain of decisions. Where two experts score nearly the same, a rounding error far below any limit
changes the choice, and everything after it. The distance of two free-running engines then says how steady the *model*
is, not whether the engine computes it. So the engine runs once, and two questions are asked about that run:

* arithmetic: the reference runs on the same tokens with the experts that the engine chose, token by token and layer by
  layer; their weights follow the layer's rule from the reference's own scores. Both compute the same composition of
  products, so the distance is the error of the arithmetic alone and the limits that are derived for a model without
  decisions hold.
* router: the reference's router reads what the engine's router read and must select the same experts. No rounding
  before the router enters, so the limit is that of two float32 routers on one input.

By induction over layers and tokens the two say that the engine is the model up to rounding: its choices are the right
ones for its own stream, and its stream is the right one for its choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.runtime.engines import ReplayEngine, Step
from moedge.runtime.reduction import RouteAgreement, TokenErrors


class Replay:
    """Collects both answers while an engine runs.

    Args:
        reference: engine opened with ``replay=True`` and ``taps=True``.
        limits: for its near-tie margin.
    """

    def __init__(self, reference: ReplayEngine, limits: Profile) -> None:
        self._reference = reference
        self._phases = TokenErrors.by_phase(limits)
        self._router = RouteAgreement()
        self._step: Step | None = None

    def add(self, phase: str, ids: np.ndarray, test: Step, targets: np.ndarray) -> None:
        """Replay one step of the engine: ``ids`` int64 [1, S] were fed, ``targets`` int64 [S] follow them.

        Raises:
            MoEdgeError: the engine was opened without ``taps`` or ``router_inputs``, or shows no router inputs [T, H].
        """
        if test.routes is None or test.router_inputs is None:
            raise MoEdgeError("Route replay needs the engine's choices; open it with taps and router_inputs.")
        for layer, read in test.router_inputs.items():
            if read.ndim != 2 or len(read) != len(test.routes[layer]):
                raise MoEdgeError(
                    f"What the engine calls the input of layer {layer}'s router has shape {read.shape}, not one row "
                    f"for each of {len(test.routes[layer])} tokens; export it again."
                )
        if phase == "prefill":
            self._step = self._reference.prefill(ids, experts=test.routes)
        else:
            assert self._step is not None
            self._step = self._reference.decode(ids, self._step.cache, experts=test.routes)
        self._phases[phase].add(self._step.logits[0], test.logits[0], targets)
        self._router.add(self._reference.choose(test.router_inputs), test.routes)

    def summary(self) -> dict[str, Any]:
        """``phases`` and ``overall`` as in :func:`moedge.runtime.parity.compare`, and ``router``, its agreement."""
        return {
            "phases": {name: tokens.summary() for name, tokens in self._phases.items()},
            "overall": TokenErrors.merged(list(self._phases.values())).summary(),
            "router": self._router.summary(),
        }
