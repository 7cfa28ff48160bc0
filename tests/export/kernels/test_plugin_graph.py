"""The exported graph and its plugins: every node resolves, and the chain computes what the float32 experts compute."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from moedge._files import atomic_dir
from moedge.convert import ops
from moedge.convert.plan import RAMP
from moedge.export.device.plugins import Request, launch_of
from moedge.export.lowering.trt.engine import block_limit
from moedge.export.pipeline import lower
from moedge.runtime.device.moedge_plugins import PLUGINS

HALF, FLOAT, INT32 = "float16", "float32", "int32"
TYPES = {
    "Route": ([FLOAT, FLOAT], [INT32, FLOAT]),
    "RouteScaled": ([FLOAT, FLOAT, FLOAT], [INT32, FLOAT]),
    "Dispatch": ([HALF, INT32], [HALF, INT32, INT32]),
    "GroupedGLU": ([HALF, INT32, HALF, HALF], [HALF]),
    "GroupedLinear": ([HALF, INT32, HALF], [HALF]),
    "Combine": ([HALF, INT32, INT32, FLOAT], [HALF]),
    "CombineCompensated": ([HALF, INT32, INT32, FLOAT, HALF], [HALF]),
    "GatheredGLU": ([HALF, HALF, HALF, FLOAT], [HALF]),
    "GatheredLinear": ([HALF, HALF], [HALF]),
}
LAYER = {
    "routed": ["Route", "Dispatch", "GroupedGLU", "GroupedLinear", "Combine"],
    "gathered": ["GatheredGLU", "GatheredLinear"],
}
"""The plugins of a layer."""


@pytest.fixture(scope="module", params=[HALF, "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Half-precision type of the graph."""
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(dtype: str, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle ``tensorrt`` of the tiny MoE for a TensorRT that takes plugins."""
    out = tmp_path_factory.mktemp("plugins") / "tensorrt"
    with atomic_dir(out) as partial:
        lower("tensorrt", bundles["moe/portable"], partial, tensorrt="10.13", dtype=dtype)
    return out


@pytest.fixture(scope="module")
def gathered_bundle(dtype: str, gathered_portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a tiny model that leaves out small values."""
    out = tmp_path_factory.mktemp("gathered") / "tensorrt"
    with atomic_dir(out) as partial:
        lower("tensorrt", gathered_portable, partial, tensorrt="10.13", dtype=dtype)
    return out


@pytest.fixture(scope="module", params=LAYER)
def layers(request: pytest.FixtureRequest) -> str:
    """Which layers the graph has."""
    return str(request.param)


@pytest.fixture(scope="module")
def either(layers: str, bundle: Path, gathered_bundle: Path) -> Path:
    """The bundle with such layers."""
    return {"routed": bundle, "gathered": gathered_bundle}[layers]


def tensors_of(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The weights of a file; numpy knows bfloat16 as bits only."""
    found = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        brain = tensor.data_type == onnx.TensorProto.BFLOAT16
        found[tensor.name] = (
            torch.from_numpy(array.view("int16")).view(torch.bfloat16) if brain else torch.from_numpy(array)
        )
    return found


def nodes_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "moedge"]


def types_of(model: onnx.ModelProto) -> dict[str, tuple[str, list[int | None]]]:
    """Every value of the graph: numpy type name and dimensions, None where they are not constant."""
    found = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        found[value.name] = (onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, dims)
    for tensor in model.graph.initializer:
        found[tensor.name] = (onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name, list(tensor.dims))
    return found


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def test_every_node_is_a_plugin_with_its_inputs_attributes_and_types(either: Path, layers: str, dtype: str) -> None:
    onnx.checker.check_model(either / "model.onnx", full_check=True)
    model = onnx.load(either / "model.onnx", load_external_data=False)
    nodes, types = nodes_of(model), types_of(model)
    stated = {name: tuple([dtype if t == HALF else t for t in side] for side in both) for name, both in TYPES.items()}
    assert [node.op_type for node in nodes] == LAYER[layers] * 2
    asked = []
    for node in nodes:
        plugin, attributes = PLUGINS[node.op_type], attributes_of(node)
        # Without them NVIDIA's parser takes the function body.
        assert (attributes.pop("plugin_namespace"), attributes.pop("plugin_version")) == ("moedge", "1")
        assert {name: type(value) for name, value in attributes.items()} == dict(plugin.attributes)
        assert len(node.input) == len(plugin.inputs)
        assert [types[name][0] for name in node.input] == stated[node.op_type][0]
        described = plugin.outputs(
            [([7 if d is None else d for d in types[name][1]], types[name][0]) for name in node.input], attributes
        )
        assert [kind for _, kind in described] == stated[node.op_type][1]
        for name, (dims, kind) in zip(node.output, described, strict=True):
            recorded_kind, recorded = types[name]
            assert recorded_kind == kind
            assert len(recorded) == len(dims)
            assert all(one is None or one == other for one, other in zip(recorded, dims, strict=True))
        options = plugin.options([types[n][1] for n in node.input], [types[n][0] for n in node.input], attributes)
        assert None not in options.values(), "a kernel constant depends on a dynamic dimension"
        asked.append(Request(node.op_type, options))
    # Both layers are alike, and the manifest lists just what the nodes ask for.
    manifest, count = json.loads((either / "manifest.json").read_text()), len(LAYER[layers])
    assert manifest["plugins"]["oldest_tensorrt"] == "10.9"
    assert [Request(**kernel) for kernel in manifest["plugins"]["kernels"]] == asked[:count] == asked[count:]


def test_every_node_keeps_its_function_body(either: Path) -> None:
    model = onnx.load(either / "model.onnx", load_external_data=False)
    bodies = {function.name: function for function in model.functions}
    assert set(bodies) == {node.op_type for node in nodes_of(model)}
    assert {node.domain for function in bodies.values() for node in function.node} == {""}
    assert not [node.op_type for node in model.graph.node if node.domain not in ("", "moedge")]


def execute(node: onnx.NodeProto, values: dict[str, torch.Tensor], path: str, place: str) -> None:
    """Run a node as TensorRT does: shapes, types, constants, grid and arguments from its plugin's rules."""
    from moedge.convert.ops.kernels import cuda

    plugin, attributes = PLUGINS[node.op_type], attributes_of(node)
    attributes = {name: attributes[name] for name in plugin.attributes}
    given = [values[name] for name in node.input]
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in given]
    described = plugin.outputs([(tuple(t.shape), kind) for t, kind in zip(given, kinds, strict=True)], attributes)
    outputs = [torch.empty(tuple(dims), dtype=getattr(torch, kind), device=place) for dims, kind in described]
    tactic = plugin.tactics.index(path) + 1 if plugin.tactics else 1
    launch = launch_of(plugin, plugin.options([tuple(t.shape) for t in given], kinds, attributes), tactic)
    cuda.run(launch, [t.to(place) for t in given], outputs, given[plugin.size[0]].shape[plugin.size[1]])
    values.update(zip(node.output, outputs, strict=True))


@pytest.mark.parametrize(("tokens", "path"), [(1, "gemv"), (7, "gemv"), (7, "gemm16")])
def test_the_chain_of_plugins_is_the_float32_experts(
    place: str, bundle: Path, bundles: dict[str, Path], dtype: str, tokens: int, path: str
) -> None:
    """Weights and nodes of the half-precision file, executed by the kernels, beside the float32 operators."""
    model = onnx.load(bundle / "model.onnx")
    weights, half = tensors_of(model), getattr(torch, dtype)
    first = nodes_of(model)[:5]
    route, glu, linear, combine = first[0], first[2], first[3], first[4]
    scores_name, x_name = route.input[0], first[1].input[0]
    generator = torch.Generator().manual_seed(3)
    experts, _, hidden = weights[glu.input[2]].shape
    scores, x = torch.randn(tokens, experts, generator=generator), torch.randn(tokens, hidden, generator=generator)
    values = {**weights, scores_name: scores, x_name: x.to(half)}
    for node in first:
        execute(node, values, path, place)
    portable = onnx.load(bundles["moe/portable"] / "model.onnx")
    floats = tensors_of(portable)
    sparse = next(node for node in portable.graph.node if node.op_type == "SparseGLU")
    attributes = attributes_of(route)
    bias = weights[route.input[1]]
    indices, mixed = ops.route._init_fn(scores, bias, None, attributes["top_k"], attributes["rule"])
    wanted = ops.sparse_glu._init_fn(
        x, indices, mixed, *(floats[name] for name in sparse.input[3:6]), None, attributes_of(glu)["activation"]
    )
    assert values[route.output[0]].cpu().equal(indices)
    got = values[combine.output[0]].cpu().float()
    error = float((got - wanted).abs().max() / wanted.abs().max())
    # Each of x, weight, hidden, product and sum is rounded to half precision once: well within the block's limit.
    assert 0 < error < block_limit(dtype), error
    assert values[linear.output[0]].dtype == half


@pytest.mark.parametrize(("tokens", "path"), [(1, "gemv"), (7, "gemm16"), (70, "gemm64")])
def test_the_plugins_of_a_gathered_layer_are_its_float32_products(
    place: str, gathered_bundle: Path, gathered_portable: Path, dtype: str, tokens: int, path: str
) -> None:
    """Weights and nodes of the half-precision file, executed by the kernels, beside the layer in float32."""
    model, half = onnx.load(gathered_bundle / "model.onnx"), getattr(torch, dtype)
    glu, linear = nodes_of(model)[:2]
    assert linear.input[0] == glu.output[0]
    portable = onnx.load(gathered_portable / "model.onnx")
    floats = {
        name.rpartition(".")[2]: tensor for name, tensor in tensors_of(portable).items() if ".layers.0.mlp." in name
    }
    hidden = floats["x_threshold"].shape[0]
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3))
    x = ops.keep_large(x, floats["x_threshold"], RAMP).to(half)
    values = {**tensors_of(model), glu.input[0]: x}
    for node in (glu, linear):
        execute(node, values, path, place)
    wide = x.float()
    h = ops.activate(wide @ floats["shared_gate"].T, "silu") * (wide @ floats["shared_up"].T)
    wanted = ops.keep_large(h, floats["shared_h_threshold"], RAMP) @ floats["shared_down"].T
    got = values[linear.output[0]].cpu().float()
    error = float((got - wanted).abs().max() / wanted.abs().max())
    # As for the experts; behind the thresholds the limit is the self-test's (lowering/gather.py: narrower).
    assert 0 < error < block_limit(dtype), error


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_nvidias_parser_takes_the_plugin_and_not_the_body(either: Path, layers: str) -> None:
    """The parser of TensorRT for RTX is asked: it looks the node up by name, version and namespace in its registry."""
    driver = Path(__file__).with_name("parser_driver.py")
    command = [sys.executable, driver, either / "model.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    fields = {"Route": {"top_k": 3, "rule": "unit"}, "Dispatch": {"num_experts": 6}}
    fields |= {key: {"activation": "silu"} for key in ("GroupedGLU", "GatheredGLU")}
    assert {case["op_type"]: case["fields"] for case in found if case["namespace"]} == {
        name: fields.get(name, {}) for name in LAYER[layers]
    }
    # Without the attribute the body would be built, silently: every expert's weights gathered for every row.
    assert [case["taken"] for case in found if not case["namespace"]] == ["body"] * len(LAYER[layers])
