"""The vocabulary of a GGUF file gives the ids of the tokenizer that the model was trained with."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf import gguf_tokenizer_mapping

from moedge import MoEdgeError
from moedge.convert import sources
from moedge.convert.sources import gguf_files, gguf_tokenizer

TEXTS = [
    "In 1999 there were 12345 of them, 3.14159 each; 7 of 10.",
    "def f(x):\n    return  x   +\t1\n\n\n        # it's  DON'T we'LL\r\n",
    "na\u00efve cafe\u0301 \u00bd \u0661\u0662\u0663 \u4f60\u597d \u3053\u3093 \u041f\u0440\u0438",
    "\U0001f468\u200d\U0001f469 \u2007\u00a0x\u3000",
    "  leading, trailing   ",
    "\n\n",
    "a/b_c--d==e !!\n",
]
"""Digits, runs of spaces, line ends, contractions, non-ASCII letters and numbers."""
ALPHABET = "ab zZ  019.\n\r\t'sl!/_\u00e9e\u0301\u4f60\u0663\u00bd\u3000\U0001f600\u00a0"


def texts(count: int = 150) -> list[str]:
    rng = random.Random(0)
    return TEXTS + ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A byte-level BPE whose merges cross everything that a pre-tokenizer may part: digits, spaces, punctuation."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(2000) * 2, trainer)
    return made


@pytest.fixture
def read(
    trained: Tokenizer,
    tiny_model: Callable[..., Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    moedge_cache: Path,
) -> Callable[..., tuple[Any, Path]]:
    """Return a function (metadata, family) -> (the tokenizer that AutoTokenizer reads of such a file, its folder)."""

    def make(metadata: dict[str, Any] | None = None, family: str = "llama", **more: Any) -> tuple[Any, Path]:
        state = json.loads(trained.to_str())["model"]
        tokens = sorted(state["vocab"], key=state["vocab"].get)
        keys: dict[str, Any] = {
            "ggml.tokens": tokens,
            "ggml.token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
            "ggml.merges": [" ".join(merge) for merge in state["merges"]],
            "ggml.bos_token_id": 1,
            "ggml.eos_token_id": 2,
            "ggml.padding_token_id": 2,
            "ggml.unknown_token_id": 0,
            **(metadata or {}),
        }
        size = len(keys["ggml.tokens"])
        model = tiny_model(family, **more)
        model.resize_token_embeddings(size, mean_resizing=False)
        facts = {f"tokenizer.{key}": value for key, value in keys.items()}
        general = {key.removeprefix("tokenizer."): facts.pop(key) for key in list(facts) if "general." in key}
        path = write_gguf(tmp_path / "m.gguf", model, {**facts, **general})
        folder = sources.resolve(str(path)).folder
        return sources.load_tokenizer(folder), folder

    return make


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def reference(trained: Tokenizer, pre: Any, *, normalizer: Any = None, whole_words: bool = False) -> Tokenizer:
    """The trained vocabulary behind another pre-tokenizer."""
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    made = Tokenizer(models.BPE(state["vocab"], merges, ignore_merges=whole_words))
    made.pre_tokenizer = pre
    if normalizer:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    return made


def byte_level(*before: Any, use_regex: bool = False) -> Any:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def test_smollm_splits_as_the_original_tokenizer_does(trained: Tokenizer, read: Callable[..., Any]) -> None:
    original = reference(trained, byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True))
    tokenizer, folder = read({"ggml.pre": "smollm", "ggml.add_space_prefix": False, "ggml.add_bos_token": False})
    for text in texts():
        assert plain(tokenizer, text) == original.encode(text).ids, text
        assert tokenizer.decode(plain(tokenizer, text)) == text
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))  # what a bundle reads
    assert [file.encode(text).ids for text in texts()] == [tokenizer(text).input_ids for text in texts()]
    others = reference(trained, byte_level(use_regex=True))
    assert any(others.encode(text).ids != original.encode(text).ids for text in TEXTS)  # the texts tell them apart


def test_gpt_2_splits_as_the_original_tokenizer_does(trained: Tokenizer, read: Callable[..., Any]) -> None:
    original = reference(trained, byte_level(use_regex=True))
    tokenizer, _ = read({"ggml.pre": "gpt-2"})
    assert [plain(tokenizer, text) for text in texts()] == [original.encode(text).ids for text in texts()]


NAMES = sorted(set(gguf_tokenizer.PRE) & set(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_transformers_knows_split_as_it_does(
    name: str, trained: Tokenizer, read: Callable[..., Any]
) -> None:
    regex = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS[name]
    qwen = name in ("qwen2", "deepseek-r1-qwen", "megrez")
    original = reference(
        trained,
        byte_level(pre_tokenizers.Split(Regex(regex), behavior="isolated")),
        normalizer=normalizers.NFC() if qwen else None,  # Qwen2Tokenizer
        whole_words=name in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"),
    )
    tokenizer, _ = read({"ggml.pre": name}, family="qwen2" if qwen else "llama")
    assert [plain(tokenizer, text) for text in texts()] == [original.encode(text).ids for text in texts()]


def test_most_names_were_compared() -> None:
    assert {"llama-bpe", "qwen2", "tekken", "dbrx", "gpt-4o"} <= set(NAMES)
    assert set(gguf_tokenizer.PRE) - set(NAMES) == {
        *("default", "gpt-2", "phi-2", "olmo", "a.x-4.0", "mellum", "smollm", "starcoder", "refact")
    }


def test_a_whole_word_is_its_token_where_llama_3_takes_it(read: Callable[..., Any]) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    keys = {
        "ggml.tokens": [*tokens, "ab", "abc"],
        "ggml.token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 2),
        "ggml.merges": ["a b"],
    }
    assert plain(read({**keys, "ggml.pre": "llama-bpe"})[0], "abc") == [len(tokens) + 1]
    assert plain(read({**keys, "ggml.pre": "gpt-2"})[0], "abc") == [len(tokens), tokens.index("c")]


def test_default_is_the_rule_of_llama_cpp(trained: Tokenizer, read: Callable[..., Any]) -> None:
    """Punctuation, words, numbers, and these in threes, each regex cutting the pieces of the one before."""
    tokenizer, _ = read({"ggml.pre": "default"})
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a+b, 12345 no!  x")]
    assert pieces == ["a", "+", "b", ",", "\u0120", "123", "45", "\u0120no", "!", "\u0120", "\u0120x"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ggml.pre": "somebody-else"}, r"ggml\.pre is 'somebody-else', a pre-tokenizer that MoEdge does not"),
        ({"ggml.pre": None}, r"tokenizer\.ggml\.pre is missing: an early converter"),
        ({"ggml.model": "bert"}, r"tokenizer\.ggml\.model is 'bert'"),
        ({"ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"ggml.merges": ["nobody knows"]}, "its vocabulary makes no tokenizer: .*nobody"),
        ({"ggml.add_space_prefix": True}, "add_space_prefix is true for a byte-level vocabulary"),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": None}, r"is true, but .*bos_token_id is missing"),
        ({"ggml.eos_token_id": 70000}, r"eos_token_id is 70000, but the vocabulary has \d+ tokens"),
        ({"ggml.suppress_tokens": [70000]}, r"suppress_tokens names tokens that are not in the vocabulary"),
        ({"general.sampling.temp": -1.0}, r"general\.sampling\.temp is -1\.0, not a number from 0 on"),
        ({"general.sampling.top_p": 2.0}, r"general\.sampling\.top_p is 2\.0, not a number from 0 to 1"),
        ({"general.sampling.temp": "x"}, r"general\.sampling\.temp is 'x', which it cannot be"),
        ({"general.sampling.temp": float("inf")}, r"general\.sampling\.temp is inf, not a number from 0 on"),
        ({"general.sampling.top_p": 0.0}, r"top_p is 0\.0, which leaves no token"),
        ({"general.sampling.min_p": -0.5}, r"min_p is -0\.5, not a number from 0 to 1"),
        ({"general.sampling.mirostat": 2}, r"general\.sampling\.mirostat is 2, which MoEdge does not apply"),
        ({"general.sampling.xtc_probability": 0.5}, r"xtc_probability is 0\.5, which MoEdge does not apply"),
        ({"general.sampling.sequence": "tk"}, r"general\.sampling\.sequence is 'tk', which MoEdge does not apply"),
        ({"general.sampling.somebody": 1}, r"does not know what general\.sampling\.somebody"),
        (
            {"general.sampling.penalty_repeat": 1.1, "general.sampling.penalty_last_n": 64},
            r"penalty_last_n is 64, and generation_config\.json knows penalties of whole texts only",
        ),
        ({"ggml.pre": "smollm", "chat_template": "{{ bad"}, r"chat template 'default' is no template \(line 1\)"),
        ({"ggml.pre": "smollm", "chat_template.a": "{% x %}"}, "chat template 'a' is no template"),
        ({"chat_template.tool/../../x": "hi"}, r"'chat_template\.tool/\.\./\.\./x' has a name that no file"),
        ({"ggml.add_sep_token": True}, r"add_sep_token is True, which MoEdge does not apply"),
        ({"ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        ({"ggml.precompiled_charsmap": [1, 2]}, r"does not know what tokenizer\.ggml\.precompiled_charsmap"),
        ({"ggml.added_tokens": ["<gone>"]}, r"added_tokens names tokens that are not in the vocabulary"),
    ],
)
def test_a_vocabulary_that_is_not_understood_is_refused(
    keys: dict[str, Any], message: str, read: Callable[..., Any], moedge_cache: Path
) -> None:
    with pytest.raises(MoEdgeError, match=message):
        read(keys)
    assert not list(moedge_cache.rglob("*.safetensors"))


def test_a_token_twice_is_refused(read: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match="has a token twice"):
        read({"ggml.tokens": ["a", "b", "a"], "ggml.token_type": [1, 1, 1]})


def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(read: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match=r"transformers would tokenize with another .* 'gpt-2'"):
        read({"ggml.pre": "gpt-2"}, family="qwen2")


def test_control_and_added_tokens_are_found_whole(trained: Tokenizer, read: Callable[..., Any]) -> None:
    tokenizer, _ = read({"ggml.pre": "smollm"})
    assert plain(tokenizer, "<|im_start|><think>hi<|im_end|>")[:2] == [1, 3]
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "<think>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.unk_token == "<|endoftext|>"


def test_tokens_that_only_fill_rows_are_no_text(read: Callable[..., Any], trained: Tokenizer) -> None:
    state = json.loads(trained.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    size = len(tokens)
    keys = {
        "ggml.tokens": [*tokens, f"[PAD{size}]", "<mine>"],
        "ggml.token_type": [3, 3, 3, 4] + [1] * (size - 4) + [5, 1],
        "ggml.added_tokens": ["<mine>"],
        "ggml.pre": "llama-bpe",
    }
    tokenizer, _ = read(keys)
    assert f"[PAD{size}]" not in tokenizer.get_vocab()
    assert plain(tokenizer, "a<mine>")[-1] == size + 1


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False), (None, None)])
def test_bos_and_eos_are_added_as_the_file_says(bos: bool | None, eos: bool | None, read: Callable[..., Any]) -> None:
    keys = {"ggml.pre": "llama-bpe", "ggml.add_bos_token": bos, "ggml.add_eos_token": eos}
    tokenizer, folder = read(keys)
    text = plain(tokenizer, "hello")
    expected = [1] * (bos is not False) + text + [2] * bool(eos)  # llama-bpe adds BOS unless told otherwise
    assert tokenizer("hello").input_ids == expected
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hello").ids == expected
    assert tokenizer("a", "a").input_ids == 2 * tokenizer("a").input_ids


def test_every_end_the_template_and_the_sampling_are_kept(read: Callable[..., Any]) -> None:
    tokenizer, folder = read(
        {
            "ggml.pre": "smollm",
            "ggml.eot_token_id": 5,
            "ggml.suppress_tokens": [7],
            "chat_template": "{{ messages[0].content }}!",
            "chat_template.tool_use": "tools",
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 20,
        }
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5, 0]  # <|im_end|>, the file's eot, and <|endoftext|> by its name
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (1, 2)
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.5, 20, True)
    assert generation["suppress_tokens"] == [7]
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hi!"
    assert tokenizer.apply_chat_template(message, tokenize=False, chat_template="tool_use") == "tools"


@pytest.mark.parametrize(
    ("advice", "expected"),
    [
        ({"temp": 0.0, "top_k": 40}, {"do_sample": False}),  # greedy in llama.cpp, whatever else is cut off
        ({"penalty_repeat": 1.25}, {"repetition_penalty": 1.25}),  # no word of sampling
        ({"temp": 0.0, "penalty_repeat": 1.25}, {"repetition_penalty": 1.25, "do_sample": False}),
        ({"penalty_repeat": 1.25, "penalty_last_n": 0}, {}),  # llama.cpp's way to switch it off
        ({"temp": 0.5, "top_k": -1, "mirostat": 0}, {"temperature": 0.5, "top_k": 0, "do_sample": True}),
    ],
)
def test_sampling_means_what_llama_cpp_does_with_it(
    advice: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    facts = {f"general.sampling.{key}": value for key, value in advice.items()}
    keys = gguf_files.Keys(gguf_files.GGUF(tmp_path / "m.gguf", facts, {}, "llama"), "general.sampling.")
    assert gguf_tokenizer._sampling(keys) == expected
    GenerationConfig(**expected).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: value for key, value in kept.items() if key in expected or key == "do_sample"} == expected


# --- SentencePiece ---------------------------------------------------------------------------------------------------

WORDS = [
    "\u2581",
    *"abcdehlmnorstuw.!",
    "he",
    "\u2581he",
    "ll",
    "llo",
    "\u2581hello",
    "\u2581w",
    "or",
    "\u2581wor",
    "ld",
]
WORDS += ["\u2581\u2581", "\u2581\u2581\u2581", "\u00e9", "n\u00e9", "th", "\u2581th", "\u2581the", "st"]
SPM = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "<|user|>", "<extra>"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * len(WORDS), 3, 4]


def spm_keys(**more: Any) -> dict[str, Any]:
    rng = random.Random(1)
    scores = [-float(i) for i in range(len(WORDS))]
    rng.shuffle(scores)
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": SPM,
        "ggml.token_type": KINDS,
        "ggml.scores": [0.0] * 259 + scores + [-1000.0, -1000.0],
        "ggml.merges": None,
        "ggml.padding_token_id": None,
        **more,
    }


def llama_cpp(text: str, scores: list[float], prefix: bool) -> list[int]:
    """llama.cpp's SentencePiece: the neighbours whose union has the best score are joined, the leftmost of equals."""
    ids = {token: i for i, token in enumerate(SPM)}
    pieces = list(("\u2581" if prefix and text else "") + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_is_read_as_llama_cpp_reads_it(prefix: bool, read: Callable[..., Any]) -> None:
    keys = spm_keys(**{"ggml.add_space_prefix": prefix})
    tokenizer, folder = read(keys)
    rng = random.Random(2)
    samples = ["hello world", "  the  world", "n\u00e9 \u4f60 x\n", "\U0001f600", " ", "hello\t he"]
    samples += ["".join(rng.choices("helo wrdthen \u00e9\u4f60\n", k=rng.randrange(1, 24))) for _ in range(200)]
    for text in samples:
        assert plain(tokenizer, text) == llama_cpp(text, keys["ggml.scores"], prefix), text
        assert tokenizer.decode(plain(tokenizer, text)) == text
    bos = [1]  # a SentencePiece vocabulary adds BOS unless told otherwise
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer("hello").input_ids == file.encode("hello").ids == bos + plain(tokenizer, "hello")


def test_text_behind_a_special_token_gets_its_space_too(read: Callable[..., Any]) -> None:
    keys = spm_keys()
    tokenizer, _ = read(keys)
    user, extra = SPM.index("<|user|>"), SPM.index("<extra>")
    hello = llama_cpp("hello", keys["ggml.scores"], True)
    assert plain(tokenizer, "<|user|>hello<extra>hello</s>") == [user, *hello, extra, *hello, 2]


def test_special_tokens_of_phi_3_swallow_the_space_behind_them(read: Callable[..., Any]) -> None:
    keys = spm_keys()
    llama, _ = read(keys)
    phi3, _ = read(keys, family="phi3")
    hello = llama_cpp("hello", keys["ggml.scores"], True)
    assert plain(phi3, "<|user|>  hello") == [SPM.index("<|user|>"), *hello]
    assert plain(phi3, "<s>  hello") == plain(llama, "<s>  hello") != [1, *hello]


def test_gemma_merges_in_the_order_of_its_ids(read: Callable[..., Any]) -> None:
    """Gemma's scores are no order of merges; runs of spaces are tokens of their own, spelled with spaces."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "  ",
        "\u2581",
        *"abc",
        "bc",
        "ab",
    ]
    keys = {
        **spm_keys(),
        "ggml.tokens": tokens,
        "ggml.token_type": [3, 3, 3, 2, *[6] * 256, 4, *[1] * 6],
        "ggml.scores": [float(i) for i in range(len(tokens))],  # by these, "ab" were first
        "ggml.unknown_token_id": 3,
        "ggml.add_space_prefix": False,
    }
    tokenizer, _ = read(keys, family="gemma2")
    ids = {token: i for i, token in enumerate(tokens)}
    assert plain(tokenizer, "abc") == [ids["a"], ids["bc"]]
    assert plain(tokenizer, "a  b") == [ids["a"], ids["  "], ids["b"]]
    assert tokenizer.decode(plain(tokenizer, "a  b c")) == "a  b c"


def test_scores_that_are_missing_are_named(read: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match=r"tokenizer\.ggml\.scores does not hold a score for every token"):
        read(spm_keys(**{"ggml.scores": None}))
