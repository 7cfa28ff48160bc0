"""Linear layers that read only the large values of their inputs: in FFNs, in attention, and in front of the logits.

Attention and the output projection stay the modules that transformers made, with the weights under the same names; they
become of a class that leaves small inputs out before its own ``forward`` runs. A *place* is a layer and one of
:data:`PLACES`; its thresholds are a buffer of the module that reads the values.

H hidden size, A query heads x their width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import moedge.convert.ops  # noqa: F401  registers torch.ops.moedge
from moedge import MoEdgeError
from moedge.convert import offload
from moedge.convert.plan import RAMP, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = ("qkv", "o", "head")
"""Outside FFNs: the inputs of attention, of its output projection, and of the model's output projection."""
FLOAT32 = ("self_attn.qkv_threshold", "o_proj.o_threshold", "lm_head.head_threshold")
"""Buffers that stay in float32 whatever the model's dtype."""


class KeepsLarge(nn.Module):
    """A module that leaves small values out of what its products read, where it has thresholds.

    Attributes:
        layer_index: position in the model; of the output projection the number of layers.
        ramp: width of the thresholds' ramps.
        count: None, or what counts the values that were kept (:mod:`moedge.convert.reads`).
        choose: None, or what takes the place of ``keep_large``: (place; values [T, K]; thresholds [K]) -> values.
            Replay records and forces what is left out by it (:mod:`moedge.runtime.parity`).
    """

    layer_index: int
    ramp: float
    count: Callable[[str, torch.Tensor, torch.Tensor | None], None] | None
    choose: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor] | None

    def _start_keeping(self, layer_index: int, ramp: float) -> None:
        """Set the attributes; nothing is counted or forced yet."""
        self.layer_index, self.ramp = layer_index, ramp
        self.count = self.choose = None

    def kept(self, which: str, values: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
        """Return values [..., K] without the small ones; ``which`` is the place, for what counts and chooses."""
        if self.count is not None:
            self.count(which, values.reshape(-1, values.shape[-1]), threshold)
        if threshold is None:
            return values
        if self.choose is not None:
            return self.choose(which, values.reshape(-1, values.shape[-1]), threshold).reshape(values.shape)
        found: torch.Tensor = torch.ops.moedge.keep_large(values, threshold, self.ramp)
        return found

    def thresholds(self) -> dict[str, torch.Tensor]:
        """Return the thresholds by place, those inside routed experts (``expert_h``) too."""
        raise NotImplementedError

    def _own_float32(self) -> set[int]:
        """Name by ``id`` the tensors that keep their type when the model is cast."""
        return {id(threshold) for threshold in self.thresholds().values()}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsLarge:
        """Move or cast, but never cast thresholds (``model.to(torch.bfloat16)``)."""
        kept = self._own_float32()

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        super()._apply(move, recurse)
        return self


class KeepsInputs(KeepsLarge):
    """Mixin in front of a module's own class: its first argument, or ``hidden_states``, loses its small values."""

    place: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on what is kept."""
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = self.keep_inputs(kwargs["hidden_states"])
        else:
            args = (self.keep_inputs(args[0]), *args[1:])
        return super().forward(*args, **kwargs)

    def keep_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """Return inputs [..., K] without the small ones."""
        return self.kept(self.place, values, self.thresholds()[self.place])

    def thresholds(self) -> dict[str, torch.Tensor]:
        """Return the thresholds [K] of the module's place."""
        return {self.place: getattr(self, f"{self.place}_threshold")}


@functools.cache
def _keeping(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Kept{kind.__name__}", (KeepsInputs, kind), {"__module__": __name__})


@dataclass(frozen=True)
class Reader:
    """What reads the values of a place, whose small ones may be left out."""

    place: str
    """One of :data:`PLACES`, or ``x`` or ``h`` of an FFN (:func:`moedge.convert.gather.places`)."""
    layer: int
    """Whose plan has the thresholds; of the output projection that is the last one."""
    module: nn.Module
    """Its first argument, or ``hidden_states``, are the values."""
    linears: tuple[nn.Linear, ...]
    """The products that read them."""

    @property
    def threshold(self) -> str:
        """Name of the thresholds in a layer's plan and in the module."""
        return f"{self.place}_threshold"

    @property
    def keeps(self) -> bool:
        """Whether small values are left out."""
        return isinstance(self.module, KeepsInputs)

    @property
    def inputs(self) -> int:
        """K."""
        return self.linears[0].in_features

    @property
    def weights(self) -> int:
        """Weights that one value is multiplied by."""
        return sum(linear.out_features for linear in self.linears)


def readers(model: PreTrainedModel) -> list[Reader]:
    """List what reads values outside FFNs, first layer first, the output projection last.

    Raises:
        MoEdgeError: attention without an ``o_proj``, or an output projection that is no linear layer.
    """
    found = []
    for index, layer in enumerate(model.base_model.layers):
        attention = layer.self_attn
        linears = {name: part for name, part in attention.named_children() if isinstance(part, nn.Linear)}
        out = linears.pop("o_proj", None)
        if out is None or not linears:
            raise MoEdgeError(f"The attention of layer {index} has no o_proj, so its small inputs cannot be left out.")
        found += [Reader("qkv", index, attention, tuple(linears.values())), Reader("o", index, out, (out,))]
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise MoEdgeError("The output projection is no linear layer, so its small inputs cannot be left out.")
    return [*found, Reader("head", index, head, (head,))]


def wanted(layers: list[LayerPlan]) -> list[dict[str, Any] | None]:
    """Return what config.json says for each layer of the places outside its FFN: their names and the ramp, or None."""
    specs: list[dict[str, Any] | None] = []
    for layer in layers:
        places = [place for place in PLACES if f"{place}_threshold" in layer.thresholds]
        specs.append({"places": places, "ramp": layer.ramp} if places else None)
    return specs


def apply(model: PreTrainedModel, layers: list[LayerPlan]) -> list[dict[str, Any] | None]:
    """Let a dense model's places outside its FFNs leave out what the layers say; return :func:`wanted`.

    Raises:
        MoEdgeError: the model has no such place, or the plan was made for a model of another shape.
    """
    specs = wanted(layers)
    prepare(model, specs)
    set_thresholds(model, layers)
    return specs


def prepare(model: PreTrainedModel, specs: list[dict[str, Any] | None]) -> None:
    """Let the places that :func:`wanted` names leave small inputs out, by thresholds of 1 for now.

    Raises:
        MoEdgeError: the model has no such place.
    """
    for reader in readers(model) if any(specs) else ():
        spec = specs[reader.layer]
        if spec is None or reader.place not in spec["places"]:
            continue
        module = reader.module
        if not isinstance(module, KeepsInputs):
            module.__class__ = _keeping(type(module))  # type: ignore[arg-type]  # a class is hashable
        assert isinstance(module, KeepsInputs)
        module.place = reader.place
        module._start_keeping(reader.layer + (reader.place == "head"), float(spec.get("ramp", RAMP)))
        ones = torch.ones(reader.inputs, dtype=torch.float32, device=offload.device_of(model))
        module.register_buffer(reader.threshold, ones)


def restore(model: PreTrainedModel) -> None:
    """Undo :func:`prepare`: every module outside the FFNs reads all of its inputs again."""
    for module in [part for part in model.modules() if isinstance(part, KeepsInputs)]:
        delattr(module, f"{module.place}_threshold")
        module.__class__ = type(module).__bases__[1]


def set_thresholds(model: PreTrainedModel, layers: list[LayerPlan]) -> None:
    """Give the places of a prepared model the thresholds of their layers.

    Raises:
        MoEdgeError: the plan was made for a model of another shape.
    """
    for reader in readers(model) if any(wanted(layers)) else ():
        value = layers[reader.layer].thresholds.get(reader.threshold)
        if value is None:
            continue
        if len(value) != reader.inputs:
            raise MoEdgeError(
                f"The plan has {len(value)} thresholds for {reader.place} of layer {reader.layer}, which reads "
                f"{reader.inputs} values; convert again."
            )
        setattr(reader.module, reader.threshold, torch.from_numpy(value).to(offload.device_of(model), copy=True))


def keep_for_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return last hidden states [..., H] as the output projection multiplies them (:func:`project`)."""
    head = model.get_output_embeddings()
    return head.keep_inputs(hidden) if isinstance(head, KeepsInputs) else hidden


def project(model: PreTrainedModel, kept: torch.Tensor) -> torch.Tensor:
    """Return the logits [..., V] of what :func:`keep_for_head` left, of this model or of a variant of it."""
    head: Any = model.get_output_embeddings()
    logits = nn.functional.linear(kept, head.weight, head.bias)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
