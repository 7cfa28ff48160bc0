"""Compare two engines on the same tokens: logits, distributions, choices and routing.

Every window is a prefill of its first tokens followed by teacher-forced decoding of the rest, one token at a time, so
each token of the text is compared once, in one of the two phases. Logits are reduced to a few numbers per token in
float64 and dropped at once, so memory does not grow with the text (llama.cpp's KL tool needs an 11-37 GB file for it).

Symbols: a reference logits, b test logits, p = softmax(a), q = softmax(b), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.configs.tolerances import Profile
from moedge.runtime.engines import Engine, ReplayEngine, Step
from moedge.runtime.engines.info import EngineInfo
from moedge.runtime.parity import verdict
from moedge.runtime.parity.metrics import At, Cursor, TokenErrors, text_sha256
from moedge.runtime.parity.replay import Replay
from moedge.runtime.parity.results import Identity, Parity, WorstToken
from moedge.runtime.parity.routing import RouteAgreement

SCHEMA = "moedge.parity/1"
Name = TypeVar("Name", bound=Hashable)
"""What a caller names an engine by: a label, an :class:`moedge.runtime.run.refs.EngineRef`."""


def compare(
    reference: Engine,
    test: Engine,
    token_windows: np.ndarray,
    *,
    prefill: int,
    tolerances: Mapping[str, Any] | Profile,
    routing: bool = True,
    progress: Progress | None = None,
) -> Parity:
    """Compare ``test`` with ``reference`` and judge the difference.

    Args:
        reference: engine whose answers count as right.
        test: engine under test. Open both with ``taps=True`` to compare routing.
        token_windows: int64 [N, L], N texts of L tokens.
        prefill: tokens of each window that are prefilled before decoding starts, 1..L-2.
        tolerances: limits, a :class:`moedge.configs.tolerances.Profile` or its fields.
        routing: judge expert sets. When both models route tokens and one engine has no taps, the verdict is then
            "failed": what was not looked at is not passed. Pass False only where a target cannot be tapped.
            Limits with ``router_set_agreement`` judge a routed model by route replay (:mod:`.replay`):
            open the reference with ``replay=True`` and the test with ``router_inputs=True`` too. Limits that also have
            ``expert_set_agreement`` replay the windows alone in which a choice differs, and judge free-running where
            the test does not show what its routers read.
        progress: called with (tokens done, tokens in all).

    Returns:
        JSON-ready dict of schema ``moedge.parity/1``. Per phase (``prefill``, ``decode``) and ``overall``: tokens;
        absolute error; relative error max|a-b| / max|a| per token; cosine; KL in nats both ways; top-1 and top-5
        agreement outside near-ties of the reference; perplexity of both on the tokens that follow. A value that does
        not exist (no finite token, nothing compared) is None, and its check fails. ``replay`` is the same for the
        reference under the test's own choice of experts, or None; ``verdict.parts`` says which part of it passed.

    Raises:
        MoEdgeError: windows of a wrong shape, engines of different vocabularies or routing, or a bad tolerance.
    """
    pairs = {"": (test, tolerances)}
    return compare_all(reference, pairs, token_windows, prefill=prefill, routing=routing, progress=progress)[""]


def compare_all(
    reference: Engine,
    tests: Mapping[Name, tuple[Engine, Mapping[str, Any] | Profile]],
    token_windows: np.ndarray,
    *,
    prefill: int,
    routing: bool = True,
    progress: Progress | None = None,
) -> dict[Name, Parity]:
    """Compare several engines with one reference, which runs once; see :func:`compare`.

    Args:
        tests: label -> (engine, its limits).
    """
    limits = {label: Profile.of(tolerances) for label, (_, tolerances) in tests.items()}
    windows = _check(reference, [test for test, _ in tests.values()], token_windows, prefill)
    engines = [test for test, _ in tests.values()]
    found = {
        label: _Comparison(reference, test, limits[label], routing and _both_choose(reference, test))
        for label, (test, _) in tests.items()
    }
    done, cursor = 0, Cursor(prefill)
    for window in windows:
        for phase, ids, one, others, targets in steps(reference, engines, window[None], prefill, None):
            at = cursor.at(phase, ids)
            for comparison, two in zip(found.values(), others, strict=True):
                comparison.add(phase, ids, one, two, targets, at)
            done += ids.size
            if progress:
                progress(done, windows.size)
        for comparison in found.values():
            comparison.end_window(window, prefill)
    for comparison in found.values():
        comparison.end()
    entries = {
        label: judged(
            reference, test, windows.shape, prefill, found[label].phases, found[label].routes, limits[label], routing,
            found[label].replay,
        )
        for label, (test, _) in tests.items()
    }  # fmt: skip
    sha256 = text_sha256(windows)
    return {label: {**entry, "text_sha256": sha256} for label, entry in entries.items()}


class _Comparison:
    """What is kept of one engine beside the reference: free-running errors and choices, and a replay if it is due."""

    def __init__(self, reference: Engine, test: Engine, limits: Profile, choosing: bool) -> None:
        self._reference, self._test, self._limits = reference, test, limits
        self._may_replay = choosing and limits.router_set_agreement is not None
        self._free_first = limits.expert_set_agreement is not None
        self._window, self._changed, self._shown = TokenErrors.by_phase(limits), False, False
        self._alike = TokenErrors.by_phase(limits)  # of windows without a changed choice
        self.phases, self.routes = TokenErrors.by_phase(limits), RouteAgreement()
        self._number = 0  # of the window
        self.replay: Replay | None = None
        if self._may_replay and not self._free_first and _both_routed(reference, test):
            self.replay = Replay(replaying(reference, test), limits)

    def add(self, phase: str, ids: np.ndarray, one: Step, two: Step, targets: np.ndarray, at: At) -> None:
        """Compare one step of both."""
        self._number = at[0]
        changed = self.routes.add(one.routes, two.routes)
        self._window[phase].add(one.logits[0], two.logits[0], targets, changed, at)
        self._changed |= changed is not None and bool(changed.any())
        self._shown = two.router_inputs is not None
        if self._may_replay and two.kept is not None and self.replay is None:
            # Some value of some layer lies at its threshold in nearly every window: what is left out always differs.
            self.replay, self._free_first = Replay(replaying(self._reference, self._test), self._limits), False
        if self.replay and not self._free_first:
            self.replay.add(phase, ids, two, targets, at)

    def end_window(self, window: np.ndarray, prefill: int) -> None:
        """Take the window over, or run it again under the engine's own choices where one of them differs."""
        for name, tokens in self._window.items():
            self.phases[name].extend(tokens)
        if self._may_replay and self._free_first and self._shown:
            if self._changed:
                self.replay = self.replay or Replay(replaying(self._reference, self._test), self._limits)
                self._again(self.replay, window, prefill)
            else:
                for name, tokens in self._window.items():
                    self._alike[name].extend(tokens)
        self._window, self._changed = TokenErrors.by_phase(self._limits), False

    def _again(self, replay: Replay, window: np.ndarray, prefill: int) -> None:
        cursor = Cursor(prefill, self._number)
        for phase, ids, two, _, targets in steps(self._test, [], window[None], prefill, None):
            replay.add(phase, ids, two, targets, cursor.at(phase, ids))

    def end(self) -> None:
        """Give the replay, if there was one, the windows that needed none."""
        if self.replay:
            self.replay.alike(self._alike)


