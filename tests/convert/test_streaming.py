from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, modeling, scoring, streaming
from moedge.convert.streaming import LayerTokens


def hooked(model: Any, ids: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(FFN inputs, hidden states behind each layer) of a full forward pass of every window by itself."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    after: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.mlp.register_forward_pre_hook(lambda _, args, i=i: inputs[i].append(args[0])))
        handles.append(
            layer.register_forward_hook(
                lambda _, args, out, i=i: after[i].append(out[0] if isinstance(out, tuple) else out)
            )
        )
    with torch.no_grad():
        for window in torch.from_numpy(ids):
            model.model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(x).flatten(0, 1) for x in inputs], [torch.cat(h) for h in after]


SLIDING = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "more"),
    [*((family, {}) for family in adapters.FAMILIES), ("mistral", {"sliding_window": 8}), ("qwen2", SLIDING)],
)
def test_walk_sees_what_a_full_forward_pass_feeds_the_ffns(
    family: str, more: dict[str, Any], tiny_model: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_model(family, layers=3, **more)
    inputs, after = hooked(model, token_windows)
    steps: list[tuple[int, int]] = []
    walk = streaming.walk(model, token_windows, progress=lambda done, total: steps.append((done, total)))
    for tokens, x, states in zip(walk, inputs, after, strict=True):
        assert torch.equal(tokens.x, x)  # the same operations on the same shapes
        weight = 1 / states.flatten(0, 1).square().mean(dim=1)
        if adapters.FAMILIES[family].post_norm:  # what the FFN puts out is normalised before it is added
            weight = weight / tokens.block.module(x).square().mean(dim=1)
        torch.testing.assert_close(tokens.weight, weight / weight.mean())
    assert steps == [(1, 3), (2, 3), (3, 3)]
    if more:  # the window must have an effect, or equal inputs prove nothing about each layer's own mask
        plain = hooked(tiny_model(family, layers=3, **{**more, "sliding_window": None}), token_windows)[0]
        assert not torch.allclose(plain[2], inputs[2])
    for layer in model.model.layers:
        assert not layer._forward_pre_hooks
        assert not layer.mlp._forward_pre_hooks


@pytest.mark.parametrize("keep", [0, 1 << 29])
def test_hidden_is_the_glu_whether_kept_or_not(
    keep: int, tiny_llama: Callable[..., Any], token_windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_BYTES", keep)
    monkeypatch.setattr(streaming, "_ROWS", 50)
    for tokens in streaming.walk(tiny_llama(), token_windows):
        block = tokens.block
        h = torch.nn.functional.silu(tokens.x @ block.gate.T) * (tokens.x @ block.up.T)
        parts = list(tokens.parts())
        assert [part.start for part in parts] == [0, 50, 100, 150]
        torch.testing.assert_close(torch.cat([tokens.hidden(part) for part in parts]), h)
        torch.testing.assert_close(tokens.hidden(slice(0, None, 7)), h[::7])
        torch.testing.assert_close(torch.cat([tokens.target(part) for part in parts]), h @ block.down.T)
        assert (tokens._hidden is None) == (keep == 0)


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_replacement_changes_the_following_layers_only(
    family: str, tiny_model: Callable[..., Any], make_plan: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_model(family, layers=3)
    plan, _ = make_plan(model)
    with scoring.swapped(model, plan):
        inputs, _ = hooked(model, token_windows)
    before = [block.module for block in adapters.ffns(model)]
    attention = [layer.self_attn for layer in model.model.layers]
    for tokens, x in zip(streaming.walk(model, token_windows), inputs, strict=True):
        torch.testing.assert_close(tokens.x, x)
        tokens.replacement = modeling.build_ffn(tokens.block, plan.layers[tokens.block.index])
    assert [block.module for block in adapters.ffns(model)] == before
    assert [layer.self_attn for layer in model.model.layers] == attention
    assert not torch.allclose(x, hooked(model, token_windows)[0][2]), "a replacement must have an effect"


def test_attention_is_computed_once_a_layer(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama(layers=3)
    plan, _ = make_plan(model)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda module, args, out, index=index: calls.append(index))
    for tokens in streaming.walk(model, token_windows):
        tokens.replacement = modeling.build_ffn(tokens.block, plan.layers[tokens.block.index])
    assert calls == [index for index in range(3) for _ in token_windows]


def test_a_layer_is_let_go_before_the_next_one_runs(
    tiny_llama: Callable[..., Any], make_plan: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama(layers=3)
    plan, _ = make_plan(model)
    held: list[Any] = []
    alive: list[bool] = []

    def look(module: Any, args: Any, index: int) -> None:
        if held and index == here + 1:
            alive.extend(ref() is not None for ref in held)

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(partial(look, index=index))
    for here, tokens in enumerate(streaming.walk(model, token_windows)):
        tokens.replacement = modeling.build_ffn(tokens.block, plan.layers[here])
        names = ("x", "_hidden", "_output", "replacement")
        held[:] = [weakref.ref(getattr(tokens, name)) for name in names]
    assert alive == [False] * 4 * 2 * len(token_windows)


class Dead(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_shift_is_what_brings_the_stream_back(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    """Layer 0 loses its FFN; an FFN of layer 1 that outputs exactly its target restores the dense hidden states."""
    model = tiny_llama(layers=3)
    inputs, after = hooked(model, token_windows)

    class Exact(torch.nn.Module):
        def __init__(self, tokens: LayerTokens) -> None:
            super().__init__()
            self.rows = tokens.target(slice(None)).split(token_windows.shape[1])
            self.next = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.next += 1
            return self.rows[self.next - 1][None]

    for index, tokens in enumerate(streaming.walk(model, token_windows, dense_stream=True)):
        assert tokens.shift is not None
        if index == 0:
            assert not tokens.shift.any()
            tokens.replacement = Dead()
        elif index == 1:
            assert not torch.allclose(tokens.x, inputs[1])
            tokens.replacement = Exact(tokens)
        else:
            # Sums of a residual stream of size about 10 in another order: 10 * 2^-24 * a few.
            torch.testing.assert_close(tokens.x, inputs[2], atol=1e-4, rtol=1e-4)
            assert float(tokens.shift.abs().max()) < 1e-4 * float(after[2].abs().max())


def test_whole_windows_are_held_out(tiny_llama: Callable[..., Any]) -> None:
    ids = np.random.default_rng(0).integers(0, 256, size=(11, 6))
    held = next(iter(streaming.walk(tiny_llama(layers=1), ids))).held.reshape(11, 6)
    assert held.all(dim=1).nonzero().flatten().tolist() == [4, 9]
    assert held.any(dim=1).sum() == 2
    few = next(iter(streaming.walk(tiny_llama(layers=1), ids[:2]))).held.reshape(2, 6)
    assert few.all(dim=1).tolist() == [False, True]
    with pytest.raises(MoEdgeError, match="1 calibration window is too few"):
        next(iter(streaming.walk(tiny_llama(layers=1), ids[:1])))


def test_hooks_go_away_when_a_layer_fails(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        list(streaming.walk(model, token_windows))
    assert all(not layer._forward_pre_hooks and not layer.mlp._forward_pre_hooks for layer in model.model.layers)
