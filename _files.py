"""Files that are whole or absent: hashing, atomic writes and path checks used by all three stages."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moedge import MoEdgeError

_CHUNK = 1 << 22
_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that Git leaves in place of a large one until ``git lfs pull``."""


def refuse_pointer(path: Path) -> None:
    """Refuse the small text that Git leaves in place of a large file.

    Raises:
        MoEdgeError: with the command that gets the file.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise MoEdgeError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}.")


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in 4 MiB chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Serialise ``value`` so that equal values give equal bytes (sorted keys, no spaces, NaN refused)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return the hex sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def read_json(path: Path, mend: str, *, missing: str | None = None) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        mend: what to do about a damaged file; ends the sentence.
        missing: the sentence about a file that is not there, where that says more.

    Raises:
        MoEdgeError: it is missing, cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoEdgeError(missing or f"{path} is missing; {mend}.") from None
    except OSError as error:
        raise MoEdgeError(f"{path} cannot be read: {error.strerror}; {mend}.") from error
    except (ValueError, RecursionError) as error:
        raise MoEdgeError(f"{path} cannot be read, it is not valid JSON ({error}); {mend}.") from error
    if not isinstance(value, dict):
        raise MoEdgeError(f"{path} cannot be read, it does not hold a JSON object; {mend}.")
    return value


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def check_writable(path: Path | None, option: str) -> None:
    """Refuse a file that :func:`write_bytes` could not write, before the work whose result it is to hold.

    Args:
        path: the file; None, where none is wanted, is fine.
        option: what the user named it by.

    Raises:
        MoEdgeError: a folder or a device is there, a part of the path is no folder, or writing is not allowed.
    """
    if path is None:
        return
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            there = "a folder" if path.is_dir() else "no plain file"
            raise MoEdgeError(f"{option} {path} is {there}; name a file to write.")
        with suppress(FileNotFoundError):
            _temporary(path).lstat()
        folder = next(part for part in path.absolute().parents if part.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise MoEdgeError(f"{option} {path} cannot be written: {error.strerror}; name another file.") from error


def check_all_writable(files: Mapping[str, Path | None]) -> None:
    """:func:`check_writable` for each file, by the option that names it."""
    for option, path in files.items():
        check_writable(path, option)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 like :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def spare(path: Path, inputs: Iterable[Path | str], called: str = "Output") -> None:
    """Refuse to replace a folder that is or holds one of ``inputs``, the working folder or the home folder.

    Names that are no paths (hub ids) do no harm. ``called`` says what the folder is.

    Raises:
        MoEdgeError: replacing ``path`` would delete one.
    """
    place = path.resolve()
    for kept in (*(Path(given).expanduser() for given in inputs), Path.cwd(), Path.home()):
        if kept.exists() and any(part.is_relative_to(place) for part in _parts(kept)):
            raise MoEdgeError(
                f"{called} {path} is or holds {kept}, which would be deleted; choose another output path."
            )


def _parts(kept: Path) -> Iterator[Path]:
    """Where a path is, where it leads to if it is a link, and where the links in a folder lead to."""
    yield kept.resolve()
    if kept.is_symlink():
        yield kept.parent.resolve() / kept.name
    if kept.is_dir() and kept not in (Path.cwd(), Path.home()):
        yield from (entry.resolve() for entry in kept.iterdir() if entry.is_symlink())


def check_links(folder: Path) -> None:
    """Refuse a folder with a link to a file that is not there: a part of the hub's cache copied or deleted.

    Raises:
        MoEdgeError: names the link and what it should lead to.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_symlink() and not entry.exists():
            raise MoEdgeError(f"{entry} is a link to {entry.readlink()}, which is not there; download the model again.")


