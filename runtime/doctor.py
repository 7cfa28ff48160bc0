"""What is installed here, which devices there are, and which targets are therefore possible.

Versions come from package metadata; nothing heavy is imported, so the answer takes well under a second and also works
where the heavy packages are missing or broken. ONNX Runtime alone is imported, to ask which providers it has.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape

from moedge._versions import installed
from moedge.export import targets as registry
from moedge.runtime import peers, ranges
from moedge.runtime.bench.machine import machine, processor_features
from moedge.runtime.tables import Sheet

SCHEMA = "moedge.doctor/1"

Tested = dict[str, ranges.Ranges]

# What each part needs: distribution names, one of several where they are alternatives.
_ONNX = (("onnx",), ("onnx-ir",), ("onnxscript",))
_CONVERT = (
    *(("torch",), ("transformers",), ("accelerate",), ("gguf",), ("huggingface-hub",), ("optimum",), ("scipy",)),
    *_ONNX,
)
(_ONNXRUNTIME,), (_RTX,) = registry.ONNXRUNTIME, registry.RTX

_RUNTIMES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("PyTorch", ("torch",), "convert, trace, reference engine"),
    ("Transformers", ("transformers",), "models and tokenizers"),
    ("Optimum", ("optimum",), "names and dummy inputs of the export"),
    ("ONNX", ("onnx",), "export, routing taps"),
    ("ONNX Script", ("onnxscript",), "export"),
    ("ONNX Runtime", _ONNXRUNTIME, "engine of portable and ort-cpu"),
    (
        "Triton",
        ("triton", "triton-windows"),
        "experts on a GPU: in PyTorch, and as kernels of tensorrt engines (moedge build)",
    ),
    ("TensorRT", ("tensorrt",), "builds and runs tensorrt engines"),
    ("TensorRT for RTX", _RTX, "builds (anywhere) and runs tensorrt-rtx engines"),
    ("OpenVINO", ("openvino",), "opens openvino bundles (docs/interop.md)"),
)


def examine() -> dict[str, Any]:
    """Look at this machine.

    Returns:
        JSON-ready dict of schema ``moedge.doctor/1``: ``machine``; ``compiler`` (version of g++ or None); ``runtimes``
        (name, package, version or None, tested versions, warning or None, providers); ``devices`` (cpu, gpus, jetson);
        ``dependencies``, every package of MoEdge's metadata (:class:`moedge.runtime.ranges.Dependency`); ``convert``
        and ``targets`` with ``possible``, the ``reasons`` why not, and ``warnings`` about versions that nobody has
        tested. A target has ``export`` (make its bundle here) and ``run`` (here); a peer has ``run``.
    """
    tested = ranges.tested()
    providers = _providers()
    gpus, gpu_note = _gpus()
    runtimes = []
    for name, packages, use in _RUNTIMES:
        package, installed = _installed(packages)
        runtimes.append(
            {
                "name": name,
                "package": package,
                "version": installed,
                "tested": str(tested[package]) if package in tested else None,
                "warning": _warning(packages, tested),
                "use": use,
                "providers": providers if name == "ONNX Runtime" and installed else None,
            }
        )
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "compiler": _compiler(),
        "runtimes": runtimes,
        "devices": {
            "cpu": {
                "features": processor_features(),
                "memory_available_gib": _available_gib(),
                "huge_pages": _huge_pages(),
            },
            "gpus": gpus,
            "gpu_note": gpu_note,
            "jetson": _jetson(),
        },
        "dependencies": ranges.dependencies(tested),
        "convert": _answer(_CONVERT, [], tested),
        "targets": [_target(row, providers, gpus, gpu_note, tested) for row in registry.every()],
        "peers": [_peer(row, tested) for row in peers.every()],
    }


def _peer(row: peers.Peer, tested: Tested) -> dict[str, Any]:
    """Whether another program can be timed here (``moedge bench --peer``), and what to install where it cannot."""
    answer = _answer([(name,) for name in row.packages], [], tested)
    if not answer["possible"]:
        answer["reasons"].append(f"pip install 'moedge[{row.extra}]'")
    versions = " ".join(version for name in row.packages if (version := _installed((name,))[1]))
    return {"peer": row.name, "what": row.summary, "takes": row.takes, "version": versions or None, "run": answer}


def _target(
    row: registry.Target,
    providers: list[str] | str,
    gpus: list[dict[str, Any]],
    gpu_note: str,
    tested: Tested,
) -> dict[str, Any]:
    unfit = []
    if row.engine is None:
        if isinstance(providers, str):
            unfit.append(providers)
        elif providers and row.provider not in providers:
            unfit.append(f"this ONNX Runtime has no {row.provider}")
    if row.gpu and not gpus:
        unfit.append(gpu_note)
    # A lowering is executed once to trust it, so it needs its runtime where the bundle is made; what needs a GPU
    # is executed in ONNX Runtime on the CPU.
    needs = _CONVERT if row.family == "portable" else (*_CONVERT, *((_ONNXRUNTIME,) if row.gpu else row.needs))
    return {
        "target": row.name,
        "what": row.summary,
        "export": _answer(needs, [], tested),
        "run": _answer(row.needs, unfit, tested),
    }


def _answer(needs: Sequence[tuple[str, ...]], reasons: Sequence[str], tested: Tested) -> dict[str, Any]:
    missing = [f"{packages[0]} is not installed" for packages in needs if _installed(packages)[1] is None]
    warnings = [warning for warning in (_warning(packages, tested) for packages in needs) if warning]
    return {"possible": not reasons and not missing, "reasons": [*reasons, *missing], "warnings": warnings}


def _installed(packages: Sequence[str]) -> tuple[str, str | None]:
    """First installed of several alternative packages: (name, version); the first name and None when there is none."""
    for package in packages:
        version = installed(package)
        if version is not None:
            return package, version
    return packages[0], None


def _warning(packages: Sequence[str], tested: Tested) -> str | None:
    package, installed = _installed(packages)
    return None if installed is None else ranges.warning(package, installed, tested)


def _providers() -> list[str] | str:
    """Providers that ONNX Runtime was built with, or why it cannot say."""
    if _installed(_ONNXRUNTIME)[1] is None:
        return []
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers())
    except Exception as error:  # a broken installation fails in many ways; doctor reports it and goes on
        return f"onnxruntime cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _compiler() -> str | None:
    """Version of g++, which compiles MoEdge's operators for ONNX Runtime on a CPU; None where it is missing."""
    command = shutil.which("g++")
    if command is None:
        return None
    asked = [command, "-dumpfullversion", "-dumpversion"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout.strip() or "unknown"


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA GPUs by nvidia-smi, and a sentence when there are none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], "no NVIDIA GPU found (nvidia-smi is not here)"
    fields = "name,memory.total,compute_cap,driver_version"
    try:
        answer = subprocess.run(
            [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"no NVIDIA GPU found (nvidia-smi: {type(error).__name__})"
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return [], f"no NVIDIA GPU found (nvidia-smi: {said[0] if said else answer.returncode})"
    return parse_gpus(answer.stdout), "no NVIDIA GPU found (nvidia-smi lists none)"


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Parse ``nvidia-smi --query-gpu=name,memory.total,compute_cap,driver_version --format=csv,noheader,nounits``."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            # Jetson and MIG print [N/A] for memory: it is shared or split there.
            memory = int(parts[1]) if parts[1].isdigit() else None
            gpus.append({"name": parts[0], "memory_mib": memory, "compute_capability": parts[2], "driver": parts[3]})
    return gpus


def _jetson(root: Path = Path("/")) -> dict[str, str] | None:
    """Model name and L4T release of a Jetson, None on anything else."""
    try:
        model = (root / "proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return None
    if not re.search("jetson|orin|xavier|thor", model, re.IGNORECASE):
        return None
    try:
        release = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        release = "unknown"
    return {"model": model, "l4t": release}


def _available_gib() -> float:
    import psutil

    return round(psutil.virtual_memory().available / 2**30, 1)


def _huge_pages(root: Path = Path("/")) -> str | None:
    """Whether Linux puts memory into huge pages: ``always``, on request (``madvise``) or ``never``; None: not told."""
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return None
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else None


_HUGE_PAGES = {
    "always": "always",
    "madvise": "on request; our CPU operators ask, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 asks for the rest",
    "never": "never",
}
"""What to say of :func:`_huge_pages`; docs/kernels-cpu.md has what they change."""


def render(result: dict[str, Any]) -> RenderableType:
    """Return the answer of :func:`examine` as rich tables."""
    facts, devices = result["machine"], result["devices"]
    where = Sheet(title="machine", show_header=False)
    where.add_row("processor", f"{facts['processor']}, {facts['cores']} cores ({facts['logical_cores']} logical)")
    where.add_row("instructions", " ".join(devices["cpu"]["features"]) or "unknown")
    where.add_row("memory", f"{facts['memory_gib']} GiB, {devices['cpu']['memory_available_gib']} GiB available")
    if devices["cpu"]["huge_pages"] in _HUGE_PAGES:
        where.add_row("huge pages", _HUGE_PAGES[devices["cpu"]["huge_pages"]])
    lost = "bundles for a CPU are written without MoEdge's operators: a gather skips no weights, experts are slower"
    where.add_row("g++", result["compiler"] or f"[yellow]missing[/yellow]: {lost}")
    for gpu in devices["gpus"]:
        memory = f"{gpu['memory_mib']} MiB, " if gpu["memory_mib"] else ""
        text = f"{gpu['name']}, {memory}compute capability {gpu['compute_capability']}, driver {gpu['driver']}"
        where.add_row("GPU", escape(text))
    if not devices["gpus"]:
        where.add_row("GPU", escape(devices["gpu_note"]))
    if devices["jetson"]:
        where.add_row("Jetson", escape(f"{devices['jetson']['model']}, {devices['jetson']['l4t']}"))
    where.add_row("software", f"{facts['system']}, Python {facts['python']}, MoEdge {facts['moedge']}")

    runtimes = Sheet(title="runtimes")
    for column in ("runtime", "version", "used for"):
        runtimes.add_column(column)
    for row in result["runtimes"]:
        version = f"[yellow]{escape(row['version'])}[/yellow]" if row["warning"] else escape(row["version"] or "-")
        providers = row["providers"]
        text = ", ".join(providers) if isinstance(providers, list) else providers
        runtimes.add_row(row["name"], version, escape(row["use"] + (f" ({text})" if text else "")))

    possible = Sheet(title="what is possible here")
    for column in ("", "make", "run", "notes"):
        possible.add_column(column)
    possible.add_row("convert", _mark(result["convert"]), "", _notes(result["convert"]))
    for target in result["targets"]:
        name = f"{target['target']}\n[dim]{escape(target['what'])}[/dim]"
        notes = _notes(target["export"], target["run"])
        possible.add_row(name, _mark(target["export"]), _mark(target["run"]), notes)
    others = Sheet(title="other programs that bench can time (--peer)")
    for column in ("", "run", "notes"):
        others.add_column(column)
    for peer in result["peers"]:
        name = f"{peer['peer']}\n[dim]{escape(peer['what'])}[/dim]"
        others.add_row(name, _mark(peer["run"]), _notes(peer["run"]))
    return Group(where, "", runtimes, "", *_outside(result["dependencies"]), possible, "", others)


def _outside(dependencies: Sequence[ranges.Dependency]) -> list[RenderableType]:
    """Return the table of what is too old or too new, nothing where there is no such package."""
    table = Sheet(title="versions that nobody has tested")
    for column in ("package", "version", "", "tested with"):
        table.add_column(column)
    for row in dependencies:
        if row["version"] is not None and row["verdict"] != "tested":
            table.add_row(row["package"], escape(row["version"]), f"[yellow]{row['verdict']}[/yellow]", row["tested"])
    return [table, ""] if table.rows else []


def _mark(answer: dict[str, Any]) -> str:
    if not answer["possible"]:
        return "[red]no[/red]"
    return "[yellow]untested[/yellow]" if answer["warnings"] else "[green]yes[/green]"


def _notes(*answers: dict[str, Any]) -> str:
    notes = [note for kind in ("reasons", "warnings") for answer in answers for note in answer[kind]]
    return escape("; ".join(dict.fromkeys(notes)))
