"""``moedge bench``: time engines side by side, and judge the times."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import check_all_writable, read_json, write_json, write_text
from moedge._progress import Progress
from moedge.runtime.bench import latency as benchmark
from moedge.runtime.bench.headroom import add_headroom
from moedge.runtime.bench.points import Point, grid, tokens_of
from moedge.runtime.bench.profiling import profilable, profiles
from moedge.runtime.bench.results import SCHEMA, Bench, Gate
from moedge.runtime.commands import _peers
from moedge.runtime.commands._late import said_last, shown
from moedge.runtime.commands._options import Device, Dtype, Json, Numbers, Save, Text, numbers
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.gate import limits
from moedge.runtime.gate.judge import check_common, check_label, judge
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.verdict import Outcome
from moedge.runtime.progress import single
from moedge.runtime.report import bench as tables
from moedge.runtime.report import ci, headroom
from moedge.runtime.report.profile import NOTE, table
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet
from moedge.runtime.text.windows import token_windows

if TYPE_CHECKING:
    import numpy as np


def _share(given: str) -> float:
    """``5%`` -> 0.05."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", given)
    if not found or not 0 < float(found[1]) < 1000:
        raise MoEdgeError(f"--max-slowdown {given!r} is not a share such as 5%.")
    return float(found[1]) / 100


_PROMPT, _DECODE, _DEPTH = Numbers((512,)), Numbers((64,)), Numbers((0,))


def bench(
    engines: Annotated[
        list[str],
        typer.Argument(help="One run folder, or bundles and checkpoints to time together; NAME=PATH names one."),
    ],
    prompt: Annotated[Numbers, numbers("Tokens in the prompt.", least=1)] = _PROMPT,
    decode: Annotated[Numbers, numbers("Tokens generated after it.", least=2)] = _DECODE,
    batch: Annotated[
        Numbers | None,
        numbers("Rows of a call; 1, and a look at decoding 2, 4 and 8 where nothing is judged, by default.", least=1),
    ] = None,
    depth: Annotated[Numbers, numbers("Tokens in the cache before the prompt.", least=0)] = _DEPTH,
    threads: Annotated[Numbers | None, numbers("CPU threads; all physical cores by default.", least=1)] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed rounds, at least.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds dropped before them, at least.")] = 1,
    min_duration: Annotated[float, typer.Option(min=0, help="Seconds that they take at each point, at least.")] = 0.0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    text: Text = "asset:wiki",
    peer: _peers.Timed = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Then profile the bundles: time by operator and by part of the model.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="OLD", help="Time the engine, or the run, beside its older one and judge it: the best test."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Judge against an older result of --save or --json.")
    ] = None,
    max_slowdown: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="A slow-down as large as this must not pass; 5% with --against or --baseline."
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMIT", help='Limit of your own, such as "ttft.p99 > 800ms" (may be repeated).'),
    ] = None,
    as_json: Json = False,
    save: Save = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write a line for each engine and point to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the times into this .svg, .png or .pdf file.")] = None,
) -> int:
    """Time engines side by side: time to first token, time per token, memory, load time. Judges them when asked to.

    Bundles may carry a library of operators, and engines kernels: native code. Open only those whose origin you trust.

    \b
    Examples:
      moedge bench runs/smollm2-135m
      moedge bench build/dense/ort-cpu build/bundles/ort-cpu --batch 1,2,4,8 --depth 0,1024 --csv sweep.csv
      moedge bench build/new --against build/old --max-slowdown 5% --junit bench.xml
      moedge bench moe=build/moe dense=build/dense --baseline last.json --fail-if "moe: ttft.p99 > 800ms"
      moedge bench ./my-llama build/moe --device cuda --dtype bfloat16
      moedge bench build/dense/ort-cpu build/bundles/ort-cpu --profile
      moedge bench build/bundles/ort-cpu-int4 build/dense/ort-cpu-int4 --peer genai:build/peers/genai-int4
    """
    judging = _Judging.of(baseline, against, max_slowdown, fail_if)
    files = {"save": save, "junit": junit, "markdown": markdown, "csv": csv, "plot": plot}
    _check_files(judging.asked, files)
    folders, tokenizer = _given(engines)
    beside = {} if against is None else _older(folders, against)
    folders |= {label: path for label, (_, path) in beside.items()}
    run_folder.check_results(
        _options(files), [text, *engines[:1], *folders.values(), *([baseline] if baseline else [])]
    )
    counts = threads.values if threads else (None,)
    profiled = profilable(folders) if profile else {}
    points = grid(prompt.values, decode.values, batch.values if batch else (1,), depth.values, counts)
    options: dict[str, Any] = {"pytorch": {"device": device, "dtype": dtype}, "last_logits": True}
    openers = {label: partial(open_engine, path, **options) for label, path in folders.items()}
    others, peers = _peers.timed(peer, folders, points, options["pytorch"])
    judging.check((*folders, *others))
    late: list[MoEdgeError] = []
    with single("bench", ", ".join((*folders, *others))) as reporter:
        name, windows = token_windows(tokenizer, text, tokens_of(points), 1)
        result = benchmark.bench(
            {**openers, **others},
            windows[0],
            points,
            repeats=repeats,
            warmup=warmup,
            min_duration=min_duration,
            batches=not batch and not judging.asked,
            peers=peers,
            progress=reporter.progress,
        )
        result["text"] = name
        with said_last(late):
            if profiled:
                result["profiles"] = _profiled(profiled, windows[0], points[0], repeats, reporter.progress)
        add_headroom(result, folders)
    with said_last(late):
        if judging.asked:
            result["gate"] = judging.judge(result, beside)
    with shown(result, _print, as_json=as_json):
        _write(result, files)
    if late:
        raise late[0]
    return mark(result["gate"]["outcome"]).exit_code if judging.asked else 0


