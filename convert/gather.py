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

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from moedge.convert import adapters, backward, kept_inputs, offload, processes, streaming
from moedge.convert.kept_inputs import Reader
from moedge.convert.plan import SMALLEST_THRESHOLD, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

Kind = Literal["fisher", "norms", "magnitude"]
Linears = Literal["all", "ffn"]
_ROWS = 1024
"""Tokens whose values a ladder is made of, about."""
_QUANTILES = np.linspace(0, 1, 1001)


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
        squares = torch.stack([offload.weight(one, "weight").float().square().sum(dim=0) for one in place.linears])
        return np.asarray(squares.sum(dim=0).sqrt().cpu().numpy())

    found = places(model, linears)
    if kind == "magnitude":
        return [(place, np.ones(place.inputs, np.float32)) for place in found]
    return [(place, norms(place)) for place in found]


@dataclass(frozen=True)
class Ladder:
    """Of one place: scores, and the quantiles 0, 1/1000, ... 1 of score * |value| of its values."""

    place: Reader
    score: np.ndarray
    steps: np.ndarray

    def kept(self, cut: float) -> float:
        """Return the share of the values whose score * |value| is above ``cut``."""
        return 1 - float(np.interp(cut, self.steps, _QUANTILES))

    @cached_property
    def lost(self) -> np.ndarray:
        """Return the estimated KL of leaving out the smallest values, by quantile: half of their squares' mean."""
        squares = self.steps**2
        halves = (squares[1:] + squares[:-1]) / 4
        return self.place.inputs * np.append(0.0, halves.cumsum()) / (len(self.steps) - 1)


def fisher(
    model: PreTrainedModel, token_windows: np.ndarray, linears: Linears = "ffn", progress: Progress | None = None
) -> list[Ladder]:
    """Measure Fisher scores on a dense model, and how large its values are.

    Args:
        token_windows: int64 [N, L].
        linears: of which linear layers.
        progress: called with (layers done, layers), what follows the last one among them.
    """
    parts = by_layer(model, places(model, linears))
    found: dict[tuple[int, str], Ladder] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    sums: dict[str, Any] = {}
    every, last = _every(token_windows), processes.span(len(token_windows)).stop - 1

    @contextmanager
    def watch(layer: int, seen: dict[str, torch.Tensor]) -> Iterator[None]:
        def own(place: Reader, values: torch.Tensor) -> torch.Tensor:
            seen[place.place] = values.clone()  # an input of its own in the autograd graph
            return seen[place.place]

        with _at(parts[layer], own):
            yield

    for step in backward.steps(model, token_windows, watch):
        for name, gradient in step.gradients.items():
            rows.setdefault(name, []).append(step.values[name].flatten(0, -2)[::every].float().cpu())
            sums[name] = sums.get(name, 0) + gradient.flatten(0, -2).double().square().sum(dim=0).cpu()
        if step.window < last:
            continue
        for place in parts[step.layer]:
            score = (processes.total(sums[place.place]) / token_windows.size).sqrt().float().numpy()
            found[place.layer, place.place] = _ladder(place, score, rows[place.place])
        rows, sums = {}, {}
        if progress:
            progress(len(parts) - step.layer, len(parts))
    return [found[place.layer, place.place] for part in parts for place in part]


def by_layer(model: PreTrainedModel, found: list[Reader]) -> list[list[Reader]]:
    """Return the places of each layer, and at the end those of what follows the last one."""
    parts: list[list[Reader]] = [[] for _ in range(len(adapters.ffns(model)) + 1)]
    for place in found:
        parts[-1 if place.place == "head" else place.layer].append(place)
    return parts


