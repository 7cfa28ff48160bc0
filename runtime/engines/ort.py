"""ONNX Runtime engine: runs a bundle, with a KV cache that never travels through Python.

The cache lives in ``OrtValue`` objects. With ``cache.kind == "concat"`` the runtime allocates each ``present`` and the
engine binds it as the next ``past``. With ``"shared_buffer"`` (GroupQueryAttention) one buffer of the full length is
bound as both, and the runtime writes the new keys and values in place. Only ids, mask, positions and logits are numpy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export.graph import kept as left_out
from moedge.export.graph import layers as _layers
from moedge.export.graph import taps as _graph
from moedge.export.graph.layers import SPOTS, LayerPoint, Spot
from moedge.export.manifest import GatherPlace, Tap
from moedge.runtime.engines import longrope
from moedge.runtime.engines.calls import (
    check_batch,
    check_cache,
    check_length,
    default_threads,
    factors_of,
    forcing,
    known_places,
    position_ids,
)
from moedge.runtime.engines.ort_loader import Loaded, Options, load
from moedge.runtime.engines.ort_session import ort_value, session_options
from moedge.runtime.engines.protocol import LayerMode, Step
from moedge.runtime.engines.steps import joined


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
            the graph shows that; and the values of which small ones are left out (needs ``onnx``).
        replay: let the caller force the experts and what is left out (portable bundles; needs ``onnx``), see
            :class:`moedge.runtime.engines.ReplayEngine`.
        last_logits: compute the logits of each call's last position alone, ``Step.logits`` [B, 1, V]: all that
            generation needs. Without the ``onnx`` package all are computed.
        layers: show the values between the parts of the model, or let the caller give them too (needs ``onnx``), see
            :class:`moedge.runtime.engines.LayerEngine`.
        spots: which of these values (:mod:`moedge.export.graph.layers`). A half-precision graph is given the stream
            that layers read, and nothing more.
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
        layers: LayerMode | None = None,
        spots: Collection[Spot] = SPOTS,
        trace: str | Path | None = None,
    ) -> None:
        options = Options(
            threads=threads or default_threads(),
            taps=taps,
            top_k=top_k,
            max_length=max_length,
            weights_of=weights_of,
            float32_activations=float32_activations,
            router_inputs=router_inputs,
            replay=replay,
            last_logits=last_logits,
            layers=layers,
            trace=trace,
            spots=spots,
        )
        self._path = Path(bundle_path)
        self._loaded: Loaded | None = load(self._path, options)
        self._routers: Any = None
        self._thresholds: dict[GatherPlace, tuple[np.ndarray, float]] | None = None
        self.info = self._loaded.info
        # GroupQueryAttention takes several new tokens after a past in a batch of one alone (onnxruntime 1.31).
        self.branch_rows = 1 if self._loaded.shared else None

    def prefill(
        self,
        ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        experts: dict[int, np.ndarray] | None = None,
        factors: dict[GatherPlace, np.ndarray] | None = None,
        given: dict[LayerPoint, np.ndarray] | None = None,
    ) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache; see :class:`moedge.runtime.engines.Engine`."""
        loaded = self._open()
        mask = check_batch(ids, attention_mask, loaded.model.vocab_size)
        if not loaded.info.padding and not mask.all():
            raise MoEdgeError(f"{self._path} takes no padding: give rows of equal length, or one row at a time.")
        return self._run(ids, mask, _empty_cache(loaded, len(ids)), experts, factors, given)

    def decode(
        self,
        ids: np.ndarray,
        cache: Any,
        *,
        experts: dict[int, np.ndarray] | None = None,
        factors: dict[GatherPlace, np.ndarray] | None = None,
        given: dict[LayerPoint, np.ndarray] | None = None,
    ) -> Step:
        """Run ``ids`` int64 [B, S] after what ``cache`` holds; the cache is used up."""
        loaded = self._open()
        mask = check_batch(ids, None, loaded.model.vocab_size)
        check_cache(isinstance(cache, _Cache) and not cache.used and len(cache.mask) == len(ids))
        mask = np.concatenate([cache.mask, mask], axis=1)
        if longrope.crosses(loaded.rope_boundary, mask, ids.shape[1]):
            if experts is not None or factors is not None:
                longrope.refuse_forced(loaded.rope_boundary)
            cache.used = True
            return longrope.last(self.prefill(np.concatenate([cache.ids, ids], axis=1), mask), ids.shape[1])
        if loaded.shared and len(ids) > 1 and ids.shape[1] > 1:
            # GroupQueryAttention takes several tokens after a past for a single row only.
            steps: list[Step] = []
            for token in np.split(ids, ids.shape[1], axis=1):
                steps.append(self.decode(token, steps[-1].cache if steps else cache, experts=experts, factors=factors))
            whole = joined(steps)
            return replace(whole, logits=steps[-1].logits) if loaded.last_logits else whole
        return self._run(ids, mask, cache, experts, factors, given)

    def cached(self, cache: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return by layer the keys and values of a cache, float32 [B, G, T, D]."""
        loaded, length = self._open(), cache.mask.shape[1]
        arrays = [value.numpy()[:, :, :length].astype(np.float32) for value in cache.values]
        named = dict(zip(loaded.past, arrays, strict=True))
        return {
            layer: (named[f"past_key_values.{layer}.key"], named[f"past_key_values.{layer}.value"])
            for layer in range(loaded.model.num_layers)
        }

    def read(self, ids: np.ndarray) -> Any:
        """Return the cache of ``ids`` int64 [B, S]; see :class:`moedge.runtime.engines.BranchingEngine`."""
        from onnxruntime import RunOptions

        loaded = self._open()
        mask, cache = check_batch(ids, None, loaded.model.vocab_size), _empty_cache(loaded, len(ids))
        check_length(mask.shape[1], loaded.max_length)
        binding = loaded.session.io_binding()
        self._bind_inputs(binding, ids, mask, None)
        self._bind_factors(binding, None)
        _bind_cache(binding, loaded, cache.values)
        only_cache = RunOptions()
        only_cache.only_execute_path_to_fetches = True  # the output projection leads to none of them
        self._execute(binding, only_cache)
        return _Cache(ids, mask, cache.values if loaded.shared else binding.get_outputs())

    def branch(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] after ``cache``, which stays as it was."""
        # What was written into a shared buffer lies behind the cache's tokens, where the next step writes again.
        step = self.decode(ids, cache)
        cache.used = False
        step.cache = None
        return step

    def factors(self, left_out_of: dict[GatherPlace, np.ndarray]) -> dict[GatherPlace, np.ndarray]:
        """What the bundle's thresholds multiply values float32 [T, K] by; needs ``replay``."""
        loaded = self._open()
        known_places(left_out_of, loaded.factors)
        if self._thresholds is None:
            self._thresholds = left_out.thresholds(loaded.model_path, loaded.factors)
        return {place: factors_of(values, *self._thresholds[place], place) for place, values in left_out_of.items()}

    def scores(self, router_inputs: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return what each layer ranks experts by, float32 [T, E], for float32 [T, H]; needs ``replay``, ``taps``."""
        loaded = self._open()
        if not loaded.forced or not loaded.shown.taps:
            raise MoEdgeError(f"{self._path} was not opened with replay and taps, so its routers cannot be asked.")
        if self._routers is None:
            import onnxruntime

            part, names, outputs = _graph.routers(loaded.model_path, list(loaded.shown.taps))
            session = onnxruntime.InferenceSession(part, session_options(self.info.threads), [loaded.provider])
            self._routers = (session, names, outputs)
        session, names, outputs = self._routers
        found = session.run(outputs, {name: router_inputs[layer] for layer, name in names.items()})
        return dict(zip(names, found, strict=True))

    def end_trace(self) -> Path:
        """Stop recording and return the profiler's JSON file; only for an engine opened with ``trace``."""
        return Path(self._open().session.end_profiling())

    def close(self) -> None:
        """Free the session. The engine cannot be used afterwards."""
        self._loaded = None
        self._routers = None

    def _open(self) -> Loaded:
        if self._loaded is None:
            raise MoEdgeError(f"The engine for {self._path} is closed; open it again.")
        return self._loaded

    def _run(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        cache: _Cache,
        experts: dict[int, np.ndarray] | None,
        factors: dict[GatherPlace, np.ndarray] | None,
        given: dict[LayerPoint, np.ndarray] | None = None,
    ) -> Step:
        """One session run; ``mask`` int64 [B, P + S] covers the cache and ``ids``."""
        loaded = self._open()
        batch, new = ids.shape
        check_length(mask.shape[1], loaded.max_length)
        binding = cache.binding or loaded.session.io_binding()
        self._bind_inputs(binding, ids, mask, experts)
        self._bind_factors(binding, factors)
        self._bind_layers(binding, given or {})
        rows = 1 if loaded.last_logits else new
        logits = np.empty((batch, rows, loaded.model.vocab_size), dtype=loaded.dtype)
        # Outputs come back in the order in which they were first bound: logits, taps, cache.
        binding.bind_output("logits", "cpu", 0, loaded.dtype, logits.shape, logits.ctypes.data)
        shown = loaded.shown.outputs
        for name in shown:
            binding.bind_output(name, "cpu")
        if not (loaded.shared and cache.binding):
            _bind_cache(binding, loaded, cache.values)
        cache.used = True
        self._execute(binding)
        outputs = binding.get_outputs() if shown or not loaded.shared else []
        values = cache.values if loaded.shared else outputs[1 + len(shown) :]
        seen = {name: value.numpy() for name, value in zip(shown, outputs[1:], strict=False)}
        routes = {layer: selected(seen[tap.output], tap) for layer, tap in loaded.shown.taps.items()} or None
        # Float32 holds every half-precision number, so a router that casts what it reads gets the same.
        read, scores = (
            {layer: seen[name].astype(np.float32, copy=False) for layer, name in names.items()} or None
            for names in (loaded.shown.router_inputs, loaded.shown.scores)
        )
        before, after = (
            {place: _rows(seen[name]) for place, name in names.items()} or None
            for names in (loaded.shown.left_out_of, loaded.shown.kept)
        )
        layers = {point: _rows(seen[name]) for point, name in loaded.shown.layers.items()} or None
        held = _Cache(np.concatenate([cache.ids, ids], axis=1), mask, values, binding)
        found = logits.astype(np.float32, copy=False)
        return Step(found, held, routes, read, scores, before, after, layers)

    def _execute(self, binding: Any, options: Any = None) -> None:
        try:
            self._open().session.run_with_iobinding(binding, options)
        except Exception as error:  # onnxruntime raises one class per status code, without a base class of its own
            raise MoEdgeError(f"ONNX Runtime failed on {self._path}: {str(error).splitlines()[0]}") from error

    def _bind_inputs(
        self, binding: Any, ids: np.ndarray, mask: np.ndarray, experts: dict[int, np.ndarray] | None
    ) -> None:
        """Bind everything that a step feeds beside the cache."""
        loaded = self._open()
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask, ids.shape[1])}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        if experts is not None and not loaded.forced:
            raise MoEdgeError(f"{self._path} was not opened with replay, so its experts cannot be forced.")
        for layer, (count, top_k) in loaded.forced.items():
            chosen = None if experts is None else experts[layer]
            binding.bind_cpu_input(_graph.forced_input(layer), forcing(chosen, ids.size, count, top_k))

    def _bind_factors(self, binding: Any, factors: dict[GatherPlace, np.ndarray] | None) -> None:
        known = self._open().factors
        known_places(factors or {}, known)
        for place in known:
            given = (factors or {}).get(place, np.full((1, 1), left_out.OWN))
            binding.bind_cpu_input(left_out.factor_input(place), np.ascontiguousarray(given, dtype=np.float32))

    def _bind_layers(self, binding: Any, given: dict[LayerPoint, np.ndarray]) -> None:
        loaded = self._open()
        known = loaded.given
        if given.keys() != known.keys():
            raise MoEdgeError(f"{self._path} takes layers for {len(known)} points, not for {len(given)}.")
        for point, name in known.items():  # as wide as the graph's arithmetic
            binding.bind_cpu_input(_layers.given_input(name), np.ascontiguousarray(given[point], dtype=loaded.dtype))


