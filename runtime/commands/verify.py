"""``moedge verify``: compare engines on real text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import write_text
from moedge.runtime.commands._options import Device, Force, Json, Text, Threads, Tolerances
from moedge.runtime.parity import baseline as baselines
from moedge.runtime.parity.given import against_kept, verify_given
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.results import Verification
from moedge.runtime.progress import single
from moedge.runtime.report import checks
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
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of a window in one prefill; the rest is decoded.")] = 224,
    tolerances: Tolerances = "float32",
    threads: Threads = None,
    device: Device = "cpu",
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
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the outcome as Markdown, for a pull request, to this file.")
    ] = None,
    force: Force = False,
) -> int:
    """Compare two engines on real text: logits, KL, top-1 and top-5, expert sets. Exits with 1 when a check fails.

    \b
    Examples:
      moedge verify runs/smollm2-135m
      moedge verify build/moe build/bundles/ort-cpu --junit verify.xml
      moedge verify build/moe --save-reference ref.safetensors
      moedge verify build/bundles/ort-cpu --reference ref.safetensors --baseline last.json --markdown verify.md
      moedge verify build/moe verify-answers.npz
    """
    _check(test, save_reference, kept, baseline, fail_on_worse, prefill, window)
    old = baselines.read(baseline) if baseline else None
    with single("verify", str(reference)) as reporter:
        if save_reference:
            from moedge.runtime.parity import reference as references

            opening = {"threads": threads, "pytorch": {"device": device}}
            saved = references.keep_given(
                reference, save_reference, text=text, tokens=tokens, window=window, prefill=prefill, opening=opening,
                force=force, progress=reporter.progress,
            )  # fmt: skip
            print(json.dumps(saved.as_json(), indent=2) if as_json else saved.told())
            return 0
        if kept:
            result = against_kept(
                reference, kept, tolerances=tolerances, threads=threads, device=device, progress=reporter.progress
            )
        else:
            result = verify_given(
                reference,
                test,
                text=text,
                tokens=tokens,
                window=window,
                prefill=prefill,
                tolerances=tolerances,
                threads=threads,
                device=device,
                progress=reporter.progress,
                note=reporter.note,
            )
    if old:
        result["baseline"] = baselines.compare(result, old)
    _write(result, junit, markdown, gate=fail_on_worse)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)
    worse = fail_on_worse and result["baseline"]["outcome"] != "not worse"
    return 1 if worse else mark(result["outcome"]).exit_code


def _check(
    test: Path | None,
    save_reference: Path | None,
    kept: Path | None,
    baseline: Path | None,
    fail_on_worse: bool,
    prefill: int,
    window: int,
) -> None:
    """Refuse options that do not go together."""
    if prefill >= window:
        raise MoEdgeError(f"--prefill {prefill} leaves nothing to decode in a window of {window} tokens (--window).")
    if save_reference and (test or kept or baseline):
        raise MoEdgeError(
            "--save-reference keeps the answers of one model and compares nothing; name that model alone."
        )
    if kept and test:
        raise MoEdgeError(f"--reference takes the reference's place: name what is to be judged alone, not {test} too.")
    if fail_on_worse and not baseline:
        raise MoEdgeError("--fail-on-worse needs an older result to compare with: --baseline FILE.")


def _write(result: Verification, junit: Path | None, markdown: Path | None, *, gate: bool) -> None:
    """Write what was asked for, and the summary page of a GitHub job where this runs in one."""
    if junit:
        write_text(junit, checks.junit_xml(result, gate=gate))
    shown = checks.markdown(result)
    if markdown:
        write_text(markdown, shown)
    checks.step_summary(shown)


def _print(result: Verification) -> None:
    console = Console()
    for comparison, group in itertools.groupby(checks.rows(result), key=lambda row: row.comparison):
        console.print(escape(f"{comparison}, on {result['text']}:"), highlight=False, soft_wrap=True)
        table = Sheet()
        for column in ("check", "value", "limit", ""):
            table.add_column(column)
        for row in group:
            table.add_row(row.name, row.shown, f"{row.relation} {row.limit:g}", mark(row.outcome).cell)
        console.print(table)
    for entry in result["parity"]:
        notes = [f"{entry['name']}: {sentence}" for sentence in entry["verdict"]["notes"]]
        for line in (*checks.said(entry), *notes):
            console.print(escape(line), highlight=False, soft_wrap=True)
    if found := result.get("baseline"):
        for line in baselines.lines(found):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(mark(result["outcome"]).line)
