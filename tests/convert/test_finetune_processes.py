"""``accelerate launch`` on two CPU processes computes what one process with twice the batch computes."""

from __future__ import annotations

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
    "ddp": [],
    "fsdp": [
        "--use_fsdp",
        "--fsdp_version=2",
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap=LlamaDecoderLayer",
    ],
}


def launch(arguments: list[str], options: list[str]) -> None:
    """Run ``moedge finetune`` under ``accelerate launch`` with these options, or alone without any."""
    command = [sys.executable, "-m", "moedge.runtime.cli", "finetune", *arguments]
    if options:
        head = ["-m", "accelerate.commands.launch", *options, "--module", "moedge.runtime.cli"]
        command = [sys.executable, *head, "finetune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
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
    many = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch([str(tmp_path / "moe"), str(tmp_path / "one"), "--batch=4", *shared], [])
    launch([str(tmp_path / "moe"), str(tmp_path / "two"), "--batch=2", *shared], [*many, *MODES[mode]])
    one, two = (modeling.load(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    start = modeling.load(tmp_path / "moe")[0].state_dict()
    moved = max(float((one[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, tensor in one.items():
        # The gradient is the mean of two halves, rounded; Adam turns its rounding into a share of a step.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0.05 * moved, msg=lambda m, n=name: f"{n}: {m}")
