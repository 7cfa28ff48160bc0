"""How high the thresholds of a gather have to be for the model to read what was asked for: tried and measured.

H hidden size, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, gather, kept_inputs, modeling, reads
from moedge.convert.kept_inputs import Reader
from moedge.convert.plan import LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

_PRECISION = 0.002
"""The measured share of weights is this close to what was asked for."""
ROUNDS = 16
"""Levels that are tried at most."""
_WIDEST = 40.0
"""Logarithms of levels lie between this and its negative."""
_HALVED, _NARROWEST = 6, 5e-3
"""From this round on the levels between which the share lies are halved, and none is tried between two so near to each
other: what is read makes a jump there, as a smooth one would change by less than the precision."""
TOLERANCE = 10 * _PRECISION
"""How far the nearest share may lie from what was asked for, where what is read makes no jumps."""


@dataclass(frozen=True)
class Levels:
    """Layers by one number, of which a higher one reads less.

    Attributes:
        make: logarithm of the level -> layers.
        expected: logarithm of the level -> the share of the FFN weights that they are expected to read.
        tolerance: how far the nearest share may lie from what was asked for.
    """

    make: Callable[[float], list[LayerPlan]]
    expected: Callable[[float], float]
    tolerance: float = TOLERANCE


def fit(
    model: PreTrainedModel, levels: Levels, token_windows: np.ndarray, share: float, *, progress: Progress | None = None
) -> tuple[list[LayerPlan], float]:
    """Find the level at which a converted model reads ``share`` of its dense parent's FFN weights a token.

    What is not read outside the FFNs counts as FFN weights that are not read (:mod:`moedge.convert.reads`). The first
    level is the expected one; what it is measured to read corrects what is expected of the next.

    Args:
        model: the dense parent; it is not changed.
        token_windows: int64 [N, L] to measure on.

    Returns:
        The layers that come nearest, and the share that they were measured to read.

    Raises:
        MoEdgeError: the layers read less than ``share`` even with all values, or never so little.
    """
    low, high = -_WIDEST, _WIDEST
    measured_low = measured_high = False
    error, nearest = 0.0, math.inf
    for number in range(ROUNDS):
        at = _level(levels.expected, share - error, low, high)
        if measured_low and measured_high:  # not so near an end that the other would never move
            least = 0.05 if number < _HALVED else 0.5
            at = min(max(at, low + least * (high - low)), high - least * (high - low))
        tried = levels.make(at)
        found = read_share(model, tried, token_windows)
        if abs(found - share) < abs(nearest - share):
            layers, nearest = tried, found
        if progress:
            progress(number + 1, ROUNDS)
        if abs(found - share) <= _PRECISION:
            break
        if found > share:
            low, measured_low = at, True
        else:
            high, measured_high = at, True
        if high - low <= _NARROWEST:
            break
        error = found - levels.expected(at)
    if abs(nearest - share) > levels.tolerance:
        raise MoEdgeError(f"No thresholds read {share:.3g} of the FFN weights: the nearest found read {nearest:.3g}.")
    return layers, nearest


def _level(expected: Callable[[float], float], share: float, low: float, high: float) -> float:
    """Return where a falling function is ``share``, or the nearer end."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > share else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def read_share(model: PreTrainedModel, layers: list[LayerPlan], token_windows: np.ndarray) -> float:
    """Return the share of the FFN weights that a dense model with these layers reads on windows int64 [N, L].

    One converted layer is in memory at a time.
    """
    counts = reads.Reads()
    wanted = {
        (place.layer, place.place): place
        for place in (kept_inputs.readers(model) if any(kept_inputs.wanted(layers)) else ())
        if place.threshold in layers[place.layer].thresholds
    }

    def see(place: Reader, values: torch.Tensor) -> torch.Tensor:
        layer = layers[place.layer]
        threshold = torch.from_numpy(layer.thresholds[place.threshold]).to(values.device)
        counts.outside[place.layer, place.place].add(place.place, values.flatten(0, -2), threshold)
        kept: torch.Tensor = torch.ops.moedge.keep_large(values, threshold, layer.ramp)
        return kept

    def converted(block: adapters.FFN) -> torch.nn.Module:
        ffn = modeling.build_ffn(block, layers[block.index])
        counts.watch(ffn)
        return ffn

    for key, place in wanted.items():
        counts.outside[key] = reads.OutsideReads(place.weights, place.inputs)
    for _ in gather.layer_by_layer(model, gather.by_layer(model, list(wanted.values())), token_windows, see, converted):
        pass
    counts.add_up()
    return counts.share(adapters.ffns(model)[0].width)
