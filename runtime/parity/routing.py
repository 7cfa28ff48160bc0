"""How often two engines chose the same experts, and whether a router's choice was right for what it read.

Symbols: T tokens, E experts, k of them chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.parity.figures import RouterFacts, Routing
from moedge.runtime.parity.metrics import distance, mean


def _shared(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """How many experts [T] two choices [T, k] have in common."""
    found: np.ndarray = (one[:, :, None] == two[:, None, :]).any(2).sum(1)
    return found


def same_sets(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Whether two choices [T, k] are the same set of experts: bool [T]."""
    found: np.ndarray = _shared(one, two) == one.shape[1]
    return found


@dataclass
class RouteAgreement:
    """Expert sets of both engines, counted per layer as [tokens, tokens with the same set, shared picks, picks]."""

    counts: dict[int, np.ndarray] = field(default_factory=dict)
    reason: str = ""

    def add(self, reference: dict[int, np.ndarray] | None, test: dict[int, np.ndarray] | None) -> np.ndarray | None:
        """Count one step: int32 [T, k] per layer and engine; bool [T], whether any layer chose another set."""
        if not reference or not test:
            self.reason = f"the {'reference' if not reference else 'test'} engine returned no routes"
            return None
        if reference.keys() != test.keys():
            odd = sorted(reference.keys() ^ test.keys())[0]
            raise MoEdgeError(f"Layer {odd} is routed in one engine only: these are not the same model.")
        changed: np.ndarray | None = None
        for layer, one in reference.items():
            two = test[layer]
            if one.shape != two.shape:
                raise MoEdgeError(
                    f"Layer {layer} selects {one.shape[1]} experts in the reference, {two.shape[1]} in the test engine."
                )
            shared = _shared(one, two)
            other = shared != one.shape[1]
            changed = other if changed is None else changed | other
            counted = [len(one), int((~other).sum()), int(shared.sum()), one.size]
            self.counts[layer] = self.counts.get(layer, np.zeros(4, dtype=np.int64)) + counted
        return changed

    def summary(self) -> Routing:
        """Agreement as sets: overall, the worst layer, and every layer."""
        if not self.counts or self.reason:
            return {"compared": False, "reason": self.reason or "nothing was run"}
        layers = {
            str(layer): {"agreement": same / tokens, "flips": tokens - same, "overlap": shared / picks}
            for layer, (tokens, same, shared, picks) in sorted(
                (layer, count.tolist()) for layer, count in self.counts.items()
            )
        }
        tokens, same, shared, picks = np.sum(list(self.counts.values()), axis=0).tolist()
        worst = min(layers, key=lambda layer: layers[layer]["agreement"])
        return {
            "compared": True,
            "decisions": tokens,
            "flips": tokens - same,
            "agreement": same / tokens,
            "overlap": shared / picks,
            "worst_layer": int(worst),
            "worst_agreement": layers[worst]["agreement"],
            "layers": layers,
        }


