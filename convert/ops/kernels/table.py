"""The kernel table of docs/kernels.md: ``python -m moedge.convert.ops.kernels.table [--write docs/kernels.md]``.

Compiles every kernel for every compute capability and prints registers, shared memory, spills and PTX size, then the
bytes and operations that each call is designed for.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedge.convert.ops.kernels.launch import Launch

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1024, 8, 2
"""The layer of the table: Llama-3.2-1B's FFN (H 2048, I 8192) cut into 8 experts, two of them active."""

DENSE_WIDTH, KEEP = 8192, 0.5
"""Of the gathered rows: that FFN uncut, and the share of its inputs and hidden values that a token keeps."""

BANDWIDTH = 204.8e9
"""Bytes a second of a Jetson AGX Orin's memory (NVIDIA's data sheet), for the time that the bytes alone take."""

START, END = "<!-- table: begin -->", "<!-- table: end -->"


def cases() -> dict[str, Launch]:
    """Return the variants of the table by label."""
    from moedge.convert.ops.kernels import combine, dispatch, grouped_glu, grouped_linear, route

    order = ("Route", "Dispatch", "GroupedGLU", "GroupedLinear", "Combine", "GatheredGLU", "GatheredLinear")
    shape: dict[str, Any] = {"hidden": HIDDEN, "width": WIDTH, "experts": EXPERTS}
    selected: dict[str, Any] = {"hidden": HIDDEN, "experts": EXPERTS, "top_k": TOP_K, "dtype": "fp16"}
    listed = {
        "Route, softmax, E=64": route.launch(experts=64, top_k=6, rule="softmax"),
        "Route, scaled, E=8": route.launch(experts=EXPERTS, top_k=TOP_K, rule="scaled"),
        "Dispatch, fp16": dispatch.launch(**selected),
    }
    for dtype, path in (
        ("fp16", "gemv"),
        ("fp16", "gemm16"),
        ("fp16", "gemm64"),
        ("bf16", "gemv"),
        ("bf16", "gemm64"),
        ("fp32", "gemm64"),
    ):
        options: dict[str, Any] = {"dtype": dtype, "path": path}
        listed[f"GroupedGLU {path}, {dtype}"] = grouped_glu.launch(activation="silu", **shape, **options)
        listed[f"GroupedLinear {path}, {dtype}"] = grouped_linear.launch(**shape, **options)
    listed["Combine, fp16"] = combine.launch(**selected, compensated=False)
    listed["Combine, bf16"] = combine.launch(**selected | {"dtype": "bf16"}, compensated=False)
    listed["Combine with compensation, fp16"] = combine.launch(**selected, compensated=True)
    listed |= _gathered_cases()
    return dict(sorted(listed.items(), key=lambda item: order.index(item[0].split(" ")[0].rstrip(","))))


def _gathered_cases() -> dict[str, Launch]:
    from moedge.convert.ops.kernels import gathered, gathered_glu, gathered_linear

    found: dict[str, Launch] = {}
    for dtype, path in (*(("fp16", path) for path in gathered.PATHS), ("bf16", "gemv"), ("bf16", "gemm16")):
        glu = gathered_glu.launch(hidden=HIDDEN, width=DENSE_WIDTH, activation="silu", dtype=dtype, path=path)
        linear = gathered_linear.launch(inputs=DENSE_WIDTH, outputs=HIDDEN, dtype=dtype, path=path)
        found |= {f"GatheredGLU {path}, {dtype}": glu, f"GatheredLinear {path}, {dtype}": linear}
    return found


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU."""

    kernel: str
    capability: int
    registers: int
    """Of a thread."""
    spills: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a block."""
    ptx: int
    cubin: int
    """Bytes of both files."""
    threads: int
    """Of a block."""


@dataclass(frozen=True)
class Cost:
    """Of one call of an operator for so many tokens."""

    kernel: str
    tokens: int
    bytes: int
    operations: int


def resources(launches: Mapping[str, Launch], capabilities: Sequence[int]) -> list[Resources]:
    """Compile and assemble; one row a kernel and capability."""
    from rich.console import Console
    from rich.progress import track

    from moedge.convert.ops.kernels.compile import assemble, compile_launch

    work = [(label, launch, capability) for label, launch in launches.items() for capability in capabilities]
    rows = []
    for label, launch, capability in track(work, "compiling", console=Console(stderr=True)):
        compiled = compile_launch(launch, capability)
        used = assemble(compiled)
        rows.append(
            Resources(
                kernel=label,
                capability=capability,
                registers=used.registers,
                spills=used.spills,
                shared=compiled.shared,
                ptx=len(compiled.ptx),
                cubin=used.cubin,
                threads=compiled.threads,
            )
        )
    return rows


