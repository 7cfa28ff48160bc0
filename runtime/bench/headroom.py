"""How near a benchmark came to what its models need of this machine, and to the gain that leaving weights out allows.

What a token needs (:mod:`moedge.export.needs`) over what the machine can do (:mod:`moedge.runtime.bench.roofline`) is
the least time that a step can take; that over the measured time is what was *reached*. The ideal gain of a converted
model is the ratio of the two least times: 1 for a prompt of a gathered one, of which no kernel leaves anything out. A
roof is measured with kernels of others, so a better one may pass 100 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.export import manifest as manifests
from moedge.export import needs as model_needs
from moedge.export import targets
from moedge.export.needs import Needs
from moedge.runtime.bench.roofline import Roof
from moedge.runtime.bench.watched import Gain, Headroom, HeadroomRow, Lost, Phase, Reached

if TYPE_CHECKING:
    from moedge.runtime.bench.results import Bench, Metric

PHASES: dict[Phase, Metric] = {"prompt": "ttft_ms", "decode": "tpot_ms"}


@dataclass(frozen=True)
class Timed:
    """What was timed of one engine."""

    folder: Path
    device: str
    dtype: str
    target: str
    ms: dict[Phase, float]
    """Medians."""


@dataclass(frozen=True)
class Sizes:
    """Of a point: tokens of the prompt, decoded, rows, tokens in the cache before the prompt."""

    prompt: int
    decode: int
    batch: int = 1
    depth: int = 0

    @property
    def context(self) -> float:
        """Tokens that a decode step sees, itself included, on average."""
        return self.depth + self.prompt + (self.decode + 1) / 2


def add_headroom(result: Bench, folders: Mapping[str, Path]) -> None:
    """Put ``headroom`` into every point of a benchmark's result; the machine is measured, which takes a second or two.

    Args:
        result: with ``profiles`` where there are some, which are of the first point.
        folders: label -> bundle, engine or checkpoint.
    """
    roofs: dict[int, Roof] = {}
    for number, point in enumerate(result["points"]):
        infos = {row["label"]: result["engines"][row["label"]]["info"] for row in point["rows"]}
        threads = point["threads"] or max(info["threads"] for info in infos.values())
        timed = {
            row["label"]: Timed(
                folders[row["label"]],
                infos[row["label"]]["device"],
                infos[row["label"]]["dtype"],
                str(infos[row["label"]]["model"].get("target", "")),
                {"prompt": row["ttft_ms"]["p50"], "decode": row["tpot_ms"]["p50"]},
            )
            for row in point["rows"]
            if row["label"] in folders
        }
        sizes = Sizes(point["prompt"], point["decode"], point["batch"], point["depth"])
        profiles = result.get("profiles") if number == 0 else None
        paired = {(one["metric"], one["label"], one["baseline"]): one["speedup"] for one in point["ratios"]}
        point["headroom"] = headroom(timed, sizes, roofs.setdefault(threads, Roof(threads)), paired, profiles)


def headroom(
    timed: Mapping[str, Timed],
    sizes: Sizes,
    roof: Roof,
    paired: Mapping[tuple[Metric, str, str], float],
    profiles: Mapping[str, Any] | None = None,
) -> Headroom:
    """Say how near each engine came to what its model needs.

    Args:
        timed: label -> what was timed.
        sizes: of the point.
        roof: this machine, with the session's threads.
        paired: (metric, label, dense label) -> how many times the dense one's speed: the benchmark's ratio over rounds.
        profiles: label -> :func:`moedge.runtime.bench.profiling.profile`, where there is one.
    """
    needs: dict[str, Needs] = {}
    rows: list[HeadroomRow] = []
    for label, one in timed.items():
        try:
            if one.device != "CPU":
                raise MoEdgeError("the roof is measured on the CPU; for a GPU's own figures: moedge estimate")
            needs[label] = model_needs.of_folder(one.folder, one.dtype)
            rows.append(_row(label, one, needs[label], sizes, roof))
        except MoEdgeError as error:
            needs.pop(label, None)
            rows.append({"label": label, "reason": str(error)})
    found: Headroom = {"threads": roof.threads, "rows": rows, "gains": _gains(timed, rows, paired)}
    if profiles:
        found["lost"] = [
            part
            for label, need in needs.items()
            if label in profiles
            for part in _lost(label, profiles[label], need, sizes, roof)
        ]
    return found


def _row(label: str, one: Timed, needs: Needs, sizes: Sizes, roof: Roof) -> HeadroomRow:
    row = targets.known(one.target)
    bits = (row.bits if row else None) or 32
    batch = sizes.batch
    read = {
        "prompt": needs.prompt_bytes(sizes.prompt, batch, sizes.depth),
        "decode": needs.decode_bytes(sizes.context, batch),
    }
    multiplied = {
        "prompt": needs.prompt_products(sizes.prompt, batch, sizes.depth),
        "decode": needs.decode_products(sizes.context, batch),
    }
    bandwidth = roof.bandwidth(read["decode"])
    rate = roof.rate(batch * sizes.prompt, bits)

    def phase(name: Phase) -> Reached:
        memory, arithmetic = read[name] / bandwidth, multiplied[name] / rate
        least, took = 1e3 * max(memory, arithmetic), one.ms[name]
        return {
            "bytes": read[name],
            "multiplications": multiplied[name],
            "least_ms": least,
            "bound": "memory" if memory >= arithmetic else "arithmetic",
            "ms": took,
            "reached": least / took,
            "gb_s": read[name] / took / 1e6,
        }

    return {
        "label": label,
        "stored_bytes": needs.stored,
        "bandwidth_gb_s": bandwidth / 1e9,
        "gmul_s": rate / 1e9,
        "prompt": phase("prompt"),
        "decode": phase("decode"),
    }


def _gains(
    timed: Mapping[str, Timed], rows: list[HeadroomRow], paired: Mapping[tuple[Metric, str, str], float]
) -> list[Gain]:
    """Pairs of a converted model and a dense one on the same target, in the same type."""
    known = {row["label"]: row for row in rows if "reason" not in row}
    changed = [label for label in known if converted(timed[label].folder)]
    dense: dict[tuple[str, str], str] = {}
    for label in known:
        if label not in changed:
            dense.setdefault((timed[label].target, timed[label].dtype), label)
    found: list[Gain] = []
    for label in changed:
        row, parent = known[label], dense.get((timed[label].target, timed[label].dtype))
        if parent is None:
            continue
        for name in PHASES:
            one, other = row[name], known[parent][name]
            # Under one roof, the parent's: two measurements of it would put their noise into the ratio.
            ideal = other["least_ms"] / _least(one, known[parent])
            measured = paired[PHASES[name], label, parent]
            gain: Gain = {
                "phase": name,
                "label": label,
                "dense": parent,
                "ideal": ideal,
                "measured": measured,
                "reached": measured / ideal,
            }
            found.append(gain)
    return found


def _least(step: Reached, roof: HeadroomRow) -> float:
    """Least milliseconds of a step under the roof of another engine's row."""
    memory = step["bytes"] / (roof["bandwidth_gb_s"] * 1e9)
    return 1e3 * max(memory, step["multiplications"] / (roof["gmul_s"] * 1e9))


