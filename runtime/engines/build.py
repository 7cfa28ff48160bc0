"""Bundle -> engine: build, describe, hash, all or nothing.

An engine folder holds ``engine.plan``, the tokenizer files and ``manifest.json`` (schema ``moedge.engine/1``): the
bundle it came from, what it was built with and for, its profiles and taps, and the sha256 of every file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedge import MoEdgeError, __version__
from moedge._files import atomic_dir, digest, hash_tree, safe_join, write_json
from moedge.configs import devices
from moedge.export import targets
from moedge.runtime.device import moedge_cuda, moedge_plugins, moedge_trt
from moedge.runtime.engines import estimate

SCHEMA = "moedge.engine/1"
PLAN = "engine.plan"
MANIFEST = "manifest.json"
LIBRARY = "libmoedge_launch.so"
"""The plugin library beside an engine of TensorRT for RTX that needs it."""
_REQUIRED = ("target", "kind", "label", "model", "moe", "profiles", "taps", "compute_capabilities", "versions", "files")


@dataclass(frozen=True)
class EngineFile:
    """A verified engine folder."""

    path: Path
    manifest: dict[str, Any]

    def plan(self) -> bytes:
        """Read the serialized engine; its hash is checked once more on the bytes that are returned."""
        try:
            return moedge_trt.read_checked(safe_join(self.path, PLAN), self.manifest["files"][PLAN]["sha256"])
        except moedge_trt.DeviceError as error:
            raise MoEdgeError(str(error)) from error

    def library(self) -> str | None:
        """Return the file of the plugin library that the engine needs, its hash checked once more, or None."""
        path = safe_join(self.path, LIBRARY)
        if LIBRARY not in self.manifest["files"]:
            return None
        try:
            moedge_trt.read_checked(path, self.manifest["files"][LIBRARY]["sha256"])
        except moedge_trt.DeviceError as error:
            raise MoEdgeError(str(error)) from error
        return str(path)


def build(
    bundle_path: Path,
    out: Path,
    device_names: Sequence[str],
    *,
    max_length: int | None = None,
    max_prompt: int | None = None,
    batch: int = 1,
    taps: bool = False,
    timing_cache: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Build the engine of a ``tensorrt-rtx`` bundle (on any machine) or a ``tensorrt`` bundle (on its device).

    Args:
        bundle_path: what ``moedge export`` wrote, quantised or not.
        out: engine folder.
        device_names: profiles the engine is for; see :mod:`moedge.configs.devices`.
        max_length: longest sequence; the bundle's limit, at most 2048, by default.
        max_prompt: most tokens of one prefill call; half of ``max_length`` by default.
        batch: most rows of a call.
        taps: make every layer's selected experts, and what its router read, outputs of the engine, to judge routing (a
            little slower).
        timing_cache: see :func:`moedge_trt.build`.
        force: replace an existing folder.

    Returns:
        The manifest.

    Raises:
        MoEdgeError: a device that the target does not support (naming what it does), too little memory there, a
            damaged bundle, or a graph that TensorRT cannot parse or build.
    """
    from moedge.export.bundle import copy_companions, open_bundle

    bundle = open_bundle(bundle_path)
    manifest = bundle.manifest
    target, model = manifest["target"], manifest["model"]
    rtx = targets.find(target).engine == "tensorrt-rtx"
    profiles = [devices.load(name) for name in device_names]
    if not profiles:
        raise MoEdgeError(f"Name at least one device to build for; known: {', '.join(devices.names())}.")
    native = manifest.get("experts") == "native"
    for device in profiles:
        if reason := devices.refusal(target, device):
            raise MoEdgeError(reason)
        if rtx and "plugins" in manifest and device.compute_capability == "7.5":
            raise MoEdgeError(f"There are no kernels for {device.label} (SM75); export with --expert-form merged.")
        if reason := devices.half_refusal(manifest["cache"].get("dtype", "float16"), device):
            raise MoEdgeError(reason)
        if native and (reason := moedge_trt.moe_refusal(device.label, device.compute_capability)):
            raise MoEdgeError(reason)
    if target == "tensorrt" and len({device.compute_capability for device in profiles}) > 1:
        raise MoEdgeError(
            "TensorRT builds for the GPU it runs on; name one device, or export tensorrt-rtx for several."
        )
    max_length = max_length or min(2048, model["max_position_embeddings"])
    max_prompt = max_prompt or max(2, max_length // 2)
    weight_bytes = sum(entry["size"] for name, entry in manifest["files"].items() if name.endswith(".data"))
    fits, limits = {}, {"max_length": max_length, "max_prompt": max_prompt, "batch": batch}
    sparse = native or "plugins" in manifest
    unread = estimate.unread_bytes(manifest["moe"], model["hidden_size"]) if sparse else 0
    for device in profiles:
        fit = estimate.fit(model, weight_bytes, device, **limits, unread=unread, dtype=manifest["cache"]["dtype"])
        if reason := estimate.too_large(fit, device):
            raise MoEdgeError(reason)
        fits[device.name] = {**vars(fit), "needed": fit.needed}
    outputs, shown = moedge_trt.tap_outputs(manifest["taps"] if taps else {})
    try:
        trt = _tensorrt(target, profiles[0])
        launched = "plugins" in manifest and rtx
        if "plugins" in manifest and not launched:
            _register_plugins(profiles[0])
        shapes = moedge_trt.profile_shapes(model, **limits)
        capabilities = sorted({device.compute_capability for device in profiles}, key=float)
        inputs: list[Path | str] = [bundle.path, *device_names, *([timing_cache] if timing_cache else [])]
        with atomic_dir(out, force=force, inputs=inputs) as partial:
            with tempfile.TemporaryDirectory(dir=partial) as scratch:
                graph, sums = bundle.model_path, 0
                if launched:
                    from moedge.export.device import launcher

                    launcher.load(trt, launcher.compile_library(partial / LIBRARY))
                    graph = launcher.write_launches(bundle, Path(scratch), capabilities)
                elif rtx and "7.5" in capabilities:
                    from moedge.export.lowering.trt import router as trt_router

                    graph, sums = trt_router.write_without_products(bundle, Path(scratch))
                plan, facts = moedge_trt.build(
                    trt,
                    graph,
                    shapes,
                    compute_capabilities=capabilities if rtx else None,
                    taps=outputs,
                    timing_cache=timing_cache,
                )
            moedge_trt.write_bytes(partial / PLAN, plan)
            copy_companions(bundle.path, partial)
            engine = {
                "schema": SCHEMA,
                **{key: manifest[key] for key in ("target", "kind", "label", "model", "moe")},
                "dtype": manifest["cache"]["dtype"],
                "parent": bundle.sha256,
                "compute_capabilities": capabilities,
                "devices": [device.name for device in profiles],
                "profiles": limits,
                "profile_shapes": {
                    kind: {name: shapes[index][name] for name in ("input_ids", "attention_mask")}
                    for kind, index in (("prefill", moedge_trt.PREFILL), ("decode", moedge_trt.DECODE))
                },
                "taps": shown,
                "weight_bytes": weight_bytes,
                "build": {**facts, "products_as_sums": sums},
                "estimate": fits,
                "versions": {"moedge": __version__, trt.__name__: trt.__version__},
                "files": hash_tree(partial),
            }
            write_json(partial / MANIFEST, engine)
    except moedge_trt.DeviceError as error:
        raise MoEdgeError(str(error)) from error
    return engine


def _tensorrt(target: str, device: devices.Device) -> Any:
    try:
        trt = moedge_trt.load_tensorrt(target)
    except moedge_trt.DeviceError as error:
        instead = (
            "install it with: pip install 'moedge[tensorrt-rtx]'"
            if targets.find(target).engine == "tensorrt-rtx"
            else f"build on the device: `moedge pack CHECKPOINT OUT.tar --for {device.name}` makes its archive"
        )
        raise MoEdgeError(f"{str(error).rstrip('.')}; {instead}.") from error
    if target == "tensorrt":
        _check_local(device)
    return trt


def _register_plugins(device: devices.Device) -> None:
    """Let TensorRT compile the graph's plugins here, for the device that is here."""
    from moedge.export.device.plugins import Compiler, check_triton

    check_triton()
    moedge_plugins.register(Compiler(), capability=int(device.compute_capability.replace(".", "")))


def _check_local(device: devices.Device) -> None:
    cuda = moedge_cuda.Cuda()
    here = cuda.capability()
    cuda.close()
    if here != device.compute_capability:
        raise MoEdgeError(
            f"TensorRT builds for the GPU it runs on: this one has compute capability {here}, {device.label} has "
            f"{device.compute_capability}. Build on that device (`moedge pack` makes an archive for it)."
        )


def open_file(path: Path) -> EngineFile:
    """Verify an engine folder: schema, every file's hash, nothing unlisted.

    Raises:
        MoEdgeError: what is wrong with it.
    """
    import json

    from moedge.export.bundle import verify_files

    try:
        manifest = json.loads(safe_join(path, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoEdgeError(f"{path} is not an engine folder ({error}); make one with `moedge build`.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise MoEdgeError(f"{path / MANIFEST} is not of schema {SCHEMA}; build the engine again with this version.")
    if missing := [key for key in _REQUIRED if key not in manifest]:
        raise MoEdgeError(f"{path / MANIFEST} lacks {', '.join(missing)}; build the engine again.")
    verify_files(path, manifest["files"])
    if PLAN not in manifest["files"]:
        raise MoEdgeError(f"{path / MANIFEST} lists no {PLAN}; build the engine again.")
    return EngineFile(path, manifest)


def sha256(manifest: dict[str, Any]) -> str:
    """Content hash of an engine folder: that of its manifest, which holds the hash of every file."""
    return digest(manifest)