@contextmanager
def atomic_dir(
    path: Path, *, force: bool = False, inputs: Iterable[Path | str] = (), drops: Set[str] | None = None
) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` when the block ends without an error.

    On any error, Ctrl-C included, the partial folder is removed and whatever was at ``path`` stays as it was. What a
    process that was killed while it replaced ``path`` had moved aside is put back first.

    Args:
        path: the output.
        force: replace what is there, all of it.
        inputs: what the output is made from; see :func:`spare`.
        drops: given, only what is in ``path`` under a new name, or one that is here in the end, goes: entries that stay
            are never moved, copied or linked, so no stop can cost them and tens of GB take no time.

    Raises:
        MoEdgeError: ``path`` exists, at the start (without ``drops``) or in the end, and ``force`` is not given, its
            parent cannot be written, or replacing it would delete an input, the working folder or the home folder.
    """
    spare(path, inputs)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise MoEdgeError(f"Output {path} exists and is not a folder; choose another output path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        if drops is not None and path.exists():
            recover(path)
        before = _names(path)
        if before and not force and drops is None:
            raise MoEdgeError(f"Output folder {path} already exists and is not empty; pass --force to replace it.")
        partial.mkdir()
    except OSError as error:
        raise MoEdgeError(
            f"Cannot write to {path.parent}: {error.strerror}; choose a writable output folder."
        ) from error
    try:
        yield partial
        new, there = _names(partial), _names(path)
        if not force and (there if drops is None else there & new - before):
            raise MoEdgeError(f"Output folder {path} was written by another process meanwhile; nothing was changed.")
        if drops is None or not path.exists():
            _take_places([(partial, path)], [], partial)
        else:
            gone = [path / name for name in sorted(there & drops - new)]
            _take_places([(partial / name, path / name) for name in sorted(new)], gone, partial)
    finally:
        _remove(partial)


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def _take_places(pairs: Sequence[tuple[Path, Path]], drops: Sequence[Path], partial: Path) -> None:
    """Move each new folder to its place, all or none; what was there goes to ``partial``, as do ``drops``.

    An exception in between undoes all of it. Where the process is killed, :func:`recover` puts back what has no new one
    in its place yet: each entry is then the old or the new one, whole. So what goes gets another name beside its place
    first, and leaves for ``partial``, which is deleted, when all is done.
    """
    replaced = [*drops, *(place for _, place in pairs if os.path.lexists(place))]
    aside = {place: _left_of(place, "replaced") for place in replaced}
    moves = [*aside.items(), *pairs]
    begun: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            begun.append((source, target))
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(begun):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        raise
    for place, old in aside.items():
        os.replace(old, partial / place.name if partial.exists() else partial)


def _remove(folder: Path) -> None:
    """Delete a folder, also when a signal ends the program in between: torchrun ends whom an error has just ended."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def partial_of(path: Path) -> Path:
    """Return this process's folder beside ``path`` for what is not whole yet, which nobody has made.

    Those of processes on this machine that were killed are gone then, see :func:`recover`.
    """
    recover(path.parent, path.name)
    return _left_of(path, "partial")


def _left_of(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{what}")


def recover(folder: Path, name: str | None = None) -> None:
    """Undo in ``folder`` what killed processes of this machine (out of memory, ``kill -9``) had begun.

    Args:
        folder: holds the outputs.
        name: of one output; all of them by default.
    """
    ours = re.compile(rf"\.(.+)\.{re.escape(socket.gethostname())}\.(\d+)\.(partial|replaced)")
    for left in folder.iterdir() if folder.is_dir() else ():
        found = ours.fullmatch(left.name)
        if found is None or name not in (None, found[1]) or _alive(int(found[2])):
            continue
        place = left.with_name(found[1])
        if found[3] == "replaced" and not os.path.lexists(place):
            os.replace(left, place)  # it was killed between two renames: the new one is not there yet
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # somebody else's process, which lives
    return True


def link_or_copy(source: Path | str, destination: Path | str) -> None:
    """Make a hard link, a copy where the file system has none: big files that are only read."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def safe_join(root: Path, relative: str) -> Path:
    """Return ``root / relative`` after checking that it names a plain file or folder inside ``root``.

    Raises:
        MoEdgeError: absolute path, ``..`` component, a symbolic link anywhere below ``root``, or a name that the file
            system does not take.
    """
    part = Path(relative)
    if not relative or part.is_absolute() or ".." in part.parts or "\\" in relative or "\0" in relative:
        raise MoEdgeError(f"Unsafe path {relative!r} in {root}: paths must stay inside the folder.")
    current = root
    for piece in part.parts:
        current = current / piece
        try:
            link = current.is_symlink()
        except OSError as error:
            raise MoEdgeError(f"Unsafe path {relative[:80]!r} in {root}: {error.strerror}.") from error
        if link:
            raise MoEdgeError(f"Unsafe path {relative!r} in {root}: {current} is a symbolic link.")
    return current


def hash_tree(root: Path) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"sha256", "size"}}`` for every file below ``root``, sorted by path.

    Raises:
        MoEdgeError: a symbolic link is found (artefacts hold plain files only).
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            raise MoEdgeError(f"{path} is a symbolic link; artefact folders hold plain files only.")
        if path.is_file():
            files[path.relative_to(root).as_posix()] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    return files


def remove_partials(folder: Path) -> None:
    """Delete what a killed process left in ``folder`` (the names of :func:`atomic_dir` and :func:`write_text`)."""
    recover(folder)
    for pattern in (".*.partial", ".*.replaced"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
