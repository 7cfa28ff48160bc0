"""Open a dense model: a Hugging Face folder, a hub id, a GGUF file or a packaged asset.

Every kind ends as a folder of safetensors that ``from_pretrained`` reads. Nothing unsafe is loaded: no pickle, no
remote code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moedge import MoEdgeError
from moedge._files import check_links, digest, sha256_file
from moedge.convert import adapters, assets, gguf_files, moe_adapters, tokenizer_files
from moedge.convert.errors import first_sentence, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_IDENTITY = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
DTYPES = ("float32", "bfloat16", "float16")


Kind = Literal["folder", "gguf", "hub", "asset"]


@dataclass(frozen=True)
class Source:
    """A model that is ready to load."""

    spec: str
    kind: Kind
    folder: Path
    """Hugging Face folder; for a GGUF the de-quantized float32 copy in the cache."""
    sha256: str
    """Identity of weights, config and tokenizer: digest of the hashes of those files."""
    label: str
    """For people."""


def resolve(spec: str, revision: str | None = None) -> Source:
    """Turn a user's model spec into a folder on disk, and identify what is in it.

    Args:
        spec: a local Hugging Face folder, the path of a ``.gguf`` file, a hub id ``org/name`` or ``asset:NAME``.
        revision: branch, tag or commit, for a hub id only.

    Raises:
        MoEdgeError: missing, damaged, pickle-only, already converted, without GLU FFN or of an unknown architecture.
    """
    kind, folder, label = locate(spec, revision)
    return Source(spec, kind, folder, identity(folder), label)


def locate(spec: str, revision: str | None = None) -> tuple[Kind, Path, str]:
    """:func:`resolve` without the identity, which reads all weights: (kind, folder, label)."""
    path = Path(spec).expanduser()
    if spec.startswith("asset:"):
        asset = assets.find(spec.removeprefix("asset:"))
        return "asset", *gguf_files.to_folder(assets.fetch(asset.name))
    if path.is_file():
        if path.suffix != ".gguf":
            raise MoEdgeError(f"{path} is neither a folder nor a .gguf file; give one of these or a hub id org/name.")
        return "gguf", *gguf_files.to_folder(path)
    if path.is_dir():
        check_folder(path)
        return "folder", path, path.name or str(path.resolve())
    if spec.endswith(".gguf") or spec.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(spec):
        raise MoEdgeError(f"Model {spec} does not exist; give a folder, a .gguf file, a hub id org/name or asset:NAME.")
    folder = _from_hub(spec, revision)
    check_folder(folder)
    return "hub", folder, f"{spec}@{revision}" if revision else spec


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model for inference (eval mode, no gradients).

    Args:
        folder: Hugging Face folder with safetensors.
        dtype: torch dtype name, or ``auto`` for that of the folder.
        device: see :func:`check_device`.

    Raises:
        MoEdgeError: the folder cannot be loaded, lacks weights, has some of another shape than its config says, or some
            that are not finite.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_device(device)
    if dtype not in (*DTYPES, "auto"):
        raise MoEdgeError(f"Dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}.")
    options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    try:
        with quiet():
            wanted = getattr(torch, own_dtype(folder) if dtype == "auto" else dtype)
            model, info = AutoModelForCausalLM.from_pretrained(
                # A mismatch is then named below; without it transformers prints a table and refers to that.
                folder,
                dtype=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise MoEdgeError(f"Cannot load the model in {folder}: {first_sentence(error)}") from error
    _check_weights(folder, model, info)
    _align(model)
    return model.eval().requires_grad_(False).to(device)


def check_device(device: str) -> None:
    """Refuse a torch device other than ``cpu``, ``cuda`` and ``cuda:N``, or one that this machine does not have.

    Raises:
        MoEdgeError: with what can be had instead.
    """
    if device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise MoEdgeError(f"Device {device!r} is not supported; give cpu, cuda or cuda:N.")
    if not torch.cuda.is_available():
        raise MoEdgeError(
            f"Device {device}: PyTorch {torch.__version__} finds no CUDA device here; use cpu, or a CUDA build of "
            "torch on a machine with an NVIDIA GPU."
        )
    if index and int(index) >= torch.cuda.device_count():
        raise MoEdgeError(f"Device {device} is not here; this machine has {torch.cuda.device_count()}, from cuda:0 on.")


def _check_weights(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that transformers made up (it fills what is missing with random numbers) or that are not finite.

    ``info`` is what ``from_pretrained(.., output_loading_info=True)`` returns.
    """
    import torch

    made_up = {str(name): "is missing" for name in info["missing_keys"]}
    made_up |= {
        str(name): f"has shape {list(found)}, config.json wants {list(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    }
    if made_up:
        name, what = min(made_up.items())
        others = f", and {len(made_up) - 1} more" if len(made_up) > 1 else ""
        raise MoEdgeError(f"{folder}: weight {name} {what}{others}; download or save the model again.")
    for name, tensor in model.named_parameters():
        if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            raise MoEdgeError(f"{folder}: weight {name} holds NaN or infinity; download or save the model again.")


def own_dtype(folder: Path) -> str:
    """Return the dtype that a Hugging Face folder says its weights have, a torch dtype name.

    Raises:
        MoEdgeError: config.json is missing, damaged, or names a dtype other than float32, bfloat16 and float16.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("dtype") or config.get("torch_dtype") or "float32"  # the second: before transformers 5
    except (OSError, ValueError, AttributeError) as error:
        raise MoEdgeError(
            f"{folder / 'config.json'} is missing or damaged; give a Hugging Face model folder."
        ) from error
    if found not in DTYPES:
        raise MoEdgeError(f"{folder}: weights of dtype {found!r} are not supported; supported: {', '.join(DTYPES)}.")
    return str(found)


def _align(model: PreTrainedModel) -> None:
    """Copy tensors that lie in the mapped file at odd addresses to aligned memory.

    Matrix products pick another kernel, and other last bits, for unaligned weights: without this a checkpoint's logits
    would depend on the length of its file header.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder.

    Raises:
        MoEdgeError: see :func:`moedge.convert.tokenizer_files.load`.
    """
    return tokenizer_files.load(folder)


def identity(folder: Path) -> str:
    """Return the digest of the hashes of the weights, config and tokenizer files in ``folder``."""
    paths = {path for pattern in _IDENTITY + tokenizer_files.PATTERNS for path in folder.glob(pattern)}
    return digest({path.relative_to(folder).as_posix(): sha256_file(path) for path in paths})


def check_folder(folder: Path) -> None:
    """Refuse a Hugging Face folder that cannot be converted, before anything is loaded.

    Raises:
        MoEdgeError: a link without its file, no config.json, no safetensors, or an architecture that is not supported.
    """
    check_links(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except FileNotFoundError:
        raise MoEdgeError(f"{folder} has no config.json; give a Hugging Face model folder.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MoEdgeError(f"{folder / 'config.json'} is damaged or names no model_type; download it again.") from error
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise MoEdgeError(
                f"{folder} holds pickle weights (.bin) only, which can run code when loaded; save safetensors first."
            )
        if (folder / "model.onnx").is_file():
            raise MoEdgeError(f"{folder} is an ONNX bundle; give the checkpoint that it was exported from.")
        raise MoEdgeError(f"{folder} holds no *.safetensors weights.")
    if model_type not in moe_adapters.FAMILIES:
        adapters.refuse_unsupported(model_type, str(folder), _skeleton(folder, model_type))


def _skeleton(folder: Path, model_type: str) -> Callable[[], Any]:
    """Return a function that builds the model without memory, for :func:`adapters.refuse_unsupported`."""

    def build() -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise MoEdgeError(
                f"{folder}: unknown architecture, model type {model_type!r}; supported: {', '.join(adapters.FAMILIES)}."
            ) from error

    return build


def _from_hub(spec: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_IDENTITY, *tokenizer_files.PATTERNS]
    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise MoEdgeError(
            f"Cannot download {spec}{at} from the Hugging Face hub: {first_sentence(error)} "
            "Check the name, the network and HF_TOKEN, or give a local folder."
        ) from error
