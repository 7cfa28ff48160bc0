"""Parity must see every kind of damage, and excuse only what the fixed near-tie margin excuses."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.runtime.engines import Step, open_engine
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.parity import verdict
from moedge.runtime.parity.compare import compare, identity_all

VOCAB, LENGTH, WINDOWS, PREFILL, LAYERS, EXPERTS, TOP_K = 50, 12, 3, 5, 2, 8, 3
LIMITS = tolerances.load().profile("float32", "ort-cpu")
Damage = Callable[[np.ndarray, int, str], np.ndarray]


def with_facts(info: EngineInfo, **changes: Any) -> EngineInfo:
    """The same engine with other facts about its model."""
    return replace(info, model=info.model.model_copy(update=changes))


class Scripted:
    """Logits depend on the token and its position; ``damage(logits [V], position, phase)`` spoils them."""

    def __init__(self, damage: Damage | None = None, taps: bool = False, flips: dict[int, list[int]] | None = None):
        generator = np.random.default_rng(0)
        self.table = generator.normal(0, 4, (VOCAB, LENGTH, VOCAB)).astype(np.float32)
        # A clear winner and a clear 5th place in every row, so that only planted gaps are near-ties.
        order = np.argsort(-self.table, axis=2)[:, :, :6]
        np.put_along_axis(self.table, order, np.float32([20, 18, 17, 16, 15, 13]), 2)
        self.routes = [
            generator.permuted(np.tile(np.arange(EXPERTS), (LENGTH, 1)), axis=1)[:, :TOP_K] for _ in range(LAYERS)
        ]
        self.damage = damage or (lambda logits, position, phase: logits)
        self.taps, self.flips = taps, flips or {}
        self.info = EngineInfo(
            "scripted", "numpy", "CPU", "float32", 1, EngineModel(vocab_size=VOCAB, moe=taps, routed=taps)
        )

    def _step(self, ids: np.ndarray, start: int, phase: str) -> Step:
        rows = [self.damage(self.table[t, start + i].copy(), start + i, phase) for i, t in enumerate(ids[0])]
        routes = None
        if self.taps:
            routes = {}
            for layer, chosen in enumerate(self.routes):
                chosen = chosen[start : start + len(rows)].copy()
                for position in self.flips.get(layer, []):
                    if start <= position < start + len(rows):
                        row = chosen[position - start]
                        row[0] = next(e for e in range(EXPERTS) if e not in row)
                routes[layer] = chosen.astype(np.int32)
        return Step(np.stack(rows)[None], start + len(rows), routes)

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        return self._step(ids, 0, "prefill")

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        return self._step(ids, cache, "decode")

    def close(self) -> None:
        pass


IDS = np.random.default_rng(3).integers(0, VOCAB, (WINDOWS, LENGTH))


def run(damage: Damage | None = None, **options: Any) -> dict[str, Any]:
    limits = options.pop("tolerances", LIMITS)
    taps = options.pop("taps", False)
    test = Scripted(damage, taps=taps, flips=options.pop("flips", None))
    return compare(Scripted(taps=taps), test, IDS, prefill=PREFILL, tolerances=limits, **options)


def failed(result: dict[str, Any]) -> set[str]:
    return {check["name"] for check in result["verdict"]["checks"] if not check["passed"]}


def test_equal_engines_pass_with_nothing_to_report() -> None:
    seen: list[tuple[int, int]] = []
    result = run(taps=True, progress=lambda done, total: seen.append((done, total)))
    assert result["verdict"]["passed"]
    assert result["tokens"]["prefill"] == WINDOWS * PREFILL
    assert result["tokens"]["decode"] == WINDOWS * (LENGTH - PREFILL)
    for phase in ("prefill", "decode"):
        summary = result["phases"][phase]
        assert summary["abs_error"] == {"max": 0.0, "mean": 0.0}
        assert summary["kl_ref_test"]["max"] == 0.0
        assert summary["top1"]["agreement"] == summary["top5"]["agreement"] == 1.0
        assert summary["perplexity"]["ratio"] == 1.0
    assert result["routing"]["agreement"] == 1.0
    assert seen[-1] == (WINDOWS * LENGTH,) * 2
    json.dumps(result, allow_nan=False)


def test_numbers_equal_their_definitions() -> None:
    noise = np.random.default_rng(5).normal(0, 0.3, (LENGTH, VOCAB)).astype(np.float32)
    result = run(lambda logits, position, phase: logits + noise[position])
    table = Scripted().table
    a = np.concatenate([table[row, np.arange(LENGTH)] for row in IDS]).astype(np.float64)
    b = np.concatenate([table[row, np.arange(LENGTH)] + noise for row in IDS]).astype(np.float64)
    p, q = special.softmax(a, 1), special.softmax(b, 1)
    kl = np.array([stats.entropy(x, y) for x, y in zip(p, q, strict=True)])
    back = np.array([stats.entropy(y, x) for x, y in zip(p, q, strict=True)])
    got = result["overall"]
    assert got["kl_ref_test"]["mean"] == pytest.approx(kl.mean(), rel=1e-9)
    assert got["kl_ref_test"]["p99.9"] == pytest.approx(np.percentile(kl, 99.9), rel=1e-9)
    assert got["kl_test_ref"]["max"] == pytest.approx(back.max(), rel=1e-9)
    assert got["abs_error"]["max"] == pytest.approx(np.abs(a - b).max())
    assert got["abs_error"]["mean"] == pytest.approx(np.abs(a - b).mean())
    assert got["rel_error"]["max"] == pytest.approx((np.abs(a - b).max(1) / np.abs(a).max(1)).max())
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert got["cosine"]["min"] == pytest.approx(cosine.min())
    following = IDS[:, 1:].reshape(-1)
    rows = np.arange(WINDOWS * LENGTH).reshape(WINDOWS, LENGTH)[:, :-1].reshape(-1)
    assert got["perplexity"]["reference"] == pytest.approx(np.exp(-np.log(p[rows, following]).mean()))
    assert got["perplexity"]["test"] == pytest.approx(np.exp(-np.log(q[rows, following]).mean()))
    top5 = [set(x) == set(y) for x, y in zip(np.argsort(-a)[:, :5], np.argsort(-b)[:, :5], strict=True)]
    assert got["top5"]["agreement_with_near_ties"] == pytest.approx(np.mean(top5))
    assert got["tokens"] == sum(phase["tokens"] for phase in result["phases"].values())


def test_figures_are_known_window_by_window() -> None:
    noise = np.random.default_rng(5).normal(0, 0.3, (LENGTH, VOCAB)).astype(np.float32)
    result = run(lambda logits, position, phase: logits + noise[position])
    for phase in ("prefill", "decode"):
        found, summary = result["by_window"][phase], result["phases"][phase]
        assert {len(values) for values in found.values()} == {WINDOWS}
        for name in ("rel_error.mean", "kl_ref_test.mean", "kl_test_ref.mean", "kl_ref_test.max"):
            figure, _, kind = name.partition(".")
            over = np.max if kind == "max" else np.mean
            assert over(found[name]) == pytest.approx(summary[figure][kind], rel=1e-9)
    drift = np.mean(result["by_window"]["prefill"]["perplexity.drift"])
    assert np.exp(drift) == pytest.approx(result["phases"]["prefill"]["perplexity"]["ratio"], rel=1e-9)
    broken = run(lambda logits, position, phase: np.full_like(logits, np.nan) if position == 2 else logits)
    assert broken["by_window"]["prefill"] == {}, "windows that are not alike are not paired"


def exchange_best_two(gap: float) -> tuple[Damage, Damage]:
    """(reference, test): at position 7 the best two logits are ``gap`` apart, and exchanged in the test."""

    def plant(logits: np.ndarray) -> tuple[int, int]:
        one, two = np.argsort(-logits)[:2]
        logits[two] = logits[one] - gap
        return one, two

    def reference(logits: np.ndarray, position: int, phase: str) -> np.ndarray:
        if position == 7:
            plant(logits)
        return logits

    def test(logits: np.ndarray, position: int, phase: str) -> np.ndarray:
        if position == 7:
            one, two = plant(logits)
            logits[[one, two]] = logits[[two, one]]
        return logits

    return reference, test


@pytest.mark.parametrize(("factor", "excused"), [(0.5, True), (2.0, False)])
@pytest.mark.parametrize("size", [1.0, 0.01, 10.0])
def test_only_the_fixed_margin_excuses_a_changed_choice(size: float, factor: float, excused: bool) -> None:
    """The margin belongs to a largest logit of ``near_tie_scale``; it shrinks with the logits and never grows."""
    limits = LIMITS.model_copy(update={"near_tie_scale": 20.0})  # the largest logit of every row
    damage = [
        lambda logits, *where, spoil=spoil: np.float32(size) * spoil(logits, *where)
        for spoil in exchange_best_two(limits.near_tie_margin * factor * min(1.0, 1 / size))
    ]
    result = compare(Scripted(damage[0]), Scripted(damage[1]), IDS, prefill=PREFILL, tolerances=limits)
    top1 = result["phases"]["decode"]["top1"]
    assert top1["near_ties_excluded"] == (WINDOWS if excused else 0)
    assert top1["disagreements"] == (0 if excused else WINDOWS)
    assert top1["agreement_with_near_ties"] == pytest.approx(1 - WINDOWS / (WINDOWS * (LENGTH - PREFILL)))
    assert ("decode.top1.agreement" in failed(result)) is not excused


@pytest.mark.parametrize(("limit", "wrong", "passes"), [(0.98, 1, True), (0.98, 2, False), (1.0, 1, False)])
def test_a_limit_below_one_leaves_room_for_one_token(limit: float, wrong: int, passes: bool) -> None:
    """2 % of 21 decoded tokens is less than one: without that room the limit would ask for all of them."""

    reference, exchanged = exchange_best_two(2.0)
    windows = itertools.count()

    def test(logits: np.ndarray, position: int, phase: str) -> np.ndarray:
        spoilt = position == 7 and next(windows) < wrong
        return (exchanged if spoilt else reference)(logits, position, phase)

    limits = LIMITS.model_copy(update={"top1_agreement": limit})
    result = compare(Scripted(reference), Scripted(test), IDS, prefill=PREFILL, tolerances=limits)
    top1 = result["phases"]["decode"]["top1"]
    assert (top1["compared"], top1["disagreements"]) == (WINDOWS * (LENGTH - PREFILL), wrong)
    assert ("decode.top1.agreement" not in failed(result)) is passes


def test_a_large_error_does_not_excuse_itself() -> None:
    """The margin does not grow with the error: all choices changed is all choices failed, not all excluded."""
    result = run(lambda logits, position, phase: -logits)
    top1 = result["phases"]["decode"]["top1"]
    assert top1["agreement"] == 0.0
    assert top1["near_ties_excluded"] == 0


def test_too_many_near_ties_are_not_decided_and_no_pass() -> None:
    tied = lambda logits, position, phase: np.float32(1e-4) * np.minimum(logits, 13)  # noqa: E731
    result = compare(Scripted(tied), Scripted(tied), IDS, prefill=PREFILL, tolerances=LIMITS)
    assert {"prefill.top1.near_tie_share", "prefill.top1.agreement"} <= failed(result)
    assert result["phases"]["prefill"]["top1"]["compared"] == 0
    assert not result["verdict"]["passed"]
    assert result["verdict"]["outcome"] == "not decided"
    (note,) = result["verdict"]["notes"]
    assert note.startswith("Not decided: for 100% of the tokens")
    assert "a gap of 0.0002 of the largest logit" in note

    noisy = lambda logits, position, phase: tied(logits, position, phase) + 1e-3 * position % 2  # noqa: E731
    result = compare(Scripted(tied), Scripted(noisy), IDS, prefill=PREFILL, tolerances=LIMITS)
    assert result["verdict"]["outcome"] == "failed"  # ties excuse nothing else


def test_flat_logits_are_judged_like_large_ones() -> None:
    """Random weights give logits of 1 and gaps of 0.02: a target's arithmetic tells them apart all the same."""
    flat = lambda logits, position, phase: np.float32(0.02) * logits  # noqa: E731
    half = tolerances.load().profile("float32", "ort-cuda")
    for limits in (LIMITS, half):
        result = compare(Scripted(flat), Scripted(flat), IDS, prefill=PREFILL, tolerances=limits)
        assert result["verdict"]["outcome"] == "passed"
        assert result["overall"]["top1"]["near_ties_excluded"] == 0
    swapped = exchange_best_two(1.0)
    pair = [Scripted(lambda *where, spoil=spoil: flat(spoil(*where), *where[1:])) for spoil in swapped]
    result = compare(*pair, IDS, prefill=PREFILL, tolerances=half)
    assert "decode.top1.agreement" in failed(result)


