"""How far each part of an engine is off by itself: every part of the reference reads what the engine's part read.

An error anywhere changes everything after it, and where a model makes decisions (experts, values to keep) rounding does
so too. So the difference of two layers of two engines says little about the layer. Here the reference is given, at
every border between two parts (:mod:`moedge.export.graph.layers`), what the *engine* has there, and the experts and
values that it chose: one run of the reference then computes every part alone, and what remains of the difference is the
part's own. No threshold has to know how errors grow from layer to layer.

A part departs where its error alone is more than the target may have for the *whole* model:

* its median over the tokens beyond ``median_rel_error``, or its mean beyond ``mean_rel_error``: the limits on logits;
* one token beyond the error that would cost it ``max_kl`` if it reached the logits undiminished: KL = (e s)^2 / 2 with
  s = 4, the standard deviation of logits that the limits are derived for (configs/tolerances.yaml).

Norms and additions to the stream hold no quantised weight: the limits of the target without quantisation are theirs. A
router's choice is judged by its scores (``router_tie_margin``).

Where a target rounds coarsely a sum that cancels (attention over many tokens) is off by more than its terms, and the
same in all layers: what the same part has in the others tells a jump from that. With enough layers, and where the
typical one keeps the limit, a part departs only beyond six robust standard deviations of the others, too
(:func:`_beside_others`). Where no part departs, a layer may still stand out among them (:func:`standing_out`).

Errors are relative to the part's own output, |a - b| / |a| in the Euclidean norm, and of logits max|a - b| / max|a|.
Where a token's output is smaller than the typical one, to the typical one: a sum that cancels has no digits to lose.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moedge.configs.tolerances import Profile
from moedge.export.graph.layers import LayerPoint, Spot
from moedge.export.manifest import GatherPlace
from moedge.runtime.parity.results import PartName
from moedge.runtime.parity.routing import gap, taken

LOGITS_STD = 4.0
"""Standard deviation of logits under p that the limits on KL are derived for."""
_FEWEST_LAYERS = 6
"""Below that a spread over layers means nothing."""
_DEVIATIONS = 6.0
"""Robust standard deviations, as the margins of configs/tolerances.yaml have them."""

Kind = Literal["median", "mean", "largest"]


@dataclass
class Shown:
    """What an engine showed of one window of L tokens: its steps joined."""

    logits: np.ndarray
    """float32 [L, V]."""
    layers: dict[LayerPoint, np.ndarray]
    """float32 [L, H]."""
    routes: dict[int, np.ndarray] | None = None
    router_inputs: dict[int, np.ndarray] | None = None
    scores: dict[int, np.ndarray] | None = None
    left_out_of: dict[GatherPlace, np.ndarray] | None = None
    cached: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Keys and values by layer, float32 [L, G * D]: those of a prefill as they were behind it."""
    held: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """What the cache holds at the end."""


@dataclass(frozen=True)
class Allowed:
    """What a part may be off, relatively: the typical token, all on average, and any one."""

    median: float
    mean: float
    largest: float

    @classmethod
    def of(cls, limits: Profile) -> Allowed:
        """What the limits of a whole model leave to one part."""
        return cls(limits.median_rel_error, limits.mean_rel_error, math.sqrt(2 * limits.max_kl) / LOGITS_STD)

    @property
    def token(self) -> float:
        """Beyond which a token counts among those that depart."""
        return min(self.mean, self.largest)


@dataclass(frozen=True)
class Departure:
    """By what a part departs."""

    kind: Kind
    error: float
    limit: float


@dataclass(frozen=True)
class Part:
    """The error of one part, float64 [L]: one number a token, infinite where it alone gives no numbers."""

    layer: int | None
    part: PartName
    what: str
    values: np.ndarray
    allowed: Allowed

    def departs(self, rows: slice) -> Departure | None:
        """Return what is furthest beyond its limit in some of the tokens, or None where nothing is."""
        values = self.values[rows]
        if not len(values):
            return None
        with np.errstate(invalid="ignore"):
            found: list[tuple[Kind, float, float]] = [
                ("median", float(np.median(values)), self.allowed.median),
                ("mean", float(values.mean()), self.allowed.mean),
                ("largest", float(values.max()), self.allowed.largest),
            ]
        beyond = [each for each in found if each[1] > each[2]]
        return Departure(*max(beyond, key=lambda each: (each[1] / each[2], each[0] == "largest"))) if beyond else None

    @property
    def beyond(self) -> np.ndarray:
        """Tokens that depart, bool [L]."""
        return self.values > self.allowed.token


