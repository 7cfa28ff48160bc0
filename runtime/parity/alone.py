"""Each layer by itself: an engine that runs under the stream of a kept reference (:mod:`.against` says why)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moedge.configs.tolerances import Profile
from moedge.export.graph.layers import LayerPoint
from moedge.runtime.engines import LayerEngine, Step
from moedge.runtime.parity import shortened
from moedge.runtime.parity.figures import LayerErrors, LayersFacts
from moedge.runtime.parity.metrics import TokenErrors, distance, mean
from moedge.runtime.parity.reference import Probe, Reference, probing
from moedge.runtime.parity.routing import RouterChoices, same_sets
from moedge.runtime.parity.verdict import Check

PHASES: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
_LEAST = 1 / 20
"""Share of the stream that a layer is taken to add at least: what rounding of the stream itself leaves is no error of a
layer that adds less (a token with a massive activation, arXiv 2402.17762)."""


@dataclass
class Alone:
    """The engine on the probe, under the reference's stream."""

    errors: dict[str, list[list[np.ndarray]]]
    """Phase -> layer -> per step, of the tokens of the same choice."""
    head: TokenErrors
    router: RouterChoices
    embedding: list[np.ndarray] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)

    @classmethod
    def nothing(cls, probe: Probe, limits: Profile) -> Alone:
        """Nothing yet."""
        layers = len(probe.streams) - 1
        head = TokenErrors(limits.near_tie_margin, limits.near_tie_scale)
        # A tie is told by the largest score of the whole probe, however little of it is read.
        largest = {layer: float(np.abs(scores).max()) for layer, scores in probe.scores.items()}
        router = RouterChoices(tie_margin(limits), largest=largest)
        return cls({phase: [[] for _ in range(layers)] for phase in PHASES}, head, router)

    @classmethod
    def of(cls, reference: Reference, engine: LayerEngine, limits: Profile) -> Alone:
        """Run the probe; ``engine`` was opened to be given the stream, and with ``taps`` if it is routed."""
        probe, facts = reference.probe, reference.facts
        found = cls.nothing(probe, limits)
        cache: Any = None
        for phase, rows, ids, targets in probing(reference.windows[0], facts.probe, facts.probe_prefill):
            given = streams_at(probe, rows)
            prefill = phase == "prefill"
            step = engine.prefill(ids, given=given) if prefill else engine.decode(ids, cache, given=given)
            cache = step.cache
            found.add(phase, probe, step, rows, targets)
        return found

    def add(self, phase: str, probe: Probe, step: Step, rows: slice, targets: np.ndarray) -> None:
        """Compare one step of one row, which read the tokens ``rows`` of the probe; ``targets`` int64 [n] follow."""
        streams = [stream[rows] for stream in probe.streams.values()]
        same = self._routed(probe, step, rows)
        shown = [each for _, each in sorted((step.layers or {}).items())]
        self.embedding.append(distance(streams[0], shown[0]))
        for layer, found in enumerate(self.errors[phase]):
            error = _layer_error(shown[layer + 1], streams[layer + 1], streams[layer])
            found.append(error[same[layer]] if layer in same else error)
        shortened.add(self.head, probe.answers.rows(rows), step.logits[0], targets, at=(0, rows.start))

    def _routed(self, probe: Probe, step: Step, rows: slice) -> dict[int, np.ndarray]:
        """Judge the routers of one step; return by layer which tokens [T] have the reference's experts."""
        if not probe.routes or not step.routes:
            return {}
        same = {layer: same_sets(found[rows], step.routes[layer]) for layer, found in probe.routes.items()}
        for layer, equal in same.items():
            self.changed[layer] = self.changed.get(layer, 0) + int((~equal).sum())
        if probe.scores:
            self.router.add({layer: found[rows] for layer, found in probe.scores.items()}, step.routes, step.scores)
        return same

    def summary(self) -> LayersFacts:
        """See :class:`moedge.runtime.parity.results.LayersFacts`."""
        by_phase = {phase: [np.concatenate(parts) for parts in found] for phase, found in self.errors.items()}
        layers: dict[str, LayerErrors] = {}
        for layer, (one, two) in enumerate(zip(*by_phase.values(), strict=True)):
            errors: LayerErrors = {
                "prefill": mean(one),
                "decode": mean(two),
                "max": float(np.max(np.append(one, two), initial=0.0)),
            }
            if layer in self.changed:
                errors["changed"] = self.changed[layer]
            layers[str(layer)] = errors
        worst = {name: np.max([each["prefill"], each["decode"]]) for name, each in layers.items()}  # NaN is the worst
        last = max(worst, key=lambda name: np.inf if np.isnan(worst[name]) else worst[name], default=None)
        return {
            "tokens": self.head.tokens,
            "embedding_rel_error": mean(np.concatenate(self.embedding)),
            "layers": layers,
            "worst_layer": None if last is None else int(last),
            "worst_rel_error": float("nan") if last is None else float(worst[last]),
            "router": self.router.summary(),
            "head": self.head.summary(),
        }


