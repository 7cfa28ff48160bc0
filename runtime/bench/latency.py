"""Measure latency, throughput, memory and load time of several engines in one run.

Engines are timed in turn, round by round, and the order rotates, so that a slow minute of the machine hits all of them.
Ratios are paired by round. Memory and load time are taken in a fresh process per engine, where no other engine lives.

TTFT  time to first token: prefill of the prompt and choice of the next token, in ms. The commands open engines with
      ``last_logits``: as in generation, the output projection reads the last position of the prompt alone.
TPOT  time per output token: one decode step and choice of the next token, in ms.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.runtime.bench.machine import machine as machine
from moedge.runtime.bench.stats import bootstrap_ci, percentiles
from moedge.runtime.engines import Engine, open_engine

SCHEMA = "moedge.bench/1"

_SETTLE = 0.02  # seconds between engines: worker threads of the last one (OpenMP spins for some ms) go to sleep
_CHILD_DECODE = 8  # tokens decoded in the memory measurement: enough for every buffer of a decode step to exist
_CHILD_TIMEOUT = 900.0


def bench(
    engines: Mapping[str, Callable[[], Engine]],
    ids: np.ndarray,
    *,
    prompt: int,
    decode: int,
    repeats: int,
    warmup: int = 1,
    batch: int = 1,
    memory: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Benchmark engines, greedy, end-of-text ignored.

    Args:
        engines: label -> callable that opens the engine. Memory and load time need
            ``functools.partial(open_engine, path, **options)``, which can be repeated in another process; for any other
            callable these two are None, with the reason.
        ids: int64 [>= batch * prompt], real text; its first ``prompt`` tokens are the prompt of the first row, and so
            on.
        prompt: tokens of the prompt.
        decode: tokens decoded after the first one, fed back as chosen.
        repeats: rounds that count. Fewer than 5 give intervals that mean little.
        warmup: rounds that do not.
        batch: rows that are read and decoded together.
        memory: measure memory and load time.
        seed: of the bootstrap.
        progress: called with (engine runs done, in all).

    Returns:
        JSON-ready dict of schema ``moedge.bench/1``: ``protocol``, ``machine``, ``rows`` (one per engine, in the order
        given) and ``ratios`` (``speedup`` of ``label`` over ``baseline`` = ratio of medians, > 1 is faster, with a 95%
        bootstrap interval paired by round).

    Raises:
        MoEdgeError: nothing to measure, too few ids, or an engine that fails.
    """
    if not engines or min(prompt, decode, repeats, batch) < 1 or warmup < 0:
        raise MoEdgeError("A benchmark needs at least one engine, and prompt, decode, repeats and batch of at least 1.")
    ids = _prompt(ids, batch, prompt)
    advance = _counter(len(engines) * (warmup + repeats + bool(memory)), progress)
    # First, while this process is small and the cores are idle.
    footprints = _footprints(engines, ids, advance) if memory else {}
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    samples, infos = _rounds(engines, ids, decode, repeats, warmup, advance)
    unmeasured = {"peak_rss_mib": None, "load_s": None, "reason": "not measured"}
    protocol = {"batch": batch, "prompt": prompt, "decode": decode, "repeats": repeats, "warmup": warmup, "seed": seed}
    return {
        "schema": SCHEMA,
        "protocol": protocol | _PROTOCOL,
        "machine": {**machine(), "load_average_before": load_before},
        "rows": [
            {
                "label": label,
                "info": infos[label],
                **_row(label, samples, ids.size, batch, seed),
                **footprints.get(label, unmeasured),
            }
            for label in engines
        ],
        "ratios": _ratios(list(engines), samples, seed),
    }


_PROTOCOL = {
    "order": "round-robin over engines in one process, start rotated each round",
    "sampling": "greedy, end of text ignored, choice of the token timed",
    "intervals": "95% bootstrap over rounds; ratios of medians paired by round",
    "memory": "peak resident memory and load time (imports included) in a fresh process per engine; on a GPU "
    "also the peak of PyTorch's allocator there, without what CUDA takes for itself",
}
"""What is the same in every benchmark."""

