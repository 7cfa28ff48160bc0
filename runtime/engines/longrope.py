"""Longrope: rotary frequencies that change when a text grows longer than those of the original training.

Up to ``original_max_position_embeddings`` tokens every frequency is a short one, beyond it a long one. Keys that were
cached before are of the wrong frequency after, so the whole text has to be read again there, once (transformers'
``generate()`` does so for Phi-3). Engines do it inside :meth:`moedge.runtime.engines.Engine.decode`: what they return
is what one reading of the whole text gives.
"""

from __future__ import annotations

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.engines.protocol import Step
from moedge.runtime.engines.steps import part


def crosses(limit: int | None, mask: np.ndarray, new: int) -> bool:
    """Whether the last ``new`` columns of ``mask`` int64 [B, P] take a text, whose cache is shorter, beyond ``limit``.

    The longest row decides for the batch, as it does in the model.
    """
    if limit is None or new == mask.shape[1]:
        return False
    lengths = mask.sum(axis=1)
    before = mask[:, :-new].sum(axis=1)
    return bool(lengths.max() > limit >= before.max())


def refuse_forced(limit: int | None) -> None:
    """Say that choices cannot be forced on a step that reads the whole text again.

    Raises:
        MoEdgeError: always.
    """
    raise MoEdgeError(
        f"Beyond {limit} tokens this model's rotary factors (longrope) change and the whole text is read again, so the "
        "choices of every token would have to be given; prefill the whole text with them."
    )


def last(step: Step, new: int) -> Step:
    """Cut what a whole reading gave to its last ``new`` positions."""
    return part(step, slice(-new, None))
