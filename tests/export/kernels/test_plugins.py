"""The TensorRT plugins' rules (shapes, types, grids, launches), run in the interpreter as TensorRT launches them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moedge.convert import ops
from moedge.convert.ops.gathered import limits_of
from moedge.export import functions
from moedge.export.device import plugins as compiling
from moedge.runtime.device import moedge_plugins as plugins
from moedge.runtime.device.moedge_trt import DeviceError

pytest.importorskip("triton")  # Linux only

T, H, I, E, K = 5, 33, 21, 4, 2  # noqa: E741
DYNAMIC = {"scores", "x", "indices", "rows", "inverse", "weights"}
"""Inputs whose first dimension TensorRT knows at run time only."""


def tensors() -> dict[str, torch.Tensor]:
    """One layer's tensors by input name, rows being those of the plugin that reads them."""
    make = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=make)  # noqa: E731
    scores = random(T, E)
    indices, weights = ops.route._init_fn(scores, None, None, K, "softmax")
    x = random(T, H)
    rows, offsets, inverse = ops.dispatch._init_fn(x, indices, E)
    return {
        "scores": scores,
        "selection_bias": random(E),
        "scale": random(E),
        "x": x,
        "indices": indices,
        "weights": weights,
        "offsets": offsets,
        "inverse": inverse,
        "rows": rows,
        "gate": random(E, I, H) * 0.2,
        "up": random(E, I, H) * 0.2,
        "weight": random(E, I, H) * 0.2,
        "compensation": random(E, H),
    }


def gathered() -> dict[str, torch.Tensor]:
    """The tensors of a gathered FFN by input name: half of the inputs are zero, weights lie by channel."""
    make = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(shape, generator=make)  # noqa: E731
    x = random(T, H)
    found = {"x": torch.where(torch.rand(T, H, generator=make) < 0.5, x, 0.0)}
    found |= {name: random(H, I) * 0.2 for name in ("gate", "up", "weight")}
    return found | {"h_limits": limits_of(0.02 + random(I).abs() / 10, 0.5)}


ATTRIBUTES = {"top_k": K, "rule": "softmax", "num_experts": E, "activation": "silu"}


def case(name: str) -> tuple[plugins.Plugin, list[torch.Tensor], dict[str, Any]]:
    """Return a plugin with input tensors and attributes."""
    plugin, found = plugins.PLUGINS[name], gathered() if name.startswith("Gathered") else tensors()
    attributes = {key: ATTRIBUTES[key] for key in plugin.attributes}
    if name == "RouteScaled":
        attributes["rule"] = "scaled"
    return plugin, [found[key] for key in plugin.inputs], attributes


def reference(name: str, given: list[torch.Tensor], attributes: dict[str, Any]) -> list[torch.Tensor]:
    """What the operator itself gives in PyTorch, for the plugin's inputs."""
    if name.startswith("Route"):
        scores, bias, scale = (*given, None)[:3]
        return list(ops.route._init_fn(scores, bias, scale, K, attributes["rule"]))
    if name == "Dispatch":
        return list(ops.dispatch._init_fn(*given, E))
    if name == "GroupedGLU":
        return [ops.grouped_glu._init_fn(*given, "silu")]
    if name == "GroupedLinear":
        return [ops.grouped_linear._init_fn(*given)]
    if name == "GatheredGLU":
        return [ops.gathered_glu._init_fn(*given, "silu")]
    if name == "GatheredLinear":
        return [ops.gathered_linear._init_fn(*given)]
    return [ops.combine._init_fn(*(*given, None)[:5])]


NUMBERED = [(name, tactic) for name, plugin in plugins.PLUGINS.items() for tactic in plugin.tactic_numbers]


