"""Judge a bundle against a reference that is kept (:mod:`.reference`): no torch, no second model.

Nobody can ask a file to run the engine's own choices of experts, as route replay does. Instead the engine is given the
reference's numbers, and two questions are asked:

* **layers**: does each layer, alone, compute what the reference's layer computes? The engine runs the probe with the
  reference's stream in place of its own before every layer and before the final norm
  (:mod:`moedge.export.graph.layers`). What a layer hands on is compared with what the reference's layer handed on. No
  error of another layer enters, and a decision that rounding turns (an expert, a value at its threshold) changes that
  layer's output and nothing else. There is no chaos at depth one, so the limit is that of one layer's rounding, for
  dense, routed and gathered models of every precision. Attention reads a cache that the engine wrote from the same
  stream, in the prefill and one token at a time.
  A router behind the attention reads the reference's stream and one attention's rounding, so it may choose otherwise
  only where the reference's scores nearly tie: within ``router_tie_margin`` and twice what the limit of a layer allows
  that input to be off. Tokens of another choice are left out of a layer's error. ``head`` is the final norm and the
  output projection under the reference's last stream.
* **text**: the engine runs the whole text by itself. Where the model decides nothing, every token is held to the limits
  of arithmetic, from the kept logits (:mod:`.shortened`). In float32 a routed model, too, as long as it chose what the
  reference chose: the tokens of a window before its first changed choice, which see the same composition of products.
  That choice reads what the reference's router read, up to rounding, so the reference's scores must nearly tie there;
  the reference holds by how much its choices lead. What comes after it is not judged, so a phase none of whose tokens
  comes before it is not decided.
  Otherwise the distance of the two runs says how steady the model is, and only ``free`` is judged: broken rows, and a
  loss of perplexity beyond chance.

By induction over layers: the embedding is right, each layer is right for the right stream, the head is right for the
right stream; so is the model, up to rounding. A fault that the probe's tokens do not show is left to the second.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.configs import tolerances as tolerance_files
from moedge.configs.tolerances import Profile
from moedge.export import manifest as manifests
from moedge.export.graph.layers import STREAM
from moedge.export.manifest import EngineManifest, Manifest
from moedge.runtime.engines import Engine, Step, open_engine
from moedge.runtime.engines.protocol import Opening
from moedge.runtime.parity import alone, alone_shapes, shapes, shortened, verdict
from moedge.runtime.parity.compare import json_ready, measured, same_vocabulary, steps
from moedge.runtime.parity.figures import KeptReferenceFacts
from moedge.runtime.parity.metrics import Cursor, TokenErrors, mean, text_sha256
from moedge.runtime.parity.reference import Reference, identity_of, load
from moedge.runtime.parity.results import Compared, Parity, ParityEntry, Shapes, Verification
from moedge.runtime.parity.routing import RouteAgreement, same_sets
from moedge.runtime.parity.suite import FREE, SCHEMA, Judging, finished, graph_dtype, kernel_limits
from moedge.runtime.parity.verdict import Check, Outcome, Verdict


def verify_kept(
    test: Path,
    file: Path,
    *,
    tolerances: str,
    limits: tolerance_files.Tolerances,
    opening: Opening,
    progress: Progress,
) -> Verification:
    """Judge a bundle or engine by a kept reference; its text is the reference's.

    Args:
        test: bundle, engine folder or checkpoint.
        file: of :func:`moedge.runtime.parity.reference.keep`.
        tolerances: weight dtype, the first half of a profile's name. limits: the profiles.
        opening: ``threads`` and ``pytorch`` of the engine.
        progress: called with (tokens done, tokens in all).

    Raises:
        MoEdgeError: the file cannot be read, or is of another model.
    """
    reference = load(file)
    _check_same(reference, test)
    manifest = manifests.read(test)
    target = manifest.target if manifest else "torch"
    routed = bool(manifest.routed_layers) if isinstance(manifest, Manifest) else bool(reference.routes)
    if isinstance(manifest, EngineManifest):
        routed = bool(manifest.taps)  # it may have been built without
    judged = limits.profile(tolerances, target, graph_dtype(test))
    free = limits.profile(FREE, target, graph_dtype(test)) if f"{FREE}/{target}" in limits.profiles else None

    def in_shapes(engine: Engine) -> Shapes:
        how = Judging(free if free and engine.info.model.routed else judged, False)
        rules = how.rules(kernel_limits(test, limits, tolerances, target), None, engine)
        return shapes.check(engine, reference.windows, shapes.Asked(), rules)

    opened = partial(open_engine, test, **opening, taps=routed)
    shaped: Shapes | None = None
    with closing(opened()) as whole:
        same_vocabulary(reference, whole)
        run = _Run.of(reference, whole, judged, progress)
        if not isinstance(manifest, Manifest) or _as_a_whole(whole, free):
            shaped = in_shapes(whole)
    layers, reason = None, "PyTorch and engine folders run as a whole"
    if isinstance(manifest, Manifest):
        try:
            single: Any = opened(layers="given", spots=STREAM)
        except MoEdgeError as error:
            reason = str(error).rstrip(".")
        else:
            with closing(single):
                layers = alone.Alone.of(reference, single, judged)
                shaped = shaped or alone_shapes.check(reference, single, judged)
    if shaped is None:
        with closing(opened()) as again:
            shaped = in_shapes(again)
    if layers is None and run.routes.summary()["compared"] and free:
        judged = free
    entry = _entry(reference, whole, run, layers, judged, reason)
    named: ParityEntry = {"name": f"{test} vs {file.name}", **entry}
    result: Compared = {"schema": SCHEMA, "text": reference.facts.text, "identity": [], "parity": [named]}
    result["shapes"] = [{"name": shapes.name(str(test)), **shaped}]
    return finished(result, limits)


def _as_a_whole(engine: Engine, free: Profile | None) -> bool:
    """Whether an engine can be judged as a whole in other shapes: what they turn of its choices nobody replays here.

    ``free`` are limits that allow for other experts, where its target has some.
    """
    model = engine.info.model
    return not model.gathered and (not model.routed or free is not None)


def _check_same(reference: Reference, test: Path) -> None:
    kept = reference.facts.identity
    found = identity_of(test)
    same = kept.same(found)
    if same is None:
        raise MoEdgeError(
            f"{test} and {reference.path} share no hash by which to tell whether they are of one model; export the "
            "checkpoint again, or keep the reference of the portable bundle that this one was lowered from."
        )
    if not same:
        raise MoEdgeError(
            f"{reference.path} is the reference of another model than {test}: {kept.told()} there, {found.told()} "
            "here; keep one of this bundle's checkpoint with `moedge verify CHECKPOINT --save-reference FILE`."
        )


@dataclass
class _Run:
    """The engine on the whole text beside the kept answers."""

    phases: dict[str, TokenErrors]
    steady: dict[str, TokenErrors]
    """Of the tokens of each window before its first changed choice."""
    routes: RouteAgreement = field(default_factory=RouteAgreement)
    tail: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By phase [n, 2], see :func:`moedge.runtime.parity.shortened.add`."""
    steady_tail: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """The same of the tokens in ``steady``."""
    leads: list[float] = field(default_factory=list)
    """Of each window with a changed choice, of its first: the reference's lead (:class:`.reference.Reference`) in the
    first layer that chose otherwise; NaN where it is not kept."""

    @classmethod
    def of(cls, reference: Reference, engine: Engine, limits: Profile, progress: Progress) -> _Run:
        run = cls(TokenErrors.by_phase(limits), TokenErrors.by_phase(limits))
        first, turned, cursor = 0, False, Cursor(reference.facts.prefill)
        for phase, ids, step, _, targets in steps(engine, [], reference.windows, reference.facts.prefill, progress):
            rows, at = slice(first, first + ids.size), cursor.at(phase, ids)
            first += ids.size
            kept = reference.answers.rows(rows)
            chosen = {layer: found[rows] for layer, found in reference.routes.items()}
            changed = run.routes.add(chosen, step.routes)
            one = TokenErrors.by_phase(limits)[phase]
            tail = shortened.add(one, kept, step.logits[0], targets, changed, at)
            run.tail.setdefault(phase, []).append(tail)
            run.phases[phase].extend(one)
            turned = turned and phase != "prefill"
            after = np.full(ids.size, turned)
            if changed is not None:
                after |= np.maximum.accumulate(changed)
            if after.any() and not turned:
                run.leads.append(_lead(reference, chosen, step, rows.start, int(after.argmax())))
            turned = bool(after[-1])
            if not after.any():
                run.steady[phase].extend(one)
                run.steady_tail.setdefault(phase, []).append(tail)
            elif not after.all():
                before = ~after
                logits = step.logits[0][before]  # these come first, so they begin where the step does
                tail = shortened.add(run.steady[phase], kept.rows(before), logits, targets[before], at=at)
                run.steady_tail.setdefault(phase, []).append(tail)
        if first != len(reference.answers.log_sum):
            raise MoEdgeError(
                f"{engine.info.name} reads the text of {reference.path} in other steps than the reference did: they "
                "are not the same model."
            )
        return run

    def text(self, limits: Profile) -> tuple[Check, ...]:
        """Checks of the text of a model that decides nothing, or of a routed one in float32."""
        found = []
        for phase, tokens in self.steady.items():
            if tokens.tokens:
                found += verdict.phase_checks(f"text.{phase}", tokens.summary(), limits)
            elif self.phases[phase].tokens:  # what was not looked at is not passed
                found.append(Check(f"text.{phase}.judged_tokens", 0, ">=", 1, decided=False))
        if self.routes.counts:
            leads = np.array(self.leads)
            wrong, unknown = int((leads > alone.tie_margin(limits)).sum()), bool(np.isnan(leads).any())
            value = None if unknown and not wrong else wrong
            found.append(Check(verdict.FIRST_CHANGES, value, "<=", 0, decided=bool(wrong)))
        return tuple(found)