@pytest.mark.parametrize(("position", "outcome"), [(2, "not decided"), (3, "failed")])
def test_a_token_that_only_a_changed_choice_moved_is_not_decided(position: int, outcome: str) -> None:
    """In a model of two layers one expert moves the logits more than the limits, derived for thirty, allow."""
    limits = tolerances.load().profile("free", "tensorrt").model_copy(update={"expert_set_agreement": 0.9})

    flat = lambda logits, at, phase: np.float32(0.01) * logits  # noqa: E731

    def damage(logits: np.ndarray, at: int, phase: str) -> np.ndarray:
        moved = np.where(logits < 13, np.float32(0.5), np.float32(0)) * logits[::-1] if at == position else 0
        return np.float32(0.01) * (logits + moved)

    reference, test = Scripted(flat, taps=True), Scripted(damage, taps=True, flips={1: [2]})
    result = compare(reference, test, IDS, prefill=PREFILL, tolerances=limits)
    assert failed(result) == {"prefill.rel_error.mean", "prefill.cosine.min"}
    assert result["verdict"]["outcome"] == outcome
    assert not result["verdict"]["passed"]
    assert result["phases"]["prefill"]["same_choices"]["tokens"] == WINDOWS * (PREFILL - 1)
    if outcome == "not decided":
        (note,) = result["verdict"]["notes"]
        assert "3 of 72 choices of experts differ" in note
    else:
        (note,) = result["verdict"]["notes"]
        assert note.startswith("3 of 72 choices of experts differ. Rounding turns close decisions")
        assert f"The {WINDOWS * (LENGTH - 1)} tokens whose choices all agree have a mean relative error of 0.0" in note


