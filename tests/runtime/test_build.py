"""Engines: what is refused before TensorRT is asked, and real builds where TensorRT-RTX is installed."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from moedge import MoEdgeError
from moedge._files import hash_tree
from moedge.configs import tolerances
from moedge.runtime.commands import inspect
from moedge.runtime.device import moedge_cuda, moedge_trt
from moedge.runtime.engines import build as builder
from moedge.runtime.engines import open_engine
from moedge.runtime.parity.suite import Judging

# The extra [tensorrt-rtx]: NVIDIA publishes its libraries for Linux and Windows on x86-64 only.
rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")

MODEL: dict[str, Any] = {
    **{"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 64},
    **{
        "model_type": "toy",
        "num_attention_heads": 2,
        "dtype": "float32",
        "hidden_size": 16,
        "eos_token_ids": [],
        "parameters": 1,
    },
}


def make_bundle(folder: Path, *, broken: str | None = None, target: str = "tensorrt-rtx") -> Path:
    """A graph with an engine's inputs and outputs: one embedding, one cache, a routing tap."""
    from onnx import TensorProto, helper, numpy_helper

    from moedge.export import bundle
    from moedge.export.manifest import BUNDLE_SCHEMA

    rng = np.random.default_rng(0)
    f16, i64, i32 = TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32
    table = rng.standard_normal((300, 32)).astype(np.float16)
    weights = {"table": table, "head": np.ascontiguousarray(table.T[:, :300]), "axis": np.array([-1], np.int64)}
    if broken == "shape":
        weights["head"] = weights["head"][:16]
    shape = {"heads": np.array([0, 0, 2, 16], np.int64), "k": np.array([3], np.int64), "flat": np.array([-1, 300])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Reshape", ["x", "heads"], ["x4"]),
        helper.make_node("Transpose", ["x4"], ["new"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        helper.make_node("MatMul", ["x", "head"], ["plain"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["mask", "axis"], ["length"]),
        helper.make_node("Unsqueeze", ["length", "axis"], ["length3"]),
        helper.make_node("Cast", ["position_ids"], ["position"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["position", "axis"], ["position3"]),
        helper.make_node("Add", ["length3", "position3"], ["both"]),
        helper.make_node("Cast", ["both"], ["extra"], to=f16),
        helper.make_node("NoSuchOperator" if broken == "operator" else "Add", ["plain", "extra"], ["logits"]),
        helper.make_node("Reshape", ["logits", "flat"], ["rows"]),
        helper.make_node("TopK", ["rows", "k"], ["best", "chosen"]),
        helper.make_node("Cast", ["chosen"], ["experts.0"], to=i32),
    ]
    past = ["batch", 2, "past", 16]
    inputs = [
        *(helper.make_tensor_value_info(n, i64, ["batch", "new"]) for n in ("input_ids", "position_ids")),
        helper.make_tensor_value_info("attention_mask", i64, ["batch", "length"]),
        *(helper.make_tensor_value_info(f"past_key_values.0.{part}", f16, past) for part in ("key", "value")),
    ]
    present = ["batch", 2, "length", 16]
    outputs = [
        helper.make_tensor_value_info("logits", f16, ["batch", "new", 300]),
        *(helper.make_tensor_value_info(f"present.0.{part}", f16, present) for part in ("key", "value")),
    ]
    # The tap is inside the graph, as in an exported one: nothing computes from it, so it must be kept by an output.
    outputs.append(helper.make_tensor_value_info("experts.0", i32, ["rows", 3]))
    tensors = [numpy_helper.from_array(array, name) for name, array in {**weights, **shape}.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    layers = {"0": {"num_experts": 300, "top_k": 3, "shared_width": 0, "expert_width": 1}}
    manifest: dict[str, Any] = {"schema": BUNDLE_SCHEMA, "files": {}, "target": target}
    bundle.seal(
        folder,
        bundle.Manifest.model_validate(
            manifest
            | {
                **{"kind": "moe", "label": "toy", "model": MODEL, "moe": {"layers": layers}, "limits": []},
                "io": {"model": "model.onnx", "inputs": [], "outputs": []},
                "cache": {"kind": "concat", "max_length": 64, "dtype": "float16"},
                "taps": {"0": {"output": "experts.0", "kind": "indices", "top_k": 3}},
                **{"lowering": [], "versions": {}, "parent": None},
            }
        ),
    )
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.mark.parametrize(
    ("target", "device", "message"),
    [
        ("tensorrt-rtx", "jetson-agx-orin", "moedge pack CHECKPOINT OUT.tar --for jetson-agx-orin"),
        ("tensorrt-rtx", "h100", "export the target tensorrt"),
        ("tensorrt", "rtx-2080-ti", "export tensorrt-rtx instead"),
        ("portable", "rtx-4090", "needs no engine"),
        ("tensorrt-rtx", "rtx-9090", "No device 'rtx-9090'"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_can(tmp_path: Path, target: str, device: str, message: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", target=target)
    with pytest.raises(MoEdgeError, match=message):
        builder.build(bundle, tmp_path / "engine", [device])
    assert not (tmp_path / "engine").exists()


def test_a_gpu_without_tensorrts_moe_layer_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", target="tensorrt")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "experts": "native"}))
    with pytest.raises(MoEdgeError, match=r"\(SM90\) does not have TensorRT's own MoE layer.* leave --expert-form out"):
        builder.build(bundle, tmp_path / "engine", ["h100"])


@pytest.mark.parametrize("out", ["all", "all/bundle", "all/cache"])
def test_force_never_deletes_what_an_engine_is_built_from(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "all" / "bundle")
    (tmp_path / "all" / "cache").mkdir()
    cache = tmp_path / "all" / "cache" / "timing.cache"
    cache.write_bytes(b"measured")
    before = hash_tree(tmp_path)
    monkeypatch.setattr(builder, "_tensorrt", lambda *_: SimpleNamespace(__name__="tensorrt_rtx", __version__="1"))
    monkeypatch.setattr(moedge_trt, "build", lambda *_, **__: pytest.fail("the build ran"))
    with pytest.raises(MoEdgeError, match="would be deleted"):
        builder.build(bundle, tmp_path / out, ["rtx-4090"], timing_cache=cache, force=True)
    assert hash_tree(tmp_path) == before


def test_too_little_memory_is_said_before_building(toy: Path, tmp_path: Path) -> None:
    from moedge.configs import files

    profile = files.packaged("device")["rtx-4090"].read_text().replace("memory_gib: 24", "memory_gib: 0.00001")
    (tmp_path / "small.yaml").write_text(profile)
    with pytest.raises(MoEdgeError, match="GiB"):
        builder.build(toy, tmp_path / "engine", [str(tmp_path / "small.yaml")])


def test_profiles_agree_among_the_inputs() -> None:
    """TensorRT needs past + new = length in the smallest, the usual and the largest shape of each profile."""
    for sizes in ((64, 32), (64, 64), (2, 2), (33, 5)):
        for kind, shapes in enumerate(
            moedge_trt.profile_shapes(MODEL, max_length=sizes[0], max_prompt=sizes[1], batch=3)
        ):
            for i in range(3):
                batch, new = shapes["input_ids"][i]
                past = shapes["past_key_values.0.key"][i][2]
                assert shapes["attention_mask"][i] == (batch, new + past)
                assert shapes["position_ids"][i] == (batch, new)
                assert shapes["past_key_values.0.value"][i] == (batch, 2, past, 16)
            assert new + past == sizes[0]
            assert (kind == moedge_trt.DECODE) <= (new == 1)
            assert batch == 3
            # Tactics are timed at the middle shape: those of one row are far from the fastest for many.
            assert shapes["input_ids"][1][0] == 3


@pytest.mark.parametrize("sizes", [(65, 32), (32, 33), (1, 1)])
def test_impossible_lengths_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(moedge_trt.DeviceError, match="max_prompt"):
        moedge_trt.profile_shapes(MODEL, max_length=sizes[0], max_prompt=sizes[1])


def engine_folder(folder: Path, toy: Path) -> Path:
    """An engine folder with right hashes and a plan that is none: for everything that happens before deserializing."""
    folder.mkdir()
    (folder / "engine.plan").write_bytes(b"not an engine")
    manifest = json.loads((toy / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("target", "kind", "label", "model", "moe", "taps")}
    profiles = {"max_length": 64, "max_prompt": 32, "batch": 1}
    more = {"schema": "moedge.engine/1", "profiles": profiles, "compute_capabilities": ["8.9"], "versions": {}}
    (folder / "manifest.json").write_text(json.dumps({**kept, **more, "files": hash_tree(folder)}))
    return folder


@pytest.mark.parametrize(("dtype", "profile"), [("bfloat16", "tensorrt-bf16"), ("float16", "tensorrt")])
def test_an_engine_is_judged_by_the_limits_of_its_own_type(dtype: str, profile: str, toy: Path, tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", toy)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "target": "tensorrt", "dtype": dtype}))
    limits = tolerances.load()
    assert (
        Judging.of(folder, limits, "float32", "tensorrt").limits == limits.profiles[f"free/{profile}"]
    )  # the toy names no reads


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "engine.plan").write_bytes(b"not an enginE"), "engine.plan was changed or damaged"),
        (lambda f: (f / "engine.plan").unlink(), "lacks engine.plan"),
        (lambda f: (f / "plugin.so").write_bytes(b"x"), "plugin.so, which its manifest does not list"),
        (lambda f: (f / "manifest.json").write_text('{"schema": "moedge.engine/2"}'), "not of schema"),
        (lambda f: (f / "manifest.json").write_text('{"schema": "moedge.engine/1"}'), "lacks target"),
    ],
)
def test_a_changed_engine_is_never_deserialized(tmp_path: Path, toy: Path, damage: Any, message: str) -> None:
    folder = engine_folder(tmp_path / "engine", toy)
    damage(folder)
    with pytest.raises(MoEdgeError, match=message):
        open_engine(folder)


def test_an_engine_without_a_gpu_is_one_clear_sentence(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moedge_cuda, "_cudart", _no_cudart)
    with pytest.raises(MoEdgeError, match=r"cannot run here: No CUDA runtime"):
        open_engine(engine_folder(tmp_path / "engine", toy))
    with pytest.raises(MoEdgeError, match="top_k cannot be set"):
        open_engine(tmp_path / "engine", top_k=2)


def _no_cudart() -> Any:
    raise moedge_trt.DeviceError("No CUDA runtime (libcudart) is here.")


class Config:
    """A builder's configuration; contents that TensorRT makes a timing cache of, and those that it then attaches."""

    def __init__(self, made: set[bytes], attached: set[bytes]) -> None:
        self.made, self.attached = made, attached
        self.cache: Any = None
        self.profiles = 0
        self.cleared: list[str] = []

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: b"measured") if content in self.made else None

    def set_timing_cache(self, cache: Any, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content in self.attached:
            self.cache = cache
        return cache.content in self.attached

    def get_timing_cache(self) -> Any:
        return self.cache

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles += 1
        return self.profiles - 1 if profile.shapes else -1


def tensorrt(config: Config, set_shape: Any) -> Any:
    """What :func:`moedge_trt.build` calls of TensorRT; ``set_shape`` (profile, name, shapes) is the profile's."""
    names = list(moedge_trt.profile_shapes(MODEL, max_length=64, max_prompt=32)[0])
    inputs = [SimpleNamespace(name=name) for name in names]
    network = SimpleNamespace(num_inputs=len(names), get_input=inputs.__getitem__, num_layers=7)

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, *shapes: Any) -> None:
            set_shape(self, name, shapes)

    builder = SimpleNamespace(
        create_network=lambda flags: network,
        create_builder_config=lambda: config,
        create_optimization_profile=Profile,
        build_serialized_network=lambda network, config: b"plan",
    )
    return SimpleNamespace(
        **{"__name__": "tensorrt", "__version__": "10.13.3"},
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None}),
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        Builder=lambda log: builder,
        OnnxParser=lambda network, log: SimpleNamespace(parse_from_file=lambda path: True),
    )


def accept(profile: Any, name: str, shapes: Any) -> None:
    profile.shapes[name] = shapes


@pytest.mark.parametrize(
    ("made", "attached", "written"),
    [
        ({b"old", b""}, {b"old", b""}, b"measured"),
        ({b""}, {b""}, b"measured"),  # damaged: TensorRT makes no cache of it
        ({b"old", b""}, {b""}, b"measured"),  # of another device
        (set(), set(), b"old"),  # none at all: the engine is built without
    ],
)
def test_a_timing_cache_never_costs_the_engine(
    tmp_path: Path, made: set[bytes], attached: set[bytes], written: bytes
) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"old")
    profiles = moedge_trt.profile_shapes(MODEL, max_length=64, max_prompt=32)
    config = Config(made, attached)
    plan, facts = moedge_trt.build(tensorrt(config, accept), "model.onnx", profiles, timing_cache=path)
    assert (plan, facts["layers"], config.profiles) == (b"plan", 7, 2)
    assert config.cleared == ["TF32"]
    assert path.read_bytes() == written
    with pytest.raises(moedge_trt.DeviceError, match="is no folder"):
        moedge_trt.build(tensorrt(config, accept), "model.onnx", profiles, timing_cache=tmp_path / "no" / "cache")
    with pytest.raises(moedge_trt.DeviceError, match="it is a folder; name a file"):
        moedge_trt.build(tensorrt(config, accept), "model.onnx", profiles, timing_cache=tmp_path)


def test_a_profile_that_tensorrt_refuses_is_one_sentence() -> None:
    profiles = moedge_trt.profile_shapes(MODEL, max_length=64, max_prompt=32)

    def inconsistent(profile: Any, name: str, shapes: Any) -> None:
        raise ValueError("inconsistent")

    for set_shape, message in ((inconsistent, "cannot have the shapes"), (lambda *_: None, "refuses an optimisation")):
        with pytest.raises(moedge_trt.DeviceError, match=message):
            moedge_trt.build(tensorrt(Config(set(), set()), set_shape), "model.onnx", profiles)


def test_an_old_tensorrt_is_refused_before_it_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.2.3"))
    with pytest.raises(moedge_trt.DeviceError, match=r"TensorRT 8\.6\.2\.3 is too old .* 10\.0 or newer"):
        moedge_trt.load_tensorrt("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    assert moedge_trt.load_tensorrt("tensorrt").__version__ == "10.3.0"


@rtx
@pytest.mark.parametrize("broken", ["operator", "shape"])
def test_a_broken_graph_does_not_pass_the_build(tmp_path: Path, broken: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", broken=broken)
    with pytest.raises(MoEdgeError, match=r"tensorrt_rtx [\d.]+ cannot (parse|build) .*model\.onnx: \S+"):
        builder.build(bundle, tmp_path / "engine", ["rtx-4090"])
    assert not list(tmp_path.glob("*engine*"))


@rtx
def test_a_bundle_becomes_an_engine_for_several_gpus(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engine"
    manifest = builder.build(toy, out, ["rtx-4090", "rtx-3090"], max_prompt=32).document()
    assert manifest["compute_capabilities"] == ["8.6", "8.9"]
    assert manifest["profiles"] == {"max_length": 64, "max_prompt": 32, "batch": 1}
    assert manifest["weight_bytes"] == (toy / "model.onnx.data").stat().st_size
    assert manifest["build"]["layers"] > 5
    plan = (out / "engine.plan").read_bytes()
    assert manifest["build"]["engine_bytes"] == len(plan) > 300 * 32 * 2, "the weights must be in the engine"
    assert builder.open_file(out).plan() == plan
    with pytest.raises(MoEdgeError, match="--force"):
        builder.build(toy, out, ["rtx-4090"])
    facts = inspect.describe(out)
    assert (facts["kind"], facts["holds"], facts["compute_capabilities"]) == ("engine", manifest["kind"], "8.6, 8.9")
    assert {row["file"] for row in facts["files"]} == set(manifest["files"])
    inspect.inspect(out, as_json=False)
    assert "rtx-3090" in capsys.readouterr().out
    shutil.copytree(out, tmp_path / "copy")
    assert builder.open_file(tmp_path / "copy").manifest.document() == json.loads((out / "manifest.json").read_text())


@rtx
def test_what_tensorrt_rtx_has_is_what_the_profiles_say() -> None:
    import tensorrt_rtx

    from moedge.configs import devices

    members = {name for name in tensorrt_rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert members == {"SM" + capability.replace(".", "") for capability in devices.RTX_CAPABILITIES}


@pytest.mark.gpu
def test_cuda_buffers_hold_what_was_put_in() -> None:
    cuda = moedge_cuda.Cuda()
    free, total = cuda.memory()
    assert 0 < free <= total
    assert float(cuda.capability()) >= 5
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(np.float32) for size in (1, 1000, 1 << 20)]
    buffers = [cuda.allocate(array.nbytes) for array in arrays]
    for array, buffer in zip(arrays, buffers, strict=True):
        cuda.upload(buffer.address, array)
    for array, buffer in zip(arrays, buffers, strict=True):
        back = np.empty_like(array)
        cuda.download(back, buffer.address)
        np.testing.assert_array_equal(back, array)
    del buffers, buffer
    cuda.close()