def _lead(reference: Reference, chosen: dict[int, np.ndarray], step: Step, first: int, token: int) -> float:
    """The reference's lead where its experts ``chosen`` and those of ``step`` first differ, for one of its tokens.

    Args:
        first: where the step begins in the reference's tokens. token: of the step.
    """
    row, routes = slice(token, token + 1), step.routes or {}
    layer = min(layer for layer, one in chosen.items() if not same_sets(one[row], routes[layer][row]).all())
    return float(reference.leads[layer][first + token]) if layer in reference.leads else float("nan")


def _entry(
    reference: Reference, engine: Engine, run: _Run, layers: alone.Alone | None, limits: Profile, reason: str
) -> Parity:
    windows, prefill = reference.windows.shape, reference.facts.prefill
    result = measured(reference, engine, windows, prefill, run.phases, run.routes, limits)
    result["text_sha256"] = text_sha256(reference.windows)
    result["replay"] = None
    result["by_layer"] = layers.summary() if layers else None
    tails = np.concatenate([part for parts in run.tail.values() for part in parts])
    facts: KeptReferenceFacts = {
        "file": str(reference.path),
        "sha256": reference.sha256,
        "bytes": reference.path.stat().st_size,
        "largest": int(reference.answers.tokens.shape[1]),
        "judged_tokens": sum(tokens.tokens for tokens in run.steady.values()),
        "probability_left": mean(tails[:, 0]),
        "known_kl": result["overall"]["kl_ref_test"]["mean"] - mean(tails[:, 1]),
        "hidden_kl": mean(tails[:, 1]),
    }
    result["kept_reference"] = facts
    found, notes = _judged(result, run, limits, reason)
    if result["by_layer"] and "text" not in found.parts:
        facts["judged_tokens"] = 0
    result["verdict"] = found.as_json([*notes, *verdict.explain(result, found, limits)])
    return json_ready(result)