class Described(Protocol):
    """An engine, or what is left of one: it says what it is."""

    @property
    def info(self) -> EngineInfo:
        """What it is."""
        ...


def _both_choose(reference: Described, test: Described) -> bool:
    return _both_routed(reference, test) or (reference.info.model.gathered and test.info.model.gathered)


def _both_routed(reference: Described, test: Described) -> bool:
    return reference.info.model.routed and test.info.model.routed


def replaying(reference: Engine, test: Described) -> ReplayEngine:
    """Return ``reference`` as one that replays the choices of ``test``.

    Raises:
        MoEdgeError: it cannot.
    """
    if not isinstance(reference, ReplayEngine):
        raise MoEdgeError(
            f"{test.info.name} is judged under its own choices, which {reference.info.name} cannot replay; "
            "compare it with the portable bundle or the checkpoint."
        )
    return reference


def judged(
    reference: Described,
    test: Described,
    windows: tuple[int, ...],
    prefill: int,
    phases: dict[str, TokenErrors],
    routes: RouteAgreement,
    limits: Profile,
    routing: bool,
    replay: Replay | None,
) -> Parity:
    """Return the result of a comparison, as :func:`compare` describes it; ``windows`` is their shape [N, L]."""
    result = measured(reference, test, windows, prefill, phases, routes, limits, replay)
    compared = _both_routed(reference, test) or result["routing"]["compared"]
    found = verdict.judge(result, limits, routing=routing and compared)
    result["verdict"] = found.as_json(verdict.explain(result, found, limits))
    arithmetic = all(check.passed for check in found.parts.get("arithmetic", ()))
    worst = _worst(replay.phases, replay.wrong_choice() if arithmetic else None) if replay else _worst(phases, None)
    if worst is not None:
        result["worst"] = worst
    return json_ready(result)


