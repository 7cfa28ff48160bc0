"""Walk through a dense model layer by layer, with the FFN inputs of every calibration token in hand.

Some methods need the inputs x and activations h of one FFN over all tokens at once (a regression, a partition by
energy), not a summary collected in one pass. This walk gives them one layer at a time.

Memory, q tokens in N windows, H hidden, D neurons: five buffers [q, H] in the model's dtype (hidden states before and
after the layer, what attention and the FFN put out, x), two more with ``dense_stream``, and h [q, D] float32 of the
current layer only while it fits in :data:`KEEP_BYTES` (otherwise it is computed again for each block of rows). Nothing
grows with the number of layers, and of a model whose layers are on disk (:mod:`moedge.convert.offload`) one is in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from moedge import MoEdgeError
from moedge.convert import adapters, offload, processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress


KEEP_BYTES = 1 << 29
"""Largest h [q, D] that is kept while a layer is worked on."""
_ROWS = 2048
"""Tokens whose h is computed at a time."""
HELD_EVERY = 5


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
    """One FFN and what reaches it: q tokens, in the order of the windows; those of this process alone.

    Whoever sums over them sums over the processes too (:mod:`moedge.convert.processes`).

    Attributes:
        block: the dense FFN.
        x: its inputs [q, H], in the model's dtype.
        weight: float32 [q], mean 1: one over the mean square of the residual stream behind the layer. The next layer
            normalises that stream, so an error counts in proportion to it; without the weight a few tokens with huge
            activations (the first of a window) decide every least-squares fit. Where the FFN's output is itself
            normalised (``Family.post_norm``), also divided by the mean square of that output.
        held: bool [q], tokens to choose settings on, whole windows, one in five.
        shift: [q, H] or None: what the dense stream has and this one lacks in front of the FFN (see :func:`walk`).
        first: tokens of the processes before this one.
        replacement: set it to a module, and the following layers see its output instead of the dense FFN's.
    """

    block: adapters.FFN
    x: torch.Tensor
    weight: torch.Tensor
    held: torch.Tensor
    shift: torch.Tensor | None = None
    first: int = 0
    replacement: torch.nn.Module | None = None
    _hidden: torch.Tensor | None = field(default=None, repr=False)
    _output: torch.Tensor | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """q."""
        return int(self.x.shape[0])

    def every(self, step: int) -> slice:
        """Rows of every ``step``-th token, counted over all processes."""
        return slice(-self.first % step, None, step)

    def parts(self) -> Iterator[slice]:
        """Yield blocks of rows that cover all tokens."""
        for start in range(0, self.count, _ROWS):
            yield slice(start, min(start + _ROWS, self.count))

    def hidden(self, part: slice) -> torch.Tensor:
        """Return h = act(gate x) * (up x) of some rows, float32 [n, D]."""
        if self._hidden is None and self.count * self.block.width * 4 <= KEEP_BYTES:
            self._hidden = torch.cat([self._compute(rows) for rows in self.parts()])
        return self._compute(part) if self._hidden is None else self._hidden[part]

    def _compute(self, part: slice) -> torch.Tensor:
        return self.block.hidden(self.x[part])

    def target(self, part: slice) -> torch.Tensor:
        """Return what the FFN should output, float32 [n, H]: the dense FFN on x, plus ``shift``."""
        y = F.linear(self.hidden(part), self.block.down.float()) if self._output is None else self._output[part]
        return y if self.shift is None else y + self.shift[part].float()


@torch.no_grad()
def walk(
    model: PreTrainedModel, token_windows: np.ndarray, *, dense_stream: bool = False, progress: Progress | None = None
) -> Iterator[LayerTokens]:
    """Yield every FFN with its inputs, first layer first; what was yielded is empty when the next one is asked for.

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
    apart = held_out(count)
    if dense_stream:
        check_stream(model)
    own = processes.span(count)
    runner = Runner(model, token_windows[own])
    states = runner.embed()
    dense = states.clone() if dense_stream else None
    held = torch.from_numpy(apart[own]).to(states.device).repeat_interleave(length)
    for block in blocks:
        with offload.loaded(runner.layers[block.index]):
            seen = runner.watch(block, states)
            tokens = LayerTokens(
                *(block, seen.x, _weights(seen.after), held),
                first=own.start * length,
                _hidden=seen.hidden,
                _output=seen.output,
            )
            if dense is not None:
                dense_after = runner.run(block, dense)[1]
                # after = r + F(x) on this stream, so target = dense_after - r = F(x) + (dense_after - after).
                tokens.shift = (dense_after - seen.after).flatten(0, 1)
                dense = dense_after
            if block.family.post_norm:
                tokens.weight = _post_norm_weights(tokens)
            yield tokens
            states = seen.after
            if tokens.replacement is not None:
                states = runner.replay(block, seen, tokens.replacement)
            # The caller's loop holds it while the next layer runs.
            tokens.x, tokens.shift, tokens.replacement = tokens.x.new_empty(0, block.hidden_size), None, None
            tokens._hidden = tokens._output = None
            del seen
        if progress:
            progress(block.index + 1, len(blocks))


