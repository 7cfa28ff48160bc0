"""The vocabulary of a GGUF file as a tokenizer of the ``tokenizers`` library, with special tokens and chat template.

Two kinds of vocabulary belong to the families we convert: ``gpt2`` (byte-level BPE; ``tokenizer.ggml.pre`` names how
text is split before the merges) and ``llama`` (SentencePiece's BPE, whose merges follow from the scores). Every key
``tokenizer.*`` is applied, listed as one that changes nothing, or refused by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.convert.errors import first_sentence, translated
from moedge.convert.sources.gguf_files import GGUF, Keys

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of ``tokenizer.ggml.token_type``."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_HEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_HEAD}*{_TAIL}+|{_HEAD}+{_TAIL}*" + r"|\p{N}" + _SLASH
_GPT4O = f"{_HEAD}*{_TAIL}+{_CASES}?|{_HEAD}+{_TAIL}*{_CASES}?" + r"|\p{N}{1,3}" + _SLASH


@dataclass(frozen=True)
class Pre:
    """What a name in ``tokenizer.ggml.pre`` means."""

    splits: tuple[str, ...]
    """Regular expressions; each cuts the pieces of the one before into matches and what lies between."""
    whole_words: bool = False
    """A piece that is a token is that token, whatever the merges say."""
    bos: bool = False
    """A text begins with BOS unless the file says otherwise."""
    nfc: bool = False
    """Text is normalised to NFC first: the original tokenizer does, llama.cpp does not."""


_DEFAULT = Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_NAMES = {
    _DEFAULT: ("default",),
    Pre((_GPT2,)): ("gpt-2", "phi-2", "olmo", "a.x-4.0", "mellum"),
    Pre((r"\p{N}", _GPT2)): ("smollm", "starcoder", "refact"),
    Pre((_LLAMA3,), whole_words=True, bos=True): ("llama-bpe", "llama3", "llama-v3", "falcon3"),
    Pre((_LLAMA3,)): ("dbrx", "smaug-bpe"),
    Pre((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "megrez"),
    Pre((_TEKKEN,), whole_words=True, bos=True): ("tekken",),
    Pre((_GPT4O,)): ("gpt-4o",),
}
PRE = {name: pre for pre, names in _NAMES.items() for name in names}
"""Pre-tokenizers of the families we convert (llama.cpp, llama-vocab.cpp); another name is refused."""

_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
"""Tokens that llama.cpp takes for control tokens that end a text, whatever the file says of them."""
_IGNORED = (
    "ggml.seperator_token_id",  # names of tokens that are in the vocabulary like any other
    "ggml.cls_token_id",
    "ggml.mask_token_id",
    *(f"ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"ggml.{part}_token_id" for part in ("prefix", "suffix", "middle")),
    "ggml.token_type_count",  # of BERT
    "huggingface.json",  # the same tokenizer once more
    "chat_templates",  # names of the keys chat_template.NAME
)
_ORDERS = ("", "edskypmxt", "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature")
"""Values of ``general.sampling.sequence`` that mean llama.cpp's own order, which holds for a file without the key."""
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Vocabulary:
    """What the keys ``tokenizer.*`` of a file amount to."""

    tokenizer: Tokenizer
    tokens: list[str]
    ids: dict[str, int | None]
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""
    unknown: int | None
    generation: dict[str, Any] = field(default_factory=dict)
    """Entries of generation_config.json."""
    chat_template: str | dict[str, str] | None = None


