"""How often the gate of `moedge bench` errs on this machine: false alarms on one build, and injected slow-downs found.

    python tests/benchmarks/gate_rates.py MOE_BUNDLE DENSE_BUNDLE --gates 100 --repeats 20 --slower 5

Two tests, each with engines that are really run. *In one run* (``--against``): a bundle is opened twice, and a third
time with every call lengthened by a spin of so many percent of its own time. *In two runs* (``--baseline``): each run
is a process of its own with the MoE and its dense parent, every second one lengthens the MoE's calls; neighbours are
compared, with the dense parent as the control and without. Prints a line of JSON a gate to ``--log``, rates at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moedge.runtime.bench import latency
from moedge.runtime.bench.points import Point
from moedge.runtime.engines import open_engine
from moedge.runtime.gate.judge import judge


class Slower:
    """An engine whose calls take ``share`` longer: it spins for that part of the time that a call took."""

    def __init__(self, inner: Any, share: float) -> None:
        self.inner, self.share, self.info = inner, share, inner.info

    def _after(self, start: float, step: Any) -> Any:
        end = time.perf_counter() + self.share * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return step

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Any:
        return self._after(time.perf_counter(), self.inner.prefill(ids, attention_mask))

    def decode(self, ids: np.ndarray, cache: Any) -> Any:
        return self._after(time.perf_counter(), self.inner.decode(ids, cache))

    def close(self) -> None:
        self.inner.close()


def timed(engines: dict[str, Any], options: argparse.Namespace) -> Any:
    """One benchmark of random ids, without memory."""
    point = Point(prompt=options.prompt, decode=options.decode)
    ids = np.random.default_rng(0).integers(0, options.vocabulary, point.tokens)
    return latency.bench(engines, ids, [point], repeats=options.repeats, memory=False)


def opener(path: Path, options: argparse.Namespace, share: float = 0.0) -> Any:
    """What opens a bundle, lengthened or not; only the latter has a hash, which makes it a control."""
    plain = partial(open_engine, path, threads=options.threads, last_logits=True)
    return (lambda: Slower(plain(), share)) if share else plain


def in_one_run(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """The gates of one run with three engines: the bundle again, and the slow one, each against the bundle."""
    share = options.slower / 100
    old, same = (opener(options.moe, options) for _ in range(2))
    result = timed({"old": old, "same": same, "slow": opener(options.moe, options, share)}, options)
    return [(label, judge(result, against={label: "old"}, max_slowdown=share)) for label in ("same", "slow")]


def process(options: argparse.Namespace, share: float) -> Any:
    """A run of the MoE and its dense parent in a process of its own."""
    command = [sys.executable, __file__, str(options.moe), str(options.dense), "--child", str(share)]
    for name in ("prompt", "decode", "repeats", "threads", "vocabulary"):
        command += [f"--{name}", str(getattr(options, name))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def in_two_runs(options: argparse.Namespace, before: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The gates of a new run and a lengthened one against the run before."""
    share = options.slower / 100
    slow, same = (process(options, s) for s in (share, 0.0))
    alone = [{**run, "engines": {"moe": run["engines"]["moe"]}} for run in (before, slow, same)]
    for run in alone:
        (point,) = run["points"]
        run["points"] = [{**point, "rows": [row for row in point["rows"] if row["label"] == "moe"]}]
    gates = [
        ("same, dense as control", judge(same, baseline=before, max_slowdown=share)),
        ("slow, dense as control", judge(slow, baseline=before, max_slowdown=share)),
        ("same, no control", judge(alone[2], baseline=alone[0], max_slowdown=share)),
        ("slow, no control", judge(alone[1], baseline=alone[0], max_slowdown=share)),
    ]
    return gates, same


def main() -> None:
    """Run the gates and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", type=Path)
    parser.add_argument("dense", type=Path)
    for name, value in (("gates", 100), ("repeats", 20), ("prompt", 64), ("decode", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--slower", type=float, default=5.0, help="percent; also the gate's limit")
    parser.add_argument("--only", choices=("one", "two"))
    parser.add_argument("--log", type=Path)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        engines = {"moe": opener(options.moe, options, options.child), "dense": opener(options.dense, options)}
        print(json.dumps(timed(engines, options)))
        return
    found: dict[str, Counter[str]] = {}
    values: dict[str, list[float]] = {}
    before = process(options, 0.0) if options.only != "one" else None
    for number in range(options.gates):
        gates = [(f"in one run: {name}", gate) for name, gate in in_one_run(options)] if options.only != "two" else []
        if before is not None:
            more, before = in_two_runs(options, before)
            gates += [(f"in two runs: {name}", gate) for name, gate in more]
        for name, gate in gates:
            found.setdefault(name, Counter())[gate["outcome"]] += 1
            for check in gate["checks"]:
                values.setdefault(f"{name}, {check['what']}", []).append(check["value"])
            if options.log:
                with options.log.open("a", encoding="utf-8") as stream:
                    facts = {"number": number, "name": name, "load": os.getloadavg()[0], **gate}
                    stream.write(json.dumps(facts) + "\n")
    print(f"{options.gates} gates each, {options.repeats} rounds, limit and slow-down {options.slower:g} %")
    for name, outcomes in found.items():
        print(f"{name:40} " + "  ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items())))
    for name, sizes in values.items():
        ends = np.percentile(sizes, [0, 50, 100])
        print(f"{name:50} slow-down least {ends[0]:+.3f}  median {ends[1]:+.3f}  most {ends[2]:+.3f}")


if __name__ == "__main__":
    main()
