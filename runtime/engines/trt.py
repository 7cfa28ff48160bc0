"""TensorRT and TensorRT-RTX engine: runs what ``moedge build`` made, on the GPU it was built for.

The work is in :mod:`moedge.runtime.device.moedge_session`, which a device archive carries too; this class gives it the
:class:`moedge.runtime.engines.Engine` protocol. Keys and values stay on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.configs.generation_config import GenerationConfig
from moedge.export import rope, targets
from moedge.runtime.device import moedge_session
from moedge.runtime.device.moedge_trt import DeviceError
from moedge.runtime.engines.build import open_file
from moedge.runtime.engines.calls import check_batch, check_cache, check_length
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.engines.protocol import LayerMode, Step


@dataclass
class _Cache:
    inner: moedge_session.Cache
    owner: TensorRTEngine
    used: bool = False


class TensorRTEngine:
    """An engine folder on an NVIDIA GPU.

    Args:
        engine_path: what ``moedge build`` wrote; every hash is checked before the engine is deserialized.
        threads: accepted for the sake of a common call; the work is on the GPU.
        taps: also return the experts that each layer selected; the engine must have been built with ``--taps``.
        router_inputs: also return what each layer's router read; the same.
        top_k: refused: an engine's graph is fixed.
        last_logits: return the logits of the last position only; the engine computes all, the others are not copied.
        layers: refused: an engine has no place where the values between its parts could be read.

    Raises:
        MoEdgeError: a damaged folder, no GPU or no TensorRT here, another GPU than the engine was built for.
    """

    def __init__(
        self,
        engine_path: str | Path,
        *,
        threads: int | None = None,
        taps: bool = False,
        router_inputs: bool = False,
        top_k: int | None = None,
        last_logits: bool = False,
        layers: LayerMode | None = None,
    ) -> None:
        if layers is not None:
            raise MoEdgeError(
                f"Engine {engine_path} does not show its layers, for a built engine has no place to read them; verify "
                "the bundle that it was built from, whose graph shows them."
            )
        file = open_file(Path(engine_path))
        limit = rope.of_bundle(Path(engine_path), file.manifest.model)
        model = file.manifest.model.model_copy(update={rope.FACT: limit})
        manifest = file.manifest.model_copy(update={"model": model})
        routed = bool(manifest.routed_layers)
        if top_k is not None:
            raise MoEdgeError(f"top_k cannot be set on {engine_path}: an engine's graph is fixed; use its ONNX bundle.")
        if (taps and routed and not manifest.taps) or (router_inputs and not manifest.names_reads):
            raise MoEdgeError(f"Engine {engine_path} was built without routing taps; build it again with --taps.")
        try:
            self._session: moedge_session.Session | None = moedge_session.Session(
                file.plan(), manifest.document(), library=file.library()
            )
        except DeviceError as error:
            raise MoEdgeError(f"Engine {engine_path} cannot run here: {error}") from error
        self._path, self._taps, self._model = Path(engine_path), taps and routed, model
        self._last, self._router_inputs = last_logits, router_inputs and routed
        self._max_length = manifest.profiles.max_length
        dtype = self._session.dtype
        self.info = EngineInfo(
            name=f"{manifest.target} {manifest.kind}",
            runtime=self._session.version,
            device=f"GPU SM{self._session.cuda.capability()}",
            dtype=f"int{bits} weights, {dtype}" if (bits := targets.find(manifest.target).bits) else dtype,
            threads=threads or 1,
            model=EngineModel.model_validate(
                {
                    **model.document(),
                    "generation": GenerationConfig.read(self._path),
                    "label": manifest.label,
                    "target": manifest.target,
                    "moe": manifest.kind == "moe",
                    "routed": routed,
                    "gathered": bool(manifest.keeps),
                    "max_length": self._max_length,
                    "top_k": None,
                }
            ),
            max_batch=manifest.profiles.batch,
        )

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache; see :class:`moedge.runtime.engines.Engine`."""
        mask = check_batch(ids, attention_mask, self._model.vocab_size)
        return self._run(ids, mask, None)

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] after what ``cache`` holds; the cache is used up."""
        mask = check_batch(ids, None, self._model.vocab_size)
        own = isinstance(cache, _Cache) and cache.owner is self and not cache.used
        check_cache(own and len(cache.inner.mask) == len(ids))
        return self._run(ids, mask, cache)

    def close(self) -> None:
        """Free the GPU memory. The engine cannot be used afterwards."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _run(self, ids: np.ndarray, mask: np.ndarray, cache: _Cache | None) -> Step:
        if self._session is None:
            raise MoEdgeError(f"The engine for {self._path} is closed; open it again.")
        check_length(ids.shape[1] + (cache.inner.mask.shape[1] if cache else 0), self._max_length)
        reads: list[moedge_session.Taps] | None = [] if self._router_inputs else None
        try:
            if cache is None:
                logits, routes, inner = self._session.start(ids, mask, last=self._last, reads=reads)
            else:
                cache.used = True
                logits, routes, inner = self._session.step(ids, cache.inner, mask, last=self._last, reads=reads)
        except DeviceError as error:
            raise MoEdgeError(f"Engine {self._path}: {error}") from error
        return Step(logits, _Cache(inner, self), routes if self._taps else None, reads[0] if reads else None)
