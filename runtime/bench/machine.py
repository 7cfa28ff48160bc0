"""Facts about this machine that stand beside every measured number."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moedge import __version__
from moedge.runtime.device import moedge_nvml
from moedge.runtime.engines.calls import default_threads


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and versions: what the numbers were measured on. Equal from run to run.

    ``usable_cores``: threads of an engine that is told no number; a process may be held to some of the cores.
    """
    import psutil

    gpu = moedge_nvml.told()
    return {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": default_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "moedge": __version__,
        **({"gpu": ", driver ".join(filter(None, gpu))} if gpu else {}),
    }


def created() -> str:
    """Now, as results tell when they were made: ISO 8601, UTC. With :func:`commit` what ``moedge history`` reads."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit that a CI server says, else that of the working folder's repository; None where there is none."""
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT"):
        if told := os.environ.get(name):
            return told
    git = shutil.which("git")
    if git is None:
        return None
    try:
        asked = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def processor_name() -> str:
    """Marketing name of the processor, or the machine type where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """Instruction sets that decide which CPU kernels run, in the names that /proc/cpuinfo uses."""
    found = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in _FEATURES if name in found]


_FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == key), "")