@dataclass
class RouterChoices:
    """Whether an engine's routers chose right for what they read, judged by the reference's scores on the same input.

    A choice is right when no expert that was left out scores higher than one that was taken by more than ``margin``
    times the layer's largest score: closer scores tie, and either is right.
    """

    margin: float
    gaps: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """By layer float64 [T]: the best score left out less the worst one taken; infinite for what is no choice of k."""
    changed: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """By layer bool [T]: another set than the k best of the reference's scores, ties to the lower index."""
    largest: dict[int, float] = field(default_factory=dict)
    errors: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """By layer float64 [T]: |a - b| / |a| of what the routers read, a in the reference, b in the engine."""
    ordered: list[int] | None = None
    """Decisions seen beside the engine's own scores, and those that are the k best of them."""

    def add(
        self,
        reference: dict[int, np.ndarray],
        routes: dict[int, np.ndarray],
        own: dict[int, np.ndarray] | None,
    ) -> None:
        """Count one step: scores [T, E] of the reference, experts [T, k] that the engine chose, its own scores [T, E].

        Raises:
            MoEdgeError: a layer is routed in one engine only, or an index names no expert.
        """
        if reference.keys() != routes.keys():
            odd = sorted(reference.keys() ^ routes.keys())[0]
            raise MoEdgeError(f"Layer {odd} is routed in one engine only: these are not the same model.")
        for layer, scores in reference.items():
            chosen = routes[layer]
            if chosen.min() < 0 or chosen.max() >= scores.shape[1]:
                raise MoEdgeError(f"Layer {layer} of the test engine names an expert that it does not have.")
            experts = taken(chosen, scores.shape[1])
            self.gaps.setdefault(layer, []).append(gap(scores, chosen))
            self.changed.setdefault(layer, []).append((experts != _best_taken(scores, chosen.shape[1])).any(1))
            self.largest[layer] = max(self.largest.get(layer, 0.0), float(np.abs(scores).max()))
            if own is not None:
                right = (experts == _best_taken(own[layer], chosen.shape[1])).all(1)
                before = self.ordered or [0, 0]
                self.ordered = [before[0] + len(right), before[1] + int(right.sum())]

    def add_inputs(self, reference: dict[int, np.ndarray] | None, test: dict[int, np.ndarray]) -> None:
        """Compare what the routers read, float32 [T, H] by layer, the reference under the engine's choices."""
        for layer, one in (reference or {}).items():
            self.errors.setdefault(layer, []).append(distance(one, test[layer]))

    def wrong(self) -> np.ndarray:
        """Count the layers with a wrong choice, int64 [T]: no tie by the reference's scores."""
        beyond = [
            np.concatenate(parts) > self.margin * self.largest[layer] for layer, parts in sorted(self.gaps.items())
        ]
        return np.sum(beyond, axis=0) if beyond else np.zeros(0, dtype=np.int64)

    def summary(self) -> RouterFacts:
        """``flips``: other sets than the reference's router selects; ``ties`` of them tie with it, which is right."""
        if not self.gaps:
            return {"compared": False, "reason": "nothing was run"}
        layers, decisions, flips, wrong = {}, 0, 0, 0
        for layer, parts in sorted(self.gaps.items()):
            changed = np.concatenate(self.changed[layer])
            beyond = np.concatenate(parts) > self.margin * self.largest[layer]
            layers[str(layer)] = {
                "agreement": float(1 - beyond.mean()),
                "flips": int(changed.sum()),
                "ties": int((changed & ~beyond).sum()),
            }
            decisions, flips, wrong = decisions + len(beyond), flips + int(changed.sum()), wrong + int(beyond.sum())
        worst = min(layers, key=lambda layer: layers[layer]["agreement"])
        errors = [mean(np.concatenate(parts)) for parts in self.errors.values()]
        return {
            "compared": True,
            "decisions": decisions,
            "flips": flips,
            "ties": flips - wrong,
            "agreement": 1 - wrong / decisions,
            "worst_layer": int(worst),
            "worst_agreement": layers[worst]["agreement"],
            "layers": layers,
            "own_order": self.ordered[1] / self.ordered[0] if self.ordered else None,
            "input_rel_error": max(errors) if errors else None,
        }


@dataclass
class Leads:
    """By how much a router's choices were clear: what is kept of its scores where they are too many."""

    found: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """By layer float64 [T]: the worst score taken less the best one left out; infinite where none was left out."""
    largest: dict[int, float] = field(default_factory=dict)

    def add(self, scores: dict[int, np.ndarray], routes: dict[int, np.ndarray]) -> None:
        """Count one step: by layer scores [T, E] and the experts [T, k] that were chosen by them."""
        for layer, each in scores.items():
            self.found.setdefault(layer, []).append(-gap(each, routes[layer]))
            self.largest[layer] = max(self.largest.get(layer, 0.0), float(np.abs(each).max()))

    def shares(self) -> dict[int, np.ndarray]:
        """By layer float32 [T]: the same of the layer's largest score."""
        tiny = np.finfo(np.float64).tiny
        return {
            layer: (np.concatenate(parts) / max(self.largest[layer], tiny)).astype(np.float32)
            for layer, parts in self.found.items()
        }


def taken(chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """Experts [T, k] as bool [T, E]."""
    found = np.zeros((len(chosen), num_experts), dtype=bool)
    np.put_along_axis(found, chosen.astype(np.int64), True, axis=1)
    return found


def gap(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How much the best expert that was left out scores above the worst taken, float64 [T]; infinite: no choice of k.

    Args:
        scores: [T, E]. chosen: experts [T, k].
    """
    wide, experts = scores.astype(np.float64), taken(chosen, scores.shape[1])
    found: np.ndarray = np.where(experts, -np.inf, wide).max(1) - np.where(experts, wide, np.inf).min(1)
    found[(experts.sum(1) != chosen.shape[1]) | np.isnan(found)] = np.inf
    return found


def _best_taken(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best of scores [T, E], ties to the lower index, as bool [T, E]."""
    return taken(np.argsort(-scores, axis=1, kind="stable")[:, :k], scores.shape[1])
