"""The compiled kernels' intermediate code, executed without a GPU by ttsem: values, bounds, races, undefined results.

The interpreter runs the Python source of a kernel; ttsem runs what Triton's compiler made of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # Linux only

FAULTY = """
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def copy(x_ptr, y_ptr, N, MASKED: tl.constexpr):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N), mask=(i < N) | (not MASKED))


@pytest.mark.parametrize("masked", [True, False])
def test_copy(masked):
    x, y = torch.ones(13, device="cuda"), torch.zeros(13, device="cuda")
    copy[(2,)](x, y, 13, masked)
    assert torch.equal(x, y)
"""


@pytest.mark.slow
@pytest.mark.network
def test_compiled_kernels_have_no_fault(tmp_path: Path) -> None:
    """The device tests, unmodified, with ttsem in the device's place; and a kernel with a fault, which it names."""
    # It asks for Python 3.12 and runs on 3.11; its only dependency is numpy.
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-requires-python"]
    subprocess.run([*install, "--target", tmp_path / "site", "ttsem==0.1.0"], check=True, timeout=300)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "ttsem.sanitize",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *map(str, arguments),
        ]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)

    faulty = tmp_path / "test_faulty.py"
    faulty.write_text(FAULTY)
    named = run("--rootdir", tmp_path, faulty).stdout
    assert "1 failed, 1 passed" in named
    assert "past the end of the tensor passed as `y_ptr`" in named

    for name in ("test_kernels.py", "test_gathered.py"):
        # Times of a device are none of a simulator's.
        done = run("-m", "gpu and not slow", "-k", "not take_less_time", Path(__file__).with_name(name))
        assert done.returncode == 0, done.stdout[-4000:]
        assert "passed" in done.stdout
