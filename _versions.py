"""Which version of a package is installed; nothing is imported for it."""

from __future__ import annotations

from importlib import metadata


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, None when it is not here."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
