"""Device profiles: what an engine is built for, whether it fits, and how fast it can be at best.

A profile is a small YAML file in ``configs/devices`` (or anywhere, given by path). Its numbers are the vendor's, peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moedge import MoEdgeError

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "devices"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX 1.7 builds engines for (its ComputeCapability enumeration)."""


class Device(BaseModel):
    """One device. ``targets`` are the TensorRT targets that its engines may have, best first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_: Literal["moedge.device/1"] = Field(alias="schema")
    name: str
    label: Annotated[str, Field(min_length=1)]
    compute_capability: Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")]
    architecture: Annotated[str, Field(min_length=1)]
    memory_gib: Positive
    bandwidth_gb_s: Positive
    unified_memory: bool
    targets: Annotated[tuple[Literal["tensorrt", "tensorrt-rtx"], ...], Field(min_length=1, strict=False)]
    tensorrt: Annotated[str, Field(pattern=r"^\d{1,2}\.\d{1,2}$")] | None = None
    """The TensorRT that its system ships, or the oldest to install there where nothing ships one."""

    @model_validator(mode="after")
    def _says_its_version(self) -> Device:
        if "tensorrt" in self.targets and self.tensorrt is None:
            raise ValueError("target tensorrt needs the key tensorrt: the version on the device, such as 10.3")
        return self

    @property
    def sm(self) -> str:
        """The architecture as CUDA names it, e.g. ``SM89``."""
        return "SM" + self.compute_capability.replace(".", "")


def names() -> list[str]:
    """Names of the packaged profiles."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(device: str) -> Device:
    """Read a packaged profile by name, or a YAML file by path.

    Raises:
        MoEdgeError: there is none, or a key is unknown, missing or impossible.
    """
    path = Path(device) if device.endswith((".yaml", ".yml")) else FOLDER / f"{device}.yaml"
    if not path.is_file() or path.name != Path(device).name + ("" if path == Path(device) else ".yaml"):
        raise MoEdgeError(f"Unknown device {device!r}; known: {', '.join(names())}, or give a profile's .yaml file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Device.model_validate({"name": path.stem, **content})
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise MoEdgeError(f"Device profile {path} cannot be read: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise MoEdgeError(f"Device profile {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def refusal(target: str, device: Device) -> str | None:
    """Return why an engine of ``target`` cannot be built for ``device``, naming what can, or None."""
    if target not in ("tensorrt", "tensorrt-rtx"):
        return (
            f"A {target} bundle is run by ONNX Runtime as it is and needs no engine; export tensorrt or tensorrt-rtx."
        )
    if target in device.targets:
        return None
    others = " or ".join(device.targets)
    if target == "tensorrt-rtx":
        instead = (
            f"make an archive with `moedge bundle CHECKPOINT OUT.tar --target {device.name}` and build on the device"
            if device.unified_memory
            else f"export the target {others} and build the engine on the device"
        )
        supported = ", ".join(RTX_CAPABILITIES)
        return (
            f"TensorRT for RTX has no engines for {device.label} ({device.sm}); it supports compute capabilities "
            f"{supported}. Instead, {instead}."
        )
    return f"TensorRT does not support {device.label} ({device.sm}) any more; export {others} instead."


@dataclass(frozen=True)
class Fit:
    """What one engine needs of a device, in bytes, and its bandwidth bound."""

    weights: int
    cache: int
    logits: int
    memory: int
    active: int
    bound_tokens_per_s: float

    @property
    def needed(self) -> int:
        """Bytes for weights, both halves of the cache and one prefill's logits; work space is not counted."""
        return self.weights + self.cache + self.logits


def fit(
    model: dict[str, Any],
    weight_bytes: int,
    device: Device,
    *,
    max_length: int,
    max_prompt: int,
    batch: int,
    unread: int = 0,
) -> Fit:
    """Estimate memory, and the decode speed that bandwidth allows: the bytes of weights read, and a cache half full.

    Args:
        model: the ``model`` section of a bundle's manifest.
        weight_bytes: of the lowered graph. Its engine reads all of them for each token but ``unread``, and of an untied
            embedding table it reads one row.
        device: the profile.
        max_length: tokens of the cache.
        max_prompt: most tokens of a prefill.
        batch: rows.
        unread: bytes of the experts that one token does not select, where they are plugins; 0 where every expert is
            computed (:mod:`moedge.export.lowering.trt_experts`).
    """
    per_token = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * 2
    cache = per_token * max_length * batch
    # A tied embedding is read whole, as the output projection. The cache is half full on average.
    active = weight_bytes - unread + cache // 2
    return Fit(
        weights=weight_bytes,
        cache=2 * cache,
        logits=batch * max_prompt * model["vocab_size"] * 2,
        memory=int(device.memory_gib * 2**30),
        active=active,
        bound_tokens_per_s=batch * device.bandwidth_gb_s * 1e9 / active,
    )


def too_large(fit: Fit, device: Device) -> str | None:
    """Return why an engine does not fit into a device's memory, or None."""
    if fit.needed <= fit.memory:
        return None
    return (
        f"The engine needs {fit.needed / 2**30:.1f} GiB (weights, cache, logits) and {device.label} has "
        f"{device.memory_gib:g}; lower --max-length, --max-prompt or --batch, or choose another device."
    )


def routed(moe: dict[str, Any] | None) -> bool:
    """Whether a model has a router: its bundle's ``moe`` section names a layer with experts."""
    return any(entry["num_experts"] for entry in (moe or {"layers": {}})["layers"].values())


def unread_bytes(moe: dict[str, Any] | None, hidden: int) -> int:
    """Bytes of float16 experts that one token does not select: (E - k) * 3 * I * H * 2 in each layer.

    Args:
        moe: the ``moe`` section of a bundle's manifest.
        hidden: H.
    """
    layers = (moe or {"layers": {}})["layers"].values()
    return sum((entry["num_experts"] - entry["top_k"]) * 3 * entry["expert_width"] * hidden * 2 for entry in layers)
