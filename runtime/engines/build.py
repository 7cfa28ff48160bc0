"""Bundle -> engine: build, describe, hash, all or nothing.

An engine folder holds ``engine.plan``, the tokenizer files and ``manifest.json`` (schema ``moedge.engine/1``): the
bundle it came from, what it was built with and for, its profiles and taps, and the sha256 of every file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError, __version__
from moedge._files import atomic_dir, hash_tree, safe_join, write_bytes, write_json
from moedge.configs import devices
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.export.device import estimate
from moedge.export.manifest import (
    ENGINE_SCHEMA,
    MANIFEST,
    BuildFacts,
    EngineManifest,
    FileEntry,
    FitFacts,
    Kept,
    Manifest,
    Profiles,
    Tap,
)
from moedge.runtime.device import moedge_cuda, moedge_plugins, moedge_trt

if TYPE_CHECKING:
    from moedge.export.bundle import Bundle

PLAN = "engine.plan"
LIBRARY = "libmoedge_launch.so"
"""The plugin library beside an engine of TensorRT for RTX that needs it."""


@dataclass(frozen=True)
class EngineFile:
    """A verified engine folder."""

    path: Path
    manifest: EngineManifest

    def plan(self) -> bytes:
        """Read the serialized engine; its hash is checked once more on the bytes that are returned."""
        try:
            return moedge_trt.read_checked(safe_join(self.path, PLAN), self.manifest.files[PLAN].sha256)
        except moedge_trt.DeviceError as error:
            raise MoEdgeError(str(error)) from error

    def library(self) -> str | None:
        """Return the file of the plugin library that the engine needs, its hash checked once more, or None."""
        path = safe_join(self.path, LIBRARY)
        if LIBRARY not in self.manifest.files:
            return None
        try:
            moedge_trt.read_checked(path, self.manifest.files[LIBRARY].sha256)
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
) -> EngineManifest:
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
    model = bundle.manifest.model
    profiles = _suitable(bundle.manifest, device_names)
    limits = estimate.sizes(model.max_position_embeddings, max_length, max_prompt, batch)
    fits = _fits(bundle.manifest, profiles, limits)
    outputs, named = moedge_trt.tap_outputs(bundle.manifest.document()["taps"] if taps else {})
    inputs: list[Path | str] = [bundle.path, *device_names, *([timing_cache] if timing_cache else [])]
    try:
        trt = _tensorrt(bundle.manifest, profiles[0])
        shapes = moedge_trt.profile_shapes(model.document(), **limits)
        with atomic_dir(out, force=force, inputs=inputs) as partial:
            plan, facts = _built(trt, bundle, partial, shapes, profiles, outputs, timing_cache)
            write_bytes(partial / PLAN, plan)
            copy_companions(bundle.path, partial)
            engine = EngineManifest(
                **_of_bundle(bundle),
                **_shown_profiles(profiles, limits, shapes),
                **_made(trt, partial, named),
                build=facts,
                estimate=fits,
            )
            write_json(partial / MANIFEST, engine.document())
    except moedge_trt.DeviceError as error:
        raise MoEdgeError(str(error)) from error
    return engine


def _for_rtx(manifest: Manifest) -> bool:
    return targets.find(manifest.target).engine == "tensorrt-rtx"


def _suitable(manifest: Manifest, device_names: Sequence[str]) -> list[devices.Device]:
    """The profiles of the devices, once none of them is refused for what the bundle holds."""
    profiles = [devices.load(name) for name in device_names]
    if not profiles:
        raise MoEdgeError(f"Name at least one device to build for; known: {', '.join(devices.names())}.")
    for device in profiles:
        if reason := devices.refusal(manifest.target, device):
            raise MoEdgeError(reason)
        if _for_rtx(manifest) and manifest.plugins and device.compute_capability == "7.5":
            raise MoEdgeError(f"There are no kernels for {device.label} (SM75); export with --expert-form merged.")
        if reason := devices.half_refusal(manifest.cache.dtype or "float16", device):
            raise MoEdgeError(reason)
        native = manifest.experts == "native"
        if native and (reason := moedge_trt.moe_refusal(device.label, device.compute_capability)):
            raise MoEdgeError(reason)
    if manifest.target == "tensorrt" and len({device.compute_capability for device in profiles}) > 1:
        raise MoEdgeError(
            "TensorRT builds for the GPU it runs on; name one device, or export tensorrt-rtx for several."
        )
    return profiles


def _fits(manifest: Manifest, profiles: list[devices.Device], limits: dict[str, int]) -> dict[str, FitFacts]:
    """What the engine takes of each device's memory; one that is too small is refused."""
    model, fits = manifest.model, {}
    dtype, batch = manifest.cache.dtype or "float16", limits["batch"]
    read = estimate.decode_read(manifest, max_length=limits["max_length"], batch=batch)
    for device in profiles:
        fit = estimate.fit(model, manifest.weight_bytes, device, **limits, dtype=dtype)
        if reason := estimate.too_large(fit, device):
            raise MoEdgeError(reason)
        bound = read and batch * device.bandwidth_gb_s * 1e9 / read
        active = None if read is None else round(read)
        fits[device.name] = FitFacts(**vars(fit), needed=fit.needed, active=active, bound_tokens_per_s=bound)
    return fits


