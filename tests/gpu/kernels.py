"""Single kernels in bfloat16 beside their limits: the bytes they must move, the operations they must do.

The limit is the longer of bytes over the bandwidth of a copy and operations over the rate of a product, both measured
by this program on the same device. Each call gets weights of its own out of a ring larger than any cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import clock as timing
import torch
from layers import KEEPS, SHAPES, TINY, TOKENS, Layout, Shape

from moedge.convert.ops.gathered import limits_of
from moedge.convert.ops.kernels import (
    combine,
    cuda,
    dispatch,
    gathered,
    gathered_glu,
    gathered_linear,
    grouped,
    grouped_glu,
    grouped_linear,
    route,
)
from moedge.convert.plan import RAMP, SMALLEST_THRESHOLD

RING = 400e6
"""Bytes of weights that calls take in turn; an H200 has a cache of 60 MB."""
LAYOUT = Layout(0, 2, 8)
"""The routed block that is measured."""

Case = tuple[str, str, list[timing.Work], tuple[int, int]]
"""Kernel, path, one call for each set of weights, (bytes, operations) of a call."""


def _ring(bytes_each: float, *, rehearsal: bool) -> int:
    return 1 if rehearsal else max(2, round(RING / bytes_each))


def routed_cases(shape: Shape, tokens: int, device: str, *, rehearsal: bool) -> Iterator[Case]:
    """Yield the kernels of a routed FFN for T tokens that choose at random."""
    experts, top_k, hidden = LAYOUT.experts, LAYOUT.active, shape.hidden
    width = shape.width // experts
    common: dict[str, Any] = {"tokens": tokens, "top_k": top_k, "experts": experts}
    x = torch.randn(tokens, hidden, device=device).to(torch.bfloat16)
    scores = torch.randn(tokens, experts, device=device)
    indices, weights = cuda.route(scores, None, None, top_k, "softmax")
    yield "Route", "", [lambda: cuda.route(scores, None, None, top_k, "softmax")], route.cost(**common)
    rows, offsets, inverse = cuda.dispatch(x, indices, experts)
    copying: dict[str, Any] = {**common, "hidden": hidden, "itemsize": 2}
    yield "Dispatch", "", [lambda: cuda.dispatch(x, indices, experts)], dispatch.cost(**copying)

    chosen = int((offsets.diff() > 0).sum())  # what is read is what was chosen
    path = grouped.path_for(tokens, top_k, experts)
    sizes: dict[str, Any] = {
        "rows": len(rows),
        "hidden": hidden,
        "width": width,
        "experts": chosen,
        "itemsize": 2,
    }
    each = experts * hidden * width * 2
    gates = [
        torch.randn(2, experts, width, hidden, device=device).mul_(hidden**-0.5).to(torch.bfloat16)
        for _ in range(_ring(2 * each, rehearsal=rehearsal))
    ]

    def glu(pair: torch.Tensor) -> torch.Tensor:
        return cuda.grouped_glu(rows, offsets, pair[0], pair[1], "silu", tokens=tokens)

    yield "GroupedGLU", path, [lambda pair=pair: glu(pair) for pair in gates], grouped_glu.cost(**sizes)
    inner = glu(gates[0])
    downs = [pair[0].transpose(1, 2).contiguous() for pair in gates]
    yield (
        "GroupedLinear",
        path,
        [lambda down=down: cuda.grouped_linear(inner, offsets, down, tokens=tokens) for down in downs],
        grouped_linear.cost(**sizes),
    )
    out = cuda.grouped_linear(inner, offsets, downs[0], tokens=tokens)
    calls = [lambda: cuda.combine(out, inverse, indices, weights, None)]
    yield "Combine", "", calls, combine.cost(**copying, compensated=False)


def gathered_cases(shape: Shape, tokens: int, keep: float, device: str, *, rehearsal: bool) -> Iterator[Case]:
    """Yield the two products of a gathered FFN for T tokens, each with a share of its values, drawn by itself."""
    hidden, width = shape.hidden, shape.width
    limits = limits_of(torch.full((width,), SMALLEST_THRESHOLD, device=device), RAMP)

    def drawn(inputs: int) -> torch.Tensor:
        x = torch.randn(tokens, inputs, device=device)
        left_out = torch.rand_like(x).argsort(-1).argsort(-1) >= round(keep * inputs)
        return x.masked_fill(left_out, 0.0).to(torch.bfloat16)

    x, h, path = drawn(hidden), drawn(width), gathered.path_for(tokens)
    weights = [
        torch.randn(2, hidden, width, device=device).mul_(hidden**-0.5).to(torch.bfloat16)
        for _ in range(_ring(4 * hidden * width, rehearsal=rehearsal))
    ]
    label = f"{path}, {keep:.0%} kept"
    common: dict[str, Any] = {"tokens": tokens, "itemsize": 2, "keep": keep}
    yield (
        "GatheredGLU",
        label,
        [lambda pair=pair: cuda.gathered_glu(x, pair[0], pair[1], limits, "silu") for pair in weights],
        gathered_glu.cost(hidden=hidden, width=width, **common),
    )
    yield (
        "GatheredLinear",
        label,
        [lambda pair=pair: cuda.gathered_linear(h, pair[0].view(width, hidden)) for pair in weights],
        gathered_linear.cost(inputs=width, outputs=hidden, **common),
    )


def dense_case(shape: Shape, tokens: int, device: str, *, rehearsal: bool) -> Case:
    """Return PyTorch's product by the gate of the dense FFN, for the share of the limit that a library reaches."""
    x = torch.randn(tokens, shape.hidden, device=device).to(torch.bfloat16)
    number = shape.hidden * shape.width
    weights = [
        torch.randn(shape.width, shape.hidden, device=device).to(torch.bfloat16)
        for _ in range(_ring(2 * number, rehearsal=rehearsal))
    ]
    calls: list[timing.Work] = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    cost = ((number + tokens * (shape.hidden + shape.width)) * 2, 2 * tokens * number)
    return "dense product of PyTorch", "", calls, cost


