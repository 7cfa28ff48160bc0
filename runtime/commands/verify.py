"""``moedge verify``: compare engines on real text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import write_text
from moedge.configs import tolerances as tolerance_files
from moedge.runtime.commands._options import Device, Json, Text, Threads
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity import verdict
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.suite import (
    DEQUANTIZED,
    SCHEMA,
    Judging,
    finished,
    is_quantised,
    reference_options,
    verify_run,
)
from moedge.runtime.progress import single
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet
from moedge.runtime.text.windows import token_windows


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
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of a window in one prefill; the rest is decoded.")] = 224,
    tolerances: Annotated[
        str,
        typer.Option(help="First half of a profile in configs/tolerances.yaml, such as float32 of float32/ort-cpu."),
    ] = "float32",
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML to this file.")] = None,
) -> int:
    """Compare two engines on real text: logits, KL, top-1 and top-5, expert sets. Exits with 1 when a check fails.

    \b
    Examples:
      moedge verify runs/smollm2-135m
      moedge verify build/moe build/bundles/ort-cpu --junit verify.xml
      moedge verify build/moe verify-answers.npz
    """
    if prefill >= window:
        raise MoEdgeError(f"--prefill {prefill} leaves nothing to decode in a window of {window} tokens (--window).")
    count = -(-tokens // window)
    opening: dict[str, Any] = {"threads": threads, "pytorch": {"device": device}}
    with single("verify", str(reference)) as reporter:
        if test is None:
            if not run_folder.is_run(reference):
                raise MoEdgeError(f"{reference} is not a run folder; give a run folder, or two engines to compare.")
            engines = run_folder.engines(reference)
            name, windows = token_windows(run_folder.checkpoint(reference), text, window, count)
            result = verify_run(
                engines,
                windows,
                prefill=prefill,
                tolerances=tolerances,
                text=name,
                **opening,
                progress=reporter.progress,
                note=reporter.note,
            )
        elif test.suffix == ".npz":
            result = _device(local(reference), test, tolerances, opening, reporter.progress)
        else:
            pair = local(reference), local(test)
            name, windows = token_windows(pair[1], text, window, count)
            result = _pair(*pair, name, windows, prefill, tolerances, opening, reporter.progress)
    if junit:
        write_text(junit, junit_xml(result))
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)
    return mark(result["outcome"]).exit_code


def _pair(
    reference: Path,
    test: Path,
    text: str,
    windows: Any,
    prefill: int,
    tolerances: str,
    opening: dict[str, Any],
    progress: Any,
) -> dict[str, Any]:
    """Compare two engines; a quantised one also with float32 on its own de-quantised weights, if it has the bundle."""
    target = _target(test)
    jobs: list[tuple[Path, str, str, dict[str, Any]]] = [(reference, f"{test} vs {reference}", tolerances, {})]
    if is_quantised(target):
        found = [path for path in (reference, test.parent / "portable") if _target(path) == "portable"]
        if found:
            jobs.append((found[0], f"{test} vs its de-quantised weights", DEQUANTIZED, {"weights_of": test}))
    entries, limits = [], tolerance_files.load()
    for number, (folder, name, dtype, options) in enumerate(jobs):
        how = Judging.of(test, limits, dtype, target or "torch")
        one = open_engine(folder, **opening, **_reference_options(folder, how, target), **options)
        two = open_engine(test, **opening, **how.options(moe=_is_moe(test)))

        def step(done: int, total: int, number: int = number) -> None:
            progress(done + number * total, total * len(jobs))

        try:
            entry = parity.compare(one, two, windows, prefill=prefill, tolerances=how.limits, progress=step)
        finally:
            one.close()
            two.close()
        entries.append({"name": name, **how.explained(entry)})
    if len(entries) > 1:
        entries[0] = verdict.with_notes(entries[0], verdict.quantised_notes(entries[0], entries[1], target))
    return finished({"schema": SCHEMA, "text": text, "identity": [], "parity": entries})


def _device(reference: Path, answers: Path, tolerances: str, opening: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Judge what an engine gave on its device; the archive's prompts are the text."""
    from moedge.runtime.parity import recorded

    found = recorded.Recorded(answers)
    limits = tolerance_files.load().profile(tolerances, str(found.info.model["target"]), found.info.dtype)
    options: dict[str, Any] = {"taps": True, "replay": True} if found.routed else {}
    one = open_engine(reference, **opening, **options)
    try:
        entry = recorded.compare(one, found, limits, progress)
    finally:
        one.close()
    parity_entries = [{"name": f"{answers} vs {reference}", **entry}]
    text = f"the prompts of {answers.name}"
    return finished({"schema": SCHEMA, "text": text, "identity": [], "parity": parity_entries})