def _judged(result: Parity, run: _Run, limits: Profile, reason: str) -> tuple[Verdict, list[str]]:
    """Hold the figures to their limits; see the head of this file for which."""
    layers, model = result["by_layer"], result["test"]["model"]
    routed, gathered = bool(model.get("routed")), bool(model.get("gathered"))
    if layers is None and not gathered:
        said = [f"No layer was looked at by itself: {reason}."]
        found = verdict.judge(result, limits, routing=routed)
        if routed and not result["routing"]["compared"] and found.outcome is not Outcome.PASSED:
            said.append(
                "The engine shows no choices of experts, so nobody can tell what is due to other ones; build it with "
                "--taps."
            )
        if routed and limits.expert_set_agreement is None:  # limits under equal choices, which nobody made sure of
            found = found.undecided(check.name for check in found.missed)
        return _undecided(found, run.phases, run.tail, limits), said
    parts: dict[str, tuple[Check, ...]] = {}
    notes = []
    if not gathered and (not routed or limits.expert_set_agreement is not None):
        parts["text"] = run.text(limits)
        notes += _changes_said(result, run, parts["text"])
    if layers is None:
        notes.append(
            f"Not decided: no layer could be looked at by itself ({reason}), and two right runs of a model that leaves "
            "out small values may go apart; compare with the checkpoint: moedge verify CHECKPOINT ENGINE."
        )
        parts["layers"] = (Check("layers.rel_error", None, "<=", limits.layer_rel_error or 0.0, decided=False),)
    else:
        parts |= alone.parts(layers, limits, routed=routed)
        notes += alone.departing(layers, limits)
        if any(check.outcome is Outcome.NOT_DECIDED for check in parts.get("router", ())):
            notes.append(
                "Not decided: of experts inside experts no scores are kept, so nobody can tell whether the choices "
                "that differ were nearly ties; compare with the checkpoint: moedge verify CHECKPOINT BUNDLE."
            )
    if routed or gathered:
        parts["free"] = verdict.free_checks(result, limits)
    return _undecided(Verdict(parts), run.steady, run.steady_tail, limits), notes