def measured(
    reference: Described,
    test: Described,
    windows: tuple[int, ...],
    prefill: int,
    phases: dict[str, TokenErrors],
    routes: RouteAgreement,
    limits: Profile,
    replay: Replay | None = None,
) -> Parity:
    """Return the result of a comparison without its verdict; numbers may still be NaN."""
    summaries = {name: tokens.summary() for name, tokens in phases.items()}
    sizes = {"prefill": prefill, "decode": windows[1] - prefill}
    by_window = {name: tokens.by_window(windows[0], sizes[name]) for name, tokens in phases.items()}
    replayed = replay.summary() if replay else None
    if replay and replayed:
        found = {name: tokens.by_window(windows[0], sizes[name]) for name, tokens in replay.phases.items()}
        replayed["by_window"] = found
    return cast(
        "Parity",
        {
            "schema": SCHEMA,
            "reference": reference.info.as_json(),
            "test": test.info.as_json(),
            "tokens": {
                "windows": windows[0],
                "window": windows[1],
                "prefill": prefill,
                **{name: summary["tokens"] for name, summary in summaries.items()},
            },
            "phases": summaries,
            "overall": TokenErrors.merged(list(phases.values())).summary(),
            "routing": routes.summary(),
            "by_window": by_window,
            "replay": replayed,
            "tolerances": limits.model_dump(),
        },
    )


def _worst(phases: dict[str, TokenErrors], wrong: At | None) -> WorstToken | None:
    """Return the token that is furthest off, or the one at ``wrong``, whose experts are chosen wrong."""
    if wrong is None:
        found = [(*worst, name) for name, tokens in phases.items() if (worst := tokens.worst())]
    else:
        found = [(kl, wrong, name) for name, tokens in phases.items() if (kl := tokens.of("kl", wrong)) is not None]
    if not found:
        return None
    kl, (window, position), phase = max(found, key=lambda each: each[0])
    return {"window": window, "position": position, "phase": "decode" if phase == "decode" else "prefill", "kl": kl}


def identity_all(
    reference: Engine,
    tests: Mapping[Name, tuple[Engine, float]],
    token_windows: np.ndarray,
    *,
    prefill: int | None = None,
    progress: Progress | None = None,
) -> dict[Name, Identity]:
    """Check that models with every expert selected are their dense parent, which runs once.

    Args:
        reference: the dense parent.
        tests: label -> (the MoE, opened with ``top_k`` so large that every expert runs; the limit for the maximum over
            all tokens of max|a-b| / max|a|, ``Profile.identity_rel_error``).
        token_windows: int64 [N, L].
        prefill: tokens before teacher-forced decoding starts; half of the window by default.
        progress: called with (tokens done, tokens in all).

    Returns:
        By label ``{"schema": "moedge.identity/1", "reference", "test", "tokens", "max_rel_error", "limit", "passed"}``.

    Raises:
        MoEdgeError: as for :func:`compare`.
    """
    prefill = token_windows.shape[-1] // 2 if prefill is None else prefill
    engines = [test for test, _ in tests.values()]
    windows = _check(reference, engines, token_windows, prefill)
    phases = {label: {name: TokenErrors(0.0) for name in ("prefill", "decode")} for label in tests}
    cursor = Cursor(prefill)
    for phase, ids, one, others, targets in steps(reference, engines, windows, prefill, progress):
        at = cursor.at(phase, ids)
        for label, two in zip(tests, others, strict=True):
            phases[label][phase].add(one.logits[0], two.logits[0], targets, at=at)
    found = {label: _identical(reference, test, phases[label], limit) for label, (test, limit) in tests.items()}
    sha256 = text_sha256(windows)
    return {label: {**entry, "text_sha256": sha256} for label, entry in found.items()}


