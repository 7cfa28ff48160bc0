"""What is said of a location: parts, phases, tokens and slots in words, and the figures that go with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.parity import parts as _parts
from moedge.runtime.parity.parts import Departure, Part, Shown
from moedge.runtime.parity.results import HeatMap, PartError, PhaseName, WorstToken

COLUMNS = 64
"""Most columns of a heat map."""
_BEFORE = 12
"""Tokens of text that are shown before the worst one."""


def slot_said(name: str, mine: np.ndarray, its: np.ndarray, slot: int) -> str:
    """Say what a slot holds instead of the key or value of its own token."""
    distance = np.linalg.norm(mine.astype(np.float64) - its[slot], axis=1)
    nearest = int(distance.argmin())
    if nearest != slot and distance[nearest] < 0.1 * np.linalg.norm(mine[nearest]):
        return f"slot {slot} holds the {name} of token {nearest}."
    return f"slot {slot} does not hold the {name} of token {slot}."


def departed(part: Part, found: dict[PhaseName, Departure], shown: Shown) -> PartError:
    """Return a part that departs as results hold it."""
    worst = max(found.values(), key=lambda each: each.error / each.limit)
    beyond = part.beyond
    positions = np.flatnonzero(beyond)
    result: PartError = {
        "layer": part.layer,
        "part": part.part,
        "what": part.what,
        "error": worst.error if math.isfinite(worst.error) else None,
        "limit": worst.limit,
        "kind": worst.kind,
        "phases": list(found),
        "first_position": int(positions[0]) if len(positions) else int(part.values.argmax()),
        "tokens": len(positions),
    }
    if part.part == "experts" and part.layer is not None and shown.routes:
        few = _parts.responsible(shown.routes[part.layer], beyond)
        if few:
            result["experts"] = few
    return result


_KINDS = {"median": "for the typical token", "mean": "on average", "largest": "for its worst token"}


def sentence(first: PartError, fault: str, more: str, count: int) -> str:
    """Say which part departs first, by how much, where; ``count`` parts do, ``more`` is what is known of the phase."""
    where = f"{first['what']} of layer {first['layer']}" if first["layer"] is not None else first["what"]
    off = "gives no numbers"
    if first["error"] is not None:
        off = f"is off by {first['error']:.2g} of its size {_KINDS[first['kind']]} (limit {first['limit']:.2g})"
    if first["part"] == "router":
        off = f"differs from what its scores say by more than a tie ({first['limit']:.2g} of the largest)"
    experts = first.get("experts", [])
    chose = f" Every token that departs chose expert {' or '.join(map(str, experts))}." if experts else ""
    later = f" Of the parts behind it {count - 1} depart by themselves, too." if count > 1 else ""
    return (
        f"The first part that departs is {where}: computed from what the engine gave it, it {off}, from position "
        f"{first['first_position']} on, in {_at(fault)}.{more}{chose}{later}"
    )


def _at(fault: str) -> str:
    return {"cache": "decode, where it reads the cache", "prefill": "the prefill alone", "decode": "decode alone"}.get(
        fault, fault
    )


def nowhere(parts: list[Part]) -> str:
    """Say what is known where no part departs by itself."""
    others = (each for each in parts if each.part != "router")
    part = max(others, key=lambda each: float(each.values.mean()) / each.allowed.mean)
    said = "No single part departs by itself: small errors of many parts add up, or the model is sensitive to them."
    if (odd := _parts.standing_out(parts)) is not None:
        part, times = odd
        return f"{said} But {part.what} of layer {part.layer} stands out: {times:.2g} times as far off as elsewhere."
    where = part.what if part.layer is None else f"{part.what} of layer {part.layer}"
    return f"{said} The largest error relative to its limit is that of {where}: {part.values.mean():.2g} on average."


def heat_map(parts: list[Part], length: int) -> HeatMap:
    """Reduce the errors to a row a layer and at most :data:`COLUMNS` columns."""
    edges = np.unique(np.linspace(0, length, min(length, COLUMNS) + 1).astype(int))
    layers = sorted({part.layer for part in parts if part.layer is not None})
    rows = {"embedding": [part for part in parts if part.part == "embedding"]}
    rows |= {str(layer): [part for part in parts if part.layer == layer] for layer in layers}
    rows["head"] = [part for part in parts if part.layer is None and part.part != "embedding"]
    ratios: list[list[float | None]] = []
    for row in rows.values():
        worst = np.max([part.values / part.allowed.token for part in row], axis=0)
        binned = np.maximum.reduceat(worst, edges[:-1])
        ratios.append([_log(float(value)) for value in binned])
    return {"rows": list(rows), "positions": [int(edge) for edge in edges[:-1]], "ratios": ratios}


def _log(ratio: float) -> float | None:
    return round(math.log10(max(ratio, 1e-6)), 2) if math.isfinite(ratio) else None


def with_text(worst: WorstToken, windows: Sequence[np.ndarray], folder: Path) -> WorstToken:
    """Return the worst token with its id and, where ``folder`` holds a tokenizer, its text and what stands before."""
    from moedge.runtime.text.tokenizer import open_tokenizer

    ids = [int(token) for token in windows[worst["window"]]]
    position = worst["position"]
    found: WorstToken = {**worst, "id": ids[position]}
    try:
        tokenizer = open_tokenizer(folder)
    except MoEdgeError:
        return found
    before = ids[max(0, position - _BEFORE) : position]
    text, context = (tokenizer.decode(part, skip_special_tokens=False) for part in ([ids[position]], before))
    return {**found, "text": text, "before": context}


def token_said(worst: WorstToken) -> str:
    """Say which token is worst."""
    kl = "its logits are no numbers, or all alike" if worst["kl"] is None else f"KL {worst['kl']:.3g}"
    text = f" {worst['text']!r} after {worst['before']!r}" if "text" in worst and "before" in worst else ""
    return f"Worst token: position {worst['position']} of window {worst['window']} ({worst['phase']}){text}: {kl}."
