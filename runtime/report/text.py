"""How a report writes numbers and names: filters of its templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moedge.runtime.bench.stats import between


def filters() -> dict[str, Callable[..., str]]:
    """Return the filters that every template may use."""
    return {"number": number, "cell": markdown_cell, "within": within, "between": between, "kinds": kinds}


def kinds(result: Mapping[str, Any]) -> str:
    """The types that the engines of a benchmark compute in, and where; each once."""
    infos = (engine["info"] for engine in result["engines"].values())
    return ", ".join(dict.fromkeys(f"{info['dtype']} on {info['device']}" for info in infos))


def number(value: float | None, form: str = "{:.4g}") -> str:
    """The number in a form of ``str.format``, or a dash for None."""
    return "\u2013" if value is None else form.format(value)


def within(found: Mapping[str, Any], form: str = "{:.3f}") -> str:
    """The value of ``{"value", "ci95"}`` and its interval."""
    return f"{form.format(found['value'])} ({between(found['ci95'], form)})"


def markdown_cell(value: Any) -> str:
    """Text that stays inside one Markdown table cell and is not read as Markdown or HTML."""
    text = " ".join(str(value).split())
    for character in "\\`*_[]|~#":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
