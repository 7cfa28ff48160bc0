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
    import numpy as np
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How the layers of one model type are written; every one has its FFN at ``model.layers.N.mlp``."""

    fused: bool = False
    """Gate and up are the two halves of one ``gate_up_proj`` (Phi-3), not ``gate_proj`` and ``up_proj``."""
    post_norm: bool = False
    """The FFN's output is normalised before it is added to the residual stream."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(fused=True),
    "gemma2": Family(post_norm=True),
    "gemma3_text": Family(post_norm=True),
    "olmo2": Family(post_norm=True),
}
"""Model types that can be converted."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names in a Hugging Face config -> names in :mod:`moedge.convert.ops`."""

MOE_PREFIX = "moedge_"
"""A converted checkpoint's model_type is this prefix and the model_type of its dense parent."""


@dataclass
class FFN:
    """One GLU block: D neurons, H hidden. The weights are views of the model's own parameters, not copies.

    Of a layer that is on disk they are read anew each time (:mod:`moedge.convert.offload`).
    """

    index: int
    name: str
    """Module path in the model, e.g. ``model.layers.0.mlp``."""
    module: torch.nn.Module
    hidden_act: str
    """Activation of the gate: ``silu``, ``gelu_tanh`` or ``gelu``."""

    family: Family = Family()

    @property
    def width(self) -> int:
        """D; it is known without reading a weight."""
        down: torch.Tensor = self.module.get_submodule("down_proj").weight  # type: ignore[assignment]
        return int(down.shape[1])

    @property
    def hidden_size(self) -> int:
        """H, likewise."""
        down: torch.Tensor = self.module.get_submodule("down_proj").weight  # type: ignore[assignment]
        return int(down.shape[0])

    @property
    def gate(self) -> torch.Tensor:
        """Gate projection [D, H]."""
        return self._weight("gate_up_proj").chunk(2)[0] if self.family.fused else self._weight("gate_proj")

    @property
    def up(self) -> torch.Tensor:
        """Up projection [D, H]."""
        return self._weight("gate_up_proj").chunk(2)[1] if self.family.fused else self._weight("up_proj")

    @property
    def down(self) -> torch.Tensor:
        """Down projection [H, D]."""
        return self._weight("down_proj")

    @property
    def gate_bias(self) -> torch.Tensor | None:
        """Bias of the gate projection [D], or None."""
        return self._bias("gate_proj")

    @property
    def up_bias(self) -> torch.Tensor | None:
        """Bias of the up projection [D], or None."""
        return self._bias("up_proj")

    @property
    def down_bias(self) -> torch.Tensor | None:
        """Bias of the down projection [H], or None. It belongs to no neuron: it is added once, whatever is routed."""
        return self._bias("down_proj")

    def _weight(self, name: str) -> torch.Tensor:
        from moedge.convert import offload

        return offload.weight(self.module.get_submodule(name), "weight")

    def _bias(self, name: str) -> torch.Tensor | None:
        if self.family.fused:
            return None  # ffns() refuses a fused projection with a bias
        from moedge.convert import offload

        linear = self.module.get_submodule(name)
        return None if linear.bias is None else offload.weight(linear, "bias")

    def gate_of(self, output: torch.Tensor) -> torch.Tensor:
        """Return the gate part of what the module :attr:`gate_module` puts out."""
        return output.chunk(2, dim=-1)[0] if self.family.fused else output

    @property
    def gate_module(self) -> torch.nn.Module:
        """The linear layer that computes the gate, perhaps together with up (see :meth:`gate_of`)."""
        return self.module.get_submodule("gate_up_proj" if self.family.fused else "gate_proj")

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Return h = act(gate x) * (up x), biases included, of inputs [n, H]: float32 [n, D], computed in float32."""
        import torch.nn.functional as F

        from moedge.convert.ops import activate

        x = x.float()
        biases = (None if bias is None else bias.float() for bias in (self.gate_bias, self.up_bias))
        gate, up = (F.linear(x, w.float(), b) for w, b in zip((self.gate, self.up), biases, strict=True))
        return activate(gate, self.hidden_act) * up


def ffns(model: PreTrainedModel) -> list[FFN]:
    """List the GLU blocks of a dense model, first layer first.

    Raises:
        MoEdgeError: the model is already converted, has no GLU block, or belongs to no known family.
    """
    import torch

    refuse_unsupported(model.config.model_type, "the model", lambda: model)
    family, name = FAMILIES[model.config.model_type], hidden_act(model.config)
    if name not in ACTIVATIONS:
        raise MoEdgeError(f"FFN activation {name!r} is not supported; known: {', '.join(sorted(ACTIVATIONS))}.")
    activation = ACTIVATIONS[name]
    blocks = []
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.mlp"
        for part in ("gate_up_proj", "down_proj") if family.fused else ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, part, None)
            if not isinstance(linear, torch.nn.Linear) or not linear.weight.is_floating_point():
                raise MoEdgeError(f"{name}.{part} is not a plain floating-point linear layer; convert a dense model.")
            if linear.bias is not None and family.fused:
                raise MoEdgeError(f"{name}.{part} has a bias, which no {model.config.model_type} model should have.")
        blocks.append(FFN(index, name, layer.mlp, activation, family))
    return blocks


def hidden_act(config: Any) -> str:
    """Return the name of the gate's activation in a config (``hidden_activation`` in Gemma's)."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


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
    if "experts" in names:
        raise MoEdgeError(
            f"{where} is a Mixture-of-Experts already ({model_type}); `--method cmoe-hierarchical` splits the experts "
            "of olmoe, qwen3_moe and mixtral models."
        )
    if not names & {"gate_proj", "gate_up_proj"}:
        raise MoEdgeError(
            f"{where} has no GLU FFN (model type {model_type!r}: no gate projection); MoEdge converts gated FFNs only."
        )
    raise MoEdgeError(f"{where}: model type {model_type!r} has no adapter yet; supported: {', '.join(FAMILIES)}.")


def check_ids(model: PreTrainedModel, token_windows: np.ndarray) -> None:
    """Refuse token ids that the model has no embedding for: its tokenizer is another model's, or was given tokens.

    Raises:
        MoEdgeError: the largest id, and how many there are.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if token_windows.size and token_windows.max() >= size:
        raise MoEdgeError(
            f"The tokenizer gives token {token_windows.max()}, the model has embeddings for {size} tokens; take the "
            "model's own tokenizer."
        )


def describe(model: PreTrainedModel, sha256: str = "") -> dict[str, Any]:
    """Return the facts that name a dense parent in a plan (``MoEPlan.model``); ``sha256`` is ``Source.sha256``."""
    config = model.config
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "hidden_act": ACTIVATIONS.get(hidden_act(config), hidden_act(config)),
        "sha256": sha256,
    }
