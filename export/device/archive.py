"""One file to carry to a device: graph, tokenizer, recorded answers, and the scripts that build, verify and time there.

The archive is an uncompressed tar (half-precision weights do not compress) and deterministic: the same checkpoint and
options give the same bytes. Inside is one folder with ``manifest.json`` (schema ``moedge.device-archive/1``), which
holds the sha256 of every other file. Nothing in it needs MoEdge, torch or the network on the device.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError, __version__
from moedge._files import atomic_dir, digest, hash_tree, link_or_copy, partial_of, read_json, write_json
from moedge._progress import Steps
from moedge.configs import devices, tolerances
from moedge.configs.devices import Device
from moedge.export import manifest as manifests
from moedge.export.bundle import MODEL, Bundle, copy_companions, open_bundle
from moedge.export.device import estimate
from moedge.export.device.estimate import fit, too_large
from moedge.export.device.plugins import Request, compile_library
from moedge.export.manifest import ARCHIVE_SCHEMA, MANIFEST, ArchiveManifest, FileEntry, Profiles
from moedge.export.targets import PORTABLE
from moedge.runtime.device import moedge_trt
from moedge.runtime.device.moedge_plugins import FOLDER

SCRIPTS = (
    *("build_engine.py", "verify.py", "bench.py", "moedge_archive.py", "moedge_compare.py", "moedge_cuda.py"),
    *("moedge_guard.py", "moedge_jetson.py", "moedge_nvml.py", "moedge_plugins.py", "moedge_power.py"),
    *("moedge_sensors.py", "moedge_session.py", "moedge_stats.py", "moedge_timing.py", "moedge_trt.py"),
    "moedge_watch.py",
)
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def factorial(n):\n    ",
    "Once upon a time there was a small village near the sea, and in it lived",
)
NEW_TOKENS = 16
FORMAT = tarfile.GNU_FORMAT
"""Not the plain one, whose size field ends at 8 GiB: the weights of a model of 4 billion parameters."""


def limits(dtype: str = "float16", given: str | tolerances.Given = "float32") -> dict[str, float]:
    """What the engine may differ from the recorded float32 answers, before any choice of experts differs.

    They are those of ``moedge verify`` for the target, derived in ``configs/tolerances.yaml``: ``median_rel_error``,
    max|a-b| / max|a| of a token's logits; ``mean_kl`` in nats; ``top1_agreement`` outside near-ties; and
    ``near_tie_margin``, here in units of a token's largest logit. ``judged_share``: with fewer tokens than half of them
    the device has not decided anything.

    Args:
        dtype: half-precision type of the graph.
        given: see :func:`moedge.configs.tolerances.chosen`.
    """
    weights, found = tolerances.chosen(given)
    profile = found.profile(weights, "tensorrt", dtype)
    return {
        "median_rel_error": profile.median_rel_error,
        "near_tie_margin": profile.near_tie_margin / profile.near_tie_scale,
        "mean_kl": profile.mean_kl,
        "top1_agreement": profile.top1_agreement,
        "judged_share": 0.5,
    }


def write(
    source: Path,
    out: Path,
    device: Device,
    *,
    label: str | None = None,
    tensorrt: str | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    max_prompt: int | None = None,
    batch: int = 1,
    prompts: Sequence[str] = PROMPTS,
    given: str | tolerances.Given = "float32",
    force: bool = False,
    progress: Steps | None = None,
) -> ArchiveManifest:
    """Write the archive.

    Args:
        source: a checkpoint folder, or a folder of bundles that holds ``portable``.
        out: the tar file.
        device: the profile it is for.
        label: name of the model for results.
        tensorrt: version of TensorRT on the device; that of its profile by default. It decides whether experts are
            plugins, whose kernels the archive then holds, or standard operators.
        experts: the form of the experts where it shall not be that; see ``lowering/trt/experts.py``.
        dtype: ``float16`` (the default) or ``bfloat16``.
        max_length: longest sequence of the engine; the model's, at most 2048, by default.
        max_prompt: most tokens of a prefill call; half of ``max_length`` by default.
        batch: most rows.
        prompts: texts whose answers are recorded.
        given: the limits that the device judges by; see :func:`moedge.configs.tolerances.chosen`.
        force: replace an existing file.
        progress: called with what is being done, and how many of how many steps are finished.

    Returns:
        The archive's manifest.

    Raises:
        MoEdgeError: the device takes no TensorRT engine, an existing file, or a model that cannot be exported.
    """
    _check_device(device, dtype, experts)
    _check_output(out, source, force=force)
    if (positions := _positions(source)) is not None:  # before a minute of tracing
        _sizes(positions, max_length, max_prompt, batch)
    report = progress or (lambda *_: None)
    version = _version(device, tensorrt)
    with _scratch(out) as work:
        report("exporting", 0, 3)
        name = label or source.name or source.resolve().name
        graph, reference = _bundles(source, work / "bundles", name, version, experts, dtype)
        folder = work / "content" / folder_name(device.name, graph.manifest.kind)
        folder.mkdir(parents=True)
        label = label or graph.manifest.label
        profiles = _profiles(graph, device, max_length, max_prompt, batch)
        report("recording answers", 1, 3)
        _record(reference, folder, prompts, profiles.max_length)
        _fill(graph, device, label, folder, report)
        manifest = _manifest(graph, device, label, version, profiles, given, hash_tree(folder))
        write_json(folder / MANIFEST, manifest.document())
        report("packing", 2, 3)
        _pack(folder, work / "archive.tar")
        os.replace(work / "archive.tar", out)
    report("done", 3, 3)
    return manifest


def folder_name(device: str, kind: str) -> str:
    """Return what the folder in an archive is called: a model and its dense parent are unpacked beside each other."""
    return f"moedge-{device}-{kind}"


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``out``, whose folder is made where it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = partial_of(out)
    try:
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_device(device: Device, dtype: str | None, experts: str | None) -> None:
    if "tensorrt" not in device.targets:
        raise MoEdgeError(
            f"{device.label} ({device.sm}) takes no TensorRT engine; export {device.targets[0]} and use `moedge build`."
        )
    if reason := devices.half_refusal(dtype or "float16", device):
        raise MoEdgeError(reason)
    if experts == "native" and (reason := moedge_trt.moe_refusal(device.label, device.compute_capability)):
        raise MoEdgeError(reason)


def _version(device: Device, tensorrt: str | None) -> str:
    version = tensorrt or device.tensorrt
    assert version is not None, "a profile with the target tensorrt names its version"
    return version


def _check_output(out: Path, source: Path, *, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise MoEdgeError(f"Output {out} exists and is not a plain file; name the archive, such as moe.tar.")
    if out.exists() and not force:
        raise MoEdgeError(f"Output {out} already exists; pass --force to replace it.")
    if out.exists() and out.resolve().is_relative_to(source.resolve()):
        raise MoEdgeError(f"Output {out} is a file of {source}, which would be lost; choose another output path.")


def _fill(graph: Bundle, device: Device, label: str, folder: Path, report: Steps) -> None:
    """Put in the graph, the tokenizer, compiled kernels where the graph has plugins, the scripts and a README."""
    for name in (MODEL, *graph.manifest.weight_files):
        link_or_copy(graph.path / name, folder / name)
    copy_companions(graph.path, folder)
    if graph.manifest.plugins:
        report("compiling kernels", 1, 3)
        requests = [Request(kernel.plugin, kernel.options) for kernel in graph.manifest.plugins.kernels]
        compile_library(folder / FOLDER, requests, [int(device.compute_capability.replace(".", ""))])
    scripts = Path(moedge_trt.__file__).parent
    for name in SCRIPTS:
        shutil.copyfile(scripts / name, folder / name)
    (folder / "README.md").write_text(_readme(label, device), encoding="utf-8")


def _readme(label: str, device: Device) -> str:
    folders = {kind: folder_name(device.name, kind) for kind in ("moe", "dense")}
    return _README.format(label=label, device=device.label, **folders)


def _manifest(
    graph: Bundle,
    device: Device,
    label: str,
    tensorrt: str,
    profiles: Profiles,
    given: str | tolerances.Given,
    files: dict[str, dict[str, Any]],
) -> ArchiveManifest:
    facts = graph.manifest
    taken: dict[str, Any] = {
        name: getattr(facts, name) for name in ("kind", "model", "moe", "taps", "lowering", "experts")
    }
    if facts.plugins:
        taken["plugins"] = facts.plugins
    if origin := tolerances.chosen(given)[1].origin:
        taken["tolerances"] = origin.model_dump()
    return ArchiveManifest(
        schema=ARCHIVE_SCHEMA,
        label=label,
        **taken,
        dtype=facts.cache.dtype,
        device=device.model_dump(mode="json", by_alias=True),
        tensorrt=tensorrt,
        profiles=profiles,
        limits=limits(facts.cache.dtype or "float16", given),
        parent=graph.sha256,
        versions={"moedge": __version__},
        content_sha256=digest(files),
        files={name: FileEntry(**entry) for name, entry in files.items()},
    )


def _positions(source: Path) -> int | None:
    """Positions of the model that is packed, where its files tell them."""
    bundle = manifests.read(source / PORTABLE)
    if bundle is not None:
        return bundle.model.max_position_embeddings
    if not (source / "config.json").is_file():
        return None
    found = read_json(source / "config.json", "download or save the model again").get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _sizes(positions: int, max_length: int | None, max_prompt: int | None, batch: int) -> dict[str, int]:
    found = estimate.sizes(positions, max_length, max_prompt, batch)
    if found["max_length"] <= NEW_TOKENS:
        raise MoEdgeError(f"--max-length must be above {NEW_TOKENS}, the tokens of each answer that is recorded.")
    return found


def _profiles(graph: Bundle, device: Device, max_length: int | None, max_prompt: int | None, batch: int) -> Profiles:
    """The sizes of the engine; refuses here what would fail on the device: impossible lengths, too little memory.

    Raises:
        MoEdgeError: what is wrong.
    """
    facts = graph.manifest
    sizes = _sizes(facts.model.max_position_embeddings, max_length, max_prompt, batch)
    try:
        moedge_trt.profile_shapes(facts.model.document(), **sizes)
    except moedge_trt.DeviceError as error:
        raise MoEdgeError(str(error)) from None
    dtype = facts.cache.dtype or "float16"
    if reason := too_large(fit(facts.model, facts.weight_bytes, device, **sizes, dtype=dtype), device):
        raise MoEdgeError(reason)
    return Profiles(**sizes)


def _bundles(
    source: Path, scratch: Path, label: str, tensorrt: str, experts: str | None, dtype: str | None
) -> tuple[Bundle, Bundle]:
    """Return the graph for the device, lowered for its version of TensorRT, and the float32 graph."""
    from moedge.export import pipeline

    if (source / PORTABLE / "manifest.json").is_file():
        portable = open_bundle(source / PORTABLE)
        with atomic_dir(scratch / "tensorrt") as partial:
            pipeline.lower("tensorrt", portable.path, partial, tensorrt=tensorrt, experts=experts, dtype=dtype)
    else:
        targets = [PORTABLE, "tensorrt"]
        pipeline.export(source, scratch, targets, label=label, tensorrt=tensorrt, experts=experts, dtype=dtype)
        portable = open_bundle(scratch / PORTABLE)
    return open_bundle(scratch / "tensorrt"), portable


def _record(portable: Bundle, folder: Path, prompts: Sequence[str], max_length: int) -> None:
    """Run the float32 graph on the prompts, greedily, and keep ids, logits of the answer and all routes."""
    from moedge.runtime.engines import open_engine
    from moedge.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(portable.path)
    engine = open_engine(portable.path, threads=1, taps=bool(portable.manifest.taps))
    limit = engine.info.model.rope_boundary
    cases = []
    try:
        for number, prompt in enumerate(prompts):
            ids = tokenizer.encode(prompt)[: max_length - NEW_TOKENS]
            if limit is not None and len(ids) <= limit < len(ids) + NEW_TOKENS:
                # Where the factors change the text is read again, and its choices would be recorded for the last token.
                ids = ids[: max(1, limit - NEW_TOKENS)]
            step = engine.prefill(np.array([ids], dtype=np.int64))
            logits, routes, count = [step.logits[0, -1]], [step.routes or {}], len(ids)
            for _ in range(NEW_TOKENS):
                ids.append(int(logits[-1].argmax()))
                step = engine.decode(np.array([[ids[-1]]], dtype=np.int64), step.cache)
                logits.append(step.logits[0, -1])
                routes.append(step.routes or {})
            layers = sorted(routes[0])
            np.save(folder / f"golden.{number}.logits.npy", np.stack(logits), allow_pickle=False)
            for layer in layers:
                chosen = np.concatenate([part[layer] for part in routes])
                np.save(folder / f"golden.{number}.routes.{layer}.npy", chosen, allow_pickle=False)
            cases.append({"text": prompt, "ids": ids, "prompt_tokens": count, "routed_layers": layers})
    finally:
        engine.close()
    write_json(folder / "golden.json", {"schema": "moedge.golden/1", "reference": "portable, float32", "cases": cases})


def _pack(folder: Path, out: Path) -> None:
    """Write a tar whose bytes depend on names and contents only."""
    with tarfile.open(out, "w", format=FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
            entry.size, entry.mode, entry.mtime = path.stat().st_size, 0o644, 0
            with path.open("rb") as stream:
                archive.addfile(entry, stream)


_README = """# {label} for {device}

On the device, with numpy and TensorRT's Python package (JetPack has both):

    python3 build_engine.py     # minutes; writes engine.plan, engine.json, timing.cache
    python3 verify.py           # exit code 1 when the engine does not compute what was recorded, or that is not decided
    sudo nvpmodel -m 0 && sudo jetson_clocks                      # a Jetson's greatest power mode; others: leave it out
    python3 bench.py --prompt 512 --decode 64

bench.py records power mode, clocks, heat and energy where the device tells them (a Jetson's rails: run it with sudo).
It times a converted model and its dense parent in the same rounds where both archives are unpacked in one place, as
{moe} and {dense}, and both engines are built.

Both results are JSON. Where MoEdge is installed: moedge device-report verify-result.json bench-result.json, and, for a
model with experts, moedge verify CHECKPOINT verify-answers.npz, which judges every token whatever experts were chosen.
"""