def _capabilities(profiles: list[devices.Device]) -> list[str]:
    return sorted({device.compute_capability for device in profiles}, key=float)


def _built(
    trt: Any,
    bundle: Bundle,
    partial: Path,
    shapes: list[dict[str, Any]],
    profiles: list[devices.Device],
    outputs: dict[str, str],
    timing_cache: Path | None,
) -> tuple[bytes, BuildFacts]:
    """Build from the bundle's graph, or from one that this TensorRT takes in its place."""
    rtx, capabilities = _for_rtx(bundle.manifest), _capabilities(profiles)
    with tempfile.TemporaryDirectory(dir=partial) as scratch:
        graph, sums = bundle.model_path, 0
        if bundle.manifest.plugins and rtx:
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
    return plan, BuildFacts(**facts, products_as_sums=sums)


def _of_bundle(bundle: Bundle) -> dict[str, Any]:
    """What an engine's manifest takes over from its bundle's."""
    manifest = bundle.manifest
    kept = {name: getattr(manifest, name) for name in ("target", "kind", "label", "model", "moe", "weight_bytes")}
    if manifest.checkpoint:
        kept["checkpoint"] = manifest.checkpoint
    if manifest.keeps:  # an engine shows none of it
        kept["keeps"] = {layer: {which: Kept() for which in places} for layer, places in manifest.keeps.items()}
    return {"schema": ENGINE_SCHEMA, **kept, "dtype": manifest.cache.dtype, "parent": bundle.sha256}


def _made(trt: Any, folder: Path, taps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What an engine's manifest says of the outputs, the versions and the files of ``folder``."""
    return {
        "taps": {int(layer): Tap(**tap) for layer, tap in taps.items()},
        "versions": {"moedge": __version__, trt.__name__: trt.__version__},
        "files": {name: FileEntry(**entry) for name, entry in hash_tree(folder).items()},
    }


def _shown_profiles(
    profiles: list[devices.Device], limits: dict[str, int], shapes: list[dict[str, Any]]
) -> dict[str, Any]:
    """What an engine's manifest says of its devices and of the shapes that it takes."""
    kinds = {"prefill": moedge_trt.PREFILL, "decode": moedge_trt.DECODE}
    return {
        "compute_capabilities": _capabilities(profiles),
        "devices": [device.name for device in profiles],
        "profiles": Profiles(**limits),
        "profile_shapes": {
            kind: {name: shapes[index][name] for name in ("input_ids", "attention_mask")}
            for kind, index in kinds.items()
        },
    }


def _tensorrt(manifest: Manifest, device: devices.Device) -> Any:
    """TensorRT's module, which knows the plugins of a bundle for ``tensorrt``."""
    target = manifest.target
    try:
        trt = moedge_trt.load_tensorrt(target)
    except moedge_trt.DeviceError as error:
        instead = (
            "install it with: pip install 'moedge[tensorrt-rtx]'"
            if _for_rtx(manifest)
            else f"build on the device: `moedge pack CHECKPOINT OUT.tar --for {device.name}` makes its archive"
        )
        raise MoEdgeError(f"{str(error).rstrip('.')}; {instead}.") from error
    if target == "tensorrt":
        _check_local(device)
    if manifest.plugins and not _for_rtx(manifest):
        _register_plugins(device)
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
    from moedge.export.bundle import verify_files

    try:
        document = manifests.load(path)
    except FileNotFoundError as error:
        raise MoEdgeError(
            f"{path} is not an engine folder: it has no {MANIFEST}; make one with `moedge build`."
        ) from error
    manifest = manifests.parse(EngineManifest, document, path / MANIFEST)
    verify_files(path, manifest.files)
    if PLAN not in manifest.files:
        raise MoEdgeError(f"{path / MANIFEST} lists no {PLAN}; build the engine again.")
    return EngineFile(path, manifest)
