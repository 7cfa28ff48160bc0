"""``moedge verify``: compare engines on real text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import write_text
from moedge._progress import Progress
from moedge.runtime.bench.machine import commit, created, machine
from moedge.runtime.commands._late import said_last, shown
from moedge.runtime.commands._options import Device, Force, Json, Text, Threads, Tolerances
from moedge.runtime.commands._questions import Limit, Shots, TaskData, Tasks, questions
from moedge.runtime.engines.protocol import Opening
from moedge.runtime.parity import accuracy
from moedge.runtime.parity import baseline as baselines
from moedge.runtime.parity.accuracy import Gate
from moedge.runtime.parity.given import against_kept, verify_given
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.results import Verification
from moedge.runtime.parity.sample import Sample
from moedge.runtime.progress import single
from moedge.runtime.report import checks, ci
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet


def verify(
    reference: Annotated[
        Path,
        typer.Argument(
            help="Run folder (all its pairs), or the reference: bundle or checkpoint; with --reference, what is judged."
        ),
    ],
    test: Annotated[
        Path | None,
        typer.Argument(
            help="Bundle, engine or checkpoint to compare with the reference; or verify-answers.npz of a device."
        ),
    ] = None,
    text: Text = "asset:wiki",
    tokens: Annotated[int, typer.Option(min=0, help="Tokens to compare on; with 0 only answers to --tasks.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of a window in one prefill; the rest is decoded.")] = 224,
    tolerances: Tolerances = "float32",
    tasks: Tasks = None,
    task_data: TaskData = None,
    shots: Shots = 0,
    limit: Limit = None,
    threads: Threads = None,
    device: Device = "cpu",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Larger batches, longer rows, and a text of --max-length tokens.")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=32, help="Longest sequence that is read, with --thorough 2048; by default only short ones are."
        ),
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare nothing: keep what the reference answers in this file (.safetensors)."
        ),
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option("--reference", metavar="FILE", help="Judge by a kept reference, on its text; needs no torch."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Say what is worse than in this older result of --json.")
    ] = None,
    fail_on_worse: Annotated[
        bool,
        typer.Option("--fail-on-worse", help="Exit with 1 when it is worse than the baseline, or nobody can tell."),
    ] = False,
    as_json: Json = False,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the result as one HTML page to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the outcome as Markdown, for a pull request, to this file.")
    ] = None,
    force: Force = False,
) -> int:
    """Compare two engines on real text: logits, KL, top-1 and top-5, expert sets; and the tested one with itself in
    batches, with padding, in pieces and twice. Exits with 1 when a check fails.

    Where one does, the worst window runs once more, and the layer and the part that departs first are named.

    Bundles may carry a library of operators, and engines kernels: native code. Open only those whose origin you trust.

    \b
    Examples:
      moedge verify runs/smollm2-135m
      moedge verify build/moe build/bundles/ort-cpu --junit verify.xml
      moedge verify build/moe build/bundles/ort-cpu --thorough --max-length 4096
      moedge verify build/moe build/bundles/ort-cpu-int8 --tasks arc_easy,piqa,sciq --limit 500
      moedge verify build/moe --save-reference ref.safetensors
      moedge verify build/bundles/ort-cpu --reference ref.safetensors --baseline last.json --markdown verify.md
      moedge verify build/moe verify-answers.npz
    """
    if prefill >= window:
        raise MoEdgeError(f"--prefill {prefill} leaves nothing to decode in a window of {window} tokens (--window).")
    sample = Sample(text, tokens, window, prefill)
    _check(test, save_reference, kept, baseline, fail_on_worse, bool(tasks or thorough or max_length or not tokens))
    if kept and sample != Sample():
        raise MoEdgeError(
            f"{kept} holds the text that it judges on; leave out --text, --tokens, --window and --prefill."
        )
    gate = Gate.of(reference, test, questions(tasks, task_data, shots, limit), tolerances)
    if not tokens and gate is None:
        raise MoEdgeError("There is nothing to compare: --tokens 0 takes no text, and there are no --tasks.")
    old = baselines.read(baseline) if baseline else None
    files = {"--junit": junit, "--html": html, "--markdown": markdown, "--save-reference": save_reference}
    if save_reference and (unread := [option for option in ("--junit", "--html", "--markdown") if files[option]]):
        raise MoEdgeError(f"--save-reference checks nothing, so there is nothing to write for {' and '.join(unread)}.")
    read = [reference, test, kept, baseline, text, tolerances]
    run_folder.check_results(files, [given for given in read if given is not None])
    with single("verify", str(reference)) as reporter:
        if save_reference:
            opening: Opening = {"threads": threads, "pytorch": {"device": device}}
            return _save(reference, save_reference, sample, opening, as_json, reporter.progress, force=force)
        how: dict[str, Any] = {"threads": threads, "device": device, "progress": reporter.progress}
        if kept:
            result = against_kept(reference, kept, tolerances=tolerances, **how)
        else:
            shaped: dict[str, Any] = {"thorough": thorough, "max_length": max_length, "tolerances": tolerances}
            result = _compared(reference, test, sample, gate, shaped, {**how, "note": reporter.note})
    result["created"], result["commit"], result["machine"] = created(), commit(), machine()
    late: list[MoEdgeError] = []
    with said_last(late):
        if old:
            result["baseline"] = baselines.compare(result, old)
    with shown(result, _print, as_json=as_json):
        _write(result, junit=junit, html=html, markdown=markdown, gate=fail_on_worse and not late)
    if late:
        raise late[0]
    worse = fail_on_worse and result["baseline"]["outcome"] != "not worse"
    return 1 if worse else mark(result["outcome"]).exit_code


def _check(
    test: Path | None,
    save_reference: Path | None,
    kept: Path | None,
    baseline: Path | None,
    fail_on_worse: bool,
    more: bool,
) -> None:
    """Refuse options that do not go together; ``more``: something was asked that needs two engines, or no text."""
    if save_reference and (test or kept or baseline or more):
        raise MoEdgeError(
            "--save-reference keeps the answers of one model and compares nothing; name that model alone."
        )
    if kept and test:
        raise MoEdgeError(f"--reference takes the reference's place: name what is to be judged alone, not {test} too.")
    if kept and more:
        raise MoEdgeError("--reference judges by what the file holds; --tasks, --thorough and --max-length need more.")
    if fail_on_worse and not baseline:
        raise MoEdgeError("--fail-on-worse needs an older result to compare with: --baseline FILE.")


def _compared(
    reference: Path, test: Path | None, sample: Sample, gate: Gate | None, shaped: dict[str, Any], how: dict[str, Any]
) -> Verification:
    """Compare on text, where there is some, and on answers, where there are tasks.

    Args:
        reference, test, sample, shaped, how: of :func:`moedge.runtime.parity.given.verify_given`.
        gate: that asks the tasks.
    """
    found = verify_given(reference, test, sample=sample, **shaped, **how) if sample.tokens else None
    if gate is not None:
        found = gate.added(found, **how)
    assert found is not None  # one of the two was asked
    return found


def _save(
    folder: Path, file: Path, sample: Sample, opening: Opening, as_json: bool, progress: Progress, *, force: bool
) -> int:
    """Keep what a model answers, and say what was kept."""
    from moedge.runtime.parity.reference import keep_given

    saved = keep_given(folder, file, sample=sample, opening=opening, progress=progress, force=force)
    print(json.dumps(saved.as_json(), indent=2) if as_json else saved.told())
    return 0


def _write(result: Verification, *, junit: Path | None, html: Path | None, markdown: Path | None, gate: bool) -> None:
    """Write what was asked for, and the summary page of a GitHub job where this runs in one."""
    if html:
        from moedge.runtime.report.verification import page

        write_text(html, page(result))
    if junit:
        write_text(junit, checks.junit_xml(result, gate=gate))
    shown = checks.markdown(result)
    if markdown:
        write_text(markdown, shown)
    ci.step_summary(shown)


def _print(result: Verification) -> None:
    console, texts = Console(), accuracy.texts(result)
    for comparison, group in itertools.groupby(checks.rows(result), key=lambda row: row.comparison):
        on = texts.get(comparison, result["text"])
        console.print(escape(f"{comparison}, on {on}:"), highlight=False, soft_wrap=True)
        table = Sheet()
        for column in ("check", "value", "limit", ""):
            table.add_column(column)
        for row in group:
            table.add_row(row.name, row.shown, f"{row.relation} {row.limit:g}", mark(row.outcome).cell)
        console.print(table)
    for line in checks.said(result):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if found := result.get("baseline"):
        for line in baselines.lines(found):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(mark(result["outcome"]).line)
