"""Read texts in the shapes in which engines fail: batches with padding, pieces on a growing cache, long prompts, twice.

:func:`moedge.runtime.parity.compare` reads one window at a time. Here the engine is held to *itself*: whatever the
batch and however a text is cut, each row must answer as that row read at once and alone (:mod:`.readings`), and the
same call must give the same bits. That needs no reference; where there is one, the rows alone are held to it. There
are:

========================  =============================================================================================
``alone.reference``       three texts read at once and alone, as the reference reads them
``determinism``           a prompt and two steps, twice
``batch.equal``           rows of equal length in one batch, prompt and two steps
``batch.padding.prefill`` rows of different length in one batch, padded on the left: their prompts
``batch.padding.decode``  single steps of that batch
``batch.chunked``         several tokens of each row at once on that batch's cache
``prefill.chunked``       one text in several calls, pieces of unequal length
``length.N.decode``       a prompt of N - 8 tokens, then single steps
``length.N.chunked``      N tokens in pieces of 509
``length.N.reference``    N tokens beside the reference: what is wrong in every shape alike shows only there
========================  =============================================================================================

**Limits.** Two readings of one engine are two roundings of the same sums. Each is within the profile's limits of the
exact result, and where they differ at all their errors are at worst independent, so their distance has a limit of
sqrt(2) times that for a relative error and of twice that for a KL, which is quadratic (:class:`Between`). Short texts
are judged by the mean error and the worst token, long ones by means, over the worst block of tokens. A quantised
engine has the same weights in both readings: the limits are those of its kernels (``dequantized/...``), not those of
what rounding the weights costs. On a CPU equal calls must give equal bits: kernels add in a fixed order there. On a
GPU they need not (atomic additions, split sums), and then the limit is that of two readings.

**Choices.** A rounding may turn a close choice of experts (:mod:`.replay`), and what follows in that row is then
another composition of products. Where a row's choices differ from those of its reading alone, the reference replays
them, and the engine is held to the limits of the profile, as :func:`~moedge.runtime.parity.compare.compare` does it:
its arithmetic, its routers, and what it left out. Models that leave small values out always differ in some of them.
Without a reference that can replay, tokens before the row's first changed choice are judged and the others leave the
check not decided; under limits that allow for changed choices (``free/...``) all are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.runtime.engines import Engine, ReplayEngine, Step
from moedge.runtime.engines.steps import part
from moedge.runtime.parity import readings
from moedge.runtime.parity.metrics import text_sha256
from moedge.runtime.parity.replay import Replay
from moedge.runtime.parity.results import Shapes
from moedge.runtime.parity.routing import RouteAgreement
from moedge.runtime.parity.shape_cases import HINTS, ON_GPU, UNSURE, Between, Case, apart, number
from moedge.runtime.parity.verdict import Check, Outcome, Verdict, kept_checks, router_checks

LONGEST = 2048
"""Tokens of a long text where nobody says how many."""
LONG_PIECE, LONG_STEPS = 509, 8
"""Pieces of a long text: a prime below 512, so that no piece but the first begins at a multiple of a kernel's block;
and the tokens that are decoded after a long prompt."""


@dataclass(frozen=True)
class Asked:
    """Which shapes are wanted."""

    thorough: bool = False
    """Larger batches, longer rows and pieces."""
    long: np.ndarray | None = None
    """int64 [N], a text that is read whole."""


def asked(windows: np.ndarray, longer: Callable[[int], np.ndarray], *, thorough: bool, max_length: int | None) -> Asked:
    """Return what to check, with a long text where there is to be one.

    Args:
        windows: int64 [N, L], text, which may be long enough.
        longer: gives int64 [1, n] of the same text for n tokens.
        thorough: see :class:`Asked`.
        max_length: tokens of the long text; None: :data:`LONGEST` if ``thorough``, or none.

    Raises:
        MoEdgeError: the text is too short.
    """
    length = max_length or (LONGEST if thorough else 0)
    if not length:
        return Asked(thorough)
    text = windows if windows.size >= length else longer(length)
    return Asked(thorough, text.reshape(-1)[:length])


@dataclass(frozen=True)
class Rules:
    """How an engine is judged."""

    own: Profile
    """Limits of its arithmetic: for a quantised one those of its kernels."""
    against: Profile
    """Limits beside the reference."""
    reference: Engine | None = None
    """What it is compared with in long texts; it replays choices where it is a :class:`ReplayEngine` opened so."""
    replays: bool = False
    """Whether ``reference`` was opened with ``replay`` and ``taps``, and the engine with what a replay needs."""
    half: bool = False
    """Whether the engine computes in a 16-bit type."""
    unsure: bool = False
    """Whether choices remain that nobody can replay: what is beyond a limit is then not decided."""


def name(test: str) -> str:
    """Name of the entry of an engine in a verify result."""
    return f"{test} in other shapes"


def check(test: Engine, windows: np.ndarray, asked: Asked, rules: Rules) -> Shapes:
    """Read texts in every shape that the engine takes, and judge what differs.

    Args:
        test: the engine. Where ``rules.replays``, opened with ``taps`` and ``router_inputs``.
        windows: int64 [N, L], text; the rows of a batch come from places that are evenly apart in it.
        asked: which shapes.
        rules: how they are judged.

    Returns:
        JSON-ready dict of schema ``moedge.shapes/1``: what was found by shape (``cases``), what was not run and why
        (``not_run``), and the verdict, whose checks are named as in the module's table.
    """
    # Where longrope changes its factors a text's first tokens are others than in a shorter text, by design.
    known = (test.info.model.longest, test.info.model.rope_boundary)
    longest = min([windows.size, *(limit for limit in known if limit)])
    runs = _Runs(test, rules)
    if longest < readings.SHORTEST:
        prompts: tuple[int, ...] = ()
        said = f"they need {readings.SHORTEST} tokens, and the text or the model has {longest}"
        runs.not_run |= dict.fromkeys(("batch", "prefill.chunked"), said)
        runs.twice([windows.reshape(-1)[:longest]], (max(1, longest - 1),), (1,) if longest > 1 else ())
    else:
        plan = readings.Plan.of(longest, thorough=asked.thorough)
        prompts = plan.prompts
        runs.short(readings.texts(windows, len(prompts), plan.length), plan, thorough=asked.thorough)
    if asked.long is not None:
        runs.long(asked.long)
    verdict = runs.verdict()
    return {
        "schema": "moedge.shapes/1",
        "test": test.info.as_json(),
        "text_sha256": text_sha256(windows if asked.long is None else [*windows, asked.long]),
        "prompts": list(prompts),
        "cases": {name: case.facts() for name, case in runs.cases.items()},
        "not_run": runs.not_run,
        "verdict": verdict.as_json(runs.notes(verdict)),
    }


class _Runs:
    """Runs the engine in one shape after the other and collects what differs."""

    def __init__(self, test: Engine, rules: Rules) -> None:
        self._test, self._rules = test, rules
        self._free = rules.against.router_set_agreement is None  # its limits allow for changed choices
        self._between = Between.readings(rules.against if self._free else rules.own)
        self._replay: Replay | None = None
        if rules.replays and isinstance(rules.reference, ReplayEngine):
            self._replay = Replay(rules.reference, rules.against)
        self._apart = 0.0  # of two equal calls
        self._turned = False  # a choice differs between two equal calls
        self.cases: dict[str, Case] = {}
        self.not_run: dict[str, str] = {}

    def short(self, texts: Sequence[np.ndarray], plan: readings.Plan, *, thorough: bool) -> None:
        """Read the rows of ``plan`` in every short shape that the engine takes."""
        info = self._test.info
        prompts = plan.prompts[: info.max_batch]
        rows = [text[: prompt + sum(readings.AFTER)] for text, prompt in zip(texts, prompts, strict=False)]
        self.twice(rows[:1], prompts[:1], (1, 1))
        alone = [readings.at_once(self._test, row) for row in rows]
        if self._rules.reference is not None:
            with self._trying("alone.reference", limits=Between.reference(self._rules.against)) as (name,):
                for row, ids in enumerate(rows):
                    self._against(name, row, ids, alone[row])
        with self._trying("prefill.chunked") as (name,):
            calls = readings.in_calls(self._test, rows[:1], plan.pieces[:1], plan.pieces[1:])
            self._beside(0, rows[0], alone[0], readings.of_row(calls, 0), [(name, len(rows[0]))])
        if len(rows) < 2:
            said = f"this engine takes {len(rows)} row a call (moedge build --batch)"
            self.not_run |= dict.fromkeys(("batch.equal", "batch.padding", "batch.chunked"), said)
            return
        with self._trying("batch.equal") as (name,):
            prompt = prompts[1]
            calls = readings.in_calls(self._test, rows[:2], (prompt, prompt), (1, 1))
            for row in range(2):
                ids = rows[row][: prompt + 2]
                self._beside(row, ids, alone[row], readings.of_row(calls, row), [(name, len(ids))])
        if not info.padding:
            said = "this target takes rows of equal length only"
            self.not_run |= dict.fromkeys(("batch.padding", "batch.chunked"), said)
            return
        with self._trying("batch.padding.prefill", "batch.padding.decode", "batch.chunked") as names:
            calls = readings.in_calls(self._test, rows, prompts, readings.AFTER)
            for row, prompt in enumerate(prompts):
                ends = (prompt, prompt + 2, prompt + sum(readings.AFTER))
                self._beside(
                    row, rows[row], alone[row], readings.of_row(calls, row), list(zip(names, ends, strict=True))
                )
        if thorough:
            self.twice(rows, prompts, (1, 1))

    def long(self, text: np.ndarray) -> None:
        """Read int64 [N] whole, or as much of it as the engine and its reference hold."""
        reference = self._rules.reference
        models = [engine.info.model for engine in (self._test, reference) if engine is not None]
        length = min([len(text), *(model.longest for model in models if model.longest)])
        prefix = f"length.{length}"
        if length < LONG_STEPS + readings.SHORTEST:
            self.not_run["length"] = f"the text or the model has {length} tokens"
            return
        ids, prompt = text[:length], length - LONG_STEPS
        alone = readings.at_once(self._test, ids)
        if reference is None:
            self.not_run[f"{prefix}.reference"] = "there is no reference that could read this text"
        else:
            with self._trying(f"{prefix}.reference", limits=Between.reference(self._rules.against)) as (name,):
                self._against(name, 0, ids, alone)
        alone = Step(alone.logits, None, alone.routes)  # what else it shows may be gigabytes
        pieces = [LONG_PIECE] * (prompt // LONG_PIECE) or [prompt]
        for case, calls in (("decode", [prompt, *[1] * LONG_STEPS]), ("chunked", [*pieces, length - sum(pieces)])):
            self._long(f"{prefix}.{case}", ids, alone, calls, begin=prompt if case == "decode" else 0)

    def _long(self, name: str, ids: np.ndarray, alone: Step, calls: Sequence[int], begin: int) -> None:
        """Read ``ids`` in calls of so many tokens, and judge its tokens from ``begin`` on."""
        model = self._test.info.model
        boundary = model.rope_boundary
        if boundary is not None and calls[0] <= boundary < len(ids):
            # What was read before the text passed the boundary has the factors of a short text, by design.
            begin = max(begin, boundary)
            if model.routed or model.gathered:
                self.not_run[name] = f"beyond {boundary} tokens the text is read again, and its choices are then others"
                return
        with self._trying(name):
            shaped = readings.of_row(readings.in_calls(self._test, [ids], calls[:1], calls[1:]), 0)
            self._beside(0, ids, alone, shaped, [("", begin), (name, len(ids))])

    def twice(self, rows: Sequence[np.ndarray], prompts: Sequence[int], after: Sequence[int]) -> None:
        """Make the same calls twice and compare what they give."""
        one, two = ([readings.of_row(calls, row) for row in range(len(rows))] for calls in (
            readings.in_calls(self._test, rows, prompts, after) for _ in range(2)
        ))  # fmt: skip
        for a, b in zip(one, two, strict=True):
            if not np.array_equal(a.logits, b.logits, equal_nan=True):
                self._apart = max(self._apart, float(apart(a.logits[0], b.logits[0]).max()))
            changed = _changed(a, b)
            self._turned |= changed is not None and bool(changed.any())

    def verdict(self) -> Verdict:
        """Every check by the shape that it belongs to, and those of replayed choices."""
        on_cpu, unsure = self._test.info.on_cpu, self._rules.unsure
        limit = 0.0 if on_cpu else self._between.mean_rel_error
        decided = on_cpu or not (self._turned or unsure)
        same = Check("determinism", number(self._apart), "<=", limit, decided)
        parts = {name: tuple(case.checks(self._rules.against, unsure=unsure)) for name, case in self.cases.items()}
        if self._replay and self._replay.tokens:
            found = self._replay.summary()
            if found["router"]["compared"]:
                parts["router"] = router_checks(found["router"], self._rules.against)
            if "kept" in found:
                parts["kept"] = kept_checks(found["kept"], self._rules.against)
        return Verdict({"determinism": (same,), **parts})

    def notes(self, verdict: Verdict) -> list[str]:
        """Say in sentences what the checks that did not pass mean."""
        said, families = [], set()
        for name, case in self.cases.items():
            if all(check.passed for check in verdict.parts[name] if not check.name.endswith(".not_compared")):
                continue
            family, _, last = name.rpartition(".") if name.startswith("length.") else name.partition(".")
            # What fails first in a family is where to look: the others follow from it.
            hint = "" if family in families else HINTS.get(name) or HINTS[last]
            families.add(family)
            said.append(f"{name}: {case.said(f'{hint}; ' if hint else '')}")
        if self._apart and self._test.info.on_cpu:
            said.insert(0, f"determinism: {HINTS['determinism']}")
        elif self._apart:
            said.insert(0, f"determinism: {ON_GPU}")
        if self._rules.unsure and any(check.outcome is Outcome.NOT_DECIDED for check in verdict.missed):
            said.append(UNSURE)
        excused = sum(case.excused for case in self.cases.values())
        if excused:
            tokens = sum(case.tokens for case in self.cases.values())
            said.append(
                f"Not decided: {excused:,} of {tokens:,} tokens follow a choice of experts that is another one than in "
                "the row alone, by rounding or by a fault, and nothing could replay it; verify beside the checkpoint "
                "or the portable bundle, which can."
            )
        return said

    @contextmanager
    def _trying(self, *names: str, limits: Between | None = None) -> Iterator[tuple[str, ...]]:
        """Open the cases of one run; an engine that fails in it fails all of them."""
        for name in names:
            self.cases[name] = Case(
                name, limits or self._between, long=name.startswith("length."), heavy_first=self._rules.half
            )
        try:
            yield names
        except MoEdgeError as error:
            for name in names:
                self.cases[name].error = str(error)

    def _replays(self, reading: Step) -> bool:
        return self._replay is not None and (reading.router_inputs is not None or reading.kept is not None)

    def _against(self, name: str, row: int, ids: np.ndarray, alone: Step) -> None:
        """Hold the reading of one text to the reference's."""
        reference = self._rules.reference
        assert reference is not None
        # Models that leave values out differ in some: what the reference keeps by itself is then of no use.
        free = None if self._replays(alone) and alone.kept is not None else readings.at_once(reference, ids)
        self._beside(row, ids, free, alone, [(name, len(ids))])

    def _beside(
        self, row: int, ids: np.ndarray, right: Step | None, shaped: Step, ends: Sequence[tuple[str, int]]
    ) -> None:
        """Compare the reading ``shaped`` of ``ids`` int64 [n] with ``right``, or under its choices with the reference.

        Args:
            row: for the report.
            ids: the text.
            right: a reading of n tokens or more of the same text; None: the reference replays in any case.
            shaped: what is judged.
            ends: names of cases and where, after the one before, each ends; nothing is judged under an empty name.
        """
        changed = _changed(part(right, slice(len(ids))), shaped) if right is not None else None
        turned = changed is not None and bool(changed.any())
        replayed = self._replays(shaped) and (turned or shaped.kept is not None)
        clean = len(ids)
        if replayed:
            assert self._replay is not None
            one = self._replay.step("prefill", ids[None], shaped)
        else:
            assert right is not None
            one = right
            if changed is not None and turned and not self._free:
                clean = int(changed.argmax())
        start = 0
        for name, end in ends:
            if name:
                case, stop = self.cases[name], max(start, min(end, clean))
                case.tokens += end - start
                case.excused += end - stop
                a, b = one.logits[0, start:stop], shaped.logits[0, start:stop]
                case.add(case.replayed if replayed else case.alone, a, b, row, start)
            start = end


def _changed(one: Step, two: Step) -> np.ndarray | None:
    """Bool [n]: some layer chose other experts for the token; None where choices are not shown."""
    return RouteAgreement().add(one.routes, two.routes)
