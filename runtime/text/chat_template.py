"""Chat templates: messages -> prompt text, as transformers' ``apply_chat_template`` renders them, without transformers.

A template comes with the model, so it is untrusted code: it runs in jinja2's immutable sandbox. What it may ask for
(variables, functions, filters) is what transformers 5 gives it, for a template is written and tested against that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from moedge import MoEdgeError

Message = Mapping[str, Any]
"""One chat message: ``role`` (system, user, assistant) and ``content``."""

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which the reasoning of a message is passed, the standard one first."""


class ChatTemplate:
    """The template of one model.

    Args:
        source: jinja2 text.
        special_tokens: bound by name, such as ``bos_token``; one that the tokenizer has not stays undefined.
        where: the model's folder, for messages.

    Raises:
        MoEdgeError: the template cannot be parsed.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path) -> None:
        self._where, self._special = where, dict(special_tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace, dict=_Dict())
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # untrusted code: beside TemplateError, e.g. RecursionError
            raise MoEdgeError(f"The chat template in {where} cannot be parsed: {_line(error)}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text for ``messages``.

        Raises:
            MoEdgeError: no messages, or the template refuses them.
        """
        if not messages:
            raise MoEdgeError("A chat needs at least one message.")
        try:
            return self._template.render(
                messages=[_complete(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except Exception as error:  # untrusted code may raise anything
            raise MoEdgeError(f"The chat template in {self._where} refuses these messages: {_line(error)}") from error


def find(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return a model's chat template, its templates by name if it has several, or None.

    Files count before ``chat_template`` in tokenizer_config.json (``config``), as in transformers.

    Raises:
        MoEdgeError: a template that cannot be read.
    """
    files = {"default": folder / FILE} | {path.stem: path for path in sorted(folder.glob(f"{FOLDER}/*.jinja"))}
    found = {name: _read(path) for name, path in files.items() if path.is_file()}
    if found:
        return found["default"] if list(found) == ["default"] else found
    source = config.get("chat_template")
    if isinstance(source, list):
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in source}
        except (KeyError, TypeError) as error:
            raise MoEdgeError(
                f"{folder / 'tokenizer_config.json'}: chat_template is damaged; download it again."
            ) from error
    return source if isinstance(source, str | dict) else None


def default(found: str | Mapping[str, str], where: Path) -> str:
    """Return the template for a chat without tools.

    Raises:
        MoEdgeError: there are several, and none of them is the default.
    """
    if isinstance(found, str):
        return found
    if "default" not in found:
        raise MoEdgeError(
            f"The model in {where} has the chat templates {', '.join(sorted(found))} and no default one; save that of "
            f"your choice as {FILE} there."
        )
    return found["default"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MoEdgeError(f"The chat template {path} cannot be read: {error}") from error


def _complete(message: Message) -> dict[str, Any]:
    """Leave out what is None (APIs send ``tool_calls: null``), and give reasoning the names that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: a marker for training tools that prints its body, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """``dict`` without what lies behind the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` without private names: they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no place for the private name {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which changes the prompt. Order and defaults are transformers'.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
