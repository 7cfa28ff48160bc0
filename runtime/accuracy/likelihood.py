"""Log-likelihoods by an engine: of continuations of a context, and of windows of text.

Questions of a task share a context ("Question: ... Answer:") that is continued in several ways. It is read once for
all of them where the engine can branch (:class:`moedge.runtime.engines.BranchingEngine`), which is most of the work.
Rows of a batch are filled up on the right: no token sees what comes after it, so no mask is needed. As much is read of
every row as the shortest context has; the rest of a longer one stands in front of each of its continuations, so batches
hold contexts of nearly one length.

Symbols: B rows, S tokens, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.runtime.engines import BranchingEngine, Engine

Ids = tuple[int, ...]
CPU_LOGITS_BYTES, LOGITS_BYTES = 1 << 25, 1 << 29
"""A batch is made smaller where the logits of a call would be larger than this. On a CPU memory beyond 32 MiB is mapped
anew for every call (glibc's largest M_MMAP_THRESHOLD), which took a third of the time of a call."""
_ALIKE = 0.9
"""A batch's shortest context, of its longest: what is more is read again with every continuation."""
_PASS = 14
"""What a forward pass costs beside its tokens, in tokens: reading the weights. (SmolLM2 in ONNX Runtime on one core
takes 36 ms for a token, 2.5 ms for each further one.)"""
_CHUNK = 256
"""Tokens whose probabilities [256, V] exist at a time."""


@dataclass
class _End:
    """What follows a context, without its last token, which is predicted and not fed."""

    fed: Ids
    targets: list[tuple[int, Ids]] = field(default_factory=list)
    """Number of a pair, and its continuation: all but the last token are ``fed``."""


@dataclass
class _Context:
    ids: Ids
    ends: list[_End]
    alone: bool = False
    """Another row of its batch would change it: see :func:`_contexts`."""

    @property
    def shared(self) -> bool:
        """Whether reading the context once saves more tokens than the passes cost that it adds."""
        return (len(self.ends) - 1) * len(self.ids) > (len(self.ends) + 1) * _PASS

    @property
    def longest(self) -> int:
        """Tokens that are fed, at most."""
        return len(self.ids) + max(len(end.fed) for end in self.ends)


def log_likelihoods(
    engine: Engine, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int = 8, progress: Progress | None = None
) -> list[tuple[float, bool]]:
    """Return log p(continuation | context) in nats of each pair, and whether greedy decoding would give it.

    Args:
        engine: any engine.
        pairs: token ids of a context and of its continuation, neither empty. A context that does not fit is cut on
            the left, as lm-eval does.
        batch_size: contexts in a forward pass, fewer where their logits would be larger than the limits above.
        progress: called with (pairs done, pairs in all).

    Raises:
        MoEdgeError: an empty context or continuation, one that no context fits in front of, or logits that are no
            numbers.
    """
    totals, greedy, done = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool), 0
    branching = engine if isinstance(engine, BranchingEngine) else None
    contexts = _contexts(engine, pairs, branching=branching is not None)
    rows = _rows_at_most(engine, batch_size)
    together = min(rows, branching.branch_rows or rows) if branching else rows
    for batch in _batches(contexts, rows, together, _tokens_at_most(engine)):
        shared = min(len(one.ids) for one in batch) - 1 if len(batch[0].ends) > 1 else 0
        cache = branching.read(_filled([one.ids[:shared] for one in batch])) if branching and shared else None
        for ends in zip(*(one.ends for one in batch), strict=True):
            fed = _filled([(*one.ids[shared:], *end.fed) for one, end in zip(batch, ends, strict=True)])
            step = branching.branch(fed, cache) if branching and cache is not None else engine.prefill(fed)
            firsts = [len(one.ids) - shared - 1 for one in batch]
            _add(step.logits, ends, firsts, totals, greedy)
            done += sum(len(end.targets) for end in ends)
            if progress:
                progress(done, len(pairs))
    return [(float(total), bool(best)) for total, best in zip(totals, greedy, strict=True)]


