"""Compare two engines on the same tokens: logits, distributions, choices and routing.

Every window is a prefill of its first tokens followed by teacher-forced decoding of the rest, one token at a time, so
each token of the text is compared once, in one of the two phases. Logits are reduced to a few numbers per token in
float64 and dropped at once, so memory does not grow with the text (llama.cpp's KL tool needs an 11-37 GB file for it).

Symbols: a reference logits, b test logits, p = softmax(a), q = softmax(b), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.configs.tolerances import Profile
from moedge.runtime.engines import Engine, ReplayEngine, Step
from moedge.runtime.reduction import RouteAgreement, TokenErrors
from moedge.runtime.replay import Replay

SCHEMA = "moedge.parity/1"
Progress = Callable[[int, int], None]


def compare(
    reference: Engine,
    test: Engine,
    token_windows: np.ndarray,
    *,
    prefill: int,
    tolerances: Mapping[str, Any] | Profile,
    routing: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare ``test`` with ``reference`` and judge the difference.

    Args:
        reference: engine whose answers count as right.
        test: engine under test. Open both with ``taps=True`` to compare routing.
        token_windows: int64 [N, L], N texts of L tokens.
        prefill: tokens of each window that are prefilled before decoding starts, 1..L-2.
        tolerances: limits, a :class:`moedge.configs.tolerances.Profile` or its fields.
        routing: judge expert sets. When both models route tokens and one engine has no taps, the verdict is then
            "failed": what was not looked at is not passed. Pass False only where a target cannot be tapped.
            Limits with ``router_set_agreement`` judge a routed model by route replay (:mod:`moedge.runtime.replay`):
            open the reference with ``replay=True`` and the test with ``router_inputs=True`` too.
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
    tests: Mapping[str, tuple[Engine, Mapping[str, Any] | Profile]],
    token_windows: np.ndarray,
    *,
    prefill: int,
    routing: bool = True,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare several engines with one reference, which runs once; see :func:`compare`.

    Args:
        tests: label -> (engine, its limits).
    """
    limits = {label: Profile.of(tolerances) for label, (_, tolerances) in tests.items()}
    windows = _check(reference, [test for test, _ in tests.values()], token_windows, prefill)
    phases = {
        label: {phase: TokenErrors(limit.near_tie_margin) for phase in ("prefill", "decode")}
        for label, limit in limits.items()
    }
    routes = {label: RouteAgreement() for label in tests}
    engines = [test for test, _ in tests.values()]
    replays = {
        label: Replay(_replaying(reference, test), limits[label])
        for label, (test, _) in tests.items()
        if routing and limits[label].router_set_agreement is not None and _both_routed(reference, test)
    }
    for phase, ids, one, others, targets in _steps(reference, engines, windows, prefill, progress):
        for label, two in zip(tests, others, strict=True):
            phases[label][phase].add(one.logits[0], two.logits[0], targets)
            routes[label].add(one.routes, two.routes)
            if label in replays:
                replays[label].add(phase, ids, two, targets)
    return {
        label: _judged(
            reference, test, windows, prefill, phases[label], routes[label], limits[label], routing, replays.get(label)
        )
        for label, (test, _) in tests.items()
    }


def _both_routed(reference: Engine, test: Engine) -> bool:
    return bool(reference.info.model.get("routed") and test.info.model.get("routed"))


def _replaying(reference: Engine, test: Engine) -> ReplayEngine:
    if not isinstance(reference, ReplayEngine):
        raise MoEdgeError(
            f"{test.info.name} is judged under its own choice of experts, which {reference.info.name} cannot replay; "
            "compare it with the portable bundle or the checkpoint."
        )
    return reference


def _judged(
    reference: Engine,
    test: Engine,
    windows: np.ndarray,
    prefill: int,
    phases: dict[str, TokenErrors],
    routes: RouteAgreement,
    limits: Profile,
    routing: bool,
    replay: Replay | None,
) -> dict[str, Any]:
    summaries = {name: tokens.summary() for name, tokens in phases.items()}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "reference": asdict(reference.info),
        "test": asdict(test.info),
        "tokens": {
            "windows": len(windows),
            "window": windows.shape[1],
            "prefill": prefill,
            **{name: summary["tokens"] for name, summary in summaries.items()},
        },
        "phases": summaries,
        "overall": TokenErrors.merged(list(phases.values())).summary(),
        "routing": routes.summary(),
        "replay": replay.summary() if replay else None,
        "tolerances": limits.model_dump(),
    }
    if replay:
        parts = _replay_checks(result, limits)
    else:
        whole = [check for name, summary in summaries.items() for check in _checks(name, summary, limits)]
        if (
            routing
            and limits.expert_set_agreement is not None
            and (_both_routed(reference, test) or result["routing"]["compared"])
        ):
            agreement = result["routing"].get("agreement")
            whole.append(_check_entry("routing.expert_set_agreement", agreement, ">=", limits.expert_set_agreement))
        parts = {"whole": whole}
    checks = [check for part in parts.values() for check in part]
    result["verdict"] = {
        "passed": all(check["passed"] for check in checks),
        "parts": {name: all(check["passed"] for check in part) for name, part in parts.items()},
        "checks": checks,
    }
    return _json_ready(result)