@dataclass(frozen=True)
class _Judging:
    """What the times are judged by; read and refused before an hour of timing."""

    older: Bench | None
    """A stored result, of the same machine."""
    beside: bool
    """An older engine is timed in the same rounds."""
    max_slowdown: float
    limits: Sequence[limits.Limit]
    """The user's own."""

    @classmethod
    def of(
        cls, baseline: Path | None, against: str | None, max_slowdown: str | None, fail_if: Sequence[str] | None
    ) -> _Judging:
        """Read the options.

        Raises:
            MoEdgeError: one that cannot be read.
        """
        if max_slowdown is not None and baseline is None and against is None:
            raise MoEdgeError("--max-slowdown compares with something: give --baseline or --against.")
        share = _share(max_slowdown or "5%")
        own = [limits.parse(text) for text in fail_if or []]
        return cls(None if baseline is None else read_result(baseline), against is not None, share, own)

    @property
    def asked(self) -> bool:
        """Whether there is anything to judge by."""
        return bool(self.limits or self.older or self.beside)

    def check(self, labels: Sequence[str]) -> None:
        """Refuse limits and a baseline of engines that are not going to be timed, before an hour of timing.

        Raises:
            MoEdgeError: which.
        """
        for limit in self.limits:
            check_label(limit, labels)
        if self.older is not None:
            check_common(labels, self.older)

    def judge(self, result: Bench, beside: Mapping[str, tuple[str, Path]]) -> Gate:
        """Judge a benchmark; ``beside``: what :func:`_older` found."""
        pairs = {new: old for old, (new, _) in beside.items()}
        return judge(result, baseline=self.older, against=pairs, max_slowdown=self.max_slowdown, limits=self.limits)


def _profiled(
    folders: Mapping[str, Path], ids: np.ndarray, point: Point, repeats: int, progress: Progress
) -> dict[str, Any]:
    """Profile the bundles at one point's prompt, decoded tokens and threads, at batch 1; ids int64 [>= prompt]."""
    return profiles(
        folders,
        ids,
        progress=progress,
        prompt=point.prompt,
        decode=point.decode,
        repeats=repeats,
        threads=point.threads,
    )


def _check_files(judged: bool, files: Mapping[str, Path | None]) -> None:
    """Refuse files that could not be written, before an hour of timing.

    Raises:
        MoEdgeError: which, and why.
    """
    if files["junit"] and not judged:
        raise MoEdgeError("--junit writes checks; give --against, --baseline or --fail-if, which make some.")
    if plot := files["plot"]:
        from moedge.runtime.report import bench_plot

        bench_plot.check_ending(plot)
    check_all_writable(_options(files))


def _options(files: Mapping[str, Path | None]) -> dict[str, Path | None]:
    return {f"--{name}": path for name, path in files.items()}


def _given(engines: list[str]) -> tuple[dict[str, Path], Path]:
    """Label -> folder of every engine, and whose tokenizer reads the text.

    Raises:
        MoEdgeError: nothing to time, one given twice, or a model that cannot be had.
    """
    if len(engines) == 1 and run_folder.is_run(run := Path(engines[0])):
        found, left_out = run_folder.executable(run_folder.engines(run))
        for label, reason in left_out.items():
            typer.echo(f"{label}: {reason}", err=True)
        for reason in run_folder.leftovers(run).values():
            typer.echo(f"{run}: {reason}, and is left out; finish the run with `moedge run`.", err=True)
        if not found:
            raise MoEdgeError(f"{run} has no engines yet; finish it with `moedge run`.")
        return {str(ref): folder for ref, folder in found.items()}, run_folder.tokenizer(run)
    folders = {}
    for given in engines:
        label, path = _named(given)
        if label in folders:
            raise MoEdgeError(f"{label} is given twice; name each engine once.")
        folders[label] = local(path)
    return folders, next(iter(folders.values()))