@pytest.mark.parametrize(("target", "instead"), [("ort-cpu-int4", "--gptq TEXT"), ("ort-cpu-int8", "take ort-cpu,")])
def test_rounding_is_blamed_only_where_the_kernels_are_right(target: str, instead: str) -> None:
    broken, right = run(lambda logits, position, phase: -logits), run()
    (note,) = verdict.quantised_notes(broken, right, target)
    assert f"their rounding to {target[-1]} bits" in note
    assert instead in note
    assert not verdict.quantised_notes(broken, broken, target)  # its kernels are wrong too
    assert not verdict.quantised_notes(right, right, target)
    converted = copy.deepcopy(broken)
    converted["test"]["model"]["routed"] = not converted["reference"]["model"]["routed"]
    assert not verdict.quantised_notes(converted, right, target)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("value", "check"), [(np.nan, "non_finite_tokens"), (np.inf, "non_finite_tokens"), (0.0, "constant_tokens")]
)
def test_silent_failures_are_named(phase: str, value: float, check: str) -> None:
    def damage(logits: np.ndarray, position: int, where: str) -> np.ndarray:
        return np.full_like(logits, value) if where == phase and position in (2, 8) else logits

    result = run(damage)
    assert f"{phase}.{check}" in failed(result)
    json.dumps(result, allow_nan=False)


