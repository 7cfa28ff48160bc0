"""What a user's file or settings get wrong, in sentences: where, what is wrong, what is allowed.

Recipes, studies, device profiles, tolerances, training settings and the parameters of methods are pydantic models.
:func:`checked` makes one of them or refuses it; :func:`sentences` is the one translator of pydantic's errors.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Tag, ValidationError

from moedge import MoEdgeError

Model = TypeVar("Model", bound=BaseModel)

_KINDS = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


def checked(
    root: type[Model], value: Mapping[str, Any], *, where: str = "", called: Callable[[str], str] = str
) -> Model:
    """Return ``value`` as ``root``.

    Args:
        root: what it shall be.
        value: keys and values, as a file or a command gives them.
        where: starts each sentence of a refusal, such as the file's path.
        called: turns the dotted path of a key into what the user calls it; see :func:`sentences`.

    Raises:
        MoEdgeError: an unknown or missing key, a wrong type or an impossible value; one line for each of them.
    """
    try:
        return root.model_validate(value)
    except ValidationError as error:
        start = f"{where}: " if where else ""
        raise MoEdgeError("\n".join(start + line for line in sentences(error, root, called=called))) from None


def sentences(error: ValidationError, root: type[BaseModel], *, called: Callable[[str], str] = str) -> list[str]:
    """Return ``dotted.path: one sentence.`` for each problem of a pydantic error.

    Args:
        error: what validating a value as ``root`` raised.
        root: the model, which knows the keys that are allowed where an unknown one is.
        called: turns a dotted path into what the user calls it, for example an option of a command.
    """
    return [line for entry in error.errors(include_url=False) for line in _lines(entry, root, called)]


def name_of(value: Any) -> str:
    """Say in words what kind of YAML value this is."""
    return "nothing" if value is None else _KINDS.get(type(value), type(value).__name__)


def nearest(name: str, known: list[str]) -> str:
    """Return `` (nearest: x)``, the known name that ``name`` may have been meant for, or an empty text."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (nearest: {found[0]})" if found else ""


def matching(pattern: str, words: str) -> AfterValidator:
    """Return a check of text by a regular expression; ``words`` end the sentence "'x' is not ..."."""

    def check(value: str) -> str:
        if not re.search(pattern, value):
            raise ValueError(f"{value!r} is not {words}.")
        return value

    return AfterValidator(check)


# --- one problem ----------------------------------------------------------------------------------------------------

_WANTED = {
    "bool": "true or false",
    "dict": "a mapping of keys",
    "finite_number": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "int_from_float": "a whole number",
    "list": "a list",
    "model": "a mapping of keys",
    "model_attributes": "a mapping of keys",
    "string": "text",
    "tuple": "a list",
}
"""Types of pydantic's errors, without ``_type`` and ``_parsing``."""

_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _lines(entry: Any, root: type[BaseModel], called: Callable[[str], str]) -> list[str]:
    keys, here = _follow(root, entry["loc"])
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    if entry["type"] == "value_error":
        return _own_words(str(entry["ctx"]["error"]).split("\n"), path, here, called)
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        # A union is chosen from by a key of the mapping; pydantic writes a key 'k', a function k().
        path = f"{path}.{entry['ctx']['discriminator'].strip(chr(39)).removesuffix('()')}"
    said = _unknown(entry, root) if entry["type"] == "extra_forbidden" else _said(entry)
    return [f"{called(path)}: {said}." if path else f"{said[0].upper()}{said[1:]}."]


def _own_words(lines: list[str], path: str, here: Any, called: Callable[[str], str]) -> list[str]:
    """What a check of this project said; one of a whole section starts with the key that it is about."""
    found = []
    for line in (line.rstrip(".") + "." for line in lines):
        key, colon, said = line.partition(": ")
        if path and colon and key in _fields(here):
            found.append(f"{called(f'{path}.{key}')}: {said}")
        else:
            found.append(f"{called(path)}: {line}" if path else line)
    return found


def _unknown(entry: Any, root: type[BaseModel]) -> str:
    known = list(_fields(_follow(root, entry["loc"][:-1])[1]))
    listed = f"; known keys here: {', '.join(known)}" if known else ""
    return f"unknown key{listed}{nearest(str(entry['loc'][-1]), known)}"


def _said(entry: Any) -> str:
    """The sentence about one value, without its path and full stop."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    got = f"got {name_of(value)}" if isinstance(value, list | dict) or value is None else f"got {value!r}"
    plain = kind.removesuffix("_type").removesuffix("_parsing")
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        return f"unknown value {value!r}; choose {context['expected']}"
    if kind == "union_tag_invalid":
        known = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        return f"unknown value {context['tag']!r}; choose {', '.join(known)}{nearest(str(context['tag']), known)}"
    if plain in _WANTED:
        return f"must be {_WANTED[plain]}, {got}{' (text)' if isinstance(value, str) else ''}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return f"must be {words} {f'{bound:g}' if isinstance(bound, float) else bound}, {got}"
    if kind == "too_short" and context["min_length"] == 1:
        return "must not be empty"
    if kind in ("too_short", "too_long"):
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"must have {limit} entries, got {len(value)}"
    if kind == "string_too_short":
        return "must not be empty text"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters, got {len(value)}"
    return f"{entry['msg']} ({got})"


# --- where it is ----------------------------------------------------------------------------------------------------


def _fields(kind: Any) -> dict[str, Any]:
    """Name in a file -> annotation, of a model; empty for anything else."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return {}
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}


def _follow(root: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[str | int], Any]:
    """Return the keys of a location, without what pydantic adds to it, and the type that is expected there."""
    kind: Any = root
    keys: list[str | int] = []
    for part in location:
        kind = _bare(kind)
        if get_origin(kind) in (Union, types.UnionType):  # the part names the member, not a key
            kind = _member(kind, str(part))
        elif part != "[key]":
            keys.append(part)
            kind = _below(kind, part)
    return keys, _bare(kind)


def _bare(kind: Any) -> Any:
    """The type without ``Annotated`` and, when nothing else is left, without ``| None``."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else kind
    return kind


def _member(union: Any, name: str) -> Any:
    """The member that a part of a location names: by its tag, else by its class."""
    for member in get_args(union):
        tags = [mark.tag for mark in getattr(member, "__metadata__", ()) if isinstance(mark, Tag)]
        if name in (tags or [getattr(_bare(member), "__name__", "")]):
            return member
    return None


def _below(kind: Any, part: str | int) -> Any:
    """The type of a model's field, of a mapping's values or of a list's items."""
    if fields := _fields(kind):
        return fields.get(str(part))
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    if get_origin(kind) is tuple and isinstance(part, int) and Ellipsis not in arguments:
        return arguments[part] if part < len(arguments) else None
    return arguments[0] if arguments else None
