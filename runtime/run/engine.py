"""The stage engine behind ``moedge run``: content-addressed, resumable, one run at a time per folder.

A stage reads the folders of earlier stages and fills one folder of its own, ``<run>/<stage>/``, which appears whole
or not at all and ends with ``stage.json``. The stage's key is a digest of its parameters, the content of what it
reads, the source code it runs and the versions of the libraries it uses. A stage is reused when its key and the
hashes of its files still match; so a changed input rebuilds only what depends on it, a damaged file is rebuilt, and
an interrupted run resumes. What the stages do is in :mod:`moedge.runtime.run.stages`; this module knows nothing about
models.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import moedge
from moedge import MoEdgeError
from moedge._files import atomic_dir, digest, remove_partials, sha256_file, write_json
from moedge._versions import installed
from moedge.runtime.progress import Reporter

STAGE_SCHEMA = "moedge.stage/1"
_PACKAGE = Path(moedge.__file__).parent


@dataclass
class Context:
    """What a stage body gets.

    ``out`` is an empty folder to fill, ``root`` the run folder whose stage folders it may read. ``params`` are the
    stage's parameters; a body takes nothing from elsewhere, for what is not in the key must not change the result.
    """

    out: Path
    root: Path
    params: dict[str, Any]
    progress: Callable[[int, int], None]
    note: Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    ``params`` is JSON and, like ``reads``, ``sources``, ``libraries`` and the source text of ``body``, part of the key.
    ``reads`` names earlier stages. ``sources`` are packages or files of moedge whose code the body runs (``"convert"``,
    ``"convert/ops/__init__.py"``). ``libraries`` are distributions whose version matters.

    ``identity`` returns the digest that later stages see, when it is not simply the hash of the stage's files (a stage
    that only points to a big folder elsewhere); it returns None when what it points to is gone or changed, and then the
    stage runs again. ``check`` is called with the stage's finished folder, reused or not, before later stages start; it
    raises when what was found cannot work with the rest of the recipe.

    ``called`` lets one body serve several stages of a run: the name by which the body looks for a folder in
    ``Context.root`` -> the stage, one of ``reads``, whose folder it finds there. Other folders are not seen then.
    """

    name: str
    what: str
    body: Callable[[Context], None]
    params: dict[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    libraries: tuple[str | tuple[str, ...], ...] = ()
    identity: Callable[[Path], str | None] | None = None
    check: Callable[[Path], None] | None = None
    called: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """Whether a stage can be reused, why not, and the digest that later stages see when it can."""

    state: Literal["cached", "run", "depends"]
    reason: str
    digest: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What happened to a stage in one run."""

    name: str
    reused: bool
    reason: str
    seconds: float


def parts(stage: Stage, inputs: dict[str, str]) -> dict[str, Any]:
    """Return what the key of ``stage`` is made of; ``inputs`` maps each stage it reads to that stage's digest."""
    return {
        "stage": stage.name,
        "params": stage.params,
        "inputs": {name: inputs[name] for name in stage.reads},
        "code": digest([source_digests(stage.sources), inspect.getsource(stage.body)]),
        "versions": {"moedge": moedge.__version__, **versions(stage.libraries)},
    }


def examine(stage: Stage, root: Path, inputs: dict[str, str], *, forced: bool = False) -> Status:
    """Decide whether the folder of ``stage`` in ``root`` can be reused."""
    folder = root / stage.name
    if forced:
        return Status("run", "forced")
    if not folder.exists():
        return Status("run", "not built yet")
    try:
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        kept, outputs = record["parts"], record["outputs"]
        key, recorded_key = digest(parts(stage, inputs)), record["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return Status("run", "its stage.json is missing or damaged")
    if key != recorded_key or digest(kept) != recorded_key:
        return Status("run", _difference(parts(stage, inputs), kept))
    found = hash_folder(folder)
    if found != outputs:
        changed = sorted(name for name in {*found, *outputs} if found.get(name) != outputs.get(name))
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return Status("run", f"{stage.name}/{changed[0]}{more} is missing, changed or damaged")
    identity = stage.identity(folder) if stage.identity else digest(outputs)
    if identity is None:
        return Status("run", "what it points to is gone or changed")
    return Status("cached", "unchanged", identity)


def plan(stages: list[Stage], root: Path, *, forced: frozenset[str] = frozenset()) -> list[tuple[Stage, Status]]:
    """Say for every stage whether it would be reused, without running anything (``moedge run --dry-run``)."""
    digests: dict[str, str] = {}
    result = []
    for stage in stages:
        waiting = [name for name in stage.reads if name not in digests]
        if waiting and stage.name not in forced and (root / stage.name).exists():
            status = Status("depends", f"reused only if {', '.join(waiting)} comes out the same")
        elif waiting:
            status = Status("run", "forced" if stage.name in forced else "not built yet")
        else:
            status = examine(stage, root, digests, forced=stage.name in forced)
        if status.digest is not None:
            digests[stage.name] = status.digest
        result.append((stage, status))
    return result


def execute(
    stages: list[Stage],
    root: Path,
    reporter: Reporter,
    *,
    forced: frozenset[str] = frozenset(),
    record: dict[str, Any] | None = None,
) -> list[Outcome]:
    """Bring every stage of a run up to date, in order; ``record`` is written to ``run.json`` first.

    Raises:
        MoEdgeError: another run holds the folder, or a stage failed (finished stages stay, the failed one leaves
            nothing).
    """
    outcomes = []
    with lock(root):
        for folder in {root, *((root / stage.name).parent for stage in stages)}:
            remove_partials(folder)
        if record is not None:
            write_json(root / "run.json", record)
        digests: dict[str, str] = {}
        for number, stage in enumerate(stages, 1):
            reporter.begin(stage.name, stage.what, number, len(stages))
            status = examine(stage, root, digests, forced=stage.name in forced)
            started = time.monotonic()
            if status.digest is None:
                reporter.building(stage.name, status.reason)
                status = Status("run", status.reason, _build(stage, root, digests, reporter))
            seconds = time.monotonic() - started
            assert status.digest is not None
            digests[stage.name] = status.digest
            if stage.check:
                stage.check(root / stage.name)
            outcomes.append(Outcome(stage.name, status.state == "cached", status.reason, seconds))
            reporter.end(stage.name, status.state == "cached", seconds)
    return outcomes


def _build(stage: Stage, root: Path, inputs: dict[str, str], reporter: Reporter) -> str:
    started = time.monotonic()
    with atomic_dir(root / stage.name, force=True) as out:
        with _seen_by(stage, root) as seen:
            stage.body(Context(out, seen, stage.params, reporter.progress, reporter.note))
        outputs = hash_folder(out)
        made_from = parts(stage, inputs)
        identity = stage.identity(out) if stage.identity else digest(outputs)
        if identity is None:
            raise MoEdgeError(f"Stage {stage.name} finished, but what it points to is already gone; run it again.")
        write_json(
            out / "stage.json",
            {
                "schema": STAGE_SCHEMA,
                "stage": stage.name,
                "key": digest(made_from),
                "parts": made_from,
                "outputs": outputs,
                "seconds": round(time.monotonic() - started, 3),
            },
        )
    return identity


@contextmanager
def _seen_by(stage: Stage, root: Path) -> Iterator[Path]:
    """Yield the run folder as a stage's body sees it: ``root``, or links to what it calls by other names."""
    if not stage.called:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="moedge-stage-") as folder:
        for name, place in stage.called.items():
            (Path(folder) / name).symlink_to((root / place).resolve(), target_is_directory=True)
        yield Path(folder)


def _difference(now: dict[str, Any], before: Any) -> str:
    """Name what changed between two sets of key parts, for people."""
    if not isinstance(before, dict):
        return "its stage.json is damaged"
    params, inputs, versions = (before.get(name) or {} for name in ("params", "inputs", "versions"))
    if changed := _changed(now["params"], params):
        return f"changed: {', '.join(changed)}"
    if changed := _changed(now["inputs"], inputs):
        return f"{', '.join(changed)} changed"
    if changed := _changed(now["versions"], versions):
        return f"another version of {', '.join(changed)}"
    return "its code changed"


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


@lru_cache(maxsize=1 << 14)
def _sha256(inode: tuple[int, int, int, int], path: str) -> str:
    return sha256_file(Path(path))


def cached_sha256(path: Path) -> str:
    """Return the sha256 of a file, read once per process as long as its inode, size and times stay the same."""
    stat = path.stat()
    return _sha256((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), str(path.resolve()))


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"sha256", "size"}}`` of a stage's files, ``stage.json`` left out.

    A symbolic link is reported as such, so it never equals what a stage recorded.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    paths = [path for path in paths if path != folder / "stage.json"]

    def describe(path: Path) -> dict[str, Any]:
        if path.is_symlink():
            return {"sha256": "symbolic link", "size": 0}
        return {"sha256": cached_sha256(path), "size": path.stat().st_size}

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
        return {
            path.relative_to(folder).as_posix(): entry
            for path, entry in zip(paths, pool.map(describe, paths), strict=True)
        }


