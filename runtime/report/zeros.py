"""What reports say about weights that a plan sets to zero."""

from __future__ import annotations


def zeros_sentence(share: float) -> str:
    """Return how many weights are zero, and that no byte is saved by it."""
    return f"{share:.1%} of the FFN's weights are zero; nothing is saved in dense storage"


def zeros_note(share: float | None) -> str:
    """Return what a table adds to the active share of neurons: nothing, or the share of zeros."""
    return f", {share:.1%} zeros" if share else ""
