"""Output folders: whole or absent, and never at the cost of what they are made from."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir, check_writable, remove_partials, write_text
from moedge.runtime.run.run_folder import check_results


def folder(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "is a folder; name a file to write."),
        (".", "is a folder; name a file to write."),
        ("pipe", "is no plain file; name a file to write."),
        ("file/x.json", "cannot be written: Not a directory; name another file."),
        ("file/new/x.json", "cannot be written: Not a directory; name another file."),
        ("n" * 250, "cannot be written: File name too long; name another file."),
        ("loop/x.json", "cannot be written: Too many levels of symbolic links; name another file."),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MoEdgeError) as error:
        check_writable(tmp_path / name, "--save")
    assert str(error.value) == f"--save {tmp_path / name} {said}"
    if name != "pipe":  # the check is right: writing does fail
        with pytest.raises(OSError):
            write_text(tmp_path / name, "x")


def test_a_folder_without_permission_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def access(folder: Path, mode: int) -> bool:
        asked.append((folder, mode))
        return False

    monkeypatch.setattr(os, "access", access)  # root may write everywhere
    with pytest.raises(MoEdgeError, match=r"cannot be written: Permission denied; name another file\.$"):
        check_writable(tmp_path / "new" / "x.json", "--save")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.parametrize("name", ["new.json", "a/b/new.json", "old.json", "link.json", "dangling.json"])
def test_a_file_that_can_be_written_passes_and_the_check_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("old.json")
    (tmp_path / "dangling.json").symlink_to("nowhere.json")
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / name, "--save")
    assert sorted(tmp_path.rglob("*")) == before
    write_text(tmp_path / name, "new")
    assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("text.txt", "--save text.txt is read by this command; name another file."),
        ("model/config.json", "which this command reads; name a file elsewhere."),
        ("model/new.json", "which this command reads; name a file elsewhere."),
        ("run/report.json", "which this command reads; name a file elsewhere."),
        ("run/convert/new.json", "which this command reads; name a file elsewhere."),
        ("run/new.json", None),
        ("old.json", None),
    ],
)
def test_a_result_is_no_input(result: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "model/config.json", "run/run.json", "run/report.json", "run/convert/x", "old.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    with pytest.raises(MoEdgeError, match=re.escape(said)) if said else nullcontext():
        check_results({"--save": Path(result), "--html": None}, ["text.txt", "model", Path("run"), "asset:wiki"])


def test_an_error_leaves_the_old_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    out = folder(tmp_path / "out")

    def interrupted() -> None:
        with atomic_dir(out, force=True) as partial:
            (partial / "file").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from moedge._files import atomic_dir\n"
        "with atomic_dir(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (orphan,) = tmp_path.iterdir()
    alive = orphan.with_name(orphan.name.replace(orphan.name.split(".")[-2], str(os.getppid())))
    others = [alive, tmp_path / orphan.name.replace(".out.", ".out.x."), tmp_path / ".out.elsewhere.1.partial"]
    for other in others:
        other.mkdir()
    with atomic_dir(tmp_path / "out") as partial:
        assert not orphan.exists()
        (partial / "file").write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "out"])


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_a_stop_between_two_renames_is_undone(tmp_path: Path, whole: bool, killed: bool) -> None:
    """A whole folder takes two renames; a new entry, one in the place of another and one that goes take four.

    Where the process is killed, an entry that has its place by then keeps it.
    """
    stop = "os.kill(os.getpid(), signal.SIGKILL)" if killed else "os.replace = real; raise KeyboardInterrupt"
    code = (
        "import os, signal, sys; from pathlib import Path; from moedge._files import atomic_dir\n"
        "left, real = int(sys.argv[2]), os.replace\n"
        "def replace(*paths):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0:\n"
        f"        {stop}\n"
        "    real(*paths)\n"
        "os.replace = replace\n"
        f"with atomic_dir(Path(sys.argv[1]), force=True, drops={None if whole else {'dropped'}}) as partial:\n"
        "    for name in ('new', 'kept'):\n"
        "        (partial / name).mkdir(); (partial / name / 'file').write_text('new')"
    )
    expected = {}
    for number in range(2 if whole else 4):
        out = tmp_path / str(number)
        placed = killed and number == 3
        expected |= {out / "kept" / "file": "new" if placed else "old", out / "dropped" / "file": "old"}
        for name in ("kept", "dropped"):
            folder(out / name)
        stopped = subprocess.run(
            [sys.executable, "-c", code, str(out), str(number)], check=False, timeout=60, stderr=subprocess.DEVNULL
        )
        assert stopped.returncode == (-signal.SIGKILL if killed else -signal.SIGINT)
        if killed and whole:
            remove_partials(tmp_path)  # as a run does with the folders of its stages
        elif killed:
            with pytest.raises(RuntimeError), atomic_dir(out, force=True, drops=set()):
                raise RuntimeError("another stop, after what was begun is undone")
        assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("out", ["parent", "parent/model", "parent/x/../model", "parent/link"])
def test_force_never_replaces_an_input(tmp_path: Path, out: str) -> None:
    model = folder(tmp_path / "parent" / "model")
    (tmp_path / "parent" / "x").mkdir()
    if out.endswith("link"):
        (tmp_path / "parent" / "link").symlink_to(model)
    with pytest.raises(MoEdgeError), atomic_dir(tmp_path / out, force=True, inputs=[str(model), "org/name"]):
        pytest.fail("the block ran")
    assert (model / "file").read_text() == "old"


@pytest.mark.parametrize("given", ["link", "snapshot"])
def test_force_never_replaces_what_an_input_links_to_or_from(given: str, tmp_path: Path) -> None:
    """A snapshot of the hub's cache is a folder of links, and what the user gives may be a link to that."""
    out, model = folder(tmp_path / "out"), folder(tmp_path / "model")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(out / "file")
    (out / "link").symlink_to(model)
    inputs = {"link": out / "link", "snapshot": snapshot}
    with pytest.raises(MoEdgeError, match="would be deleted"), atomic_dir(out, force=True, inputs=[inputs[given]]):
        pytest.fail("the block ran")
    assert (out / "file").read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
def test_what_another_process_wrote_meanwhile_is_kept_unless_forced(tmp_path: Path, force: bool) -> None:
    expected: AbstractContextManager[object] = (
        nullcontext() if force else pytest.raises(MoEdgeError, match="by another process meanwhile")
    )
    with expected, atomic_dir(tmp_path / "out", force=force) as partial:
        (partial / "file").write_text("second")
        folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == ("second" if force else "old")


def test_force_never_replaces_the_working_or_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, home = folder(tmp_path / "work" / "here"), folder(tmp_path / "people" / "me")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for out in (Path(), work, work.parent, home, home.parent):
        with pytest.raises(MoEdgeError, match="would be deleted"), atomic_dir(out, force=True):
            pytest.fail("the block ran")
    with atomic_dir(Path("new"), force=True, inputs=["asset:wiki", "new/model"]) as partial:
        (partial / "file").write_text("new")
    assert (work / "new" / "file").read_text() == "new"


def test_a_signal_while_a_partial_folder_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = shutil.rmtree, []

    def interrupted(folder: Path, **options: bool) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise SystemExit(143)
        remove(folder, **options)

    monkeypatch.setattr("moedge._files.shutil.rmtree", interrupted)
    with pytest.raises(SystemExit), atomic_dir(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