def tie_margin(limits: Profile) -> float:
    """Scores of a router tie that are closer than this times the layer's largest score, where the inputs of two engines
    are equal up to the rounding of a layer: each of the two scores takes that, and routers round besides."""
    return limits.router_tie_margin + 2 * (limits.layer_rel_error or 0.0)


def streams_at(probe: Probe, rows: slice | np.ndarray) -> dict[LayerPoint, np.ndarray]:
    """What layers are given for some tokens of the probe."""
    return {(layer, "stream"): stream[rows] for layer, stream in enumerate(probe.streams.values())}


def _layer_error(shown: np.ndarray, right: np.ndarray, before: np.ndarray) -> np.ndarray:
    """|a - b| [T] of what a layer adds to streams [T, H], of the size of what the reference's layer adds."""
    wide = right.astype(np.float64)
    added, least = np.linalg.norm(wide - before, axis=1), np.linalg.norm(wide, axis=1) * _LEAST
    size = np.maximum(np.maximum(added, least), np.finfo(np.float64).tiny)
    found: np.ndarray = np.linalg.norm(shown.astype(np.float64) - wide, axis=1) / size
    return found


def parts(layers: LayersFacts, limits: Profile, *, routed: bool) -> dict[str, tuple[Check, ...]]:
    """Hold what :meth:`Alone.summary` found to its limits: parts ``layers``, ``router`` and ``head`` of a verdict."""
    found: dict[str, tuple[Check, ...]] = {}
    if limits.layer_rel_error is not None:
        limit = limits.layer_rel_error
        rows = [("embedding", layers["embedding_rel_error"])]
        for phase in PHASES:
            errors = [layer[phase] for layer in layers["layers"].values()]
            rows.append((f"{phase}.rel_error", float(np.max(errors))))
        found["layers"] = tuple(Check(f"layers.{name}", value, "<=", limit) for name, value in rows)
    if routed:
        found["router"] = router_checks(layers, limits)
    head = layers["head"]
    found["head"] = (
        Check("head.non_finite_tokens", head["non_finite"], "<=", 0),
        Check("head.constant_tokens", head["constant"], "<=", 0),
        Check("head.rel_error.median", head["rel_error"]["p50"], "<=", limits.median_rel_error),
        Check("head.rel_error.mean", head["rel_error"]["mean"], "<=", limits.mean_rel_error),
    )
    return found


def router_checks(layers: LayersFacts, limits: Profile) -> tuple[Check, ...]:
    """Hold the choices of experts to what the reference's scores say of them."""
    router = layers["router"]
    least = limits.router_set_agreement or limits.expert_set_agreement or 0.0
    if router["compared"]:
        checks = [Check("router.expert_set_agreement", router.get("agreement"), ">=", least)]
        if router.get("own_order") is not None:
            checks.append(Check("router.own_order", router["own_order"], ">=", 1.0))
        return tuple(checks)
    # Without the reference's scores (experts inside experts) a tie looks like a fault, and rounding turns many.
    changed = [each["changed"] for each in layers["layers"].values() if "changed" in each]
    agreement = 1 - sum(changed) / (len(changed) * layers["tokens"]) if changed else None
    decided = limits.expert_set_agreement is not None
    return (Check("router.expert_set_agreement", agreement, ">=", least, decided=decided),)


def departing(layers: LayersFacts, limits: Profile) -> list[str]:
    """Say which layers are beyond their limit, in sentences."""
    limit = limits.layer_rel_error
    if limit is None:
        return []
    said = [] if layers["embedding_rel_error"] <= limit else ["The embedding is not the reference's."]
    each = layers["layers"].items()
    prefill, decode = ({layer for layer, errors in each if not errors[phase] <= limit} for phase in PHASES)
    found = sorted(prefill | decode, key=int)
    if not found:
        return said
    where = "when they prefill and when they decode"
    if not (prefill and decode):
        where = "when they prefill only" if prefill else "when they decode only: the cache, or what reads it"
    listed = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return [
        *said,
        f"Of {len(layers['layers'])} layers {len(found)} compute something else under the reference's own stream, "
        f"{where}: {listed}. Each is looked at by itself, so no other layer has a part in it.",
    ]