def check_stream(model: PreTrainedModel) -> None:
    """Refuse to bring back the dense stream of a family that normalises the FFN's output.

    Raises:
        MoEdgeError: the model is of such a family.
    """
    if adapters.ffns(model)[0].family.post_norm:
        raise MoEdgeError(
            f"fit_to: stream cannot be used for {model.config.model_type}: it normalises the FFN's output, so no FFN "
            "output brings the stream back; use fit_to: ffn."
        )


def held_out(windows: int) -> np.ndarray:
    """Return which of N windows are held out to choose settings on, bool [N]: one in five, and at least one.

    Raises:
        MoEdgeError: fewer than 2 windows.
    """
    if windows < 2:
        raise MoEdgeError(f"{windows} calibration window is too few; give at least 2, one is held out to choose on.")
    every = min(HELD_EVERY, windows)
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
    runner = Runner(model, token_windows)
    states = runner.embed()
    for block in blocks:
        with offload.loaded(runner.layers[block.index]):
            x, states = runner.run(block, states)
            yield block, x


def _weights(after: torch.Tensor) -> torch.Tensor:
    weight = 1 / after.flatten(0, 1).float().square().mean(dim=1).clamp_min(1e-12)
    return weight / processes.mean(weight)


def _post_norm_weights(tokens: LayerTokens) -> torch.Tensor:
    """Weights of a family that normalises the FFN's output: an error also counts in proportion to that output."""
    squares = [tokens.target(part).square().mean(dim=1) for part in tokens.parts()]
    weight = tokens.weight / torch.cat(squares).clamp_min(1e-12)
    return weight / processes.mean(weight)


@dataclass
class Seen:
    """What :meth:`Runner.watch` saw of one layer: N windows of L tokens, q = N L.

    Attributes:
        before: hidden states [N, L, H] in front of the layer; ``after``: behind it.
        attention: what the attention put out, [N, L, H].
        x: inputs of the FFN [q, H].
        hidden: h [q, D], output: of the FFN [q, H], in float32; None where they would be of another dtype than what is
            fitted to them, or h larger than :data:`KEEP_BYTES`.
    """

    before: torch.Tensor
    after: torch.Tensor
    attention: torch.Tensor
    x: torch.Tensor
    hidden: torch.Tensor | None
    output: torch.Tensor | None


