"""Numbers that people read in reports."""

from __future__ import annotations


def six(value: float) -> float:
    """Return a float of 6 digits: what is stored does not hang on the last bits."""
    return float(f"{value:.6g}")
