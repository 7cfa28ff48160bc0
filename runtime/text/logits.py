"""What ``generation_config.json`` may ask of the logits, as small functions in numpy.

Each is the rule of transformers' ``LogitsProcessor`` of that name (``transformers/generation/logits_process.py``) for
one sequence. Symbols: ``scores`` float32 [V], the logits of the next token, never changed in place; ``ids`` the tokens
so far, prompt and answer. A token that is ruled out gets minus infinity. Ids outside the vocabulary are skipped: they
cannot come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Processor = Callable[[Sequence[int], np.ndarray], np.ndarray]
"""(ids so far, scores) -> scores."""
NEVER = np.float32(-np.inf)


def _known(ids: Iterable[int], scores: np.ndarray) -> np.ndarray:
    """Ids that are in the vocabulary, each once: int64 [n]."""
    found = np.unique(np.fromiter(ids, dtype=np.int64))
    return found[(found >= 0) & (found < len(scores))]


def suppress(scores: np.ndarray, ids: Iterable[int]) -> np.ndarray:
    """Rule out ``ids`` (``suppress_tokens``, and the ends of text while the text is too short)."""
    changed = scores.copy()
    changed[_known(ids, scores)] = NEVER
    return changed


def penalise(scores: np.ndarray, ids: Iterable[int], penalty: float) -> np.ndarray:
    """Make the tokens ``ids`` less likely, once each: a positive score is divided, a negative one multiplied.

    ``repetition_penalty`` takes all tokens so far; ``encoder_repetition_penalty`` the prompt's, with 1 / penalty.
    """
    changed, seen = scores.copy(), _known(ids, scores)
    changed[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return changed


def no_repeat_ngram(scores: np.ndarray, ids: Sequence[int], text: Sequence[int], size: int) -> np.ndarray:
    """Rule out each token that would make the last ``size`` tokens a run that ``text`` already holds."""
    if len(ids) < size - 1:
        return scores
    last = list(ids[len(ids) - (size - 1) :])
    runs = range(len(text) - size + 1)
    return suppress(scores, [text[at + size - 1] for at in runs if list(text[at : at + size - 1]) == last])


def bias_sequences(scores: np.ndarray, ids: Sequence[int], biases: Sequence[tuple[Sequence[int], float]]) -> np.ndarray:
    """Add a bias to the last token of each sequence whose other tokens end the text so far; minus infinity forbids."""
    changed = scores.copy()
    for sequence, bias in biases:
        before = list(sequence[:-1])
        if 0 <= sequence[-1] < len(scores) and list(ids[len(ids) - len(before) :]) == before:
            changed[sequence[-1]] += np.float32(bias)
    return changed


def force(scores: np.ndarray, ids: Iterable[int]) -> np.ndarray:
    """Leave nothing but ``ids``, all alike (``forced_bos_token_id``, ``forced_eos_token_id``)."""
    changed = np.full_like(scores, NEVER)
    changed[_known(ids, scores)] = 0
    return changed


def favour_ends(scores: np.ndarray, ends: Iterable[int], factor: float, steps: int) -> np.ndarray:
    """Raise the ends of text by their size times factor^steps - 1 (``exponential_decay_length_penalty``)."""
    known = _known(ends, scores)
    known, changed = known[np.isfinite(scores[known])], scores.copy()  # what is ruled out stays so
    changed[known] += np.abs(scores[known]) * np.float32(factor**steps - 1)
    return changed


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities float64 [V]."""
    shifted = np.exp(scores.astype(np.float64) - scores.max())
    return np.asarray(shifted / shifted.sum())


def _entropy_terms(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0.0)


def _keep(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, scores, NEVER)


