"""Thresholds that leave out small inputs and small hidden values: which, and how many.

What a value costs when it is left out is estimated by its score: the change of the output is about score * |value|.

* ``magnitude``: 1 (TEAL, arXiv 2408.14690). ``norms``: the norm of the weights that read it (WINA, arXiv 2505.19427).
* ``fisher``: the root of the mean square of the gradient of the log-probability of tokens drawn from the model's own
  predictions: half of (score * value)^2 is then the KL that leaving it out alone costs (Theis et al., arXiv 1801.05787,
  eq. 4).

Scores of the Fisher kind have one unit in all layers and places. So one number for the whole model, KL per weight that
is read, decides everything: a value is left out where ``(score * value)^2 / weights`` is below it. Layers and places
share the budget by what they lose, token by token. The other scores know no such unit: every place keeps the same share
of its values, as published.

A layer's places are ``x`` and ``h`` of its FFN and, where all linear layers gather, ``qkv`` and ``o`` of its attention;
the last layer's have ``head`` too (:mod:`moedge.convert.kept_inputs`).

H hidden size, D neurons.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, budgets, kept_inputs, modeling, processes, reads, scoring
from moedge.convert.kept_inputs import Reader
from moedge.convert.plan import SMALLEST_THRESHOLD, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

Kind = Literal["fisher", "norms", "magnitude"]
Linears = Literal["all", "ffn"]
_PRECISION = 0.002
"""The measured share of weights is this close to what was asked for."""
ROUNDS = 16
"""Levels that are tried at most."""
_ROWS = 1024
"""Tokens whose values a ladder is made of, about."""


def places(model: PreTrainedModel, linears: Linears) -> list[Reader]:
    """List where a dense model's linear layers read values, in the order in which they are computed.

    Raises:
        MoEdgeError: attention or an output projection that is not written as usual, where all linear layers are meant.
    """
    found = []
    outside = deque(kept_inputs.readers(model) if linears == "all" else ())
    for block in adapters.ffns(model):
        while outside and outside[0].layer == block.index and outside[0].place != "head":
            found.append(outside.popleft())
        products = {name: part for name, part in block.module.named_children() if isinstance(part, torch.nn.Linear)}
        down = products.pop("down_proj")
        found.append(Reader("x", block.index, block.module, tuple(products.values())))
        found.append(Reader("h", block.index, down, (down,)))
    return [*found, *outside]


Scores = list[tuple[Reader, np.ndarray]]
"""float32 [K] for each place; those of an FFN in the dense neuron order."""


def static_scores(model: PreTrainedModel, kind: Kind, linears: Linears = "ffn") -> Scores:
    """Return the scores that need no text."""

    def norms(place: Reader) -> np.ndarray:
        squares = torch.stack([linear.weight.float().square().sum(dim=0) for linear in place.linears])
        return np.asarray(squares.sum(dim=0).sqrt().cpu().numpy())

    found = places(model, linears)
    if kind == "magnitude":
        return [(place, np.ones(place.inputs, np.float32)) for place in found]
    return [(place, norms(place)) for place in found]


def fisher_scores(
    model: PreTrainedModel, token_windows: np.ndarray, linears: Linears = "ffn", progress: Progress | None = None
) -> Scores:
    """Measure Fisher scores on a dense model.

    Args:
        token_windows: int64 [N, L]; one forward and one backward pass over each.
        linears: of which linear layers.
        progress: called with (windows done, windows).
    """
    found = places(model, linears)
    sums: list[Any] = [torch.zeros(place.inputs, dtype=torch.float64) for place in found]
    mine = processes.span(len(token_windows))
    ids = torch.from_numpy(token_windows[mine]).to(model.device)
    for number, window in enumerate(ids, start=mine.start):
        seen: dict[int, torch.Tensor] = {}

        def own(index: int, values: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            seen[index] = values.clone()  # an input of its own in the autograd graph
            return seen[index]

        with torch.enable_grad(), budgets.with_gradients(model), _at(found, own):
            score = budgets.drawn_score(model, window, budgets.generator(number))
            gradients = torch.autograd.grad(score, list(seen.values()))
        for index, gradient in zip(seen, gradients, strict=True):
            sums[index] = sums[index] + gradient.flatten(0, -2).double().square().sum(dim=0).cpu()
        if progress:
            progress(number - mine.start + 1, len(ids))
    means = [processes.total(squares) / token_windows.size for squares in sums]
    return [(place, mean.sqrt().float().numpy()) for place, mean in zip(found, means, strict=True)]


@contextmanager
def _at(found: list[Reader], see: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Give every place what ``see(number, values)`` returns in place of its values."""

    def hook(index: int) -> Callable[..., Any]:
        def changed(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": see(index, kwargs["hidden_states"])}
            return (see(index, args[0]), *args[1:]), kwargs

        return changed

    handles = [
        place.module.register_forward_pre_hook(hook(index), with_kwargs=True) for index, place in enumerate(found)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_thresholds(layers: list[LayerPlan], scores: Scores, level: float, ramp: float) -> list[LayerPlan]:
    """Return the layers with thresholds at one level of ``(score * value)^2 / weights read``, by its root ``level``.

    An input of a layer is read by all rows of gate and up, so it counts 2 D weights; a hidden value counts H.
    """
    with np.errstate(divide="ignore"):  # what costs nothing is always left out
        values = [(place, level * math.sqrt(place.weights) / score.astype(np.float64)) for place, score in scores]
    return _placed(layers, values, ramp)


def _placed(layers: list[LayerPlan], values: list[tuple[Reader, np.ndarray]], ramp: float) -> list[LayerPlan]:
    """Return the layers with these thresholds, of a size that plans hold."""
    made: list[dict[str, np.ndarray | None]] = [{} for _ in layers]
    for place, value in values:
        limited = np.clip(value, SMALLEST_THRESHOLD, 1e30).astype(np.float32)
        made[place.layer][place.threshold] = limited
    return [layer.with_thresholds(found, ramp) for layer, found in zip(layers, made, strict=True)]


@dataclass(frozen=True)
class Ladder:
    """Of one place: scores, and the quantiles 0, 1/1000, ... 1 of score * |value| of its values."""

    place: Reader
    score: np.ndarray
    steps: np.ndarray


@torch.no_grad()
def ladders(model: PreTrainedModel, scores: Scores, token_windows: np.ndarray) -> list[Ladder]:
    """Measure how large the values of every place are on windows int64 [N, L]."""
    found = [place for place, _ in scores]
    every = max(1, token_windows.size // _ROWS)
    own = token_windows[processes.span(len(token_windows))]
    rows: list[list[torch.Tensor]] = [[] for _ in scores]

    def see(index: int, values: torch.Tensor) -> torch.Tensor:
        rows[index].append(values.flatten(0, -2)[::every].float().cpu())
        return values

    with _at(found, see):
        for window in torch.from_numpy(own).to(model.device):
            hidden = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state
            if found[-1].place == "head":  # its inputs alone: no logits are needed
                see(len(found) - 1, hidden)
    quantiles = np.linspace(0, 1, 1001)
    return [
        Ladder(place, score, np.quantile(processes.joined(torch.cat(seen)).abs().numpy() * score, quantiles))
        for (place, score), seen in zip(scores, rows, strict=True)
    ]


def with_shares(layers: list[LayerPlan], steps: list[Ladder], share: float, ramp: float) -> list[LayerPlan]:
    """Return the layers with thresholds that keep ``share`` of the values of every place."""
    values = [
        (one.place, np.interp(1 - share, np.linspace(0, 1, 1001), one.steps) / np.maximum(one.score, 1e-30))
        for one in steps
    ]
    return _placed(layers, values, ramp)


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

    What is not read outside the FFNs counts as FFN weights that are not read (:mod:`moedge.convert.reads`).

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
        kept_inputs.set_thresholds(model, layers)
        return layers, _counted(model, token_windows, width)

    at, step = math.log(start), 1.0
    low: tuple[float, float] | None = None  # (log level, share) that reads too much, and one that reads too little
    high: tuple[float, float] | None = None
    for number in range(ROUNDS):
        layers, found = measured(at)
        if progress:
            progress(number + 1, ROUNDS)
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
    with reads.counted(model) as counts:
        scoring.last_hidden_states(model, {"": token_windows[processes.span(len(token_windows))]}, batch_size=1)
    counts.add_up()
    return counts.share(width)
