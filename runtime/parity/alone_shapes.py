"""Each layer by itself in batches, with padding and in pieces, beside a kept reference.

A model that chooses experts or leaves small values out may answer otherwise in another shape and be right: a rounding
turns a choice, and all that follows sees that (:mod:`.shapes`). Where nobody can replay it, the whole cannot be judged.
But under the reference's stream a choice of one layer reaches no other (:mod:`.against`), in any shape. So the rows of
a batch begin as the probe does and end elsewhere, and for each token of each the layers must give what the reference's
gave, within the limits of :mod:`.alone`: no padding, no other row and no cut between two calls may show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import numpy as np

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.export.graph.layers import LayerPoint
from moedge.runtime.engines import LayerEngine, Step
from moedge.runtime.parity import alone, readings
from moedge.runtime.parity.alone import PHASES, Alone
from moedge.runtime.parity.metrics import text_sha256
from moedge.runtime.parity.reference import Probe, Reference
from moedge.runtime.parity.results import ShapeCase, Shapes
from moedge.runtime.parity.shape_cases import HINTS, ON_GPU, apart, number
from moedge.runtime.parity.verdict import Check, Outcome, Verdict

_STEPS = (1, 1)
"""Tokens of each call after a batch's prompts."""
_LATER = "layer by layer a batch is decoded in single steps"
_HINTS = {name: HINTS[name] for name in ("prefill.chunked", "batch.equal")} | {
    "batch.padding": "padding is seen, it counts in the positions of a row, or a row gets what is another's"
}


def check(reference: Reference, engine: LayerEngine, limits: Profile) -> Shapes:
    """Read the beginning of the probe in several shapes under the reference's stream.

    Args:
        reference: the kept reference.
        engine: opened to be given the stream, and with ``taps`` if it is routed.
        limits: those of layers, of routers and of the head.

    Returns:
        As :func:`moedge.runtime.parity.shapes.check` does.
    """
    runs = _Runs(reference, engine, limits)
    longest = min(reference.facts.probe, engine.info.model.longest or reference.facts.probe)
    prompts: tuple[int, ...] = ()
    if longest < readings.SHORTEST:
        said = f"they need {readings.SHORTEST} tokens, and the probe of the reference or the model has {longest}"
        runs.not_run |= dict.fromkeys(("batch", "prefill.chunked"), said)
        runs.twice(_Calls.of((max(1, longest - 1),), (1,) if longest > 1 else ()))
    else:
        plan = readings.Plan.of(longest, thorough=False)
        prompts = plan.prompts[: engine.info.max_batch]
        runs.short(plan, prompts)
    verdict = runs.verdict()
    return {
        "schema": "moedge.shapes/1",
        "test": engine.info.as_json(),
        "text_sha256": text_sha256(reference.windows),
        "prompts": list(prompts),
        "cases": runs.facts(),
        "not_run": runs.not_run,
        "verdict": verdict.as_json(runs.notes(verdict)),
    }


class _OnProbe:
    """The engine under the reference's stream, whose ids are places in the probe."""

    def __init__(self, engine: LayerEngine, text: np.ndarray, probe: Probe) -> None:
        self.info = engine.info
        self._engine, self._text, self._probe = engine, text, probe

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        return self._engine.prefill(self._text[ids], attention_mask, given=self._streams(ids))

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        return self._engine.decode(self._text[ids], cache, given=self._streams(ids))

    def close(self) -> None:
        self._engine.close()

    def _streams(self, ids: np.ndarray) -> dict[LayerPoint, np.ndarray]:
        return alone.streams_at(self._probe, ids.reshape(-1))


@dataclass(frozen=True)
class _Calls:
    """Rows that begin as the probe does: their prompts, and what is read of each in every further call."""

    rows: list[np.ndarray]
    prompts: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, prompts: tuple[int, ...], after: tuple[int, ...] = _STEPS) -> _Calls:
        return cls([np.arange(prompt + sum(after)) for prompt in prompts], prompts, after)

    def read(self, engine: _OnProbe) -> list[list[Step]]:
        return readings.in_calls(engine, self.rows, self.prompts, self.after)


