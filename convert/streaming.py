"""Walk through a dense model layer by layer, with the FFN inputs of every calibration token in hand.

Some methods need the inputs x and activations h of one FFN over all tokens at once (a regression, a partition by
energy), not a summary collected in one pass. This walk gives them one layer at a time.

Memory, q tokens in N windows, H hidden, D neurons: three buffers [q, H] in the model's dtype (hidden states before and
after the layer, x), two more with ``dense_stream``, and h [q, D] float32 of the current layer only while it fits in
:data:`KEEP_BYTES` (otherwise it is computed again for each block of rows). Nothing grows with the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from moedge import MoEdgeError
from moedge.convert import adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress


KEEP_BYTES = 1 << 29
"""Largest h [q, D] that is kept while a layer is worked on."""
_ROWS = 2048
"""Tokens whose h is computed at a time."""
_HELD_EVERY = 5


class Block(Protocol):
    """An FFN's place in a model."""

    @property
    def index(self) -> int:
        """Position of its layer."""
        ...

    @property
    def name(self) -> str:
        """Module path, e.g. ``model.layers.0.mlp``."""
        ...


BlockT = TypeVar("BlockT", bound=Block)


@dataclass
class LayerTokens:
    """One FFN and what reaches it: q tokens, in the order of the windows.

    Attributes:
        block: the dense FFN.
        x: its inputs [q, H], in the model's dtype.
        weight: float32 [q], mean 1: one over the mean square of the residual stream behind the layer. The next layer
            normalises that stream, so an error counts in proportion to it; without the weight a few tokens with huge
            activations (the first of a window) decide every least-squares fit. Where the FFN's output is itself
            normalised (``Family.post_norm``), also divided by the mean square of that output.
        held: bool [q], tokens to choose settings on, whole windows, one in five.
        shift: [q, H] or None: what the dense stream has and this one lacks in front of the FFN (see :func:`walk`).
        replacement: set it to a module, and the following layers see its output instead of the dense FFN's.
    """

    block: adapters.FFN
    x: torch.Tensor
    weight: torch.Tensor
    held: torch.Tensor
    shift: torch.Tensor | None = None
    replacement: torch.nn.Module | None = None
    _hidden: torch.Tensor | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """q."""
        return int(self.x.shape[0])

    def parts(self) -> Iterator[slice]:
        """Yield blocks of rows that cover all tokens."""
        for start in range(0, self.count, _ROWS):
            yield slice(start, min(start + _ROWS, self.count))

    def hidden(self, part: slice) -> torch.Tensor:
        """Return h = act(gate x) * (up x) of some rows, float32 [n, D]."""
        if self._hidden is None and self.count * self.block.gate.shape[0] * 4 <= KEEP_BYTES:
            self._hidden = torch.cat([self._compute(rows) for rows in self.parts()])
        return self._compute(part) if self._hidden is None else self._hidden[part]

    def _compute(self, part: slice) -> torch.Tensor:
        return self.block.hidden(self.x[part])

    def target(self, part: slice) -> torch.Tensor:
        """Return what the FFN should output, float32 [n, H]: the dense FFN on x, plus ``shift``."""
        y = F.linear(self.hidden(part), self.block.down.float())
        return y if self.shift is None else y + self.shift[part].float()