def _replay_checks(result: dict[str, Any], limits: Profile) -> dict[str, list[dict[str, Any]]]:
    """Checks of a comparison with route replay by the part of the engine that they judge."""
    replayed, router = result["replay"]["phases"], result["replay"]["router"]
    arithmetic = [
        check for name, summary in replayed.items() for check in _checks(f"arithmetic.{name}", summary, limits)
    ]
    agreement = limits.router_set_agreement
    assert agreement is not None
    selection = [_check_entry("router.expert_set_agreement", router.get("agreement"), ">=", agreement)]
    # Free-running, the engine and the reference may run different experts, and every later layer and token sees that.
    # Only what no choice of experts explains is judged: broken rows, and a loss of quality beyond chance.
    free = [
        _check_entry(f"free.{name}.{kind}_tokens", summary[kind], "<=", 0)
        for name, summary in result["phases"].items()
        for kind in ("non_finite", "constant")
    ]
    perplexity = result["overall"]["perplexity"]
    ratio, error = perplexity["ratio"], perplexity["standard_error"]
    drift = float("nan")
    if math.isfinite(ratio) and ratio > 0 and math.isfinite(error):
        drift = math.expm1(max(0.0, abs(math.log(ratio)) - 3 * error))
    free.append(_check_entry("free.perplexity.drift_beyond_3_errors", drift, "<=", limits.perplexity_drift))
    return {"arithmetic": arithmetic, "router": selection, "free": free}


def identity(
    reference: Engine,
    test: Engine,
    token_windows: np.ndarray,
    *,
    limit: float,
    prefill: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check that a model with every expert selected is its dense parent.

    Args:
        reference: the dense parent.
        test: the MoE, opened with ``top_k`` so large that every expert runs.
        token_windows: int64 [N, L].
        limit: for the maximum over all tokens of max|a-b| / max|a| (``Profile.identity_rel_error``).
        prefill: tokens before teacher-forced decoding starts; half of the window by default.
        progress: called with (tokens done, tokens in all).

    Returns:
        ``{"schema": "moedge.identity/1", "reference", "test", "tokens", "max_rel_error", "limit", "passed"}``.

    Raises:
        MoEdgeError: as for :func:`compare`.
    """
    tests = {"": (test, limit)}
    return identity_all(reference, tests, token_windows, prefill=prefill, progress=progress)[""]


def identity_all(
    reference: Engine,
    tests: Mapping[str, tuple[Engine, float]],
    token_windows: np.ndarray,
    *,
    prefill: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Check several engines against one dense parent, which runs once; see :func:`identity`.

    Args:
        tests: label -> (engine, its limit).
    """
    prefill = token_windows.shape[-1] // 2 if prefill is None else prefill
    engines = [test for test, _ in tests.values()]
    windows = _check(reference, engines, token_windows, prefill)
    tokens = {label: TokenErrors(0.0) for label in tests}
    for _, _, one, others, targets in _steps(reference, engines, windows, prefill, progress):
        for label, two in zip(tests, others, strict=True):
            tokens[label].add(one.logits[0], two.logits[0], targets)
    return {
        label: _identical(reference, test, tokens[label].summary(), limit) for label, (test, limit) in tests.items()
    }


def _identical(reference: Engine, test: Engine, summary: dict[str, Any], limit: float) -> dict[str, Any]:
    clean = summary["non_finite"] == 0 and summary["constant"] == 0
    worst = summary["rel_error"]["max"] if clean else float("nan")
    return _json_ready(
        {
            "schema": "moedge.identity/1",
            "reference": asdict(reference.info),
            "test": asdict(test.info),
            "tokens": summary["tokens"],
            "max_rel_error": worst,
            "limit": limit,
            "passed": bool(worst <= limit),
        }
    )


def _check(reference: Engine, tests: list[Engine], token_windows: np.ndarray, prefill: int) -> np.ndarray:
    windows = np.asarray(token_windows, dtype=np.int64)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 3:
        raise MoEdgeError(f"Parity needs token windows [N, L >= 3], not shape {windows.shape}.")
    if not 1 <= prefill <= windows.shape[1] - 2:  # the last token has no successor to score
        raise MoEdgeError(f"prefill={prefill} must be between 1 and {windows.shape[1] - 2} (window - 2).")
    size, *others = (engine.info.model["vocab_size"] for engine in (reference, *tests))
    for other in others:
        if size != other:
            raise MoEdgeError(f"The engines have vocabularies of {size} and {other} tokens: not the same model.")
    return windows


def _steps(
    reference: Engine, tests: list[Engine], windows: np.ndarray, prefill: int, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray, Step, list[Step], np.ndarray]]:
    """Yield (phase, fed ids, reference step, test steps, the tokens that follow: -1 after the last)."""
    length = windows.shape[1]
    done, total = 0, len(windows) * length
    for window in windows:
        ids, targets = window[None], np.append(window[1:], -1)
        one, others = reference.prefill(ids[:, :prefill]), [test.prefill(ids[:, :prefill]) for test in tests]
        yield "prefill", ids[:, :prefill], one, others, targets[:prefill]
        done += prefill
        if progress:
            progress(done, total)
        for position in range(prefill, length):
            token = ids[:, position : position + 1]
            one = reference.decode(token, one.cache)
            others = [test.decode(token, other.cache) for test, other in zip(tests, others, strict=True)]
            yield "decode", token, one, others, targets[position : position + 1]
            done += 1
            if progress:
                progress(done, total)


