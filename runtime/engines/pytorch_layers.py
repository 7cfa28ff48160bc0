"""PyTorch: read the values between the parts of a decoder, and put others in their place, by hooks on its modules.

The points are those of :mod:`moedge.export.graph.layers`, so an exported graph and its checkpoint show the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export.graph.layers import STREAM, LayerPoint, Spot, place


class Layers:
    """Hooks on the modules of a causal LM.

    Args:
        module: the model.
        path: its checkpoint, which errors name.
        spots: which of the values.
        given: whether other values may be put in place (:attr:`given`).

    Raises:
        MoEdgeError: the model's layers are not built as those of the known families.
    """

    def __init__(self, module: Any, path: Path, spots: Collection[Spot], *, given: bool) -> None:
        self.given: dict[LayerPoint, Any] = {}
        """Tensors [B, S, H] that the running call takes in place of what the model computes."""
        self._shown: dict[LayerPoint, Any] = {}
        self._may_give, self._spots = given, frozenset(spots)
        try:
            self._hook_layers(module.base_model)
            if set(spots) != set(STREAM):
                self._hook_parts(module)
        except AttributeError as error:
            raise MoEdgeError(f"{path} does not show its layers: they are not built as expected ({error}).") from error

    def _hook_layers(self, decoder: Any) -> None:
        for index, part in enumerate((*decoder.layers, decoder.norm)):
            self._read((index, "stream"), part)

    def _hook_parts(self, module: Any) -> None:
        layers = module.model.layers
        for index, layer in enumerate(layers):
            gemma, post = (hasattr(layer, f"{side}_feedforward_layernorm") for side in ("pre", "post"))
            before_ffn = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
            if hasattr(layer, "input_layernorm"):
                self._read((index, "attention_input"), layer.self_attn)
            self._given((index, "attention"), layer.self_attn)
            if post:
                self._given((index, "attention_normed"), layer.post_attention_layernorm)
                self._given((index, "ffn_normed"), layer.post_feedforward_layernorm)
            if gemma or not post:
                self._read((index, "middle"), before_ffn)
                self._read((index, "ffn_input"), layer.mlp)
            else:
                self._read((index, "middle"), layer.mlp)
            self._given((index, "ffn"), layer.mlp)
        self._read((len(layers), "head_input"), module.get_output_embeddings())

    def _read(self, point: LayerPoint, module: Any) -> None:
        """Show what a module reads."""
        if point[1] not in self._spots:
            return

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self._exchanged(point, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._exchanged(point, kwargs["hidden_states"])}

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _given(self, point: LayerPoint, module: Any) -> None:
        """Show what a module gives."""
        if point[1] not in self._spots:
            return

        def hook(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._exchanged(point, output[0]), *output[1:])
            return self._exchanged(point, output)

        module.register_forward_hook(hook)

    def _exchanged(self, point: LayerPoint, value: Any) -> Any:
        self._shown[point] = value
        other = self.given.get(point)
        return value if other is None else other.reshape(value.shape).to(value.dtype)

    def give(self, values: Mapping[LayerPoint, np.ndarray], tensor: Callable[[np.ndarray], Any], path: Path) -> None:
        """Put float32 [T, H] in place of what the model computes, until :meth:`shown` is called.

        Raises:
            MoEdgeError: the model was not opened for that.
        """
        if values and not self._may_give:
            raise MoEdgeError(f"{path} was not opened to be given layers.")
        self.given = {point: tensor(value) for point, value in values.items()}

    def shown(self) -> dict[LayerPoint, np.ndarray]:
        """Return what the model computed in the latest call, float32 [T, H] by point, and forget it."""
        found = {point: self._shown[point] for point in sorted(self._shown, key=place)}
        self._shown, self.given = {}, {}
        return {
            point: value.float().reshape(-1, value.shape[-1]).cpu().numpy().copy() for point, value in found.items()
        }
