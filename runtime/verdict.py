"""The verdict over one comparison: each figure against its limit, and in words what a failure means.

A check that compared nothing is not passed. Where it fails because the model leaves nothing to compare, it is not
decided: the verdict is then no pass either, and a note says why.
"""

from __future__ import annotations

import math
from typing import Any

from moedge.configs.tolerances import Profile
from moedge.export import targets

PASSED, FAILED, NOT_DECIDED = "passed", "failed", "not decided"


def replay_checks(result: dict[str, Any], limits: Profile) -> dict[str, list[dict[str, Any]]]:
    """Checks of a comparison with route replay by the part of the engine that they judge."""
    replayed, router = result["replay"]["phases"], result["replay"]["router"]
    arithmetic = [
        check for name, summary in replayed.items() for check in checks(f"arithmetic.{name}", summary, limits)
    ]
    agreement = limits.router_set_agreement
    assert agreement is not None
    selection = [entry("router.expert_set_agreement", router.get("agreement"), ">=", agreement)]
    # Free-running, the engine and the reference may run different experts, and every later layer and token sees that.
    # Only what no choice of experts explains is judged: broken rows, and a loss of quality beyond chance.
    free = [
        entry(f"free.{name}.{kind}_tokens", summary[kind], "<=", 0)
        for name, summary in result["phases"].items()
        for kind in ("non_finite", "constant")
    ]
    perplexity = result["overall"]["perplexity"]
    ratio, error = perplexity["ratio"], perplexity["standard_error"]
    drift = float("nan")
    if math.isfinite(ratio) and ratio > 0 and math.isfinite(error):
        drift = math.expm1(max(0.0, abs(math.log(ratio)) - 3 * error))
    free.append(entry("free.perplexity.drift_beyond_3_errors", drift, "<=", limits.perplexity_drift))
    return {"arithmetic": arithmetic, "router": selection, "free": free}


def checks(phase: str, summary: dict[str, Any], limits: Profile) -> list[dict[str, Any]]:
    """Checks of one phase's summary (:meth:`moedge.runtime.reduction.TokenErrors.summary`)."""
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
    # Near-ties are a property of the reference: too many of them leave the agreements without anything to compare.
    undecided = {"top1.near_tie_share"} if top1["near_ties_excluded"] else set()
    undecided |= {
        f"{name}.agreement" for name, found in (("top1", top1), ("top5", top5)) if found["near_tie_share"] == 1
    }
    return [
        entry(f"{phase}.{name}", value, relation, limit, decided=name not in undecided)
        for name, value, relation, limit in rows
    ]


def entry(name: str, value: float | None, relation: str, limit: float, *, decided: bool = True) -> dict[str, Any]:
    """One check. ``decided`` is False where a value beyond the limit is no fault of the engine under test."""
    passed = value is not None and bool(value <= limit if relation == "<=" else value >= limit)
    return {
        **{"name": name, "value": value, "relation": relation, "limit": limit, "passed": passed},
        "decided": passed or decided,
    }


def judge_ratio(result: dict[str, Any], baseline: dict[str, Any], limit: float) -> None:
    """Add to ``result`` the check that its mean KL is at most ``limit`` times that of ``baseline``, in place.

    Both are results of :func:`compare`, each against the float32 model that it was made from: quantising a converted
    model may cost little more than quantising its dense parent. The converted model is taken under route replay: what
    other experts cost is not the weights' error.
    """
    values = [(one.get("replay") or one)["overall"]["kl_ref_test"]["mean"] for one in (result, baseline)]
    ratio = values[0] / values[1] if values[0] is not None and values[1] else None
    verdict = result["verdict"]
    verdict["checks"].append(entry("kl_ratio_to_dense", ratio, "<=", limit))
    verdict["parts"]["ratio"] = verdict["checks"][-1]["passed"]
    verdict["passed"] = all(verdict["parts"].values())
    verdict["outcome"] = outcome(verdict["checks"])


def outcome(found: list[dict[str, Any]]) -> str:
    """``passed``, ``failed``, or ``not decided``: nothing failed, but something could not be judged."""
    missed = [check for check in found if not check["passed"]]
    if not missed:
        return PASSED
    return FAILED if any(check.get("decided", True) for check in missed) else NOT_DECIDED


