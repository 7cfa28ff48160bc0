"""YAML files that a user names: a packaged one by its name, or any by its path."""

from __future__ import annotations

from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from moedge import MoEdgeError
from moedge.configs.errors import name_of

Kind = Literal["recipe", "study", "device"]
_FOLDERS: dict[Kind, str] = {"recipe": "recipes", "study": "studies", "device": "devices"}


def packaged(kind: Kind) -> dict[str, Path]:
    """Return the files of a kind that ship with the package, ``{name: path}``."""
    folder = Path(str(files("moedge.configs") / _FOLDERS[kind]))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(name_or_path: str | Path, kind: Kind) -> tuple[Path, str]:
    """Find a packaged file by name, or one by path, and return where it is and its text.

    Raises:
        MoEdgeError: there is no such file, or it is not UTF-8 text.
    """
    known = packaged(kind)
    path = known.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise MoEdgeError(
            f"No {kind} {str(name_or_path)!r}: give the path of a YAML file or one of: {', '.join(known)}."
        )
    try:
        return path, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MoEdgeError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise MoEdgeError(f"Cannot read {path}: {error.strerror}.") from error


def parse(text: str, where: str, kind: str) -> dict[str, Any]:
    """Read YAML text whose top level is a mapping; ``where`` starts the sentence of a refusal.

    Raises:
        MoEdgeError: not YAML, a key given twice, or something else than a mapping.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise MoEdgeError(f"{where}{line}: {problem}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise MoEdgeError(f"{where}: not a readable YAML file ({error}).") from error
    if not isinstance(value, dict):
        raise MoEdgeError(f"{where}: a {kind} is a mapping of keys; this file holds {name_of(value)}.")
    return value


class _Loader(yaml.SafeLoader):
    """``yaml.safe_load``'s loader, except that a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # "<<", which the call below resolves
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
