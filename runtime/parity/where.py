"""Where a comparison that failed departs: the worst window is run once more, with the layers of both engines shown.

The engine runs as it did: a prefill, then one token at a time. The reference runs once over the whole window, each part
on what the engine's part read (:mod:`.parts`), so the first part that departs is the one at fault, and the positions at
which it departs say in which phase: those of the prefill, those that were decoded, or both. If only decoded ones do,
the engine reads the window once more in a single prefill. Where that is right, attention can only have the cache wrong,
which no other part reads; and the slots of the cache, beside the keys and values of the reference, say whether it was
written wrong or read wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.export.graph.layers import place
from moedge.runtime.engines import Engine, LayerEngine, ReplayEngine, Step
from moedge.runtime.parity import parts as _parts
from moedge.runtime.parity import verdict
from moedge.runtime.parity.parts import Allowed, Departure, Part, Shown
from moedge.runtime.parity.results import (
    Fault,
    HeatMap,
    Identity,
    Location,
    Parity,
    PartError,
    PhaseName,
    WorstToken,
)

Opener = Callable[..., Engine]
"""Opens an engine with further options."""
MOST_PARTS = 20
COLUMNS = 64
"""Most columns of a heat map."""
_BEFORE = 12
"""Tokens of text that are shown before the worst one."""


@dataclass(frozen=True)
class Again:
    """What is run again.

    ``window`` int64 [L], of which ``prefill`` tokens are read at once; ``limits`` of the engine, ``exact`` of what
    holds no quantised weight.
    """

    reference: Opener
    test: Opener
    window: np.ndarray
    prefill: int
    limits: Profile
    exact: Profile


@dataclass(frozen=True)
class _Found:
    """One run of the engine beside the reference."""

    shown: Shown
    alone: Shown
    parts: list[Part]


def locate(again: Again) -> Location:
    """Run a window again and say which part departs first; where the engines cannot show that, why."""
    try:
        test = cast("LayerEngine", again.test(layers="shown"))
    except MoEdgeError as error:
        return _without_layers(again, str(error))
    try:
        reference = again.reference(layers="given")
    except MoEdgeError as error:
        test.close()
        return _unknown(str(error))
    try:
        return _located(again, cast("LayerEngine", reference), test)
    except MoEdgeError as error:
        return _unknown(str(error))
    finally:
        reference.close()
        test.close()


def _unknown(reason: str) -> Location:
    said = f"Which part departs could not be told: {reason}"
    return {"sentence": said, "fault": None, "first": None, "departing": []}


def _without_layers(again: Again, reason: str) -> Location:
    """Say at least in which phase the logits depart."""
    found = _unknown(reason)
    try:
        fault = _phase(again)
    except MoEdgeError:
        fault = None
    if fault is not None:
        alone = " alone: read in one prefill, they are right there" if fault == "decode" else ""
        found = {**found, "sentence": f"{found['sentence']} The logits depart in {fault}{alone}.", "fault": fault}
    return found


def _phase(again: Again) -> Fault | None:
    """Compare logits, in which all parts are, in both ways of reading the window; the reference takes the choices."""
    ids, prefill, length = again.window[None], again.prefill, len(again.window)
    with closing(again.reference()) as reference, closing(again.test()) as test:

        def departs(read_at_once: int, rows: slice) -> bool:
            step = test.prefill(ids[:, :read_at_once])
            shown = _joined([step, *_decode(test, ids, read_at_once, step)])
            one = cast("ReplayEngine", reference).prefill(ids, **_choices(reference, shown))
            values = _parts.relative_logits(one.logits[0], shown.logits)
            return Part(None, "head", "the logits", values, Allowed.of(again.limits)).departs(rows) is not None

        first, later = slice(0, prefill), slice(prefill, length)
        wrong = departs(prefill, first), departs(prefill, later)
        if wrong == (False, True) and not departs(length, later):
            return "decode"
    return {(True, False): "prefill", (False, False): None}.get(wrong, "prefill and decode")  # type: ignore[return-value]


def _located(again: Again, reference: LayerEngine, test: LayerEngine) -> Location:
    length, boundary = len(again.window), test.info.model.rope_boundary
    # Where longrope changes its factors the text is read anew, which no single run of the reference can follow.
    anew = boundary is not None and again.prefill <= boundary < length
    prefill = length if anew else again.prefill
    run = _compared(again, reference, test, prefill)
    rows: dict[PhaseName, slice] = {"prefill": slice(0, prefill), "decode": slice(prefill, length)}
    departing = [(part, found) for part in run.parts if (found := _departs(part, rows))]
    heat = _heat(run.parts, length)
    if not departing:
        return {"sentence": _nowhere(run.parts), "fault": None, "first": None, "departing": [], "heat": heat}
    first, phases = departing[0]
    fault: Fault = "prefill and decode"
    more = ""
    if not anew and len(phases) == 1:
        (phase,) = phases
        other = _compared(again, reference, test, length if phase == "decode" else 1)
        # Every reading begins with a prefill, of the first token at least.
        if _same(other.parts, first).departs(rows[phase] if phase == "decode" else slice(1, prefill)):
            more = f" Read {_READ[phase]}, it departs there too: these tokens are at fault, not the way they are read."
        elif phase == "prefill":
            fault, more = "prefill", f" Read {_READ[phase]}, it is right there."
        else:
            fault, more = _decoded(again, run, first)
    errors = [_as_json(part, found, run.shown) for part, found in departing[:MOST_PARTS]]
    said = _sentence(errors[0], fault, more, len(departing))
    return {"sentence": said, "fault": None if anew else fault, "first": errors[0], "departing": errors, "heat": heat}


_READ: dict[PhaseName, str] = {"prefill": "one token at a time", "decode": "in one prefill"}
"""The other way to read what was read in a phase."""


def _same(parts: list[Part], first: Part) -> Part:
    return next(part for part in parts if (part.layer, part.what) == (first.layer, first.what))


def _departs(part: Part, rows: Mapping[PhaseName, slice]) -> dict[PhaseName, Departure]:
    return {phase: found for phase, positions in rows.items() if (found := part.departs(positions))}


def _compared(again: Again, reference: LayerEngine, test: LayerEngine, prefill: int) -> _Found:
    """Run the engine, then the reference on what it showed."""
    ids = again.window[None]
    steps = [test.prefill(ids[:, :prefill])]
    behind = test.cached(steps[0].cache)
    steps += _decode(test, ids, prefill, steps[0])
    shown = _joined(steps)
    held = test.cached(steps[-1].cache)
    choices = _choices(reference, shown)
    step = reference.prefill(ids, given=shown.layers, **choices)
    alone = _joined([step])
    alone.cached = alone.held = _by_slot(reference.cached(step.cache))
    shown.held = _by_slot(held)
    shown.cached = _joined_slots(_by_slot(behind), shown.held)
    own: dict[int, np.ndarray] = {}
    if "experts" in choices and shown.router_inputs:
        own = cast("ReplayEngine", reference).scores(shown.router_inputs)
    return _Found(shown, alone, _parts.errors(shown, alone, again.limits, again.exact, own))


def _choices(reference: Engine | LayerEngine, shown: Shown) -> dict[str, Any]:
    """What the reference is told to choose; nothing where the engine does not show it."""
    found: dict[str, Any] = {}
    if shown.routes and shown.router_inputs and reference.info.model.routed:
        found["experts"] = shown.routes
    if shown.left_out_of:
        found["factors"] = cast("ReplayEngine", reference).factors(shown.left_out_of)
    return found


def _decode(engine: Engine | LayerEngine, ids: np.ndarray, prefill: int, step: Step) -> list[Step]:
    """Decode what follows the prefill that gave ``step``."""
    steps = [step]
    for position in range(prefill, ids.shape[1]):
        steps.append(engine.decode(ids[:, position : position + 1], steps[-1].cache))
    return steps[1:]


Key = TypeVar("Key")


def _joined(steps: list[Step]) -> Shown:
    """Put the steps of an engine one behind the other."""

    def rows(found: list[dict[Key, np.ndarray] | None]) -> dict[Key, np.ndarray] | None:
        there = [each for each in found if each is not None]
        if len(there) != len(steps):
            return None
        return {key: np.concatenate([each[key] for each in there]) for key in there[0]}

    layers = rows([step.layers for step in steps]) or {}
    return Shown(
        logits=np.concatenate([step.logits[0] for step in steps]),
        layers={point: layers[point] for point in sorted(layers, key=place)},
        routes=rows([step.routes for step in steps]),
        router_inputs=rows([step.router_inputs for step in steps]),
        scores=rows([step.scores for step in steps]),
        left_out_of=rows([step.left_out_of for step in steps]),
    )


Slots = dict[int, tuple[np.ndarray, np.ndarray]]


def _by_slot(cached: Slots) -> Slots:
    """Keys and values [1, G, L, D] as [L, G * D]."""

    def slots(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[0].transpose(1, 0, 2)).reshape(array.shape[2], -1)

    return {layer: (slots(keys), slots(values)) for layer, (keys, values) in cached.items()}


def _joined_slots(first: Slots, last: Slots) -> Slots:
    """The slots of ``first``, and behind them those that ``last`` has more."""
    return {
        layer: (np.concatenate([one[0], two[0][len(one[0]) :]]), np.concatenate([one[1], two[1][len(one[1]) :]]))
        for (layer, one), two in zip(first.items(), last.values(), strict=True)
    }


def _decoded(again: Again, run: _Found, first: Part) -> tuple[Fault, str]:
    """Say what is at fault where decode alone departs, and more about it."""
    said = " Read in one prefill, it is right there"
    if first.part != "attention" or first.layer is None:
        return "decode", f"{said}."
    mine, its = run.alone.held[first.layer], run.shown.held[first.layer]
    for name, keys, slots in zip(("key", "value"), mine, its, strict=True):
        wrong = np.flatnonzero(_parts.relative(keys, slots) > Allowed.of(again.limits).token)
        if len(wrong):
            return "cache", f"{said}, and the cache is written wrong: {_slot(name, keys, slots, int(wrong[0]))}"
    return "cache", f"{said}, and the cache holds the right keys and values: it is read wrong (length, mask, position)."


def _slot(name: str, mine: np.ndarray, its: np.ndarray, slot: int) -> str:
    """Say what a slot holds instead of the key or value of its own token."""
    distance = np.linalg.norm(mine.astype(np.float64) - its[slot], axis=1)
    nearest = int(distance.argmin())
    if nearest != slot and distance[nearest] < 0.1 * np.linalg.norm(mine[nearest]):
        return f"slot {slot} holds the {name} of token {nearest}."
    return f"slot {slot} does not hold the {name} of token {slot}."


def _as_json(part: Part, found: dict[PhaseName, Departure], shown: Shown) -> PartError:
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


def _sentence(first: PartError, fault: str, more: str, count: int) -> str:
    where = f"{first['what']} of layer {first['layer']}" if first["layer"] is not None else first["what"]
    off = "gives no numbers" if first["error"] is None else f"is off by {first['error']:.2g} {_KINDS[first['kind']]}"
    if first["part"] == "router":
        off = "differs from what its scores say"
    experts = first.get("experts", [])
    chose = f" Every token that departs chose expert {' or '.join(map(str, experts))}." if experts else ""
    later = f" Of the parts behind it {count - 1} depart by themselves, too." if count > 1 else ""
    return (
        f"The first part that departs is {where}: given what the engine gave to it, it {off} (limit "
        f"{first['limit']:.2g}), from position {first['first_position']} on, in {_at(fault)}.{more}{chose}{later}"
    )


def _at(fault: str) -> str:
    return {"cache": "decode, where it reads the cache", "prefill": "the prefill alone", "decode": "decode alone"}.get(
        fault, fault
    )


def _nowhere(parts: list[Part]) -> str:
    ratios = [float(part.values.mean()) / part.allowed.mean for part in parts if part.part != "router"]
    named = [part for part in parts if part.part != "router"]
    part = named[int(np.argmax(ratios))]
    said = "No single part departs by itself: small errors of many parts add up, or the model is sensitive to them."
    if (odd := _parts.standing_out(parts)) is not None:
        part, times = odd
        return f"{said} But {part.what} of layer {part.layer} stands out: {times:.2g} times as far off as elsewhere."
    where = part.what if part.layer is None else f"{part.what} of layer {part.layer}"
    return f"{said} The largest error relative to its limit is that of {where}: {part.values.mean():.2g} on average."


def _heat(parts: list[Part], length: int) -> HeatMap:
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


AnyEntry = TypeVar("AnyEntry", Parity, Identity)


def explained(
    entry: AnyEntry, windows: Sequence[np.ndarray], again: Callable[[np.ndarray], Again] | str, folder: Path
) -> AnyEntry:
    """Return a comparison; one that failed with ``location``, the text of its worst token and, in its notes, both.

    Args:
        entry: of :func:`moedge.runtime.parity.compare.compare_all` or ``identity_all``.
        windows: that it was made on, int64 [L] each.
        again: a window -> how to run it again; or the reason why nothing can be.
        folder: of a tokenizer.
    """
    worst = entry.get("worst")
    if worst is None or verdict.entry_outcome(entry) is not verdict.Outcome.FAILED:
        return entry
    worst = with_text(worst, windows, folder)
    location = _unknown(again) if isinstance(again, str) else locate(again(windows[worst["window"]]))
    location["sentence"] = f"{location['sentence']} {token_said(worst)}"
    found = cast("AnyEntry", {**entry, "worst": worst, "location": location})
    return verdict.with_notes(found, [location["sentence"]]) if "verdict" in found else found