def _every(token_windows: np.ndarray) -> int:
    """Return which tokens ladders are made of: one of so many."""
    return max(1, token_windows.size // _ROWS)


def _ladder(place: Reader, score: np.ndarray, rows: list[torch.Tensor]) -> Ladder:
    """Return the ladder of a place from some of the values [n, K] that this process saw."""
    values = processes.joined(torch.cat(rows)).abs().numpy() * score
    return Ladder(place, score, np.quantile(values, _QUANTILES))


@contextmanager
def _at(found: list[Reader], see: Callable[[Reader, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Give every place what ``see(place, values)`` returns in place of its values."""

    def hook(place: Reader) -> Callable[..., Any]:
        def changed(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": see(place, kwargs["hidden_states"])}
            return (see(place, args[0]), *args[1:]), kwargs

        return changed

    handles = [place.module.register_forward_pre_hook(hook(place), with_kwargs=True) for place in found]
    with streaming.hooked(*handles):
        yield


def layer_by_layer(
    model: PreTrainedModel,
    parts: list[list[Reader]],
    token_windows: np.ndarray,
    see: Callable[[Reader, torch.Tensor], torch.Tensor],
    ffn: Callable[[adapters.FFN], torch.nn.Module] | None = None,
) -> Iterator[list[Reader]]:
    """Run a model on this process's windows, one layer in memory at a time; yield a layer's places when it has run.

    Args:
        parts: places by layer, and at the end those of what follows the last one.
        see: what a place gets in place of its values.
        ffn: builds what stands in place of a dense FFN.
    """
    runner = streaming.Runner(model, token_windows[processes.span(len(token_windows))])
    states = runner.embed()
    for block in adapters.ffns(model):
        with (
            offload.loaded(runner.layers[block.index]),  # before anything reads the weights of the layer
            _at(parts[block.index], see),
            streaming.swapped(model, block.name, ffn(block) if ffn else block.module),
        ):
            states = runner.forward(block, states)
        yield parts[block.index]
    for place in parts[-1]:  # its inputs alone: no logits are needed
        for window, behind in enumerate(states):
            see(place, runner.last(window, behind[None]))
    yield parts[-1]


def _placed(layers: list[LayerPlan], values: list[tuple[Reader, np.ndarray]], ramp: float) -> list[LayerPlan]:
    """Return the layers with these thresholds, of a size that plans hold."""
    made: list[dict[str, np.ndarray | None]] = [{} for _ in layers]
    for place, value in values:
        limited = np.clip(value, SMALLEST_THRESHOLD, 1e30).astype(np.float32)
        made[place.layer][place.threshold] = limited
    return [layer.with_thresholds(found, ramp) for layer, found in zip(layers, made, strict=True)]


@torch.no_grad()
def ladders(model: PreTrainedModel, scores: Scores, token_windows: np.ndarray) -> list[Ladder]:
    """Measure how large the values of every place are on windows int64 [N, L]."""
    score_of = {(place.layer, place.place): score for place, score in scores}
    every, found = _every(token_windows), []
    rows: dict[str, list[torch.Tensor]] = {}

    def see(place: Reader, values: torch.Tensor) -> torch.Tensor:
        rows.setdefault(place.place, []).append(values.flatten(0, -2)[::every].float().cpu())
        return values

    for part in layer_by_layer(model, by_layer(model, [place for place, _ in scores]), token_windows, see):
        found += [_ladder(place, score_of[place.layer, place.place], rows[place.place]) for place in part]
        rows.clear()
    return found


def save(steps: list[Ladder], file: Path, settings: Mapping[str, Any]) -> None:
    """Keep ladders for :func:`load`: what several conversions of one model measure alike is then measured once.

    Args:
        settings: JSON, with what they were measured.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for one in steps:
        name = f"{one.place.layer}.{one.place.place}"
        tensors |= {f"{name}.score": one.score, f"{name}.steps": one.steps}
    save_file(tensors, file, {"settings": json.dumps(settings, sort_keys=True)})


def load(file: Path, model: PreTrainedModel, settings: Mapping[str, Any]) -> list[Ladder] | None:
    """Read the ladders that were measured on ``model`` with these settings; None where there are none.

    Args:
        settings: what :func:`save` got, ``linears`` among it.
    """
    from safetensors import safe_open

    if not file.exists():
        return None
    with safe_open(file, framework="numpy") as tensors:
        if (tensors.metadata() or {}).get("settings") != json.dumps(settings, sort_keys=True):
            return None
        found = []
        for place in places(model, settings["linears"]):
            name = f"{place.layer}.{place.place}"
            found.append(Ladder(place, tensors.get_tensor(f"{name}.score"), tensors.get_tensor(f"{name}.steps")))
    return found


def cuts(steps: list[Ladder], level: float) -> list[float]:
    """Return below which score * |value| each place leaves values out, at one level of what a read weight is worth.

    That is ``(score * value)^2 / weights read``, and ``level`` its root. An input of a layer is read by all rows of
    gate and up, so it counts 2 D weights; a hidden value counts H.
    """
    return [level * math.sqrt(one.place.weights) for one in steps]


def cuts_of_share(steps: list[Ladder], share: float) -> list[float]:
    """Return the same for every place to keep ``share`` of its values."""
    return [float(np.interp(1 - share, _QUANTILES, one.steps)) for one in steps]


def with_cuts(layers: list[LayerPlan], steps: list[Ladder], found: list[float], ramp: float) -> list[LayerPlan]:
    """Return the layers with thresholds below which score * |value| is less than the cut of the place."""
    values = []
    for one, cut in zip(steps, found, strict=True):
        always = np.full(one.score.shape, np.inf)  # what costs nothing is always left out
        values.append((one.place, np.divide(cut, one.score, out=always, where=one.score > 0, dtype=np.float64)))
    return _placed(layers, values, ramp)


def expected_share(layers: list[LayerPlan], steps: list[Ladder], found: list[float], hidden: int, width: int) -> float:
    """Estimate the share of the FFN weights that layers with these cuts read: values are taken as the dense model's."""
    kept = {(one.place.layer, one.place.place): one.kept(cut) for one, cut in zip(steps, found, strict=True)}
    read = 0.0
    for index, layer in enumerate(layers):
        x, h = kept[index, "x"], kept[index, "h"]
        router = layer.router.tensors.values() if layer.router and layer.experts else ()
        read += hidden * layer.active_width * (2 * x + h) + sum(tensor.size for tensor in router)
    outside = [one.place for one in steps if one.place.place not in ("x", "h")]
    read -= sum(place.weights * place.inputs * (1 - kept[place.layer, place.place]) for place in outside)
    return read / (3 * hidden * width * len(layers))
