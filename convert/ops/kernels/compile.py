"""Compile a launch ahead of time: PTX that TensorRT (or any CUDA program) launches, and what ptxas says about it.

No GPU is needed: Triton carries LLVM and ptxas. The process must not run with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from moedge import MoEdgeError
from moedge.convert.ops.kernels.cuda import kernel_of
from moedge.convert.ops.kernels.launch import Launch

PTX_VERSIONS = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 110: 90, 120: 87, 121: 88}
"""Compute capability -> PTX version to write: not the newest, so that older drivers load it (8.0: CUDA 12.0, 8.7: 12.8,
8.8: 12.9, the first with sm_121; 9.0: 13.0, the first with sm_110)."""

MOST_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 110: 227, 120: 99, 121: 99}
"""Compute capability -> KiB of shared memory a block can ask for (CUDA C++ Programming Guide, table of technical
specifications)."""

PLUGIN_SHARED = 48 * 1024
"""Bytes of shared memory a kernel gets without asking the driver for more; a TensorRT plugin keeps below it, because
nothing documents that TensorRT asks."""


@dataclass(frozen=True)
class Compiled:
    """PTX of a launch for one compute capability; its parameters are the launch's inputs, scalars and outputs."""

    launch: Launch
    capability: int
    name: str
    ptx: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Resources:
    """What ptxas reports: registers a thread, bytes of spill stores and loads a thread, bytes of the cubin."""

    registers: int
    spills: int
    cubin: int


def compile_launch(launch: Launch, capability: int, *, most_shared: int | None = None) -> Compiled:
    """Compile for a compute capability (80, 86, 87, 89, 90, 110, 120 or 121).

    Args:
        launch: what to compile.
        capability: major * 10 + minor.
        most_shared: bytes of shared memory allowed; the pipeline is made shallower until the kernel fits.

    Raises:
        MoEdgeError: an unknown capability, the interpreter is on, or the kernel does not fit.
    """
    if capability not in PTX_VERSIONS:
        known = ", ".join(f"sm_{c}" for c in PTX_VERSIONS)
        raise MoEdgeError(f"No kernels for sm_{capability}; known: {known}.")
    if knobs.runtime.interpret:
        raise MoEdgeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.")
    limit = MOST_SHARED[capability] * 1024 if most_shared is None else most_shared
    for stages in range(launch.stages, 0, -1):
        compiled = _compile(replace(launch, stages=stages), capability)
        if compiled.shared <= limit:
            return compiled
    raise MoEdgeError(
        f"{launch.kernel} needs {compiled.shared} bytes of shared memory, sm_{capability} allows {limit}; "
        "choose a smaller tile (path)."
    )


def _compile(launch: Launch, capability: int) -> Compiled:
    function = kernel_of(launch)
    types = {name: "*" + kind for name, kind in {**launch.inputs, **launch.outputs}.items()}
    types |= dict.fromkeys(launch.scalars, "i32")
    order = function.arg_names
    runtime = [name for name in order if name not in launch.constants]
    if runtime != [*launch.inputs, *launch.scalars, *launch.outputs]:
        raise AssertionError(f"{launch.kernel}: parameters {runtime} are not inputs, scalars, outputs")
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in order},
        constexprs={(order.index(name),): value for name, value in launch.constants.items()},
        # Tensors of a framework and of TensorRT are aligned to far more than 16 bytes.
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in types if name not in launch.scalars},
    )
    options: dict[str, Any] = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "ptx_version": PTX_VERSIONS[capability],
    }
    with knobs.compilation.scope():
        # No source paths in the PTX: the same input gives the same bytes everywhere.
        knobs.compilation.disable_line_info = True
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise AssertionError(f"{launch.kernel} needs scratch memory, which only Triton's own launcher passes")
    return Compiled(
        launch=launch,
        capability=capability,
        name=metadata.name,
        ptx=without_scratch(kernel.asm["ptx"], len(runtime)),
        threads=metadata.num_warps * 32,
        shared=metadata.shared,
    )


def without_scratch(ptx: str, parameters: int) -> str:
    """Remove the scratch pointers that Triton appends to a kernel's parameters.

    Triton's launcher passes them; TensorRT passes inputs, scalars and outputs only, and reading a parameter that was
    not passed is undefined. Only parameters that the kernel never reads are removed.
    """
    entry = re.search(r"\.visible \.entry (\w+)\(\n(.*?)\n\)", ptx, re.DOTALL)
    assert entry is not None
    declared = [line.strip().rstrip(",") for line in entry[2].split("\n")]
    for line in declared[parameters:]:
        name = line.split()[-1]
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise AssertionError(f"{entry[1]} reads {name}, a parameter that only Triton's own launcher passes")
    kept = ",\n".join("\t" + line for line in declared[:parameters])
    return ptx[: entry.start(2)] + kept + ptx[entry.end(2) :]


def assemble(compiled: Compiled) -> Resources:
    """Assemble the PTX with ptxas for its own capability."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(compiled.ptx)
        target = sm_arch_from_capability(compiled.capability)
        command = [get_ptxas(compiled.capability).path, "-v", f"--gpu-name={target}", str(source), "-o", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if report.returncode:
            raise MoEdgeError(f"ptxas refused {compiled.name} for {target}: {report.stderr.strip()}")
        size = cubin.stat().st_size
    registers = re.search(r"Used (\d+) registers", report.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    assert registers is not None, report.stderr
    assert spills is not None, report.stderr
    return Resources(int(registers[1]), int(spills[1]) + int(spills[2]), size)
