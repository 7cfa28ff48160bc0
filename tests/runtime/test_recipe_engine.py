"""The stage engine, on toy stages: reuse, invalidation, damage, interruption, locking."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moedge import MoEdgeError
from moedge.runtime.progress import Reporter
from moedge.runtime.run import engine
from moedge.runtime.run.engine import Context, Stage, execute, lock, plan


class Toy:
    """Three stages, ``a -> b -> d`` and ``c`` on its own; counts how often each body runs."""

    def __init__(self, **params: Any) -> None:
        self.params = {"a": 1, "b": 1, "c": 1, "d": 1, **params}
        self.ran: list[str] = []
        self.raises: BaseException | None = None
        self.raise_in = ""

    def stages(self) -> list[Stage]:
        reads: dict[str, tuple[str, ...]] = {"a": (), "b": ("a",), "c": (), "d": ("b", "c")}
        return [self._stage(name, reads[name]) for name in "abcd"]

    def _stage(self, name: str, reads: tuple[str, ...]) -> Stage:
        def body(context: Context) -> None:
            self.ran.append(name)
            text = "".join((context.root / read / "text").read_text() for read in reads)
            (context.out / "text").write_text(f"{name}{abs(context.params['value'])}({text})")
            if self.raises is not None and name == self.raise_in:
                raise self.raises
            context.progress(1, 1)

        return Stage(name, f"make {name}", body, params={"value": self.params[name]}, reads=reads)


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


def run(toy: Toy, root: Path, **options: Any) -> list[str]:
    """Run the toy and return the stages whose bodies ran."""
    toy.ran.clear()
    execute(toy.stages(), root, quiet(), **options)
    return list(toy.ran)


def test_second_run_reuses_every_stage(tmp_path: Path) -> None:
    toy = Toy()
    assert run(toy, tmp_path / "run") == ["a", "b", "c", "d"]
    assert run(toy, tmp_path / "run") == []
    assert (tmp_path / "run/d/text").read_text() == "d1(b1(a1())c1())"


def test_a_changed_parameter_rebuilds_only_what_depends_on_it(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    assert run(Toy(b=2), tmp_path) == ["b", "d"]
    assert run(Toy(b=2, c=2), tmp_path) == ["c", "d"]
    assert run(Toy(b=2, c=2, d=2), tmp_path) == ["d"]


def test_a_stage_that_comes_out_the_same_stops_the_rebuild(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    assert run(Toy(b=-1), tmp_path) == ["b"], "b's parameter changed but its file did not, so d must be reused"


@pytest.mark.parametrize("damage", ["change", "delete", "add", "symlink", "stage.json", "edit stage.json"])
def test_a_damaged_output_is_rebuilt(tmp_path: Path, damage: str) -> None:
    toy = Toy()
    run(toy, tmp_path)
    victim = tmp_path / "b" / "text"
    match damage:
        case "change":
            victim.write_text("B1(a1())")
        case "delete":
            victim.unlink()
        case "add":
            (tmp_path / "b" / "stray").write_text("x")
        case "symlink":
            victim.rename(tmp_path / "elsewhere")
            victim.symlink_to(tmp_path / "elsewhere")
        case "stage.json":
            (tmp_path / "b" / "stage.json").write_text("{")
        case "edit stage.json":
            record = json.loads((tmp_path / "b" / "stage.json").read_text())
            record["parts"]["params"]["value"] = 7
            (tmp_path / "b" / "stage.json").write_text(json.dumps(record))
    reason = {stage.name: status.reason for stage, status in plan(toy.stages(), tmp_path)}["b"]
    assert ("b/" in reason) == (damage in ("change", "delete", "add", "symlink")), reason
    assert run(toy, tmp_path) == ["b"]
    assert victim.read_text() == "b1(a1())"
    assert not victim.is_symlink()
    assert run(toy, tmp_path) == []


def test_changed_code_and_library_versions_rebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "code.py"
    source.write_text("1")
    made = []
    stage = Stage("s", "", lambda context: made.append(1), sources=(str(source),), libraries=("numpy",))
    reporter = quiet()
    for expected in (1, 1):
        execute([stage], tmp_path / "run", reporter)
        assert len(made) == expected
    source.write_text("2")
    engine.source_digests.cache_clear()
    assert plan([stage], tmp_path / "run")[0][1].reason == "its code changed"
    execute([stage], tmp_path / "run", reporter)
    assert len(made) == 2
    monkeypatch.setattr(engine, "installed", lambda name: "99")
    assert plan([stage], tmp_path / "run")[0][1].reason == "another version of numpy"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MoEdgeError("no")])
@pytest.mark.parametrize("where", ["a", "b", "d"])
def test_an_interrupted_run_leaves_nothing_half_written_and_resumes(
    tmp_path: Path, stop: BaseException, where: str
) -> None:
    toy = Toy()
    toy.raises, toy.raise_in = stop, where
    with pytest.raises(type(stop)):
        run(toy, tmp_path)
    before = {"a": [], "b": ["a"], "d": ["a", "b", "c"]}[where]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *before]
    toy.raises = None
    assert run(toy, tmp_path) == [name for name in "abcd" if name not in before]
    assert (tmp_path / "d/text").read_text() == "d1(b1(a1())c1())"


def test_an_interrupted_rebuild_keeps_the_old_stage(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    toy = Toy(b=2)
    toy.raises, toy.raise_in = KeyboardInterrupt(), "b"
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path)
    assert (tmp_path / "b/text").read_text() == "b1(a1())"
    assert run(Toy(), tmp_path) == [], "the old recipe still finds its stage whole"


def test_what_a_killed_run_left_behind_is_removed(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    (tmp_path / ".b.99999.partial").mkdir()
    (tmp_path / ".b.99999.partial" / "text").write_text("half")
    assert run(Toy(), tmp_path) == []
    assert not list(tmp_path.glob(".*.partial"))


def test_forced_stages_run_again(tmp_path: Path) -> None:
    toy = Toy()
    run(toy, tmp_path)
    assert run(toy, tmp_path, forced=frozenset({"b"})) == ["b"]
    assert run(toy, tmp_path, forced=frozenset({"b", "c", "d"})) == ["b", "c", "d"]


def test_plan_says_what_would_run_and_runs_nothing(tmp_path: Path) -> None:
    toy = Toy()
    assert [status.state for _, status in plan(toy.stages(), tmp_path / "run")] == ["run"] * 4
    assert not (tmp_path / "run").exists()
    run(toy, tmp_path / "run")
    assert [status.state for _, status in plan(toy.stages(), tmp_path / "run")] == ["cached"] * 4
    statuses = [status for _, status in plan(Toy(a=2).stages(), tmp_path / "run")]
    assert [status.state for status in statuses] == ["run", "depends", "cached", "depends"]
    assert statuses[0].reason == "changed: value"
    assert statuses[1].reason == "reused only if a comes out the same"


def test_identity_replaces_the_file_hash_and_none_means_gone(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_text("weights")
    ran: list[str] = []

    def point(context: Context) -> None:
        ran.append("point")
        (context.out / "where").write_text(f"{big} {time.time_ns()}")

    def use(context: Context) -> None:
        ran.append("use")

    stages = [
        Stage("point", "", point, identity=lambda _: big.read_text() if big.exists() else None),
        Stage("use", "", use, reads=("point",)),
    ]
    reporter = quiet()
    execute(stages, tmp_path / "run", reporter)
    execute(stages, tmp_path / "run", reporter, forced=frozenset({"point"}))
    assert ran == ["point", "use", "point"], "the pointer was written anew but points to the same content"
    big.unlink()
    assert plan(stages, tmp_path / "run")[0][1].reason == "what it points to is gone or changed"


def test_check_runs_on_reused_stages_too_and_stops_the_run(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise MoEdgeError(f"no: {(folder / 'f').read_text()}")

    def body(context: Context) -> None:
        (context.out / "f").write_text("1")

    reporter = quiet()
    stages = [Stage("s", "", body, check=refuse), Stage("t", "", body, reads=("s",))]
    for _ in range(2):
        with pytest.raises(MoEdgeError, match="no: 1"):
            execute(stages, tmp_path, reporter)
        assert not (tmp_path / "t").exists()


HOLD = """
import sys, pathlib
from moedge.runtime.run.engine import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time_and_a_stale_lock_is_taken_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(MoEdgeError, match=rf"process {holder.pid}\)"):
                run(Toy(), tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        finally:
            holder.kill()  # leaves the lock file with a pid that no longer exists
    assert (tmp_path / ".lock").read_text().strip() == str(holder.pid)
    assert run(Toy(), tmp_path) == ["a", "b", "c", "d"]


def test_who_holds_the_lock_may_take_it_again_and_no_other_thread(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(MoEdgeError) as error, lock(tmp_path):
            pass
        return str(error.value)

    with ThreadPoolExecutor(1) as pool, lock(tmp_path):
        with lock(tmp_path / "." / ""):
            assert run(Toy(), tmp_path) == ["a", "b", "c", "d"]
        assert "is working in" in pool.submit(refused).result(), "the inner one did not give it back"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, Toy(), tmp_path).result() == []


def test_an_unwritable_run_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoEdgeError, match="choose a writable folder"):
        run(Toy(), tmp_path / "file" / "run")