def relative(reference: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Errors float64 [L] of [L, H], relative to the reference's token or, where that is larger, the typical one."""
    a, b = reference.astype(np.float64), test.astype(np.float64)
    good, shown = np.isfinite(a).all(1), np.isfinite(b).all(1)
    errors = np.where(good & ~shown, np.inf, 0.0)  # what neither knows is the fault of a part before
    both = good & shown
    if both.any():
        sizes = np.linalg.norm(a[both], axis=1)
        scale = np.maximum(sizes, max(float(np.median(sizes)), np.finfo(np.float64).tiny))
        errors[both] = np.linalg.norm(a[both] - b[both], axis=1) / scale
    return errors


def relative_logits(reference: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Errors float64 [L] of logits [L, V]: max|a - b| / max|a| of each token."""
    errors = np.zeros(len(reference))
    for row, (a, b) in enumerate(zip(reference, test, strict=True)):  # row by row: a vocabulary is wide
        if np.isfinite(a).all():
            scale = max(float(np.abs(a).max()), float(np.finfo(np.float32).tiny))
            errors[row] = float(np.abs(a - b).max()) / scale if np.isfinite(b).all() else np.inf
    return errors


_ORDER = (
    *("attention_input", "keys", "values", "attention", "attention_normed", "middle"),
    *("ffn_input", "router", "ffn", "ffn_normed", "stream", "head_input", "logits"),
)
_WORDS: dict[Spot, tuple[PartName, str]] = {
    "attention_input": ("norm", "the norm before attention"),
    "attention": ("attention", "attention"),
    "attention_normed": ("norm", "the norm behind attention"),
    "middle": ("residual sum", "the sum of stream and attention"),
    "ffn_input": ("norm", "the norm before the FFN"),
    "ffn": ("FFN", "the FFN"),
    "ffn_normed": ("norm", "the norm behind the FFN"),
    "stream": ("residual sum", "the sum of stream and FFN"),
    "head_input": ("norm", "the last norm"),
}


def errors(shown: Shown, alone: Shown, limits: Profile, exact: Profile, own: Mapping[int, np.ndarray]) -> list[Part]:
    """Return the error of every part, in the order in which a model computes them.

    Args:
        shown: of the engine.
        alone: of the reference, each part of which was given what the engine's had.
        limits: of the engine. exact: of what holds no quantised weight.
        own: by layer the reference's scores float32 [L, E] for what the engine's routers read.

    What one of the two does not show is left out.
    """
    wide, narrow = Allowed.of(limits), Allowed.of(exact)
    last = max(layer for layer, _ in shown.layers)
    found: dict[tuple[int, int], Part] = {}

    def add(layer: int, value: str, part: PartName, what: str, values: np.ndarray) -> None:
        allowed = narrow if part in ("norm", "residual sum") else wide
        named = layer if 0 <= layer < last else None
        found[layer, _ORDER.index(value)] = Part(named, part, what, values, allowed)

    for (layer, spot), value in shown.layers.items():
        if (layer, spot) not in alone.layers:  # a graph may have a border that the other engine lacks
            continue
        values = relative(alone.layers[layer, spot], value)
        part, what = _WORDS[spot]
        if (layer, spot) == (0, "stream"):
            add(-1, spot, "embedding", "the embedding", values)
        elif spot == "ffn" and layer in (shown.routes or {}):
            add(layer, spot, "experts", "the experts", values)
        else:  # the stream that a layer reads is what the layer before left
            add(layer - (spot == "stream"), spot, part, what, values)
    for layer, pair in shown.cached.items():
        for what, mine, its in zip(("keys", "values"), alone.cached[layer], pair, strict=True):
            add(layer, what, "attention", f"the {what} in the cache", relative(mine, its))
    for layer, scores in own.items():
        found[layer, _ORDER.index("router")] = _router(layer, scores, shown, limits.router_tie_margin)
    add(last, "logits", "head", "the output projection", relative_logits(alone.logits, shown.logits))
    return _beside_others([found[place] for place in sorted(found)])


def _groups(parts: list[Part]) -> list[list[Part]]:
    """Parts that compute the same in different layers, where they are enough for a spread to mean something."""
    alike: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        if part.layer is not None and part.part != "router":
            alike[part.what].append(part)
    return [group for group in alike.values() if len(group) >= _FEWEST_LAYERS]


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Median of logarithms, and their robust standard deviation."""
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))  # that of a normal distribution


