"""Generate text with any engine: greedy or sampled, streamed, stopped by ids, strings or length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.engines import Engine
from moedge.runtime.text import Message, StopStrings, Tokenizer


@dataclass(frozen=True)
class GenerationResult:
    """``text`` without the prompt; ``ids`` as generated, an end-of-text id included when it ended the text."""

    text: str
    ids: list[int]
    prompt_tokens: int
    finish_reason: Literal["eos", "stop", "length"]
    ttft_s: float
    """Prefill and choice of the first token, in seconds."""
    decode_tokens_per_s: float | None
    """Tokens after the first per second, None when there are none."""


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Iterable[str] = (),
    on_text: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue a prompt or answer a chat.

    Args:
        engine: any engine.
        tokenizer: of the same model.
        prompt: text, or chat messages (``role``, ``content``) for the model's chat template.
        max_new_tokens: at most this many tokens; fewer when the model's context ends before (reason ``length``).
        temperature: 0 is greedy (ties to the lower id).
        top_p: sample from the smallest set of tokens whose probability reaches this much, 0 < top_p <= 1.
        seed: of the sampling; equal seeds give equal text on one engine.
        stop: strings that end the text; they are not part of it.
        on_text: called with each new piece of text: whole characters, nothing that is later taken back.

    Raises:
        MoEdgeError: an impossible setting, an empty or too long prompt, or no chat template for messages.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise MoEdgeError("Generation needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1.")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = tokenizer.encode(tokenizer.apply_chat_template(prompt), add_special_tokens=False)
    if not ids:
        raise MoEdgeError("The prompt is empty; give at least one character.")
    room = int(engine.info.model.get("max_length") or engine.info.model["max_position_embeddings"]) - len(ids)
    if room < 0:
        raise MoEdgeError(f"The prompt has {len(ids)} tokens, {-room} more than this model can hold; shorten it.")
    # The last token chosen is never fed back, so one more fits than there is room for.
    budget = min(max_new_tokens, room + 1)
    ends = set(engine.info.model.get("eos_token_ids") or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)

    generator = np.random.default_rng(seed)
    stream, stops = tokenizer.stream(), StopStrings(stop)
    pieces: list[str] = []

    def show(text: str) -> None:
        if text:
            pieces.append(text)
            if on_text:
                on_text(text)

    start = time.perf_counter()
    step = engine.prefill(np.array([ids], dtype=np.int64))
    made: list[int] = []
    reason: Literal["eos", "stop", "length"] = "length"
    first = 0.0
    while True:
        token = choose(step.logits[0, -1], temperature, top_p, generator)
        made.append(token)
        if len(made) == 1:
            first = time.perf_counter() - start
        if token in ends:
            reason = "eos"
            break
        show(stops.push(stream.push(token)))
        if stops.hit is not None:
            reason = "stop"
            break
        if len(made) == budget:
            break
        step = engine.decode(np.array([[token]], dtype=np.int64), step.cache)
    spent = time.perf_counter() - start - first
    show(stops.push(stream.finish()))
    if stops.hit is not None:
        reason = "stop"
    show(stops.finish())
    rate = (len(made) - 1) / spent if len(made) > 1 and spent > 0 else None
    return GenerationResult("".join(pieces), made, len(ids), reason, first, rate)


def choose(logits: np.ndarray, temperature: float, top_p: float, generator: np.random.Generator) -> int:
    """Choose the next token id from ``logits`` float32 [V].

    Raises:
        MoEdgeError: the logits are not finite (the engine is broken; text from it would be noise).
    """
    if not np.isfinite(logits).all():
        raise MoEdgeError("The engine returned NaN or infinite logits; run `moedge verify` on this model.")
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        # Keep a token while the ones before it have not reached top_p: the first is always kept.
        kept = order[np.cumsum(probabilities[order]) - probabilities[order] < top_p]
        return int(generator.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
    return int(generator.choice(len(probabilities), p=probabilities))
