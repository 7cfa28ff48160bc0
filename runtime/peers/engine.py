"""What every peer's engine does around its program: checks, and the life of a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.engines.calls import check_batch, check_cache, check_length, default_threads
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.engines.protocol import Step

LONGEST = 2048
"""Tokens of a text where the caller does not say how many: programs that reserve their cache want to know."""


@dataclass
class Cache:
    """A text of ``length`` tokens that ``owner`` has read; ``state`` is the program's."""

    owner: PeerEngine
    rows: int
    length: int
    state: Any
    used: bool = False


class PeerEngine(ABC):
    """An engine of the protocol (:class:`moedge.runtime.engines.Engine`) whose work another program does.

    It is timed and asked for tokens, nothing else: rows are not padded, logits are those of the last position, float32
    [B, 1, V], and nothing is shown of what lies between. The choice of a token is the caller's, as it is with our own
    engines, so that it costs each the same.

    Args:
        path: what the row of :mod:`moedge.runtime.peers` says.
        threads: CPU threads; physical cores by default.
        max_length: tokens of the longest text, prompt and answer.
    """

    info: EngineInfo
    bits: int | None
    """Of its integer weights; None: floating point, or not told."""

    def __init__(self, path: str | Path, *, threads: int | None = None, max_length: int | None = None) -> None:
        self._path = Path(path)
        self._threads = threads or default_threads()
        self._max_length = max_length or LONGEST

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache.

        Raises:
            MoEdgeError: padding, too many rows or tokens, or an id that the model does not have.
        """
        self._check(ids, 0)
        if attention_mask is not None and not np.all(attention_mask):
            raise MoEdgeError(f"{self.info.name} takes no padding here: give rows of equal length.")
        logits, state = self._begin(ids)
        return Step(logits, Cache(self, len(ids), ids.shape[1], state))

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] after what ``cache`` holds; the cache is used up.

        Raises:
            MoEdgeError: the cache was used before, or is another engine's or batch's.
        """
        own = isinstance(cache, Cache) and cache.owner is self and not cache.used
        check_cache(own and cache.rows == len(ids) and self._holds(cache.state))
        self._check(ids, cache.length)
        cache.used = True
        logits, state = self._go_on(ids, cache.state)
        return Step(logits, Cache(self, len(ids), cache.length + ids.shape[1], state))

    @abstractmethod
    def close(self) -> None:
        """Free the program's memory."""

    @abstractmethod
    def _begin(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        """Read a new text int64 [B, S]: logits float32 [B, 1, V] of its end, and what :meth:`_go_on` needs."""

    @abstractmethod
    def _go_on(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """As :meth:`_begin`, after the text that ``state`` stands for."""

    def _holds(self, state: Any) -> bool:
        """Whether the program still has the text of ``state``; some hold one text only."""
        return True

    def _check(self, ids: np.ndarray, before: int) -> None:
        most = self.info.max_batch
        if most is not None and len(ids) > most:
            raise MoEdgeError(f"{self.info.name} takes {most} row at a time here, not {len(ids)}.")
        check_batch(ids, None, self.info.model.vocab_size)
        check_length(before + ids.shape[1], self._max_length)

    def _info(
        self, peer: str, runtime: str, dtype: str, vocab_size: int, *, longest: int | None, max_batch: int | None = None
    ) -> EngineInfo:
        """The facts that stand beside every number; ``longest`` is the model's own limit in tokens."""
        if longest is not None:
            self._max_length = min(self._max_length, longest)
        model = {"vocab_size": vocab_size, "target": peer, "label": self._path.name, "max_length": self._max_length}
        return EngineInfo(
            name=f"{peer} dense",
            runtime=runtime,
            device="CPU",
            dtype=dtype,
            threads=self._threads,
            model=EngineModel.model_validate(model),
            max_batch=max_batch,
            padding=False,
        )


def version(distribution: str) -> str:
    """``onnxruntime-genai 0.18.0``, for :attr:`EngineInfo.runtime`."""
    return f"{distribution} {metadata.version(distribution)}"


def cannot_open(peer: str, path: Path, error: Exception) -> MoEdgeError:
    """What to say where the program does not open what it was given."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return MoEdgeError(f"Peer {peer} cannot open {path}: {said}")
