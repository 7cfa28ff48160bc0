"""``moedge verify``: compare engines on real text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import write_text
from moedge.runtime.commands._options import Device, Json, Text, Threads, Tolerances
from moedge.runtime.commands._questions import Limit, Shots, TaskData, Tasks, questions
from moedge.runtime.parity import accuracy, verdict
from moedge.runtime.parity.accuracy import Gate
from moedge.runtime.parity.given import verify_given
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.results import IdentityEntry, ParityEntry, Replayed, Verification
from moedge.runtime.progress import single
from moedge.runtime.tables import Sheet


def verify(
    reference: Annotated[
        Path, typer.Argument(help="Run folder (all its pairs), or the reference: bundle or checkpoint.")
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
    as_json: Json = False,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the result as one HTML page to this file.")] = None,
) -> int:
    """Compare two engines on real text: logits, KL, top-1 and top-5, expert sets; and the tested one with itself in
    batches, with padding, in pieces and twice. Exits with 1 when a check fails.

    Where one does, the worst window runs once more, and the layer and the part that departs first are named.

    \b
    Examples:
      moedge verify runs/smollm2-135m
      moedge verify build/moe build/bundles/ort-cpu --junit verify.xml
      moedge verify build/moe build/bundles/ort-cpu --thorough --max-length 4096
      moedge verify build/moe build/bundles/ort-cpu-int8 --tasks arc_easy,piqa,sciq --limit 500
      moedge verify build/moe verify-answers.npz
    """
    if prefill >= window:
        raise MoEdgeError(f"--prefill {prefill} leaves nothing to decode in a window of {window} tokens (--window).")
    gate = Gate.of(reference, test, questions(tasks, task_data, shots, limit), tolerances)
    if not tokens and gate is None:
        raise MoEdgeError("There is nothing to compare: --tokens 0 takes no text, and there are no --tasks.")
    result: Verification | None = None
    with single("verify", str(reference)) as reporter:
        if tokens:
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
                thorough=thorough,
                max_length=max_length,
                progress=reporter.progress,
                note=reporter.note,
            )
        if gate is not None:
            watched: dict[str, Any] = {"progress": reporter.progress, "note": reporter.note}
            result = gate.added(result, threads=threads, device=device, **watched)
    assert result is not None
    if junit:
        write_text(junit, junit_xml(result))
    if html:
        from moedge.runtime.report.verification import page

        write_text(html, page(result))
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)
    return mark(result["outcome"]).exit_code


def checks(result: Verification) -> list[tuple[str, str, float | None, str, float, verdict.Outcome]]:
    """Every check of a verify result: (comparison, check, value, relation, limit, outcome)."""
    rows: list[tuple[str, str, float | None, str, float, verdict.Outcome]] = []
    for same in result["identity"]:
        value, outcome = same["max_rel_error"], verdict.entry_outcome(same)
        rows.append((same["name"], "identity.max_rel_error", value, "<=", same["limit"], outcome))
    for entry in (*result["parity"], *result.get("shapes", []), *result.get("accuracy", [])):
        for check in entry["verdict"]["checks"]:
            values = (check["name"], check["value"], check["relation"], check["limit"], verdict.outcome_of(check))
            rows.append((entry["name"], *values))
    return rows


def entries(result: Verification) -> list[IdentityEntry | ParityEntry]:
    """Every comparison of a verify result."""
    return [*result["identity"], *result["parity"]]


def junit_xml(result: Verification) -> str:
    """The checks as JUnit XML, one test case each, for a CI server; what is not decided is a failure that says so."""
    rows = checks(result)
    not_run = [(entry["name"], *item) for entry in result.get("shapes", []) for item in entry["not_run"].items()]
    suite = ElementTree.Element(
        "testsuite",
        name="moedge verify",
        tests=str(len(rows) + len(not_run)),
        failures=str(sum(row[-1] is not verdict.Outcome.PASSED for row in rows)),
        skipped=str(len(not_run)),
    )
    where = {entry["name"]: entry["location"]["sentence"] for entry in entries(result) if "location" in entry}
    for comparison, name, value, relation, limit, outcome in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=comparison, name=name)
        if outcome is not verdict.Outcome.PASSED:
            said = f"{outcome.value}: {name} is {value}, must be {relation} {limit}"
            if comparison in where:
                said = f"{said}. {where[comparison]}"
            ElementTree.SubElement(case, "failure", message=said)
    for comparison, name, reason in not_run:
        case = ElementTree.SubElement(suite, "testcase", classname=comparison, name=name)
        ElementTree.SubElement(case, "skipped", message=reason)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def explained(entry: ParityEntry, replay: Replayed) -> str:
    """One sentence: the error of the arithmetic, the choices, and what changed ones cost."""

    def shown(value: float | None, form: str) -> str:
        return "none" if value is None else format(value, form)

    free, forced, kept = entry["overall"], replay["overall"], replay.get("kept")
    routed = replay["router"]["compared"] or kept is None
    right, same = [], ""
    if routed:
        right.append(f"router right in {shown(replay['router'].get('agreement'), '.4%')} of its decisions")
        same = f"the same set in {shown(entry['routing'].get('agreement'), '.1%')}, "
    if kept is not None:
        right.append(f"{shown(kept.get('agreement'), '.4%')} of values rightly kept or left out")
    return (
        f"{entry['name']}: KL {shown(forced['kl_ref_test']['mean'], '.3g')} under the engine's own "
        f"{'choice of experts' if kept is None else 'choices'} (the arithmetic), {', '.join(right)}; "
        f"free-running KL {shown(free['kl_ref_test']['mean'], '.3g')}, {same}perplexity "
        f"x{shown(free['perplexity']['ratio'], '.3f')} (the cost of changed choices, a property of the model)"
    )


def _parts(entry: ParityEntry) -> str:
    said = []
    for name, passed in entry["verdict"]["parts"].items():
        checked = [check for check in entry["verdict"]["checks"] if check["name"].startswith(f"{name}.")]
        outcomes = [verdict.outcome_of(check) for check in checked] or [verdict.outcome_of({"passed": passed})]
        outcome = verdict.Outcome.over(outcomes)
        said.append(f"{name} {mark(outcome).word}")
    return f"{entry['name']}: {', '.join(said)}"


def _sentences(result: Verification) -> Iterator[str]:
    """What is said below the tables."""
    for same in result["identity"]:
        if "location" in same:  # a parity check has it among its notes
            yield f"{same['name']}: {same['location']['sentence']}"
    for entry in result["parity"]:
        if replay := entry["replay"]:
            yield from (explained(entry, replay), _parts(entry))
        yield from (f"{entry['name']}: {sentence}" for sentence in entry["verdict"]["notes"])
    for shaped in result.get("shapes", []):
        not_run = [f"{name} was not run: {reason}." for name, reason in shaped["not_run"].items()]
        yield from (f"{shaped['name']}: {sentence}" for sentence in (*shaped["verdict"]["notes"], *not_run))
    for answers in result.get("accuracy", []):
        yield from (f"{answers['name']}: {sentence}" for sentence in answers["verdict"]["notes"])


def _print(result: Verification) -> None:
    rows = checks(result)
    console, texts = Console(), accuracy.texts(result)
    for comparison, group in itertools.groupby(rows, key=lambda row: row[0]):
        on = texts.get(comparison, result["text"])
        console.print(escape(f"{comparison}, on {on}:"), highlight=False, soft_wrap=True)
        table = Sheet()
        for column in ("check", "value", "limit", ""):
            table.add_column(column)
        for _, name, value, relation, limit, outcome in group:
            shown = "none" if value is None else f"{value:.6g}"
            table.add_row(name, shown, f"{relation} {limit:g}", mark(outcome).cell)
        console.print(table)
    for line in _sentences(result):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(mark(result["outcome"]).line)