Samples = dict[str, dict[str, np.ndarray]]
"""Metric -> label -> milliseconds, [rounds, samples of a round]."""


def _prompt(ids: np.ndarray, batch: int, prompt: int) -> np.ndarray:
    """Return the prompts, int64 [batch, prompt]."""
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if len(ids) < batch * prompt:
        wanted = f"the prompt of {prompt}" if batch == 1 else f"{batch} prompts of {prompt}"
        raise MoEdgeError(f"The benchmark text has {len(ids)} tokens, fewer than {wanted}.")
    return ids[: batch * prompt].reshape(batch, prompt)


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    """Return what is called after each of ``total`` pieces of work."""
    done = iter(range(1, total + 1))

    def advance() -> None:
        number = next(done)
        if progress:
            progress(number, total)

    return advance


def _footprints(
    engines: Mapping[str, Callable[[], Engine]], prompt: np.ndarray, advance: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Memory and load time of each engine, in processes of their own."""
    found = {}
    for label, start in engines.items():
        found[label] = _footprint(start, prompt)
        advance()
    return found


def _rounds(
    engines: Mapping[str, Callable[[], Engine]],
    ids: np.ndarray,
    decode: int,
    repeats: int,
    warmup: int,
    advance: Callable[[], None],
) -> tuple[Samples, dict[str, Any]]:
    """Open every engine and time them in turn; returns the times and what the engines are."""
    labels = list(engines)
    opened: dict[str, Engine] = {}
    ours = not gc.get_freeze_count()  # else the calling program has frozen what is there, and keeps it so
    ttft: dict[str, list[list[float]]] = {label: [] for label in labels}
    tpot: dict[str, list[list[float]]] = {label: [] for label in labels}
    try:
        for label in labels:
            opened[label] = engines[label]()
        if ours:
            gc.freeze()  # what is there stays: the collections before each run then look at that run's objects only
        for number in range(warmup + repeats):
            shift = number % len(labels)
            for label in labels[shift:] + labels[:shift]:
                time.sleep(_SETTLE)
                first, steps = _timed_run(opened[label], ids, decode)
                if number >= warmup:
                    ttft[label].append([first])
                    tpot[label].append(steps)
                advance()
        infos = {label: engine.info.as_json() for label, engine in opened.items()}
    finally:
        if ours:
            gc.unfreeze()
        for engine in opened.values():
            engine.close()
    times = {"ttft_ms": ttft, "tpot_ms": tpot}
    return {metric: {label: np.array(found[label]) for label in labels} for metric, found in times.items()}, infos


def _row(label: str, samples: Samples, prompt: int, batch: int, seed: int) -> dict[str, Any]:
    """What was timed of one engine: a step reads ``prompt`` tokens at first, and then decodes ``batch``."""
    summary = {metric: _summary(times[label], seed) for metric, times in samples.items()}
    return {
        **summary,
        "prefill_tokens_per_s": 1e3 * prompt / summary["ttft_ms"]["p50"],
        "decode_tokens_per_s": 1e3 * batch / summary["tpot_ms"]["p50"],
        "rounds": {metric: np.median(times[label], axis=1).tolist() for metric, times in samples.items()},
    }


def _timed_run(engine: Engine, ids: np.ndarray, decode: int) -> tuple[float, list[float]]:
    """One reading of the prompts int64 [B, S] and ``decode`` steps: (TTFT, TPOT of each step) in ms."""
    gc.collect()  # not inside the timed part
    clock = time.perf_counter
    start = clock()
    step = engine.prefill(ids)
    # Every engine returns float32 logits in C order, so the choice of the token costs each the same (about 20 us for
    # a vocabulary of 50,000).
    tokens = step.logits[:, -1].argmax(axis=-1)[:, None]
    first = 1e3 * (clock() - start)
    times = []
    for _ in range(decode):
        start = clock()
        step = engine.decode(tokens, step.cache)
        tokens = step.logits[:, -1].argmax(axis=-1)[:, None]
        times.append(1e3 * (clock() - start))
    return first, times


def _summary(rounds: np.ndarray, seed: int) -> dict[str, Any]:
    """Percentiles of all samples of ``rounds`` [rounds, samples] and the interval of their median."""
    interval = bootstrap_ci(len(rounds), functools.partial(_medians, rounds), seed=seed)
    return {**percentiles(rounds.reshape(-1), (50, 90, 99)), "mean": float(rounds.mean()), "ci95": interval}


def _medians(rounds: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Median of all samples [rounds, samples] of each drawing of rounds int64 [N, rounds]."""
    return np.asarray(np.median(rounds[drawn], axis=(-2, -1)))


def _ratios(labels: list[str], times: dict[str, dict[str, np.ndarray]], seed: int) -> list[dict[str, Any]]:
    """Speed-up of every engine over every other, for each metric; samples [rounds, samples]."""
    ratios = []
    for metric, samples in times.items():
        for baseline in labels:
            for label in labels:
                if label == baseline:
                    continue
                slow, fast = samples[baseline], samples[label]

                def speedup(drawn: np.ndarray, slow: np.ndarray = slow, fast: np.ndarray = fast) -> np.ndarray:
                    return _medians(slow, drawn) / _medians(fast, drawn)

                low, high = bootstrap_ci(len(slow), speedup, seed=seed)
                ratios.append(
                    {
                        "metric": metric,
                        "label": label,
                        "baseline": baseline,
                        "speedup": float(np.median(slow) / np.median(fast)),
                        "ci95": [low, high],
                        # What the interval allows to say: nothing when it holds 1.
                        "verdict": "faster" if low > 1 else "slower" if high < 1 else "no difference shown",
                    }
                )
    return ratios


def _footprint(opener: Callable[[], Engine], ids: np.ndarray) -> dict[str, Any]:
    """Peak memory and load time of one engine in a fresh process, or None with the reason."""
    unknown = {"peak_rss_mib": None, "load_s": None}
    if not isinstance(opener, functools.partial) or opener.func is not open_engine or len(opener.args) != 1:
        return {**unknown, "reason": "the engine was not given as functools.partial(open_engine, path, ...)"}
    request = {"path": str(opener.args[0]), "options": opener.keywords, "ids": ids.tolist()}
    try:
        child = subprocess.run(
            [sys.executable, "-c", "from moedge.runtime.bench.latency import _child; _child()"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_CHILD_TIMEOUT,
            check=False,
        )
        answer = dict(json.loads(child.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {**unknown, "reason": f"no answer within {_CHILD_TIMEOUT:.0f} s"}
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise MoEdgeError(
            f"Engine {request['path']} failed in its own process (exit {child.returncode}): {last}"
        ) from None
    if "refused" in answer:
        raise MoEdgeError(f"Engine {request['path']}: {answer['refused']}")
    return answer


def _child() -> None:
    """Run in the fresh process: request as JSON on stdin, result as JSON on the last line of stdout."""
    request = json.load(sys.stdin)
    start = time.perf_counter()
    try:
        engine = open_engine(request["path"], **request["options"])
        load = time.perf_counter() - start
        loaded = peak_rss_mib()
        _timed_run(engine, np.array(request["ids"], dtype=np.int64), _CHILD_DECODE)
    except MoEdgeError as error:
        print(json.dumps({"refused": str(error)}))
        return
    memory = {"peak_rss_mib": peak_rss_mib(), "peak_rss_after_load_mib": loaded, **gpu_memory(engine)}
    print(json.dumps({**memory, "load_s": load}))


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
