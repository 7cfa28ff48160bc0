"""The gathered FFN on a GPU, in Triton kernels, against the dense FFN of PyTorch (cuBLAS) in the same precision.

    python tests/benchmarks/gpu_gather.py --hidden 2048 --width 8192 --keep 1,.75,.5,.25 --tokens 1,2,4,8,16,64,512

Random weights; FFNs form a chain whose weights no cache holds, and dense and gathered chains take turns. Each token
keeps a share of its inputs and of its hidden values, drawn by itself: for several tokens that is the worst case, for
tokens of one text keep the same channels more often than that. Microseconds of one FFN, medians of CUDA events;
``ratio`` is dense over gathered: above 1 the gathered FFN takes less time. ``bytes`` is what the ratio would be if time
were bytes.
Launches are captured in a CUDA graph, as an engine's are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moedge.convert import ops
from moedge.convert.ops.gathered import limits_of
from moedge.convert.ops.kernels import gathered
from moedge.convert.plan import RAMP, SMALLEST_THRESHOLD

Chain = Callable[[], torch.Tensor]


class Weights:
    """FFNs of one shape, by output (dense) and by channel (gathered)."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        # More than any cache: an H200 has 50 MB, and the two chains take turns.
        layers = max(2, round(400e6 / (3 * hidden * width * dtype.itemsize)))
        self.hidden, self.width, self.layers, self.dtype = hidden, width, layers, dtype
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        self.dense = [[self._draw(*shape) for shape in shapes] for _ in range(layers)]
        self.channels = [[weight.T.contiguous() for weight in layer] for layer in self.dense]

    def _draw(self, outputs: int, inputs: int) -> torch.Tensor:
        return (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(self.dtype)

    def left_out(self, tokens: int, inputs: int, keep: float) -> torch.Tensor:
        """Inputs [T, K] of which each token keeps a share."""
        x = torch.randn(tokens, inputs, device="cuda")
        dropped = torch.rand_like(x).argsort(-1).argsort(-1) >= round(keep * inputs)
        return x.masked_fill(dropped, 0.0).to(self.dtype)

    def dense_chain(self, tokens: int) -> Chain:
        """Products by all weights."""
        x = self.left_out(tokens, self.hidden, 1.0)

        def run() -> torch.Tensor:
            for gate, up, down in self.dense:
                y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            return y

        return run

    def gathered_chain(self, tokens: int, keep: float) -> Chain:
        """Products by the rows of kept values. What down reads is drawn, so that the share is exact."""
        x, h = self.left_out(tokens, self.hidden, keep), self.left_out(tokens, self.width, keep)
        limits = limits_of(torch.full((self.width,), SMALLEST_THRESHOLD), RAMP).cuda()

        def run() -> torch.Tensor:
            for gate, up, down in self.channels:
                ops.gathered_glu(x, gate, up, limits, "silu")
                y = ops.gathered_linear(h, down)
            return y

        return run


def captured(chain: Chain) -> Callable[[], None]:
    """Return the chain as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return graph.replay


def times(chains: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Run the chains in turns; return microseconds of each run."""
    found: dict[Any, list[float]] = {name: [] for name in chains}
    for number in range(rounds + 3):
        for name, run in chains.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if number >= 3:
                found[name].append(start.elapsed_time(end) * 1e3)
    return found


def measure(
    hidden: int, width: int, keeps: list[float], tokens: list[int], *, dtype: str = "float16", rounds: int = 30
) -> list[dict[str, Any]]:
    """Return one row a number of tokens and share."""
    weights, rows = Weights(hidden, width, getattr(torch, dtype)), []
    for count in tokens:
        chains = {"dense": captured(weights.dense_chain(count))}
        chains |= {str(keep): captured(weights.gathered_chain(count, keep)) for keep in keeps}
        found = {name: statistics.median(each) / weights.layers for name, each in times(chains, rounds).items()}
        for keep in keeps:
            rows.append(
                {
                    "hidden": hidden,
                    "width": width,
                    "dtype": dtype,
                    "tokens": count,
                    "keep": keep,
                    "path": gathered.path_for(count),
                    "dense_us": round(found["dense"], 2),
                    "gathered_us": round(found[str(keep)], 2),
                    "ratio": round(found["dense"] / found[str(keep)], 3),
                    "bytes": round(1 / gathered.reads(keep=keep, tokens=count), 3),
                }
            )
    return rows


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--keep", default="1,.75,.5,.25", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--tokens", default="1,2,4,8,16,64,512", type=lambda t: [int(part) for part in t.split(",")])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = measure(given.hidden, given.width, given.keep, given.tokens, dtype=given.dtype, rounds=given.rounds)
    if given.json:
        print(json.dumps(rows))
        return
    print(f"{torch.cuda.get_device_name()}, H {given.hidden}, I {given.width}, {given.dtype}; microseconds of one FFN")
    for row in rows:
        print(
            "  ".join(
                f"{name} {row[name]}"
                for name in ("tokens", "keep", "path", "dense_us", "gathered_us", "ratio", "bytes")
            )
        )


if __name__ == "__main__":
    main()
