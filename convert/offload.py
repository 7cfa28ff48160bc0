"""A model whose layers stay in the safetensors files of its folder: one layer is in memory at a time.

transformers opens such a model (``device_map`` with ``disk``) and checks its files; accelerate's hooks know where each
weight lies. :func:`loaded` brings one layer into memory for as long as its block of code runs. Whatever reads a weight
of a layer that is not loaded (:func:`weight`) gets it from the file, so no caller has to know which kind of model it
has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from moedge import MoEdgeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device_map(tied: bool, device: str) -> dict[str, str]:
    """Return transformers' ``device_map``: all on the device, the layers and a head of its own on disk.

    Args:
        tied: the head is the embedding.
    """
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", *(("lm_head",) if tied else ()))
    return {**dict.fromkeys(rest, device), "model.layers": "disk", **({} if tied else {"lm_head": "disk"})}


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether the layers of a model are on disk."""
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


def refuse(model: PreTrainedModel, what: str, instead: str) -> None:
    """Refuse what needs all weights at once, if the layers of a model are on disk.

    Raises:
        MoEdgeError: says how much memory it takes.
    """
    if is_offloaded(model):
        size = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**30
        raise MoEdgeError(
            f"{what} needs the whole model in memory ({size:.0f} GiB in float32), which this machine has not free; "
            f"{instead}, or use a machine with more."
        )


def device_of(model: PreTrainedModel) -> torch.device:
    """Return where a model computes."""
    embedding: torch.Tensor = model.get_input_embeddings().weight
    return embedding.device


def weight(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a parameter of a module: the one in memory, or the one in the file.

    Raises:
        MoEdgeError: what the file holds is not finite.
    """
    held: torch.Tensor = getattr(module, name)
    if not held.is_meta:
        return held.detach()
    hook = _hook(module)
    value = aligned(hook.weights_map[name].to(hook.execution_device))
    _check_finite(hook, name, value)
    return value


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in aligned memory of its own if it lies in a mapped file at an odd address.

    Matrix products pick another kernel, and other last bits, for unaligned weights: without this a result would depend
    on the length of a file header.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


@contextmanager
def loaded(module: torch.nn.Module) -> Iterator[None]:
    """Hold the weights of a module and of all in it in memory; without effect where they are there already.

    Raises:
        MoEdgeError: a weight in the file is not finite.
    """
    hooks = [(part, hook) for part in module.modules() if getattr(hook := _hook(part), "offload", False)]
    try:
        for part, hook in hooks:
            hook.pre_forward(part)
            hook.offload = False  # or every call of the part would load and drop them again
            for name, parameter in part.named_parameters(recurse=False):
                _check_finite(hook, name, parameter)
                parameter.data = aligned(parameter.data)
        yield
    finally:
        for part, hook in hooks:
            if not hook.offload:
                hook.offload = True
                hook.post_forward(part, None)


def _hook(module: torch.nn.Module) -> Any:
    """Return the hook of a module, or None."""
    return getattr(module, "_hf_hook", None)


def _check_finite(hook: Any, name: str, value: torch.Tensor) -> None:
    if value.numel() and not torch.stack(torch.aminmax(value.detach())).isfinite().all():
        where = getattr(hook.weights_map, "prefix", "")
        raise MoEdgeError(f"Weight {where}{name} holds NaN or infinity; download or save the model again.")


# --- a converted model whose weights are made when they are written -------------------------------------------------


def deferred(skeleton: torch.nn.Module, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return ``skeleton``, a module without memory, in whose place ``build()`` is written (:func:`ready_to_write`)."""
    skeleton.__dict__["_hf_hook"] = SimpleNamespace(build=build)
    return skeleton


def ready_to_write(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a converted model whose layers are on disk one of ``dtype`` that ``save_pretrained`` writes.

    ``save_pretrained`` asks the hook of a module for the weights that have no memory, one file of them at a time.
    """
    weights = _Weights(model, dtype)
    for module in model.modules():
        if _hook(module) is not None:
            del module._hf_hook
    model.__dict__.pop("to", None)  # accelerate's, which refuses
    model.to(dtype)
    model.__dict__["_hf_hook"] = SimpleNamespace(weights_map=weights)


def names(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Return what is to be written, its weights without memory; None for a model in memory.

    In the order in which transformers takes those of a model in memory, so that files have the same content.
    """
    if not is_offloaded(model):
        return None
    tensors = dict(sorted(model.state_dict().items(), key=lambda item: _natural(item[0])))
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    order = [name for name in tensors if name not in empty[1:]]
    if empty:  # in memory they all lie at the same place, nowhere, and are written beside the first
        after = order.index(empty[0]) + 1
        order[after:after] = empty[1:]
    return {name: tensors[name] for name in order}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which layer 2 comes before layer 10."""
    parts = name.split(".")
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


class _Weights(Mapping[str, torch.Tensor]):
    """Name -> weight of a converted model in the dtype that it is saved in; the latest FFN that was built is kept."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        hooks = [(name, _hook(module)) for name, module in model.named_modules()]
        self.builders = {name: hook.build for name, hook in hooks if hasattr(hook, "build")}
        self.files = {name: hook.weights_map for name, hook in hooks if getattr(hook, "weights_map", None) is not None}
        self.names, self.dtype = list(model.state_dict()), dtype
        self.built: tuple[str, Mapping[str, torch.Tensor]] = ("", {})

    def __getitem__(self, name: str) -> torch.Tensor:
        for module, build in self.builders.items():
            if name.startswith(f"{module}."):
                if self.built[0] != module:
                    self.built = ("", {})  # drop one before the next is built
                    self.built = (module, build().to(self.dtype).state_dict())
                return self.built[1][name.removeprefix(f"{module}.")]
        module, _, own = name.rpartition(".")
        return self.files[module][own].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
