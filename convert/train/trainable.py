"""What of a converted model is trained: named groups of parameters, LoRA on the rest, and the way back to weights.

A plan's ``scale`` (CMoE's u), ``compensation`` and ``output_bias`` are buffers of a :class:`SparseFFN`; while they are
trained they are parameters of the same name, so a checkpoint looks the same either way. PEFT freezes every parameter
that is not its own; the groups that were asked for are switched on after wrapping, by identity (docs/methods.md 1.3).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from moedge import MoEdgeError
from moedge.convert.kept_inputs import KeepsInputs
from moedge.convert.modeling import SparseFFN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Group = Literal["router", "scale", "compensation", "norms", "lora", "experts", "shared", "attention", "embeddings"]
GROUPS: tuple[str, ...] = get_args(Group)
"""``router``; ``scale`` (u); ``compensation`` (and the output bias); ``norms``; ``lora`` (low-rank updates); and whole
weights: ``experts``, ``shared`` (the always-on block), ``attention``, ``embeddings`` (and the head)."""

_EXPERTS = ("gate", "up", "down")
_SHARED = ("shared_gate", "shared_up", "shared_down")
_PROMOTED = {"scale": ("scale",), "compensation": ("compensation", "output_bias")}


class LoRASettings(BaseModel):
    """Low-rank updates: rank r, ``alpha`` (the update is scaled by alpha / rank), and what gets one.

    Defaults: rank 8 and alpha 32 of CMoE (sec. 4.1), on attention and FFNs. Expert tensors [E, out, in] get one pair
    of factors an expert. ``dropout`` is for ``attention`` alone: an update of a tensor has no input to drop.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["attention", "shared", "experts"], ...] = ("attention", "shared", "experts")

    @model_validator(mode="after")
    def _fits(self) -> LoRASettings:
        if not self.targets:
            raise ValueError("targets: name at least one of attention, shared, experts.")
        if self.dropout and set(self.targets) != {"attention"}:
            raise ValueError("dropout: works on attention only; set targets to attention or dropout to 0.")
        return self


def parse_groups(text: str) -> tuple[str, ...]:
    """Split ``router+norms+lora`` into groups.

    Raises:
        ValueError: an unknown group, or one that is named twice.
    """
    groups = tuple(part.strip() for part in text.split("+"))
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"unknown group {group!r}; known: {', '.join(GROUPS)}, joined by +.")
    if len(set(groups)) != len(groups):
        raise ValueError("a group is named twice.")
    return groups


@dataclass
class Trainable:
    """A model ready to be trained.

    ``model`` is the model itself, or a PEFT model around it. ``groups`` maps each group that has any to its
    (name in ``model``, parameter) pairs.
    """

    model: nn.Module
    inner: PreTrainedModel
    groups: dict[str, list[tuple[str, nn.Parameter]]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [parameter for pairs in self.groups.values() for _, parameter in pairs]

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)


def prepare(model: PreTrainedModel, groups: tuple[str, ...], lora: LoRASettings) -> Trainable:
    """Freeze a converted model but for ``groups``, in place; with ``lora`` it gets PEFT adapters.

    A group that the model has nothing of (``scale`` in a plan of unit weights) is left out.

    Raises:
        MoEdgeError: the model has nothing to train in any of the groups.
    """
    model.requires_grad_(False)
    ffns = {name: module for name, module in model.named_modules() if isinstance(module, SparseFFN)}
    for group in groups:
        for name in _PROMOTED.get(group, ()):
            for ffn in ffns.values():
                _promote(ffn, name)
    owner: dict[int, str] = {}
    for group in groups:
        for parameter in _members(model, ffns, group):
            owner.setdefault(id(parameter), group)
    wrapped: nn.Module = _wrap(model, ffns, lora) if "lora" in groups else model
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in wrapped.named_parameters():
        group = "lora" if ".lora_" in name else owner.get(id(parameter), "")
        if group:
            parameter.requires_grad_(True)
            found.setdefault(group, []).append((name, parameter))
    if not found:
        raise MoEdgeError(f"The model has nothing to train in {'+'.join(groups)}; choose from {', '.join(GROUPS)}.")
    return Trainable(wrapped, model, found)


def finish(trainable: Trainable) -> PreTrainedModel:
    """Merge the LoRA updates into the weights and freeze everything: a plain converted model again, in place.

    Attention layers become ``W + (alpha/r) B A``; every expert tensor [E, out, in] gets the same for each expert.
    """
    model: Any = trainable.model
    if "lora" in trainable.groups:
        model = model.merge_and_unload()
    for ffn in model.modules():
        if isinstance(ffn, SparseFFN):
            for names in _PROMOTED.values():
                for name in names:
                    _demote(ffn, name)
            _clear_padding(ffn)
    return model.requires_grad_(False).eval()