def _empty_cache(loaded: Loaded, batch: int) -> _Cache:
    """The cache of a batch of which nothing was read yet."""
    length = loaded.max_length if loaded.shared else 0
    shape = (batch, loaded.model.num_kv_heads, length, loaded.model.head_dim)
    # np.zeros maps pages on first touch: a long buffer costs memory only for the tokens that were written.
    empty = [np.zeros(shape, dtype=loaded.dtype) for _ in loaded.past]
    nothing = np.zeros((batch, 0), np.int64)
    return _Cache(nothing, nothing, [ort_value(array, loaded.device) for array in empty])


def _rows(values: np.ndarray) -> np.ndarray:
    """Return values [..., K] of any type as float32 [T, K]."""
    return values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)


def _bind_cache(binding: Any, loaded: Loaded, values: list[Any]) -> None:
    """Bind the cache as input, and what takes its place as output: the same buffers, or new ones."""
    for past, value in zip(loaded.past, values, strict=True):
        present = past.replace("past_key_values.", "present.")
        binding.bind_ortvalue_input(past, value)
        if loaded.shared:
            binding.bind_ortvalue_output(present, value)
        else:
            binding.bind_output(present, "cpu")


def selected(values: np.ndarray, tap: Tap) -> np.ndarray:
    """Experts int32 [T, k] from a tap: indices [T, k] as they are, or the top-k of scores [T, E], ties to the lower."""
    if tap.kind == "indices":
        return values.astype(np.int32, copy=False)
    return np.argsort(-values, axis=1, kind="stable")[:, : tap.top_k].astype(np.int32)
