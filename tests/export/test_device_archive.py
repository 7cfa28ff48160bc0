"""The archive for a device: deterministic, whole, and its scripts work on their own (numpy and a runtime, no MoEdge).

There is no GPU here, so the scripts run the archive's half-precision graph through a session that stands in for
TensorRT's: ONNX Runtime on the very file that TensorRT would build. What is tested is everything but the engine.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.configs import devices
from moedge.export import device_archive
from moedge.export.bundle import open_bundle
from moedge.runtime import reduction
from moedge.runtime.commands import report
from moedge.runtime.device import moedge_compare

STAND_IN = '''
import os
import sys
import numpy as np
import onnxruntime
import moedge_session


class Cuda:
    def capability(self):
        return "8.7"

    def memory(self):
        return 1000, 2000

    def name(self):
        return "stand-in"


class Session:
    """ONNX Runtime on the archived graph, with the methods of moedge_session.Session. BREAK scales the logits."""

    def __init__(self, plan, facts):
        import onnx

        model = onnx.load("model.onnx", load_external_data=False)
        for tap in facts["archive_taps"].values():
            model.graph.output.append(onnx.ValueInfoProto(name=tap["output"]))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", ".")
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self.facts, self.limits, self.cuda, self.version = facts, facts["profiles"], Cuda(), "stand-in"

    def start(self, ids, mask, last=False):
        return self.step(ids, None, last=last)

    def step(self, ids, cache, mask=None, last=False):
        past = cache[0].shape[2] if cache else 0
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, past + ids.shape[1]), np.int64)}
        feeds["position_ids"] = np.arange(past, past + ids.shape[1])[None]
        names = [i.name for i in self.session.get_inputs() if i.name.startswith("past")]
        m = self.facts["model"]
        empty = np.zeros((1, m["num_kv_heads"], 0, m["head_dim"]), np.float16)
        feeds.update(zip(names, cache or [empty] * len(names)))
        taps = self.facts["archive_taps"]
        wanted = ["logits", *[n.replace("past_key_values", "present") for n in names]]
        wanted += [tap["output"] for tap in taps.values()]
        logits, *rest = self.session.run(wanted, feeds)
        cache, routes = rest[: len(names)], rest[len(names) :]
        logits = logits[:, -1:] if last else logits
        return logits.astype(np.float32) * BREAK, {int(k): r for k, r in zip(taps, routes)}, cache

    def close(self):
        pass


moedge_session.Session = Session
script, BREAK, *sys.argv[1:] = sys.argv[1], float(sys.argv[2]), *sys.argv[3:]
sys.argv[0] = script
path = os.path.abspath(script)
exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__", "__file__": path})
'''


@pytest.fixture(scope="module")
def source(bundles, tmp_path_factory):
    """A folder with the bundle ``portable`` of the tiny MoE."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(bundles["moe/portable"], root / "portable")
    return root


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("archive") / "moe.tar"
    device_archive.write(source, out, devices.load("jetson-agx-orin"), max_length=64, max_prompt=48)
    return out


@pytest.fixture
def unpacked(archive, tmp_path):
    """The archive's folder, with a file in place of the engine (nothing here can deserialize one)."""
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "moedge-jetson-agx-orin"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "engine.plan").write_bytes(b"stand-in")
    facts = {
        **{
            "target": "tensorrt",
            "model": manifest["model"],
            "profiles": manifest["profiles"],
            "taps": manifest["taps"],
        },
        "archive_taps": manifest["taps"],
        "graph_sha256": manifest["files"]["model.onnx"]["sha256"],
        "sha256": "04bd79e8d6a6b2bba9d3ba97e5eaa72ae1dd3d7d9a3ee58a9a7d9a3e2d8b1b4f",
    }
    import hashlib

    facts["sha256"] = hashlib.sha256(b"stand-in").hexdigest()
    (folder / "engine.json").write_text(json.dumps(facts))
    return folder


def run(folder: Path, script: str, *more: str, scale: float = 1.0) -> subprocess.CompletedProcess:
    (folder.parent / "stand_in.py").write_text(STAND_IN)
    code = f"import sys; sys.path.insert(0, '.'); exec(open({str(folder.parent / 'stand_in.py')!r}).read())"
    # -I: without this checkout on the path, as on a device.
    command = [sys.executable, "-I", "-c", code, script, str(scale), *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_same_input_gives_the_same_bytes(source, archive, tmp_path):
    again = tmp_path / "again.tar"
    device_archive.write(source, again, devices.load("jetson-agx-orin"), max_length=64, max_prompt=48)
    assert again.read_bytes() == archive.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_manifest_lists_every_file_and_nothing_is_a_path_outside(archive):
    with tarfile.open(archive) as tar:
        names = sorted(member.name for member in tar)
        assert all(member.isfile() and member.mtime == 0 and member.uid == 0 for member in tar)
        manifest = json.loads(tar.extractfile("moedge-jetson-agx-orin/manifest.json").read())
    assert names == sorted(f"moedge-jetson-agx-orin/{name}" for name in [*manifest["files"], "manifest.json"])
    assert manifest["tensorrt"] == "10.3", "JetPack 6.2 ships it, so there is no kernel in the archive"
    assert "plugins" not in manifest
    assert not [name for name in names if "plugins/" in name]
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "golden.json", *device_archive.SCRIPTS} <= set(
        manifest["files"]
    )