def converted(folder: Path) -> bool:
    """Whether a bundle, engine or checkpoint is of a converted model; its dense parent is not."""
    manifest = manifests.read(folder)
    return (folder / "plan.json").is_file() if manifest is None else manifest.kind == "moe"


_PARTS = {"experts": ("experts",), "dense FFN": ("ffn", "shared", "shared experts", "gathered FFNs")}
"""Group of a profile -> names of :class:`moedge.export.needs.Part` whose share it has."""


def _lost(label: str, profile: Mapping[str, Any], needs: Needs, sizes: Sizes, roof: Roof) -> list[Lost]:
    """Where one engine's decode step went; the groups of its profile, the largest loss first."""
    weights = profile.get("weights") or {}
    bandwidth = roof.bandwidth(needs.decode_bytes(sizes.context, 1))
    found: list[Lost] = []
    for group in profile["decode"]["groups"]:
        read = weights.get(group["name"], 0) * _share(group["name"], needs)
        if group["name"] == "attention":
            read += sizes.context * needs.cache_bytes
        found.append({"label": label, "part": group["name"], "ms": group["ms"], "least_ms": 1e3 * read / bandwidth})
    return sorted(found, key=lambda part: part["least_ms"] - part["ms"])


def _share(group: str, needs: Needs) -> float:
    """Share of a group's weights that one token reads; of what is looked up (``input``) a row, which is nothing."""
    if group == "input":
        return 0.0
    parts = [part for part in needs.parts if part.name in _PARTS.get(group, ())]
    stored = sum(part.bytes for part in parts)
    return sum(part.read(1) for part in parts) / stored if stored else 1.0
