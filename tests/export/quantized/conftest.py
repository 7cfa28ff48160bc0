"""A model of a shape that the quantised kernels hold, and its bundles; read by the tests of this folder only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge.export.pipeline import export

HIDDEN, WIDTH, TOP_K = 64, 160, 2  # 5 experts of 20 and a shared expert of 60: neither fills its last block
TARGETS = ("ort-cpu-int8", "ort-cpu-int4")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """A dense tiny Llama and its CMoE conversion, of a shape that the quantised kernels hold."""
    from moedge.convert import calibration, methods, modeling

    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_llama(hidden=HIDDEN, width=WIDTH)
    model.save_pretrained(root / "dense")
    tiny_tokenizer.save_pretrained(root / "dense")
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    statistics = calibration.collect(model, tokens, k_a=8)
    plan = methods.convert("cmoe", statistics, model, shared=3, active=TOP_K, experts=8, k_a=8)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    return {"dense": root / "dense", "moe": root / "moe"}


@pytest.fixture(scope="session")
def bundles(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, without_compiler: Any
) -> dict[str, Path]:
    """In ONNX Runtime's own operators; tests/export/test_ort_routed.py has those of ours."""
    root = tmp_path_factory.mktemp("bundles")
    made = {}
    for kind, checkpoint in checkpoints.items():
        with without_compiler():
            for target, path in export(checkpoint, root / kind, TARGETS, label=kind).items():
                made[f"{kind}/{target}"] = path
    return made
