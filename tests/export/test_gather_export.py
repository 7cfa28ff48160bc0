"""Models that leave small values out, on every target: exported, lowered, compared with PyTorch, mistakes caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.pipeline import export, lower
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine

IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
GROWTH = (1 + 0.1 * (2 + 1 / 0.1) ** 2) ** 0.5
"""A rounding of a value on a ramp of 0.1 counts 2 + 1 / 0.1 times, and at most one of ten is (lowering/gather.py)."""
# Two float32 evaluations of a 2-layer model: some fifteen products of at most 64 terms in another order, 64 * 2^-24.
FLOAT = 6e-5 * GROWTH
# Four blocks, each within HALF_LIMIT of its own output, added to one residual stream.
HALF = 4 * tensorrt.HALF_LIMIT * GROWTH
KINDS = [
    "gather only",
    "routed",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("compensation", "biases", "GELU")),
]
QUANTISED = ("ort-cpu-int8", "ort-cpu-int4", "tensorrt-rtx-int8", "tensorrt-rtx-int4")


def relative(actual: Any, expected: Any) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


class Folders:
    """A checkpoint and its portable bundle of each kind, and other bundles, made when they are first asked for."""

    def __init__(self, root: Path, make: Any) -> None:
        self.root, self._make = root, make

    def checkpoint(self, kind: str) -> Path:
        path = self.root / kind / "moe"
        if not path.exists():
            self._make(kind, path)
        return path

    def portable(self, kind: str) -> Path:
        path = self.root / kind / "bundles"
        return path / "portable" if path.exists() else export(self.checkpoint(kind), path, [], label=kind)["portable"]

    def bundle(self, kind: str, target: str, **options: Any) -> Path:
        path = self.root / kind / f"{target} {options}"
        if not path.exists():
            with atomic_dir(path) as partial:
                lower(target, self.portable(kind), partial, **options)
        return path


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, convert_tiny: Any, gathered: Any, gather_only: Any
) -> Folders:
    def make(kind: str, path: Path) -> None:
        options = {"biases": {"mlp_bias": True}, "GELU": {"hidden_act": "gelu_pytorch_tanh"}}.get(kind, {})
        model = tiny_model("llama", **options)
        plan = gather_only(model) if kind == "gather only" else gathered(convert_tiny(model, "cmoe"), model)
        if "compensation" in kind:
            fill = np.random.default_rng(2).normal(0, 0.1, (6, 32)).astype(np.float32)
            plan = replace(plan, layers=[replace(layer, compensation=fill) for layer in plan.layers])
        modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, path)

    return Folders(tmp_path_factory.mktemp("gather"), make)


def check(engine: Any, reference: Any, limit: float) -> None:
    """Prefill of 20 tokens and four decoded ones; every token has the reference's experts."""
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert 0 < relative(got.logits, want.logits) < limit
        for layer, experts in (want.routes or {}).items():
            np.testing.assert_array_equal(np.sort(got.routes[layer]), np.sort(experts))
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)


def applied(path: Path) -> dict[str, bool]:
    return {
        entry["rewrite"]: entry["self_test"] is None or entry["self_test"]["passed"]
        for entry in open_bundle(path).manifest.document()["lowering"]
        if entry["status"] == "applied"
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["portable", "openvino", "ort-cpu"])
def test_float32_targets_are_the_model(folders: Folders, kind: str, target: str) -> None:
    path = folders.portable(kind) if target == "portable" else folders.bundle(kind, target)
    check(OrtEngine(path, taps=True), TorchEngine(folders.checkpoint(kind), taps=True), FLOAT)
    assert all(applied(path).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "options"), [("tensorrt", {"tensorrt": "10.13"}), ("tensorrt-rtx", {})])
def test_half_precision_targets_are_the_model(
    folders: Folders, kind: str, target: str, options: dict[str, Any]
) -> None:
    path = folders.bundle(kind, target, **options)
    check(open_engine(path, taps=True), TorchEngine(folders.checkpoint(kind), taps=True), HALF)
    assert applied(path)["KeepLarge -> Abs, Sub, Div, Clip, Mul"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", QUANTISED)
def test_quantised_targets_are_the_model_of_their_weights(folders: Folders, kind: str, target: str) -> None:
    if (kind, target) == ("biases", "tensorrt-rtx-int4"):
        with pytest.raises(MoEdgeError, match="its rows of 33 inputs are no whole number of blocks of 16"):
            folders.bundle(kind, target)
        return
    path = folders.bundle(kind, target)
    stored = OrtEngine(folders.portable(kind), taps=True, weights_of=path)
    if target.startswith("ort"):
        check(OrtEngine(path, taps=True, float32_activations=True), stored, FLOAT)
    else:
        check(OrtEngine(path, taps=True), stored, HALF)
    classes = {
        entry["tensor_class"]: entry for entry in open_bundle(path).manifest.document()["quantization"]["classes"]
    }
    assert classes["thresholds"]["bytes"] == classes["thresholds"]["float_bytes"] == 4 * 2 * (32 + 64)


def test_cuda_takes_the_model_without_experts(folders: Folders) -> None:
    path = folders.bundle("gather only", "ort-cuda")
    assert any("float16" in name for name in applied(path))
    with pytest.raises(MoEdgeError, match=r"^Cannot lower for ort-cuda: hidden values .*; use --target portable or"):
        folders.bundle("routed", "ort-cuda")
