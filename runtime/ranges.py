"""The versions of other packages that MoEdge is tested with, read from its own metadata (pyproject.toml).

There is no second list: what pip resolved is what ``moedge doctor`` judges by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, TypedDict

from moedge._versions import installed

Verdict = Literal["tested", "too old", "too new", "not installed"]


class Dependency(TypedDict):
    """A package that MoEdge's metadata names: the ranges of its extras, and what is here."""

    package: str
    tested: str
    version: str | None
    verdict: Verdict


@dataclass(frozen=True)
class Ranges:
    """One range or several: two extras may ask for different versions of a package, and either was tested."""

    each: tuple[str, ...]

    def __str__(self) -> str:
        return " or ".join(self.each)

    def verdict(self, version: str) -> Verdict:
        """Say whether a version lies in one of the ranges, below the lowest or above."""
        if any(satisfies(version, ranges) for ranges in self.each):
            return "tested"
        lower = [part for ranges in self.each for part in ranges.split(",") if part.strip().startswith((">", "=="))]
        below = lower and not any(satisfies(version, part.replace("==", ">=")) for part in lower)
        return "too old" if below else "too new"


def tested() -> dict[str, Ranges]:
    """Return the ranges of every package that MoEdge's metadata names, itself left out; nothing without metadata."""
    try:
        lines = metadata.requires("moedge") or []
    except metadata.PackageNotFoundError:
        return {}
    pattern = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([<>=!~][^;]*)?")
    found: dict[str, tuple[str, ...]] = {}
    for match in filter(None, map(pattern.match, lines)):
        name, ranges = match[1].lower(), (match[2] or "").strip()
        if ranges and ranges not in found.get(name, ()):
            found[name] = (*found.get(name, ()), ranges)
    return {name: Ranges(each) for name, each in found.items()}


def warning(package: str, version: str, ranges: dict[str, Ranges]) -> str | None:
    """Say that a version is too old or too new; None when it was tested, or nobody said what is."""
    known = ranges.get(package)
    verdict = known.verdict(version) if known else "tested"
    return None if verdict == "tested" else f"{package} {version} is {verdict}: tested with {known}"


def dependencies(ranges: dict[str, Ranges]) -> list[Dependency]:
    """Return every package of the ranges with what is here, in alphabetical order."""
    rows: list[Dependency] = []
    for package, known in sorted(ranges.items()):
        version = installed(package)
        verdict: Verdict = "not installed" if version is None else known.verdict(version)
        rows.append({"package": package, "tested": str(known), "version": version, "verdict": verdict})
    return rows


_COMPARE = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


def satisfies(version: str, ranges: str) -> bool:
    """Whether ``version`` lies in ``ranges`` like ``">=2.13,<2.14"``; a build tag (``+cpu``) does not count."""
    for part in ranges.split(","):
        match = re.match(r"\s*(>=|<=|==|>|<)\s*([0-9.]+)", part)
        if match:
            one, two = _release(version), _release(match[2])
            size = max(len(one), len(two))
            padded = [(*numbers, *[0] * (size - len(numbers))) for numbers in (one, two)]
            if not _COMPARE[match[1]](*padded):
                return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
