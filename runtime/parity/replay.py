"""Route replay: one comparison of a sparse model, taken apart into its arithmetic and its choices.

A sparse model is a chain of decisions. Where two experts score nearly the same, a rounding error far below any limit
changes the choice, and everything after it. The distance of two free-running engines then says how steady the *model*
is, not whether the engine computes it. So the engine runs once, and these questions are asked about that run:

* arithmetic: the reference runs on the same tokens with the experts that the engine chose, token by token and layer by
  layer; their weights follow the layer's rule from the reference's own scores. Both compute the same composition of
  products, so the distance is the error of the arithmetic alone and the limits that are derived for a model without
  decisions hold.
* router: the reference's router reads what the engine's router read, and the engine must have selected the k best of
  the reference's scores. No rounding before the router enters, so the limit is that of two float32 routers on one
  input. Scores that tie leave more than one right answer, and ties are common: an activation is 0, or a last bit away
  from it, for every strongly negative input. So a choice is right when no expert that was left out scores higher than
  one that was taken by more than ``router_tie_margin`` of the layer's largest score, by which two float32 routers
  differ.
  The margin excuses no wrong order of ties: where the engine shows its own scores, its choice must be exactly the k
  best of those, ties to the lower index, which no rounding touches.

* kept: where a model leaves small values out (docs/gather.md) the set of values that are kept is a decision, too. The
  reference multiplies each value by the factor that *its* thresholds give for the value that the engine shows: 0 or 1,
  and on a ramp what lies between. No rounding enters the comparison of two float32 numbers, so what the engine kept
  must be exactly that, up to the rounding of one product; and what it kept from must be what the reference's FFN reads.
  Any two of a model's thousands of values a token that lie at their thresholds make both run apart, so every window
  is replayed.

By induction over layers and tokens they say that the engine is the model up to rounding: its choices are the right
ones for its own stream, and its stream is the right one for its choices. "Its own stream" is no matter of trust: what
its router read must be what the reference's router reads under the same choices (``inputs``).

A window of text in which both chose the same experts everywhere needs no second run: replay would hand the reference
the choices that it made anyway, and every choice is right that the reference makes, too. So float32 engines, which
rarely choose otherwise, run free first, and :meth:`Replay.alike` takes over a window without changed choices as it is;
only the others are run again. The verdict is that of a replay of every window, the figures up to the order in which
experts are summed.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from typing_extensions import TypedDict

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.export.manifest import GatherPlace
from moedge.runtime.engines import ReplayEngine, Step
from moedge.runtime.parity.figures import Phases, Replayed
from moedge.runtime.parity.kept import KeptChoices
from moedge.runtime.parity.metrics import At, TokenErrors
from moedge.runtime.parity.routing import RouterChoices


class Choices(TypedDict, total=False):
    """What the reference is told."""

    experts: dict[int, np.ndarray] | None
    factors: dict[GatherPlace, np.ndarray]


class Replay:
    """Collects both answers while an engine runs.

    Args:
        reference: engine opened with ``replay=True`` and ``taps=True``.
        limits: for its margins.
    """

    def __init__(self, reference: ReplayEngine, limits: Profile) -> None:
        self._reference = reference
        self.phases = TokenErrors.by_phase(limits)
        self._router = RouterChoices(limits.router_tie_margin)
        self._kept = KeptChoices()
        self._step: Step | None = None
        self._places: list[At] = []
        self.tokens = 0
        """How many were run under the engine's choice; the others were taken over."""

    def wrong_choice(self) -> At | None:
        """Return where the engine's routers chose wrong in most layers; None: nowhere."""
        wrong = self._router.wrong()
        return self._places[int(wrong.argmax())] if wrong.any() else None

    def add(self, phase: str, ids: np.ndarray, test: Step, targets: np.ndarray, at: At = (0, 0)) -> None:
        """Replay one step (:meth:`step`) and compare its logits.

        ``ids`` stand at ``at``, ``targets`` int64 [S] follow them.
        """
        one = self.step(phase, ids, test)
        self.phases[phase].add(one.logits[0], test.logits[0], targets, at=at)
        if test.routes is not None:
            self._places += [(at[0], at[1] + row) for row in range(ids.size)]

    def step(self, phase: str, ids: np.ndarray, test: Step) -> Step:
        """Replay one step of the engine, ``ids`` int64 [1, S] were fed, and judge its choices.

        Returns:
            The reference's step under them.

        Raises:
            MoEdgeError: the engine was opened without ``taps`` or ``router_inputs``, or shows no router inputs [T, H].
        """
        model, routed = self._reference.info.model, test.routes is not None and test.router_inputs is not None
        if not (routed or (not model.routed and test.kept is not None)):
            raise MoEdgeError("Route replay needs the engine's choices; open it with taps and router_inputs.")
        routes, read_by = test.routes or {}, test.router_inputs or {}
        for layer, read in read_by.items():
            if read.ndim != 2 or len(read) != len(routes[layer]):
                raise MoEdgeError(
                    f"What the engine calls the input of layer {layer}'s router has shape {read.shape}, not one row "
                    f"for each of {len(routes[layer])} tokens; export it again."
                )
        shown = test.left_out_of or {}
        choices: Choices = {"experts": routes if routed else None}
        if shown:
            choices["factors"] = self._reference.factors(shown)
        if phase == "prefill":
            self._step = self._reference.prefill(ids, **choices)
        else:
            assert self._step is not None
            self._step = self._reference.decode(ids, self._step.cache, **choices)
        if routed:
            self._router.add(self._reference.scores(read_by), routes, test.scores)
            self._router.add_inputs(self._step.router_inputs, read_by)
        if shown:
            own = self._step.left_out_of or {}
            self._kept.add(shown, test.kept or {}, choices["factors"], own, self._reference.factors(own))
        self.tokens += ids.size
        return self._step

    def alike(self, phases: dict[str, TokenErrors]) -> None:
        """Take over what was measured on a window in which the engine and the reference chose the same experts."""
        for name, tokens in phases.items():
            self.phases[name].extend(tokens)

    def summary(self) -> Replayed:
        """``phases`` and ``overall`` as in :func:`moedge.runtime.parity.compare`, ``router``, ``kept``, ``tokens``."""
        found: Replayed = {
            "tokens": self.tokens,
            "phases": cast("Phases", {name: tokens.summary() for name, tokens in self.phases.items()}),
            "overall": TokenErrors.merged(list(self.phases.values())).summary(),
            "router": self._router.summary(),
        }
        if self._kept.counts:
            found["kept"] = self._kept.summary()
        return found
