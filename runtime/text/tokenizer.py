"""Text <-> token ids of a bundle or checkpoint folder, without transformers.

Reads ``tokenizer.json`` (tokenizers) and ``tokenizer_config.json``; chat templates are in
:mod:`moedge.runtime.text.chat_template`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moedge import MoEdgeError
from moedge._files import read_json
from moedge.runtime.run.run_folder import bundles_below
from moedge.runtime.text import chat_template
from moedge.runtime.text.chat_template import ChatTemplate, Message

__all__ = ["Message", "StopStrings", "TextStream", "Tokenizer", "open_tokenizer"]


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """Open the tokenizer of anything that an engine opens: bundle, engine folder, checkpoint or dense model.

    A bundle's ``tokenizer.json`` is complete. A model folder's need not be: transformers changes what it reads there by
    the class that tokenizer_config.json names, or makes it of other files. So it is asked first, where it is installed.

    Raises:
        MoEdgeError: no tokenizer there, or one that cannot be read.
    """
    folder = Path(folder)
    if (folder / "manifest.json").is_file() or not (folder / "config.json").is_file():
        return Tokenizer(folder)
    try:
        from moedge.convert.sources import tokenizer_files
    except ModuleNotFoundError:  # a device has no transformers
        return Tokenizer(folder)
    with tempfile.TemporaryDirectory() as complete:
        tokenizer_files.save(tokenizer_files.load(folder), Path(complete))
        return Tokenizer(complete, of=folder)


class Tokenizer:
    """Text <-> token ids for one folder with a complete ``tokenizer.json``; see :func:`open_tokenizer`.

    Args:
        folder: holds the files.
        of: the model's folder, for messages, where that is another one.

    Raises:
        MoEdgeError: ``tokenizer.json`` is missing or cannot be read.
    """

    def __init__(self, folder: str | Path, of: Path | None = None) -> None:
        files = Path(folder)
        self._folder = of or files
        if not files.is_dir():
            raise MoEdgeError(f"{folder} does not exist; give a run folder, a bundle or a checkpoint.")
        path = files / "tokenizer.json"
        if not path.is_file():
            raise MoEdgeError(f"No tokenizer in {folder}: tokenizer.json is missing.{bundles_below(files)}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise MoEdgeError(f"{path} cannot be read: {error}") from error
        # A saved truncation or padding setting would silently cut the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(files / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # otherwise the older file is not read, as in transformers
            config |= _json(files / "special_tokens_map.json")
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        self._special_tokens = dict(_special_tokens(config))
        # transformers leaves the text of a BPE model alone, whatever the file says.
        self.tidies = config.get("clean_up_tokenization_spaces") is True and (
            not isinstance(self._tokenizer.model, tokenizers.models.BPE)
            or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
        )
        self.byte_fallback = bool(getattr(self._tokenizer.model, "byte_fallback", False))
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {token: found.content for token, found in added.items() if found.special}
        self._templates = chat_template.find(files, config)
        self._template: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end-of-text token, if it names one."""
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the tokenizer's begin-of-text token, if it names one."""
        return self._special_id("bos_token")

    def _special_id(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return self._tokenizer.token_to_id(text) if text else None

    def special_text(self, token: int) -> str:
        """Text of a special token, which decoding leaves out; empty for any other token."""
        return self._specials.get(token, "")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``; special tokens (BOS) as the tokenizer's own post-processor adds them.

        Raises:
            MoEdgeError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MoEdgeError(
                f"The text holds a lone surrogate (character {error.start + 1}), which is no character; decode it as "
                "UTF-8 before it is given."
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not valid UTF-8 become U+FFFD."""
        text = self.decode_as_it_is(ids, skip_special_tokens=skip_special_tokens)
        return _tidied(text) if self.tidies else text

    def decode_as_it_is(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """:meth:`decode` before spaces are tidied up (``tidies``: WordPiece and Unigram models may ask for it)."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text for ``messages``; encode it with ``add_special_tokens=False``.

        Raises:
            MoEdgeError: the model has no chat template, or the template refuses the messages.
        """
        if self._templates is None:
            raise MoEdgeError(f"The model in {self._folder} has no chat template; give a plain prompt instead.")
        if self._template is None:
            source = chat_template.default(self._templates, self._folder)
            self._template = ChatTemplate(source, self._special_tokens, self._folder)
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def stream(self) -> TextStream:
        """Return a new incremental decoder."""
        return TextStream(self)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "copy it again from the model's source") if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the named special tokens of tokenizer_config.json: those of every tokenizer, and a model's own."""
    extra = config.get("model_specific_special_tokens")
    for name, value in {**config, **(extra if isinstance(extra, dict) else {})}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (name.endswith("_token") or (isinstance(extra, dict) and name in extra)):
            yield name, text


_LOST_SPACES = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
_LATER = 3 * len(_LOST_SPACES)
"""Characters at the end of a text whose form may depend on what follows: each rule looks at most 3 ahead."""


def _tidied(text: str) -> str:
    """Take the spaces away that tokenizers without spaces of their own put before marks, rule by rule."""
    for spaced, mark in _LOST_SPACES:
        text = text.replace(spaced, mark)
    return text


class TextStream:
    """Turn ids into text as they come, never showing half a character.

    A character may span tokens, and a token's text may depend on the one before it (a leading space). So each step
    decodes a short window of the last ids, and shows what was not shown before. U+FFFD at the end of the window may be
    the first bytes of a character, so it waits. A character has at most three bytes before its last one, so after three
    tokens without a whole one it is no character. Until then all of them wait: where every byte is a token (byte
    fallback: Llama 2, Mistral, Gemma, Phi-3), an unfinished character turns the whole ones before it into U+FFFD, too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of the window
        self._whole = 0  # ids before this one are shown completely
        self._shown = 0  # characters of the window that have been shown
        self._text, self._given = (
            "",
            0,
        )  # where spaces are tidied up: all text before that, and how much was shown

    def push(self, token: int) -> str:
        """Add one id and return the new text, empty while a character is incomplete."""
        self._ids.append(token)
        return self._emit(final=False)

    def finish(self) -> str:
        """Return what is left; an incomplete character becomes U+FFFD."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        decode = self._tokenizer.decode_as_it_is
        text = decode(self._ids[self._start :])
        waiting = 0 if final else len(text) - len(text.rstrip("\ufffd"))
        pending = self._ids[self._whole :]
        if waiting and self._tokenizer.byte_fallback and decode(pending).count("\ufffd") < len(pending):
            waiting = 0  # bytes of an unfinished character are one U+FFFD each: this one is written in the text
        if len(pending) > 3:
            waiting = min(3, waiting)
        end = max(self._shown, len(text) - waiting)
        new, self._shown = text[self._shown : end], end
        if not waiting:
            last, self._whole = self._whole, len(self._ids)
            shown = decode(self._ids[last:])
            if shown:  # a window must not begin with tokens without text: a decoder strips the first text's space
                self._start = last
            self._shown = len(shown) if shown else len(text)
        return self._tidy(new, final=final)

    def _tidy(self, new: str, *, final: bool) -> str:
        if not self._tokenizer.tidies:
            return new
        self._text += new
        text = _tidied(self._text)
        end = len(text) if final else max(self._given, len(text) - _LATER)
        piece, self._given = text[self._given : end], end
        return piece


class StopStrings:
    """Cut a stream at the first stop string, and hold back text that may become one.

    Hidden text (of special tokens) takes part in stop strings, as in transformers, and is never shown.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._hidden: list[bool] = []  # by character of what is held
        self.hit: str | None = None

    def push(self, text: str, *, hidden: bool = False) -> str:
        """Add text and return what is safe to show. After a hit everything is dropped."""
        if self.hit is not None:
            return ""
        self._held += text
        self._hidden += [hidden] * len(text)
        held = self._held
        found = min(((held.index(stop), stop) for stop in self._stops if stop in held), default=None)
        if found is not None:
            self.hit = found[1]
            shown = self._taken(found[0])
            self._held, self._hidden = "", []
            return shown
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        return self._taken(len(held) - keep)

    def finish(self) -> str:
        """Return what was held back: no stop string will come any more."""
        return self._taken(len(self._held))

    def _taken(self, count: int) -> str:
        """Take so many characters from what is held, and return those that are shown."""
        shown = "".join(char for char, hidden in zip(self._held[:count], self._hidden, strict=False) if not hidden)
        self._held, self._hidden = self._held[count:], self._hidden[count:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
