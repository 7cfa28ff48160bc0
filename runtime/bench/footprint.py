"""Memory, its pages, and load time of an engine, in a fresh process where no other engine lives."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge._children import python
from moedge.runtime.bench.timing import timed_run
from moedge.runtime.engines import Engine, open_engine

_DECODE = 8  # tokens decoded in the measurement: enough for every buffer of a decode step to exist
_TIMEOUT = 900.0


def footprint(opener: Callable[..., Engine], ids: np.ndarray, depth: int, threads: int | None) -> dict[str, Any]:
    """Peak memory and load time of one engine in a fresh process, or None with the reason.

    Args:
        opener: ``functools.partial(open_engine, path, **options)``, which can be repeated in another process.
        ids: int64 [B, depth + S], read before the first token is chosen.
        threads: given to ``open_engine``, if not None.

    Raises:
        MoEdgeError: the engine refuses or fails.
    """
    unknown = {"peak_rss_mib": None, "load_s": None}
    path = path_of(opener)
    if path is None or not isinstance(opener, functools.partial):
        return {**unknown, "reason": "the engine was not given as functools.partial(open_engine, path, ...)"}
    options = {**opener.keywords, **({} if threads is None else {"threads": threads})}
    request = {"path": path, "options": options, "ids": ids.tolist(), "depth": depth}
    try:
        child = subprocess.run(
            python("from moedge.runtime.bench.footprint import _child; _child()"),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        answer = dict(json.loads(child.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {**unknown, "reason": f"no answer within {_TIMEOUT:.0f} s"}
    except OSError as error:  # under an emulator, or where processes may not start others
        return {**unknown, "reason": f"no process of its own can be started here ({error.strerror})"}
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise MoEdgeError(f"Engine {path} failed in its own process (exit {child.returncode}): {last}") from None
    if "refused" in answer:
        raise MoEdgeError(f"Engine {path}: {answer['refused']}")
    return answer


def path_of(opener: Callable[..., Engine]) -> str | None:
    """Return the folder that ``functools.partial(open_engine, path, ...)`` opens; None for any other callable."""
    if isinstance(opener, functools.partial) and opener.func is open_engine and len(opener.args) == 1:
        return str(opener.args[0])
    return None


def _child() -> None:
    """Run in the fresh process: request as JSON on stdin, result as JSON on the last line of stdout."""
    request = json.load(sys.stdin)
    start = time.perf_counter()
    try:
        engine = open_engine(request["path"], **request["options"])
        load = time.perf_counter() - start
        loaded = peak_rss_mib()
        timed_run(engine, np.array(request["ids"], dtype=np.int64), request["depth"], _DECODE)
    except MoEdgeError as error:
        print(json.dumps({"refused": str(error)}))
        return
    memory = {"peak_rss_mib": peak_rss_mib(), "peak_rss_after_load_mib": loaded, **gpu_memory(engine)}
    pages = huge_pages()
    print(json.dumps({**memory, **({} if pages is None else {"huge_pages": pages}), "load_s": load}))


def huge_pages(rollup: Path = Path("/proc/self/smaps_rollup")) -> float | None:
    """Share of this process's own memory that lies in huge pages, 0 to 1; None where the system does not tell.

    Decoding walks through all weights, and small pages cost it address translations: the same engines are compared on
    other terms with and without (docs/speed.md).
    """
    try:
        lines = rollup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = (line.split() for line in lines if line.endswith(" kB"))
    kib = {name.rstrip(":"): int(value) for name, value, _ in fields}
    own = kib.get("Anonymous", 0)
    return kib.get("AnonHugePages", 0) / own if own else None


def gpu_memory(engine: Engine) -> dict[str, Any]:
    """Peak GPU memory of an engine, ``{"peak_gpu_mib"}``; None where it runs on the CPU, or with the reason."""
    if engine.info.device == "CPU":
        return {"peak_gpu_mib": None}
    tell = getattr(engine, "peak_gpu_mib", None)
    if tell is None:
        said = f"{engine.info.runtime} does not tell how much GPU memory it takes"
        return {"peak_gpu_mib": None, "gpu_reason": said}
    return {"peak_gpu_mib": tell()}


def peak_rss_mib() -> float:
    """Peak resident memory of this process in MiB.

    On Linux ``getrusage`` is wrong in a child: its maximum starts at the size that the parent had when it forked, and
    survives exec. VmHWM belongs to the new address space.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as stream:  # noqa: PTH123
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
