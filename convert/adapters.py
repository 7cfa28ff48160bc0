"""One view of a gated (GLU) feed-forward block, whatever family the model belongs to.

A GLU block computes ``down(act(gate x) * (up x))``. Neuron j is row j of gate and up and column j of down; the output
is a sum over neurons, which is what every conversion method relies on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are ``model.layers.N.mlp`` with ``gate_proj``, ``up_proj`` and ``down_proj``."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names in a Hugging Face config -> names in :mod:`moedge.export.ops`."""

MOE_PREFIX = "moedge_"
"""A converted checkpoint's model_type is this prefix and the model_type of its dense parent."""


@dataclass
class FFN:
    """One GLU block: D neurons, H hidden. The weights are views of the model's own parameters, not copies."""

    index: int
    name: str
    """Module path in the model, e.g. ``model.layers.0.mlp``."""
    module: torch.nn.Module
    hidden_act: str
    """Activation of the gate: ``silu``, ``gelu_tanh`` or ``gelu``."""

    @property
    def gate(self) -> torch.Tensor:
        """Gate projection [D, H]."""
        return self._weight("gate_proj")

    @property
    def up(self) -> torch.Tensor:
        """Up projection [D, H]."""
        return self._weight("up_proj")

    @property
    def down(self) -> torch.Tensor:
        """Down projection [H, D]."""
        return self._weight("down_proj")

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.module.get_submodule(name).weight.detach()  # type: ignore[operator]
        return weight


def ffns(model: PreTrainedModel) -> list[FFN]:
    """List the GLU blocks of a dense model, first layer first.

    Raises:
        MoEdgeError: the model is already converted, has no GLU block, or belongs to no known family.
    """
    import torch

    refuse_unsupported(model.config.model_type, "the model", lambda: model)
    activation = ACTIVATIONS.get(model.config.hidden_act)
    if activation is None:
        raise MoEdgeError(
            f"FFN activation {model.config.hidden_act!r} is not supported; known: {', '.join(sorted(ACTIVATIONS))}."
        )
    blocks = []
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.mlp"
        for part in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, part, None)
            if not isinstance(linear, torch.nn.Linear) or not linear.weight.is_floating_point():
                raise MoEdgeError(f"{name}.{part} is not a plain floating-point linear layer; convert a dense model.")
            if linear.bias is not None:
                raise MoEdgeError(f"{name}.{part} has a bias; only FFNs without biases can be converted.")
        blocks.append(FFN(index, name, layer.mlp, activation))
    return blocks


def refuse_unsupported(model_type: str, where: str, build: Callable[[], Any]) -> None:
    """Raise one sentence when a model of ``model_type`` cannot be converted.

    Args:
        model_type: ``model_type`` of the config.
        where: what to call the model in the message.
        build: returns the model, or its skeleton on the meta device; called only for a family that is not known.

    Raises:
        MoEdgeError: already converted, no GLU block, or a family without an adapter.
    """
    if model_type in FAMILIES:
        return
    if model_type.startswith(MOE_PREFIX):
        raise MoEdgeError(
            f"{where} is already a MoEdge Mixture-of-Experts ({model_type}); give its dense parent instead."
        )
    names = {name.rpartition(".")[2] for name, _ in build().named_modules()}
    if not names & {"gate_proj", "gate_up_proj"}:
        raise MoEdgeError(
            f"{where} has no GLU FFN (model type {model_type!r}: no gate projection); MoEdge converts gated FFNs only."
        )
    raise MoEdgeError(f"{where}: model type {model_type!r} has no adapter yet; supported: {', '.join(FAMILIES)}.")


def describe(model: PreTrainedModel, sha256: str = "") -> dict[str, Any]:
    """Return the facts that name a dense parent in a plan (``MoEPlan.model``); ``sha256`` is ``Source.sha256``."""
    config = model.config
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "hidden_act": ACTIVATIONS.get(config.hidden_act, config.hidden_act),
        "sha256": sha256,
    }
