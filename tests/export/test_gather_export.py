"""Models that leave small values out, on every target: exported, lowered, compared with PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.graph.nodes import KEEPS
from moedge.export.lowering.ort.gathered import FuseGather
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.lowering.trt.gathered import GatherProducts
from moedge.export.quantize import moments
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine
from moedge.tests.export.gathered_models import (
    FLOAT,
    HALF,
    IDS,
    INT8,
    KINDS,
    QUANTISED,
    Folders,
    applied,
    check,
    relative,
    verified,
)


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
    assert (GatherProducts(None).name in applied(path)) == (target == "tensorrt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", QUANTISED)
def test_quantised_targets_are_the_model_of_their_weights(folders: Folders, kind: str, target: str) -> None:
    if (kind, target) == ("biases", "tensorrt-rtx-int4"):
        with pytest.raises(MoEdgeError, match="its rows of 33 inputs are no whole number of blocks of 16"):
            folders.bundle(kind, target)
        return
    path = folders.bundle(kind, target)
    stored = OrtEngine(folders.portable(kind), taps=True, weights_of=path)
    rewrites = applied(path)
    assert all(rewrites.values())
    if {FuseGather.name, FuseRouted.name} & set(rewrites):
        # Operators of our own round activations to int8 in any case, which turns near ties of experts.
        got, want = OrtEngine(path).prefill(IDS).logits[0], stored.prefill(IDS).logits[0]
        errors = [relative(one, other) for one, other in zip(got, want, strict=True)]
        assert 0 < np.median(errors) < INT8
    elif target.startswith("ort"):
        check(OrtEngine(path, taps=True, float32_activations=True), stored, FLOAT)
    else:
        check(OrtEngine(path, taps=True), stored, HALF)
    classes = {
        entry["tensor_class"]: entry for entry in open_bundle(path).manifest.document()["quantization"]["classes"]
    }
    assert (
        classes["thresholds"]["bytes"]
        == classes["thresholds"]["float_bytes"]
        == 4 * (2 * (32 + 64) + (2 * (32 + 32) + 32 if "every" in kind else 0))
    )


def test_cuda_takes_the_model_without_experts(folders: Folders) -> None:
    path = folders.bundle("gather only", "ort-cuda")
    assert any("float16" in name for name in applied(path))
    with pytest.raises(MoEdgeError, match=r"^Cannot lower for ort-cuda: hidden values .*; use --target portable or"):
        folders.bundle("routed", "ort-cuda")


def test_a_kernel_of_whole_experts_takes_them_when_their_hidden_values_are_kept(
    folders: Folders, without_compiler: Any
) -> None:
    """Inputs are left out before the kernel, which knows nothing of it; ort-cuda and QMoE then apply too."""
    with without_compiler():
        plain = {t: folders.bundle("x alone", t, plain=True) for t in ("ort-cpu", "ort-cpu-int8")}
        routed = folders.bundle("routed", "ort-cpu", plain=True)
    assert applied(plain["ort-cpu"])["Route + SparseGLU -> MoE"]
    assert applied(plain["ort-cpu-int8"])["Route + SparseGLU -> QMoE"]
    assert applied(folders.bundle("x alone", "ort-cuda"))["Route + SparseGLU -> MoE"]
    assert any("as plugins" in name for name in applied(folders.bundle("x alone", "tensorrt", tensorrt="10.13")))
    check(OrtEngine(plain["ort-cpu"], taps=True), TorchEngine(folders.checkpoint("x alone")), FLOAT)
    refused = {
        (entry["rewrite"], entry["reason"])
        for entry in open_bundle(routed).manifest.document()["lowering"]
        if entry["status"] == "refused"
    }
    assert ("Route + SparseGLU -> MoE", KEEPS) in refused


@pytest.mark.parametrize("target", ["openvino", "ort-cpu", "tensorrt-rtx"])
def test_hidden_values_alone_are_left_out(folders: Folders, target: str) -> None:
    if target == "tensorrt-rtx":  # in half precision a near tie of experts turns at one token: replayed, as ever
        assert verified(folders.portable("h alone"), folders.bundle("h alone", target))["verdict"]["passed"]
        return
    check(OrtEngine(folders.bundle("h alone", target), taps=True), TorchEngine(folders.checkpoint("h alone")), FLOAT)


def test_moments_for_gptq_are_of_the_values_that_are_kept(folders: Folders) -> None:
    """By hand: the moments of down's inputs in the shared block, and in each expert, from PyTorch."""
    model, _, _ = modeling.load(folders.checkpoint("routed"))
    windows = np.random.default_rng(3).integers(0, 256, (3, 24))
    found = moments.moments(open_bundle(folders.portable("routed")), windows)
    for ffn in modeling.sparse_ffns(model):
        ffn.record_routes = True
        seen: list[torch.Tensor] = []
        handle = ffn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        routes = []
        for window in torch.from_numpy(windows):
            with torch.no_grad():
                model(window[None])
            routes.append(ffn.last_routes)
        handle.remove()
        keep, name = torch.ops.moedge.keep_large, f"model.model.layers.{ffn.layer_index}.mlp"
        x = keep(torch.cat(seen), ffn.x_threshold, ffn.ramp)
        assert 0.2 < float((x == 0).float().mean()) < 0.8
        np.testing.assert_allclose(found[f"{name}.gate"], (x.T @ x).numpy(), rtol=1e-4, atol=1e-4)
        for expert in range(ffn.num_experts):
            rows = x[(torch.cat(routes) == expert).any(dim=1)]
            h = torch.nn.functional.silu(rows @ ffn.gate[expert].T) * (rows @ ffn.up[expert].T)
            h = keep(h, ffn.h_threshold[expert], ffn.ramp)
            np.testing.assert_allclose(found[f"{name}.down"][expert], (h.T @ h).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gather only, wide", {}), ("gather only, wide", {"experts": "plugins"}), ("routed", {})],
    ids=str,
)
def test_verify_passes_in_half_precision(folders: Folders, kind: str, options: dict[str, Any]) -> None:
    entry = verified(folders.portable(kind), folders.bundle(kind, "tensorrt-rtx", **options))
    assert not [check for check in entry["verdict"]["checks"] if not check["passed"]]