def _keep_or_best(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return _keep(scores, kept | (scores == scores.max()))


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Keep the ``k`` most likely tokens, and those as likely as the last of them."""
    return _keep(scores, scores >= np.sort(scores)[-min(k, len(scores))])


def top_p(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep the smallest set of most likely tokens whose probability reaches ``share``; the first is always kept."""
    order = np.argsort(-scores, kind="stable")
    p = softmax(scores)[order]
    kept = np.zeros(len(scores), dtype=bool)
    # Keep a token while the ones before it have not reached the share.
    kept[order[np.cumsum(p) - p < share]] = True
    kept[order[0]] = True
    return _keep(scores, kept)


def min_p(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep tokens that have at least ``share`` of the most likely one's probability."""
    p = softmax(scores)
    return _keep_or_best(scores, p >= share * p.max())


def top_h(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep the most likely tokens, of 100 at most, while their part of the entropy is within ``share`` of it."""
    order = np.argsort(-scores, kind="stable")[:100]
    terms = _entropy_terms(softmax(scores[order]))
    kept = np.zeros(len(scores), dtype=bool)
    kept[order[np.cumsum(terms) <= share * terms.sum()]] = True
    kept[order[0]] = True
    return _keep(scores, kept)


def typical_p(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep the tokens whose surprise is nearest to the expected one, until their probability reaches ``share``."""
    p = softmax(scores)
    surprise = -np.log(np.where(p > 0, p, np.finfo(np.float64).tiny))
    away = np.where(p > 0, np.abs(surprise - _entropy_terms(p).sum()), np.inf)
    order = np.argsort(away, kind="stable")
    last = min(int((np.cumsum(p[order]) < share).sum()), len(scores) - 1)
    kept = away <= away[order[last]]
    kept[order[0]] = True
    return _keep(scores, kept)


def epsilon_cutoff(scores: np.ndarray, least: float) -> np.ndarray:
    """Keep tokens of at least this probability."""
    return _keep_or_best(scores, softmax(scores) >= least)


def eta_cutoff(scores: np.ndarray, least: float) -> np.ndarray:
    """Keep tokens of at least min(``least``, sqrt(``least``) e^-entropy) probability."""
    p = softmax(scores)
    return _keep_or_best(scores, p >= min(least, np.sqrt(least) * np.exp(-_entropy_terms(p).sum())))


def processors(settings: Mapping[str, Any], prompt: Sequence[int], ends: Iterable[int], budget: int) -> list[Processor]:
    """What ``settings`` ask of the logits, in the order in which transformers' ``generate()`` applies it.

    Args:
        settings: keys of ``generation_config.json`` with checked values; a key that is missing asks for nothing.
        prompt: its token ids.
        ends: ids that end the text.
        budget: tokens that may be made.
    """
    ends = list(ends)
    return [
        *_of_repetition(settings, prompt, ends),
        *_of_length(settings, len(prompt), ends, budget),
        *_of_tokens(settings, len(prompt)),
    ]


def _of_repetition(settings: Mapping[str, Any], prompt: Sequence[int], ends: list[int]) -> Iterator[Processor]:
    """Biases, penalties, and what may not come again or at all; arguments as of :func:`processors`."""
    get = settings.get
    if pairs := get("sequence_bias"):
        last = list({tuple(sequence): bias for sequence, bias in pairs}.items())  # of a sequence that is named twice
        yield lambda ids, scores: bias_sequences(scores, ids, last)
    if get("encoder_repetition_penalty"):
        inverse = 1 / settings["encoder_repetition_penalty"]
        yield lambda _, scores: penalise(scores, prompt, inverse)
    if penalty := get("repetition_penalty"):
        yield lambda ids, scores: penalise(scores, ids, penalty)
    if size := get("no_repeat_ngram_size"):
        yield lambda ids, scores: no_repeat_ngram(scores, ids, ids, size)
    if of_prompt := get("encoder_no_repeat_ngram_size"):
        yield lambda ids, scores: no_repeat_ngram(scores, ids, prompt, of_prompt)
    if words := [(word, -np.inf) for word in get("bad_words_ids") or [] if word not in [[end] for end in ends]]:
        yield lambda ids, scores: bias_sequences(scores, ids, words)


def _of_length(settings: Mapping[str, Any], start: int, ends: list[int], budget: int) -> Iterator[Processor]:
    """What a text of ``start`` tokens begins and ends with, and how long it is."""
    get = settings.get
    # Tokens that there are at least, the prompt included. Where both are given the second one counts.
    least = get("min_length") or 0 if get("min_new_tokens") is None else start + settings["min_new_tokens"]
    yield lambda ids, scores: suppress(scores, ends) if len(ids) < least else scores
    if (first := get("forced_bos_token_id")) is not None:
        yield lambda ids, scores: force(scores, [first]) if len(ids) == 1 else scores
    if (last := get("forced_eos_token_id")) is not None:
        final = [last] if isinstance(last, int) else list(last)
        yield lambda ids, scores: force(scores, final) if len(ids) == start + budget - 1 else scores
    if decay := get("exponential_decay_length_penalty"):
        begin = start + decay[0]
        yield lambda ids, scores: favour_ends(scores, ends, decay[1], len(ids) - begin) if len(ids) > begin else scores


def _of_tokens(settings: Mapping[str, Any], start: int) -> Iterator[Processor]:
    """Tokens that may never come, or not first."""
    get = settings.get
    if never := get("suppress_tokens"):
        yield lambda _, scores: suppress(scores, never)
    if not_first := get("begin_suppress_tokens"):
        at = start + (1 if start == 1 and get("forced_bos_token_id") is not None else 0)
        yield lambda ids, scores: suppress(scores, not_first) if len(ids) == at else scores


def tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Scores less the largest, over the temperature, as float64: none is too small for it, and 0 stays the largest."""
    found: np.ndarray = (scores.astype(np.float64) - scores.max()) / temperature
    return found


WARPERS: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "temperature": tempered,
    "top_h": top_h,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
    "epsilon_cutoff": epsilon_cutoff,
    "eta_cutoff": eta_cutoff,
}
"""What sampling does to the scores after that, in transformers' order."""


def warped(scores: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Scores float32 [V] of which to sample, by the keys of :data:`WARPERS` that ``settings`` hold."""
    for name, warp in WARPERS.items():
        if name in settings:
            scores = warp(scores, settings[name])
    return scores