def test_verify_passes_the_half_precision_graph_and_report_reads_the_result(unpacked, capsys):
    child = run(unpacked, "verify.py")
    assert child.returncode == 0, child.stdout + child.stderr
    result = json.loads((unpacked / "verify-result.json").read_text())
    assert result["passed"]
    assert result["routing"]["compared"]
    assert result["logits"]["tokens"] == len(device_archive.PROMPTS) * (device_archive.NEW_TOKENS + 1)
    assert 0 < result["logits"]["median_rel_error"] <= device_archive.limits()["median_rel_error"]
    assert report.report([unpacked / "verify-result.json"], as_json=False) == 0
    assert "median_rel_error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scale", "failed"), [(0.9, "median_rel_error"), (0.0, "constant"), (float("nan"), "non_finite")]
)
def test_verify_fails_an_engine_that_computes_something_else(unpacked, scale, failed):
    child = run(unpacked, "verify.py", scale=scale)
    assert child.returncode == 1, child.stdout + child.stderr
    assert f"FAIL  {failed}" in child.stdout
    assert report.report([unpacked / "verify-result.json"], as_json=True) == 1


def test_bench_times_and_report_reads_the_result(unpacked, capsys):
    child = run(unpacked, "bench.py", "--prompt", "20", "--decode", "3", "--repeats", "3", "--note", "test")
    assert child.returncode == 0, child.stdout + child.stderr
    result = json.loads((unpacked / "bench-result.json").read_text())
    assert result["protocol"] == {"batch": 1, "prompt": 20, "decode": 3, "repeats": 3, "warmup": 2, "note": "test"}
    assert result["tpot_ms"]["samples"] == 9
    assert 0 < result["tpot_ms"]["ci95_low"] <= result["tpot_ms"]["p50"] <= result["tpot_ms"]["p99"]
    assert report.report([unpacked / "bench-result.json"], as_json=False) == 0
    assert "per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.onnx.data").write_bytes(b"x"), "model.onnx.data is missing, a link or damaged"),
        (lambda f: (f / "engine.plan").write_bytes(b"other"), "engine.plan was changed or damaged"),
        (lambda f: (f / "engine.json").unlink(), "has no engine yet; run: python3 build_engine.py"),
        (lambda f: (f / "moedge_compare.py").write_text("#"), "moedge_compare.py is missing, a link or damaged"),
    ],
)
def test_nothing_damaged_is_run(unpacked, damage, message):
    damage(unpacked)
    child = run(unpacked, "verify.py")
    assert child.returncode != 0
    if "compare" not in message:  # a damaged module fails when it is imported, before anything is checked
        assert message in child.stderr


@pytest.mark.parametrize("script", ["build_engine.py", "verify.py", "bench.py"])
def test_without_numpy_the_last_line_names_numpy(unpacked, script):
    # -S: no site-packages.
    command = [sys.executable, "-E", "-S", script]
    child = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode != 0
    assert child.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'numpy'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "must be at least 1"),
        (["--decode", "0"], "must be at least 1"),
        (["--decode", "64"], "--decode 64 leaves no room for a prompt: this engine holds 64 tokens"),
    ],
)
def test_bench_refuses_what_it_cannot_time(unpacked, options, message):
    child = run(unpacked, "bench.py", *options)
    assert child.returncode == 2, child.stderr
    assert message in child.stderr
    assert "Traceback" not in child.stderr


def test_bench_says_that_it_shortened_the_prompt(unpacked):
    child = run(unpacked, "bench.py", "--prompt", "500", "--decode", "2", "--repeats", "1", "--warmup", "0")
    assert child.returncode == 0, child.stderr
    assert "takes 48 of 500 prompt tokens" in child.stderr
    result = json.loads((unpacked / "bench-result.json").read_text())
    assert result["protocol"]["prompt"] == 48


def test_the_build_script_says_what_is_missing(unpacked):
    command = [sys.executable, "build_engine.py"]
    child = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=60, check=False)
    if find_spec("tensorrt") is None:
        assert child.returncode == 2
        assert "The Python package tensorrt of target tensorrt cannot be imported" in child.stderr


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_the_build_script_builds_with_tensorrt_rtx_without_a_gpu(unpacked):
    command = [sys.executable, "build_engine.py", "--target", "tensorrt-rtx", "--compute-capability", "8.6"]
    child = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    facts = json.loads((unpacked / "engine.json").read_text())
    assert facts["build"]["engine_bytes"] == (unpacked / "engine.plan").stat().st_size > 10_000
    assert facts["taps"]["1"]["output"] == "routes.1"