def _target(folder: Path) -> str:
    """Target of a bundle, or an empty string for anything else."""
    manifest = folder / "manifest.json"
    return str(run_folder.read_json(manifest).get("target", "")) if manifest.is_file() else ""


def _reference_options(folder: Path, how: Judging, target: str) -> dict[str, Any]:
    options = reference_options([how], moe=_is_moe(folder))
    if options.get("replay") and _target(folder) not in ("portable", ""):
        raise MoEdgeError(
            f"{target} is judged under its own choice of experts, which {folder} cannot replay; compare it with "
            "the portable bundle or the checkpoint."
        )
    return options


def _is_moe(folder: Path) -> bool:
    for name, key, value in (("manifest.json", "kind", "moe"), ("config.json", "model_type", "moedge_")):
        if (folder / name).is_file():
            return str(run_folder.read_json(folder / name).get(key, "")).startswith(value)
    return False


def checks(result: dict[str, Any]) -> list[tuple[str, str, float | None, str, float, verdict.Outcome]]:
    """Every check of a verify result: (comparison, check, value, relation, limit, outcome)."""
    rows: list[tuple[str, str, float | None, str, float, verdict.Outcome]] = []
    for entry in result["identity"]:
        value, outcome = entry["max_rel_error"], verdict.entry_outcome(entry)
        rows.append((entry["name"], "identity.max_rel_error", value, "<=", entry["limit"], outcome))
    for entry in result["parity"]:
        for check in entry["verdict"]["checks"]:
            values = (check["name"], check["value"], check["relation"], check["limit"], verdict.outcome_of(check))
            rows.append((entry["name"], *values))
    return rows


def junit_xml(result: dict[str, Any]) -> str:
    """The checks as JUnit XML, one test case each, for a CI server; what is not decided is a failure that says so."""
    rows = checks(result)
    suite = ElementTree.Element(
        "testsuite",
        name="moedge verify",
        tests=str(len(rows)),
        failures=str(sum(row[-1] is not verdict.Outcome.PASSED for row in rows)),
    )
    for comparison, name, value, relation, limit, outcome in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=comparison, name=name)
        if outcome is not verdict.Outcome.PASSED:
            said = f"{outcome.value}: {name} is {value}, must be {relation} {limit}"
            ElementTree.SubElement(case, "failure", message=said)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def explained(entry: dict[str, Any], replay: dict[str, Any]) -> str:
    """One sentence: the error of the arithmetic, the router, and what changed choices cost."""

    def shown(value: float | None, form: str) -> str:
        return "none" if value is None else format(value, form)

    free, forced = entry["overall"], replay["overall"]
    return (
        f"{entry['name']}: KL {shown(forced['kl_ref_test']['mean'], '.3g')} under the engine's own choice of experts "
        f"(the arithmetic), router right in {shown(replay['router'].get('agreement'), '.4%')} of its decisions; "
        f"free-running KL {shown(free['kl_ref_test']['mean'], '.3g')}, the same set in "
        f"{shown(entry['routing'].get('agreement'), '.1%')}, perplexity x{shown(free['perplexity']['ratio'], '.3f')} "
        "(the cost of changed choices, a property of the model)"
    )


def _parts(entry: dict[str, Any]) -> str:
    said = []
    for name, passed in entry["verdict"]["parts"].items():
        checked = [check for check in entry["verdict"]["checks"] if check["name"].startswith(f"{name}.")]
        outcome = verdict.Outcome.over(map(verdict.outcome_of, checked or [{"passed": passed}]))
        said.append(f"{name} {mark(outcome).word}")
    return f"{entry['name']}: {', '.join(said)}"


def _print(result: dict[str, Any]) -> None:
    rows = checks(result)
    console = Console()
    for comparison, group in itertools.groupby(rows, key=lambda row: row[0]):
        console.print(escape(f"{comparison}, on {result['text']}:"), highlight=False, soft_wrap=True)
        table = Sheet()
        for column in ("check", "value", "limit", ""):
            table.add_column(column)
        for _, name, value, relation, limit, outcome in group:
            shown = "none" if value is None else f"{value:.6g}"
            table.add_row(name, shown, f"{relation} {limit:g}", mark(outcome).cell)
        console.print(table)
    for entry in result["parity"]:
        if replay := entry["replay"]:
            for line in (explained(entry, replay), _parts(entry)):
                console.print(escape(line), highlight=False, soft_wrap=True)
        for sentence in entry["verdict"]["notes"]:
            console.print(escape(f"{entry['name']}: {sentence}"), highlight=False, soft_wrap=True)
    console.print(mark(result["outcome"]).line)
