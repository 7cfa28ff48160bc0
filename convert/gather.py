"""Thresholds that leave out small inputs and small hidden values: which, and how many.

What a value costs when it is left out is estimated by its score: the change of the output is about score * |value|.

* ``magnitude``: 1 (TEAL, arXiv 2408.14690). ``norms``: the norm of the weights that read it (WINA, arXiv 2505.19427).
* ``fisher``: the root of the mean square of the gradient of the log-probability of tokens drawn from the model's own
  predictions: half of (score * value)^2 is then the KL that leaving it out alone costs (Theis et al., arXiv 1801.05787,
  eq. 4).

Scores of the Fisher kind have one unit in all layers, for inputs and hidden values alike. So one number for the whole
model, KL per weight that is read, decides everything: a value is left out where ``(score * value)^2 / weights`` is
below it. Layers and the two places share the budget by what they lose, token by token. The other scores know no such
unit: every layer keeps the same share of both, as published.

H hidden size, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, budgets, modeling, reads, scoring, streaming
from moedge.convert.plan import SMALLEST_THRESHOLD, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

Kind = Literal["fisher", "norms", "magnitude"]
_PRECISION = 0.002
"""The measured share of weights is this close to what was asked for."""
_ROUNDS = 16


@dataclass(frozen=True)
class Scores:
    """Scores of one FFN: ``x`` float32 [H], ``h`` float32 [D], in the dense neuron order."""

    x: np.ndarray
    h: np.ndarray


def static_scores(model: PreTrainedModel, kind: Kind) -> list[Scores]:
    """Return the scores that need no text."""
    found = []
    for block in adapters.ffns(model):
        if kind == "magnitude":
            width, hidden = block.gate.shape
            found.append(Scores(np.ones(hidden, np.float32), np.ones(width, np.float32)))
        else:
            squares = block.gate.float().square().sum(dim=0) + block.up.float().square().sum(dim=0)
            found.append(Scores(squares.sqrt().cpu().numpy(), block.down.float().norm(dim=0).cpu().numpy()))
    return found


def fisher_scores(model: PreTrainedModel, token_windows: np.ndarray, progress: Progress | None = None) -> list[Scores]:
    """Measure Fisher scores on a dense model.

    Args:
        token_windows: int64 [N, L]; one forward and one backward pass over each.
        progress: called with (windows done, windows).
    """
    blocks = adapters.ffns(model)
    sums = [[torch.zeros(n, dtype=torch.float64) for n in (b.gate.shape[1], b.gate.shape[0])] for b in blocks]
    generator = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(token_windows).to(model.device)
    for number, window in enumerate(ids):
        seen: dict[tuple[int, str], torch.Tensor] = {}
        with torch.enable_grad(), budgets.with_gradients(model), _split(blocks, seen):
            score = budgets.drawn_score(model, window, generator)
            gradients = torch.autograd.grad(score, list(seen.values()))
        for (layer, which), gradient in zip(seen, gradients, strict=True):
            squares = gradient.flatten(0, -2).double().square().sum(dim=0)
            sums[layer]["xh".index(which)] += squares.cpu()
        if progress:
            progress(number + 1, len(ids))
    roots = [[(total / ids.numel()).sqrt().float().numpy() for total in pair] for pair in sums]
    return [Scores(x, h) for x, h in roots]


@contextmanager
def _split(blocks: list[adapters.FFN], seen: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """Give every FFN, and its down projection, an input of its own in the autograd graph."""

    def hook(key: tuple[int, str]) -> Callable[..., tuple[torch.Tensor, ...]]:
        def own(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen[key] = args[0].clone()
            return seen[key], *args[1:]

        return own

    handles = [block.module.register_forward_pre_hook(hook((block.index, "x"))) for block in blocks]
    handles += [
        block.module.get_submodule("down_proj").register_forward_pre_hook(hook((block.index, "h"))) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_thresholds(layers: list[LayerPlan], scores: list[Scores], level: float, ramp: float) -> list[LayerPlan]:
    """Return the layers with thresholds at one level of ``(score * value)^2 / weights read``, by its root ``level``.

    An input of a layer is read by all rows of gate and up, so it counts 2 D weights; a hidden value counts H.
    """

    def thresholds(score: np.ndarray, weights: int) -> np.ndarray:
        with np.errstate(divide="ignore"):  # what costs nothing is always left out
            value = level * math.sqrt(weights) / score.astype(np.float64)
        return np.clip(value, SMALLEST_THRESHOLD, 1e30).astype(np.float32)

    return [
        replace(
            layer,
            x_threshold=thresholds(score.x, 2 * len(score.h)),
            h_threshold=thresholds(score.h, len(score.x)),
            ramp=ramp,
        )
        for layer, score in zip(layers, scores, strict=True)
    ]


@dataclass(frozen=True)
class Ladder:
    """Of one FFN: scores, and the quantiles 0, 1/1000, ... 1 of score * |value| of its inputs and hidden values."""

    scores: Scores
    x: np.ndarray
    h: np.ndarray


@torch.no_grad()
def ladders(model: PreTrainedModel, scores: list[Scores], token_windows: np.ndarray) -> list[Ladder]:
    """Measure how large the values of every FFN are on windows int64 [N, L]."""
    found: list[Ladder] = []
    for block, x in streaming.inputs(model, token_windows, adapters.ffns(model)):
        rows, score = x[:: max(1, len(x) // 1024)].float(), scores[block.index]
        values = ((rows, score.x), (block.hidden(rows), score.h))
        steps = [np.quantile((v.abs().cpu().numpy() * s), np.linspace(0, 1, 1001)) for v, s in values]
        found.append(Ladder(score, *steps))
    return found


def with_shares(layers: list[LayerPlan], steps: list[Ladder], share: float, ramp: float) -> list[LayerPlan]:
    """Return the layers with thresholds that keep ``share`` of the inputs and of the hidden values of every layer."""
    made = []
    for layer, ladder in zip(layers, steps, strict=True):
        at = [np.interp(1 - share, np.linspace(0, 1, 1001), values) for values in (ladder.x, ladder.h)]
        x, h = (
            np.clip(level / np.maximum(score, 1e-30), SMALLEST_THRESHOLD, 1e30).astype(np.float32)
            for level, score in zip(at, (ladder.scores.x, ladder.scores.h), strict=True)
        )
        made.append(replace(layer, x_threshold=x, h_threshold=h, ramp=ramp))
    return made


def fit(
    model: PreTrainedModel,
    make: Callable[[float], list[LayerPlan]],
    token_windows: np.ndarray,
    share: float,
    *,
    start: float,
    progress: Progress | None = None,
) -> tuple[list[LayerPlan], float]:
    """Find the level at which a converted model reads ``share`` of its dense parent's FFN weights a token.

    Args:
        model: the dense parent; it is not changed.
        make: layers of a level; a higher one reads less.
        token_windows: int64 [N, L] to measure on.
        start: a first level, more than 0.

    Returns:
        The layers, and the share that they were measured to read.

    Raises:
        MoEdgeError: the layers read less than ``share`` even with all values, or never so little.
    """
    width = len(adapters.ffns(model)[0].gate)
    with scoring.in_place(model, make(start)):  # built once: levels differ in thresholds alone
        layers, found = _search(model, make, token_windows, share, start, width, progress)
    if abs(found - share) > 10 * _PRECISION:
        raise MoEdgeError(f"No thresholds read {share:.3g} of the FFN weights: the nearest found read {found:.3g}.")
    return layers, found


def _search(
    model: PreTrainedModel,
    make: Callable[[float], list[LayerPlan]],
    token_windows: np.ndarray,
    share: float,
    start: float,
    width: int,
    progress: Progress | None,
) -> tuple[list[LayerPlan], float]:
    """Return the layers of the best level that a few tries find, and what they read.

    Converted FFNs are in place; ``width`` is that of the dense ones.
    """
    ffns = modeling.sparse_ffns(model)

    def measured(log_level: float) -> tuple[list[LayerPlan], float]:
        layers = make(math.exp(log_level))
        for ffn, layer in zip(ffns, layers, strict=True):
            modeling.set_thresholds(ffn, layer, ffn.shared_gate.device)
        return layers, _counted(model, token_windows, width)

    at, step = math.log(start), 1.0
    low: tuple[float, float] | None = None  # (log level, share) that reads too much, and one that reads too little
    high: tuple[float, float] | None = None
    for number in range(_ROUNDS):
        layers, found = measured(at)
        if progress:
            progress(number + 1, _ROUNDS)
        if abs(found - share) <= _PRECISION:
            break
        low, high = ((at, found), high) if found > share else (low, (at, found))
        if low and high:  # on the line between them, but not so near an end that the other would never move
            part = min(max((low[1] - share) / (low[1] - high[1]), 0.1), 0.9)
            at = low[0] + part * (high[0] - low[0])
        else:
            at += step if low else -step
            step *= 2
    return layers, found


def read_share(model: PreTrainedModel, layers: list[LayerPlan], token_windows: np.ndarray) -> float:
    """Return the share of the FFN weights that a dense model with these layers in place reads on some windows."""
    width = len(adapters.ffns(model)[0].gate)
    with scoring.in_place(model, layers):
        return _counted(model, token_windows, width)


def _counted(model: PreTrainedModel, token_windows: np.ndarray, width: int) -> float:
    """Return the share that the converted FFNs of a model read, of dense ones of ``width`` neurons."""
    ids = torch.from_numpy(token_windows).to(model.device)
    with reads.counted(model) as counts, torch.inference_mode():
        for window in ids:
            model.base_model(input_ids=window[None], use_cache=False)
    return counts.share(width)