def _beside_others(parts: list[Part]) -> list[Part]:
    """Return the parts with limits that are no narrower than what the same part of other layers has."""
    reduced: dict[Kind, Callable[[np.ndarray], Any]] = {"median": np.median, "mean": np.mean, "largest": np.max}
    wider: dict[str, Allowed] = {}
    for group in _groups(parts):
        allowed = group[0].allowed
        for kind, reduce in reduced.items():
            errors = np.array([float(reduce(part.values)) for part in group])
            errors = errors[np.isfinite(errors) & (errors > 0)]
            limit = getattr(allowed, kind)
            if len(errors) >= _FEWEST_LAYERS and np.median(errors) <= limit:
                middle, spread = _middle(np.log(errors))
                allowed = replace(allowed, **{kind: max(limit, math.exp(middle + _DEVIATIONS * spread))})
        wider[group[0].what] = allowed
    return [replace(part, allowed=wider.get(part.what, part.allowed)) for part in parts]


def _router(layer: int, scores: np.ndarray, shown: Shown, margin: float) -> Part:
    """How much better the best expert that was left out is than the worst taken, over the layer's largest score."""
    assert shown.routes is not None
    chosen = shown.routes[layer]
    values = np.maximum(gap(scores, chosen), 0.0) / max(float(np.abs(scores).max()), float(np.finfo(np.float32).tiny))
    if shown.scores is not None:  # not even the best of its own scores: no rounding explains that
        values = np.where(gap(shown.scores[layer], chosen) > 0, np.maximum(values, 1.0), values)
    return Part(layer, "router", "the router's choice", values, Allowed(math.inf, math.inf, margin))


def standing_out(parts: list[Part]) -> tuple[Part, float] | None:
    """Return the part whose mean error is furthest from that of the same part in other layers, and how many times that.

    Beyond six robust standard deviations of the logarithm only; None where there is none, or too few layers.
    """
    found: list[tuple[float, Part, float]] = []
    for group in _groups(parts):
        means = np.array([float(part.values.mean()) for part in group])
        if not (np.isfinite(means) & (means > 0)).all():
            continue
        logs = np.log(means)
        middle, spread = _middle(logs)
        number = int(logs.argmax())
        if spread > 0 and (deviations := (logs[number] - middle) / spread) > _DEVIATIONS:
            found.append((float(deviations), group[number], math.exp(logs[number] - middle)))
    if not found:
        return None
    _, part, times = max(found, key=lambda each: each[0])
    return part, times


def responsible(routes: np.ndarray, departing: np.ndarray) -> list[int] | None:
    """Return the few experts of which every departing token chose one, and few other tokens did; None: no such few.

    Args:
        routes: int [L, k]. departing: bool [L].
    """
    if departing.all() or not departing.any():
        return None
    count = int(routes.max()) + 1
    chose = taken(routes, count)
    share = (chose & departing[:, None]).sum(0) / np.maximum(chose.sum(0), 1)
    found: list[int] = []
    left = departing.copy()
    while left.any() and len(found) < max(2, count // 4):
        covers = (chose & left[:, None]).sum(0)
        best = int(np.lexsort((covers, np.where(covers > 0, share, -1)))[-1])
        if share[best] < 0.5:
            return None
        found.append(best)
        left &= ~chose[:, best]
    return None if left.any() else sorted(found)
