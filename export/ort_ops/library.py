"""The library of CPU operators, compiled from the sources beside this file with g++.

``onnxruntime.SessionOptions().register_custom_ops_library(path)`` is all that it takes to use it. It needs no header of
ONNX Runtime (``abi.h`` declares what is used) and holds a table of kernels for each instruction set, so one file serves
every processor of an architecture.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import repeat
from pathlib import Path

from moedge import MoEdgeError
from moedge._files import digest, safe_join, sha256_file
from moedge.export.manifest import Operators

FOLDER = Path(__file__).parent
DOMAIN = "moedge.cpu"
"""The domain of the operators, version 1."""
NAME = "library of CPU operators"
"""What sentences about a library that cannot be compiled call it."""

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-pthread"),
    # Errors of libm are not asked for, and no exception of a float is: loops vectorise. A product and a sum are fused
    # only where the source says so: rounding to integers has to agree with ONNX Runtime's.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
STATIC = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
"""Where g++ has the archives: the library then loads beside any libstdc++. No exception leaves or enters it."""


def sources(folder: Path = FOLDER) -> dict[str, Path]:
    """Return the files of C++ by their names: what a bundle carries so that another machine can compile it."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".cc", ".h", ".inl")}


def compile_library(target: Path, folder: Path = FOLDER) -> Path:
    """Compile the library from the sources in ``folder`` to the file ``target``; return its path.

    Raises:
        MoEdgeError: no g++, or it does not compile.
    """
    files = [path for name, path in sources(folder).items() if name.endswith(".cc")]

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [_compiler(), *FLAGS, *arguments], capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise MoEdgeError(f"g++ cannot compile the {NAME} in {folder}: {reason}")

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = [str(Path(scratch) / f"{path.stem}.o") for path in files]
        list(threads.map(run, repeat("-c"), map(str, files), repeat("-o"), objects))
        link = ("-shared", *objects, "-o", str(target))
        try:
            run(*STATIC, *link)
        except MoEdgeError:  # Fedora has libstdc++.a in a package of its own
            run(*link)
    return target


def cached_library(cache: Path, folder: Path = FOLDER) -> Path:
    """Return the library compiled from ``folder``, from ``cache`` if these sources were compiled before.

    The key holds the sources, the flags and the version of g++. Processes that compile at the same time do no harm.

    Raises:
        MoEdgeError: no g++, it does not compile, or ``cache`` cannot be written.
    """
    target = cache / f"moedge-cpu-{key(sources(folder))[:32]}.so"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            os.replace(compile_library(Path(scratch) / target.name, folder), target)
    except OSError as error:
        raise MoEdgeError(
            f"Cannot write the {NAME} to the cache {cache}: {error.strerror}; set MOEDGE_CACHE to a writable folder."
        ) from error
    return target


_stock: ContextVar[bool] = ContextVar("stock", default=False)


@contextmanager
def stock_operators(wanted: bool) -> Iterator[None]:
    """Lower without operators of our own while the block runs, if ``wanted``: any program then opens the bundle."""
    token = _stock.set(wanted)
    try:
        yield
    finally:
        _stock.reset(token)


def compiled() -> Path:
    """Return this machine's library, compiled once into the cache of MoEdge.

    Raises:
        MoEdgeError: as :func:`cached_library`, or inside of :func:`stock_operators`.
    """
    if _stock.get():
        raise MoEdgeError("asked for ONNX Runtime's own operators alone")
    from moedge.convert.sources.assets import cache_dir

    return cached_library(cache_dir() / "ort_ops")


def write(folder: Path) -> Operators:
    """Put the compiled library and its sources into a bundle; return its entry in the manifest."""
    machine = platform.machine()
    facts = Operators(
        domain=DOMAIN, library=f"operators/libmoedge_cpu.{machine}.so", machine=machine, sources="operators/sources"
    )
    (folder / facts.sources).mkdir(parents=True)
    for name, path in sources().items():
        shutil.copyfile(path, folder / facts.sources / name)
    shutil.copyfile(compiled(), folder / facts.library)
    return facts


def of_bundle(folder: Path, facts: Operators) -> Path:
    """Return the library of a verified bundle for this machine: the bundle's own, or compiled here from its sources.

    Raises:
        MoEdgeError: it is for other processors and cannot be compiled here.
    """
    return safe_join(folder, facts.library) if facts.machine == platform.machine() else compiled_from(folder, facts)


def compiled_from(folder: Path, facts: Operators) -> Path:
    """Return the library compiled here, once, from the sources of a verified bundle.

    Raises:
        MoEdgeError: as :func:`cached_library`.
    """
    from moedge.convert.sources.assets import cache_dir

    return cached_library(cache_dir() / "ort_ops", safe_join(folder, facts.sources))


def key(files: Mapping[str, Path]) -> str:
    """Return the hash of what a compiled library depends on: its sources, the flags, g++ and the architecture.

    Raises:
        MoEdgeError: no g++.
    """
    hashes = {name: sha256_file(path) for name, path in files.items()}
    return digest([hashes, [*FLAGS, *STATIC], _version(_compiler()), platform.machine()])


@lru_cache(maxsize=4)
def _version(compiler: str) -> str:
    """Return what a compiler says of itself; every self-test asks, so it is started once a process."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise MoEdgeError(
            f"The {NAME} is compiled with g++, which is not here: install it (Debian, Ubuntu: apt install g++)."
        )
    return compiler
