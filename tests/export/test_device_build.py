"""build_engine.py of an archive as on a device: no MoEdge, and in TensorRT's place a module that asks what it asks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moedge.configs import devices
from moedge.export.device import archive as device_archive
from moedge.tests.export.archives import extract

# What build_engine.py needs of TensorRT, recorded instead of done. Dimensions are numbers that say whether they are
# constant; the parser walks the file's nodes as NVIDIA's does and asks each plugin what TensorRT asks it.
TENSORRT = """
import json, sys, types
import numpy as np
import onnx

__version__ = "10.13.3"
asked = []


class Dim:
    def __init__(self, value, constant):
        self.value, self.is_constant = value, constant

    def constant_value(self):
        assert self.is_constant
        return self.value

    def _with(self, other, value):
        return Dim(value, self.is_constant and getattr(other, "is_constant", True))

    def __mul__(self, other):
        return self._with(other, self.value * getattr(other, "value", other))

    def __add__(self, other):
        return self._with(other, self.value + getattr(other, "value", other))

    def __floordiv__(self, other):
        return self._with(other, self.value // getattr(other, "value", other))


class Desc:
    def __init__(self, dims, dtype):
        self.shape_expr, self.dtype = [d if isinstance(d, Dim) else Dim(d, True) for d in dims], dtype


DataType = types.SimpleNamespace(FLOAT="FLOAT", HALF="FLOAT16", INT32="INT32", INT8="INT8", BF16="BFLOAT16")
found = {kind: {} for kind in ("register", "autotune", "aot_impl")}
plugin = types.ModuleType("tensorrt.plugin")
for kind in found:
    def decorator(identity, kind=kind):
        return lambda function: found[kind].__setitem__(identity, function)
    setattr(plugin, kind, decorator)
plugin.TensorDesc, plugin.SymIntExprs, plugin.SymInt32 = Desc, lambda n: [None] * n, lambda value: value
plugin.KernelLaunchParams = lambda: types.SimpleNamespace(grid_x=1, grid_y=1, grid_z=1, block_x=1, shared_mem=0)
plugin.from_shape_expr = Desc
plugin.AutoTuneCombination = lambda *given: given
sys.modules["tensorrt.plugin"] = plugin
ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None})
NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
ROWS = {"batch_size*sequence_length": 5}


class Network:
    num_layers = num_inputs = 0


