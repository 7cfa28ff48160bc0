"""Which engines are compared with which, and the verdict over all of them.

* identity: a MoE with every expert selected is its dense parent (:func:`.compare.identity`). A plan that
  prunes or refits is not; its exports are then compared, every expert selected, with the same MoE in PyTorch;
* parity: an exported bundle computes what PyTorch computes (:func:`moedge.runtime.parity.compare`), the MoE bundles
  with their routing, the dense bundles without. A routed bundle whose arithmetic is not float32 is compared under its
  own choice of experts (:mod:`moedge.runtime.parity.replay`): rounding turns close decisions;
* kernels: a quantised bundle is another model than its checkpoint, and against PyTorch it is held to the looser limits
  of what quantisation costs. Against the portable graph that runs on the bundle's own de-quantised weights in float32
  it is held to what its kernels may do (profiles ``dequantized/...``). Nothing is identical to the dense parent after
  quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moedge.configs import tolerances as tolerance_files
from moedge.export import targets
from moedge.export.graph import taps as _graph
from moedge.runtime.engines import Engine, open_engine
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity import outcomes, verdict
from moedge.runtime.run.run_folder import read_json

SCHEMA = "moedge.verify/1"
ALL_EXPERTS = 1 << 16
"""A top_k beyond any layer's number of experts; engines take it as "all of them"."""
DEQUANTIZED = "dequantized"
"""Profiles of quantised kernels against float32 on their own weights: ``dequantized/<target>``."""
FREE = "free"
"""Profiles of routed bundles that cannot be replayed, and would be if they could: ``free/<target>``."""
IDENTITY_WINDOWS = 2
DENSE_WINDOWS = 2
"""Identity and the dense parents are checked on fewer windows: a wrong kernel shows in the first one, and what the run
must prove on 2,048 tokens is the sparse model."""


