"""FFNs of ``ort_moe_block.py``, dense and routed, in two versions of ONNX Runtime that take turns: what changed?

    python tests/benchmarks/ort_versions.py 1.31.1 1.32.0 --tokens 1,8,512 --threads 2

Each version is installed by pip into a folder of its own, without its dependencies. Processes of both take turns; the
table gives the median of each form in milliseconds, the older over the newer with a 95 % interval over turns, and the
speed-up of the routed form over the dense one in each version: where that crosses 1, a lowering rule has to change its
mind (``export/lowering/ort/products.py``: products of each expert, or the fused kernel).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from moedge.runtime.device.moedge_timing import speedup

Key = tuple[int, int, str]
"""Bits, tokens, form."""


def site(version: str, folder: Path) -> Path:
    """Install one version into a folder; return it."""
    target = folder / version
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*install, f"onnxruntime=={version}"], check=True, timeout=600)
    return target


def turn(folder: Path, options: list[str]) -> dict[Key, float]:
    """Run the block once with a version; return milliseconds."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(Path(__file__).with_name("ort_moe_block.py")), "--json", *options]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    if found["onnxruntime"] != folder.name:
        raise SystemExit(f"asked for onnxruntime {folder.name}, {found['onnxruntime']} ran")
    return {(row["bits"], row["tokens"], row["form"]): row["ms"] for row in found["rows"]}


def main() -> None:
    """Print a table; options that are not known here go to ort_moe_block.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--turns", type=int, default=5)
    given, options = parser.parse_known_args()
    times: dict[str, dict[Key, list[float]]] = {v: defaultdict(list) for v in (given.old, given.new)}
    with tempfile.TemporaryDirectory() as folder:
        sites = {version: site(version, Path(folder)) for version in times}
        for _ in range(given.turns):
            for version, where in sites.items():
                for key, value in turn(where, options).items():
                    times[version][key].append(value)
    print(
        f"| bits | T | form | {given.old}, ms | {given.new}, ms | old / new | over dense, {given.old} | {given.new} |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (bits, tokens, form), values in times[given.old].items():
        old, new = (np.array(times[version][bits, tokens, form])[:, None] for version in times)
        ratio = speedup(old, new)
        dense = [np.median(times[version][bits, tokens, "dense"]) for version in times]
        gains = [f"{base / np.median(mine):.2f}" for base, mine in zip(dense, (old, new), strict=True)]
        print(
            f"| {bits} | {tokens} | {form} | {np.median(values):.3f} | {np.median(new):.3f} | {ratio['speedup']:.2f} "
            f"({ratio['ci95_low']:.2f} to {ratio['ci95_high']:.2f}) | {gains[0]} | {gains[1]} |"
        )


if __name__ == "__main__":
    main()
