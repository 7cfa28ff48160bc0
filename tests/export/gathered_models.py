"""Models that leave small values out, their bundles, and how these are compared with PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from moedge._files import atomic_dir
from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.lowering.ort.quantized import INT8_LIMIT
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.pipeline import export, lower
from moedge.runtime.parity.given import pair

IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
GROWTH = (1 + 0.1 * (2 + 1 / 0.1) ** 2) ** 0.5
"""A rounding of a value on a ramp of 0.1 counts 2 + 1 / 0.1 times, and at most one of ten is (lowering/gather.py)."""
# Two float32 evaluations of a 2-layer model: some fifteen products of at most 64 terms in another order, 64 * 2^-24.
FLOAT = 6e-5 * GROWTH
# Four blocks, each within HALF_LIMIT of its own output, added to one residual stream.
HALF = 4 * tensorrt.HALF_LIMIT * GROWTH
# Two blocks with thresholds, within INT8_LIMIT of their own output as a rule, added to one residual stream.
INT8 = 2 * INT8_LIMIT
KINDS = [
    "gather only",
    "gather only, every linear layer",
    "routed",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("compensation", "biases", "GELU")),
]
QUANTISED = ("ort-cpu-int8", "ort-cpu-int4", "tensorrt-rtx-int8", "tensorrt-rtx-int4")


def relative(actual: Any, expected: Any) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


class Folders:
    """A checkpoint and its portable bundle of each kind, and other bundles, made when they are first asked for.

    All workers of a session share them: whoever comes first makes one, and others wait for it.
    """

    def __init__(self, root: Path, make: Any) -> None:
        self.root, self._make = root, make

    def _made(self, path: Path, make: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{path.name}.lock"):
            if not path.exists():
                make(path)
        return path

    def checkpoint(self, kind: str) -> Path:
        return self._made(self.root / kind / "moe", lambda path: self._make(kind, path))

    def portable(self, kind: str) -> Path:
        checkpoint = self.checkpoint(kind)
        made = self._made(self.root / kind / "bundles", lambda path: export(checkpoint, path, [], label=kind))
        return made / "portable"

    def bundle(self, kind: str, target: str, *, plain: bool = False, **options: Any) -> Path:
        """``plain``: it has no operators of ours, for the caller lets no compiler be found."""
        portable = self.portable(kind)

        def make(path: Path) -> None:
            with atomic_dir(path) as partial:
                lower(target, portable, partial, **options)

        return self._made(self.root / kind / f"{target} {options}{' plain' * plain}", make)


def maker(tiny_model: Any, tiny_tokenizer: Any, convert_tiny: Any, gathered: Any, gather_only: Any) -> Any:
    """Return a function of a kind and a folder that saves such a model there."""

    def make(kind: str, path: Path) -> None:
        facts = {"biases": {"mlp_bias": True}, "GELU": {"hidden_act": "gelu_pytorch_tanh"}}
        options = facts.get(kind.rpartition(", ")[2], {})
        options = {"hidden": 64, "width": 256} if "wide" in kind else options
        model = tiny_model("llama", **options)
        model.model.norm.weight.data *= 2  # logits with a standard deviation that the limits of verify are derived for
        parts = {"x alone": {"h": False}, "h alone": {"x": False}}.get(kind, {})
        for layer in model.model.layers if "wide" in kind else ():  # weights of 0.2 make attention sharper than trained
            layer.self_attn.q_proj.weight.data *= 0.25
        plan = (
            gather_only(model, **({"linears": "all", "ramp": 2.0} if "every" in kind else {}))
            if kind.startswith("gather only")
            else gathered(convert_tiny(model, "cmoe"), model, **parts)
        )
        if "compensation" in kind:
            fill = np.random.default_rng(2).normal(0, 0.1, (6, 32)).astype(np.float32)
            plan = replace(plan, layers=[replace(layer, compensation=fill) for layer in plan.layers])
        modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, path)

    return make


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


def verified(reference: Path, test: Path) -> dict[str, Any]:
    windows = np.random.default_rng(1).integers(0, 256, (2, 64))
    (entry,) = pair(reference, test, "random", windows, 24, "float32", {"threads": 1}, lambda *_: None)["parity"]
    return entry
