"""Does watching the machine change what is timed? One bundle opened twice, in turns; one of the two is watched.

    python tests/benchmarks/watch_cost.py BUNDLE --rounds 40

Prints the ratio of the watched engine's times over the other's with its 95 % interval, paired by round, and
what a reading costs. On an idle machine the interval should hold 1 and be narrow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from moedge.runtime.bench.guard import Observer
from moedge.runtime.bench.results import METRICS
from moedge.runtime.bench.stats import between, speedup
from moedge.runtime.bench.timing import Rules, time_rounds
from moedge.runtime.engines import open_engine

WATCHED, ALONE = "watched", "alone"


class OneOfTwo:
    """Passes on the turns of one engine."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def mark(self, label: str) -> None:
        """As of :class:`Observer`."""
        if label == WATCHED:
            self.observer.mark(label)

    def end(self, label: str) -> None:
        """As of :class:`Observer`."""
        if label == WATCHED:
            self.observer.end(label)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    engines = {
        label: open_engine(options.bundle, threads=options.threads, last_logits=True) for label in (WATCHED, ALONE)
    }
    observer = Observer({WATCHED: engines[WATCHED].info})
    ids = np.random.default_rng(0).integers(0, 1000, (1, options.prompt))
    rules = Rules(options.rounds, warmup=2)
    found = time_rounds(engines, ids, 0, options.decode, rules, lambda: None, OneOfTwo(observer))
    for metric in METRICS:
        one, two = (found.samples[metric][label] for label in (WATCHED, ALONE))
        value, ends, _ = speedup(one, two)
        print(f"{metric}: watched over alone {value:.4f} ({between(ends, '{:.4f}')})")
    guard = observer.guard({WATCHED: {m: np.median(found.samples[m][WATCHED], axis=1).tolist() for m in METRICS}})
    print(
        f"{guard['readings']} readings of {guard['reading_ms']:.2f} ms; own {guard['own_cores']:.2f} cores, others ",
        end="",
    )
    print("not told" if guard["others_cores"] is None else f"{guard['others_cores']:.2f}")
    observer.close()


if __name__ == "__main__":
    main()
