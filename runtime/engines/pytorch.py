"""PyTorch engine: the reference that exported bundles are compared with. Imports torch only when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.convert.compat import cache_argument
from moedge.export.graph.layers import SPOTS, LayerPoint, Spot
from moedge.export.manifest import GatherPlace, Which
from moedge.runtime.engines import longrope, pytorch_loader
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
from moedge.runtime.engines.protocol import LayerMode, Step
from moedge.runtime.engines.pytorch_layers import Layers


@dataclass
class _Cache:
    """``ids`` and ``mask`` int64 [B, P] (padding on the left) and the transformers cache, which grows in place."""

    ids: np.ndarray
    mask: np.ndarray
    past: Any
    used: bool = False


class TorchEngine:
    """A Hugging Face checkpoint folder, dense or converted (``model_type`` starts with ``moedge_``).

    Args:
        checkpoint_folder: folder with config.json and safetensors weights. Nothing is downloaded, no remote code runs.
        threads: torch intra-op threads (a setting of the whole process); physical cores by default.
        taps: also return the experts that each MoE layer selected.
        top_k: run every MoE layer with this many experts, or all of them where a layer has fewer.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda`` or ``cuda:N``. Tokens go in and logits come out in host memory, so a timed step holds
            both copies and has ended when it returns.
        replay: let the caller force the experts and what is left out, see :class:`moedge.runtime.engines.ReplayEngine`.
        last_logits: compute the logits of each call's last position alone, ``Step.logits`` [B, 1, V].
        layers: show the values between the parts of the model, or let the caller give them, see
            :class:`moedge.runtime.engines.LayerEngine`.
        spots: which of these values (:mod:`moedge.export.graph.layers`).

    Raises:
        MoEdgeError: torch or transformers is missing, or the folder cannot be loaded.
    """

    branch_rows = None

    def __init__(
        self,
        checkpoint_folder: str | Path,
        *,
        threads: int | None = None,
        taps: bool = False,
        top_k: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        replay: bool = False,
        last_logits: bool = False,
        layers: LayerMode | None = None,
        spots: Collection[Spot] = SPOTS,
    ) -> None:
        try:
            import torch
        except ImportError as error:
            raise MoEdgeError("A checkpoint runs in PyTorch; install it with: pip install 'moedge[cpu]'") from error
        self._torch = torch
        self._threads = threads or default_threads()
        self._path = Path(checkpoint_folder)
        self._last_logits = last_logits
        self._module = pytorch_loader.load(self._path, dtype, device)
        self._cache_argument = cache_argument(self._module)
        self._sparse = pytorch_loader.routed_layers(self._module)
        if top_k is not None:
            pytorch_loader.set_top_k(self._sparse, top_k, self._path)
        self._taps = taps
        nested = [module for module in self._sparse.values() if not hasattr(module, "selection_bias")]
        if replay and nested:
            raise MoEdgeError(f"{self._path}: experts inside experts cannot be replayed; open it without replay.")
        self._replay = replay
        self._read: dict[int, Any] = {}  # what each layer's router read in the latest call
        for layer, module in self._sparse.items():
            module.record_routes = taps
            if replay and taps:
                module.router.register_forward_pre_hook(self._recorder(layer))
        self._thresholds = pytorch_loader.thresholds(self._module)
        self._factors: dict[GatherPlace, Any] = {}  # forced in the running call
        self._values: dict[GatherPlace, Any] = {}  # of which small ones were left out in the latest call
        for module in pytorch_loader.gathered_layers(self._module) if replay else ():
            module.choose = self._chooser(module)
        self._layers = Layers(self._module, self._path, spots, given=layers == "given") if layers else None
        routed, gathered = bool(self._sparse), bool(self._thresholds)
        self.info = pytorch_loader.describe(
            self._module, self._path, dtype, self._threads, routed=routed, gathered=gathered, top_k=top_k
        )
        self._vocab_size = self.info.model.vocab_size
        self._max_length = int(self._module.config.max_position_embeddings)
        self._rope_boundary = self.info.model.rope_boundary

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
        from transformers import DynamicCache

        mask = check_batch(ids, attention_mask, self._vocab_size)
        self._give(given)
        with self._forced(experts, factors, ids.size):
            return self._run(ids, ids, mask, DynamicCache())

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
        mask = check_batch(ids, None, self._vocab_size)
        check_cache(isinstance(cache, _Cache) and not cache.used and len(cache.mask) == len(ids))
        cache.used = True
        text, mask = np.concatenate([cache.ids, ids], axis=1), np.concatenate([cache.mask, mask], axis=1)
        if longrope.crosses(self._rope_boundary, mask, ids.shape[1]):
            if experts is not None or factors is not None:
                longrope.refuse_forced(self._rope_boundary)
            return longrope.last(self.prefill(text, mask), ids.shape[1])
        self._give(given)
        with self._forced(experts, factors, ids.size):
            return self._run(ids, text, mask, cache.past)

    def _give(self, given: dict[LayerPoint, np.ndarray] | None) -> None:
        if self._layers is not None:
            self._layers.give(given or {}, self._tensor, self._path)
        elif given:
            raise MoEdgeError(f"{self._path} was not opened to be given layers.")

    def cached(self, cache: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return by layer the keys and values of a cache, float32 [B, G, T, D]."""
        both = ((layer.keys, layer.values) for layer in cache.past.layers)
        found = (tuple(part.float().cpu().numpy() for part in pair) for pair in both)
        return {layer: (keys, values) for layer, (keys, values) in enumerate(found)}

    def read(self, ids: np.ndarray) -> Any:
        """Return the cache of ``ids`` int64 [B, S]; see :class:`moedge.runtime.engines.BranchingEngine`."""
        from transformers import DynamicCache

        return self._run(ids, ids, check_batch(ids, None, self._vocab_size), DynamicCache(), last=True).cache

    def branch(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] after ``cache``, which stays as it was."""
        if not isinstance(cache, _Cache) or cache.used:
            raise MoEdgeError("This cache was used before or belongs to another engine; read the text again.")
        # Layers of a DynamicCache grow by making new tensors, so the former ones can be put back.
        held = [(layer, layer.keys, layer.values) for layer in cache.past.layers]
        step = self.decode(ids, cache)
        for layer, keys, values in held:
            layer.keys, layer.values = keys, values
        cache.used = False
        step.cache = None
        return step

    @property
    def module(self) -> Any:
        """The transformers model."""
        if self._module is None:
            raise MoEdgeError(f"The engine for {self._path} is closed; open it again.")
        return self._module

    def factors(self, left_out_of: dict[GatherPlace, np.ndarray]) -> dict[GatherPlace, np.ndarray]:
        """Return what the model's thresholds multiply values float32 [T, K] by."""
        known_places(left_out_of, self._thresholds)
        return {place: factors_of(values, *self._thresholds[place], place) for place, values in left_out_of.items()}

    def scores(self, router_inputs: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return what each layer ranks its experts by, float32 [T, E], for float32 [T, H]."""
        found = {}
        with self._torch.inference_mode():
            for layer, module in sorted(self._sparse.items()):
                scores = module.router(self._tensor(router_inputs[layer]))
                if module.selection_bias is not None:
                    scores = scores + module.selection_bias
                found[layer] = scores.cpu().numpy()
        return found

    def _chooser(self, module: Any) -> Callable[[Which, Any, Any], Any]:
        """In place of the module's thresholds: keep what is forced, or what they say, and remember the values."""

        def choose(which: Which, values: Any, threshold: Any) -> Any:
            place = (module.layer_index, which)
            self._values[place] = values
            if place in self._factors:
                return (values.float() * self._factors[place]).to(values.dtype)
            return self._torch.ops.moedge.keep_large(values, threshold, module.ramp)

        return choose

    def _recorder(self, layer: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def record(module: Any, given: tuple[Any, ...]) -> None:
            self._read[layer] = given[0]

        return record

    @contextmanager
    def _forced(
        self, experts: dict[int, np.ndarray] | None, factors: dict[GatherPlace, np.ndarray] | None, tokens: int
    ) -> Iterator[None]:
        """Run with ``experts`` in place of the routers' choice, through the bias that only selects; and ``factors``."""
        if (experts is not None or factors is not None) and not self._replay:
            raise MoEdgeError(f"{self._path} was not opened with replay, so its experts cannot be forced.")
        known_places(factors or {}, self._thresholds)
        own = {layer: module.selection_bias for layer, module in self._sparse.items()} if experts is not None else {}
        self._factors = {place: self._tensor(factor) for place, factor in (factors or {}).items()}
        try:
            for layer, module in self._sparse.items() if own else ():
                assert experts is not None
                bias = forcing(experts[layer], tokens, module.num_experts, module.top_k)
                module.selection_bias = self._tensor(bias)
            yield
        finally:
            self._factors = {}
            for layer, bias in own.items():
                self._sparse[layer].selection_bias = bias

    def _tensor(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(array).to(self._module.device)

    def peak_gpu_mib(self) -> float | None:
        """Most memory that PyTorch's tensors took on the GPU in this process, MiB; None on the CPU.

        What CUDA takes for itself (its context, some hundred MiB) is not in it.
        """
        device = self._module.device
        return self._torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None

    def close(self) -> None:
        """Free the weights. The engine cannot be used afterwards."""
        self._module = None
        self._sparse = {}
        self._values = {}

    def _run(self, ids: np.ndarray, text: np.ndarray, mask: np.ndarray, past: Any, *, last: bool = False) -> Step:
        """Run ``ids``, the end of ``text``; ``mask`` is that of ``text``. ``last``: logits of the last one alone."""
        torch, module = self._torch, self.module
        check_length(mask.shape[1], self._max_length)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        # No mask where nothing is padded: transformers then takes its fast causal path.
        padded = bool((mask == 0).any())
        with torch.inference_mode():
            result = module(
                input_ids=self._tensor(np.ascontiguousarray(ids, dtype=np.int64)),
                attention_mask=self._tensor(mask) if padded else None,
                position_ids=self._tensor(np.ascontiguousarray(position_ids(mask, ids.shape[1]))),
                use_cache=True,
                logits_to_keep=1 if self._last_logits or last else 0,
                **{self._cache_argument: past},
            )
            logits = result.logits.float().contiguous().cpu().numpy()
            routes = None
            if self._taps and self._sparse:
                routes = {layer: _indices(module.last_routes) for layer, module in sorted(self._sparse.items())}
        read = {layer: value.cpu().numpy() for layer, value in sorted(self._read.items())} or None
        shown = self._values if self._taps else {}
        left_out_of = {place: value.float().cpu().numpy() for place, value in sorted(shown.items())} or None
        layers = self._layers.shown() if self._layers else None
        # The cache has grown in place.
        held = _Cache(text, mask, past)
        return Step(logits, held, routes, read, left_out_of=left_out_of, layers=layers)


def _indices(routes: Any) -> np.ndarray:
    """Recorded routes -> int32 [T, k]."""
    return np.asarray(routes.cpu().numpy(), dtype=np.int32)