class _Runs:
    """Runs the engine in one shape after the other and collects how far its layers are off."""

    def __init__(self, reference: Reference, engine: LayerEngine, limits: Profile) -> None:
        self._probe, self._limits = reference.probe, limits
        self._engine = _OnProbe(engine, reference.windows[0], reference.probe)
        self._cases: dict[str, Alone] = {}
        self._failed: dict[str, str] = {}
        self._apart = 0.0  # of two equal calls
        self.not_run: dict[str, str] = {}

    def short(self, plan: readings.Plan, prompts: tuple[int, ...]) -> None:
        """Read rows of ``plan`` in every shape that the engine takes."""
        self.not_run["batch.chunked"] = _LATER
        self._case("prefill.chunked", _Calls.of(plan.pieces[:1], plan.pieces[1:]))
        rows = len(prompts)
        if rows < 2:
            said = f"this engine takes {rows} row a call (moedge build --batch)"
            self.not_run |= dict.fromkeys(("batch.equal", "batch.padding"), said)
            self.twice(_Calls.of(prompts))
            return
        self._case("batch.equal", _Calls.of(prompts[1:2] * 2))
        if self._engine.info.padding:
            self._case("batch.padding", _Calls.of(prompts))
        else:
            self.not_run["batch.padding"] = "this target takes rows of equal length only"
        self.twice(_Calls.of(prompts if self._engine.info.padding else prompts[1:2] * 2))

    def twice(self, calls: _Calls) -> None:
        """Make the same calls twice and compare what the layers give."""
        with self._trying("determinism"):
            for one, two in zip(*(chain(*calls.read(self._engine)) for _ in range(2)), strict=True):
                for point, values in (one.layers or {}).items():
                    other = (two.layers or {})[point]
                    if not np.array_equal(values, other, equal_nan=True):
                        self._apart = max(self._apart, float(apart(values, other).max()))

    def _case(self, name: str, calls: _Calls) -> None:
        """Read rows in these calls, and hold every token to the reference's."""
        found = self._cases[name] = Alone.nothing(self._probe, self._limits)
        with self._trying(name):
            start = 0
            for number, call in enumerate(calls.read(self._engine)):
                for row, step in enumerate(call):
                    # The rows of later calls end after each row's own prompt.
                    first = calls.prompts[row] + start if number else 0
                    places = slice(first, first + step.logits.shape[1])
                    unknown = np.full(step.logits.shape[1], -1)  # no perplexity is asked
                    found.add("decode" if number else "prefill", self._probe, step, places, unknown)
                start += calls.after[number - 1] if number else 0

    @contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """An engine that refuses a shape that it should take fails it."""
        try:
            yield
        except MoEdgeError as error:
            self._failed[name] = str(error)

    def verdict(self) -> Verdict:
        """Every check by the shape that it belongs to."""
        limit = math.sqrt(2) * (self._limits.layer_rel_error or 0.0)  # of two roundings
        on_cpu = self._engine.info.on_cpu
        apart_by = None if "determinism" in self._failed else number(self._apart)
        same = Check("determinism", apart_by, "<=", 0.0 if on_cpu else limit, decided=on_cpu)
        return Verdict({"determinism": (same,)} | {name: self._checks(name) for name in self._cases})

    def _checks(self, name: str) -> tuple[Check, ...]:
        found, limits = self._cases[name], self._limits
        if name in self._failed:
            return (Check(f"{name}.layer_rel_error", None, "<=", limits.layer_rel_error or 0.0),)
        summary = found.summary()
        checks = []
        if limits.layer_rel_error is not None:
            for phase in PHASES:
                value = number(_worst(found.errors[phase]))
                checks.append(Check(f"{name}.{phase}.layer_rel_error", value, "<=", limits.layer_rel_error))
        if found.changed:
            router = alone.router_checks(summary, limits)
            checks += [replace(each, name=f"{name}.{each.name}") for each in router]
        head = summary["head"]
        broken = head["non_finite"] + head["constant"]
        error = None if broken else number(head["rel_error"]["mean"])
        return (*checks, Check(f"{name}.head.rel_error.mean", error, "<=", limits.mean_rel_error))

    def facts(self) -> dict[str, ShapeCase]:
        """What was found, as results hold it."""
        return {name: _facts(found) for name, found in self._cases.items() if name not in self._failed}

    def notes(self, verdict: Verdict) -> list[str]:
        """Say in sentences what the checks that did not pass mean."""
        said = [f"{name}: {sentence}" for name, sentence in self._failed.items()]
        for name in self._cases:
            if name not in self._failed and any(check.outcome is Outcome.FAILED for check in verdict.parts[name]):
                said.append(f"{name}: {_HINTS[name]}.")
        if self._apart:
            said.append(f"determinism: {HINTS['determinism'] if self._engine.info.on_cpu else ON_GPU}")
        return said


def _worst(layers: Sequence[Sequence[np.ndarray]]) -> float:
    """The largest mean over tokens of any layer's errors; a layer all of whose tokens chose otherwise has none."""
    means = [float(errors.mean()) for errors in map(np.concatenate, layers) if len(errors)]
    return max(means, key=lambda mean: math.inf if math.isnan(mean) else mean, default=0.0)


def _facts(found: Alone) -> ShapeCase:
    head = found.head.summary()
    both = [[*one, *two] for one, two in zip(*(found.errors[phase] for phase in PHASES), strict=True)]
    largest = np.max(np.concatenate([errors for layer in both for errors in layer]), initial=0.0)
    rel = {"mean": number(_worst(both)), "max": number(float(largest))}
    kl = {name: number(cast("dict[str, float]", head["kl_ref_test"])[name]) for name in ("mean", "max")}
    return {
        "tokens": head["tokens"],
        "identical": 0,
        "replayed": 0,
        "excused": 0,
        "rel_error": cast("dict[str, float]", rel),
        "kl": cast("dict[str, float]", kl),
    }