def test_nothing_finite_at_all_still_gives_a_failed_verdict() -> None:
    result = run(lambda logits, position, phase: np.full_like(logits, np.nan))
    assert not result["verdict"]["passed"]
    assert result["phases"]["decode"]["kl_ref_test"]["mean"] is None
    assert "decode.kl_ref_test.mean" in failed(result)
    json.dumps(result, allow_nan=False)


def test_a_fault_of_the_cache_shows_in_decode_only() -> None:
    noisy = np.random.default_rng(2).normal(0, 0.1, VOCAB).astype(np.float32)
    result = run(lambda logits, position, phase: logits + noisy if phase == "decode" else logits)
    assert failed(result)
    assert all(name.startswith("decode.") for name in failed(result))


def test_expert_sets_are_compared_as_sets_and_flips_are_counted() -> None:
    result = run(taps=True, flips={1: [2, 7]})
    routing = result["routing"]
    steps = WINDOWS * LENGTH
    assert routing["flips"] == 2 * WINDOWS
    assert routing["decisions"] == LAYERS * steps
    assert routing["worst_layer"] == 1
    assert routing["worst_agreement"] == pytest.approx(1 - 2 * WINDOWS / steps)
    assert routing["layers"]["0"] == {"agreement": 1.0, "flips": 0, "overlap": 1.0}
    assert routing["overlap"] == pytest.approx(1 - 2 * WINDOWS / (LAYERS * steps * TOP_K))
    assert failed(result) == {"routing.expert_set_agreement"}

    test = Scripted(taps=True)
    test.routes = [chosen[:, ::-1] for chosen in test.routes]
    result = compare(Scripted(taps=True), test, IDS, prefill=PREFILL, tolerances=LIMITS)
    assert result["routing"]["agreement"] == 1.0
    assert result["verdict"]["passed"]