@pytest.mark.parametrize(("name", "tactic"), NUMBERED, ids=lambda value: str(value))
def test_a_plugin_is_its_operator(place: str, name: str, tactic: int) -> None:
    """Launched as TensorRT launches it: output shapes, kernel, grid and arguments all come from the plugin's rules."""
    from moedge.convert.ops.kernels import cuda

    plugin, given, attributes = case(name)
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in given]
    described = plugin.outputs(
        [(tuple(tensor.shape), kind) for tensor, kind in zip(given, kinds, strict=True)], attributes
    )
    expected = reference(name, given, attributes)
    assert [(tuple(dims), kind) for dims, kind in described] == [
        (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in expected
    ]
    outputs = [torch.empty(tuple(dims), dtype=getattr(torch, kind), device=place) for dims, kind in described]
    known = [
        [None if i == 0 and label in DYNAMIC else size for i, size in enumerate(tensor.shape)]
        for label, tensor in zip(plugin.inputs, given, strict=True)
    ]
    options = plugin.options(known, kinds, attributes)
    assert None not in options.values(), "a kernel constant depends on a dynamic dimension"
    launch = compiling.launch_of(plugin, options, tactic)
    assert len(launch.inputs) == len(given)
    assert len(launch.outputs) == len(outputs)
    size = given[plugin.size[0]].shape[plugin.size[1]]
    cuda.run(launch, [tensor.to(place) for tensor in given], outputs, size)
    for actual, wanted in zip(outputs, expected, strict=True):
        # The kernels' own tests hold the bounds; a wrong rule is off by the size of the result.
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_every_operator_of_the_graph_has_a_plugin_of_its_name_and_attributes() -> None:
    functions.register_schemas()
    grouped = ("Route", "Dispatch", "GroupedGLU", "GroupedLinear", "Combine")
    for operator in (*grouped, "GatheredGLU", "GatheredLinear"):
        inputs, _, attributes = functions._SIGNATURES[operator]
        # No kernel leaves out hidden values of experts (lowering/trt/plugins.py refuses such a graph).
        inputs = inputs.replace(" h_threshold:tensor(float)?", "")
        names = [text.split(":")[0] for text in inputs.split()]
        for count in range(sum(not text.endswith("?") for text in inputs.split()), len(names) + 1):
            plugin = plugins.PLUGINS[plugins.node_type(operator, count)]
            assert list(plugin.inputs) == names[:count]
            kinds = {"INT": int, "STRING": str}
            assert dict(plugin.attributes) == {key: kinds[kind] for key, kind in attributes.items()}
    with pytest.raises(DeviceError, match="No plugin for moedge::Route with 4 inputs"):
        plugins.node_type("Route", 4)


@pytest.mark.parametrize(
    ("version", "refused"), [("10.3.0", True), ("10.8", True), ("10.9.0.34", False), ("11.4", False)]
)
def test_old_tensorrt_takes_no_plugins(version: str, refused: bool) -> None:
    reason = plugins.refusal(version)
    assert (reason is not None) == refused
    assert reason is None or "10.9 is the first that can" in reason
    with pytest.raises(DeviceError, match="'x' is no version"):
        plugins.refusal("x")


WRITE = """
import os, sys
from pathlib import Path
from moedge.export.device import plugins
options = {"hidden": 33, "experts": 2, "top_k": 2, "dtype": "fp16", "compensated": False}
requests = [plugins.Request("Combine", options)] * 2
for copy in ("a", "b"):
    # Triton's cache is another one, so the second copy is compiled again.
    os.environ["TRITON_CACHE_DIR"] = f"{sys.argv[1]}/cache-{copy}"
    plugins.write_library(Path(sys.argv[1]) / copy, requests, [87])
"""


def test_a_library_is_deterministic_and_safe_to_open(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", WRITE, tmp_path], env=environment, check=True, timeout=600)
    assert any((tmp_path / "cache-b").rglob("*.ptx"))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    library = plugins.Library(tmp_path / "a")
    combine = plugins.PLUGINS["Combine"]
    options = {"hidden": 33, "experts": 2, "top_k": 2, "dtype": "fp16", "compensated": False}
    binary = library.get(combine, options, 1, 87)
    launch = compiling.launch_of(combine, options, 1)
    assert (binary.grid, binary.threads, binary.takes_size) == (launch.grid, launch.warps * 32, True)
    # rows, inverse, indices, weights, tokens, y, and no scratch pointers of Triton's
    assert binary.ptx.count(".param .u") == 6
    assert str(tmp_path) not in binary.ptx
    assert ".version 8.0" in binary.ptx
    with pytest.raises(DeviceError, match="no Combine kernel for sm_110"):
        library.get(combine, options, 1, 110)
    for path in (tmp_path / "a").glob("*.ptx"):
        path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DeviceError, match="was changed after it was written"):
        library.get(combine, options, 1, 87)
    with pytest.raises(DeviceError, match=r"No kernels\.json"):
        plugins.Library(tmp_path)


def test_the_plugins_need_neither_tensorrt_nor_triton_nor_torch_to_be_imported() -> None:
    """A device that builds an engine from a library has none of the last two."""
    program = (
        "import sys; from moedge.runtime.device import moedge_plugins; "
        "print({'torch', 'triton', 'tensorrt'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


STAND_IN = "void *{0}(void) {{ return 0; }}\n"
EXPORTED = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getBuilderPluginRegistry "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getNvOnnxParserVersion getPluginRegistry "
    "initLibNvInferPlugins"
)


def install(folder: Path, wheel: str, major: int) -> tuple[Path, Path]:
    """Fetch TensorRT's Python bindings and make empty stand-ins for its libraries; return both folders."""
    compiler = shutil.which("cc")
    assert compiler, "a C compiler makes the stand-ins for TensorRT's libraries"
    bindings, stand_ins = folder / "bindings", folder / "libraries"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", bindings, wheel]
    subprocess.run(command, check=True, timeout=300)
    stand_ins.mkdir()
    source = folder / "stand_in.c"
    source.write_text("".join(STAND_IN.format(name) for name in EXPORTED.split()))
    for name in (f"{library}.so.{major}" for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", stand_ins / name, source]
        subprocess.run(command, check=True, timeout=60)
    return bindings, stand_ins


# What moedge_trt.py and moedge_session.py ask of TensorRT.
USED = """
    ILogger.ERROR ILogger.INTERNAL_ERROR NetworkDefinitionCreationFlag
    Builder.create_network Builder.create_builder_config Builder.create_optimization_profile
    Builder.build_serialized_network
    OnnxParser.parse_from_file OnnxParser.num_errors OnnxParser.get_error
    INetworkDefinition.num_inputs INetworkDefinition.get_input INetworkDefinition.num_layers
    INetworkDefinition.get_layer INetworkDefinition.mark_output ILayer.num_outputs ILayer.get_output ITensor.name
    IBuilderConfig.create_timing_cache IBuilderConfig.set_timing_cache IBuilderConfig.get_timing_cache
    IBuilderConfig.add_optimization_profile IOptimizationProfile.set_shape ITimingCache.serialize
    IBuilderConfig.clear_flag BuilderFlag.TF32
    Runtime.deserialize_cuda_engine ICudaEngine.num_io_tensors ICudaEngine.get_tensor_name
    ICudaEngine.get_tensor_dtype DataType.HALF DataType.BF16 DataType.FLOAT
    ICudaEngine.create_execution_context IExecutionContext.set_optimization_profile_async
    IExecutionContext.set_input_shape IExecutionContext.set_tensor_address IExecutionContext.execute_async_v3
"""
MOE_LAYER = "LayerType.MOE IMoELayer.activation_type MoEActType.SILU ILayer.type ILayer.name"
FIND = """
import ctypes, sys
from operator import attrgetter
from pathlib import Path
for library in sorted(Path(sys.argv[2]).glob("*.so*")):
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
for name in sys.argv[3:]:
    attrgetter(name)(trt)
print(trt.__version__)
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("wheel", "major", "version"),
    [("tensorrt-cu12-bindings==10.3.0", 10, "10.3."), ("tensorrt-cu13-bindings>=11,<12", 11, "11.")],
)
def test_the_oldest_and_the_newest_tensorrt_have_what_the_scripts_use(
    tmp_path: Path, wheel: str, major: int, version: str
) -> None:
    """JetPack 6 ships 10.3; 11 removed what 10 deprecated."""
    names = USED.split() + (MOE_LAYER.split() if major >= 11 else [])
    command = [sys.executable, "-c", FIND, *map(str, install(tmp_path, wheel, major)), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(version)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("wheel", "major"), [("tensorrt-cu13-bindings>=11,<12", 11), ("tensorrt-cu12-bindings==10.9.0.34", 10)]
)
def test_tensorrt_accepts_the_plugins(tmp_path: Path, wheel: str, major: int) -> None:
    """NVIDIA's own Python layer registers them, and gives the shapes, tactics and launches that the rules give.

    The bindings are on PyPI (the newest, and the oldest that takes the plugins), TensorRT's C++ libraries are not;
    empty ones let the module load.
    """
    bindings, stand_ins = install(tmp_path, wheel, major)
    asked, rules = [], []
    for name in plugins.PLUGINS:
        plugin, given, attributes = case(name)
        kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in given]
        dims = [
            [(size, not (i == 0 and label in DYNAMIC)) for i, size in enumerate(tensor.shape)]
            for label, tensor in zip(plugin.inputs, given, strict=True)
        ]
        asked.append({"plugin": name, "attributes": attributes, "inputs": list(zip(dims, kinds, strict=True))})
        shapes = [tuple(tensor.shape) for tensor in given]
        described = plugin.outputs(list(zip(shapes, kinds, strict=True)), attributes)
        options, size = plugin.options(shapes, kinds, attributes), shapes[plugin.size[0]][plugin.size[1]]
        launches = {}
        for tactic in plugin.tactic_numbers:
            launch = compiling.launch_of(plugin, options, tactic)
            grid = [*launch.programs(size), 1, 1][:3]
            scalars = [size] if launch.scalars else []
            launches[str(tactic)] = {"grid": grid, "threads": launch.warps * 32, "scalars": scalars}
        named = {"float32": "DataType.FLOAT", "int32": "DataType.INT32"}
        rules.append(
            {
                "types": [named[kind] for _, kind in described],
                "shapes": [list(dims) for dims, _ in described],
                "launches": launches,
            }
        )
    driver = Path(__file__).with_name("tensorrt_driver.py")
    done = subprocess.run(
        [sys.executable, driver, bindings, stand_ins],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"].startswith(f"{major}.")
    assert answer["cases"] == rules


def test_plugins_are_registered_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT refuses a name twice; a second build gives the plugins that are there its own kernels."""
    taken: list[str] = []

    def register(identity: str) -> Any:
        assert identity not in taken
        taken.append(identity)
        return lambda function: function

    api: Any = ModuleType("tensorrt.plugin")
    api.register, api.autotune = register, lambda identity: lambda function: function
    api.aot_impl = api.autotune
    api.TensorDesc = api.KernelLaunchParams = api.SymIntExprs = int
    trt: Any = ModuleType("tensorrt")
    trt.__version__, trt.plugin, trt.DataType = "10.13.0", api, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", api)
    monkeypatch.setattr(plugins, "_registered", {})
    first, second = (SimpleNamespace(get=None) for _ in range(2))
    plugins.register(first, capability=87)
    plugins.register(second, capability=87)
    assert len(taken) == len(plugins.PLUGINS)
    assert all(each.kernels is second for each in plugins._registered.values())
    with pytest.raises(DeviceError, match=r"for sm_87; build for sm_90 in another process"):
        plugins.register(first, capability=90)