def build(file: GGUF) -> Vocabulary:
    """Return the tokenizer of a GGUF file.

    Raises:
        MoEdgeError: another kind of vocabulary, an unknown pre-tokenizer or key, or entries that contradict each other.
    """
    keys = Keys(file, "tokenizer.")
    for key in _IGNORED:
        keys.take(key)
    for key in ("ggml.add_sep_token", "ggml.remove_extra_whitespaces"):
        keys.only(key, False)
    tokens, types = _tokens(keys)
    kind = keys.take("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise keys.refuse("ggml.model", f"is {kind!r}; MoEdge reads vocabularies of the kinds gpt2 and llama")
    spm = kind == "llama"
    ids = {name: _id(keys, name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if spm:  # llama.cpp's defaults
        ids |= {name: i for name, i in (("bos", 1), ("eos", 2), ("unknown", 0)) if ids[name] is None}
    pre = _pre(keys, spm)
    adds = [
        name for name in ("bos", "eos") if keys.take(f"ggml.add_{name}_token", pre.bos and name == "bos", kind=bool)
    ]
    prefix = keys.take("ggml.add_space_prefix", spm, kind=bool)
    merges = keys.take("ggml.merges", kind=list)
    scores = keys.take("ggml.scores", kind=list)
    try:
        if spm:
            made = _sentencepiece(file, tokens, types, scores, prefix, ids["unknown"])
        else:
            made = _byte_level(file, tokens, types, merges, prefix, pre)
        _add_tokens(made, file, tokens, types, spm)
        _add_ends(made, keys, tokens, ids, adds)
    except MoEdgeError:
        raise
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise file.refuse(f"its vocabulary makes no tokenizer: {first_sentence(error)}") from error
    special = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    generation = _generation(keys, tokens, types, ids)
    template = _chat_template(keys)
    keys.done()
    return Vocabulary(made, tokens, special, ids["unknown"], generation, template)


def _tokens(keys: Keys) -> tuple[list[str], list[int]]:
    tokens = keys.take("ggml.tokens", kind=list)
    if not tokens:
        raise keys.refuse("ggml.tokens", "is missing: the file has no vocabulary; give one with a tokenizer")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = keys.take("ggml.token_type", [NORMAL] * len(tokens), kind=list)
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise keys.refuse("ggml.tokens", "has a token twice, or not as many types as tokens; download it again")
    types = [CONTROL if token in _ENDS else kind for token, kind in zip(tokens, types, strict=True)]
    added = keys.take("ggml.added_tokens", [], kind=list)
    if not set(added) <= set(tokens):
        raise keys.refuse("ggml.added_tokens", "names tokens that are not in the vocabulary")
    known = set(added)
    return tokens, [
        USER_DEFINED if token in known and kind == NORMAL else kind for token, kind in zip(tokens, types, strict=True)
    ]


def _id(keys: Keys, name: str, size: int) -> int | None:
    found = keys.take(f"ggml.{name}_token_id", kind=int)
    if found is not None and not 0 <= found < size:
        raise keys.refuse(f"ggml.{name}_token_id", f"is {found}, but the vocabulary has {size} tokens")
    return found


def _pre(keys: Keys, spm: bool) -> Pre:
    name = keys.take("ggml.pre", kind=str)
    if spm:  # text is not split; converters write "default"
        return Pre((), bos=True)
    if name is None:
        raise keys.refuse(
            "ggml.pre", "is missing: an early converter left out how text is split into words; convert it again"
        )
    if name not in PRE:
        raise keys.refuse("ggml.pre", f"is {name!r}, a pre-tokenizer that MoEdge does not know ({', '.join(PRE)})")
    return PRE[name]


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token -> id, without what converters fill rows of the embedding with that no token has."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and token == f"[PAD{i}]")
    }


def _byte_level(
    file: GGUF, tokens: list[str], types: list[int], merges: list[str] | None, prefix: bool, pre: Pre
) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if merges is None and any(len(token) > 1 and kind == NORMAL for token, kind in zip(tokens, types, strict=True)):
        raise file.refuse("tokenizer.ggml.merges is missing; without it no text can be cut into tokens.")
    if prefix:
        raise file.refuse("tokenizer.ggml.add_space_prefix is true for a byte-level vocabulary; not supported.")
    pairs = [(merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]) for merge in merges or ()]
    made = Tokenizer(models.BPE(_vocabulary(tokens, types), pairs, ignore_merges=pre.whole_words))
    if pre.nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(
    file: GGUF, tokens: list[str], types: list[int], scores: list[float] | None, prefix: bool, unknown: int | None
) -> Tokenizer:
    """The better score is merged first; Gemma's scores are no order of merges, its ids are."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    if file.architecture.startswith("gemma"):
        scores = [-float(i) for i in range(len(tokens))]
    if scores is None or len(scores) != len(tokens):
        raise file.refuse("tokenizer.ggml.scores does not hold a score for every token; download it again.")
    vocab = _vocabulary(tokens, types)
    whole = {token for token, kind in zip(tokens, types, strict=True) if kind not in (NORMAL, UNUSED)}
    order = {token: scores[i] for token, i in vocab.items()}
    made = Tokenizer(
        models.BPE(
            vocab,
            generate_merges(vocab, order, whole),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
        )
    )
    # Like llama.cpp: every piece of text between special tokens gets the space, also one that begins with a space.
    spaces = normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return made


def _add_tokens(made: Tokenizer, file: GGUF, tokens: list[str], types: list[int], spm: bool) -> None:
    """Tokens that are found whole in a text: control tokens, and those that a user added."""
    from tokenizers import AddedToken

    # Phi-3's tokens swallow the space behind them, all but these (llama.cpp knows them by the model's name).
    strip = spm and file.architecture == "phi3"
    keep = ("<unk>", "<s>", "<|endoftext|>")
    special = (CONTROL, UNKNOWN) if spm else (CONTROL,)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (*special, USER_DEFINED):
            rstrip = strip and token not in keep
            made.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False, rstrip=rstrip)])
    if any(made.token_to_id(token) != i for token, i in _vocabulary(tokens, types).items()):
        raise ValueError("a token has lost its number")


def _add_ends(made: Tokenizer, keys: Keys, tokens: list[str], ids: dict[str, int | None], adds: list[str]) -> None:
    """BOS in front of a text, EOS behind it."""
    from tokenizers import processors

    for name in adds:
        if ids[name] is None:
            raise keys.refuse(f"ggml.add_{name}_token", f"is true, but ggml.{name}_token_id is missing")
    found = {name: (tokens[i], i) for name in adds if (i := ids[name]) is not None}
    if not found:
        return
    bos, eos = ([found[name][0]] if name in found else [] for name in ("bos", "eos"))
    made.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
        special_tokens=list(found.values()),
    )


def _generation(keys: Keys, tokens: list[str], types: list[int], ids: dict[str, int | None]) -> dict[str, Any]:
    """Where a text ends (several tokens may end it) and the sampling that the authors recommend."""
    named = [ids[name] for name in ("eos", "eot", "eom")]
    ends = [i for i, token in enumerate(tokens) if token in _ENDS and types[i] == CONTROL]
    eos = list(dict.fromkeys(i for i in (*named, *ends) if i is not None))
    found: dict[str, Any] = {"eos_token_id": eos} if eos else {}
    found |= {f"{name}_token_id": ids[key] for name, key in (("bos", "bos"), ("pad", "padding"))}
    suppressed = keys.take("ggml.suppress_tokens", kind=list)
    if suppressed:
        if not all(isinstance(i, int) and 0 <= i < len(tokens) for i in suppressed):
            raise keys.refuse("ggml.suppress_tokens", "names tokens that are not in the vocabulary")
        found["suppress_tokens"] = suppressed
    return found | _sampling(Keys(keys.file, "general.sampling."))


def _sampling(keys: Keys) -> dict[str, Any]:
    """``general.sampling.*`` as entries of generation_config.json; what these cannot say is refused."""
    temperature = _up_to(keys, "temp")
    top_k = keys.take("top_k", kind=int)
    top_p, min_p = _up_to(keys, "top_p", 1), _up_to(keys, "min_p", 1)
    if top_p == 0:
        raise keys.refuse("top_p", "is 0.0, which leaves no token; between 0 and 1 it can be anything else")
    penalty, reach = _up_to(keys, "penalty_repeat"), keys.take("penalty_last_n", kind=int)
    if penalty == 0:
        raise keys.refuse("penalty_repeat", "is 0.0, not a number above 0")
    if penalty not in (None, 1) and reach not in (None, 0, -1):
        raise keys.refuse(
            "penalty_last_n", f"is {reach}, and generation_config.json knows penalties of whole texts only"
        )
    for key, needs in (("mirostat", ()), ("xtc_probability", ()), ("sequence", _ORDERS)):
        keys.only(key, 0, *needs)
    for key in ("mirostat_tau", "mirostat_eta", "xtc_threshold"):  # of samplers that are off
        keys.take(key)
    keys.done()
    found = {"repetition_penalty": penalty} if penalty is not None and reach != 0 else {}
    if temperature == 0:  # greedy in llama.cpp: the likeliest token is left whatever the others cut off
        return {**found, "do_sample": False}
    wanted = {
        "temperature": temperature,
        "top_k": None if top_k is None else max(top_k, 0),  # 0: all of them
        "top_p": top_p,
        "min_p": min_p,
    }
    sampled = {entry: value for entry, value in wanted.items() if value is not None}
    return {**found, **sampled, "do_sample": True} if sampled else found


def _up_to(keys: Keys, key: str, high: float = math.inf) -> float | None:
    value = keys.take(key, kind=(int, float))
    if value is None or (math.isfinite(value) and 0 <= value <= high and not isinstance(value, bool)):
        return value
    raise keys.refuse(key, f"is {value!r}, not a number from 0 " + (f"to {high}" if high < math.inf else "on"))


def _chat_template(keys: Keys) -> str | dict[str, str] | None:
    default = keys.take("chat_template", kind=str)
    others = {key: keys.take(key, kind=str) for key in list(keys.left) if key.startswith("chat_template.")}
    for key in others:
        if not _TEMPLATE_NAME.fullmatch(key.partition(".")[2]):  # it becomes the name of a file
            raise keys.refuse(repr(key), "has a name that no file should get; known: letters, digits, _ and -")
    if not others:
        return default
    return {**({"default": default} if default else {}), **{key.split(".", 1)[1]: one for key, one in others.items()}}


def save(file: GGUF, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the tokenizer and generation_config.json beside the config.json in ``folder``.

    Raises:
        MoEdgeError: transformers, which rebuilds the tokenizer of some model types, would read another one from there.
    """
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}
    special = {f"{name}_token": vocabulary.ids[key] for name, key in names.items()} | {"unk_token": vocabulary.unknown}
    made = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary.tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=vocabulary.chat_template,
        **{name: None if i is None else vocabulary.tokens[i] for name, i in special.items()},
    )
    _check_templates(made, file, vocabulary.chat_template)
    with translated(f"{file.path}: its tokenizer cannot be saved"):
        made.save_pretrained(folder)
    try:
        GenerationConfig(**vocabulary.generation).save_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise file.refuse(f"its sampling (general.sampling.*) is not valid: {first_sentence(error)}") from error
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if again(_PROBE)["input_ids"] != vocabulary.tokenizer.encode(_PROBE).ids:
        raise file.refuse(
            f"transformers would tokenize with another pre-tokenizer than tokenizer.ggml.pre = "
            f"{file.metadata.get('tokenizer.ggml.pre')!r}; convert from the Hugging Face folder of this model instead."
        )


def _check_templates(made: PreTrainedTokenizerFast, file: GGUF, templates: str | dict[str, str] | None) -> None:
    """Refuse templates that transformers cannot compile. What one says of a message is no matter here."""
    from jinja2 import TemplateSyntaxError

    for name, source in (templates if isinstance(templates, dict) else {"default": templates}).items():
        try:
            if source is not None:
                made.apply_chat_template([{"role": "user", "content": ""}], chat_template=source, tokenize=False)
        except TemplateSyntaxError as error:
            reason = first_sentence(error)
            raise file.refuse(f"its chat template {name!r} is no template (line {error.lineno}): {reason}") from error
        except Exception:  # it may want another message; templates raise what they like
            continue


_PROBE = "It's 12345 o'clock,  I'LL   go\n\n\tna\u00efve cafe\u0301 \u4f60\u597d \U0001f600 x_y/z//\r\n 3.14 "
"""Text that tells pre-tokenizers apart."""
