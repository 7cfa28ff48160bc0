"""Put the quality of every variant beside its measured times: frontier.json as :mod:`moedge.runtime.frontier.schema`.

Intervals are of 95 %: of quality by Student's t over the held-out windows, of speed those of the benchmark's rounds.
Two variants are compared on the same windows and in the same rounds, so what both have in common cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from moedge.runtime.bench.results import Bench, Metric, PointResult
from moedge.runtime.bench.stats import mean_ends
from moedge.runtime.frontier.schema import (
    Estimate,
    Frontier,
    FrontierProtocol,
    Measured,
    Row,
    TextQuality,
    VariantFacts,
)
from moedge.runtime.frontier.verdict import judge
from moedge.runtime.run import run_folder


def join(root: Path, params: dict[str, Any]) -> Frontier:
    """Read what the stages of a frontier left in the run folder ``root``.

    Args:
        params: of the stage ``frontier/table``.

    Raises:
        MoEdgeError: a stage's result is missing or damaged.
    """
    dense = run_folder.read_json(root / params["dense"] / "quality.json")
    found = {one["label"]: run_folder.read_json(root / one["quality"] / "quality.json") for one in params["variants"]}
    nll = {name: np.array(text["nll"]) for name, text in dense["texts"].items()}
    quality = {label: Quality.of(one, dense) for label, one in found.items()}
    benches = {target: run_folder.read_json(root / place / "bench.json") for target, place in params["bench"].items()}
    measured = []
    for target, one in benches.items():
        every = range(len(one["runs"][0]["points"]))
        measured += [_measured(target, one["runs"], number, one["sizes"], quality, params) for number in every]
    protocol: FrontierProtocol = {
        "window": params["window"],
        "bos": dense["bos"],
        "dtype": dense["dtype"],
        "tokens": {name: len(values) * (params["window"] - 1) for name, values in nll.items()},
    }
    first = next(iter(benches.values()))
    return {
        "schema": "moedge.frontier/1",
        "name": params["name"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": run_folder.source(root)["label"],
        "protocol": protocol,
        "dense_ppl": {name: _exp(values.mean()) for name, values in nll.items()},
        "variants": [variant_facts(one, found[one["label"]], quality[one["label"]]) for one in params["variants"]],
        "measured": measured,
        "machine": first["runs"][0]["machine"],
        "text": first["text"],
    }


class Quality:
    """A variant on the held-out windows: of every text the KL and the loss beyond the parent's, float64 [windows]."""

    def __init__(self, texts: dict[str, Any], dense: dict[str, np.ndarray]) -> None:
        self.kl = {name: np.array(text["kl"]) for name, text in texts.items()}
        self.loss = {name: np.array(text["nll"]) - dense[name] for name, text in texts.items()}
        self.nll = {name: np.array(text["nll"]) for name, text in texts.items()}
        self.read = {name: float(text["ffn_read_share"]) for name, text in texts.items()}

    @classmethod
    def of(cls, quality: dict[str, Any], dense: dict[str, Any]) -> Quality:
        """Join what the stages of a variant and of its parent left."""
        return cls(quality["texts"], {name: np.array(text["nll"]) for name, text in dense["texts"].items()})

    def lower_kl(self, other: Quality) -> bool:
        """Whether the mean KL of the texts is shown to be below another variant's, on the same windows."""
        high = mean_ends(_by_window([self.kl[name] - other.kl[name] for name in self.kl]))[1]
        return high is not None and high < 0