def test_what_cannot_be_packed_is_refused(source, tmp_path):
    with pytest.raises(MoEdgeError, match="export tensorrt-rtx and use `moedge build`"):
        device_archive.write(source, tmp_path / "x.tar", devices.load("rtx-2080-ti"))
    (tmp_path / "mine.tar").write_text("keep")
    with pytest.raises(MoEdgeError, match="--force"):
        device_archive.write(source, tmp_path / "mine.tar", devices.load("jetson-agx-orin"))
    assert (tmp_path / "mine.tar").read_text() == "keep"
    with pytest.raises(MoEdgeError, match="no version of TensorRT"):
        device_archive.write(source, tmp_path / "y.tar", devices.load("jetson-agx-orin"), tensorrt="new")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("profiles", "memory", "message"),
    [
        ({"max_length": 5000, "max_prompt": 48, "batch": 1}, 64, "max_prompt <= max_length <= 256"),
        ({"max_length": 16, "max_prompt": 8, "batch": 1}, 64, "--max-length must be above 16"),
        ({"max_length": 64, "max_prompt": 48, "batch": 1}, 1e-6, "GiB .* lower --max-length"),
    ],
)
def test_what_the_device_would_refuse_is_refused_here(bundles, profiles, memory, message):
    device = devices.load("jetson-agx-orin").model_copy(update={"memory_gib": memory})
    with pytest.raises(MoEdgeError, match=message):
        device_archive._check(open_bundle(bundles["moe/portable"]), device, profiles)


def test_weights_of_more_than_8_gib_fit_into_an_archive():
    entry = tarfile.TarInfo("moedge-jetson-agx-thor/model.onnx.data")
    entry.size = 14 * 2**30
    assert tarfile.TarInfo.frombuf(entry.tobuf(device_archive.FORMAT), "utf-8", "strict").size == entry.size


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
    with tarfile.open(out / "moe.tar") as tar:
        tar.extractall(out, filter="data")
    return out / "moedge-jetson-agx-thor"


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


def test_the_archive_gives_tensorrt_a_kernel_for_every_node_and_tactic(thor):
    from moedge.export.plugins import launch_of
    from moedge.runtime.device.moedge_plugins import PLUGINS

    child = build(thor, TENSORRT)
    assert "cannot parse" in child.stderr, child.stderr
    record = json.loads((thor / "asked.json").read_text())
    assert not {"torch", "triton", "moedge", "onnxruntime"} & set(record["modules"])
    manifest = json.loads((thor / "manifest.json").read_text())
    assert manifest["label"] == "Mø E"
    assert (thor / "README.md").read_text(encoding="utf-8").startswith("# Mø E for NVIDIA Jetson AGX Thor")
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
        assert ".target sm_110" in asked["ptx"]
        entry = asked["ptx"].partition(f".entry {asked['name']}(")[2].partition(")")[0]
        assert entry.count(".param") == len(launch.inputs) + len(launch.scalars) + len(launch.outputs)
        assert asked["types"].split(", ")[0] == ("FP32" if plugin.name == "Route" else "FP16")


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


def test_the_device_metrics_are_those_of_parity():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 300)).astype(np.float32)
    b = (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32)
    found = moedge_compare.logits(a, b, 0.0)
    tokens = reduction.TokenErrors(0.0)
    tokens.add(a, b, np.full(40, -1))
    want = tokens.summary()
    assert found["median_rel_error"] == pytest.approx(want["rel_error"]["p50"])
    assert found["mean_kl"] == pytest.approx(want["kl_ref_test"]["mean"])
    assert found["max_kl"] == pytest.approx(want["kl_ref_test"]["max"])
    assert found["top1_agreement"] == want["top1"]["agreement_with_near_ties"]


def test_routes_are_compared_as_sets_by_layer():
    one = {0: np.array([[1, 2], [3, 4]], np.int32), 3: np.array([[0, 1], [0, 1]], np.int32)}
    two = {0: np.array([[2, 1], [3, 5]], np.int32), 3: one[3]}
    found = moedge_compare.routes(one, two)
    assert (found["agreement"], found["worst_layer"], found["worst_agreement"]) == (0.75, 0, 0.5)
    assert moedge_compare.routes(one, {}) == {"compared": False}


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "moedge.device-result/1", "kind": "verify"}'])
def test_report_refuses_what_is_no_result(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(MoEdgeError, match=r"r\.json"):
        report.read(tmp_path / "r.json")
