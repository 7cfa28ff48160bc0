"""Models that leave small values out, for TensorRT: plugins where it takes them, standard operators elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moedge import MoEdgeError
from moedge.export.bundle import open_bundle
from moedge.export.graph import layers
from moedge.export.lowering.trt.gathered import GatherProducts
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.pytorch import TorchEngine
from moedge.tests.export.gathered_models import HALF, IDS, Folders, applied, check, relative


def plugins_of(path: Path) -> list[str]:
    """The plugin nodes of a bundle's graph, in its order."""
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node if node.domain == "moedge"]


FFN = ["GatheredGLU", "GatheredLinear"]


@pytest.mark.parametrize(
    ("kind", "options", "layer"),
    [
        ("gather only", {"tensorrt": "10.13"}, FFN),
        ("gather only", {"tensorrt": "10.13", "dtype": "bfloat16"}, FFN),
        ("gather only", {"tensorrt": "10.3"}, []),
        ("gather only", {"tensorrt": "10.13", "experts": "merged"}, []),
        ("gather only, biases", {"tensorrt": "10.13"}, ["GatheredLinear"] * 3),
        ("gather only, GELU", {"tensorrt": "10.13"}, ["GatheredLinear"] * 3),
        ("routed", {"tensorrt": "10.13"}, FFN),  # of the shared block: thresholds of experts have no kernel
        ("x alone", {"tensorrt": "10.13"},
         ["Route", *["GatheredLinear"] * 2, "Dispatch", "GroupedGLU", "GroupedLinear", "Combine"]),
    ],
    ids=str,
)  # fmt: skip
def test_tensorrt_reads_the_weights_of_kept_values_where_it_takes_kernels(
    folders: Folders, kind: str, options: dict[str, Any], layer: list[str]
) -> None:
    path = folders.bundle(kind, "tensorrt", **options)
    assert sorted(plugins_of(path)) == sorted(layer * 2)
    rewrites, manifest = applied(path), open_bundle(path).manifest
    assert all(rewrites.values())
    assert (GatherProducts(None).name in rewrites) == bool(layer)
    assert (manifest.plugins is not None) == bool(layer)
    assert any("multiplied by zeros" in limit for limit in manifest.limits) == (not layer)
    if options.get("dtype") != "bfloat16":
        check(open_engine(path, taps=True), TorchEngine(folders.checkpoint(kind), taps=True), HALF)


def test_rtx_has_kernels_for_kept_values_where_they_are_asked_for(folders: Folders) -> None:
    said = {
        entry["rewrite"]: entry["reason"]
        for entry in open_bundle(folders.bundle("gather only", "tensorrt-rtx")).manifest.document()["lowering"]
        if entry["status"] == "refused"
    }
    assert "--expert-form plugins" in said[GatherProducts(None).name]
    path = folders.bundle("gather only", "tensorrt-rtx", experts="plugins")
    assert plugins_of(path) == FFN * 2
    assert any("libmoedge_launch.so" in limit for limit in open_bundle(path).manifest.limits)
    check(open_engine(path), TorchEngine(folders.checkpoint("gather only")), HALF)


def test_the_bodies_of_plugins_are_the_standard_operators_bit_for_bit(folders: Folders) -> None:
    """What is judged on a CPU is the same in both forms, and so the verdict is."""
    paths = [
        folders.bundle("gather only", "tensorrt", tensorrt="10.13", **more) for more in ({}, {"experts": "merged"})
    ]
    plugins, standard = (open_engine(path).prefill(IDS).logits for path in paths)
    np.testing.assert_array_equal(plugins, standard)


