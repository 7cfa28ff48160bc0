"""ONNX Runtime engine: runs a bundle, with a KV cache that never travels through Python.

The cache lives in ``OrtValue`` objects. With ``cache.kind == "concat"`` the runtime allocates each ``present`` and the
engine binds it as the next ``past``. With ``"shared_buffer"`` (GroupQueryAttention) one buffer of the full length is
bound as both, and the runtime writes the new keys and values in place. Only ids, mask, positions and logits are numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.configs.generation_config import GenerationConfig
from moedge.export import rope, targets
from moedge.export.bundle import Bundle, check_external_data, open_bundle
from moedge.export.graph import taps as _graph
from moedge.export.manifest import Tap
from moedge.runtime.engines import (
    Step,
    check_batch,
    check_length,
    default_threads,
    forcing,
    longrope,
    position_ids,
)
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.engines.ort_session import check_cuda, open_session, session_options


@dataclass
class _Cache:
    """``ids`` and ``mask`` int64 [B, P] as the caller sees them (padding on the left); ``values`` one OrtValue per past
    input."""

    ids: np.ndarray
    mask: np.ndarray
    values: list[Any]
    binding: Any = None
    used: bool = False


class OrtEngine:
    """A bundle in an ONNX Runtime session: on the CPU, and of target ``ort-cuda`` on the first CUDA device.

    Args:
        bundle_path: bundle folder; every file's sha256 is checked before anything is parsed.
        threads: intra-op threads; physical cores by default.
        taps: also return the experts that each layer selected (needs the ``onnx`` package).
        top_k: run every layer with this many experts, or all of them where a layer has fewer (needs ``onnx``).
        max_length: tokens that a shared-buffer cache is made for; the bundle's own limit by default.
        weights_of: a quantised bundle of the same model whose de-quantised weights take the place of this bundle's own
            (portable bundles only): the float32 model that the quantised one is a rounding of (needs ``onnx``).
        float32_activations: run a quantised bundle without rounding activations to int8 (needs ``onnx``). Experts of 8
            bits have no such kernel.
        router_inputs: also return what each layer's router read, and with ``taps`` what it ranks its experts by, where
            the graph shows that (needs ``onnx``).
        replay: let the caller force the experts (portable bundles; needs ``onnx``), see
            :class:`moedge.runtime.engines.ReplayEngine`.
        last_logits: compute the logits of each call's last position alone, ``Step.logits`` [B, 1, V]: all that
            generation needs. Without the ``onnx`` package all are computed.
        trace: an existing folder: ONNX Runtime's profiler records every node, :meth:`end_trace` gives its file, and the
            optimised graph is written to ``optimized.onnx`` (its weights beside it).

    Raises:
        MoEdgeError: a damaged bundle, an unusable option, ``onnxruntime`` / ``onnx`` is not installed, or a bundle for
            CUDA where ONNX Runtime has no CUDA provider.
    """

    def __init__(
        self,
        bundle_path: str | Path,
        *,
        threads: int | None = None,
        taps: bool = False,
        top_k: int | None = None,
        max_length: int | None = None,
        weights_of: str | Path | None = None,
        float32_activations: bool = False,
        router_inputs: bool = False,
        replay: bool = False,
        last_logits: bool = False,
        trace: str | Path | None = None,
    ) -> None:
        bundle = open_bundle(Path(bundle_path))
        manifest = bundle.manifest
        if find_spec("onnx"):  # without it ONNX Runtime's own check that data stays in the folder remains
            check_external_data(bundle.model_path, set(manifest.files))
        self._path = Path(bundle_path)
        row = targets.find(manifest.target)
        self._provider = row.provider
        self._device = "cuda" if row.provider == targets.CUDA else "cpu"
        if self._device == "cuda":
            check_cuda(self._path)
        self._model = manifest.model
        self._rope_boundary = rope.of_bundle(self._path, self._model)
        self._shared = manifest.cache.kind == "shared_buffer"
        # TensorRT's graphs are executed with the roundings of their half type, which ONNX Runtime would leave out.
        rounded = row.engine is not None
        # Of the cache and the logits.
        self._dtype = np.dtype("float32" if rounded else manifest.cache.dtype or "float32")
        self._taps = manifest.taps if taps else {}
        routed = bool(manifest.routed_layers)  # a pruned model has layers without experts
        if taps and routed and not self._taps:
            raise MoEdgeError(f"Bundle {bundle_path} names no routing taps; export it again or open it without taps.")
        limits = [self._model.max_position_embeddings, manifest.cache.max_length, max_length]
        self._max_length = min(int(limit) for limit in limits if limit)
        threads = threads or default_threads()
        graph = None
        self._router_inputs: dict[int, str] = {}
        self._scores: dict[int, str] = {}
        self._forced: dict[int, tuple[int, int]] = {}  # layer -> number of experts, how many of them run
        self._model_path = bundle.model_path
        self._routers: Any = None
        self._last_logits = last_logits and find_spec("onnx") is not None
        if self._taps or top_k is not None or float32_activations or router_inputs or replay or self._last_logits:
            if router_inputs:
                self._router_inputs = _graph.router_inputs(bundle.model_path, manifest)
            if replay:
                self._router_inputs = _graph.own_router_inputs(bundle.model_path) if self._taps else {}
                for layer in manifest.routed_layers:
                    self._forced[layer] = (manifest.layers[layer].num_experts, manifest.layers[layer].top_k)
            graph, self._scores = _graph.edited(
                bundle.model_path,
                manifest,
                self._taps,
                top_k,
                float32_activations,
                self._router_inputs,
                replay,
                self._last_logits,
            )
        if rounded:
            graph = _graph.emulated(bundle.model_path, graph)
        # The session reads this memory as long as it lives.
        self._weights = _dequantized(bundle, weights_of) if weights_of is not None else {}
        self._session, version = open_session(bundle.path, manifest, threads, graph, self._weights, trace)
        if top_k is not None:
            self._taps = {
                layer: tap.model_copy(update={"top_k": min(top_k, manifest.layers[layer].num_experts)})
                for layer, tap in self._taps.items()
            }
        self._past = [name for name in manifest.io.inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        given = {value.name for value in self._session.get_inputs()}
        missing = [name for name in ("input_ids", "attention_mask", "position_ids", *self._past) if name not in given]
        if missing:
            raise MoEdgeError(f"Bundle {bundle_path}: the graph has no input {missing[0]!r}; export it again.")
        quantization = manifest.quantization
        self.info = EngineInfo(
            name=f"{manifest.target} {manifest.kind}",
            runtime=f"onnxruntime {version}",
            device="CPU" if self._device == "cpu" else "CUDA device 0",
            dtype=f"int{quantization.bits} weights" if quantization else manifest.cache.dtype or self._model.dtype,
            threads=threads,
            model=EngineModel.model_validate(
                {
                    **self._model.document(),
                    rope.FACT: self._rope_boundary,
                    "generation": GenerationConfig.read(self._path),
                    "label": manifest.label,
                    "target": manifest.target,
                    "moe": manifest.kind == "moe",
                    "routed": routed,
                    "max_length": self._max_length,
                    "top_k": top_k,
                }
            ),
        )

    def prefill(
        self,
        ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        experts: dict[int, np.ndarray] | None = None,
    ) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache; see :class:`moedge.runtime.engines.Engine`."""
        mask = check_batch(ids, attention_mask, self._model.vocab_size)
        if self._device == "cuda" and not mask.all():
            raise MoEdgeError("An ort-cuda bundle takes no padding: give rows of equal length, or one row at a time.")
        length = self._max_length if self._shared else 0
        shape = (len(ids), self._model.num_kv_heads, length, self._model.head_dim)
        # np.zeros maps pages on first touch: a long buffer costs memory only for the tokens that were written.
        empty = [np.zeros(shape, dtype=self._dtype) for _ in self._past]
        cache = _Cache(ids[:, :0], mask[:, :0], [self._ort_value(array, self._device) for array in empty])
        return self._run(ids, mask, cache, experts)

    def decode(self, ids: np.ndarray, cache: Any, *, experts: dict[int, np.ndarray] | None = None) -> Step:
        """Run ``ids`` int64 [B, S] after what ``cache`` holds; the cache is used up."""
        mask = check_batch(ids, None, self._model.vocab_size)
        if not isinstance(cache, _Cache) or cache.used or len(cache.mask) != len(ids):
            raise MoEdgeError("This cache was used before or belongs to another engine or batch; prefill again.")
        mask = np.concatenate([cache.mask, mask], axis=1)
        if longrope.crosses(self._rope_boundary, mask, ids.shape[1]):
            if experts is not None:
                longrope.refuse_forced(self._rope_boundary)
            cache.used = True
            return longrope.last(self.prefill(np.concatenate([cache.ids, ids], axis=1), mask), ids.shape[1])
        return self._run(ids, mask, cache, experts)

    def scores(self, router_inputs: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return what each layer ranks experts by, float32 [T, E], for float32 [T, H]; needs ``replay``, ``taps``."""
        if not self._forced or not self._taps:
            raise MoEdgeError(f"{self._path} was not opened with replay and taps, so its routers cannot be asked.")
        if self._routers is None:
            import onnxruntime

            part, names, outputs = _graph.routers(self._model_path, list(self._taps))
            session = onnxruntime.InferenceSession(part, session_options(self.info.threads), [self._provider])
            self._routers = (session, names, outputs)
        session, names, outputs = self._routers
        found = session.run(outputs, {name: router_inputs[layer] for layer, name in names.items()})
        return dict(zip(names, found, strict=True))

    def end_trace(self) -> Path:
        """Stop recording and return the profiler's JSON file; only for an engine opened with ``trace``."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session. The engine cannot be used afterwards."""
        self._session = None
        self._routers = None
        self._weights = {}

    @staticmethod
    def _ort_value(array: np.ndarray, device: str = "cpu") -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)

    def _run(self, ids: np.ndarray, mask: np.ndarray, cache: _Cache, experts: dict[int, np.ndarray] | None) -> Step:
        """One session run; ``mask`` int64 [B, P + S] covers the cache and ``ids``."""
        if self._session is None:
            raise MoEdgeError(f"The engine for {self._path} is closed; open it again.")
        batch, new = ids.shape
        check_length(mask.shape[1], self._max_length)
        binding = cache.binding or self._session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask, new)}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        if experts is not None and not self._forced:
            raise MoEdgeError(f"{self._path} was not opened with replay, so its experts cannot be forced.")
        for layer, (count, top_k) in self._forced.items():
            chosen = None if experts is None else experts[layer]
            binding.bind_cpu_input(_graph.forced_input(layer), forcing(chosen, batch * new, count, top_k))
        rows = 1 if self._last_logits else new
        logits = np.empty((batch, rows, self._model.vocab_size), dtype=self._dtype)
        # Outputs come back in the order in which they were first bound: logits, taps, cache.
        binding.bind_output("logits", "cpu", 0, self._dtype, logits.shape, logits.ctypes.data)
        shown = list(
            dict.fromkeys(
                [*(tap.output for tap in self._taps.values()), *self._router_inputs.values(), *self._scores.values()]
            )
        )
        for name in shown:
            binding.bind_output(name, "cpu")
        if not (self._shared and cache.binding):
            for past, present, value in zip(self._past, self._present, cache.values, strict=True):
                binding.bind_ortvalue_input(past, value)
                if self._shared:
                    binding.bind_ortvalue_output(present, value)
                else:
                    binding.bind_output(present, "cpu")
        cache.used = True
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises one class per status code, without a base class of its own
            raise MoEdgeError(f"ONNX Runtime failed on {self._path}: {str(error).splitlines()[0]}") from error
        outputs = binding.get_outputs() if shown or not self._shared else []
        values = cache.values if self._shared else outputs[1 + len(shown) :]
        seen = {name: value.numpy() for name, value in zip(shown, outputs[1:], strict=False)}
        routes = {layer: selected(seen[tap.output], tap) for layer, tap in self._taps.items()} or None
        # Float32 holds every half-precision number, so a router that casts what it reads gets the same.
        read, scores = (
            {layer: seen[name].astype(np.float32, copy=False) for layer, name in names.items()} or None
            for names in (self._router_inputs, self._scores)
        )
        text = np.concatenate([cache.ids, ids], axis=1)
        logits = logits.astype(np.float32, copy=False)
        return Step(logits, _Cache(text, mask, values, binding), routes, read, scores)


def selected(values: np.ndarray, tap: Tap) -> np.ndarray:
    """Experts int32 [T, k] from a tap: indices [T, k] as they are, or the top-k of scores [T, E], ties to the lower."""
    if tap.kind == "indices":
        return values.astype(np.int32, copy=False)
    return np.argsort(-values, axis=1, kind="stable")[:, : tap.top_k].astype(np.int32)


def _dequantized(bundle: Bundle, other: str | Path) -> dict[str, tuple[np.ndarray, Any]]:
    """De-quantised weights of the bundle ``other`` for the graph of ``bundle``: arrays and the OrtValues over them.

    Raises:
        MoEdgeError: ``bundle`` is not portable, or the two are not exports of the same model.
    """
    from moedge.export.quantize.format import dequantized_weights

    quantised = open_bundle(Path(other))
    if bundle.manifest.target != "portable" or quantised.manifest.parent != bundle.sha256:
        raise MoEdgeError(f"{other} was not lowered from {bundle.path}; give the portable bundle of the same export.")
    return {name: (array, OrtEngine._ort_value(array)) for name, array in dequantized_weights(quantised)}
