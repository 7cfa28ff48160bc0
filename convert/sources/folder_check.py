"""What a Hugging Face folder holds, looked at before a library opens it: whole JSON files, float weights, no adapter.

transformers takes many a damaged or half downloaded folder and makes a model of it: it attaches an adapter that lies
beside the weights, casts float8 and integers to floats without their scales, and reads shards that an older download
left. Here each is one sentence that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._files import refuse_pointer
from moedge.convert.errors import translated
from moedge.convert.sources import config_keys, float8

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "plan.json"),
)
"""JSON files that hold an object, where they are there."""
_COMPANIONS = (
    *_OBJECTS,
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
    "plan.safetensors",
)
_FLOATS = ("F64", "F32", "F16", "BF16")
_SCALES = re.compile(
    r"(_scale|_scale_inv|_scale_2|_scale_shape|\.scales|\.qweight|\.qzeros|\.g_idx|_packed|_zero_point|\.SCB|\.absmax"
    r"|\.quant_map|\.nested_absmax|\.quant_state\..*)$"
)
"""Tensors that quantizers write beside or in place of a weight."""
_LEFT = (
    # A buffer of each layer's attention until transformers 4.32, which computes it from the rope parameters since.
    re.compile(r"^(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"),
)
"""Tensors that may lie in a file unread. What ``inv_freq`` holds is compared with the model: :func:`_check_rotary`."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        MoEdgeError: it is missing, a Git LFS pointer, not JSON, or holds something else.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoEdgeError(f"{path.parent} has no {path.name}; give a Hugging Face model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MoEdgeError(f"{path} is damaged ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise MoEdgeError(f"{path} is damaged (it holds no JSON object); download it again.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, which names a ``model_type``.

    Raises:
        MoEdgeError: it is missing or damaged.
    """
    config = read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise MoEdgeError(f"{folder / 'config.json'} is damaged or names no model_type; download it again.")
    return config


def check(folder: Path) -> dict[str, Any]:
    """Check the small files and the headers of the weights; return what config.json holds.

    Raises:
        MoEdgeError: something is missing, damaged, a Git LFS pointer or quantized, an adapter lies beside the weights,
            or config.json says what transformers ignores (:func:`moedge.convert.sources.config_keys.check`).
    """
    config = read_config(folder)
    check_companions(folder)
    files = weight_files(folder)
    if (folder / ADAPTER).exists():
        raise MoEdgeError(
            f"{folder / ADAPTER} is a LoRA adapter beside a whole model, and nothing says whether the weights have it "
            "already. If it was merged, move the adapter_* files away; if not, merge it with peft (merge_and_unload) "
            "and save the result."
        )
    config_keys.check(config, folder / "config.json")
    _check_headers(folder, files, config)
    return config


def check_companions(folder: Path) -> None:
    """Check that the small files of a folder, where they are there, are no pointers and hold JSON objects.

    Raises:
        MoEdgeError: naming the first that does not.
    """
    for name in _COMPANIONS:
        refuse_pointer(folder / name)
    for name in _OBJECTS:
        if (folder / name).exists():
            read_object(folder / name)


def weight_names(folder: Path) -> list[str]:
    """Return the names of the files that may hold the weights: the whole one, and the shards that an index names.

    Raises:
        MoEdgeError: the index is damaged.
    """
    index = folder / _INDEX
    return list(dict.fromkeys([_WHOLE, *(path.name for path in (_shards(index) if index.exists() else []))]))


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers reads, in its order.

    Raises:
        MoEdgeError: there are none, or only pickles, an adapter or part of the shards; the index is damaged; or there
            is one whole file beside shards.
    """
    whole, index = folder / _WHOLE, folder / _INDEX
    shards = _shards(index) if index.exists() else []
    others = [path for path in shards if path.name != _WHOLE]
    if whole.is_file():
        if beside := [path for path in others if path.is_file()]:
            raise MoEdgeError(
                f"{folder} holds {_WHOLE} and {beside[0].name}, two sets of weights; delete the one that is not the "
                f"model ({_INDEX} belongs to the second)."
            )
        shards = [whole]
    for path in shards:
        if not path.is_file():
            raise MoEdgeError(f"{path} is missing, which {_INDEX} names; download it again.")
        refuse_pointer(path)
    if not shards:
        raise MoEdgeError(_nothing(folder))
    return shards


def _shards(index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise MoEdgeError(f"{index} is damaged (no weight_map of names to files); download it again.")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise MoEdgeError(f"{index} names {name!r}, which is no safetensors file of its folder; download it again.")
    return [index.with_name(name) for name in files]


def _nothing(folder: Path) -> str:
    """Say what lies in a folder without weights."""
    if (folder / ADAPTER).exists():
        return (
            f"{folder} holds a LoRA adapter ({ADAPTER}) and no model; merge it into its base model with peft "
            "(merge_and_unload), save the result and give that folder."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return f"{folder} holds pickle weights (.bin) only, which can run code when loaded; save safetensors first."
    if (folder / "model.onnx").is_file():
        return f"{folder} is an ONNX bundle; give the checkpoint that it was exported from."
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder} holds {found[0]}, but neither {_WHOLE} nor {_INDEX}; download the model again, whole."
    return f"{folder} holds no *.safetensors weights."


def _check_headers(folder: Path, files: list[Path], config: dict[str, Any]) -> None:
    """Refuse damaged files, a tensor in two of them, and tensors that are not plain floats (or float8 and scales)."""
    from safetensors import safe_open

    where: dict[str, Path] = {}
    tensors: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        with translated(f"{path} is damaged", "Download it again."), safe_open(path, framework="np") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            found = {name: (str(part.get_dtype()), list(part.get_shape())) for name, part in slices.items()}
        if twice := sorted(where.keys() & found.keys()):
            raise MoEdgeError(f"{path} and {where[twice[0]].name} both hold {twice[0]}; download the model again.")
        where |= dict.fromkeys(found, path)
        tensors |= found
    if float8.is_fp8(config):
        float8.check(folder, config, tensors)
        return
    for name, (kind, _) in tensors.items():
        quantized = kind.startswith(("F8", "F6", "F4")) or (name.endswith(".weight") and kind not in _FLOATS)
        if quantized or _SCALES.search(name):
            raise MoEdgeError(
                f"{where[name]} holds {name} ({kind}), a part of quantized weights, and config.json has no "
                "quantization_config; give the float model that they were made from, or save a de-quantized one."
            )


def check_loaded(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that transformers made up, left unread, or could not make fit, and such as are not finite.

    Args:
        folder: what was loaded.
        model: the result.
        info: what ``from_pretrained(.., output_loading_info=True)`` returned.

    Raises:
        MoEdgeError: names one weight and counts the others.
    """
    import torch

    bad = {str(name): "is missing" for name in info["missing_keys"]}
    bad |= {
        str(name): f"has shape {list(found)}, config.json wants {list(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    }
    if bad:
        name, what = min(bad.items())
        raise MoEdgeError(f"{folder}: weight {name} {what}{_more(bad)}; download or save the model again.")
    unread = sorted(name for name in map(str, info["unexpected_keys"]) if not _left(name))
    if unread:
        raise MoEdgeError(
            f"{folder}: weight {unread[0]} has no place in the model that config.json describes{_more(unread)}; "
            "correct config.json, or save the model again."
        )
    if errors := info.get("error_msgs"):
        raise MoEdgeError(f"{folder}: {str(errors[0]).splitlines()[0]}; download or save the model again.")
    _check_tied(folder, model)
    _check_rotary(folder, model)
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            continue  # on disk: checked when it is read (moedge.convert.offload)
        if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            raise MoEdgeError(f"{folder}: weight {name} holds NaN or infinity; download or save the model again.")


def tensors(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Return the file and the shape of every tensor of a folder's weights.

    Raises:
        MoEdgeError: a damaged file.
    """
    from safetensors import safe_open

    found: dict[str, tuple[Path, list[int]]] = {}
    for path in weight_files(folder):
        with translated(f"{path} is damaged", "Download it again."), safe_open(path, framework="np") as stream:
            found |= {name: (path, list(stream.get_slice(name).get_shape())) for name in stream.keys()}  # noqa: SIM118
    return found


def _more(names: Any) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _left(name: str) -> bool:
    return any(pattern.search(name) for pattern in _LEFT)


def _check_tied(folder: Path, model: PreTrainedModel) -> None:
    """Refuse an output matrix of its own where the config ties it: transformers keeps it, other programs drop it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    if head.weight is not embedding.weight and head.weight.data_ptr() != embedding.weight.data_ptr():
        raise MoEdgeError(
            f"{folder}: lm_head.weight differs from the embedding, and config.json says tie_word_embeddings; set that "
            "to false if the weight is the model's, or save the model without it."
        )


def _inverse_frequencies(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of :data:`_LEFT` in the files, float32."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                if "rotary_emb" in name:
                    yield name, stream.get_tensor(name).float()


def _check_rotary(folder: Path, model: PreTrainedModel) -> None:
    """Refuse an old checkpoint whose stored rotary frequencies are not those of its config.

    transformers hides these tensors from its loading info. They were rounded to the dtype of the file, at worst
    bfloat16 (relative 2^-9), twice; scaled rotary embeddings stored what they scale.
    """
    import torch

    for name, stored in _inverse_frequencies(folder):
        config, size = model.config, 2 * stored.numel()
        base = (config.rope_parameters or {}).get("rope_theta", 10000.0)
        plain = 1.0 / base ** (torch.arange(0, size, 2).float() / size) if isinstance(base, float | int) else stored
        own = getattr(model.base_model.rotary_emb, "inv_freq", plain)
        known = [other.float().cpu() for other in (plain, own) if other.shape == stored.shape]
        if not _left(name) or not any(torch.allclose(stored, other, rtol=2**-8, atol=0) for other in known):
            raise MoEdgeError(
                f"{folder}: {name} holds other frequencies than rope_theta and rope_scaling in config.json give; "
                "correct config.json."
            )