@lru_cache(maxsize=64)
def source_digests(sources: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (path, sha256) of every file of moedge that ``sources`` name, read once per process."""
    found: dict[str, str] = {}
    for source in sources:
        path = _PACKAGE / source
        if not path.exists():
            raise MoEdgeError(f"moedge is not whole: {path} is missing; install it again.")
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in {".py", ".yaml", ".j2", ".json", ".cc", ".cpp", ".h", ".inl"}:
                found[os.path.relpath(file, _PACKAGE)] = sha256_file(file)
    return tuple(sorted(found.items()))


def versions(libraries: Sequence[str | tuple[str, ...]]) -> dict[str, str]:
    """Return the version of each distribution, or ``"absent"``; of alternatives those that are installed."""
    found: dict[str, str] = {}
    for each in libraries:
        names = (each,) if isinstance(each, str) else each
        here = {name: version for name in names if (version := installed(name))}
        found |= here or {names[0]: "absent"}
    return found


_HELD: dict[Path, int] = {}
"""Run folder -> the thread of this process that holds it."""


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the run folder ``root`` for this process; a thread that holds it already may take it again.

    The lock is the operating system's (it ends with the process, however that ends), and the file holds the pid for
    people, so a lock file left by a killed run is recognised as stale.

    Raises:
        MoEdgeError: another process holds it, or the folder cannot be written.
    """
    import fcntl

    place, thread = root.resolve(), threading.get_ident()
    if _HELD.get(place) == thread:
        yield
        return
    path = root / ".lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise MoEdgeError(f"Cannot write to {root}: {error.strerror}; choose a writable folder with --out.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
            raise MoEdgeError(
                f"Another run (process {owner}) is working in {root}; wait for it, or choose another folder with --out."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        _HELD[place] = thread
        try:
            yield
        finally:
            del _HELD[place]
    finally:
        os.close(handle)
