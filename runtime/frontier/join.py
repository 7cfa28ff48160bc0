"""Put the quality of every variant beside its measured times: frontier.json as :mod:`moedge.runtime.frontier.schema`.

Intervals are 95 % bootstrap intervals: of quality over the held-out windows, of speed over the rounds of the benchmark.
Two variants are compared on the same windows and in the same rounds, so what both have in common cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export import manifest as manifests
from moedge.export.manifest import Manifest
from moedge.runtime.bench.stats import bootstrap_ci
from moedge.runtime.frontier.schema import (
    Estimate,
    Frontier,
    FrontierProtocol,
    Measured,
    Row,
    TextQuality,
    VariantFacts,
    Verdict,
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
        sizes = {label: _bytes(root / place) for label, place in params["places"][target].items()}
        sizes |= {label: _bytes(root / place) for label, place in params["places"]["dense"].items()}
        for result in one["results"]:
            measured.append(_measured(target, result, sizes, quality, params))
    protocol: FrontierProtocol = {
        "window": params["window"],
        "bos": params["bos"],
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
        "variants": [_variant(one, found[one["label"]], quality[one["label"]]) for one in params["variants"]],
        "measured": measured,
        "machine": first["results"][0]["machine"],
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
        return estimate([self.kl[name] - other.kl[name] for name in self.kl])["ci95"][1] < 0


def estimate(values: Sequence[np.ndarray], through: Callable[[np.ndarray], np.ndarray] = lambda mean: mean) -> Estimate:
    """Return ``through`` the mean of the texts' means, and its interval over the windows; float64 [windows] a text.

    Texts have the same number of windows, of which the same numbers are drawn in all variants.
    """

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return through(np.mean([one[drawn].mean(axis=-1) for one in values], axis=0))

    every = np.arange(len(values[0]))
    low, high = bootstrap_ci(len(every), statistic)
    return {"value": float(statistic(every)), "ci95": [low, high]}


def mean_kl(quality: Quality) -> Estimate:
    """KL to the dense parent, the mean of the texts."""
    return estimate(list(quality.kl.values()))


def mean_ratio(quality: Quality) -> Estimate:
    """Perplexity over the dense parent's, the geometric mean of the texts."""
    return estimate(list(quality.loss.values()), _ratio)


def _exp(value: Any) -> float:
    """exp of a loss, finite even for a broken variant."""
    return float(np.exp(np.minimum(value, 700.0)))


def _ratio(loss: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(np.minimum(loss, 700.0)))


def _variant(given: dict[str, Any], found: dict[str, Any], quality: Quality) -> VariantFacts:
    from moedge.convert.methods import METHODS

    texts: dict[str, TextQuality] = {
        name: {
            "ppl": _exp(quality.nll[name].mean()),
            "ppl_ratio": estimate([quality.loss[name]], _ratio),
            "kl": estimate([quality.kl[name]]),
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
    target: str, result: dict[str, Any], sizes: dict[str, int], quality: dict[str, Quality], params: dict[str, Any]
) -> Measured:
    """One benchmark: a row for each engine, and which variant wins."""
    parent = f"dense {target}"
    ratios = {(one["metric"], one["label"], one["baseline"]): one for one in result["ratios"]}

    def speedup(metric: str, label: str) -> Estimate:
        if label == parent:
            return {"value": 1.0, "ci95": [1.0, 1.0]}
        one = ratios[metric, label, parent]
        return {"value": one["speedup"], "ci95": one["ci95"]}

    def dominates(one: str, other: str) -> bool:
        slower = ratios["tpot_ms", one, other]["verdict"] == "slower"
        return not slower and quality[one].lower_kl(quality[other])

    rows: list[Row] = []
    for row in result["rows"]:
        label = row["label"]
        own = label in quality
        rows.append(
            {
                "label": label,
                "variant": label if own else None,
                "target": target if own else label.removeprefix("dense "),
                "bits": params["bits"][target if own else label.removeprefix("dense ")],
                "bytes": sizes[label],
                "ttft_ms": {"value": row["ttft_ms"]["p50"], "ci95": row["ttft_ms"]["ci95"]},
                "tpot_ms": {"value": row["tpot_ms"]["p50"], "ci95": row["tpot_ms"]["ci95"]},
                "prompt_speedup": speedup("ttft_ms", label),
                "decode_speedup": speedup("tpot_ms", label),
                "dominated_by": [other for other in quality if own and other != label and dominates(other, label)],
            }
        )
    protocol = result["protocol"]
    return {
        "target": target,
        "batch": protocol["batch"],
        "prompt": protocol["prompt"],
        "decode": protocol["decode"],
        "repeats": protocol["repeats"],
        "threads": result["rows"][0]["info"]["threads"],
        "load_average_before": result["machine"].get("load_average_before"),
        "rows": rows,
        "verdict": _verdict(target, protocol["batch"], rows, ratios, quality, params["speedup"]),
    }


def _verdict(
    target: str,
    batch: int,
    rows: list[Row],
    ratios: dict[tuple[str, str, str], Any],
    quality: dict[str, Quality],
    level: float,
) -> Verdict:
    kl = {label: mean_kl(one) for label, one in quality.items()}
    speed = {row["label"]: row["decode_speedup"] for row in rows if row["variant"]}

    def as_fast(one: str, other: str) -> bool:
        return one == other or ratios["tpot_ms", one, other]["verdict"] != "slower"

    def lower(one: str, other: str) -> bool:
        return quality[one].lower_kl(quality[other])

    where = target if batch == 1 else f"{target}, batch {batch}"
    return judge(where, level, kl, speed, as_fast=as_fast, lower=lower)


def _bytes(folder: Path) -> int:
    manifest = manifests.read(folder)
    if not isinstance(manifest, Manifest):
        raise MoEdgeError(f"{folder} is not a bundle; run `moedge frontier` on its recipe again.")
    return sum(entry.size for entry in manifest.files.values())
