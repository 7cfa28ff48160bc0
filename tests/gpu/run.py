"""What a GPU says, in one run: device tests, MoE and gather beside the dense parent, kernels beside their limits.

    make test-gpu                                           # here: .venv, results in build/gpu
    python3 tests/gpu/run.py --out OUT --wheels .whl        # a machine without a network (wheels.py fills .whl)
    python3 tests/gpu/run.py --write docs/gpu.md build/gpu/gpu.json

Without a CUDA device the same parts run on tiny shapes on the CPU, kernels in Triton's interpreter: a rehearsal of this
program, no measurement, and its files say so.

Each part is a process of its own with a limit in seconds, so that a fault or a hang of one ends that part alone. Rows
go to ``rows.jsonl`` as they are found, ``gpu.json`` and ``gpu.md`` are written after each part. This file needs the
standard library only. Exit code: 0 when every part passed, 1 when one failed or did not end, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCHEMA = "moedge.gpu/1"
TIMING = "test_half_of_the_weights_take_less_time_than_all"
"""Of the device tests the one that times: it runs alone, after the others."""


@dataclass(frozen=True)
class Part:
    """A process: its name, its command, and the most seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def marked(tree: Path) -> list[Path]:
    """Return the test files with device tests, sorted: by the mark itself, or by a fixture that has it.

    Collecting every test imports everything that any test needs, which a machine without a network may not have.
    """
    found = []
    for file in sorted(tree.rglob("test_*.py")):
        folders = (folder for folder in file.parents if folder == tree or tree in folder.parents)
        fixtures = {name for folder in folders for name in _device_fixtures(folder / "conftest.py")}
        text = file.read_text(encoding="utf-8")
        if "mark.gpu" in text or _asks_for(text, fixtures):
            found.append(file)
    return found