def test_unseen_routing_of_two_moe_models_is_not_passed() -> None:
    test = Scripted()
    test.info = with_facts(test.info, routed=True)
    result = compare(Scripted(taps=True), test, IDS, prefill=PREFILL, tolerances=LIMITS)
    assert failed(result) == {"routing.expert_set_agreement"}
    assert "test engine returned no routes" in result["routing"]["reason"]
    result = compare(Scripted(taps=True), test, IDS, prefill=PREFILL, tolerances=LIMITS, routing=False)
    assert result["verdict"]["passed"]


def test_engines_of_different_models_are_refused() -> None:
    other = Scripted()
    other.info = with_facts(other.info, vocab_size=VOCAB + 1)
    with pytest.raises(MoEdgeError, match="vocabularies of 50 and 51"):
        compare(Scripted(), other, IDS, prefill=PREFILL, tolerances=LIMITS)
    wide = Scripted(taps=True)
    wide.routes = [chosen[:, :2] for chosen in wide.routes]
    with pytest.raises(MoEdgeError, match="selects 3 experts in the reference, 2"):
        compare(Scripted(taps=True), wide, IDS, prefill=PREFILL, tolerances=LIMITS)


@pytest.mark.parametrize("limit", ["max_length", "max_position_embeddings"])
def test_windows_beyond_what_an_engine_holds_are_refused_with_the_options(limit: str) -> None:
    short = Scripted()
    short.info = with_facts(short.info, **{limit: LENGTH - 1})
    with pytest.raises(MoEdgeError, match=r"of 12 tokens do not fit: scripted holds at most 11; .*--window, --prefill"):
        compare(Scripted(), short, IDS, prefill=PREFILL, tolerances=LIMITS)


def test_a_model_that_routes_nothing_alike_is_not_called_rounding() -> None:
    everywhere = {layer: list(range(LENGTH)) for layer in range(LAYERS)}
    limits = tolerances.load().profile("free", "tensorrt")
    result = run(lambda logits, position, phase: -logits, taps=True, flips=everywhere, tolerances=limits)
    (note,) = result["verdict"]["notes"]
    assert note.startswith("72 of 72 choices of experts differ, and no token has all of its choices")
    assert "nan" not in note


@pytest.mark.parametrize(("windows", "prefill"), [(IDS[0], 5), (IDS[:0], 5), (IDS, 0), (IDS, LENGTH - 1)])
def test_bad_windows_are_refused(windows: np.ndarray, prefill: int) -> None:
    with pytest.raises(MoEdgeError, match=r"windows \[N, L|must be between 1 and 10"):
        compare(Scripted(), Scripted(), windows, prefill=prefill, tolerances=LIMITS)


