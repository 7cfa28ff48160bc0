"""A model whose layers stay in the safetensors files of its folder: one layer is in memory at a time.

accelerate's hooks know where each weight lies. :func:`loaded` brings one layer into memory for as long as its block of
code runs. Whatever reads a weight of a layer that is not loaded (:func:`weight`) gets it from the file, so no caller
has to know which kind of model it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from moedge import MoEdgeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_dense(
    config: Any, found: Mapping[str, tuple[Path, list[int]]], device: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Open a dense model in float32 whose layers stay on disk, and its head, where that is not the embedding.

    ``from_pretrained`` with ``device_map`` would do the same, but it maps and reads every file once on the way.

    Args:
        config: of transformers, of one of :data:`moedge.convert.adapters.FAMILIES`.
        found: the file and the shape of each tensor.

    Returns:
        The model, and what ``from_pretrained(.., output_loading_info=True)`` says of the names and shapes.
    """
    import accelerate
    from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device
    from transformers import AutoModelForCausalLM

    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    info = _loading_info(model, found)
    if any(info.values()):
        return model, info
    as_file = {"dtype": "float32"}
    index = {name: {"safetensors_file": str(path), "weight_name": name, **as_file} for name, (path, _) in found.items()}
    weights = OffloadedWeightsLoader(index=index)
    tied = bool(config.tie_word_embeddings)
    here = ("model.embed_tokens", "model.norm", *(("lm_head",) if tied else ()))
    for name in found:
        if name.rpartition(".")[0] in here:
            set_module_tensor_to_device(model, name, device, value=weights[name])
    if tied and ("lm_head.weight" not in found or torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)):
        model.lm_head.weight = model.model.embed_tokens.weight
    places = {**dict.fromkeys((*here, "model.rotary_emb"), device), "model.layers": "disk"}
    places |= {} if tied else {"lm_head": "disk"}
    accelerate.dispatch_model(model, places, main_device=device, offload_index=index)
    return model, info


def _loading_info(model: PreTrainedModel, found: Mapping[str, tuple[Path, list[int]]]) -> dict[str, Any]:
    """Compare the tensors that a model has with those in its files."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    others = [name for name in found.keys() & wanted.keys() if found[name][1] != wanted[name]]
    return {
        "missing_keys": wanted.keys() - found.keys() - optional,
        "unexpected_keys": {name for name in found.keys() - wanted.keys() if not name.endswith("rotary_emb.inv_freq")},
        "mismatched_keys": {(name, tuple(found[name][1]), tuple(wanted[name])) for name in others},
    }


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether the layers of a model are on disk."""
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


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
    """Return ``skeleton``, a module without memory, in whose place ``build()`` is written (:func:`cast`)."""
    skeleton.__dict__["_hf_hook"] = SimpleNamespace(build=build)
    return skeleton


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a converted model the dtype that it is to be saved in, in place; routers stay in float32.

    If its layers are on disk, it is then only good for ``save_pretrained``, which asks the hook of a module for the
    weights that have no memory, one file of them at a time.
    """
    if not is_offloaded(model):
        return model.to(dtype)
    weights = _Weights(model, dtype)
    for module in model.modules():
        if _hook(module) is not None:
            del module._hf_hook
    model.__dict__.pop("to", None)  # accelerate's, which refuses
    model.to(dtype)
    model.__dict__["_hf_hook"] = SimpleNamespace(weights_map=weights)
    return model


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
