"""Generate text with any engine: greedy or sampled, streamed, stopped by ids, strings or length.

What the model's ``generation_config.json`` asks for is done as transformers' ``generate()`` does it, or named among the
result's notes (:mod:`moedge.configs.generation_config`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moedge import MoEdgeError
from moedge.configs import generation_config
from moedge.configs.generation_config import GenerationConfig, Use
from moedge.runtime.engines import Engine
from moedge.runtime.engines.info import EngineModel
from moedge.runtime.text import logits
from moedge.runtime.text.tokenizer import Message, StopStrings, Tokenizer

Reason = Literal["eos", "stop", "length"]
"""What ended a text."""


@dataclass(frozen=True)
class GenerationResult:
    """``text`` without the prompt; ``ids`` as generated, an end-of-text id included when it ended the text."""

    text: str
    ids: list[int]
    prompt_tokens: int
    finish_reason: Reason
    ttft_s: float
    """Prefill and choice of the first token, in seconds."""
    decode_tokens_per_s: float | None
    """Tokens after the first per second, None when there are none."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was done to the logits: keys of ``generation_config.json``; ``do_sample`` when the text was sampled."""
    notes: tuple[str, ...] = ()
    """Sentences about what the model's files ask for and was not done."""


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | np.ndarray,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Iterable[str] = (),
    generation: GenerationConfig | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue a prompt or answer a chat; the body of :func:`moedge.runtime.api.generate`, whose words these are.

    Args:
        engine: any engine.
        tokenizer: of the same model.
        prompt: and all below but ``generation``: see :func:`moedge.runtime.api.generate`; or token ids int64 [n].
        generation: what to obey instead of the model's own file; ``GenerationConfig()`` for nothing.

    Raises:
        MoEdgeError: an impossible setting, an empty or too long prompt, or no chat template for messages.
    """
    model = engine.info.model
    asked = generation if generation is not None else model.generation
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampled = _samples(sample, drawn)
    if max_new_tokens < 1 or (top_p is not None and not 0 < top_p <= 1):
        raise MoEdgeError("Generation needs max_new_tokens >= 1 and 0 < top_p <= 1.")
    if seed < 0:
        raise MoEdgeError(f"seed is {seed}; it must be a whole number, 0 or more.")
    ids = _encode(tokenizer, prompt)
    budget = _budget(model, len(ids), max_new_tokens)
    ends = _ends(model, None if isinstance(prompt, str | np.ndarray) else tokenizer.eos_token_id)
    settings = asked.of(Use.ALWAYS)
    chooser = _Chooser(settings, asked.sampling(drawn) if sampled else None, ids, ends, budget, seed)
    stops = [[each] if isinstance(each, str) else each for each in (settings.get("stop_strings") or [], stop)]
    shown = _Shown(tokenizer, [text for each in stops for text in each], on_text)
    made, reason, first, spent = _continue(engine, ids, chooser, ends, budget, shown)
    rate = (len(made) - 1) / spent if len(made) > 1 and spent > 0 else None
    notes = tuple(asked.said(sampled=sampled))
    return GenerationResult("".join(shown.pieces), made, len(ids), reason, first, rate, chooser.settings, notes)


def _continue(
    engine: Engine, ids: list[int], chooser: _Chooser, ends: list[int], budget: int, shown: _Shown
) -> tuple[list[int], Reason, float, float]:
    """Decode until something ends the text; returns its ids, what ended it, and the seconds to and after the first."""
    start = time.perf_counter()
    step = engine.prefill(np.array([ids], dtype=np.int64))
    made: list[int] = []
    reason: Reason = "length"
    first = 0.0
    while True:
        token = chooser.choose(step.logits[0, -1], made)
        made.append(token)
        if len(made) == 1:
            first = time.perf_counter() - start
        if token in ends:
            reason = "eos"
            break
        if shown.push(token):
            reason = "stop"
            break
        if len(made) == budget:
            break
        step = engine.decode(np.array([[token]], dtype=np.int64), step.cache)
    spent = time.perf_counter() - start - first
    return made, "stop" if shown.finish() else reason, first, spent


class _Shown:
    """The text as it grows: whole characters, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], on_text: Callable[[str], None] | None) -> None:
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._stream, self._stops, self._on_text = tokenizer.stream(), StopStrings(stop), on_text

    def push(self, token: int) -> bool:
        """Add a token; True when its text completes a stop string, also where decoding leaves it out."""
        self._show(self._stops.push(self._stream.push(token)))
        self._show(self._stops.push(self._tokenizer.special_text(token), hidden=True))
        return self._stops.hit is not None

    def finish(self) -> bool:
        """Show what was held back; True when the text ends at a stop string."""
        self._show(self._stops.push(self._stream.finish()))
        stopped = self._stops.hit is not None
        self._show(self._stops.finish())
        return stopped

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            if self._on_text:
                self._on_text(text)


