"""Tiny exported models: tracing takes seconds, so each is made once a session and only read by tests."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """A dense tiny Llama and its CMoE conversion (2 shared, 3 of 6 routed), saved."""
    from moedge.convert import calibration, modeling
    from moedge.convert.methods import cmoe

    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_llama()
    model.save_pretrained(root / "dense")
    tiny_tokenizer.save_pretrained(root / "dense")
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    statistics = calibration.collect(model, tokens, k_a=8)
    plan = cmoe.plan(statistics, model, shared=2, active=3, experts=8, k_a=8)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    return {"dense": root / "dense", "moe": root / "moe"}


@pytest.fixture(scope="session")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``{kind}/{target}`` folders for both models and both targets."""
    from moedge.export.pipeline import export

    root = tmp_path_factory.mktemp("bundles")
    made = {}
    for kind, checkpoint in checkpoints.items():
        for target, path in export(checkpoint, root / kind, ["portable", "ort-cpu"], label=kind).items():
            made[f"{kind}/{target}"] = path
    return made


@pytest.fixture(scope="session")
def source(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the bundle ``portable`` of the MoE, as ``moedge bundle`` takes it."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(bundles["moe/portable"], root / "portable")
    return root
