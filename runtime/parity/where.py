"""Where a comparison that failed departs: the worst window is run once more, with the layers of both engines shown.

The engine runs as it did: a prefill, then one token at a time. The reference runs once over the whole window, each part
on what the engine's part read (:mod:`.parts`), so the first part that departs is the one at fault, and the positions at
which it departs say in which phase: those of the prefill, those that were decoded, or both. If only decoded ones do,
the engine reads the window once more in a single prefill. Where that is right, attention can only have the cache wrong,
which no other part reads; and the slots of the cache, beside the keys and values of the reference, say whether it was
written wrong or read wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.export.graph.layers import place
from moedge.runtime.engines import Engine, LayerEngine, ReplayEngine, Step
from moedge.runtime.engines.steps import joined
from moedge.runtime.parity import parts as _parts
from moedge.runtime.parity import said, verdict
from moedge.runtime.parity.parts import Allowed, Departure, Part, Shown
from moedge.runtime.parity.results import (
    Fault,
    Identity,
    Location,
    Parity,
    PhaseName,
)

Opener = Callable[..., Engine]
"""Opens an engine with further options."""
MOST_PARTS = 20


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

    def on(self, window: np.ndarray) -> Again:
        """Return the same on another window."""
        return replace(self, window=window)


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
    sentence = f"Which part departs could not be told: {reason}"
    return {"sentence": sentence, "fault": None, "first": None, "departing": []}


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
    with closing(again.reference()) as opened, closing(again.test()) as test:
        reference = cast("ReplayEngine", opened)

        def read(at_once: int) -> Part:
            step = test.prefill(ids[:, :at_once])
            shown = _joined([step, *_decode(test, ids, at_once, step)])
            one = reference.prefill(ids, **_choices(reference, shown))
            values = _parts.relative_logits(one.logits[0], shown.logits)
            return Part(None, "head", "the logits", values, Allowed.of(again.limits))

        as_it_did, later = read(prefill), slice(prefill, length)
        wrong = as_it_did.departs(slice(0, prefill)) is not None, as_it_did.departs(later) is not None
        if wrong == (False, True) and not read(length).departs(later):
            return "decode"
        if wrong[0] and not read(1).departs(slice(1, length)):  # what follows read the cache of a wrong prefill
            return "prefill"
    return "prefill and decode" if any(wrong) else None


def _located(again: Again, reference: LayerEngine, test: LayerEngine) -> Location:
    length, boundary = len(again.window), test.info.model.rope_boundary
    # Where longrope changes its factors the text is read anew, which no single run of the reference can follow.
    anew = boundary is not None and again.prefill <= boundary < length
    prefill = length if anew else again.prefill
    run = _compared(again, reference, test, prefill)
    rows: dict[PhaseName, slice] = {"prefill": slice(0, prefill), "decode": slice(prefill, length)}
    departing = [(part, found) for part in run.parts if (found := _departs(part, rows))]
    heat = said.heat_map(run.parts, length)
    if not departing:
        return {"sentence": said.nowhere(run.parts), "fault": None, "first": None, "departing": [], "heat": heat}
    first, phases = departing[0]
    fault: Fault = "prefill and decode"
    more = ""
    # Every reading begins with a prefill, of the first token at least.
    rest = {**rows, "prefill": slice(1, prefill)}
    if list(phases) == ["prefill"] and not first.departs(rest["prefill"]):
        more = " Only the first token departs, which every reading of a text begins with."
    elif not anew and len(phases) == 1:
        (phase,) = phases
        other = _compared(again, reference, test, length if phase == "decode" else 1)
        if _same(other.parts, first).departs(rest[phase]):
            more = f" Read {_READ[phase]}, it departs there too: these tokens are at fault, not the way they are read."
        elif phase == "prefill":
            fault, more = "prefill", f" Read {_READ[phase]}, it is right there."
        else:
            fault, more = _decoded(again, run, first)
    errors = [said.departed(part, found, run.shown) for part, found in departing[:MOST_PARTS]]
    return {
        "sentence": said.sentence(errors[0], fault, more, len(departing)),
        "fault": None if anew else fault,
        "first": errors[0],
        "departing": errors,
        "heat": heat,
    }


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
        own = reference.scores(shown.router_inputs)
    return _Found(shown, alone, _parts.errors(shown, alone, again.limits, again.exact, own))


def _choices(reference: ReplayEngine, shown: Shown) -> dict[str, Any]:
    """What the reference is told to choose; nothing where the engine does not show it."""
    found: dict[str, Any] = {}
    if shown.routes and shown.router_inputs and reference.info.model.routed:
        found["experts"] = shown.routes
    if shown.left_out_of:
        found["factors"] = reference.factors(shown.left_out_of)
    return found


def _decode(engine: Engine, ids: np.ndarray, prefill: int, step: Step) -> list[Step]:
    """Decode what follows the prefill that gave ``step``."""
    steps = [step]
    for position in range(prefill, ids.shape[1]):
        steps.append(engine.decode(ids[:, position : position + 1], steps[-1].cache))
    return steps[1:]


def _joined(steps: list[Step]) -> Shown:
    """Put the steps of an engine one behind the other."""
    whole = joined(steps)
    layers = whole.layers or {}
    return Shown(
        logits=whole.logits[0],
        layers={point: layers[point] for point in sorted(layers, key=place)},
        routes=whole.routes,
        router_inputs=whole.router_inputs,
        scores=whole.scores,
        left_out_of=whole.left_out_of,
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
    right = " Read in one prefill, it is right there"
    if first.part != "attention" or first.layer is None:
        return "decode", f"{right}."
    mine, its = run.alone.held[first.layer], run.shown.held[first.layer]
    for name, keys, slots in zip(("key", "value"), mine, its, strict=True):
        wrong = np.flatnonzero(_parts.relative(keys, slots) > Allowed.of(again.limits).token)
        if len(wrong):
            held = said.slot_said(name, keys, slots, int(wrong[0]))
            return "cache", f"{right}, and the cache is written wrong: {held}"
    return "cache", f"{right}, and the cache holds the right keys and values: its length, mask or position is wrong."


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
    try:
        worst = said.with_text(worst, windows, folder)
        location = _unknown(again) if isinstance(again, str) else locate(again(windows[worst["window"]]))
    except Exception as error:  # an explanation must not cost the verdict
        location = _unknown(f"{type(error).__name__}: {error}")
    location["sentence"] = f"{location['sentence']} {said.token_said(worst)}"
    found: Any = {**entry, "worst": worst, "location": location}
    return cast("AnyEntry", verdict.with_notes(found, [location["sentence"]]) if "verdict" in found else found)