class Runner:
    """Runs the layers of a model on all windows, layer by layer.

    Its layers are called with the arguments that the model itself gives to them: one pass in which they do nothing
    but to record them.
    """

    def __init__(self, model: PreTrainedModel, token_windows: np.ndarray) -> None:
        adapters.check_ids(model, token_windows)
        self.model = model
        self.layers = model.base_model.layers
        self.ids = torch.from_numpy(token_windows).to(offload.device_of(model))
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with _idle(self.layers, lambda states, *rest: self.arguments.append(rest)):
            model.base_model(input_ids=self.ids[:1], use_cache=False)

    def embed(self) -> torch.Tensor:
        """Return the hidden states in front of the first layer, [N, L, H]."""
        seen: list[torch.Tensor] = []
        with _idle(self.layers, lambda states, *rest: seen.append(states)):
            for window in self.ids:
                self.model.base_model(input_ids=window[None], use_cache=False)
        return torch.cat(seen[:: len(self.layers)])

    def run(self, block: Block, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (FFN inputs [q, H], hidden states behind the layer [N, L, H])."""
        inputs = torch.empty_like(states)
        with hooked(self._ffn(block).register_forward_pre_hook(_kept_input(inputs))):
            after = self.forward(block, states)
        return inputs.flatten(0, 1), after

    def watch(self, block: adapters.FFN, states: torch.Tensor) -> Seen:
        """Run a dense layer and keep what its parts put out."""
        x, attention = (torch.empty_like(states) for _ in range(2))
        ffn, width = self._ffn(block), block.width
        own = self.layers[block.index].self_attn
        hooks = [
            ffn.register_forward_pre_hook(_kept_input(x)),
            own.register_forward_hook(_kept_output(attention)),
        ]
        hidden = output = None
        if states.dtype == torch.float32 and block.down_bias is None:
            output = torch.empty_like(states)
            hooks.append(ffn.register_forward_hook(_kept_output(output)))
        if states.dtype == torch.float32 and states.shape[0] * states.shape[1] * width * 4 <= KEEP_BYTES:
            hidden = states.new_empty(*states.shape[:2], width)
            hooks.append(ffn.get_submodule("down_proj").register_forward_pre_hook(_kept_input(hidden)))
        with hooked(*hooks):
            after = self.forward(block, states)
        flat = (None if value is None else value.flatten(0, 1) for value in (hidden, output))
        return Seen(states, after, attention, x.flatten(0, 1), *flat)

    def replay(self, block: Block, seen: Seen, ffn: torch.nn.Module) -> torch.Tensor:
        """Return the hidden states behind a layer with another FFN, [N, L, H]; its attention is not computed again."""
        layer = self.layers[block.index]
        with swapped(layer, "self_attn", _Recorded(seen.attention)), swapped(layer, _last(block.name), ffn):
            return self.forward(block, seen.before)

    def forward(self, block: Block, states: torch.Tensor, windows: int = 1) -> torch.Tensor:
        """Run a layer on ``states`` [N, L, H], some windows at a time, and return what it puts out, [N, L, H]."""
        after = torch.empty_like(states)
        for start in range(0, len(states), windows):
            rows = slice(start, start + windows)
            after[rows] = self.one(block, states[rows])
        return after

    def one(self, block: Block, states: torch.Tensor) -> torch.Tensor:
        """Run a layer on hidden states [B, L, H] and return what it puts out."""
        args, kwargs = self.arguments[block.index]
        out = self.layers[block.index](states, *args, **kwargs)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def logits(self, window: int, states: torch.Tensor) -> torch.Tensor:
        """Run what follows the last layer on its hidden states [1, L, H] for one window; return logits [1, L, V]."""
        with _replaced(self.layers, lambda *_, **__: states):
            found: torch.Tensor = self.model(input_ids=self.ids[window][None], use_cache=False).logits
        return found

    def last(self, window: int, states: torch.Tensor) -> torch.Tensor:
        """Return what the output projection reads, [1, L, H], of hidden states behind the last layer [1, L, H]."""
        with _replaced(self.layers, lambda *_, **__: states):
            out = self.model.base_model(input_ids=self.ids[window][None], use_cache=False)
        found: torch.Tensor = out.last_hidden_state
        return found

    def _ffn(self, block: Block) -> torch.nn.Module:
        module: torch.nn.Module = self.layers[block.index].get_submodule(_last(block.name))
        return module


class _Recorded(torch.nn.Module):
    """Attention that puts out what it was seen to put out, one window a call."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.rows = iter(outputs)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return next(self.rows)[None], None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _kept_input(rows: torch.Tensor) -> Callable[..., None]:
    """Return a hook that writes the inputs of one window a call to ``rows`` [N, L, n]."""
    left = iter(rows)

    def keep(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        next(left).copy_(given[0][0])

    return keep


def _kept_output(rows: torch.Tensor) -> Callable[..., None]:
    """Return a hook that writes the (first) output of one window a call to ``rows`` [N, L, n]."""
    left = iter(rows)

    def keep(module: torch.nn.Module, given: tuple[Any, ...], out: Any) -> None:
        next(left).copy_((out[0] if isinstance(out, tuple) else out)[0])

    return keep


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove hooks when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def swapped(parent: torch.nn.Module, name: str, module: torch.nn.Module) -> Iterator[None]:
    """Run a block with another module in place of a child."""
    own = parent.get_submodule(name)
    parent.set_submodule(name, module)
    try:
        yield
    finally:
        parent.set_submodule(name, own)


@contextmanager
def _idle(layers: torch.nn.ModuleList, see: Callable[..., None]) -> Iterator[None]:
    """Let every layer hand on its hidden states as they are, after ``see(hidden states, other args, kwargs)``."""

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        see(hidden_states, args, kwargs)
        return hidden_states

    with _replaced(layers, forward):
        yield


@contextmanager
def _replaced(layers: torch.nn.ModuleList, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Have ``forward`` in place of that of every layer."""
    own = [layer.__dict__.get("forward") for layer in layers]  # accelerate's, or None: that of the class
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before