def verify_run(
    engines: dict[str, Path],
    windows: np.ndarray,
    *,
    prefill: int,
    tolerances: str,
    limits: tolerance_files.Tolerances | None = None,
    text: str,
    threads: int | None = None,
    pytorch: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Check every engine of a run.

    Args:
        engines: label -> folder as :func:`run_folder.engines` gives them: ``"<target> <moe|dense>"``.
        windows: int64 [N, L], held-out text.
        prefill: tokens of a window that are prefilled, the rest is decoded.
        tolerances: weight dtype, the first half of a profile's name in ``configs/tolerances.yaml``.
        limits: the profiles; the packaged ones by default.
        text: name of the text, for the report.
        pytorch: see :func:`moedge.runtime.engines.open_engine`.
        progress: called with (tokens done, tokens in all) over all comparisons.
        note: called with one sentence about each finished comparison.

    Returns:
        ``{"schema", "text", "identity_note", "identity": [...], "parity": [...], "passed", "outcome"}``; entries are
        what :mod:`parity` returns plus ``"name"``, the note says why the dense parent is not the identity's reference,
        or is None.
    """
    limits = limits or tolerance_files.load()
    identity, identity_note = _identity_reference(engines)
    jobs = _jobs(engines, identity)
    per_window = windows.shape[1]
    total = per_window * sum(count for _, _, count in _grouped(jobs, len(windows)))
    opening = {"threads": threads, "pytorch": pytorch}
    done = 0

    def step(local: int, _: int) -> None:
        if progress:
            progress(done + local, total)

    result: dict[str, Any] = {"schema": SCHEMA, "text": text, "identity_note": identity_note}
    result |= {"identity": [], "parity": []}
    for (kind, reference, count), tests in _grouped(jobs, len(windows)).items():
        entries = _compare(kind, reference, tests, engines, windows[:count], limits, tolerances, prefill, opening, step)
        done += per_window * count
        for test, entry in entries.items():
            name = f"{test} = {reference}" if kind == "identity" else f"{test} vs {reference}"
            if kind == "kernels":
                name = f"{test} vs its de-quantised weights"
            result["identity" if kind == "identity" else "parity"].append({"name": name, **entry})
            if note:
                note(f"{kind} {name}: {_said(entry)}")
    result["parity"] = _related(result["parity"], engines, limits, tolerances, note)
    return finished(result, limits)


def finished(result: dict[str, Any], limits: tolerance_files.Tolerances) -> dict[str, Any]:
    """Return a verify result with its outcome: ``passed`` for programs that ask only that, ``outcome`` of three.

    A user's tolerances file stands in it with its hash and the limits that it names.
    """
    outcome = verdict.run_outcome(result)
    if limits.origin:
        result = {**result, "tolerances": limits.origin.model_dump()}
    return {**result, "passed": outcome is verdict.Outcome.PASSED, "outcome": outcome.value}


def _related(
    entries: list[dict[str, Any]],
    engines: dict[str, Path],
    limits: tolerance_files.Tolerances,
    tolerances: str,
    note: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """Judge what takes two comparisons: a quantised MoE beside its quantised parent, its weights beside its kernels."""
    found: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in entries}
    for label in engines:
        target = label.split()[0]
        name, parent = f"{label} vs torch moe", f"{target} dense vs torch dense"
        if name in found and parent in found:
            limit = limits.profile(tolerances, target, graph_dtype(engines[label])).kl_ratio_to_dense
            if limit:
                found[name] = verdict.with_ratio(found[name], found[parent], limit)
                value = found[name]["verdict"]["checks"][-1]["value"] or float("nan")
                if note:
                    note(f"{label}: its mean KL is {value:.2f} times the dense parent's at {target}")
        kernels, against = f"{label} vs its de-quantised weights", f"{label} vs torch {label.split()[-1]}"
        if kernels in found and against in found:
            notes = verdict.quantised_notes(found[against], found[kernels], target)
            found[against] = verdict.with_notes(found[against], notes)
    return list(found.values())


def _identity_reference(engines: dict[str, Path]) -> tuple[str | None, str | None]:
    """Return which engine every MoE with all experts selected must equal, and a sentence when it is not the parent."""
    from moedge.convert.plan import MoEPlan  # numpy and safetensors only

    plan = MoEPlan.load(engines["torch moe"]) if "torch moe" in engines else None
    differs = plan.differs_from_dense() if plan else None
    if plan is None or differs is None:
        return "torch dense", None
    said = f"Even with every expert selected this plan is not its dense parent, by design ({differs})"
    if any(layer.experts for layer in plan.layers):
        return "torch moe", f"{said}; the identity check compares with the same MoE in PyTorch instead."
    return None, f"{said}, and it has no experts: parity with PyTorch is the whole check."


def _jobs(engines: dict[str, Path], identity: str | None) -> list[tuple[str, str, str]]:
    """(kind, reference, test), grouped by reference so that each is opened once."""
    jobs = []
    quantised = {label for label in engines if is_quantised(label.split()[0])}
    if identity in engines:
        jobs += [
            ("identity", str(identity), label) for label in engines if label.endswith(" moe") and label not in quantised
        ]
    if "torch dense" in engines:
        jobs += [("parity", "torch dense", label) for label in engines if label.endswith(" dense")]
    if "torch moe" in engines:
        jobs += [("parity", "torch moe", label) for label in engines if label.endswith(" moe")]
    for label in engines:
        reference = f"portable {label.split()[-1]}"
        if label in quantised and reference in engines:
            jobs.append(("kernels", reference, label))
    return [job for job in jobs if job[1] != job[2]]


def is_quantised(target: str) -> bool:
    """Whether bundles of a target hold integer weights."""
    row = targets.known(target)
    return row is not None and row.bits is not None


def graph_dtype(folder: Path) -> str:
    """Type that a bundle's graph states, or an empty string for a checkpoint."""
    manifest = folder / "manifest.json"
    return str(read_json(manifest).get("cache", {}).get("dtype", "")) if manifest.is_file() else ""


@dataclass(frozen=True)
class Judging:
    """How one engine under test is judged: its limits, whether under its own choice of experts, and if not, why."""

    limits: tolerance_files.Profile
    replayed: bool
    reason: str | None = None

    @classmethod
    def of(cls, folder: Path, limits: tolerance_files.Tolerances, dtype: str, target: str) -> Judging:
        """Decide it for the bundle, engine or checkpoint in ``folder`` by its profile, ``dtype/target``."""
        profile, file = limits.profile(dtype, target, graph_dtype(folder)), folder / "manifest.json"
        if profile.router_set_agreement is None or not file.is_file():
            return cls(profile, False)
        manifest = read_json(file)
        if manifest.get("kind") != "moe" or not _graph.routed_layers(manifest):
            return cls(profile, False)
        free = f"{FREE}/{target}" in limits.profiles
        if profile.expert_set_agreement is not None and not _graph.names_reads(manifest):
            return cls(profile, False)  # nobody can tell what a changed choice was made from: free-running limits
        if _graph.names_reads(manifest) or not free:  # without either, opening says what to do
            return cls(profile, True)
        reason = (
            f"{folder} does not say what its routers read, so its arithmetic and its routers cannot be judged apart: "
            "these are free-running figures, changed choices of experts included, under the wide limits that they "
            "need. Bundles of older versions lack it; export again."
        )
        return cls(limits.profile(FREE, target, graph_dtype(folder)), False, reason)

    def options(self, *, moe: bool) -> dict[str, Any]:
        """How to open the engine: what it must show of its routing."""
        return {"taps": moe, "router_inputs": True} if self.replayed else {"taps": moe}

    def explained(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return a finished comparison with the reason among its notes."""
        return verdict.with_notes(entry, [self.reason] if self.reason else [])


def reference_options(tests: Iterable[Judging], *, moe: bool) -> dict[str, Any]:
    """How to open the engine that others are compared with; it must replay the choices of those that need it."""
    return {"taps": moe, "replay": True} if moe and any(test.replayed for test in tests) else {"taps": moe}


def _grouped(jobs: list[tuple[str, str, str]], windows: int) -> dict[tuple[str, str, int], list[str]]:
    """(kind, reference, windows) -> tests: a reference runs once for all of them."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for kind, reference, test in jobs:
        # The reference of "kernels" runs on the weights of its test, so each has its own.
        key = f"{reference} <- {test}" if kind == "kernels" else reference
        found.setdefault((kind, key, _count(kind, test, windows)), []).append(test)
    return found


def _compare(
    kind: str,
    reference: str,
    tests: list[str],
    engines: dict[str, Path],
    windows: np.ndarray,
    limits: tolerance_files.Tolerances,
    tolerances: str,
    prefill: int,
    opening: dict[str, Any],
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    """Open the engines of one group, compare, and close them."""
    reference, _, rounded = reference.partition(" <- ")
    moe = reference.endswith(" moe")
    every: dict[str, Any] = {"top_k": ALL_EXPERTS}
    kept = DEQUANTIZED if kind == "kernels" else tolerances
    judged = {test: Judging.of(engines[test], limits, kept, test.split()[0]) for test in tests}
    with ExitStack() as stack:

        def opened(label: str, **options: Any) -> Engine:
            return stack.enter_context(closing(open_engine(engines[label], **opening, **options)))

        if kind == "identity":
            one = opened(reference, taps=moe, **(every if moe else {}))
            checked = {test: (opened(test, **every), judged[test].limits.identity_rel_error) for test in tests}
            return parity.identity_all(one, checked, windows, prefill=prefill, progress=progress)
        options = {"weights_of": engines[rounded]} if rounded else {}
        one = opened(reference, **reference_options(judged.values(), moe=moe), **options)
        compared = {test: (opened(test, **how.options(moe=moe)), how.limits) for test, how in judged.items()}
        found = parity.compare_all(one, compared, windows, prefill=prefill, progress=progress)
        return {test: judged[test].explained(entry) for test, entry in found.items()}


def _said(entry: dict[str, Any]) -> str:
    word = outcomes.mark(verdict.entry_outcome(entry)).word
    if "verdict" not in entry:
        return f"{word}, max relative logit error {_shown(entry['max_rel_error'])}"
    missed = [check["name"] for check in entry["verdict"]["checks"] if not check["passed"]]
    said = f"{word}, beyond the limits: {', '.join(missed)}" if missed else f"{word}, every check passed"
    if replay := entry["replay"]:
        values = [found["overall"]["kl_ref_test"]["mean"] for found in (replay, entry)]
        if None not in values:
            said += f"; KL {values[0]:.2g} under the engine's own choice of experts, {values[1]:.2g} free-running"
    return said


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"


def _count(kind: str, test: str, windows: int) -> int:
    if kind in ("identity", "kernels"):
        return min(IDENTITY_WINDOWS, windows)
    return min(DENSE_WINDOWS, windows) if test.endswith(" dense") else windows
