"""ONNX Runtime: from a bundle folder to a session that can be run, with everything that the runner has to know."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.configs.generation_config import GenerationConfig
from moedge.export import rope, targets
from moedge.export.bundle import Bundle, check_external_data, open_bundle
from moedge.export.graph import kept as left_out
from moedge.export.graph import layers as _layers
from moedge.export.graph import taps as _graph
from moedge.export.graph.layers import SPOTS, STREAM, LayerPoint, Spot
from moedge.export.manifest import GatherPlace, Kept, Manifest, ModelFacts, Tap
from moedge.runtime.device import moedge_nvml
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.engines.ort_session import check_cuda, open_session, ort_value
from moedge.runtime.engines.protocol import LayerMode


@dataclass(frozen=True)
class Options:
    """How a bundle is opened; see :class:`moedge.runtime.engines.ort.OrtEngine`."""

    threads: int
    taps: bool
    top_k: int | None
    max_length: int | None
    weights_of: str | Path | None
    float32_activations: bool
    router_inputs: bool
    replay: bool
    last_logits: bool
    layers: LayerMode | None
    trace: str | Path | None
    spots: Collection[Spot] = SPOTS


@dataclass(frozen=True)
class Shown:
    """What a graph shows beside the logits, of its routing by layer and of its layers by point: names of outputs."""

    taps: dict[int, Tap]
    router_inputs: dict[int, str]
    scores: dict[int, str]
    left_out_of: dict[GatherPlace, str] = field(default_factory=dict)
    kept: dict[GatherPlace, str] = field(default_factory=dict)
    layers: dict[LayerPoint, str] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, each once, in the order in which they are bound."""
        names = [tap.output for tap in self.taps.values()]
        by_layer = (self.router_inputs, self.scores)
        by_place = (self.left_out_of, self.kept)
        more = [name for found in (*by_layer, *by_place) for name in found.values()]
        return list(dict.fromkeys([*names, *more, *self.layers.values()]))


@dataclass(frozen=True)
class Loaded:
    """A verified bundle in a session."""

    path: Path
    model_path: Path
    session: Any
    provider: str
    info: EngineInfo
    model: ModelFacts
    dtype: np.dtype[Any]
    """Of the cache and the logits."""
    shared: bool
    """Whether one buffer of the full length is past and present."""
    max_length: int
    rope_boundary: int | None
    past: list[str]
    """Inputs of the cache."""
    shown: Shown
    given: dict[LayerPoint, str]
    """Values between parts that the caller gives."""
    forced: dict[int, tuple[int, int]]
    """Layers whose experts can be forced -> number of experts, how many of them run."""
    factors: dict[GatherPlace, Kept]
    """Places at which what is left out can be forced."""
    last_logits: bool
    weights: dict[str, tuple[np.ndarray, Any]]
    """The session reads this memory as long as it lives."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.provider == targets.CUDA else "cpu"


def load(path: Path, options: Options) -> Loaded:
    """Check every hash of a bundle, change its graph as the options ask, and open the session.

    Raises:
        MoEdgeError: see :class:`moedge.runtime.engines.ort.OrtEngine`.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    if find_spec("onnx"):  # without it ONNX Runtime's own check that data stays in the folder remains
        check_external_data(bundle.model_path, set(manifest.files))
    row = targets.find(manifest.target)
    if row.provider == targets.CUDA:
        check_cuda(path)
    boundary = rope.of_bundle(path, manifest.model)
    if options.taps and manifest.routed_layers and not manifest.taps:
        raise MoEdgeError(f"Bundle {path} names no routing taps; export it again or open it without taps.")
    limits = [manifest.model.max_position_embeddings, manifest.cache.max_length, options.max_length]
    longest = min(int(limit) for limit in limits if limit)
    last_logits = options.last_logits and find_spec("onnx") is not None
    graph, shown = _graph_for(bundle, options, last_logits=last_logits)
    # TensorRT's graphs are executed with the roundings of their half type, which ONNX Runtime would leave out.
    rounded = row.engine is not None
    if rounded:
        graph = _graph.emulated(bundle.model_path, graph)
    weights = _dequantized(bundle, options.weights_of) if options.weights_of is not None else {}
    session, version = open_session(bundle.path, manifest, options.threads, graph, weights, options.trace)
    return Loaded(
        path=path,
        model_path=bundle.model_path,
        session=session,
        provider=row.provider,
        info=_info(path, manifest, version, options, longest=longest, boundary=boundary),
        model=manifest.model,
        dtype=np.dtype("float32" if rounded else manifest.cache.dtype or "float32"),
        shared=manifest.cache.kind == "shared_buffer",
        max_length=longest,
        rope_boundary=boundary,
        past=_past(path, manifest, session),
        shown=shown,
        given=_layers.given_names(shown.layers) if options.layers == "given" else {},
        forced=_forced(manifest) if options.replay else {},
        factors=left_out.named(manifest.keeps) if options.replay else {},
        last_logits=last_logits,
        weights=weights,
    )


