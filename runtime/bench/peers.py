"""Do the peers of a benchmark run the model that they are compared with? Times of another model say nothing.

The dense parent writes a text, greedily. Each peer reads the same text and says at each place which token it would have
chosen: a peer that rounds its weights may choose another one here and there, and from there on its own text would be
another, so its own text would tell less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moedge.runtime.bench.results import Agreement, PeerFacts
from moedge.runtime.engines.protocol import Engine

TOKENS = 32
"""Of the text that is compared."""


@dataclass(frozen=True)
class Peers:
    """Which engines of a benchmark are other programs.

    Args:
        kinds: label -> name of its row in :mod:`moedge.runtime.peers`.
        parent: label of the dense parent.
    """

    kinds: Mapping[str, str]
    parent: str

    def ask(self, engines: Mapping[str, Engine], ids: np.ndarray, most: int = TOKENS) -> dict[str, PeerFacts]:
        """Compare the choices of every peer with the parent's text after ``ids`` int64 [1, S], ``most`` tokens at most.

        Raises:
            MoEdgeError: the text does not fit, or an engine fails.
        """
        text = _choices(engines[self.parent], ids, min(TOKENS, most))
        return {
            label: {
                "peer": kind,
                "bits": getattr(engines[label], "bits", None),
                "agreement": self._agreement(_choices(engines[label], ids, len(text), text), text),
            }
            for label, kind in self.kinds.items()
        }

    def _agreement(self, chosen: list[int], text: list[int]) -> Agreement:
        same = [one == other for one, other in zip(chosen, text, strict=True)]
        first = same.index(False) if False in same else None
        return {"parent": self.parent, "tokens": len(text), "same": sum(same), "first_other": first}


def _choices(engine: Engine, ids: np.ndarray, tokens: int, text: list[int] | None = None) -> list[int]:
    """What the engine chooses at each of ``tokens`` places after ``ids``, of which ``text`` (None: that) stands."""
    step = engine.prefill(ids)
    found = [_best(step.logits)]
    for number in range(tokens - 1):
        read = found if text is None else text
        step = engine.decode(np.array([[read[number]]], dtype=np.int64), step.cache)
        found.append(_best(step.logits))
    return found


def _best(logits: np.ndarray) -> int:
    return int(logits[0, -1].argmax())


def sentence(label: str, facts: PeerFacts, dtype: str, parent_dtype: str) -> str:
    """Say what was found of one peer, with the types of its weights and the parent's, and what to do about it."""
    found, bits = facts["agreement"], facts["bits"]
    parent, tokens, same = found["parent"], found["tokens"], found["same"]
    who = f"{label} ({dtype})"
    if same == tokens:
        return f"{who} chooses {parent}'s {tokens} greedy tokens."
    counted = (
        f"{who} chooses {same} of {parent}'s {tokens} greedy tokens, another one first at token {found['first_other']}"
    )
    if 2 * same < tokens:
        return f"NOT THE SAME MODEL? {counted}: see what it was made from before comparing times."
    if bits is not None:
        return f"{counted}: weights of {bits} bits may do that."
    if parent_dtype.startswith("int"):
        return f"{counted}: {parent}'s {parent_dtype} may do that."
    return f"{counted}: only a tie explains that where nothing is rounded, so see whether it is the same model."