def _device_fixtures(conftest: Path) -> Iterator[str]:
    """Yield the fixtures of a file that stand for a device in some of their parameters."""
    if conftest.is_file():
        for node in ast.parse(conftest.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("mark.gpu" in ast.unparse(d) for d in node.decorator_list):
                yield node.name


def _asks_for(text: str, fixtures: set[str]) -> bool:
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    tests = (function for function in functions if function.name.startswith("test_"))
    return any(argument.arg in fixtures for function in tests for argument in function.args.args)


def tests(out: Path, *, rehearsal: bool) -> list[Part]:
    """Return the parts that run pytest: the device tests, or a few of the same tests in the interpreter."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit2")
    if rehearsal:
        files = [ROOT / "tests/export/kernels/test_kernels.py"]
        options = ("-m", "not gpu and not slow", "-k", "test_combine or test_dispatch", "--maxfail", "20")
        return [Part("tests", (*pytest, *options, f"--junitxml={out}/tests.xml", *map(str, files)), 900)]
    files = [file for file in marked(ROOT / "tests") if file.parent != HERE]
    # One GPU serves several processes; most of a test's time is compiling, on the CPU.
    workers = ("-n", "6", "--dist", "loadfile") if _has("xdist") else ()
    options = ("-m", "gpu and not slow", "--continue-on-collection-errors", "--maxfail", "30")
    arguments = (*map(str, files), f"--junitxml={out}/tests.xml")
    return [
        Part("tests", (*pytest, *workers, *options, "-k", f"not {TIMING}", *arguments), 200),
        Part("test of time", (*pytest, *options, "-k", TIMING, *map(str, files)), 60),
    ]


def _has(module: str) -> bool:
    code = f"import {module}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def parts(out: Path, *, rehearsal: bool) -> list[Part]:
    """Return what runs, in this order: what nobody has measured comes first, should the time not be enough."""
    measuring = ("facts", "ceilings", "layers 1B", "kernels 1B", "layers 7B", "kernels 7B")
    limits = {"facts": 40, "ceilings": 40, "layers 1B": 130, "layers 7B": 130}
    extra = ("--rehearsal",) if rehearsal else ()
    command = (sys.executable, str(HERE / "measure.py"), "--rows", str(out / "rows.jsonl"), *extra)
    measured = [Part(name, (*command, name), 900 if rehearsal else limits.get(name, 80)) for name in measuring]
    return [*measured, *tests(out, rehearsal=rehearsal)]


def site(wheels: Path | None) -> dict[str, str]:
    """Return the environment of the parts: the package under its import name, and the wheels that were carried."""
    folder = Path(tempfile.mkdtemp(prefix="moedge-gpu-"))
    (folder / "moedge").symlink_to(ROOT)  # the package root is the repository's folder
    paths = [str(folder)]
    if wheels is not None:
        target = folder / "site"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        given = sorted(map(str, wheels.glob("*.whl")))
        done = subprocess.run([*install, "--target", target, *given], check=False)
        if done.returncode:
            print(f"the wheels of {wheels} were not installed: going on without them", file=sys.stderr)
        paths.append(str(target))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def cuda_here() -> bool:
    """Whether PyTorch sees a CUDA device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def execute(part: Part, environment: dict[str, str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a part, its output into the log; return outcome, seconds, and why it did not pass."""
    print(f"{part.name} ...", flush=True)
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n=== {part.name}\n")
        stream.flush()
        at = stream.tell()
        process = subprocess.Popen(
            part.command, env=environment, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code, reason = process.wait(timeout=seconds), None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its workers too
            code, reason = process.wait(), f"stopped after {seconds:.0f} s"
    took = round(time.monotonic() - start, 1)
    if code and reason is None:
        said = log.read_bytes()[at:].decode(errors="replace").strip().splitlines()
        reason = f"exit code {code}: {said[-1] if said else 'nothing was printed'}"
    print(f"{part.name}: {'passed' if not code else reason}, {took} s", flush=True)
    return {"part": part.name, "passed": not code, "seconds": took, **({"reason": reason} if reason else {})}


def collected(out: Path, done: list[dict[str, Any]], *, rehearsal: bool, started: str) -> dict[str, Any]:
    """Return everything that was found so far."""
    rows = out / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]  # the last one of a killed part may be cut
    return {"schema": SCHEMA, "rehearsal": rehearsal, "started": started, "parts": done, "rows": found} | page.tests_of(
        out / "tests.xml"
    )


def run(out: Path, given: list[Part], environment: dict[str, str], *, rehearsal: bool, budget: float) -> bool:
    """Run the parts within ``budget`` seconds; return whether all of them passed."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "log.txt", "tests.xml"):
        (out / name).unlink(missing_ok=True)
    end, done, started = time.monotonic() + budget, [], time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    for part in given:
        left = end - time.monotonic()
        if left < 5:
            done.append({"part": part.name, "passed": False, "seconds": 0.0, "reason": "no time was left"})
        else:
            done.append(execute(part, environment, out / "log.txt", min(part.seconds, left)))
        found = collected(out, done, rehearsal=rehearsal, started=started)
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(page.render(found), encoding="utf-8")
    return all(part["passed"] for part in done)


def main() -> int:
    """Run, or write a result into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this machine lacks")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything (a rehearsal: no limit)")
    parser.add_argument("--only", action="append", metavar="PART", help="one part; may be given again")
    parser.add_argument("--write", nargs=2, type=Path, metavar=("PAGE", "JSON"))
    given = parser.parse_args()
    if given.write:
        page.write(*given.write)
        return 0
    if given.wheels is not None and not any(given.wheels.glob("*.whl")):
        parser.error(f"{given.wheels} holds no wheel; make them where there is a network: tests/gpu/wheels.py")
    environment = site(given.wheels)
    rehearsal = not cuda_here()
    if rehearsal:
        print("No CUDA device: a rehearsal on tiny shapes. Its figures are no measurements.")
    out = given.out.resolve()
    chosen = parts(out, rehearsal=rehearsal)
    unknown = set(given.only or ()) - {part.name for part in chosen}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; known: {', '.join(part.name for part in chosen)}")
    chosen = [part for part in chosen if not given.only or part.name in given.only]
    passed = run(out, chosen, environment, rehearsal=rehearsal, budget=float("inf") if rehearsal else given.budget)
    print((out / "gpu.md").read_text(encoding="utf-8"))
    print(f"{out}/gpu.json")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