def _by_window(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the texts, float64 [windows]; texts have the same number of windows."""
    return np.mean(values, axis=0)


def mean_kl(quality: Quality) -> Estimate:
    """KL to the dense parent, the mean of the texts."""
    return _kl(list(quality.kl.values()))


def mean_ratio(quality: Quality) -> Estimate:
    """Perplexity over the dense parent's, the geometric mean of the texts."""
    return _ratio(list(quality.loss.values()))


def _kl(values: Sequence[np.ndarray]) -> Estimate:
    """Mean of the texts' means, float64 [windows] a text; no KL is below 0, whatever its interval would say."""
    found = _by_window(values)
    return {"value": float(found.mean()), "ci95": [end and max(end, 0.0) for end in mean_ends(found)]}


def _ratio(loss: Sequence[np.ndarray]) -> Estimate:
    """Perplexity ratio of the texts' losses beyond the parent's, float64 [windows] a text."""
    found = _by_window(loss)
    return {"value": _exp(found.mean()), "ci95": [end if end is None else _exp(end) for end in mean_ends(found)]}


def _exp(value: Any) -> float:
    """exp of a loss, finite even for a broken variant."""
    return float(np.exp(np.minimum(value, 700.0)))


def variant_facts(given: dict[str, Any], found: dict[str, Any], quality: Quality) -> VariantFacts:
    """Return what is known of a variant on every target."""
    from moedge.convert.methods import METHODS

    texts: dict[str, TextQuality] = {
        name: {
            "ppl": _exp(quality.nll[name].mean()),
            "ppl_ratio": _ratio([quality.loss[name]]),
            "kl": _kl([quality.kl[name]]),
            "ffn_read_share": quality.read[name],
        }
        for name in quality.kl
    }
    method = given["convert"]["method"]
    return {
        "label": given["label"],
        "convert": given["convert"],
        "notation": f"{method} {METHODS[method].layout(given['convert'])}",
        "plan_sha256": found["plan_sha256"],
        "ffn_read_share": float(np.mean(list(quality.read.values()))),
        "kl": mean_kl(quality),
        "ppl_ratio": mean_ratio(quality),
        "texts": texts,
    }


def _measured(
    target: str,
    runs: list[Bench],
    number: int,
    sizes: dict[str, int],
    quality: dict[str, Quality],
    params: dict[str, Any],
) -> Measured:
    """The benchmark of one target at its point ``number``: a row for each engine, and which variant wins."""
    times = Times([run["points"][number] for run in runs], f"dense {target}")
    kl = {label: mean_kl(one) for label, one in quality.items()}

    def lower(one: str, other: str) -> bool:
        return quality[one].lower_kl(quality[other])

    def dominates(one: str, other: str) -> bool:
        return times.as_fast(one, other) and lower(one, other)

    rows: list[Row] = []
    for label, row in times.rows.items():
        own = label in quality
        where = target if own else label.removeprefix("dense ")
        rows.append(
            {
                "label": label,
                "variant": label if own else None,
                "target": where,
                "bits": params["bits"][where],
                "bytes": sizes[label],
                "ttft_ms": {"value": row["ttft_ms"]["p50"], "ci95": row["ttft_ms"]["ci95"]},
                "tpot_ms": {"value": row["tpot_ms"]["p50"], "ci95": row["tpot_ms"]["ci95"]},
                "prompt_speedup": times.speedup("ttft_ms", label),
                "decode_speedup": times.speedup("tpot_ms", label),
                "dominated_by": [other for other in quality if own and other != label and dominates(other, label)],
            }
        )
    point = runs[0]["points"][number]
    where = target if point["batch"] == 1 else f"{target}, batch {point['batch']}"
    speed = {row["label"]: row["decode_speedup"] for row in rows if row["variant"]}
    return {
        "target": target,
        "batch": point["batch"],
        "prompt": point["prompt"],
        "decode": point["decode"],
        "repeats": point["rounds"],
        "threads": next(iter(runs[0]["engines"].values()))["info"]["threads"],
        "load_average_before": runs[0]["machine"].get("load_average_before"),
        "rows": rows,
        "verdict": judge(where, params["speedup"], kl, speed, as_fast=times.as_fast, lower=lower),
    }


class Times:
    """One point of the benchmarks of one target: one, or several where not all engines fit into memory.

    Args:
        runs: the point in each of them; the parents are in every one.
        parent: label of the dense parent on the same target.
    """

    def __init__(self, runs: Sequence[PointResult], parent: str) -> None:
        self.parent = parent
        found = [(number, row) for number, run in enumerate(runs) for row in run["rows"]]
        self.rows = {row["label"]: row for _, row in reversed(found)}  # of a parent the first run's
        labels = dict.fromkeys(row["label"] for _, row in found)
        ours = [label for label in labels if not label.startswith("dense ")]
        self.rows = {label: self.rows[label] for label in (*ours, *(label for label in labels if label not in ours))}
        self._run = {row["label"]: number for number, row in reversed(found)}
        self._parents = [next(row for row in run["rows"] if row["label"] == parent) for run in runs]
        every = (entry for run in reversed(runs) for entry in run["ratios"])
        self._ratios = {(entry["metric"], entry["label"], entry["baseline"]): entry for entry in every}

    def speedup(self, metric: Metric, label: str) -> Estimate:
        """Speed over the dense parent's, in the same run."""
        if label == self.parent:
            return {"value": 1.0, "ci95": [1.0, 1.0]}
        one = self._ratios[metric, label, self.parent]
        return {"value": one["speedup"], "ci95": one["ci95"]}

    def as_fast(self, one: str, other: str) -> bool:
        """Whether ``one`` is not shown to decode slower than ``other``.

        In one run they are paired by round. In two runs each is paired with the dense parent, and the means of the
        logarithms of the two speed-ups are compared (Welch).
        """
        if one == other:
            return True
        if self._run[one] == self._run[other]:
            return bool(self._ratios["tpot_ms", one, other]["verdict"] != "slower")

        def speeds(label: str) -> np.ndarray:
            parent = self._parents[self._run[label]]["rounds"]["tpot_ms"]
            return np.log(parent) - np.log(self.rows[label]["rounds"]["tpot_ms"])

        high = mean_ends(speeds(one), speeds(other))[1]
        return high is None or high >= 0