def notes(result: dict[str, Any], found: list[dict[str, Any]], limits: Profile) -> list[str]:
    """What the checks that did not pass mean, in sentences; empty where the figures say it themselves.

    Checks that changed choices of experts explain are marked as not decided, in place.
    """
    said = []
    missed = [check for check in found if not check["passed"]]
    row = targets.known(str(result["test"]["model"].get("target", "")))
    half = result["test"]["dtype"] == "float16" and row is not None and row.engine is not None
    if half and any(check["name"].endswith("non_finite_tokens") for check in missed):
        said.append(
            "A value of this model leaves float16's range (65,504), so some logits are no numbers; export with --dtype "
            "bfloat16, which has float32's range."
        )
    if any(not check["decided"] for check in missed):
        phases = (result["replay"] or result)["phases"]
        share = max(phase["top1"]["near_tie_share"] for phase in phases.values() if phase["top1"]["near_ties_excluded"])
        said.append(
            f"Not decided: for {share:.0%} of the tokens the reference's best two logits are closer than this target's "
            f"arithmetic can tell apart (a gap of {limits.near_tie_margin / limits.near_tie_scale:.2g} of the largest "
            "logit), so whether both engines choose the same token proves nothing. Models without training answer like "
            "that; verify a trained model, or on another text (--text)."
        )
    missed = [check for check in missed if check["decided"]]
    if _changed_choices_explain(result, missed, limits):
        for check in missed:
            check["decided"] = False
        routing = result["routing"]
        said.append(
            f"Not decided: {routing['flips']:,} of {routing['decisions']:,} choices of experts differ, no more than "
            "the limits allow, and only tokens with a changed choice are too far off: all others are within the limits "
            "(same_choices in --json). The fewer layers and experts a model has, the more one choice weighs, and the "
            "limits are derived for about 30 layers; verify a model of that depth."
        )
    elif missed and not result["replay"] and result["routing"].get("flips"):
        routing, same = result["routing"], result["overall"]["same_choices"]
        differ = f"{routing['flips']:,} of {routing['decisions']:,} choices of experts differ"
        if same["tokens"]:
            said.append(
                f"{differ}. Rounding turns close decisions, and all later layers and tokens then read something else: "
                "these figures show how steady the model's routing is, besides what the engine computes. The "
                f"{same['tokens']:,} tokens whose choices all agree have a mean relative error of "
                f"{same['rel_error_mean']:.2g} (limit {limits.mean_rel_error:.2g}); the dense parent at this target "
                "shows the arithmetic alone."
            )
        else:
            said.append(
                f"{differ}, and no token has all of its choices as the reference has them: check that both are of the "
                "same model; the dense parent at this target shows the arithmetic alone."
            )
    return said


def quantised_note(result: dict[str, Any], kernels: dict[str, Any], target: str) -> None:
    """Say in ``result``, a quantised bundle against its checkpoint, whether the weights or the kernels are at fault.

    ``kernels`` is the same bundle against its own de-quantised weights.
    """
    verdict = result["verdict"]
    if verdict["outcome"] != FAILED or not kernels["verdict"]["passed"]:
        return
    if bool(result["reference"]["model"].get("routed")) != bool(result["test"]["model"].get("routed")):
        return  # a Mixture-of-Experts against its dense parent: the conversion is in the difference, too
    row = targets.find(target)
    wider = targets.sibling(row, 8) if row.calibrated else None
    instead = (
        f"take {wider.name}, or choose the integers on a text: moedge export CHECKPOINT OUT --target {target} "
        "--gptq TEXT"
        if wider
        else f"take {row.unquantised}, which is not quantised"
    )
    verdict["notes"].append(
        f"The bundle computes what its own weights say (the comparison with them passed), so it is their rounding to "
        f"{row.bits} bits that costs this model more than the limits allow; {instead}."
    )


_WORST = {
    "rel_error.mean": ("rel_error_mean", "mean_rel_error"),
    "kl_ref_test.max": ("kl_max", "max_kl"),
    "cosine.min": ("cosine_min", "min_cosine"),
}
"""Checks that one token can fail, by their name without the phase: what it is without changed tokens, its limit."""


def _changed_choices_explain(result: dict[str, Any], missed: list[dict[str, Any]], limits: Profile) -> bool:
    """Whether every failed check is one of :data:`_WORST` and holds on the tokens whose experts are the same."""
    if not missed or result["replay"] or not result["routing"].get("flips"):
        return False
    for check in missed:
        phase, _, name = check["name"].partition(".")
        if name not in _WORST or phase not in result["phases"]:
            return False
        key, limit = _WORST[name]
        same = result["phases"][phase]["same_choices"]
        allowed = getattr(limits, limit)
        if not same["tokens"] or not (same[key] >= allowed if check["relation"] == ">=" else same[key] <= allowed):
            return False
    return True