class OnnxParser:
    num_errors = 0

    def __init__(self, network, log):
        pass

    def parse_from_file(self, path):
        model = onnx.load(path, load_external_data=False)
        kinds = onnx.TensorProto.DataType
        values = {t.name: Desc(list(t.dims), kinds.Name(t.data_type)) for t in model.graph.initializer}
        for info in (*model.graph.value_info, *model.graph.input):
            t = info.type.tensor_type
            dims = [Dim(d.dim_value, True) if d.HasField("dim_value") else Dim(5, False) for d in t.shape.dim]
            values[info.name] = Desc(dims, kinds.Name(t.elem_type))
        for node in model.graph.node:
            if node.domain != "moedge":
                continue
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            identity = given.pop("plugin_namespace").decode() + "::" + node.op_type
            del given["plugin_version"]
            # As NVIDIA's parser does: a string comes with the NUL at its end.
            given = {k: v.decode() + "\\0" if isinstance(v, bytes) else v for k, v in given.items()}
            declared = found["register"][identity].__signature__.parameters
            given = {name: given[name] for name in declared if name in given}
            inputs = [values[name] for name in node.input]
            assert len(inputs) + len(given) == len(declared), identity
            outputs = found["register"][identity](*inputs, **given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            values.update(zip(node.output, outputs))
            (combination,) = found["autotune"][identity](*inputs, *given.values(), outputs)
            for tactic in combination[2]:
                name, ptx, launch, scalars = found["aot_impl"][identity](*inputs, *given.values(), outputs, tactic)
                asked.append({"plugin": node.op_type, "tactic": tactic, "name": name, "ptx": ptx,
                              "types": combination[0], "block": launch.block_x, "shared": launch.shared_mem,
                              "grid": [getattr(g, "value", g) for g in (launch.grid_x, launch.grid_y, launch.grid_z)],
                              "scalars": [s.value for s in scalars]})
        modules = sorted({m.partition(".")[0] for m in sys.modules})
        json.dump({"asked": asked, "modules": modules}, open("asked.json", "w"))
        return False  # nothing here can go on


class Builder:
    def __init__(self, log):
        pass

    def create_network(self, flags):
        return Network()
"""


@pytest.fixture(scope="module")
def thor(source, tmp_path_factory):
    """The unpacked archive for a device whose TensorRT takes plugins."""
    pytest.importorskip("triton")  # Linux on x86-64 only
    out = tmp_path_factory.mktemp("thor")
    thor = devices.load("jetson-agx-thor")
    device_archive.write(source, out / "moe.tar", thor, label="Mø E", max_length=64, max_prompt=48)
    extract(out / "moe.tar", out)
    return out / "moedge-jetson-agx-thor-moe"


@pytest.fixture(scope="module")
def orin(source, tmp_path_factory):
    """The unpacked archive in bfloat16 for an Orin with a TensorRT that takes plugins."""
    pytest.importorskip("triton")  # Linux on x86-64 only
    out = tmp_path_factory.mktemp("orin")
    made = {"label": "Mø E", "max_length": 64, "max_prompt": 48, "tensorrt": "10.13", "dtype": "bfloat16"}
    device_archive.write(source, out / "moe.tar", devices.load("jetson-agx-orin"), **made)
    extract(out / "moe.tar", out)
    return out / "moedge-jetson-agx-orin-moe"


@pytest.fixture(scope="module")
def gathered_archive(gathered_portable, tmp_path_factory):
    """The unpacked archive of a model that leaves out small values, for an Orin with a TensorRT that takes plugins."""
    pytest.importorskip("triton")  # Linux on x86-64 only
    out = tmp_path_factory.mktemp("gathered")
    made = {"label": "Mø E", "max_length": 64, "max_prompt": 48, "tensorrt": "10.13"}
    device_archive.write(gathered_portable.parent, out / "moe.tar", devices.load("jetson-agx-orin"), **made)
    extract(out / "moe.tar", out)
    return out / "moedge-jetson-agx-orin-moe"


def build(folder: Path, tensorrt: str, capability: str = "11.0") -> subprocess.CompletedProcess:
    """Run build_engine.py as on a device: no MoEdge, and a module in TensorRT's place."""
    (folder.parent / "tensorrt.py").write_text(tensorrt)
    cuda = f"moedge_cuda.Cuda = type('Cuda', (), {{'capability': lambda s: {capability!r}, 'close': lambda s: None}})"
    code = f"""
import sys; sys.path[:0] = ['.', {str(folder.parent)!r}]
import moedge_cuda; {cuda}
sys.argv = ['build_engine.py']
exec(compile(open('build_engine.py').read(), 'build_engine.py', 'exec'),
     {{'__name__': '__main__', '__file__': {str(folder / "build_engine.py")!r}}})
"""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("archive", "device", "capability", "half"),
    [("thor", "Thor", "11.0", "FP16"), ("orin", "Orin", "8.7", "BF16"), ("gathered_archive", "Orin", "8.7", "FP16")],
)
def test_the_archive_gives_tensorrt_a_kernel_for_every_node_and_tactic(request, archive, device, capability, half):
    from moedge.export.device.plugins import launch_of
    from moedge.runtime.device.moedge_plugins import PLUGINS

    folder = request.getfixturevalue(archive)
    child = build(folder, TENSORRT, capability)
    assert "cannot parse" in child.stderr, child.stderr
    record = json.loads((folder / "asked.json").read_text())
    assert not {"torch", "triton", "moedge", "onnxruntime"} & set(record["modules"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["label"] == "Mø E"
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# Mø E for NVIDIA Jetson AGX {device}")
    kernels = {kernel["plugin"]: kernel["options"] for kernel in manifest["plugins"]["kernels"]}
    names = [(asked["plugin"], asked["tactic"]) for asked in record["asked"]]
    one_layer = [(name, tactic) for name in kernels for tactic in PLUGINS[name].tactic_numbers]
    assert names == one_layer * 2
    k = manifest["moe"]["layers"]["0"]["top_k"]
    for asked in record["asked"]:
        plugin = PLUGINS[asked["plugin"]]
        launch = launch_of(plugin, kernels[plugin.name], asked["tactic"])
        size = 5 * k if plugin.name.startswith("Grouped") else 5
        assert asked["grid"] == [*launch.programs(size), 1, 1][:3]
        assert asked["scalars"] == [size] * len(launch.scalars)
        assert asked["block"] == 32 * launch.warps
        assert asked["shared"] <= 48 * 1024
        assert f".target sm_{capability.replace('.', '')}" in asked["ptx"]
        if plugin.name.startswith("Grouped"):
            assert (".bf16" in asked["ptx"]) == (half == "BF16")
        entry = asked["ptx"].partition(f".entry {asked['name']}(")[2].partition(")")[0]
        assert entry.count(".param") == len(launch.inputs) + len(launch.scalars) + len(launch.outputs)
        assert asked["types"].split(", ")[0] == ("FP32" if plugin.name == "Route" else half)


def test_an_archive_with_plugins_says_what_an_older_tensorrt_needs(thor):
    child = build(thor, TENSORRT.replace("10.13.3", "10.3.0"))
    assert child.returncode == 2
    assert "TensorRT 10.3.0 cannot bake kernels into an engine" in child.stderr
    assert "--tensorrt 10.3.0" in child.stderr


def test_kernels_for_another_gpu_are_refused_before_the_build(thor):
    """An Orin with a TensorRT that takes plugins: the archive has kernels for Thor only."""
    child = build(thor, TENSORRT, capability="8.7")
    assert child.returncode == 2
    assert "The kernels of this archive are for compute capability 11.0, this GPU has 8.7" in child.stderr


def test_a_changed_kernel_is_not_used(thor, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(thor, folder)
    kernel = next((folder / "plugins").glob("*.ptx"))
    kernel.write_text(kernel.read_text() + "\n")
    child = build(folder, TENSORRT)
    assert child.returncode == 2
    assert f"{kernel.name} is missing, a link or damaged" in child.stderr
