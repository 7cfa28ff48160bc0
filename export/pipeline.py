"""Checkpoint -> bundles: trace once, then lower the portable graph for every other target."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moedge import MoEdgeError, __version__
from moedge._files import atomic_dir
from moedge._progress import Steps
from moedge._versions import installed
from moedge.convert.adapters import MOE_PREFIX
from moedge.export import bundle, loaders
from moedge.export import manifest as manifests
from moedge.export import targets as registry
from moedge.export.bundle import Bundle
from moedge.export.lowering import Lowered
from moedge.export.manifest import (
    BUNDLE_SCHEMA,
    Calibration,
    EngineManifest,
    IOFacts,
    LayerFacts,
    Manifest,
    ModelFacts,
    MoEFacts,
    RewriteFacts,
)

if TYPE_CHECKING:
    from moedge.convert.plan import MoEPlan
    from moedge.export.quantize.moments import Moments


def export(
    checkpoint: Path,
    out: Path,
    targets: Sequence[str],
    *,
    label: str,
    max_length: int | None = None,
    tensorrt: str | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Steps | None = None,
    calibration: np.ndarray | None = None,
    zero_points: bool = False,
    stock_operators: bool = False,
    portable: Path | None = None,
) -> dict[str, Path]:
    """Export a dense or converted Hugging Face folder to ``out/<target>/`` bundles: all of them or none.

    The portable bundle is always there in the end, since every other target is lowered from it. One that an earlier
    export made of the same checkpoint with the same label and length is taken as it is: the one in ``out``, or
    ``portable``. What ``out`` holds of other targets, and engines, stay when they are of that graph.

    Args:
        checkpoint: a dense folder or one that ``moedge convert`` wrote.
        out: folder that receives one bundle a target.
        targets: names in :mod:`moedge.export.targets`.
        label: name of the model for reports.
        max_length: longest sequence (cache and rotary tables); the model's own maximum by default.
        tensorrt: version of TensorRT on the device that the bundle ``tensorrt`` is for; the newest by default.
        experts: form of the experts in the bundle ``tensorrt``, see :func:`moedge.export.lowering.trt.experts.choose`.
        dtype: ``float16`` or ``bfloat16`` for targets that leave the choice; float16 by default.
        force: replace bundles of ``targets`` that are there, and drop bundles and engines that are not of the same
            graph. What is neither stays.
        progress: see :data:`moedge._progress.Steps`.
        calibration: int64 [N, L], text for which 4-bit weights are chosen by GPTQ instead of rounding to the nearest.
        zero_points: instead, fit the levels of each block of 4-bit weights to its range, where a target can.
        stock_operators: lower for ONNX Runtime's own operators alone, so that any program opens the bundles.
        portable: a portable bundle outside of ``out`` that may be of this checkpoint.

    Returns:
        Target -> folder, of ``targets`` and the portable one.

    Raises:
        MoEdgeError: ``calibration`` with ``zero_points``, unknown target, a model without a tokenizer or that cannot be
            traced, an existing bundle of ``targets``, one of another graph or something else in ``out`` without
            ``force``, or a lowering whose self-test fails.
    """
    if calibration is not None and zero_points:
        raise MoEdgeError("GPTQ has no zero points; give a calibration text or zero points, not both.")
    from moedge.export.ort_ops import library

    registry.check(targets)
    order = registry.names(lambda row: row.name in targets or row.name == registry.PORTABLE)
    report = progress or (lambda *_: None)
    inputs = [checkpoint, *([portable] if portable else [])]
    drops: set[str] = set()
    with atomic_dir(out, force=force, inputs=inputs, drops=drops) as partial:
        there = _there(out, targets, force=force)
        retraced = registry.PORTABLE in targets and force
        known = [] if retraced else [folder for folder in (portable, out / registry.PORTABLE) if folder]
        made = next((made for folder in known if (made := _fitting(folder, checkpoint, label, max_length))), None)
        report(f"{'keeping' if made else 'tracing'} {registry.PORTABLE}", 0, len(order))
        if made and made.path == portable:
            shutil.copytree(portable, partial / registry.PORTABLE, copy_function=shutil.copyfile)
        source = made or _export_portable(checkpoint, partial / registry.PORTABLE, label, max_length)
        drops.update(_of_others(out, there, source, force=force))
        moments = _measured_once(source, calibration)
        for step, target in enumerate(order[1:], 1):
            report(f"lowering {target}", step, len(order))
            (partial / target).mkdir()
            with library.stock_operators(stock_operators):
                forms = {"tensorrt": tensorrt, "experts": experts, "dtype": dtype}
                _lower(target, source, partial / target, forms, calibration, moments, zero_points=zero_points)
    report("done", len(order), len(order))
    return {target: out / target for target in order}


def _there(out: Path, targets: Sequence[str], *, force: bool) -> dict[str, Manifest | EngineManifest]:
    """Return the facts of the bundles and engines in ``out`` that are not of ``targets``, by folder.

    Raises:
        MoEdgeError: a manifest cannot be read; or, without ``force``, a folder of ``targets`` is there, or something
            that is neither. Hidden entries, which systems make by themselves, are not asked about.
    """
    found, entries = {}, sorted(out.iterdir()) if out.exists() else []
    for path in entries:
        if path.name in targets:
            if not force:
                raise MoEdgeError(f"Output folder {path} already exists; pass --force to replace it.")
        elif not path.name.startswith("."):
            if facts := _facts(path):
                found[path.name] = facts
            elif not force:
                raise MoEdgeError(
                    f"Output folder {out} already exists and is not empty: {path.name} is no bundle; choose another "
                    "output folder, or pass --force to export beside it."
                )
    return found


def _facts(path: Path) -> Manifest | EngineManifest | None:
    """Read the manifest of a bundle or an engine; None where there is none, or one of something else."""
    mend = "delete the folder and export again"
    try:
        document = manifests.load(path, mend)
    except FileNotFoundError:
        return None
    schema = document.get("schema") if isinstance(document, dict) else None
    ours = str(schema).startswith(("moedge.bundle/", "moedge.engine/"))  # of any version
    return manifests.read(path, mend) if ours else None


def _of_others(
    out: Path, there: Mapping[str, Manifest | EngineManifest], source: Bundle, *, force: bool
) -> Iterator[str]:
    """Name what in ``out`` is of another graph than the portable bundle ``source``: ``force`` drops it.

    Asked before anything is lowered, which can take hours.

    Raises:
        MoEdgeError: something is, without ``force``.
    """
    for name, facts in there.items():
        if difference := _difference(out / name, facts, source):
            if not force:
                raise MoEdgeError(
                    f"{out / name} {difference}; choose another output folder, or pass --force to drop it."
                )
            yield name


def _difference(folder: Path, facts: Manifest | EngineManifest, source: Bundle) -> str | None:
    """Say why the bundle or engine in ``folder`` is not of the portable bundle ``source``; None: it is."""
    wanted = source.manifest
    if source.sha256 == (manifests.content_hash(folder) if facts.target == registry.PORTABLE else facts.parent):
        return None
    if facts.checkpoint is not None and facts.checkpoint != wanted.checkpoint:
        return "is of another model (of a checkpoint with other files)"
    if facts.label != wanted.label:
        return f"has the label {facts.label!r}, this export has {wanted.label!r}"
    longest, asked = facts.model.max_position_embeddings, wanted.model.max_position_embeddings
    if longest != asked:
        return f"is for up to {longest} tokens, this export for {asked} (--max-length)"
    # An engine's parent is the bundle that it was built from, which may be gone; these facts come from the graph.
    if isinstance(facts, EngineManifest) and (facts.model, facts.moe) == (wanted.model, wanted.moe):
        return None
    return "is of another model, or was exported with other settings or libraries"


def _fitting(folder: Path, checkpoint: Path, label: str, max_length: int | None) -> Bundle | None:
    """Return the bundle in ``folder`` if it is what a trace of ``checkpoint`` would give, else None.

    None also where it is damaged or of another version, and where the config leaves out how many positions there are.
    """
    from moedge.convert import sources
    from moedge.convert.sources import folder_check

    positions = folder_check.read_config(checkpoint).get("max_position_embeddings")
    try:
        facts = manifests.read(folder)
        if not isinstance(facts, Manifest) or not isinstance(positions, int):
            return None
        asked = (registry.PORTABLE, label, min(max_length or positions, positions))
        fits = asked == (facts.target, facts.label, facts.model.max_position_embeddings)
        return bundle.open_bundle(folder) if fits and facts.checkpoint == sources.identity(checkpoint) else None
    except MoEdgeError:
        return None


def _measured_once(source: Bundle, calibration: np.ndarray | None) -> Callable[[], Moments]:
    """Return a function that measures the moments of ``source`` on a text at its first call."""

    @cache
    def measured() -> Moments:
        from moedge.export.quantize.moments import moments

        assert calibration is not None, "only asked for with a text"
        return moments(source, calibration)

    return measured


def _export_portable(checkpoint: Path, partial: Path, label: str, max_length: int | None) -> Bundle:
    import onnx_ir as ir

    from moedge.configs.generation_config import GenerationConfig
    from moedge.convert import modeling, sources
    from moedge.convert.sources import folder_check
    from moedge.export import rope
    from moedge.export.graph import kept, nodes
    from moedge.export.trace import Architecture, trace

    converted = str(folder_check.read_config(checkpoint)["model_type"]).startswith(MOE_PREFIX)
    plan = None
    partial.mkdir()
    bundle.write_companions(checkpoint, partial)  # first: a model without a tokenizer is refused before it is loaded
    if converted:
        model, plan, _ = modeling.load(checkpoint)
    else:
        model = sources.load_model(checkpoint)
    facts = Architecture.of(model.config)
    longest = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    graph = trace(model)
    lowered = registry.find(registry.PORTABLE).lowering()(graph, max_length=longest)
    lowered.taps = nodes.name_reads(graph, nodes.router_inputs(graph), lowered.taps)
    lowered.keeps = kept.kept_places(graph) or None
    ir.save(graph, partial / bundle.MODEL, external_data=bundle.WEIGHTS)
    generation = GenerationConfig.read(checkpoint)
    described = ModelFacts(
        **vars(facts),
        max_position_embeddings=longest,
        eos_token_ids=list(generation.ends),
        bos_token_id=_ids(generation.settings.get("bos_token_id")),
        pad_token_id=_ids(generation.settings.get("pad_token_id")),
        rope_boundary=rope.boundary(model.config.to_dict()),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied_embedding=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )
    moe = _moe_facts(model, plan) if plan is not None else None
    identity = sources.identity(checkpoint)
    origin = _Origin(registry.PORTABLE, label, described, moe, parent=None, checkpoint=identity)
    return _seal(partial, graph, lowered, origin)


def _ids(value: object) -> int | list[int] | None:
    """A token id of a generation config, or several; anything else says nothing."""
    if isinstance(value, list):
        return [each for each in value if isinstance(each, int)]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _moe_facts(model: Any, plan: MoEPlan) -> MoEFacts:
    from moedge.convert import reads
    from moedge.convert.modeling import SparseFFN, hierarchical_ffns

    layers = {
        block.layer_index: LayerFacts(
            num_experts=block.num_experts,
            top_k=block.top_k,
            shared_width=block.get_parameter("shared_gate").shape[0],
            expert_width=block.get_parameter("gate").shape[1] if block.num_experts else 0,
        )
        for block in model.modules()
        if isinstance(block, SparseFFN)
    }
    for nested in hierarchical_ffns(model):
        split = nested.get_parameter("shared_gate").shape[0]
        layers[nested.layer_index] = LayerFacts(
            num_experts=nested.num_experts,
            top_k=nested.top_k,
            shared_width=nested.get_parameter("shared_gate").shape[1],
            expert_width=nested.get_parameter("gate").shape[1],
            parents=split + nested.dense_parents,
            dense_parents=nested.dense_parents,
        )
    return MoEFacts(plan_sha256=plan.sha256, layers=layers, ffn_read_share=reads.of_plan(plan))


def lower(
    target: str,
    portable: Path,
    partial: Path,
    *,
    tensorrt: str | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    calibration: np.ndarray | None = None,
    zero_points: bool = False,
) -> None:
    """Lower a portable bundle; ``tensorrt`` and what follows as in :func:`export`.

    Needs onnx and the target's runtime, not torch; weights stay memory-mapped.
    """
    source = bundle.open_bundle(portable)
    forms = {"tensorrt": tensorrt, "experts": experts, "dtype": dtype}
    moments = _measured_once(source, calibration)
    _lower(target, source, partial, forms, calibration, moments, zero_points=zero_points)


def _lower(
    target: str,
    source: Bundle,
    partial: Path,
    forms: dict[str, str | None],
    calibration: np.ndarray | None,
    moments: Callable[[], Moments],
    *,
    zero_points: bool,
) -> None:
    """Lower an opened bundle; ``moments`` are those of ``calibration``, asked for where they are read."""
    import onnx_ir as ir

    from moedge.export.graph import build, kept, nodes, shapes
    from moedge.export.ort_ops import library as ort_ops

    bundle.check_external_data(source.model_path, set(source.manifest.files))
    graph = build.load(source.model_path)
    nodes.complete(graph, f"Bundle {source.path}")
    row = registry.find(target)
    options = registry.options(row, **forms)
    on_text = calibration is not None and row.calibrated
    if on_text:
        options |= {"method": "gptq", "moments": moments()}
    elif zero_points and row.zero_points:
        options["method"] = "rtn-asymmetric"
    longest = source.manifest.model.max_position_embeddings
    read, left_out = nodes.router_inputs(graph), kept.kept_places(graph)
    lowered = row.lowering()(graph, max_length=longest, **options)
    lowered.taps = nodes.name_reads(graph, read, lowered.taps)
    lowered.keeps = kept.still_shown(graph, left_out) or None
    if calibration is not None and on_text and lowered.quantization is not None:
        ids = np.ascontiguousarray(calibration, np.int64)
        text = Calibration(tokens=ids.size, sha256=hashlib.sha256(ids.tobytes()).hexdigest())
        lowered.quantization = lowered.quantization.model_copy(update={"calibration": text})
    shapes.complete(graph)
    ir.save(graph, partial / bundle.MODEL, external_data=bundle.WEIGHTS)
    bundle.copy_companions(source.path, partial)
    if ort_ops.DOMAIN in graph.opset_imports:
        lowered.operators = ort_ops.write(partial)
    facts = source.manifest
    origin = _Origin(target, facts.label, facts.model, facts.moe, parent=source.sha256, checkpoint=facts.checkpoint)
    _seal(partial, graph, lowered, origin)


@dataclass(frozen=True)
class _Origin:
    """What a bundle is of: the part of its manifest that no lowering decides."""

    target: str
    label: str
    model: ModelFacts
    moe: MoEFacts | None
    parent: str | None
    checkpoint: str | None


def _seal(partial: Path, graph: Any, lowered: Lowered, origin: _Origin) -> Bundle:
    io = IOFacts(
        model=bundle.MODEL,
        inputs=[value.name for value in graph.graph.inputs],
        outputs=[value.name for value in graph.graph.outputs],
    )
    manifest = Manifest(
        schema=BUNDLE_SCHEMA,
        target=origin.target,
        label=origin.label,
        model=origin.model,
        moe=origin.moe,
        parent=origin.parent,
        checkpoint=origin.checkpoint,
        kind="dense" if origin.moe is None else "moe",
        lowering=[RewriteFacts.model_validate(vars(rewrite)) for rewrite in lowered.rewrites],
        taps=lowered.taps,
        cache=lowered.cache,
        limits=lowered.limits,
        **{name: value for name in _OPTIONAL if (value := getattr(lowered, name)) is not None},
        io=io,
        versions=_versions(),
        files={},
    )
    loaders.describe(partial, manifest)
    return bundle.seal(partial, manifest)


_OPTIONAL = ("quantization", "plugins", "operators", "experts", "keeps")
"""Entries of a manifest that only some bundles have."""


def _versions() -> dict[str, str]:
    found = {"moedge": __version__}
    for name in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "optimum"):
        if here := installed(name):
            found[name] = here
    return found
