"""An engine as a model of lm-eval: PyTorch, bundle or TensorRT, all through the same few calls.

Importing this module imports lm-eval; :mod:`moedge.runtime.accuracy.ask` does so when it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.configs.generation_config import GenerationConfig
from moedge.runtime.accuracy import likelihood
from moedge.runtime.engines import Engine
from moedge.runtime.text.generate import generate
from moedge.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_NEW_TOKENS = 256
"""Of a generated answer where its task names no limit: lm-eval's own default."""


class EngineLM(TemplateLM):
    """An engine and its tokenizer as lm-eval asks for them.

    What is tokenized together, which token stands before a text without context, and how long texts are cut into
    windows are lm-eval's rules, the same as in its own ``HFLM``; the forward passes are
    :mod:`moedge.runtime.accuracy.likelihood`.

    Args:
        engine: opened without ``last_logits``.
        tokenizer: of the same model.
        batch_size: contexts in a forward pass.
        progress: called with (pairs of context and continuation done, pairs in all).
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, batch_size: int = 8, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self._engine, self._tokenizer = engine, tokenizer
        self._batch_size, self._progress = batch_size, progress
        bos = tokenizer.bos_token_id
        self._bos_text = None if bos is None else tokenizer.decode([bos], skip_special_tokens=False)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            MoEdgeError: neither the tokenizer nor the model names one.
        """
        known = [self._tokenizer.eos_token_id, *self._engine.info.model.eos_token_ids]
        found = next((token for token in known if token is not None), None)
        if found is None:
            raise MoEdgeError(f"{self._engine.info.name} names no token that begins or ends a text.")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or what ends a text."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; None: special tokens as the tokenizer adds them, but no second BOS."""
        if add_special_tokens is None:
            add_special_tokens = not (self._bos_text and string.startswith(self._bos_text))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations in nats, and whether each is greedy; without lm-eval's bars."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return likelihood.log_likelihoods(self._engine, pairs, batch_size=self._batch_size, progress=self._progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows as long as the model takes."""
        longest = self._engine.info.model.longest or max(2, *(len(self.tok_encode(one.args[0])) for one in requests))
        windows, owners = [], []
        for number, (text,) in enumerate(one.args for one in requests):
            rolled = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, longest, 1)
            parts = [make_disjoint_window(window) for window in rolled]
            windows += [((text, ""), context, continuation) for context, continuation in parts]
            owners += [number] * len(parts)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, one at a time; what the model's own ``generation_config.json`` asks for is left out.

        A context that leaves no room for the answer is cut on the left, as lm-eval's ``HFLM`` does.

        Raises:
            MoEdgeError: a task that samples its answers, or whose answers may be as long as what the engine holds.
        """
        longest = self._engine.info.model.longest
        texts = []
        for done, (context, settings) in enumerate(one.args for one in requests):
            if settings.get("do_sample", bool(settings.get("temperature"))):
                raise MoEdgeError("This task samples its answers; only greedy ones can be compared.")
            until, most = settings.get("until") or [], int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
            if longest is not None and longest <= most:
                raise MoEdgeError(
                    f"This task's answers may have {most} tokens, and {self._engine.info.name} holds {longest} with "
                    "the question; leave the task out."
                )
            ids = self.tok_encode(context)
            answer = generate(
                self._engine,
                self._tokenizer,
                np.array(ids if longest is None else ids[most - longest :], dtype=np.int64),
                max_new_tokens=most,
                stop=[until] if isinstance(until, str) else until,
                generation=GenerationConfig(),
            )
            texts.append(answer.text)
            if self._progress:
                self._progress(done + 1, len(requests))
        return texts