@contextmanager
def dense_softmax(model: nn.Module, temperature: float = 1.0) -> Iterator[None]:
    """Run every expert, weighted by ``softmax(scores / temperature)``, while the block runs.

    The router stage of DIVE (docs/methods.md 4.1, step 4): each expert's output reaches each token, so every score gets
    a gradient. Selection biases have no effect meanwhile.
    """
    handles, before = [], []
    for ffn in model.modules():
        if isinstance(ffn, SparseFFN) and ffn.router is not None:
            before.append((ffn, ffn.top_k, ffn.combine))
            ffn.top_k, ffn.combine = ffn.num_experts, "softmax"
            handles.append(ffn.router.register_forward_hook(lambda _, __, scores: scores / temperature))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for ffn, top_k, combine in before:
            ffn.top_k, ffn.combine = top_k, combine


def _members(model: PreTrainedModel, ffns: dict[str, SparseFFN], group: str) -> Iterator[nn.Parameter]:
    if group == "norms":
        for module in model.modules():
            if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
                yield from module.parameters(recurse=False)
    elif group == "embeddings":
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            yield from module.parameters()
    elif group == "attention":
        attentions = (module for module in model.modules() if type(module).__name__.endswith("Attention"))
        for child in (child for module in attentions for child in module.children() if isinstance(child, nn.Linear)):
            yield from child.parameters()
    else:
        for ffn in ffns.values():
            yield from _members_of_ffn(ffn, group)


def _members_of_ffn(ffn: SparseFFN, group: str) -> Iterator[nn.Parameter]:
    if group == "router" and ffn.router is not None:
        yield from ffn.router.parameters()
    for name in {"experts": _EXPERTS, "shared": _SHARED}.get(group) or _PROMOTED.get(group, ()):
        value = getattr(ffn, name, None)
        if isinstance(value, nn.Parameter) and value.numel():
            yield value


def _wrap(model: PreTrainedModel, ffns: dict[str, SparseFFN], lora: LoRASettings) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MoEdgeError('LoRA needs the package peft; install moedge with the extra "convert".') from None
    modules = []
    if "attention" in lora.targets:
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Attention"):
                modules += [f"{name}.{key}" for key, child in module.named_children() if isinstance(child, nn.Linear)]
    wanted = (_EXPERTS if "experts" in lora.targets else ()) + (_SHARED if "shared" in lora.targets else ())
    tensors = [
        f"{name}.{key}" for name, ffn in ffns.items() for key in wanted if (t := getattr(ffn, key, None)) is not None
        and t.numel()
    ]  # fmt: skip
    if not modules and not tensors:
        raise MoEdgeError(f"The model has nothing that LoRA could be put on in {', '.join(lora.targets)}.")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules or None,
        target_parameters=tensors or None,
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by a name of version 4
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, config)
    _read_alike(wrapped)
    return wrapped


def _read_alike(wrapped: nn.Module) -> None:
    """Let an update read what its layer reads: a layer that leaves small inputs out does so inside its own forward."""
    from peft.tuners.lora import LoraLayer

    for part in wrapped.modules():
        if isinstance(part, LoraLayer) and isinstance(base := part.get_base_layer(), KeepsInputs):
            # What comes before the dropout is the update's input.
            for dropout in part.lora_dropout.values():
                dropout.register_forward_pre_hook(partial(_kept, base))


def _kept(base: KeepsInputs, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return what ``base`` keeps of its inputs, past its ``count``: the layer's own product counts them."""
    found: torch.Tensor = torch.ops.moedge.keep_large(inputs[0], base.thresholds()[base.place], base.ramp)
    return found


def _promote(ffn: SparseFFN, name: str) -> None:
    """Make a buffer of a SparseFFN a parameter of the same name; nothing happens where it is None."""
    value = ffn._buffers.get(name)
    if value is not None:
        del ffn._buffers[name]
        ffn.register_parameter(name, nn.Parameter(value.detach().clone()))


def _demote(ffn: SparseFFN, name: str) -> None:
    value = ffn._parameters.get(name)
    if value is not None:
        del ffn._parameters[name]
        ffn.register_buffer(name, value.detach())


@torch.no_grad()
def _clear_padding(ffn: SparseFFN) -> None:
    """Zero the columns of ``down`` beyond a narrow expert's width.

    The gate and up rows of the padding are zero and stay so (their gradients are products with them), so what a
    low-rank update puts in these columns is never read; zeros keep the file as the plan describes it.
    """
    if ffn.num_experts:
        gate, up, down = (ffn.get_parameter(name) for name in _EXPERTS)
        padding = ~(gate.bool() | up.bool()).any(-1)
        down.masked_fill_(padding.unsqueeze(1), 0)