def perplexity(
    engine: Engine, windows: np.ndarray, *, batch_size: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Return ``{"ppl", "nll", "tokens"}`` of windows int64 [N, L], as :func:`moedge.convert.scoring.perplexity` does.

    Args:
        engine: any engine.
        windows: each is scored on its own, every token of it but the first.
        batch_size: windows in a forward pass, fewer where their logits would be larger than the limits above.
        progress: called with (windows done, windows in all).

    Raises:
        MoEdgeError: logits that are no numbers, or windows that the engine does not take.
    """
    inputs, targets, nll = windows[:, :-1], windows[:, 1:], 0.0
    rows = _rows_at_most(engine, batch_size)
    size = max(1, min(rows, _tokens_at_most(engine) // inputs.shape[1]))
    for start in range(0, len(windows), size):
        part = slice(start, start + size)
        logits = engine.prefill(inputs[part]).logits
        row, position = (index.reshape(-1) for index in np.indices(logits.shape[:2]))
        nll -= float(_log_probabilities(logits, row, position, targets[part].reshape(-1))[0].sum())
        if progress:
            progress(min(start + size, len(windows)), len(windows))
    return {"ppl": math.exp(nll / targets.size), "nll": nll / targets.size, "tokens": int(targets.size)}


def _rows_at_most(engine: Engine, batch_size: int) -> int:
    return min(batch_size, engine.info.max_batch or batch_size)


def _tokens_at_most(engine: Engine) -> int:
    """Return of how many tokens a call's logits may be."""
    return (CPU_LOGITS_BYTES if engine.info.device == "CPU" else LOGITS_BYTES) // (4 * engine.info.model.vocab_size)


def _contexts(engine: Engine, pairs: Sequence[tuple[Ids, Ids]], *, branching: bool) -> list[_Context]:
    """Sort the pairs by context, and those of a context by what is fed after it; split what is not read together."""
    longest, boundary = engine.info.model.longest, engine.info.model.rope_boundary
    found: dict[Ids, dict[Ids, _End]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise MoEdgeError("A context and its continuation must have a token at least, for one to be predicted.")
        if longest is not None and len(continuation) > longest:
            raise MoEdgeError(
                f"A continuation has {len(continuation)} tokens, more than the {longest} that this engine takes."
            )
        # The last token is predicted and not fed, so one more fits.
        whole = (*context, *continuation)[-(longest + 1) :] if longest is not None else (*context, *continuation)
        ends = found.setdefault(whole[: -len(continuation)], {})
        end = ends.setdefault(continuation[:-1], _End(continuation[:-1]))
        end.targets.append((number, continuation))
    contexts = []
    for ids, ends in found.items():
        one = _Context(ids, sorted(ends.values(), key=lambda end: len(end.fed)))
        # Beyond longrope's boundary the longest row of a batch decides how the others are read.
        alone = boundary is not None and one.longest > boundary
        split = alone or not branching or not one.shared
        contexts += [_Context(ids, [end], alone) for end in one.ends] if split else [one]
    return contexts


def _batches(contexts: Sequence[_Context], single: int, several: int, tokens: int) -> Iterator[list[_Context]]:
    """Cut contexts into batches of as many ends each and of about one length, the longest first.

    Args:
        contexts: to be cut.
        single: most contexts of a batch that have one end each; ``several``: that have more.
        tokens: most tokens of a batch.
    """
    batch: list[_Context] = []
    for one in sorted(contexts, key=lambda one: (one.alone, len(one.ends), len(one.ids)), reverse=True):
        longest = max(each.longest for each in (*batch, one))
        rows = single if len(one.ends) == 1 else several
        full = len(batch) == rows or (len(batch) + 1) * longest > tokens
        if batch and (full or not _fit(batch[0], one)):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _fit(longest: _Context, other: _Context) -> bool:
    """Whether two contexts, of which none is longer than the first, may be in a batch."""
    if longest.alone or other.alone or len(longest.ends) != len(other.ends):
        return False
    return len(other.ends) == 1 or len(other.ids) >= _ALIKE * len(longest.ids)


def _filled(rows: Sequence[Ids]) -> np.ndarray:
    """Rows as int64 [B, S], shorter ones filled up on the right with token 0."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, given in zip(ids, rows, strict=True):
        row[: len(given)] = given
    return ids


def _add(
    logits: np.ndarray, ends: Sequence[_End], firsts: Sequence[int], totals: np.ndarray, greedy: np.ndarray
) -> None:
    """Add what logits [B, S, V] say of every continuation; in row b the first token is predicted at ``firsts[b]``."""
    every = [(row, *target) for row, end in enumerate(ends) for target in end.targets]
    lengths = [len(continuation) for _, _, continuation in every]
    rows, numbers = (np.repeat([one[i] for one in every], lengths) for i in (0, 1))
    positions = np.concatenate([firsts[row] + np.arange(len(continuation)) for row, _, continuation in every])
    tokens = np.concatenate([continuation for _, _, continuation in every])
    values, best = _log_probabilities(logits, rows, positions, tokens)
    np.add.at(totals, numbers, values)
    np.logical_and.at(greedy, numbers, best)


def _log_probabilities(
    logits: np.ndarray, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p float64 [N] of ``tokens`` [N] at logits[rows, positions], and whether each is the likeliest.

    Raises:
        MoEdgeError: one of these is no number.
    """
    values, best = np.empty(len(tokens)), np.empty(len(tokens), dtype=bool)
    for start in range(0, len(tokens), _CHUNK):
        part = slice(start, start + _CHUNK)
        scores, wanted = logits[rows[part], positions[part]], tokens[part]
        own = np.take_along_axis(scores, wanted[:, None], 1)[:, 0].astype(np.float64)
        top = scores.max(1, keepdims=True)
        best[part] = scores.argmax(1) == wanted
        np.exp(np.subtract(scores, top, out=scores), out=scores)
        values[part] = own - top[:, 0] - np.log(scores.sum(1, dtype=np.float64))
    if not np.isfinite(values).all():
        raise MoEdgeError("The engine returned NaN or infinite logits; run `moedge verify` on this model.")
    return values, best
