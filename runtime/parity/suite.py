"""Compare every engine of a run (:mod:`.comparisons` says which with which) and give the verdict over all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moedge import MoEdgeError
from moedge.configs import tolerances as tolerance_files
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.export.manifest import EngineManifest, Manifest
from moedge.runtime.engines import Engine, open_engine
from moedge.runtime.engines.protocol import Opening, TorchOptions
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity import outcomes, shapes, verdict, where
from moedge.runtime.parity.comparisons import Comparison, Group, comparisons, grouped, identity_reference
from moedge.runtime.parity.results import Compared, Identity, Parity, Shapes, Verification
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

SCHEMA: Literal["moedge.verify/1"] = "moedge.verify/1"
ALL_EXPERTS = 1 << 16
"""A top_k beyond any layer's number of experts; engines take it as "all of them"."""
DEQUANTIZED = "dequantized"
"""Profiles of quantised kernels against float32 on their own weights: ``dequantized/<target>``."""
FREE = "free"
"""Profiles of routed bundles that cannot be replayed, and would be if they could: ``free/<target>``."""

NOTHING = "There is nothing to compare: this run has nothing exported; finish it with `moedge run`."


def verify_run(
    engines: Mapping[EngineRef, Path],
    windows: np.ndarray,
    *,
    prefill: int,
    tolerances: str,
    limits: tolerance_files.Tolerances | None = None,
    text: str,
    threads: int | None = None,
    pytorch: TorchOptions | None = None,
    asked: shapes.Asked | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Verification:
    """Check every engine of a run.

    Args:
        engines: folder of each, as :func:`run_folder.engines` gives them.
        windows: int64 [N, L], held-out text.
        prefill: tokens of a window that are prefilled, the rest is decoded.
        tolerances: weight dtype, the first half of a profile's name in ``configs/tolerances.yaml``.
        limits: the profiles; the packaged ones by default.
        text: name of the text, for the report.
        pytorch: see :func:`moedge.runtime.engines.open_engine`.
        asked: also read texts in these shapes, each engine beside itself (:mod:`.shapes`).
        progress: called with (tokens done, tokens in all) over all comparisons.
        note: called with one sentence about each finished comparison.

    Returns:
        ``{"schema", "text", "identity_note", "identity": [...], "parity": [...], "shapes": [...], "passed",
        "outcome"}``; entries are what :mod:`parity` returns plus ``"name"``, the note says why the dense parent is not
        the identity's reference, or is None.

    Raises:
        MoEdgeError: there is nothing to compare.
    """
    suite = _Suite(
        engines=engines,
        windows=windows,
        prefill=prefill,
        tolerances=tolerances,
        limits=limits or tolerance_files.load(),
        opening={"threads": threads, "pytorch": pytorch},
        asked=asked,
        note=note or (lambda _: None),
    )
    identity, identity_note = identity_reference(engines)
    pairs = comparisons(engines, identity)
    if not pairs:
        raise MoEdgeError(NOTHING)
    found, shaped = suite.run(grouped(pairs, len(windows)), progress)
    found = suite.related(found)
    result: Compared = {
        "schema": SCHEMA,
        "text": text,
        "identity_note": identity_note,
        "identity": [entry for one, entry in found.items() if one.kind == "identity"],
        "parity": [entry for one, entry in found.items() if one.kind != "identity"],
    }
    if asked:
        result["shapes"] = [{"name": shapes.name(str(test)), **entry} for test, entry in shaped.items()]
    return finished(result, suite.limits)


@dataclass(frozen=True)
class _Suite:
    """What every comparison of a run needs; see :func:`verify_run`."""

    engines: Mapping[EngineRef, Path]
    windows: np.ndarray
    prefill: int
    tolerances: str
    limits: tolerance_files.Tolerances
    opening: Opening
    asked: shapes.Asked | None
    note: Callable[[str], None]

    def run(
        self, groups: Mapping[Group, list[EngineRef]], progress: Callable[[int, int], None] | None
    ) -> tuple[dict[Comparison, Any], dict[EngineRef, Shapes]]:
        """Compare group by group; ``progress`` is called with (tokens done, tokens in all) over all of them.

        Returns:
            an entry a comparison (a ParityEntry or, where its kind is identity, an IdentityEntry), and what each engine
            did in other shapes.
        """
        per_window = self.windows.shape[1]
        total = per_window * sum(group.windows for group in groups)
        done = 0

        def step(local: int, _: int) -> None:
            if progress:
                progress(done + local, total)

        found: dict[Comparison, Any] = {}
        shaped: dict[EngineRef, Shapes] = {}
        last = _last(groups) if self.asked else {}
        for group, tests in groups.items():
            entries, read = self.compare(group, tests, [test for test in tests if last.get(test) == group], step)
            done += per_window * group.windows
            shaped |= read
            found |= {group.comparison(test): {"name": group.comparison(test).name, **entries[test]} for test in tests}
            self.tell(group, entries, read)
        return found, shaped

    def compare(
        self, group: Group, tests: list[EngineRef], also: Collection[EngineRef], progress: Callable[[int, int], None]
    ) -> tuple[Mapping[EngineRef, Parity | Identity], dict[EngineRef, Shapes]]:
        """Open the engines of one group, compare, and read some of them in other shapes before they are closed.

        Where a comparison failed, its engines are opened once more to look where.

        Args:
            tests: engines that are compared with the group's reference. also: those that are read in other shapes.
            progress: called with (tokens done, tokens in all).
        """
        engines, windows = self.engines, self.windows[: group.windows]
        kept = DEQUANTIZED if group.kind == "kernels" else self.tolerances
        judged = {test: Judging.of(engines[test], self.limits, kept, test.target) for test in tests}
        reference, shown = self._options(group, judged)
        one = partial(open_engine, engines[group.reference], **self.opening, **reference)
        two = {test: partial(open_engine, engines[test], **self.opening, **shown[test]) for test in tests}
        shaped: dict[EngineRef, Shapes] = {}
        with ExitStack() as stack:
            against = stack.enter_context(closing(one()))
            opened = {test: stack.enter_context(closing(opener())) for test, opener in two.items()}
            found: Mapping[EngineRef, Any]
            if group.kind == "identity":
                checked = {test: (engine, judged[test].limits.identity_rel_error) for test, engine in opened.items()}
                found = parity.identity_all(against, checked, windows, prefill=self.prefill, progress=progress)
            else:
                compared = {test: (engine, judged[test].limits) for test, engine in opened.items()}
                entries = parity.compare_all(against, compared, windows, prefill=self.prefill, progress=progress)
                for test in also if self.asked else ():
                    own = kernel_limits(engines[test], self.limits, self.tolerances, test.target)
                    rules = judged[test].rules(own, against, opened[test])
                    assert self.asked is not None
                    shaped[test] = shapes.check(opened[test], self.windows, self.asked, rules)
                found = {test: judged[test].explained(entry) for test, entry in entries.items()}

        def located(test: EngineRef, entry: Any) -> Any:
            own = judged[test].limits
            exact = exact_limits(self.limits, own, self.tolerances, test.target)
            again = where.Again(one, two[test], windows[0], self.prefill, own, exact)
            return where.explained(entry, list(windows), again.on, engines[test])

        return {test: located(test, entry) for test, entry in found.items()}, shaped

    def _options(
        self, group: Group, judged: Mapping[EngineRef, Judging]
    ) -> tuple[dict[str, Any], dict[EngineRef, dict[str, Any]]]:
        """How the reference of a group is opened, and each engine beside it."""
        moe = group.reference.role == "moe"
        if group.kind == "identity":
            every: dict[str, Any] = {"top_k": ALL_EXPERTS}
            return {"taps": moe, **(every if moe else {})}, dict.fromkeys(judged, every)
        rounded = {"weights_of": self.engines[group.rounded]} if group.rounded else {}
        reference = {**reference_options(judged.values(), moe=moe), **rounded}
        return reference, {test: how.options(moe=moe) for test, how in judged.items()}

    def tell(self, group: Group, entries: Mapping[EngineRef, Any], shaped: Mapping[EngineRef, Shapes]) -> None:
        """Note a sentence about each finished comparison."""
        for test, entry in entries.items():
            one = group.comparison(test)
            self.note(f"{one.kind} {one.name}: {_said(entry)}")
            if test in shaped:
                self.note(f"{shapes.name(str(test))}: {_said(shaped[test])}")

    def related(self, entries: Mapping[Comparison, Any]) -> dict[Comparison, Any]:
        """Judge what takes two comparisons: a quantised MoE beside its parent, and its weights beside its kernels."""
        found = dict(entries)
        for ref in self.engines:
            moe = Comparison("parity", TORCH_MOE, ref)
            parent = Comparison("parity", TORCH_DENSE, EngineRef(ref.target, "dense"))
            if moe in found and parent in found:
                own = self.limits.profile(self.tolerances, ref.target, graph_dtype(self.engines[ref]))
                if limit := own.kl_ratio_to_dense:
                    found[moe] = verdict.with_ratio(found[moe], found[parent], limit)
                    value = found[moe]["verdict"]["checks"][-1]["value"] or float("nan")
                    self.note(f"{ref}: its mean KL is {value:.2f} times the dense parent's at {ref.target}")
            kernels = Comparison("kernels", EngineRef(targets.PORTABLE, ref.role), ref)
            against = Comparison("parity", EngineRef("torch", ref.role), ref)
            if kernels in found and against in found:
                notes = verdict.quantised_notes(found[against], found[kernels], ref.target)
                found[against] = verdict.with_notes(found[against], notes)
        return found


def _last(groups: Mapping[Group, list[EngineRef]]) -> dict[EngineRef, Group]:
    """Engine -> the comparison in whose course it is read in other shapes: beside its own weights if there is one."""
    found: dict[EngineRef, Group] = {}
    for group, tests in groups.items():
        for test in tests:
            if group.kind == "kernels" or (group.kind == "parity" and test not in found):
                found[test] = group
    return found


def finished(result: Compared, limits: tolerance_files.Tolerances) -> Verification:
    """Return a verify result with its outcome: ``passed`` for programs that ask only that, ``outcome`` of three.

    A user's tolerances file stands in it with its hash and the limits that it names.
    """
    outcome = verdict.run_outcome(result)
    found: Verification = {**result, "passed": outcome is verdict.Outcome.PASSED, "outcome": outcome.value}
    if limits.origin:
        found["tolerances"] = limits.origin.model_dump()
    return found


def graph_dtype(folder: Path) -> str:
    """Type that a bundle's graph states, or the graph that an engine was built of; empty for a checkpoint."""
    manifest = manifests.read(folder)
    if isinstance(manifest, Manifest):
        return manifest.cache.dtype or ""
    return manifest.dtype or "" if isinstance(manifest, EngineManifest) else ""


@dataclass(frozen=True)
class Judging:
    """How one engine under test is judged: its limits, whether under its own choices, and what to say of that."""

    limits: tolerance_files.Profile
    replayed: bool
    reason: str | None = None

    @classmethod
    def of(cls, folder: Path, limits: tolerance_files.Tolerances, dtype: str, target: str) -> Judging:
        """Decide it for the bundle, engine or checkpoint in ``folder`` by its profile, ``dtype/target``."""
        profile, manifest = limits.profile(dtype, target, graph_dtype(folder)), manifests.read(folder)
        if profile.router_set_agreement is None or manifest is None:
            return cls(profile, False)
        if not manifest.routed_layers and not manifest.keeps:
            return cls(profile, False)
        free = f"{FREE}/{target}" in limits.profiles
        said = None if manifest.shows_kept else cls.unshown(folder)
        if not manifest.routed_layers:
            return cls(profile, any(place.reads for kept in manifest.keeps.values() for place in kept.values()), said)
        if profile.expert_set_agreement is not None and not manifest.names_reads:
            return cls(profile, False, said)  # nobody can tell what a changed choice was made from: free-running limits
        if manifest.names_reads or not free:  # without either, opening says what to do
            return cls(profile, True, said)
        reason = (
            f"{folder} does not say what its routers read, so its arithmetic and its routers cannot be judged apart: "
            "these are free-running figures, changed choices of experts included, under the wide limits that they "
            "need. Bundles of older versions lack it; export again."
        )
        return cls(limits.profile(FREE, target, graph_dtype(folder)), False, reason)

    @staticmethod
    def unshown(source: Path) -> str:
        """What to say of a model some of whose choices of small values are not replayed."""
        return (
            f"{source} does not show all of the small values that it leaves out (half precision, engines and the "
            "insides of experts show none), so not all of these choices are replayed: what rounding changes of the "
            "others is in these figures, and more of it the deeper the model is and the narrower its ramps are."
        )

    def options(self, *, moe: bool) -> dict[str, Any]:
        """How to open the engine: what it must show of its choices."""
        return {"taps": moe, "router_inputs": True} if self.replayed else {"taps": moe}

    def rules(self, own: tolerance_files.Profile, reference: Engine | None, test: Engine) -> shapes.Rules:
        """How the engine ``test`` is judged in other shapes, by itself alone without a ``reference``.

        ``own`` are the limits of its arithmetic.
        """
        row = targets.known(test.info.model.target)
        half = test.info.dtype in targets.HALF or (row is not None and row.half)
        unsure = test.info.model.gathered and not (self.replayed and self.reason is None)
        return shapes.Rules(own, self.limits, reference, replays=self.replayed, half=half, unsure=unsure)

    def explained(self, entry: Parity) -> Parity:
        """Return a finished comparison with the reason among its notes."""
        return verdict.with_notes(entry, [self.reason] if self.reason else [])


def kernel_limits(folder: Path, limits: tolerance_files.Tolerances, dtype: str, target: str) -> tolerance_files.Profile:
    """Limits of what an engine computes with the weights that it has: of a quantised one, its kernels' alone."""
    row = targets.known(target)
    return limits.profile(DEQUANTIZED if row and row.bits else dtype, target, graph_dtype(folder))


def reference_options(tests: Iterable[Judging], *, moe: bool) -> dict[str, Any]:
    """How to open the engine that others are compared with; it must replay the choices of those that need it."""
    return {"taps": moe, "replay": True} if moe and any(test.replayed for test in tests) else {"taps": moe}


def exact_limits(
    limits: tolerance_files.Tolerances, own: tolerance_files.Profile, dtype: str, target: str
) -> tolerance_files.Profile:
    """Return the limits of what holds no quantised weight: those of the target without, or the target's ``own``."""
    row = targets.known(target)
    return limits.profiles.get(f"{dtype}/{row.unquantised}", own) if row and row.unquantised else own


def _said(entry: Mapping[str, Any]) -> str:
    word = outcomes.mark(verdict.entry_outcome(entry)).word
    if "verdict" not in entry:
        return f"{word}, max relative logit error {_shown(entry['max_rel_error'])}"
    missed = [check["name"] for check in entry["verdict"]["checks"] if not check["passed"]]
    said = f"{word}, beyond the limits: {', '.join(missed)}" if missed else f"{word}, every check passed"
    if replay := entry.get("replay"):
        values = [found["overall"]["kl_ref_test"]["mean"] for found in (replay, entry)]
        if None not in values:
            said += f"; KL {values[0]:.2g} under the engine's own choices, {values[1]:.2g} free-running"
    return said


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"