def measure(name: str, clock: timing.Clock, *, rehearsal: bool) -> Iterator[dict[str, Any]]:
    """Yield one row a kernel and number of tokens: microseconds of a call, of its limit, and the share reached."""
    shape, device = (TINY if rehearsal else SHAPES)[name], clock.device
    limits = timing.ceilings(clock)
    for tokens in (1, 8) if rehearsal else TOKENS:
        yield from _rows(name, tokens, [dense_case(shape, tokens, device, rehearsal=rehearsal)], clock, limits)
        yield from _rows(name, tokens, routed_cases(shape, tokens, device, rehearsal=rehearsal), clock, limits)
        for keep in KEEPS[:1] if rehearsal or tokens > 16 else KEEPS:  # a prompt skips nothing
            cases = gathered_cases(shape, tokens, keep, device, rehearsal=rehearsal)
            yield from _rows(name, tokens, cases, clock, limits)


def _rows(
    name: str, tokens: int, cases: Any, clock: timing.Clock, limits: dict[str, float]
) -> Iterator[dict[str, Any]]:
    for kernel, path, calls, (moved, operations) in cases:
        repeats = max(1, (1 if clock.device == "cpu" else 16) // len(calls))
        several = calls * repeats  # one launch alone is shorter than the gap between two events

        def every(several: list[timing.Work] = several) -> None:
            for call in several:
                call()

        work, captured = clock.captured(every)
        took = float(torch.tensor(clock.in_turns({"it": work})["it"]).median()) / len(several)
        by_bytes, by_work = moved / limits["bytes_per_s"] * 1e6, operations / limits["flop_per_s"] * 1e6
        yield {
            "kind": "kernel",
            "shape": name,
            "kernel": kernel,
            "path": path,
            "tokens": tokens,
            "us": round(took, 2),
            "captured": captured,
            "bytes": moved,
            "operations": operations,
            "limit_us": round(max(by_bytes, by_work), 3),
            "bound": "bytes" if by_bytes >= by_work else "operations",
            "reached": round(max(by_bytes, by_work) / took, 4),
        }