def _named(given: str) -> tuple[str, Path]:
    """``NAME=PATH`` -> both; a path that is there is one, whatever it holds."""
    name, equals, path = given.partition("=")
    return (name, Path(path)) if equals and name and path and not Path(given).exists() else (given, Path(given))


def _older(folders: dict[str, Path], against: str) -> dict[str, tuple[str, Path]]:
    """Label of an older engine -> label of the new one that it is compared with, and its folder.

    Raises:
        MoEdgeError: it is not said which of several engines it is the older one of.
    """
    if run_folder.is_run(run := Path(against)):
        found = {str(ref): path for ref, path in run_folder.engines(run).items() if str(ref) in folders}
        if not found:
            raise MoEdgeError(f"--against {against}: that run has none of the engines {', '.join(folders)}.")
        return {f"old {label}": (label, path) for label, path in found.items()}
    label, path = _named(against)
    new = label if label in folders and label != against else next(iter(folders))
    if len(folders) > 1 and new != label:
        raise MoEdgeError(
            f"--against {against} is the older one of which engine? Give the new one alone, or its name: NAME=PATH, as "
            f"in --against {new}={path}."
        )
    return {f"old {new}" if label == new else f"old {against}": (new, local(path))}


def read_result(path: Path) -> Bench:
    """Read a stored result.

    Raises:
        MoEdgeError: it is missing, damaged or not a result of this version's `moedge bench`.
    """
    from pydantic import TypeAdapter, ValidationError

    mend = "measure it again with `moedge bench --save`"
    found = read_json(path, mend)
    if found.get("schema") != SCHEMA:
        raise MoEdgeError(f"{path} is no result of `moedge bench`, its schema is not {SCHEMA}; {mend}.")
    try:
        return TypeAdapter(Bench).validate_python(found)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise MoEdgeError(f"{path} is damaged: {place} is not what it should be; {mend}.") from error


def _write(result: Bench, files: Mapping[str, Path | None]) -> None:
    """Write every file that was asked for, and the summary of a GitHub job."""
    writers: dict[str, Callable[[Path], None]] = {
        "save": lambda path: write_json(path, result),
        "junit": lambda path: write_text(path, junit_xml(result["gate"])),
        "markdown": lambda path: write_text(path, tables.markdown(result)),
        "csv": lambda path: write_text(path, tables.csv_text(result)),
        "plot": lambda path: _draw(result, path),
    }
    for name, path in files.items():
        if path is not None and (name != "junit" or "gate" in result):  # it may be that nothing could be judged
            writers[name](path)
    ci.step_summary(tables.markdown(result))


def _draw(result: Bench, path: Path) -> None:
    from moedge.runtime.report import bench_plot

    bench_plot.save(result, path)


def _print(result: Bench) -> None:
    """Print the tables of everything that was measured, and what the gate says."""
    console = Console()
    tables.show(result, console)
    if "profiles" in result:
        show_profiles(result["profiles"], console)
    headroom.show(result, console)
    if "gate" in result:
        tables.show_gate(result["gate"], console)


def junit_xml(gate: Gate) -> str:
    """The checks of a gate as JUnit XML."""
    cases = []
    for check in gate["checks"]:
        case = ci.Case(check["label"], f"{check['what']} at {check['point']}")
        if check["outcome"] != Outcome.PASSED.value:
            case = case._replace(state="failure", said=f"{check['outcome']}: {check['sentence']}")
        cases.append(case)
    return ci.junit_xml("moedge bench", cases)


def show_profiles(found: dict[str, Any], console: Console) -> None:
    """Print, for prefill and decode, milliseconds and share by part of the model and by operator."""
    for phase in ("prefill", "decode"):
        for key, title in (("groups", "part"), ("operators", "operator")):
            labels, rows = table(found, phase, key)
            if not labels:
                continue
            shown = Sheet(title=f"{phase}: milliseconds and share by {title}")
            shown.add_column(title)
            for label in labels:
                shown.add_column(escape(label), justify="right")
            for name, cells in rows:
                shown.add_row(
                    escape(name), *(f"{cell['ms']:.2f}  {cell['share']:4.0%}" if cell else "" for cell in cells)
                )
            console.print(shown)
    console.print(NOTE, highlight=False, soft_wrap=True)