def _changes_said(result: Parity, run: _Run, checks: tuple[Check, ...]) -> list[str]:
    """Say how much of the text is judged where choices of experts differ, and what their first changes tell."""
    flips = result["routing"].get("flips")
    if not flips:
        return []
    judged, total = result["kept_reference"]["judged_tokens"], result["overall"]["tokens"]
    said = [
        f"{flips:,} of {result['routing']['decisions']:,} choices of experts differ from the reference's. Held to the "
        f"limits of arithmetic are {judged:,} of {total:,} tokens: each window's before its first other choice."
    ]
    instead = "compare with the checkpoint: moedge verify CHECKPOINT BUNDLE."
    for check in checks:
        if check.passed:
            continue
        if check.name == verdict.FIRST_CHANGES and check.value:
            said.append(
                f"In {check.value:.0f} of {len(run.leads):,} windows with another choice the first one is no near tie "
                "by the reference's scores: before it nothing but rounding differs, so something is wrong there."
            )
        elif check.name == verdict.FIRST_CHANGES:
            said.append(
                "Not decided: this reference does not say by how much its routers' choices lead in the text (an older "
                "version kept it, or these are experts inside experts), so nobody can tell whether the first other "
                f"choice of a window is nearly a tie; keep it again, or {instead}"
            )
        elif check.name.endswith(".judged_tokens"):
            phase = check.name.split(".")[1]
            said.append(f"Not decided: in {phase} every token comes after its window's first other choice; {instead}")
    return said


def _undecided(
    found: Verdict, phases: dict[str, TokenErrors], tails: dict[str, list[np.ndarray]], limits: Profile
) -> Verdict:
    """Do not decide a mean KL that is beyond its limit only by what the kept logits may hide."""
    open_ones = set()
    for phase, tokens in phases.items():
        hidden = mean(np.concatenate(tails[phase])[:, 1]) if phase in tails else 0.0
        for name, column in (("kl_ref_test", "kl"), ("kl_test_ref", "kl_back")):
            parts = tokens.columns[column]
            if parts and mean(np.concatenate(parts)) - hidden <= limits.mean_kl:
                open_ones |= {f"{phase}.{name}.mean", f"text.{phase}.{name}.mean"}
    return found.undecided(open_ones)
