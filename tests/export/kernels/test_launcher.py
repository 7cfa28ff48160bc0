"""Experts as plugins of TensorRT for RTX: the C++ library, what it launches, and the engines that are built with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs import devices
from moedge.convert import ops
from moedge.convert.plan import RAMP
from moedge.export import bundle
from moedge.export.device import launcher
from moedge.export.lowering.trt.engine import HALF_LIMIT
from moedge.export.pipeline import lower
from moedge.runtime.device.moedge_cuda import Cuda
from moedge.runtime.engines import build, open_engine

pytestmark = [
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the plugin library is compiled with g++"),
]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sparse(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "tensorrt-rtx"
    with atomic_dir(path) as partial:
        lower("tensorrt-rtx", bundles["moe/portable"], partial, experts="plugins")
    return path


@pytest.fixture(scope="module")
def written(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the graph as TensorRT gets it, its kernels for two GPUs, and the compiled library."""
    folder = tmp_path_factory.mktemp("written")
    launcher.write_launches(bundle.open_bundle(sparse), folder, ["8.6", "12.0"])
    launcher.compile_library(folder / build.LIBRARY)
    (folder / "model.onnx.data").unlink()  # onnx reads no weights that have two links
    return folder


@pytest.fixture(scope="module")
def gathered_bundle(gathered_portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gathered") / "tensorrt-rtx"
    with atomic_dir(path) as partial:
        lower("tensorrt-rtx", gathered_portable, partial, experts="plugins")
    return path


@pytest.fixture(scope="module")
def written_gathered(gathered_bundle: Path, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as ``written`` of a model that leaves out small values, kernels for one GPU."""
    folder = tmp_path_factory.mktemp("written_gathered")
    launcher.write_launches(bundle.open_bundle(gathered_bundle), folder, ["8.6"])
    shutil.copy(written / build.LIBRARY, folder)
    (folder / "model.onnx.data").unlink()
    return folder


@pytest.fixture
def compiled(written: Path, monkeypatch: Any) -> None:
    """Builds take what was compiled once."""

    def copy(folder: Path, requests: list[Any], capabilities: list[int]) -> None:
        assert capabilities in ([86], [86, 120])
        shutil.copytree(written / "kernels", folder)

    monkeypatch.setattr(launcher.plugins, "compile_library", copy)
    monkeypatch.setattr(launcher, "compile_library", lambda target: shutil.copy(written / build.LIBRARY, target))


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(item) for item in node.attribute if item.name == name)


def stand_in(scratch: Path) -> Path:
    """Compile the stand-in for libcuda."""
    device = scratch / "libcuda.so.1"
    (scratch / "cuda_runtime_api.h").write_text(launcher.CUDA_HEADER)
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-o", device]
    includes = ["-isystem", launcher.headers(), "-isystem", scratch]
    subprocess.run([*command, *includes, HERE / "launcher_device.cpp"], check=True, timeout=120)
    return device


def test_the_library_takes_the_newest_kernel_that_runs_here(tmp_path: Path) -> None:
    """Triton writes `.target sm_120a`, which no other GPU loads: 12.1 then compiles what was written for 8.0."""
    device, library = stand_in(tmp_path), launcher.compile_library(tmp_path / build.LIBRARY)
    for here, targets, taken in (
        ("121", "sm_80 sm_120a", "sm_80"),
        ("120", "sm_80 sm_120a", "sm_120a"),
        ("121", "sm_80 sm_120f", "sm_120f"),
        ("130", "sm_80 sm_120f", "sm_80"),
        ("89", "sm_80 sm_86 sm_90a", "sm_86"),
        ("120", "sm_80 sm_99", "sm_80"),
        ("121", "sm_120a", "Toy has no kernel for SM121"),
        ("120", "sm_99", "the CUDA driver does not load kernel for SM99"),
    ):
        command = [sys.executable, HERE / "launcher_choice.py", library, device, here, *targets.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.strip() == taken, (here, targets, done.stderr)


def enqueued(written: Path, values: dict[str, Any], scratch: Path) -> tuple[list[dict[str, Any]], Any]:
    """Let the compiled library enqueue every node of a graph whose inputs are known; return launches and values."""
    device = stand_in(scratch)
    np.savez(scratch / "values.npz", **values)
    done = subprocess.run(
        [sys.executable, HERE / "launcher_driver.py", written, written / build.LIBRARY, device, scratch / "values.npz"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    launches = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return launches, np.load(scratch / "values.npz")


@pytest.mark.parametrize(("tokens", "tactic"), [(1, 1), (8, 1), (9, 2)])
def test_the_library_launches_what_computes_the_float32_experts(
    sparse: Path, written: Path, bundles: dict[str, Path], tmp_path: Path, tokens: int, tactic: int
) -> None:
    """The C++ plugin chooses kernel, grid and arguments; each launch runs in Triton's interpreter on host memory."""
    plain = onnx.load(sparse / "model.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    route, dispatch, glu, _, combine = [node for node in plain.graph.node if node.domain == "moedge"][:5]
    make = torch.Generator().manual_seed(3)
    experts, _, hidden = weights[glu.input[2]].shape
    scores, x = torch.randn(tokens, experts, generator=make), torch.randn(tokens, hidden, generator=make)
    values = {**weights, route.input[0]: scores.numpy(), dispatch.input[0]: x.half().numpy()}
    launches, computed = enqueued(written, values, tmp_path)
    assert [(each["plugin"], each["tactic"]) for each in launches] == [
        ("Route", 1), ("Dispatch", 1), ("GroupedGLU", tactic), ("GroupedLinear", tactic), ("Combine", 1)
    ]  # fmt: skip
    portable = onnx.load(bundles["moe/portable"] / "model.onnx")
    floats = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in portable.graph.initializer}
    wide = next(node for node in portable.graph.node if node.op_type == "SparseGLU")
    bias = torch.from_numpy(weights[route.input[1]].copy())
    chosen = ops.route._init_fn(scores, bias, None, attribute(route, "top_k"), attribute(route, "rule").decode())
    wanted = ops.sparse_glu._init_fn(x, *chosen, *(floats[name] for name in wide.input[3:6]), None, "silu")
    got = computed[combine.output[0]].astype(np.float32)
    error = float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())
    assert 0 < error < HALF_LIMIT, error


@pytest.mark.parametrize(("tokens", "tactic"), [(1, 1), (2, 2), (17, 3), (257, 4)])
def test_the_library_launches_what_computes_a_gathered_ffn(
    gathered_bundle: Path, written_gathered: Path, gathered_portable: Path, tmp_path: Path, tokens: int, tactic: int
) -> None:
    """The kernel by the number of tokens, on the values that the thresholds keep."""
    plain = onnx.load(gathered_bundle / "model.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    glu, linear = [node for node in plain.graph.node if node.domain == "moedge"][:2]
    floats = {
        t.name.rpartition(".")[2]: torch.from_numpy(numpy_helper.to_array(t).copy())
        for t in onnx.load(gathered_portable / "model.onnx").graph.initializer
        if ".layers.0.mlp." in t.name
    }
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(3))
    x = ops.keep_large(x, floats["x_threshold"], RAMP).half()
    launches, computed = enqueued(written_gathered, {**weights, glu.input[0]: x.numpy()}, tmp_path)
    assert [(each["plugin"], each["tactic"]) for each in launches] == [
        ("GatheredGLU", tactic),
        ("GatheredLinear", tactic),
    ]
    h = ops.activate(x.float() @ floats["shared_gate"].T, "silu") * (x.float() @ floats["shared_up"].T)
    wanted = ops.keep_large(h, floats["shared_h_threshold"], RAMP) @ floats["shared_down"].T
    error = float(
        (torch.from_numpy(computed[linear.output[0]].astype(np.float32)) - wanted).abs().max() / wanted.abs().max()
    )
    assert 0 < error < HALF_LIMIT, error


@pytest.mark.usefixtures("compiled")
def test_an_engine_with_sparse_experts_is_built_without_a_gpu(sparse: Path, tmp_path: Path) -> None:
    made = build.build(sparse, tmp_path / "engine", ["rtx-3090", "rtx-5090"], max_length=64, max_prompt=32).document()
    assert made["build"]["plugins"] == 10  # five a layer
    assert made["compute_capabilities"] == ["8.6", "12.0"]
    opened = build.open_file(tmp_path / "engine")
    assert opened.library() == str(tmp_path / "engine" / build.LIBRARY)
    # The plugins' fields hold kernels for both GPUs, and the library none.
    for plan, kernels in ((opened.plan(), True), ((tmp_path / "engine" / build.LIBRARY).read_bytes(), False)):
        assert [target in plan for target in (b".target sm_86", b".target sm_120")] == [kernels, kernels]
    with (tmp_path / "engine" / build.LIBRARY).open("ab") as file:
        file.write(b"!")
    with pytest.raises(MoEdgeError, match=build.LIBRARY):
        build.open_file(tmp_path / "engine")


def test_an_engine_of_a_gathered_model_is_built_without_a_gpu(
    gathered_bundle: Path, written_gathered: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    kernels = written_gathered / "kernels"
    monkeypatch.setattr(launcher.plugins, "compile_library", lambda folder, *_: shutil.copytree(kernels, folder))
    library = written_gathered / build.LIBRARY
    monkeypatch.setattr(launcher, "compile_library", lambda target: shutil.copy(library, target))
    made = build.build(gathered_bundle, tmp_path / "engine", ["rtx-3090"], max_length=64, max_prompt=32).document()
    assert made["build"]["plugins"] == 4  # two a layer


def _swapped(node: ir.Node) -> None:
    node.replace_input_with(0, node.inputs[1])


def _other_width(node: ir.Node) -> None:
    spec = node.attributes["spec"].as_string().split("\n")
    first = spec[1].split()
    spec[1] = " ".join([*first[:-1], str(int(first[-1]) + 1)])
    node.attributes["spec"] = ir.AttrString("spec", "\n".join(spec))


def _cut(node: ir.Node) -> None:
    node.attributes["spec"] = ir.AttrString("spec", node.attributes["spec"].as_string()[:-200])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("broken", [_swapped, _other_width, _cut])
def test_a_broken_node_stops_the_build(sparse: Path, tmp_path: Path, monkeypatch: Any, broken: Any) -> None:
    write = launcher.write_launches

    def break_first(*arguments: Any) -> Path:
        path = write(*arguments)
        model = ir.load(path)
        broken(next(node for node in model.graph if node.op_type == "Launch"))
        ir.save(model, path)
        return path

    monkeypatch.setattr(launcher, "write_launches", break_first)
    with pytest.raises(MoEdgeError, match=r"cannot (parse|build)"):
        build.build(sparse, tmp_path / "engine", ["rtx-3090"], max_length=64, max_prompt=32)
    assert not (tmp_path / "engine").exists()


def test_what_cannot_be_is_refused_with_what_can(sparse: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(MoEdgeError, match=r"SM75.*--expert-form merged"):
        build.build(sparse, tmp_path / "engine", ["rtx-2080-ti"], max_length=64)
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    monkeypatch.setattr(launcher, "HEADER", "NoSuchHeader.h")
    with pytest.raises(MoEdgeError, match=r"headers of TensorRT.*--expert-form merged"):
        launcher.compile_library(tmp_path / build.LIBRARY)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoEdgeError, match=r"g\+\+.*--expert-form merged"):
        launcher.compile_library(tmp_path / build.LIBRARY)


@pytest.mark.gpu
def test_an_engine_with_the_library_computes_what_its_graph_computes(sparse: Path, tmp_path: Path) -> None:
    """On a GPU: built for it, run by it, both kinds of kernel (prefill, decode), beside ONNX Runtime on the bodies."""
    cuda = Cuda()
    here = cuda.capability()
    cuda.close()
    known = {name: devices.load(name) for name in devices.names()}
    fitting = [n for n, d in known.items() if d.compute_capability == here and "tensorrt-rtx" in d.targets]
    if not fitting or here == "7.5":
        pytest.skip(f"no kernels or no engines of TensorRT for RTX for compute capability {here}")
    build.build(sparse, tmp_path / "engine", fitting[:1], max_length=64, max_prompt=24)
    ids = np.random.default_rng(3).integers(0, 256, (1, 24))
    reference, engine = open_engine(sparse), open_engine(tmp_path / "engine")
    want, got = reference.prefill(ids[:, :20]), engine.prefill(ids[:, :20])
    for position in range(20, 24):
        # A 2-layer model: four blocks, each within its limit, added to one residual stream.
        assert np.abs(got.logits - want.logits).max() < 4 * HALF_LIMIT * np.abs(want.logits).max()
        token = ids[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    engine.close()
