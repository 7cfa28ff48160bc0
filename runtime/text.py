"""Tokenizer and chat template of a bundle or checkpoint folder, without transformers.

Reads ``tokenizer.json`` (tokenizers), ``tokenizer_config.json`` and ``chat_template.jinja``. A template comes with the
model, so it is untrusted code: it runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from moedge import MoEdgeError
from moedge.runtime.run_folder import bundles_below

Message = Mapping[str, Any]
"""One chat message: ``role`` (system, user, assistant) and ``content``."""


class Tokenizer:
    """Text <-> token ids for one model folder.

    Raises:
        MoEdgeError: ``tokenizer.json`` is missing or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise MoEdgeError(f"{folder} does not exist; give a run folder, a bundle or a checkpoint.")
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise MoEdgeError(f"No tokenizer in {folder}: tokenizer.json is missing.{bundles_below(self._folder)}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise MoEdgeError(f"{path} cannot be read: {error}") from error
        # A saved truncation or padding setting would silently cut the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self._template = self._chat_template()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end-of-text token, if it names one."""
        text = self._special("eos_token")
        return self._tokenizer.token_to_id(text) if text else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``; special tokens (BOS) as the tokenizer's own post-processor adds them."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not valid UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text for ``messages``; encode it with ``add_special_tokens=False``.

        Raises:
            MoEdgeError: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise MoEdgeError(f"The model in {self._folder} has no chat template; give a plain prompt instead.")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._special("bos_token") or "",
                eos_token=self._special("eos_token") or "",
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise MoEdgeError(f"The chat template in {self._folder} refuses these messages: {error}") from error

    def stream(self) -> TextStream:
        """Return a new incremental decoder."""
        return TextStream(self)

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MoEdgeError(f"{path} is not valid JSON: {error}") from error
        return value if isinstance(value, dict) else {}

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _chat_template(self) -> jinja2.Template | None:
        path = self._folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise MoEdgeError(f"The chat template in {self._folder} cannot be parsed: {error}") from error


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: a marker for training tools that prints its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which changes the prompt.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


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

    def push(self, token: int) -> str:
        """Add one id and return the new text, empty while a character is incomplete."""
        self._ids.append(token)
        return self._emit(final=False)

    def finish(self) -> str:
        """Return what is left; an incomplete character becomes U+FFFD."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        text = self._tokenizer.decode(self._ids[self._start :])
        waiting = 0 if final else len(text) - len(text.rstrip("\ufffd"))
        if len(self._ids) - self._whole > 3:
            waiting = min(3, waiting)
        end = max(self._shown, len(text) - waiting)
        new, self._shown = text[self._shown : end], end
        if not waiting:
            self._start, self._whole = self._whole, len(self._ids)
            self._shown = len(self._tokenizer.decode(self._ids[self._start :]))
        return new


class StopStrings:
    """Cut a stream at the first stop string, and hold back text that may become one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Add text and return what is safe to show. After a hit everything is dropped."""
        if self.hit is not None:
            return ""
        held = self._held + text
        found = min(((held.index(stop), stop) for stop in self._stops if stop in held), default=None)
        if found is not None:
            self.hit, self._held = found[1], ""
            return held[: found[0]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return what was held back: no stop string will come any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