def _budget(model: EngineModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens are chosen at most; the last one is never fed back, so one more fits than there is room for."""
    room = model.longest - prompt_tokens if model.longest else max_new_tokens
    if room < 0:
        raise MoEdgeError(f"The prompt has {prompt_tokens} tokens, {-room} more than this model can hold; shorten it.")
    return min(max_new_tokens, room + 1)


def _ends(model: EngineModel, of_turn: int | None) -> list[int]:
    """Ids that end the text: the model's, and in a chat the one that closes a turn."""
    return [*model.eos_token_ids, *([] if of_turn is None else [of_turn])]


def _samples(sample: bool, given: dict[str, Any]) -> bool:
    """Whether to sample: asked for, or one of the settings of sampling given."""
    temperature = given["temperature"]
    if temperature is not None and temperature < 0:
        raise MoEdgeError(f"temperature is {temperature}; it must be 0 (greedy) or more.")
    if temperature == 0:
        if sample:
            raise MoEdgeError(
                "temperature 0 is greedy and cannot be asked for together with sampling; give one of them."
            )
        return False
    return sample or any(value is not None for value in given.values())


def _encode(tokenizer: Tokenizer, prompt: str | Sequence[Message] | np.ndarray) -> list[int]:
    ids: list[int]
    if isinstance(prompt, np.ndarray):
        ids = prompt.tolist()
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = tokenizer.encode(tokenizer.apply_chat_template(prompt), add_special_tokens=False)
    if not ids:
        raise MoEdgeError("The prompt is empty; give at least one character.")
    return ids


class _Chooser:
    """Chooses the next token: ``settings`` of the model, and those of ``sampling`` unless it is None (greedy)."""

    def __init__(
        self,
        settings: dict[str, Any],
        sampling: dict[str, Any] | None,
        prompt: list[int],
        ends: list[int],
        budget: int,
        seed: int,
    ) -> None:
        self.settings = settings if sampling is None else {**settings, "do_sample": True, **sampling}
        self._prompt, self._sampling = prompt, sampling
        self._processors = logits.processors(settings, prompt, ends, budget)
        self._generator = np.random.default_rng(seed)

    def choose(self, scores: np.ndarray, made: list[int]) -> int:
        """Return an id by the logits float32 [V] after the prompt and the ids ``made``."""
        if not np.isfinite(scores).all():
            raise MoEdgeError("The engine returned NaN or infinite logits; run `moedge verify` on this model.")
        ids = [*self._prompt, *made]
        for process in self._processors:
            scores = process(ids, scores)
        if scores.max() == logits.NEVER:
            raise MoEdgeError(
                f"The model's {generation_config.FILE} rules out every token here ({', '.join(self.settings)}); "
                "correct the file."
            )
        if self._sampling is None:
            return int(scores.argmax())
        return draw(logits.warped(scores, self._sampling), self._generator)


def draw(scores: np.ndarray, generator: np.random.Generator) -> int:
    """Draw an id by the probabilities of ``scores`` float32 [V]."""
    p = logits.softmax(scores)
    kept = np.flatnonzero(p)
    return int(generator.choice(kept, p=p[kept] / p[kept].sum()))
