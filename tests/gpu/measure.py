"""One measuring part of ``run.py``, in a process of its own; rows are appended to a file as they are found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any


def facts(device: str) -> dict[str, Any]:
    """Return what the figures were found on."""
    import torch

    packages = {}
    for name in ("torch", "triton", "transformers", "onnxruntime", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    found: dict[str, Any] = {"kind": "facts", "python": platform.python_version(), "packages": packages}
    if device == "cpu":
        return found | {"device": f"no GPU; {platform.machine()}, {os.cpu_count()} processors"}
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except OSError:
        said = ""
    if said:
        found |= dict(zip(fields.split(","), said.splitlines()[0].split(", "), strict=False))
    return found


def rows(part: str, *, rehearsal: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part."""
    device = "cpu" if rehearsal else "cuda"
    name, _, shape = part.partition(" ")
    if name == "facts":
        yield facts(device)
        return
    import clock

    timer = clock.Clock(device, 2 if rehearsal else 40)
    if name == "ceilings":
        yield {"kind": "ceilings", **clock.ceilings(timer)}
    elif name == "layers":
        import layers

        yield from layers.measure(shape, timer, rehearsal=rehearsal)
    elif name == "kernels":
        import kernels

        yield from kernels.measure(shape, timer, rehearsal=rehearsal)
    else:
        raise SystemExit(f"no part {part!r}")


def main() -> None:
    """Append the rows; exit code 1 where a variant does not compute what it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--rehearsal", action="store_true")
    given = parser.parse_args()
    if given.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    wrong = []
    with given.rows.open("a", encoding="utf-8") as stream:
        for row in rows(given.part, rehearsal=given.rehearsal):
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            print(json.dumps(row), flush=True)
            if row.get("passed") is False:
                wrong.append(row)
    if wrong:
        worst = max(wrong, key=lambda row: row["error"] / row["limit"])
        sys.exit(f"{len(wrong)} checks of values failed; worst: {worst}")


if __name__ == "__main__":
    main()
