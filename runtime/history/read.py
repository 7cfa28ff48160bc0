"""Find stored results and take their figures out, by the ``schema`` key of each file.

A report of ``moedge run`` holds the verification and the benchmark of its run, and the frontier if the run made one: in
a run folder that has one the files of those stages are not read again. What is given as a file is always read.
Everything else that is JSON is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge.runtime.history.schema import METRICS, Metric, Point, Series
from moedge.runtime.run import run_folder

NOT_TOLD = "machine not told"
_LARGEST = 64 << 20
"""Bytes of a file that may be a result; what is larger is none."""


@dataclass(frozen=True)
class Reading:
    """One figure of one file."""

    metric: Metric
    engine: str
    setting: str
    value: float
    ci95: list[float] | None = None
    machine: str = NOT_TOLD
    made: Mapping[str, Any] = field(default_factory=dict)
    """``created`` and ``commit`` where a part of a report tells its own: it may be older than the report."""


def collect(paths: Sequence[Path]) -> tuple[list[Series], int, list[str]]:
    """Read results below ``paths`` (files, folders, run folders).

    Returns:
        Series without steps, by metric, machine, engine and setting; how many files were read; and what was left out.

    Raises:
        MoEdgeError: a path is not there, or nothing holds a result.
    """
    found: dict[tuple[int, str, str, str], list[Point]] = {}
    notes: list[str] = []
    count = 0
    order = list(METRICS)
    for path in _files(paths):
        try:
            document = _document(path)
            if document is None:
                continue
            readings = list(_readings(document))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            notes.append(f"{path} is damaged and left out ({type(error).__name__}: {error})")
            continue
        if older := _older(document):
            notes.append(f"{path} holds {' and '.join(older)} of an older version, which is left out")
        count += bool(readings)
        for one in readings:
            key = (order.index(one.metric), one.machine, one.engine, one.setting)
            found.setdefault(key, []).append(_point(one, document, path))
    if not found:
        given = ", ".join(map(str, paths))
        raise MoEdgeError(
            f"{given} holds no stored results: give run folders, or files of `moedge bench --save`, `moedge verify "
            "--json`, `moedge evaluate --save` and `moedge frontier`."
        )
    series: list[Series] = [
        {
            "metric": order[number],
            "engine": engine,
            "setting": setting,
            "machine": machine,
            "points": sorted(points, key=lambda point: point["when"]),
            "steps": [],
        }
        for (number, machine, engine, setting), points in sorted(found.items())
    ]
    undated = {point["source"] for one in series for point in one["points"] if point["dated"] == "file"}
    if undated:
        notes.append(
            f"{len(undated)} of {count} results do not tell when they were made; the time of the file stands in"
        )
    return series, count, notes


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for given in paths:
        if not given.exists():
            raise MoEdgeError(f"{given} does not exist; give run folders, or files of stored results.")
        for path in sorted(given.rglob("*.json")) if given.is_dir() else [given]:
            inside = path.relative_to(given).parts[:-1] if given.is_dir() else ()
            hidden = any(part.startswith(".") for part in inside)
            covered = given.is_dir() and _in_report(path, given)
            if hidden or covered or path.resolve() in seen or not path.is_file():
                continue
            seen.add(path.resolve())
            yield path


def _in_report(path: Path, given: Path) -> bool:
    """Whether a file belongs to a run whose report holds what it holds."""
    for folder in path.parents:
        if run_folder.is_run(folder) and (report := folder / "report.json").is_file():
            if path == folder / "frontier.json":  # of a `moedge frontier` that shares the folder of a run
                return "frontier" in (_document(report) or {})
            return path != report
        if folder == given:
            break
    return False


def _document(path: Path) -> dict[str, Any] | None:
    """The file's object where its schema is one of :data:`_READERS`; None for anything else."""
    if path.stat().st_size > _LARGEST:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None
    return found if isinstance(found, dict) and found.get("schema") in _READERS else None


def _readings(document: dict[str, Any]) -> Iterator[Reading]:
    yield from _READERS[document["schema"]](document)


def _bench(document: dict[str, Any]) -> Iterator[Reading]:
    machine = _machine(document)
    for point in document["points"]:
        said = [f"batch {point['batch']}", f"prompt {point['prompt']}", f"decode {point['decode']}"]
        said += [f"depth {point['depth']}"] if point["depth"] else []
        for row in point["rows"]:
            info = document["engines"][row["label"]]["info"]
            on_cpu = info["device"] == "CPU"
            where = [f"{point.get('threads') or info['threads']} threads" if on_cpu else info["device"]]
            where += [info["dtype"]] if info.get("dtype") else []
            setting = _of_model(", ".join([*said, *where]), info.get("model", {}).get("label"))
            for metric in ("ttft_ms", "tpot_ms"):
                times = row[metric]
                yield Reading(metric, row["label"], setting, float(times["p50"]), _known(times["ci95"]), machine)


