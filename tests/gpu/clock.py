"""Time chains of work in turns: CUDA graphs between events on a device, the wall clock in a rehearsal on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moedge.runtime.device.moedge_timing import speedup

Work = Callable[[], Any]


class Clock:
    """Microseconds of work on one device."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def captured(self, work: Work) -> tuple[Work, bool]:
        """Return the work as one CUDA graph, launched as an engine launches it, and whether that could be had.

        What cannot be captured (it waits for the host) runs as it is: then launches from Python count.
        """
        if self.device == "cpu":
            work()
            return work, False
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()  # compiles, and allocates what libraries need
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            print(f"not captured: {error}", flush=True)
            torch.cuda.synchronize()
            return work, False
        return graph.replay, True

    def once(self, work: Work) -> float:
        """Run; return microseconds."""
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e6
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        work()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) * 1e3

    def in_turns(self, works: dict[str, Work]) -> dict[str, np.ndarray]:
        """Run all of them, round by round; return microseconds [rounds] of each, without three first rounds."""
        found: dict[str, list[float]] = {name: [] for name in works}
        warm = 0 if self.device == "cpu" else 3  # captured() ran it once
        for number in range(warm + self.rounds):
            for name, work in works.items():
                took = self.once(work)
                if number >= warm:
                    found[name].append(took)
        return {name: np.array(values) for name, values in found.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """Geometric mean of the ratio over two rounds or more, and its 95 % interval; above 1 ``fast`` is faster."""
    found = speedup(slow[:, None], fast[:, None])
    return {
        "ratio": round(found["speedup"], 3),
        "low": round(found["ci95_low"], 3),
        "high": round(found["ci95_high"], 3),
    }


def ceilings(clock: Clock) -> dict[str, float]:
    """Measure bytes a second of a copy (read and written) and operations a second of a product in bfloat16.

    On random values: products of zeros take less power and run faster.
    """
    tiny = clock.device == "cpu"
    # Two of them, beside what else is on a small GPU.
    size = 1 << 22 if tiny else min(1 << 32, torch.cuda.mem_get_info()[0] // 8)
    side = 128 if tiny else 8192
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
        a @ b
    copy = statistics.median(clock.once(lambda: target.copy_(source)) for _ in range(10))
    product = statistics.median(clock.once(lambda: a @ b) for _ in range(10))
    return {"bytes_per_s": 2 * size / copy * 1e6, "flop_per_s": 2 * side**3 / product * 1e6}
