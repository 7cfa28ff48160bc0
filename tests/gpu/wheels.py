"""Put the wheels that a GPU machine without a network lacks into a folder, to be carried there.

    python tests/gpu/wheels.py .whl --python 3.12

For an image that has PyTorch, Triton, transformers and ONNX Runtime, as those of GPU clouds do: what MoEdge and its
device tests need beside them. ``tests/gpu/run.py --wheels .whl`` installs them beside the image's own packages.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PACKAGES = ("annotated-types", "gguf", "onnx-ir", "optimum", "pot", "pydantic", "pydantic-core", "typing-inspection")
"""Without what they need in turn, which such images have (numpy, tqdm, PyYAML)."""
GLIBC = (17, 24, 26, 27, 28)


def main() -> int:
    """Download; pip wants every version of glibc by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the machine's version")
    parser.add_argument("--machine", default="x86_64", choices=["x86_64", "aarch64"])
    given = parser.parse_args()
    pip = [sys.executable, "-m", "pip"]
    # One version of pydantic-core fits one of pydantic: pip is asked for both at once, with what they need.
    where = ["--only-binary=:all:", "--implementation", "cp", "--python-version", given.python]
    where += [part for glibc in GLIBC for part in ("--platform", f"manylinux_2_{glibc}_{given.machine}")]
    where += ["--platform", f"manylinux2014_{given.machine}", "-d", str(given.folder)]
    pydantic = [*pip, "download", "-q", *where, "pydantic"]
    others = [name for name in PACKAGES if not name.startswith("pydantic")]
    for command in (pydantic, [*pip, "download", "-q", "--no-deps", *where, *others]):
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    found = sorted(given.folder.glob("*.whl"))
    print(f"{len(found)} wheels, {sum(file.stat().st_size for file in found) / 2**20:.1f} MiB in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
