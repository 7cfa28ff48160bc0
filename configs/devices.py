"""Device profiles: what an engine is built for, and which targets the device takes.

A profile is a small YAML file in ``configs/devices`` (or anywhere, given by path). Its numbers are the vendor's, peak.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge.configs import files as yaml_files
from moedge.configs.errors import checked, matching
from moedge.export import targets

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Figure = Literal["memory_gib", "bandwidth_gb_s", "fp16_tflops", "int8_tops"]
FIGURES: tuple[Figure, ...] = get_args(Figure)
"""What a profile says in numbers; the vendor's, peak."""

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX 1.7 builds engines for (its ComputeCapability enumeration)."""


BFLOAT16 = 8.0
"""The first compute capability with bfloat16 (Ampere)."""


class Device(BaseModel):
    """One device. ``targets`` are the TensorRT targets that its engines may have, best first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_: Literal["moedge.device/1"] = Field(alias="schema")
    name: str
    label: Annotated[str, Field(min_length=1)]
    compute_capability: Annotated[str, matching(r"^\d{1,2}\.\d\Z", "a compute capability, such as 8.9")]
    architecture: Annotated[str, Field(min_length=1)]
    memory_gib: Positive
    bandwidth_gb_s: Positive
    fp16_tflops: Positive | None = None
    """10^12 operations a second of its tensor cores in half precision, without sparsity."""
    int8_tops: Positive | None = None
    """The same of 8-bit integers."""
    sources: dict[Figure, Annotated[str, matching(r"^https://\S+\Z", "a link that begins with https://")]] = {}
    """Where the vendor states each figure."""
    unconfirmed: Annotated[tuple[Figure, ...], Field(strict=False)] = ()
    """Figures that were written down from memory: nobody of us has read them at their source."""
    unified_memory: bool
    targets: Annotated[tuple[Literal["tensorrt", "tensorrt-rtx"], ...], Field(min_length=1, strict=False)]
    tensorrt: Annotated[str, matching(r"^\d{1,2}\.\d{1,2}\Z", "a version, such as 10.3")] | None = None
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
    return list(yaml_files.packaged("device"))


def load(device: str) -> Device:
    """Read a packaged profile by name, or a YAML file by path.

    Raises:
        MoEdgeError: there is none, or a key is unknown, missing or impossible.
    """
    path, text = yaml_files.read(device, "device")
    content = yaml_files.parse(text, str(path), "device")
    return checked(Device, {"name": path.stem, **content}, where=f"Device profile {path}")


def half_refusal(dtype: str, device: Device) -> str | None:
    """Return why a device cannot run an engine of a half-precision type, or None."""
    if dtype != "bfloat16" or float(device.compute_capability) >= BFLOAT16:
        return None
    return (
        f"{device.label} ({device.sm}) has no bfloat16, GPUs from SM{BFLOAT16 * 10:.0f} on have; export with --half "
        "float16."
    )


def refusal(target: str, device: Device) -> str | None:
    """Return why an engine of ``target`` cannot be built for ``device``, naming what can, or None."""
    row = targets.find(target)
    if float(device.compute_capability) < row.oldest_capability and row.bits:
        others = [other.name for other in (targets.sibling(row, 8), targets.known(row.unquantised or "")) if other]
        return (
            f"TensorRT for RTX has no {row.bits}-bit weights for {device.label} ({device.sm}), they begin with "
            f"SM{row.oldest_capability * 10:.0f}; export the target {' or '.join(others)} instead."
        )
    if row.engine is None:
        return (
            f"A {target} bundle is run by ONNX Runtime as it is and needs no engine; export tensorrt or tensorrt-rtx."
        )
    if row.engine in device.targets:
        return None
    ours = " or ".join(device.targets)
    if row.engine == "tensorrt-rtx":
        instead = (
            f"make an archive with `moedge pack CHECKPOINT OUT.tar --for {device.name}` and build on the device"
            if device.unified_memory
            else f"export the target {ours} and build the engine on the device"
        )
        supported = ", ".join(RTX_CAPABILITIES)
        return (
            f"TensorRT for RTX has no engines for {device.label} ({device.sm}); it supports compute capabilities "
            f"{supported}. Instead, {instead}."
        )
    return f"TensorRT does not support {device.label} ({device.sm}) any more; export {ours} instead."
