"""Verify what a user names: all pairs of a run folder, two engines, or the answers that a device gave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.configs import tolerances as tolerance_files
from moedge.convert.adapters import MOE_PREFIX
from moedge.export import manifest as manifests
from moedge.export.targets import PORTABLE
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.engines.protocol import Opening
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity import shapes, verdict, where
from moedge.runtime.parity.results import Compared, ParityEntry, ShapesEntry, Verification
from moedge.runtime.parity.sample import Sample
from moedge.runtime.parity.suite import (
    DEQUANTIZED,
    NOTHING,
    SCHEMA,
    Judging,
    exact_limits,
    finished,
    kernel_limits,
    reference_options,
    verify_run,
)
from moedge.runtime.run import run_folder
from moedge.runtime.run.refs import is_quantised


def verify_given(
    reference: Path,
    test: Path | None = None,
    *,
    sample: Sample,
    tolerances: str | Path = "float32",
    threads: int | None = None,
    device: str = "cpu",
    thorough: bool = False,
    max_length: int | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Verification:
    """Compare two engines on text and judge what was found.

    Args:
        reference: bundle or checkpoint; or a run folder, all of whose pairs are compared.
        test: bundle, engine or checkpoint; or ``verify-answers.npz`` of a device. None for a run folder.
        sample: the text.
        tolerances: the first half of a profile's name, or a file (:func:`moedge.configs.tolerances.given_as`).
        threads: of the engines on the CPU. device: where PyTorch computes.
        thorough: larger batches and longer rows in the checks of :mod:`.shapes`, and a text of ``max_length`` tokens.
        max_length: tokens of that text; without it and ``thorough`` none is read, 2,048 by default.
        progress: called with (tokens done, tokens in all). note: called with a sentence about a finished comparison.

    Returns:
        JSON of schema ``moedge.verify/1``: see :func:`moedge.runtime.parity.suite.verify_run`.

    Raises:
        MoEdgeError: something named is not there or cannot be compared, or there is too little text.
    """
    opening: Opening = {"threads": threads, "pytorch": {"device": device}}
    step = progress or (lambda done, total: None)
    profile, limits = tolerance_files.chosen(tolerance_files.given_as(tolerances))

    def asked(folder: Path, windows: np.ndarray) -> shapes.Asked:
        return shapes.asked(windows, partial(sample.longer, folder), thorough=thorough, max_length=max_length)

    if test is None:
        if not run_folder.is_run(reference):
            raise MoEdgeError(f"{reference} is not a run folder; give a run folder, or two engines to compare.")
        checkpoint = run_folder.converted(reference)
        if not run_folder.bundles(reference):
            raise MoEdgeError(NOTHING)
        name, windows = sample.windows(checkpoint)
        return verify_run(
            run_folder.engines(reference),
            windows,
            prefill=sample.prefill,
            tolerances=profile,
            limits=limits,
            text=name,
            **opening,
            asked=asked(checkpoint, windows),
            progress=progress,
            note=note,
        )
    if test.suffix == ".npz":
        if thorough or max_length or sample != Sample():
            raise MoEdgeError(
                f"{test} holds a device's answers to its own prompts: no other text can be compared, and none in other "
                "shapes or longer; leave out text, tokens, window, prefill, thorough and max_length."
            )
        return answers_of_device(local(reference), test, profile, opening, step, limits)
    one, two = local(reference), local(test)
    name, windows = sample.windows(two)
    return pair(one, two, name, windows, sample.prefill, profile, opening, step, limits, asked(two, windows))


def against_kept(
    test: Path,
    file: Path,
    *,
    tolerances: str | Path = "float32",
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Verification:
    """Judge an engine by a kept reference, on the reference's text (:mod:`moedge.runtime.parity.against`).

    Args:
        test: bundle, engine or checkpoint.
        file: what ``moedge verify ... --save-reference`` wrote.
        tolerances, threads, device, progress: as in :func:`verify_given`.

    Raises:
        MoEdgeError: something named is not there, or the reference is of another model.
    """
    from moedge.runtime.parity.against import verify_kept

    profile, limits = tolerance_files.chosen(tolerance_files.given_as(tolerances))
    opening: Opening = {"threads": threads, "pytorch": {"device": device}}
    step = progress or (lambda done, total: None)
    return verify_kept(local(test), file, tolerances=profile, limits=limits, opening=opening, progress=step)


def pair(
    reference: Path,
    test: Path,
    text: str,
    windows: Any,
    prefill: int,
    tolerances: str,
    opening: Opening,
    progress: Progress,
    limits: tolerance_files.Tolerances | None = None,
    asked: shapes.Asked | None = None,
) -> Verification:
    """Compare two engines; a quantised one also with float32 on its own de-quantised weights, if it has the bundle.

    The arguments are those of :func:`moedge.runtime.parity.suite.verify_run`; ``opening`` goes to both engines.
    """
    limits = limits or tolerance_files.load()
    target = _target(test)
    jobs: list[tuple[Path, str, str, dict[str, Any]]] = [(reference, f"{test} vs {reference}", tolerances, {})]
    if is_quantised(target):
        found = [path for path in (reference, test.parent / PORTABLE) if _target(path) == PORTABLE]
        if found:
            jobs.append((found[0], f"{test} vs its de-quantised weights", DEQUANTIZED, {"weights_of": test}))
    entries: list[ParityEntry] = []
    shaped: list[ShapesEntry] = []
    for number, (folder, name, dtype, options) in enumerate(jobs):
        how = Judging.of(test, limits, dtype, target or "torch")
        openers = (
            partial(open_engine, folder, **opening, **_reference_options(folder, how, target), **options),
            partial(open_engine, test, **opening, **how.options(moe=_is_moe(test))),
        )
        one, two = (opener() for opener in openers)

        def step(done: int, total: int, number: int = number) -> None:
            progress(done + number * total, total * len(jobs))

        try:
            entry = parity.compare(one, two, windows, prefill=prefill, tolerances=how.limits, progress=step)
            if asked and number == len(jobs) - 1:
                rules = how.rules(kernel_limits(test, limits, tolerances, target or "torch"), one, two)
                shaped.append({"name": shapes.name(str(test)), **shapes.check(two, windows, asked, rules)})
        finally:
            one.close()
            two.close()
        exact = exact_limits(limits, how.limits, tolerances, target)
        again = where.Again(*openers, windows[0], prefill, how.limits, exact)
        entry = where.explained(how.explained(entry), list(windows), again.on, test)
        entries.append({"name": name, **entry})
    if len(entries) > 1:
        entries[0] = verdict.with_notes(entries[0], verdict.quantised_notes(entries[0], entries[1], target))
    result: Compared = {"schema": SCHEMA, "text": text, "identity": [], "parity": entries}
    if asked:
        result["shapes"] = shaped
    return finished(result, limits)


def answers_of_device(
    reference: Path,
    answers: Path,
    tolerances: str,
    opening: Opening,
    progress: Progress,
    limits: tolerance_files.Tolerances | None = None,
) -> Verification:
    """Judge what an engine gave on its device; the archive's prompts are the text. Arguments as in :func:`pair`."""
    from moedge.runtime.parity import recorded

    found = recorded.Recorded(answers)
    limits = limits or tolerance_files.load()
    judged = limits.profile(tolerances, found.info.model.target, found.info.dtype)
    options: dict[str, Any] = {"taps": True, "replay": True} if found.routed else {}
    one = open_engine(reference, **opening, **options)
    try:
        entry = recorded.compare(one, found, judged, progress)
    finally:
        one.close()
    if one.info.model.gathered:  # nobody recorded what was left out
        entry = verdict.with_notes(entry, [Judging.unshown(answers)])
    cases = [case["ids"] for case in found.cases]
    entry = where.explained(entry, cases, _RECORDED, reference)
    parity_entries: list[ParityEntry] = [{"name": f"{answers} vs {reference}", **entry}]
    text = f"the prompts of {answers.name}"
    return finished({"schema": SCHEMA, "text": text, "identity": [], "parity": parity_entries}, limits)


_RECORDED = (
    "a device records its answers and no layers; verify the bundle that its engine was built from, which shows them."
)


def _target(folder: Path) -> str:
    """Target of a bundle, or an empty string for anything else."""
    manifest = manifests.read(folder)
    return manifest.target if manifest else ""


def _reference_options(folder: Path, how: Judging, target: str) -> dict[str, Any]:
    options = reference_options([how], moe=_is_moe(folder))
    if options.get("replay") and _target(folder) not in (PORTABLE, ""):
        raise MoEdgeError(
            f"{target} is judged under its own choices, which {folder} cannot replay; compare it with "
            "the portable bundle or the checkpoint."
        )
    return options


def _is_moe(folder: Path) -> bool:
    if manifest := manifests.read(folder):
        return manifest.kind == "moe"
    config = folder / "config.json"
    return config.is_file() and str(run_folder.read_json(config).get("model_type", "")).startswith(MOE_PREFIX)
