"""Ahead-of-time compilation: PTX and cubin for every target, without a GPU, and within its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")  # Linux only

PROGRAM = """
import json, sys
from dataclasses import asdict
from moedge.convert.ops.kernels import table
launches, labels = table.cases(), json.loads(sys.argv[2])
chosen = {label: launch for label, launch in launches.items() if labels is None or label in labels}
print(json.dumps([asdict(row) for row in table.resources(chosen, json.loads(sys.argv[1]))]))
"""


def compiled(capabilities: list[int], labels: list[str] | None, cache: Path) -> list[dict[str, Any]]:
    """Compile in a process of its own: this one has Triton's interpreter switched on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(capabilities), json.dumps(labels)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(rows: list[dict[str, Any]]) -> None:
    from moedge.convert.ops.kernels.compile import MOST_SHARED

    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["spills"] == 0, row
        assert row["shared"] <= MOST_SHARED[row["capability"]] * 1024, row
        assert row["cubin"] > 0, row


def test_kernels_compile_for_orin_and_thor(tmp_path: Path) -> None:
    rows = compiled([87, 110], ["GroupedLinear gemm16, fp16"], tmp_path)
    assert len(rows) == 2
    check(rows)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_capability(tmp_path: Path) -> None:
    from moedge.convert.ops.kernels import table
    from moedge.convert.ops.kernels.compile import PTX_VERSIONS

    rows = compiled(list(PTX_VERSIONS), None, tmp_path)
    assert len(rows) == len(table.cases()) * len(PTX_VERSIONS)
    check(rows)


PTX = """.version 8.0
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 .ptr .global .align 1 k_param_2
)
{
\tld.param.b64 \t%rd1, [k_param_0];
\tret;
}
"""


def test_only_parameters_that_nobody_reads_are_removed() -> None:
    from moedge.convert.ops.kernels.compile import without_scratch

    stripped = without_scratch(PTX, 1)
    assert "k_param_0\n)" in stripped
    assert "k_param_1" not in stripped
    assert "k_param_2" not in stripped
    assert without_scratch(PTX, 3) == PTX
    with pytest.raises(AssertionError, match="reads k_param_2"):
        without_scratch(PTX.replace("[k_param_0]", "[k_param_2]"), 1)


def test_compiling_in_the_interpreter_is_refused() -> None:
    from moedge import MoEdgeError
    from moedge.convert.ops.kernels import route
    from moedge.convert.ops.kernels.compile import compile_launch

    launch = route.launch(experts=4, top_k=1, rule="unit")
    with pytest.raises(MoEdgeError, match="TRITON_INTERPRET is set"):
        compile_launch(launch, 87)
    with pytest.raises(MoEdgeError, match="No kernels for sm_75; known: sm_80"):
        compile_launch(launch, 75)
