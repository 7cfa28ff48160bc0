"""Where a series of figures steps to another level: change points of the ``ruptures`` library, on logarithms.

The cut that lowers the sum of squares by more than a penalty is a step; the penalty is :data:`PENALTY` times the
variance of the noise, which is read off the differences of neighbours (von Neumann), so that a step itself hardly
counts. With that penalty fewer than 1 in 100 series without a step show one, at every length from :data:`LEAST` on (a
test holds that).
"""

from __future__ import annotations

import math

import numpy as np

from moedge.runtime.history.schema import Metric, Series, Step

LEAST = 6
"""Results of a series that is looked at; fewer cannot tell a step from noise."""
PENALTY = 18.0
_SIDE = 2
"""Results at each level, at least: a single one off is no step. The newest one is for the gate to judge."""
_SMALLEST = 0.01
"""Change that matters to nobody, as a share; of an accuracy a hundredth."""

NEEDS = "steps are not marked, for ruptures is not installed: pip install 'moedge[history]'"


def available() -> bool:
    """Whether the library is here."""
    from importlib.util import find_spec

    return find_spec("ruptures") is not None


def mark(series: Series) -> None:
    """Put the steps of a series into it."""
    values = [point["value"] for point in series["points"]]
    cuts = found(series["metric"], values) if len(values) >= LEAST else []
    ends = [*cuts, len(values)]
    starts = [0, *cuts]
    levels = [float(np.median(values[start:end])) for start, end in zip(starts, ends, strict=True)]
    series["steps"] = [_step(series, cut, *levels[number : number + 2]) for number, cut in enumerate(cuts)]


def _step(series: Series, cut: int, before: float, after: float) -> Step:
    point = series["points"][cut]
    return {"index": cut, "when": point["when"], "commit": point["commit"], "before": before, "after": after}


def found(metric: Metric, values: list[float]) -> list[int]:
    """Return the index of the first value of every new level.

    Args:
        metric: times and KL are compared by their ratios, an accuracy by differences.
        values: by time.
    """
    import ruptures

    ratio = metric != "accuracy"
    if ratio and min(values) <= 0:  # a KL of nothing: no ratio, and nothing to step from
        return []
    scaled = np.log(values) if ratio else np.asarray(values, dtype=float)
    noise = math.sqrt(float(np.mean(np.diff(scaled) ** 2)) / 2)
    if noise == 0:
        return []
    # A quarter of what matters, where results are more alike than that: else every last digit would be a step.
    scale = max(noise, _SMALLEST / 4)
    search = ruptures.KernelCPD(kernel="linear", min_size=_SIDE).fit(scaled[:, None])
    return [int(cut) for cut in search.predict(pen=PENALTY * scale**2)[:-1]]


def change(metric: Metric, before: float, after: float) -> str:
    """A change of level in words: a share, or points of an accuracy."""
    if metric == "accuracy":
        return f"{100 * (after - before):+.1f} points"
    if before <= 0:
        return f"{before:.3g} to {after:.3g}"
    ratio = after / before
    return f"{100 * (ratio - 1):+.1f}%" if 0.1 < ratio < 10 else f"{ratio:.3g} times"