def costs() -> list[Cost]:
    """Bytes and operations of one call of each operator for T = 1 and T = 512, float16 activations."""
    from moedge.convert.ops.kernels import (
        combine,
        dispatch,
        gathered_glu,
        gathered_linear,
        grouped_glu,
        grouped_linear,
        route,
    )

    rows = []
    for tokens in (1, 512):
        shape: dict[str, Any] = {"hidden": HIDDEN, "experts": EXPERTS, "itemsize": 2}
        chosen: dict[str, Any] = {"tokens": tokens, "top_k": TOP_K, **shape}
        listed = {"Route": route.cost(tokens=tokens, experts=EXPERTS, top_k=TOP_K), "Dispatch": dispatch.cost(**chosen)}
        options: dict[str, Any] = {"rows": tokens * TOP_K, "width": WIDTH, **shape}
        listed["GroupedGLU"] = grouped_glu.cost(**options)
        listed["GroupedLinear"] = grouped_linear.cost(**options)
        listed["Combine"] = combine.cost(**chosen, compensated=False)
        listed["Combine with compensation"] = combine.cost(**chosen, compensated=True)
        kept: dict[str, Any] = {"tokens": tokens, "itemsize": 2, "keep": KEEP}
        listed["GatheredGLU"] = gathered_glu.cost(hidden=HIDDEN, width=DENSE_WIDTH, **kept)
        listed["GatheredLinear"] = gathered_linear.cost(inputs=DENSE_WIDTH, outputs=HIDDEN, **kept)
        rows += [Cost(name, tokens, moved, operations) for name, (moved, operations) in listed.items()]
    return rows


def render(measured: Sequence[Resources]) -> str:
    """Return both tables as Markdown, the first from the rows of :func:`resources`."""
    from importlib.metadata import version

    capabilities = sorted({row.capability for row in measured})
    by_kernel: dict[str, dict[int, Resources]] = {}
    for row in measured:
        by_kernel.setdefault(row.kernel, {})[row.capability] = row
    lines = [
        f"Triton {version('triton')}; H={HIDDEN}, I={WIDTH}, E={EXPERTS}, k={TOP_K}; gathered: I={DENSE_WIDTH}, "
        f"{KEEP:g} of the values kept. Each cell: "
        "registers a thread / KiB of shared memory a block, and bytes of spills a thread where there are any.",
        "",
        "| kernel | threads | " + " | ".join(f"sm_{c}" for c in capabilities) + " | PTX KiB |",
        "|---|---|" + "---|" * len(capabilities) + "---|",
    ]
    for kernel, found in by_kernel.items():
        cells = []
        for row in (found[c] for c in capabilities):
            spilled = f", **{row.spills} B spilled**" if row.spills else ""
            cells.append(f"{row.registers} / {row.shared / 1024:.0f}{spilled}")
        sizes = [row.ptx / 1024 for row in found.values()]
        threads = found[capabilities[0]].threads
        lines.append(f"| {kernel} | {threads} | {' | '.join(cells)} | {min(sizes):.0f}-{max(sizes):.0f} |")
    lines += [
        "",
        f"One call, fp16 activations; the last column is the bytes over {BANDWIDTH / 1e9} GB/s (Jetson AGX Orin), the "
        "least time that a call can take there, not a measurement.",
        "",
        "| kernel | T | bytes | operations | operations per byte | bytes alone, µs |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs():
        moved, operations = cost.bytes, cost.operations
        lines.append(
            f"| {cost.kernel} | {cost.tokens} | {moved:,} | {operations:,} | {operations / moved:.2f} "
            f"| {moved / BANDWIDTH * 1e6:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or write them between the marks of a Markdown file."""
    from moedge.convert.ops.kernels.compile import PTX_VERSIONS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in this Markdown file")
    parser.add_argument("--capability", type=int, action="append", help="a compute capability; all by default")
    arguments = parser.parse_args()
    text = render(resources(cases(), arguments.capability or list(PTX_VERSIONS)))
    if arguments.write is None:
        print(text)
        return
    page = arguments.write.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    arguments.write.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