def _graph_for(bundle: Bundle, options: Options, *, last_logits: bool) -> tuple[bytes | None, Shown]:
    """What to run in place of the bundle's graph, None where nothing is changed; and what it then shows."""
    manifest, path = bundle.manifest, bundle.model_path
    taps = manifest.taps if options.taps else {}
    asked = (options.top_k is not None, options.float32_activations, options.router_inputs, options.replay, last_logits)
    if not (taps or any(asked) or options.layers):
        return None, Shown({}, {}, {})
    reads = _graph.router_inputs(path, manifest) if options.router_inputs else {}
    if options.replay:
        reads = _graph.own_router_inputs(path) if taps else {}
    asks = options.taps if options.replay else options.router_inputs
    keeps = left_out.named(manifest.keeps) if asks else {}
    graph, scores = _graph.edited(
        path,
        manifest,
        taps,
        options.top_k,
        options.float32_activations,
        reads,
        options.replay,
        last_logits,
        keeps,
        show_scores=options.layers is not None,
    )
    before = {place: str(kept.reads) for place, kept in keeps.items()}
    after = {} if options.replay else {place: str(kept.output) for place, kept in keeps.items()}
    layers: dict[LayerPoint, str] = {}
    if options.layers:
        graph, layers = _with_layers(bundle, graph, options.spots, given=options.layers == "given")
    return graph, Shown(_with_top_k(taps, manifest, options.top_k), reads, scores, before, after, layers)


def _with_layers(
    bundle: Bundle, graph: bytes, spots: Collection[Spot], *, given: bool
) -> tuple[bytes, dict[LayerPoint, str]]:
    """Let a graph, which :func:`moedge.export.graph.taps.edited` gave, show its layers too.

    Raises:
        MoEdgeError: it cannot.
    """
    import onnx

    # A layer's rounding may hold that of the stream it is given; that of a norm or a sum may not.
    if given and set(spots) != set(STREAM) and bundle.manifest.cache.dtype not in (None, "float32"):
        raise MoEdgeError(f"{bundle.path} computes in {bundle.manifest.cache.dtype}: its parts cannot be given values.")
    model = onnx.ModelProto.FromString(graph)
    names = _layers.show(model, bundle.model_path, bundle.manifest.model.num_layers, spots=spots, given=given)
    return bytes(model.SerializeToString()), names


def _with_top_k(taps: Mapping[int, Tap], manifest: Manifest, top_k: int | None) -> dict[int, Tap]:
    if top_k is None:
        return dict(taps)
    return {
        layer: tap.model_copy(update={"top_k": min(top_k, manifest.layers[layer].num_experts)})
        for layer, tap in taps.items()
    }


def _forced(manifest: Manifest) -> dict[int, tuple[int, int]]:
    layers = manifest.layers
    return {layer: (layers[layer].num_experts, layers[layer].top_k) for layer in manifest.routed_layers}


def _past(path: Path, manifest: Manifest, session: Any) -> list[str]:
    """Names of the cache's inputs, once the graph has every input that is fed."""
    past = [name for name in manifest.io.inputs if name.startswith("past_key_values.")]
    given = {value.name for value in session.get_inputs()}
    missing = [name for name in ("input_ids", "attention_mask", "position_ids", *past) if name not in given]
    if missing:
        raise MoEdgeError(f"Bundle {path}: the graph has no input {missing[0]!r}; export it again.")
    return past


def _info(
    path: Path, manifest: Manifest, version: str, options: Options, *, longest: int, boundary: int | None
) -> EngineInfo:
    quantization = manifest.quantization
    on_gpu = targets.find(manifest.target).provider == targets.CUDA
    facts = {
        **manifest.model.document(),
        rope.FACT: boundary,
        "generation": GenerationConfig.read(path),
        "label": manifest.label,
        "target": manifest.target,
        "moe": manifest.kind == "moe",
        "routed": bool(manifest.routed_layers),  # a pruned model has layers without experts
        "gathered": bool(manifest.keeps),
        "max_length": longest,
        "top_k": options.top_k,
        "weights_of": open_bundle(Path(options.weights_of)).manifest.target if options.weights_of else None,
    }
    return EngineInfo(
        name=f"{manifest.target} {manifest.kind}",
        runtime=f"onnxruntime {version}",
        device=_gpu() if on_gpu else "CPU",
        dtype=f"int{quantization.bits} weights" if quantization else manifest.cache.dtype or manifest.model.dtype,
        threads=options.threads,
        model=EngineModel.model_validate(facts),
        padding=targets.find(manifest.target).padding,
    )


def _gpu() -> str:
    """The first CUDA device by its name, as PyTorch's engines call it: times of two GPUs are not one engine's."""
    told = moedge_nvml.told()
    return "CUDA device 0" if told is None else f"{told[0] or 'CUDA device'} (cuda:0)"


def _dequantized(bundle: Bundle, other: str | Path) -> dict[str, tuple[np.ndarray, Any]]:
    """De-quantised weights of the bundle ``other`` for the graph of ``bundle``: arrays and the OrtValues over them.

    Raises:
        MoEdgeError: ``bundle`` is not portable, or the two are not exports of the same model.
    """
    from moedge.export.quantize.stored import dequantized_weights

    quantised = open_bundle(Path(other))
    if bundle.manifest.target != targets.PORTABLE or quantised.manifest.parent != bundle.sha256:
        raise MoEdgeError(f"{other} was not lowered from {bundle.path}; give the portable bundle of the same export.")
    return {name: (array, ort_value(array)) for name, array in dequantized_weights(quantised)}