@torch.no_grad()
def walk(
    model: PreTrainedModel, token_windows: np.ndarray, *, dense_stream: bool = False, progress: Progress | None = None
) -> Iterator[LayerTokens]:
    """Yield every FFN with its inputs, first layer first.

    Attention and everything else is the model's own code: a layer is called with the arguments that the model itself
    gave to it, recorded from one forward pass of the first window (all windows have one length, so they agree).

    Args:
        token_windows: int64 [N, L], N at least 2 (some are held out).
        dense_stream: carry the dense model's hidden states along, so that after a replacement ``shift`` holds
            the FFN output that would bring the stream back to the dense one, less the dense FFN's output here. Made for
            blocks of the form ``r + ffn(norm(r))``, which families with a norm behind the FFN do not have.
        progress: called with (layers done, layers).

    Raises:
        MoEdgeError: fewer than 2 windows, a model without GLU FFNs, or ``dense_stream`` for a family that normalises
            the FFN's output.
    """
    blocks = adapters.ffns(model)
    count, length = token_windows.shape
    if count < 2:
        raise MoEdgeError(f"{count} calibration window is too few; give at least 2, one is held out to choose on.")
    if dense_stream and blocks[0].family.post_norm:
        raise MoEdgeError(
            f"fit_to: stream cannot be used for {model.config.model_type}: it normalises the FFN's output, so no FFN "
            "output brings the stream back; use fit_to: ffn."
        )
    runner = _Runner(model, token_windows)
    states = runner.embed()
    dense = states.clone() if dense_stream else None
    held = torch.from_numpy(held_out(count)).to(states.device).repeat_interleave(length)
    for block in blocks:
        x, after = runner.run(block, states)
        shift = None
        if dense is not None:
            dense_x, dense_after = runner.run(block, dense)
            # after = r + F(x) on this stream, so target = dense_after - r = F(x) + (dense_after - after).
            shift = (dense_after - after).flatten(0, 1)
            dense = dense_after
            del dense_x
        tokens = LayerTokens(block, x, _weights(after), held, shift)
        if block.family.post_norm:
            tokens.weight = _post_norm_weights(tokens)
        yield tokens
        if tokens.replacement is not None:
            model.set_submodule(block.name, tokens.replacement)
            try:
                after = runner.run(block, states)[1]
            finally:
                model.set_submodule(block.name, block.module)
        states = after
        if progress:
            progress(block.index + 1, len(blocks))


def held_out(windows: int) -> np.ndarray:
    """Return which of N windows are held out to choose settings on, bool [N]: one in five, and at least one."""
    every = min(_HELD_EVERY, windows)
    return np.arange(windows) % every == every - 1


@torch.no_grad()
def inputs(
    model: PreTrainedModel, token_windows: np.ndarray, blocks: Sequence[BlockT]
) -> Iterator[tuple[BlockT, torch.Tensor]]:
    """Yield every layer's FFN, of any kind, with its inputs [q, H], first layer first; nothing is replaced.

    Args:
        token_windows: int64 [N, L].
        blocks: one for each layer of the model, with its ``index`` and module ``name``.
    """
    runner = _Runner(model, token_windows)
    states = runner.embed()
    for block in blocks:
        x, states = runner.run(block, states)
        yield block, x


def _weights(after: torch.Tensor) -> torch.Tensor:
    weight = 1 / after.flatten(0, 1).float().square().mean(dim=1).clamp_min(1e-12)
    return weight / weight.mean()


def _post_norm_weights(tokens: LayerTokens) -> torch.Tensor:
    """Weights of a family that normalises the FFN's output: an error also counts in proportion to that output."""
    squares = [tokens.target(part).square().mean(dim=1) for part in tokens.parts()]
    weight = tokens.weight / torch.cat(squares).clamp_min(1e-12)
    return weight / weight.mean()


class _Stop(Exception):
    """Ends a forward pass in front of the first layer."""


class _Runner:
    """Runs parts of a model on all windows, one window at a time."""

    def __init__(self, model: PreTrainedModel, token_windows: np.ndarray) -> None:
        adapters.check_ids(model, token_windows)
        self.model = model
        self.layers = model.base_model.layers
        self.ids = torch.from_numpy(token_windows).to(model.device)
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in self.layers]
        try:
            model.base_model(input_ids=self.ids[:1], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.arguments.append((args[1:], rest))

    def embed(self) -> torch.Tensor:
        """Return the hidden states in front of the first layer, [N, L, H]."""
        seen: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for window in self.ids:
                try:
                    self.model.base_model(input_ids=window[None], use_cache=False)
                except _Stop:
                    continue
        finally:
            handle.remove()
        return torch.cat(seen)

    def run(self, block: Block, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (FFN inputs [q, H], hidden states behind the layer [N, L, H])."""
        layer, (args, kwargs) = self.layers[block.index], self.arguments[block.index]
        inputs, after = torch.empty_like(states), torch.empty_like(states)
        row = 0

        def keep(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
            inputs[row] = given[0][0]

        handle = layer.get_submodule(block.name.rpartition(".")[2]).register_forward_pre_hook(keep)
        try:
            for row in range(len(states)):
                out = layer(states[row : row + 1], *args, **kwargs)
                after[row] = (out[0] if isinstance(out, tuple) else out)[0]
        finally:
            handle.remove()
        return inputs.flatten(0, 1), after
