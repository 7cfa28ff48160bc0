"""One view of the experts of an existing Mixture-of-Experts, whatever family the model belongs to.

In transformers 5 these families share one form: ``model.layers.N.mlp`` holds ``gate``, a router module that returns
(logits, weights [T, K], expert indices [T, K]), and ``experts``, whose weights are two 3-D tensors. E experts, K of
them active for a token, I neurons each, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.convert import adapters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FAMILIES = ("olmoe", "qwen3_moe", "mixtral")
"""Model types whose experts can be converted (``--method cmoe-hierarchical``)."""


@dataclass
class Expert(adapters.FFN):
    """One expert as a GLU block: views of rows of the fused tensors, not copies."""

    number: int = 0

    @property
    def gate(self) -> torch.Tensor:
        """Gate projection [I, H]."""
        return self._fused("gate_up_proj").chunk(2)[0]

    @property
    def up(self) -> torch.Tensor:
        """Up projection [I, H]."""
        return self._fused("gate_up_proj").chunk(2)[1]

    @property
    def down(self) -> torch.Tensor:
        """Down projection [H, I]."""
        return self._fused("down_proj")

    def _bias(self, name: str) -> None:
        return None  # blocks() refuses experts with biases

    def _fused(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.module.get_parameter(f"experts.{name}").detach()[self.number]
        return tensor


@dataclass
class Block:
    """The FFN of one layer. ``sparse`` is False where the family has a dense FFN there (Qwen3-MoE can)."""

    index: int
    name: str
    module: torch.nn.Module
    hidden_act: str
    sparse: bool

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.module.get_parameter("experts.down_proj").shape[0])

    @property
    def width(self) -> int:
        """I."""
        return int(self.module.get_parameter("experts.down_proj").shape[2])

    def experts(self) -> list[Expert]:
        """List the experts."""
        return [
            Expert(self.index, f"{self.name}.experts.{number}", self.module, self.hidden_act, number=number)
            for number in range(self.num_experts)
        ]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts int64 [T, K] that the model's own router selects for x [T, H], and their weights."""
        _, weights, indices = self.module.get_submodule("gate")(x)
        return indices, weights


def blocks(model: PreTrainedModel) -> list[Block]:
    """List the FFNs of every layer, first layer first.

    Raises:
        MoEdgeError: the model is of another family, or its experts have biases or are quantized.
    """
    if model.config.model_type not in FAMILIES:
        raise MoEdgeError(
            f"The model (type {model.config.model_type!r}) has no experts to convert; this method takes "
            f"{', '.join(FAMILIES)}. Use --method cmoe for a dense model."
        )
    activation = adapters.ACTIVATIONS.get(model.config.hidden_act)
    if activation is None:
        raise MoEdgeError(
            f"Expert activation {model.config.hidden_act!r} is not supported; known: "
            f"{', '.join(sorted(adapters.ACTIVATIONS))}."
        )
    found = []
    for index, layer in enumerate(model.model.layers):
        sparse = hasattr(layer.mlp, "experts")
        block = Block(index, f"model.layers.{index}.mlp", layer.mlp, activation, sparse)
        if sparse:
            names = {name for name, _ in layer.mlp.experts.named_parameters()}
            if names != {"gate_up_proj", "down_proj"} or not layer.mlp.experts.down_proj.is_floating_point():
                raise MoEdgeError(
                    f"{block.name}.experts holds {', '.join(sorted(names))}, not two plain floating-point tensors; "
                    "give an unquantized model."
                )
        found.append(block)
    if not any(block.sparse for block in found):
        raise MoEdgeError("The model has no layer with experts; use --method cmoe on a dense model.")
    return found


def describe(model: PreTrainedModel, sha256: str = "") -> dict[str, Any]:
    """Return the facts that name the parent in a plan; ``intermediate_size`` is the width of one expert."""
    sparse = next(block for block in blocks(model) if block.sparse)
    return adapters.describe(model, sha256) | {
        "intermediate_size": sparse.width,
        "num_experts": sparse.num_experts,
        "experts_per_token": model.config.num_experts_per_tok,
    }
