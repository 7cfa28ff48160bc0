"""What generation_config.json asks of the logits gives transformers' scores: each rule alone, and all in its order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as theirs

from moedge.runtime.text import logits

VOCAB, ENDS = 40, [2, 7]
random = np.random.default_rng(0)
PROMPT = [5, 9, 5, 9, 11, 5]
TEXT = [*PROMPT, 9, 11, 5, 9]
EOS = torch.tensor(ENDS)

RULES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Any]] = {
    "RepetitionPenalty": (
        lambda s: logits.penalise(s, [*TEXT, 999], 1.3),
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "EncoderRepetitionPenalty": (
        lambda s: logits.penalise(s, PROMPT, 1 / 1.3),
        theirs.EncoderRepetitionPenaltyLogitsProcessor(1.3, torch.tensor([PROMPT])),
    ),
    "NoRepeatNGram 1": (lambda s: logits.no_repeat_ngram(s, TEXT, TEXT, 1), theirs.NoRepeatNGramLogitsProcessor(1)),
    "NoRepeatNGram 3": (lambda s: logits.no_repeat_ngram(s, TEXT, TEXT, 3), theirs.NoRepeatNGramLogitsProcessor(3)),
    "NoRepeatNGram long": (
        lambda s: logits.no_repeat_ngram(s, TEXT, TEXT, 30),
        theirs.NoRepeatNGramLogitsProcessor(30),
    ),
    "EncoderNoRepeatNGram": (
        lambda s: logits.no_repeat_ngram(s, TEXT, PROMPT, 2),
        theirs.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([PROMPT])),
    ),
    "SequenceBias": (
        lambda s: logits.bias_sequences(s, TEXT, [([3], 2.5), ([5, 9, 4], -1.5), ([9, 9, 6], 4.0), ([1] * 30, 9.0)]),
        theirs.SequenceBiasLogitsProcessor([[[3], 2.5], [[5, 9, 4], -1.5], [[9, 9, 6], 4.0], [[1] * 30, 9.0]]),
    ),
    "MinLength": (lambda s: logits.suppress(s, ENDS), theirs.MinLengthLogitsProcessor(99, EOS)),
    "SuppressTokens": (lambda s: logits.suppress(s, [1, 3, 99, -1]), theirs.SuppressTokensLogitsProcessor([1, 3, 99])),
    "ForcedEOS": (lambda s: logits.force(s, ENDS), theirs.ForcedEOSTokenLogitsProcessor(len(TEXT) + 1, EOS)),
    "ExponentialDecay": (
        lambda s: logits.favour_ends(s, ENDS, 1.2, len(TEXT) - len(PROMPT) - 1),
        theirs.ExponentialDecayLengthPenalty((1, 1.2), EOS, len(PROMPT)),
    ),
    "TopK": (lambda s: logits.top_k(s, 5), theirs.TopKLogitsWarper(5)),
    "TopK all": (lambda s: logits.top_k(s, 500), theirs.TopKLogitsWarper(500)),
    "TopP": (lambda s: logits.top_p(s, 0.8), theirs.TopPLogitsWarper(0.8)),
    "TopP none": (lambda s: logits.top_p(s, 0.0), theirs.TopPLogitsWarper(0.0)),
    "MinP": (lambda s: logits.min_p(s, 0.1), theirs.MinPLogitsWarper(0.1)),
    "TopH": (lambda s: logits.top_h(s, 0.5), theirs.TopHLogitsWarper(0.5)),
    "Typical": (lambda s: logits.typical_p(s, 0.6), theirs.TypicalLogitsWarper(0.6)),
    "Epsilon": (lambda s: logits.epsilon_cutoff(s, 0.02), theirs.EpsilonLogitsWarper(0.02)),
    "Epsilon high": (lambda s: logits.epsilon_cutoff(s, 0.99), theirs.EpsilonLogitsWarper(0.99)),
    "Eta": (lambda s: logits.eta_cutoff(s, 0.05), theirs.EtaLogitsWarper(0.05)),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_that_of_transformers(name: str) -> None:
    ours, processor = RULES[name]
    changed = 0
    for ruled_out in (0, 10):
        for _ in range(20):
            scores = random.normal(0, 3, VOCAB).astype(np.float32)
            scores[:ruled_out] = -np.inf  # as an earlier rule leaves them
            before = scores.copy()
            wanted = processor(torch.tensor([TEXT]), torch.from_numpy(scores[None].copy()))[0].numpy()
            got = ours(scores)
            np.testing.assert_allclose(got, wanted, rtol=1e-6)
            np.testing.assert_array_equal(scores, before)
            changed += not np.array_equal(got, scores)
    assert (changed == 0) == (name in ("TopK all", "NoRepeatNGram long")), "a rule that does nothing shows nothing"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=ENDS, pad_token_id=0, initializer_range=1.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def maybe(key: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(st.just({}), values.map(lambda value: {key: value}))


TOKEN = st.integers(0, VOCAB - 1)
TOKENS = st.lists(TOKEN, min_size=1, max_size=3)
MODEL_SETTINGS = {
    "repetition_penalty": st.floats(0.5, 2),
    "encoder_repetition_penalty": st.floats(0.5, 2),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "sequence_bias": st.lists(st.tuples(TOKENS, st.floats(-5, 5)).map(list), min_size=1, max_size=3, unique_by=str),
    # A word that is an end of text is dropped, and transformers refuses a list that is then empty.
    "bad_words_ids": st.lists(TOKENS, max_size=3).map(lambda words: [*words, [3, 4]]),
    "min_length": st.integers(1, 9),
    "min_new_tokens": st.integers(1, 6),
    "forced_bos_token_id": TOKEN,
    "forced_eos_token_id": st.one_of(TOKEN, TOKENS),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(1, 1.5)).map(list),
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
}  # fmt: skip
SAMPLING_SETTINGS = {
    "temperature": st.floats(0.3, 2),
    "top_k": st.integers(1, VOCAB),
    "top_p": st.floats(0.1, 0.95),
    "min_p": st.floats(0.01, 0.5),
    "typical_p": st.floats(0.1, 0.95),
    "epsilon_cutoff": st.floats(0.001, 0.1),
    "eta_cutoff": st.floats(0.001, 0.1),
    "top_h": st.floats(0.1, 0.9),
}


def some(settings: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    parts = [maybe(key, values) for key, values in settings.items()]
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


@hypothesis_settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@given(
    chosen=some(MODEL_SETTINGS),
    sampling=st.one_of(st.none(), some(SAMPLING_SETTINGS)),
    # Not the padding token, whose row of zeros makes all logits alike: the order of ties is nobody's promise.
    prompt=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6),
)
@example(chosen={"sequence_bias": [[[23], 4.5], [[7], 1.0], [[23], -1.0]]}, sampling=None, prompt=[13, 11])
def test_all_rules_come_in_the_order_of_generate(
    chosen: dict[str, Any], sampling: dict[str, Any] | None, prompt: list[int], model: LlamaForCausalLM
) -> None:
    for key in ("forced_bos_token_id", "forced_eos_token_id"):  # forced and suppressed: refused by both
        forced = chosen.get(key, [])
        forced = {forced} if isinstance(forced, int) else set(forced)
        assume(not forced or forced - set(chosen.get("suppress_tokens", ())))
    # Several forced ends are equally likely, and which of them a rule that sorts keeps is nobody's promise.
    several = isinstance(chosen.get("forced_eos_token_id"), list)
    assume(not (several and {"top_p", "top_h", "typical_p"} & set(sampling or {})))
    budget, ids = 6, torch.tensor([prompt])
    sampling = sampling if sampling is None else {"top_k": 50, **sampling}
    torch.manual_seed(0)
    try:
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget, do_sample=sampling is not None,
            output_scores=True, output_logits=True, return_dict_in_generate=True, **chosen, **(sampling or {}),
        )  # fmt: skip
    except RuntimeError:  # every token is ruled out: there is nothing to draw from
        assume(False)
    text = wanted.sequences[0].tolist()
    processors = logits.processors(chosen, prompt, ENDS, budget)
    for step, (raw, scores) in enumerate(zip(wanted.logits, wanted.scores, strict=True)):
        got = raw[0].numpy().astype(np.float32)
        for process in processors:
            got = process(text[: len(prompt) + step], got)
        if sampling is not None:
            got = logits.warped(got, sampling)
        # A constant on all scores changes no probability, and a temperature leaves another one here than there.
        one, two = (each - each.max() if sampling else each for each in (got, scores[0].numpy()))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