def test_every_linear_layer_is_a_plugin_for_rows_of_tokens(folders: Folders, values_match_their_shapes: Any) -> None:
    """The kernels take [T, K]: attention and the output projection read [B, S, K]. A tied table is stored once."""
    kind = "gather only, every linear layer"
    path, standard = (
        folders.bundle(kind, "tensorrt", tensorrt="10.13", **more) for more in ({}, {"experts": "merged"})
    )
    found = plugins_of(path)
    assert (found.count("GatheredGLU"), found.count("GatheredLinear")) == (2, 2 * 5 + 1)
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert {ranks[name] for n in graph.node if n.domain == "moedge" for name in (n.input[0], n.output[0])} == {2}
    assert [list(tensor.dims) for tensor in graph.initializer if 260 in tensor.dims] == [[32, 260]]
    assert values_match_their_shapes(path) > len(found)
    check(open_engine(path), TorchEngine(folders.checkpoint(kind)), HALF)
    plugins, masked = (open_engine(each).prefill(IDS).logits for each in (path, standard))
    np.testing.assert_array_equal(plugins, masked)
    # Both forms show the same parts, so a check that failed can be located.
    other = onnx.load(standard / "model.onnx", load_external_data=False).graph
    spots = {spot for _, spot in layers.find(graph, 2).names}
    assert spots == {spot for _, spot in layers.find(other, 2).names}
    assert "ffn" in spots
    assert "ffn_normed" not in spots
    with pytest.raises(MoEdgeError, match=r"is for TensorRT: .* Here use ort-cpu or portable\."):
        open_engine(path, last_logits=True)  # as generate and bench open it


def test_a_weight_by_channel_is_stored_once(folders: Folders) -> None:
    """Prompts and single tokens read the same rows."""
    graph = onnx.load(folders.bundle("gather only", "tensorrt", tensorrt="10.13") / "model.onnx").graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer if ".mlp." in tensor.name and len(tensor.dims) == 2]
    wanted = [(32, 64), (32, 64), (2, 64), (64, 32)]  # gate, up, limits, down
    assert sorted(shapes) == sorted(wanted * 2)


def test_tensorrts_own_layer_and_the_plugins_refuse_thresholds_of_hidden_values(folders: Folders) -> None:
    for form, version in (("native", "11.0"), ("plugins", "10.13")):
        with pytest.raises(MoEdgeError, match=r"hidden values of the experts .*; take --expert-form merged"):
            folders.bundle("routed", "tensorrt", tensorrt=version, experts=form)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
@pytest.mark.parametrize("kind", ["gather only", "routed"])
def test_tensorrt_for_rtx_builds_it_without_a_gpu(folders: Folders, kind: str) -> None:
    from moedge.runtime.device import moedge_trt

    opened = open_bundle(folders.bundle(kind, "tensorrt-rtx"))
    shapes = moedge_trt.profile_shapes(opened.manifest.document()["model"], max_length=64, max_prompt=32)
    trt = moedge_trt.load_tensorrt("tensorrt-rtx")
    plan, _ = moedge_trt.build(trt, opened.model_path, shapes, compute_capabilities=["8.6"], taps={})
    assert len(plan) > opened.manifest.document()["files"]["model.onnx.data"]["size"]


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_with_kernels_computes_what_its_graph_computes(folders: Folders, tmp_path: Path, target: str) -> None:
    """On a GPU: built for it, run by it, prefill and decode, beside ONNX Runtime on the function bodies."""
    from moedge.configs import devices
    from moedge.runtime.device.moedge_cuda import Cuda
    from moedge.runtime.engines import build

    pytest.importorskip(target.replace("-", "_"))
    cuda = Cuda()
    here = cuda.capability()
    cuda.close()
    known = {name: devices.load(name) for name in devices.names()}
    fitting = [name for name, device in known.items() if device.compute_capability == here and target in device.targets]
    if not fitting or here == "7.5":
        pytest.skip(f"{target} has no engines with kernels for compute capability {here}, or no profile has it")
    path = folders.bundle("gather only", target, experts="plugins")
    build.build(path, tmp_path / "engine", fitting[:1], max_length=64, max_prompt=24)
    reference, engine = open_engine(path), open_engine(tmp_path / "engine")
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert relative(got.logits, want.logits) < HALF
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    engine.close()
