"""One runtime per file behind one small protocol.

Parity, benchmark and generation know only :class:`Engine`, so PyTorch, ONNX Runtime and TensorRT compare like with like.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class EngineInfo:
    """What a number was measured on: printed beside every number."""

    name: str
    """Short label for tables, e.g. ``"ort-cpu moe"``."""
    runtime: str
    """Runtime and version, e.g. ``"onnxruntime 1.31.1"``."""
    device: str
    """Device, e.g. ``"CPU"``."""
    dtype: str
    """Weight dtype, e.g. ``"float32"``."""
    threads: int
    model: dict[str, Any] = field(default_factory=dict)
    """Model facts: vocab_size, num_layers, eos_token_ids, max_position_embeddings, ..."""


@dataclass
class Step:
    """Result of one forward call.

    ``logits`` float32 [B, S, V] for the S positions that were fed; ``cache`` to pass on; ``routes`` per layer the
    selected experts, int32 [B*S, k] sorted by decreasing score, when the engine was opened with ``taps=True``.
    """

    logits: np.ndarray
    cache: Any
    routes: dict[int, np.ndarray] | None = None


class Engine(Protocol):
    """A loaded model that runs prefill and decode. A cache belongs to the engine that made it and is used once."""

    info: EngineInfo

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache. ``attention_mask`` int64 [B, S], 0 for (left) padding."""
        ...

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] (S is 1 when generating) after what ``cache`` holds."""
        ...

    def close(self) -> None:
        """Free the runtime's memory."""
        ...
