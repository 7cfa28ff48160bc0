"""The verdict over one comparison: each figure against its limit, and in words what a failure means.

A verdict is a value with three outcomes. A check that compared nothing is not passed. Where it fails because the model
leaves nothing to compare, it is not decided: the verdict is then no pass either, and a note says why. :func:`judge` and
:func:`explain` are pure; what is decided later (:func:`with_ratio`, :func:`with_notes`) makes a new result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar, cast

from moedge.configs.tolerances import Profile
from moedge.export import targets
from moedge.runtime.device.moedge_compare import least_share
from moedge.runtime.parity.figures import CheckFacts, KeptFacts, Phase, Relation, Replayed, RouterFacts, VerdictFacts
from moedge.runtime.parity.results import Parity, by_phase


class Outcome(str, Enum):
    """What a check, a comparison or a whole run came to; the value is what JSON holds."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_DECIDED = "not decided"

    @classmethod
    def over(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """Return the outcome of several: one failure fails them; what is not decided is no pass, nor is nothing."""
        found = set(outcomes) or {cls.NOT_DECIDED}
        return next((outcome for outcome in (cls.FAILED, cls.NOT_DECIDED) if outcome in found), cls.PASSED)


AnyParity = TypeVar("AnyParity", bound=Parity)


@dataclass(frozen=True)
class Check:
    """One figure against its limit. ``decided`` is False where a value beyond the limit is no fault of the engine."""

    name: str
    value: float | None
    relation: Relation
    limit: float
    decided: bool = True

    @property
    def outcome(self) -> Outcome:
        """Passed or not; a value that does not exist (None, NaN) is within no limit."""
        if self.value is not None and (self.value <= self.limit if self.relation == "<=" else self.value >= self.limit):
            return Outcome.PASSED
        return Outcome.FAILED if self.decided else Outcome.NOT_DECIDED

    @property
    def passed(self) -> bool:
        """Whether the outcome is a pass."""
        return self.outcome is Outcome.PASSED

    def as_json(self) -> CheckFacts:
        """The check as results and report.json hold it."""
        return {
            "name": self.name,
            "value": self.value,
            "relation": self.relation,
            "limit": self.limit,
            "passed": self.passed,
            "decided": self.passed or self.decided,
        }


@dataclass(frozen=True)
class Verdict:
    """The checks of one comparison by the part of the engine that they judge."""

    parts: Mapping[str, tuple[Check, ...]]

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks in order."""
        return tuple(check for part in self.parts.values() for check in part)

    @property
    def missed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def outcome(self) -> Outcome:
        """The outcome over all checks."""
        return Outcome.over(check.outcome for check in self.checks)

    def undecided(self, names: Iterable[str]) -> Verdict:
        """Return the verdict with the checks of these names not decided where they do not pass."""
        odd = set(names)
        parts = {
            part: tuple(replace(check, decided=check.decided and check.name not in odd) for check in checks)
            for part, checks in self.parts.items()
        }
        return Verdict(parts)

    def as_json(self, notes: list[str]) -> VerdictFacts:
        """The verdict as results and report.json hold it."""
        return {
            "passed": self.outcome is Outcome.PASSED,
            "outcome": self.outcome.value,
            "parts": {name: all(check.passed for check in part) for name, part in self.parts.items()},
            "checks": [check.as_json() for check in self.checks],
            "notes": notes,
        }


def judge(result: Parity, limits: Profile, *, routing: bool) -> Verdict:
    """Hold the figures of one comparison to their limits.

    Args:
        result: what :func:`moedge.runtime.parity.compare` returns, without its verdict.
        routing: judge the expert sets of a free-running comparison.
    """
    if result["replay"]:
        return Verdict(_replay_parts(result, result["replay"], limits))
    whole = [check for name, summary in by_phase(result).items() for check in phase_checks(name, summary, limits)]
    if routing and limits.expert_set_agreement is not None:
        agreement = result["routing"].get("agreement")
        whole.append(Check("routing.expert_set_agreement", agreement, ">=", limits.expert_set_agreement))
    verdict = Verdict({"whole": tuple(whole)})
    if _changed_choices_explain(result, verdict, limits):
        return verdict.undecided(check.name for check in verdict.missed)
    return verdict


def _replay_parts(result: Parity, replay: Replayed, limits: Profile) -> dict[str, tuple[Check, ...]]:
    replayed, router = by_phase(replay), replay["router"]
    arithmetic = [
        check for name, summary in replayed.items() for check in phase_checks(f"arithmetic.{name}", summary, limits)
    ]
    parts: dict[str, tuple[Check, ...]] = {"arithmetic": tuple(arithmetic)}
    if router["compared"] or result["test"]["model"].get("routed"):
        parts["router"] = router_checks(router, limits)
    if "kept" in replay:
        parts["kept"] = kept_checks(replay["kept"], limits)
    return {**parts, "free": free_checks(result, limits)}


FIRST_CHANGES = "text.first_changes.no_ties"
"""Beside a kept reference: windows whose first changed choice is no near tie (:mod:`.against`)."""
FREE_ERRORS = 4
"""Standard errors that are chance in a free-running comparison: two right engines that round otherwise are two draws.

At 3 errors one in 370 of such checks fails; with three to six in a run that is a run in a hundred. At 4 it is one in
16,000 (a normal mean of 2,000 tokens; the spread over windows gives the same error), and 2 % of perplexity lost on as
many tokens is still found.
"""


def free_checks(result: Parity, limits: Profile) -> tuple[Check, ...]:
    """Return what is judged of a free-running comparison whose choices differ.

    The engine and the reference may run different experts then, and every later layer and token sees that. Only what no
    choice of experts explains is judged: broken rows, and a loss of quality beyond chance.
    """
    free = [
        Check(f"free.{name}.{kind}_tokens", count, "<=", 0)
        for name, summary in by_phase(result).items()
        for kind, count in (("non_finite", summary["non_finite"]), ("constant", summary["constant"]))
    ]
    perplexity = result["overall"]["perplexity"]
    ratio, error = perplexity["ratio"], perplexity["standard_error"]
    drift = float("nan")
    if math.isfinite(ratio) and ratio > 0 and math.isfinite(error):
        drift = math.expm1(max(0.0, abs(math.log(ratio)) - FREE_ERRORS * error))
    free.append(Check("free.perplexity.drift_beyond_errors", drift, "<=", limits.perplexity_drift))
    return tuple(free)


def router_checks(router: RouterFacts, limits: Profile) -> tuple[Check, ...]:
    """Whether the routers chose right for what they read, under limits that have ``router_set_agreement``."""
    agreement = limits.router_set_agreement
    assert agreement is not None
    selection = [Check("router.expert_set_agreement", router.get("agreement"), ">=", agreement)]
    # A float32 engine is ONNX Runtime's, whose graph shows its scores: where it does not, the choice is made otherwise.
    if limits.expert_set_agreement is not None or router.get("own_order") is not None:
        selection.append(Check("router.own_order", router.get("own_order"), ">=", 1.0))
    if limits.router_input_rel_error is not None:
        error = router.get("input_rel_error")
        selection.append(Check("router.input_rel_error", error, "<=", limits.router_input_rel_error))
    return tuple(selection)


def kept_checks(kept: KeptFacts, limits: Profile) -> tuple[Check, ...]:
    """Whether an engine left out what the thresholds say of the values that it shows."""
    # No rounding comes before the comparison with a threshold, so nothing less than all of them is right.
    checks = [Check("kept.agreement", kept.get("agreement"), ">=", 1.0)]
    if limits.kept_input_rel_error is not None:
        checks.append(Check("kept.input_rel_error", kept.get("input_rel_error"), "<=", limits.kept_input_rel_error))
    return tuple(checks)


def phase_checks(phase: str, summary: Phase, limits: Profile) -> list[Check]:
    """Return the checks of one phase's summary (:meth:`moedge.runtime.parity.metrics.TokenErrors.summary`)."""
    top1, top5, ratio = summary["top1"], summary["top5"], summary["perplexity"]["ratio"]
    rows: list[tuple[str, float, Relation, float]] = [
        ("non_finite_tokens", summary["non_finite"], "<=", 0),
        ("constant_tokens", summary["constant"], "<=", 0),
        ("rel_error.median", summary["rel_error"]["p50"], "<=", limits.median_rel_error),
        ("rel_error.mean", summary["rel_error"]["mean"], "<=", limits.mean_rel_error),
        ("kl_ref_test.mean", summary["kl_ref_test"]["mean"], "<=", limits.mean_kl),
        ("kl_ref_test.max", summary["kl_ref_test"]["max"], "<=", limits.max_kl),
        ("kl_test_ref.mean", summary["kl_test_ref"]["mean"], "<=", limits.mean_kl),
        ("top1.agreement", top1["agreement"], ">=", least_share(limits.top1_agreement, top1["compared"])),
        ("top5.agreement", top5["agreement"], ">=", least_share(limits.top5_agreement, top5["compared"])),
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
        Check(f"{phase}.{name}", value, relation, limit, decided=name not in undecided)
        for name, value, relation, limit in rows
    ]


def with_ratio(result: AnyParity, baseline: Parity, limit: float) -> AnyParity:
    """Return ``result`` with the check that its mean KL is at most ``limit`` times that of ``baseline``.

    Both are results of :func:`compare`, each against the float32 model that it was made from: quantising a converted
    model may cost little more than quantising its dense parent. The converted model is taken under route replay: what
    other experts cost is not the weights' error.
    """
    values = [(one.get("replay") or one)["overall"]["kl_ref_test"]["mean"] for one in (result, baseline)]
    ratio = values[0] / values[1] if values[0] is not None and values[1] else None
    check, before = Check("kl_ratio_to_dense", ratio, "<=", limit), result["verdict"]
    outcome = Outcome.over([Outcome(before["outcome"]), check.outcome])
    judged: VerdictFacts = {
        **before,
        "passed": outcome is Outcome.PASSED,
        "outcome": outcome.value,
        "parts": {**before["parts"], "ratio": check.passed},
        "checks": [*before["checks"], check.as_json()],
    }
    return _with_verdict(result, judged)


def with_notes(result: AnyParity, notes: Iterable[str]) -> AnyParity:
    """Return ``result`` with further sentences for people."""
    return _with_verdict(result, {**result["verdict"], "notes": [*result["verdict"]["notes"], *notes]})


def _with_verdict(result: AnyParity, judged: VerdictFacts) -> AnyParity:
    return cast("AnyParity", {**result, "verdict": judged})


def outcome_of(check: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a check, or of an entry that only passes or not, as JSON holds it."""
    if check["passed"]:
        return Outcome.PASSED
    return Outcome.FAILED if check.get("decided", True) else Outcome.NOT_DECIDED


def entry_outcome(entry: Mapping[str, Any]) -> Outcome:
    """Return the outcome of one comparison or identity check as JSON holds it; results of older versions, too."""
    if "verdict" not in entry:
        return outcome_of(entry)
    return Outcome.over(map(outcome_of, entry["verdict"]["checks"]))


def part_outcome(entry: Mapping[str, Any], part: str) -> Outcome:
    """Return the outcome of the checks of one part: those whose names begin with it."""
    checks = [check for check in entry["verdict"]["checks"] if f"{check['name']}.".startswith(f"{part}.")]
    return Outcome.over(map(outcome_of, checks))


def run_outcome(verification: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a verify result (schema ``moedge.verify/1``) over all of its comparisons."""
    more = (*verification.get("shapes", ()), *verification.get("accuracy", ()))
    entries = (*verification["identity"], *verification["parity"], *more)
    return Outcome.over(map(entry_outcome, entries))


def explain(result: Parity, verdict: Verdict, limits: Profile) -> list[str]:
    """Say in sentences what the checks that did not pass mean; empty where the figures say it themselves."""
    said = []
    limit, longest = (result["test"]["model"].get(key) for key in ("rope_boundary", "max_length"))
    if limit is not None and result["tokens"]["window"] <= limit < (longest or 0):
        said.append(
            f"Beyond {limit:,} tokens this model's rotary factors change (longrope), and these windows of "
            f"{result['tokens']['window']:,} end before: that part was not compared; --window {limit + 32} does."
        )
    missed = verdict.missed
    row = targets.known(str(result["test"]["model"].get("target", "")))
    half = result["test"]["dtype"] == "float16" and row is not None and row.engine is not None
    if half and any(check.name.endswith("non_finite_tokens") for check in missed):
        said.append(
            "A value of this model leaves float16's range (65,504), so some logits are no numbers; export with --half "
            "bfloat16, which has float32's range."
        )
    if any(not check.decided and ".top" in check.name for check in missed):
        said.append(_near_ties_said(result, limits))
    routing = result["routing"]
    wrong_choice = any(check.name == FIRST_CHANGES and check.outcome is Outcome.FAILED for check in missed)
    if any(not check.decided and _bare(check) in _WORST for check in missed) and routing.get("flips"):
        said.append(
            f"Not decided: {routing['flips']:,} of {routing['decisions']:,} choices of experts differ, no more than "
            "the limits allow, and only tokens with a changed choice are too far off: all others are within the limits "
            "(same_choices in --json). The fewer layers and experts a model has, the more one choice weighs, and the "
            "limits are derived for about 30 layers; verify a model of that depth."
        )
    elif any(check.decided for check in missed) and not result["replay"] and routing.get("flips") and not wrong_choice:
        said.append(_changed_choices_said(result, limits))
    replay = result["replay"]
    kept = replay.get("kept") if replay else None
    if kept and kept.get("wrong"):
        said.append(
            f"{kept['wrong']:,} of {kept['decisions']:,} values were kept or left out otherwise than "
            "the model's thresholds say of what the engine itself shows: its thresholds or its ramp are others."
        )
    if replay and routing.get("flips") and limits.expert_set_agreement is not None:
        said.append(_replayed_said(result, replay, limits))
    return said


def _near_ties_said(result: Parity, limits: Profile) -> str:
    phases = by_phase(result["replay"] or result)
    share = max(phase["top1"]["near_tie_share"] for phase in phases.values() if phase["top1"]["near_ties_excluded"])
    return (
        f"Not decided: for {share:.0%} of the tokens the reference's best two logits are closer than this target's "
        f"arithmetic can tell apart (a gap of {limits.near_tie_margin / limits.near_tie_scale:.2g} of the largest "
        "logit), so whether both engines choose the same token proves nothing. Models without training answer like "
        "that; verify a trained model, or on another text (--text)."
    )


def _changed_choices_said(result: Parity, limits: Profile) -> str:
    routing, same = result["routing"], result["overall"]["same_choices"]
    differ = f"{routing['flips']:,} of {routing['decisions']:,} choices of experts differ"
    if not same["tokens"]:
        return (
            f"{differ}, and no token has all of its choices as the reference has them: check that both are of the "
            "same model; the dense parent at this target shows the arithmetic alone."
        )
    return (
        f"{differ}. Rounding turns close decisions, and all later layers and tokens then read something else: "
        "these figures show how steady the model's routing is, besides what the engine computes. The "
        f"{same['tokens']:,} tokens whose choices all agree have a mean relative error of "
        f"{same['rel_error_mean']:.2g} (limit {limits.mean_rel_error:.2g}); the dense parent at this target "
        "shows the arithmetic alone."
    )


def _replayed_said(result: Parity, replay: Replayed, limits: Profile) -> str:
    """What happened where a float32 engine chose other experts than the reference."""
    routing, router = result["routing"], replay["router"]
    wrong = router["flips"] - router["ties"]
    differ = f"{routing['flips']:,} of {routing['decisions']:,} choices of experts differ from the reference's"
    again = f"The texts that hold one ({replay['tokens']:,} tokens) were compared again"
    if router["own_order"] is None or router["own_order"] < 1:
        return (
            f"{differ}. {again}: the engine does not choose the best of its own scores, with ties to the lower index, "
            "or its graph does not show them."
        )
    if wrong:
        return (
            f"{differ}. {again}: {wrong:,} choices are wrong for what the engine's own router read, by more than "
            f"rounding ({limits.router_tie_margin:.2g} of the layer's largest score)."
        )
    return (
        f"{differ}: experts tie where their scores are equal up to rounding, as gates that are closed make them, and "
        f"then either choice is right. {again} with the reference running the experts that the engine chose, and every "
        "choice is right for what the engine's own router read."
    )


def quantised_notes(result: Parity, kernels: Parity, target: str) -> list[str]:
    """Say of ``result``, a quantised bundle against its checkpoint, whether the weights or the kernels are at fault.

    ``kernels`` is the same bundle against its own de-quantised weights. Nothing is said where neither is.
    """
    if entry_outcome(result) is not Outcome.FAILED or entry_outcome(kernels) is not Outcome.PASSED:
        return []
    if bool(result["reference"]["model"].get("routed")) != bool(result["test"]["model"].get("routed")):
        return []  # a Mixture-of-Experts against its dense parent: the conversion is in the difference, too
    row = targets.find(target)
    wider = targets.sibling(row, 8) if row.calibrated else None
    instead = (
        f"take {wider.name}, or choose the integers on a text: moedge export CHECKPOINT OUT --target {target} "
        "--gptq TEXT"
        if wider
        else f"take {row.unquantised}, which is not quantised"
    )
    return [
        f"The bundle computes what its own weights say (the comparison with them passed), so it is their rounding to "
        f"{row.bits} bits that costs this model more than the limits allow; {instead}."
    ]


_WORST = {
    "rel_error.mean": ("rel_error_mean", "mean_rel_error"),
    "kl_ref_test.max": ("kl_max", "max_kl"),
    "cosine.min": ("cosine_min", "min_cosine"),
}
"""Checks that one token can fail, by their name without the phase: what it is without changed tokens, its limit."""


def _bare(check: Check) -> str:
    """Name of a free-running check without its phase."""
    return check.name.partition(".")[2]


def _changed_choices_explain(result: Parity, verdict: Verdict, limits: Profile) -> bool:
    """Whether every check that failed is one of :data:`_WORST` and holds on the tokens whose experts are the same."""
    missed = [check for check in verdict.missed if check.decided]
    if not missed or not result["routing"].get("flips"):
        return False
    for check in missed:
        phase, _, name = check.name.partition(".")
        if name not in _WORST or phase not in result["phases"]:
            return False
        key, limit = _WORST[name]
        same = cast("dict[str, float]", by_phase(result)[phase]["same_choices"])
        allowed = getattr(limits, limit)
        if not same["tokens"] or not (same[key] >= allowed if check.relation == ">=" else same[key] <= allowed):
            return False
    return True