def _verify(document: dict[str, Any]) -> Iterator[Reading]:
    machine = _machine(document)
    for entry in document["parity"]:
        kl = entry["overall"]["kl_ref_test"]
        read = [f"{name} {count}" for name, count in entry["tokens"].items()]  # windows, window, prefill
        setting = ", ".join([document["text"], f"{entry['overall']['tokens']} tokens", *read])
        setting = _of_model(setting, entry.get("test", {}).get("model", {}).get("label"))
        if kl["mean"] is not None:
            half = 1.96 * (kl.get("standard_error") or 0.0)
            ends = [kl["mean"] - half, kl["mean"] + half] if half else None
            yield Reading("kl", entry["name"], setting, float(kl["mean"]), ends, machine)
    for entry in document.get("accuracy", []):
        for task in entry["tasks"]:
            setting = f"{task['task']}, {task['questions']} questions, {entry['shots']} shots, {task['metric']}"
            yield Reading("accuracy", entry["name"], setting, float(task["test_accuracy"]), None, machine)


def _scores(document: dict[str, Any]) -> Iterator[Reading]:
    machine = _machine(document)
    for row in document["rows"]:
        for task in row["tasks"]:
            found = task["metrics"]
            name = "acc" if "acc" in found else next(iter(found))
            error = found[name].get("stderr")
            value = float(found[name]["value"])
            ends = [value - 1.96 * error, value + 1.96 * error] if error else None
            setting = f"{task['task']}, {task['questions']} questions, {task['shots']} shots, {name}"
            yield Reading("accuracy", row["model"], setting, value, ends, machine)


def _frontier(document: dict[str, Any]) -> Iterator[Reading]:
    machine = _machine(document)
    protocol = document["protocol"]
    texts, tokens = " and ".join(protocol["tokens"]), sum(protocol["tokens"].values())
    model = document.get("model")
    read = _of_model(f"to dense, {texts}, {tokens} tokens, window {protocol['window']}", model)
    for variant in document["variants"]:
        kl = variant["kl"]
        yield Reading("kl", variant["label"], read, kl["value"], _known(kl["ci95"]), machine)
    for one in document["measured"]:
        sizes = [f"{name} {one[name]}" for name in ("batch", "prompt", "decode")]
        setting = _of_model(", ".join([*sizes, f"{one['threads']} threads"]), model)
        for row in one["rows"]:
            engine = f"{one['target']} {row['label']}"
            for metric in ("ttft_ms", "tpot_ms"):
                yield Reading(metric, engine, setting, row[metric]["value"], _known(row[metric]["ci95"]), machine)


def _of_model(setting: str, model: str | None) -> str:
    """A setting with the name of the model: every run folder has a ``torch dense`` of its own."""
    return f"{setting}; {model}" if model else setting


def _known(ends: Sequence[float | None]) -> list[float] | None:
    """An interval; None where an end is not known."""
    found = [end for end in ends if end is not None]
    return found if len(found) == len(ends) else None


def _report(document: dict[str, Any]) -> Iterator[Reading]:
    """All parts were made on the report's machine."""
    machine = _machine(document)
    for part in _parts(document):
        for one in _READERS[part["schema"]](part) if part["schema"] in _READERS else ():
            yield replace(one, machine=machine, made={key: part[key] for key in ("created", "commit") if key in part})


def _parts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that a report holds; none of any other result."""
    names = ("speed", "verification", "frontier")
    return [document[name] for name in names if name in document] if document["schema"] == "moedge.report/1" else []


def _older(document: dict[str, Any]) -> list[str]:
    """Schemas of parts that an older version wrote."""
    return [str(part["schema"]) for part in _parts(document) if part["schema"] not in _READERS]


_READERS: dict[str, Callable[[dict[str, Any]], Iterator[Reading]]] = {
    "moedge.bench/2": _bench,
    "moedge.verify/1": _verify,
    "moedge.scores/1": _scores,
    "moedge.frontier/1": _frontier,
    "moedge.report/1": _report,
}


def _machine(document: dict[str, Any]) -> str:
    """What makes two machines one: processor, cores and memory. Versions of software may change: they are the news."""
    facts = document.get("machine")
    if not facts:
        return NOT_TOLD
    return f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']:.0f} GiB"


def _point(one: Reading, document: dict[str, Any], path: Path) -> Point:
    told = one.made.get("created") or document.get("created")
    if told:
        when = datetime.fromisoformat(str(told).replace("Z", "+00:00"))
        when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    else:
        when = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return {
        "when": when.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "dated": "told" if told else "file",
        "commit": one.made.get("commit") or document.get("commit"),
        "value": one.value,
        "ci95": one.ci95,
        "source": str(path),
    }
