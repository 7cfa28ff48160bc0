"""Open a dense model: a Hugging Face folder, a hub id, a GGUF file or a packaged asset.

Every kind ends as a folder of safetensors that ``from_pretrained`` reads. Nothing unsafe is loaded: no pickle, no
remote code.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moedge import MoEdgeError
from moedge._files import check_links, digest, sha256_file
from moedge.convert import adapters, moe_adapters
from moedge.convert.errors import quiet, translated
from moedge.convert.sources import assets, float8, folder_check, gguf_folder, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIGS = ("*.safetensors.index.json", "config.json", "generation_config.json")
_SIGNS = ("adapter_config.json",)
"""Fetched from the hub beside the model, so that a folder there is refused as the same folder here is."""
_BELOW = ("*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model")
"""Not fetched: the hub's patterns match slashes, too. Folders below hold the model once more, in other formats."""
_LOCAL = {"trust_remote_code": False, "local_files_only": True}
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
        return "asset", *gguf_folder.to_folder(assets.fetch(asset.name))
    if path.is_file():
        if path.suffix != ".gguf":
            raise MoEdgeError(f"{path} is neither a folder nor a .gguf file; give one of these or a hub id org/name.")
        return "gguf", *gguf_folder.to_folder(path)
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
        MoEdgeError: the folder cannot be loaded, its config says what transformers ignores, or its weights are missing,
            of another shape, without a place in the model, not finite, quantized (but float8 by blocks, which is
            de-quantized) or beside an adapter.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from moedge.convert import offload

    check_device(device)
    if dtype not in (*DTYPES, "auto"):
        raise MoEdgeError(f"Dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}.")
    found = folder_check.check(folder)
    wanted = getattr(torch, own_dtype(folder) if dtype == "auto" else dtype)
    config = _config(folder)
    options: dict[str, Any] = {}
    if float8.is_fp8(found):
        from transformers import FineGrainedFP8Config

        # Elsewhere than here transformers keeps float8 where the device has it.
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    with quiet(), translated(f"Cannot load the model in {folder}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below; without it transformers prints a table and refers to that
            use_safetensors=True,
            **_LOCAL,
            **options,
        )
    folder_check.check_loaded(folder, model, info)
    if options:
        model = model.to(wanted)  # before 5.24 what was float8 has the dtype of its scales
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = offload.aligned(tensor.data)
    return model.eval().requires_grad_(False).to(device)


_MOST = 0.5
"""Share of the free memory that a whole model may take; the rest is for what is computed with it."""


def open_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model in float32 for a conversion, whole or layer by layer.

    A dense model that takes more than half of the free memory stays on disk, but for its embedding: one layer of it is
    in memory at a time (:mod:`moedge.convert.offload`). What is made of it is the same, byte for byte.

    Raises:
        MoEdgeError: see :func:`load_model`. Weights that are not finite are found when their layer is read.
    """
    check_device(device)
    if not _is_large(folder, device):
        return load_model(folder, device=device)
    from transformers import GenerationConfig

    from moedge.convert import offload

    config = _config(folder)
    with quiet(), translated(f"Cannot load the model in {folder}"):
        model, info = offload.open_dense(config, folder_check.tensors(folder), device)
    folder_check.check_loaded(folder, model, info)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


def _is_large(folder: Path, device: str) -> bool:
    """Whether a dense model is to stay on disk. Float8 weights are not read as they are, so they do not."""
    config = folder_check.check(folder)
    if config["model_type"] not in adapters.FAMILIES or float8.is_fp8(config):
        return False
    numbers = sum(math.prod(shape) for _, shape in folder_check.tensors(folder).values())
    return 4 * numbers > _MOST * _free(device)


def _free(device: str) -> int:
    """Return the free bytes of memory of a device; the processes that torchrun started here share those of a CPU."""
    if device == "cpu":
        import psutil

        from moedge.runtime.device import moedge_sensors

        free, left = psutil.virtual_memory().available, moedge_sensors.memory_left()
        return int(free if left is None else min(free, left)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _config(folder: Path) -> Any:
    """Read config.json and generation_config.json as transformers does, each under its own name in an error.

    What says how transformers is to run the model is set to what every caller here relies on.
    """
    from transformers import AutoConfig, GenerationConfig

    with quiet():
        with translated(f"transformers refuses {folder / 'config.json'}"):
            config = AutoConfig.from_pretrained(folder, **_LOCAL)
            config._attn_implementation = None
            config._experts_implementation = None
            config.output_attentions = config.output_hidden_states = False
            config.return_dict = True
        if (folder / "generation_config.json").exists():
            with translated(f"transformers refuses {folder / 'generation_config.json'}"):
                GenerationConfig.from_pretrained(folder, local_files_only=True)
    return config


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


def own_dtype(folder: Path) -> str:
    """Return the dtype that a Hugging Face folder says its weights have, a torch dtype name.

    Raises:
        MoEdgeError: config.json is missing, damaged, or names a dtype other than float32, bfloat16 and float16.
    """
    config = folder_check.read_object(folder / "config.json")
    found = config.get("dtype") or config.get("torch_dtype") or "float32"  # the second: before transformers 5
    if found not in DTYPES:
        raise MoEdgeError(f"{folder}: weights of dtype {found!r} are not supported; supported: {', '.join(DTYPES)}.")
    return str(found)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder.

    Raises:
        MoEdgeError: see :func:`moedge.convert.sources.tokenizer_files.load`.
    """
    return tokenizer_files.load(folder)


def identity(folder: Path) -> str:
    """Return the digest of the hashes of the weights, config and tokenizer files in ``folder``."""
    paths = {path for pattern in _CONFIGS + tokenizer_files.PATTERNS for path in folder.glob(pattern)}
    # No others: what lies beside the weights unread is no part of the model.
    weights = [folder / name for name in (*folder_check.weight_names(folder), "plan.safetensors")]
    paths |= {path for path in weights if path.exists()}
    return digest({path.relative_to(folder).as_posix(): sha256_file(path) for path in paths})


def check_folder(folder: Path) -> None:
    """Refuse a Hugging Face folder that cannot be converted, before anything is loaded.

    Raises:
        MoEdgeError: a link without its file, what :func:`folder_check.check` refuses, or an architecture
            that is not supported.
    """
    check_links(folder)
    model_type = str(folder_check.read_config(folder)["model_type"])
    folder_check.weight_files(folder)
    if model_type not in moe_adapters.FAMILIES:
        adapters.refuse_unsupported(model_type, str(folder), _skeleton(folder, model_type))
    folder_check.check(folder)


def _skeleton(folder: Path, model_type: str) -> Callable[[], Any]:
    """Return a function that builds the model without memory, for :func:`adapters.refuse_unsupported`."""

    def build() -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        unknown = f"{folder}: unknown architecture, model type {model_type!r}"
        with quiet(), translated(unknown, f"Supported: {', '.join(adapters.FAMILIES)}."), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, **_LOCAL)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    return build


def _from_hub(spec: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    at = f" at revision {revision}" if revision else ""

    def fetch(revision: str | None, patterns: Sequence[str]) -> Path:
        with translated(
            f"Cannot download {spec}{at} from the Hugging Face hub",
            "Check the name, the network and HF_TOKEN, or give a local folder.",
        ):
            return Path(
                snapshot_download(spec, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_BELOW))
            )

    folder = fetch(revision, (*_CONFIGS, *tokenizer_files.PATTERNS, *_SIGNS))
    # The folder is named after the commit: a branch may move on before the weights are there.
    return fetch(folder.name, folder_check.weight_names(folder))
