"""Percentiles, and the intervals of :mod:`moedge.runtime.device.moedge_stats` and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moedge.runtime.device.moedge_stats import Ends as Ends
from moedge.runtime.device.moedge_stats import binomial_cdf as binomial_cdf
from moedge.runtime.device.moedge_stats import mean_ends as mean_ends
from moedge.runtime.device.moedge_stats import quantile_ends as quantile_ends
from moedge.runtime.device.moedge_stats import rounds_needed as rounds_needed
from moedge.runtime.device.moedge_stats import speedup as speedup
from moedge.runtime.device.moedge_stats import t_quantile as t_quantile


def percentiles(values: np.ndarray, at: Sequence[float]) -> dict[str, float]:
    """Return ``{"p50": ..., "p99.9": ...}`` for ``values`` [n], linearly interpolated; NaN when there are none."""
    if not len(values):
        return {f"p{q:g}": float("nan") for q in at}
    return {f"p{q:g}": float(value) for q, value in zip(at, np.percentile(values, at), strict=True)}


def between(ends: Sequence[float | str | None], form: str = "{:.2f}", to: str = " to ") -> str:
    """An interval in words; an end that is None is not known."""
    low, high = (None if end is None else form.format(end) for end in ends)
    if low is None or high is None:
        return "no interval" if low == high else f"at least {low}" if high is None else f"at most {high}"
    return f"{low}{to}{high}"


def bars(value: float, ends: Sequence[float | None]) -> tuple[float, float]:
    """How far an interval reaches below and above a value, for a plot; 0 where that is not known."""
    low, high = ends
    return (0.0 if low is None else max(value - low, 0.0)), (0.0 if high is None else max(high - value, 0.0))