def _checks(phase: str, summary: dict[str, Any], limits: Profile) -> list[dict[str, Any]]:
    top1, top5, ratio = summary["top1"], summary["top5"], summary["perplexity"]["ratio"]
    rows: list[tuple[str, float, str, float]] = [
        ("non_finite_tokens", summary["non_finite"], "<=", 0),
        ("constant_tokens", summary["constant"], "<=", 0),
        ("rel_error.median", summary["rel_error"]["p50"], "<=", limits.median_rel_error),
        ("rel_error.mean", summary["rel_error"]["mean"], "<=", limits.mean_rel_error),
        ("kl_ref_test.mean", summary["kl_ref_test"]["mean"], "<=", limits.mean_kl),
        ("kl_ref_test.max", summary["kl_ref_test"]["max"], "<=", limits.max_kl),
        ("kl_test_ref.mean", summary["kl_test_ref"]["mean"], "<=", limits.mean_kl),
        ("top1.agreement", top1["agreement"], ">=", limits.top1_agreement),
        ("top5.agreement", top5["agreement"], ">=", limits.top5_agreement),
        ("top1.near_tie_share", top1["near_tie_share"], "<=", limits.max_near_tie_share),
        ("perplexity.drift", abs(ratio - 1), "<=", limits.perplexity_drift),
    ]
    if limits.min_cosine is not None:
        rows.insert(6, ("cosine.min", summary["cosine"]["min"], ">=", limits.min_cosine))
    return [_check_entry(f"{phase}.{name}", value, relation, limit) for name, value, relation, limit in rows]


def _check_entry(name: str, value: float | None, relation: str, limit: float) -> dict[str, Any]:
    passed = value is not None and bool(value <= limit if relation == "<=" else value >= limit)
    return {"name": name, "value": value, "relation": relation, "limit": limit, "passed": passed}


def judge_ratio(entry: dict[str, Any], baseline: dict[str, Any], limit: float) -> None:
    """Add to ``entry`` the check that its mean KL is at most ``limit`` times that of ``baseline``, in place.

    Both are results of :func:`compare`, each against the float32 model that it was made from: quantising a converted
    model may cost little more than quantising its dense parent. The converted model is taken under route replay: what
    other experts cost is not the weights' error.
    """
    values = [(result.get("replay") or result)["overall"]["kl_ref_test"]["mean"] for result in (entry, baseline)]
    ratio = values[0] / values[1] if values[0] is not None and values[1] else None
    verdict = entry["verdict"]
    verdict["checks"].append(_check_entry("kl_ratio_to_dense", ratio, "<=", limit))
    verdict["parts"]["ratio"] = verdict["checks"][-1]["passed"]
    verdict["passed"] = all(verdict["parts"].values())


def _json_ready(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, with None."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