@pytest.mark.parametrize(("size", "passed"), [(1e-6, True), (1e-3, False), (np.nan, False)])
def test_identity_holds_the_worst_token_to_the_limit(size: float, passed: bool) -> None:
    def damage(logits: np.ndarray, position: int, phase: str) -> np.ndarray:
        if position == 9 and phase == "decode":
            logits[4] += np.float32(size) * np.abs(logits).max()
        return logits

    result = identity_all(Scripted(), {"test": (Scripted(damage), 1e-4)}, IDS, prefill=PREFILL)["test"]
    assert result["passed"] is passed
    if not np.isnan(size):
        # A logit of 20 in float32 is rounded to 20 * 6e-8 = 1.2e-6, relative 6e-8.
        assert result["max_rel_error"] == pytest.approx(size, abs=1e-7)
    json.dumps(result, allow_nan=False)


def test_two_forms_of_one_model_pass_and_another_model_fails(
    toy_bundles: dict[str, Path], tmp_path: Path, make_toy_bundle: Any
) -> None:
    windows = np.random.default_rng(4).integers(0, 256, (2, 40))
    reference = open_engine(toy_bundles["concat"], taps=True, threads=1)
    test = open_engine(toy_bundles["shared_buffer"], taps=True, threads=1)
    result = compare(reference, test, windows, prefill=10, tolerances=LIMITS)
    assert result["verdict"]["passed"], failed(result)
    assert result["overall"]["abs_error"]["max"] > 0, (
        "two kernels never agree to the last bit; is one engine tested twice?"
    )
    make_toy_bundle(tmp_path / "other", seed=1)
    other = open_engine(tmp_path / "other", taps=True, threads=1)
    result = compare(reference, other, windows, prefill=10, tolerances=LIMITS)
    assert {"prefill.top1.agreement", "decode.kl_ref_test.mean", "routing.expert_set_agreement"} <= failed(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda limits: limits.update(mean_kll=1), r"mean_kll: unknown key; known keys here: .* \(nearest: mean_kl\)"),
        (lambda limits: limits.update(mean_kl="small"), r"mean_kl: must be a number, got 'small'"),
        (lambda limits: limits.update(mean_kl=-1), "mean_kl: must be more than 0"),
        (lambda limits: limits.update(top1_agreement=1.5), "top1_agreement: must be at most 1"),
        (lambda limits: limits.pop("max_kl"), "max_kl: is required"),
    ],
)
def test_bad_tolerances_are_refused_with_the_key(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    limits = LIMITS.model_dump()
    change(limits)
    with pytest.raises(MoEdgeError, match=message):
        run(tolerances=limits)
    file = tmp_path / "tolerances.yaml"
    file.write_text(json.dumps({"schema": "moedge.tolerances/1", "profiles": {"float32/x": limits}}))
    missing = r"profiles\.float32/x: no packaged profile has that name .*; missing: max_kl\."
    where = missing if "required" in message else rf"profiles\.float32/x\.{message}"
    with pytest.raises(MoEdgeError, match=where):
        tolerances.load(file)


def test_a_missing_file_or_profile_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MoEdgeError, match="Cannot read"):
        tolerances.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(MoEdgeError, match=r"bad\.yaml line 1: "):
        tolerances.load(tmp_path / "bad.yaml")
    with pytest.raises(MoEdgeError, match="float16/tensorrt"):
        tolerances.load().profile("float16", "tensorrt")


def test_promised_limits_are_the_packaged_ones() -> None:
    """The figures of the release promise: nobody loosens them by accident."""
    promised = {"float32/torch": 1e-5, "float32/portable": 1e-4, "float32/ort-cpu": 1e-4}
    packaged = tolerances.load().profiles
    profiles = {key: packaged[key] for key in promised}
    assert {key: profile.identity_rel_error for key, profile in profiles.items()} == promised
    for profile in profiles.values():
        assert profile.mean_kl == 1e-6
        assert profile.top1_agreement == 1.0
        assert profile.expert_set_agreement == 0.9999
