"""Two CPU processes compute what one process with twice the batch computes.

``accelerate launch`` starts CPU processes through MPI only; torchrun starts them without, and Accelerate reads the same
environment variables that its launcher sets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge.convert import modeling

MODES = {
    "ddp": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    },
}


def launch(arguments: list[str], processes: int, environment: dict[str, str]) -> None:
    """Run ``moedge finetune`` in one process, or in several under torchrun."""
    head = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *head, "-m", "moedge.runtime.cli", "finetune", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one_with_twice_the_batch(
    mode: str, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any]
) -> None:
    model = tiny_llama()
    plan = make_plan(model)[0]
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], (80, 12))
    (tmp_path / "text.txt").write_text("\n".join(map(" ".join, words)), encoding="utf-8")
    shared = ["--text", str(tmp_path / "text.txt"), "--length=16", "--tokens=256", "--eval-windows=3", "--lr=0.003"]
    shared += ["--train=lora+scale+router+norms", "--balance=bias", "--set", "eval_every=2"]
    launch([str(tmp_path / "moe"), str(tmp_path / "one"), "--batch-size=4", *shared], 1, {})
    launch([str(tmp_path / "moe"), str(tmp_path / "two"), "--batch-size=2", *shared], 2, MODES[mode])
    records = [json.loads((tmp_path / name / "finetune.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    assert [(record["processes"], record["steps"]) for record in records] == [(1, 4), (2, 4)]
    one, two = (modeling.load(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    start = modeling.load(tmp_path / "moe")[0].state_dict()
    moved = max(float((one[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, tensor in one.items():
        # The gradient is the mean of two halves, rounded; Adam turns its rounding into a share of a step.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0.05 * moved, msg=lambda m, n=name: f"{n}: {m}")