def _identical(reference: Engine, test: Engine, phases: dict[str, TokenErrors], limit: float) -> Identity:
    summary = TokenErrors.merged(list(phases.values())).summary()
    clean = summary["non_finite"] == 0 and summary["constant"] == 0
    largest = summary["rel_error"]["max"] if clean else float("nan")
    result: dict[str, Any] = {
        "schema": "moedge.identity/1",
        "reference": reference.info.as_json(),
        "test": test.info.as_json(),
        "tokens": summary["tokens"],
        "max_rel_error": largest,
        "limit": limit,
        "passed": bool(largest <= limit),
    }
    if worst := _worst(phases, None):
        result["worst"] = worst
    ready: Identity = json_ready(result)
    return ready


def _check(reference: Engine, tests: list[Engine], token_windows: np.ndarray, prefill: int) -> np.ndarray:
    windows = np.asarray(token_windows, dtype=np.int64)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 3:
        raise MoEdgeError(f"Parity needs token windows [N, L >= 3], not shape {windows.shape}.")
    if not 1 <= prefill <= windows.shape[1] - 2:  # the last token has no successor to score
        raise MoEdgeError(f"prefill={prefill} must be between 1 and {windows.shape[1] - 2} (window - 2).")
    for engine in (reference, *tests):
        longest = engine.info.model.longest
        if longest and windows.shape[1] > longest:
            raise MoEdgeError(
                f"Windows of {windows.shape[1]} tokens do not fit: {engine.info.name} holds at most {longest}; make "
                "them shorter, and the prefill too (--window, --prefill)."
            )
    for test in tests:
        same_vocabulary(reference, test)
    return windows


def same_vocabulary(reference: Described, test: Described) -> None:
    """Refuse to compare engines of different models.

    Raises:
        MoEdgeError: their vocabularies differ.
    """
    size, other = (engine.info.model.vocab_size for engine in (reference, test))
    if size != other:
        raise MoEdgeError(f"The engines have vocabularies of {size} and {other} tokens: not the same model.")


def steps(
    reference: Engine, tests: list[Engine], windows: np.ndarray, prefill: int, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray, Step, list[Step], np.ndarray]]:
    """Yield (phase, fed ids, reference step, test steps, the tokens that follow: -1 after the last).

    Where longrope changes its factors all engines read the text so far again, and all of it is compared.
    """
    length = windows.shape[1]
    again = {engine.info.model.rope_boundary for engine in (reference, *tests)} - {None}
    done, total = 0, len(windows) * length
    for window in windows:
        ids, targets = window[None], np.append(window[1:], -1)
        one, others = reference.prefill(ids[:, :prefill]), [test.prefill(ids[:, :prefill]) for test in tests]
        yield "prefill", ids[:, :prefill], one, others, targets[:prefill]
        done += prefill
        if progress:
            progress(done, total)
        for position in range(prefill, length):
            if position in again:
                text = ids[:, : position + 1]
                one, others = reference.prefill(text), [test.prefill(text) for test in tests]
                yield "prefill", text, one, others, targets[: position + 1]
            else:
                token = ids[:, position : position + 1]
                one = reference.decode(token, one.cache)
                others = [test.decode(token, other.cache) for test, other in zip(tests, others, strict=True)]
                yield "decode", token, one, others, targets[position : position + 1]
            done += 1
            if progress:
                progress(done, total)


def json_ready(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, with None."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
