"""Take results of forward calls apart by row and position, and put them together again.

A :class:`moedge.runtime.engines.Step` holds logits [B, S, V] and, of what it shows, arrays [B*S, n] by layer or place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moedge.runtime.engines.protocol import Step

SHOWN = ("routes", "router_inputs", "scores", "left_out_of", "kept", "layers")
"""Fields of a step that hold one row a token."""


def part(step: Step, positions: slice, rows: slice = slice(None)) -> Step:
    """Return ``positions`` of ``rows``; the cache is the step's, which belongs to all of it."""
    batch = len(step.logits)

    def own(array: np.ndarray) -> np.ndarray:
        return array.reshape(batch, -1, array.shape[1])[rows, positions].reshape(-1, array.shape[1])

    def shown(name: str) -> Any:
        found = getattr(step, name)
        return None if found is None else {key: own(array) for key, array in found.items()}

    return _with(step.logits[rows, positions], step.cache, shown)


def joined(steps: Sequence[Step]) -> Step:
    """Put calls for the same rows, one after the other, together; what one of them does not show is not shown."""
    batch = len(steps[0].logits)

    def together(arrays: Sequence[np.ndarray]) -> np.ndarray:
        width = arrays[0].shape[1]
        return np.concatenate([a.reshape(batch, -1, width) for a in arrays], axis=1).reshape(-1, width)

    def shown(name: str) -> Any:
        found = [getattr(step, name) for step in steps]
        if any(each is None for each in found):
            return None
        return {key: together([each[key] for each in found]) for key in found[0]}

    return _with(np.concatenate([step.logits for step in steps], axis=1), steps[-1].cache, shown)


def _with(logits: np.ndarray, cache: Any, shown: Callable[[str], Any]) -> Step:
    return Step(logits, cache, **{name: shown(name) for name in SHOWN})
