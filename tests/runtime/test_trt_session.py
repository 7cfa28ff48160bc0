"""The code that runs an engine, with a CUDA runtime and a TensorRT in their place: memory is the host's, an engine is
ONNX Runtime on the graph that TensorRT would build (its half precision emulated), given nothing but the addresses and
shapes it was told.
"""

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir, hash_tree
from moedge.export.graph import emulation
from moedge.export.lowering.check.session import dtype_of
from moedge.export.pipeline import lower
from moedge.runtime.device import moedge_cuda, moedge_session, moedge_trt
from moedge.runtime.engines import open_engine

# Odd: a tensor of the cache is then no multiple of 256 bytes long.
MAX_LENGTH, MAX_PROMPT, BATCH = 61, 24, 2


class Cudart:
    """libcudart over host memory; what was never written there is no number."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.downloaded = 0
        self.cudaGetErrorString = lambda status: b"out of the allocated memory"

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = 8
        return 0

    def cudaStreamCreate(self, stream: Any) -> int:
        stream._obj.value = 1
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:
        return 0

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        content = np.full(size.value + moedge_session.ALIGNMENT, 0xFF, np.uint8)
        address = -(-content.ctypes.data // moedge_session.ALIGNMENT) * moedge_session.ALIGNMENT
        start = address - content.ctypes.data
        self.memory[address] = content[start : start + size.value]
        pointer._obj.value = address
        return 0

    def cudaFree(self, pointer: Any) -> int:
        del self.memory[pointer.value]
        return 0

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: int, stream: Any) -> int:
        self.downloaded += size.value if kind == 2 else 0
        on_device = (target if kind == 1 else source).value
        if not self.holds(on_device, size.value):
            return 1
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def holds(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(m) for start, m in self.memory.items())


class Context:
    """An execution context: a profile, and what every tensor is bound to."""

    def __init__(self, engine: Any, cuda: Cudart, ranges: list[dict[str, Any]]) -> None:
        self.engine, self.cuda, self.ranges = engine, cuda, ranges
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.ranges[self.profile][name]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % moedge_session.ALIGNMENT == 0

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {}
        for value in self.engine.session.get_inputs():
            shape, kind = self.shapes[value.name], self.engine.types[value.name]
            size = int(np.prod(shape)) * kind.itemsize
            assert self.cuda.holds(self.addresses[value.name], size), value.name
            raw = (ctypes.c_char * size).from_address(self.addresses[value.name])
            feeds[value.name] = np.frombuffer(raw, kind).reshape(shape).astype(dtype_of(value.type))
        names = [value.name for value in self.engine.session.get_outputs()]
        for name, found in zip(names, self.engine.session.run(names, feeds), strict=True):
            array = found.astype(self.engine.types[name])
            assert self.cuda.holds(self.addresses[name], array.nbytes), name
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def bundle(request, bundles, tmp_path_factory):
    """The tiny MoE lowered for TensorRT 10.3."""
    folder = tmp_path_factory.mktemp("session") / "tensorrt"
    with atomic_dir(folder) as partial:
        lower("tensorrt", bundles["moe/portable"], partial, tensorrt="10.3", dtype=request.param)
    return folder


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cudart()
    monkeypatch.setattr(moedge_cuda, "_cudart", lambda: stand_in)
    return stand_in


@pytest.fixture
def session(bundle, cuda, monkeypatch):
    """A session of the bundle's engine."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    limits = {"max_length": MAX_LENGTH, "max_prompt": MAX_PROMPT, "batch": BATCH}
    ranges = moedge_trt.profile_shapes(manifest["model"], **limits)

    def deserialize(plan: bytes) -> Any:
        model = onnx.load(bundle / "model.onnx", load_external_data=True)
        model.graph.output.extend(onnx.ValueInfoProto(name=tap["output"]) for tap in manifest["taps"].values())
        kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        types = {
            name: onnx.helper.tensor_dtype_to_np_dtype(kind or onnx.TensorProto.INT32) for name, kind in kinds.items()
        }
        reads = [tap["reads"] for tap in manifest["taps"].values()]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in reads)
        types |= dict.fromkeys(reads, np.dtype(np.float32))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        emulated = emulation.emulated(model).SerializeToString()
        made = onnxruntime.InferenceSession(emulated, options, ["CPUExecutionProvider"])
        names = list(types)
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_dtype=lambda name: types[name].name,
            create_execution_context=lambda: Context(SimpleNamespace(session=made, types=types), cuda, ranges),
        )

    severity = {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None}
    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    kinds = SimpleNamespace(HALF="float16", BF16="bfloat16", FLOAT="float32", INT32="int32")
    logger = type("ILogger", (), severity)
    trt = SimpleNamespace(__version__="10.3.0", ILogger=logger, Runtime=lambda log: runtime, DataType=kinds)
    monkeypatch.setattr(moedge_session, "load_tensorrt", lambda target: trt)
    facts = {"target": "tensorrt", "model": manifest["model"], "profiles": limits, "taps": manifest["taps"]}
    facts["dtype"] = manifest["cache"]["dtype"]
    made = moedge_session.Session(b"plan", facts)
    yield made
    made.close()
    assert not cuda.memory, "all device memory is freed"


def test_the_plugin_library_is_loaded_before_the_engine(bundle, cuda, monkeypatch) -> None:
    """Once a process, and an engine whose library brings no plugin is refused before it is deserialized."""
    monkeypatch.setattr(moedge_session, "_loaded", None)
    registered: list[Any] = []
    asked: list[Any] = []

    def load(path: str) -> None:
        asked.append(path)
        registered.append(SimpleNamespace(name="Launch", plugin_namespace="moedge"))

    registry = SimpleNamespace(all_creators=registered, load_library=load)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: asked.append(plan))
    trt = SimpleNamespace(
        __version__="1.7.1",
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None}),
        Runtime=lambda log: runtime,
        get_plugin_registry=lambda: registry,
    )
    monkeypatch.setattr(moedge_session, "load_tensorrt", lambda target: trt)
    manifest = json.loads((bundle / "manifest.json").read_text())
    facts = {"target": "tensorrt-rtx", "model": manifest["model"], "profiles": {}, "taps": {}}
    for _ in range(2):
        with pytest.raises(moedge_trt.DeviceError, match="cannot load this engine"):
            moedge_session.Session(b"plan", facts, library="library.so")
    assert asked == ["library.so", b"plan", b"plan"]
    registered.clear()
    registry.load_library = asked.append
    with pytest.raises(moedge_trt.DeviceError, match="does not load the plugin library"):
        moedge_session.Session(b"plan", facts, library="library.so")
    assert asked[3:] == ["library.so"]


def test_prefill_and_decode_are_those_of_the_graph(bundle, session) -> None:
    """Every address is aligned and inside its buffer, and the halves of the cache take turns: equal bits."""
    ids = np.random.default_rng(0).integers(0, 256, (1, MAX_LENGTH))
    engine = open_engine(bundle, taps=True, router_inputs=True)
    want, reads = engine.prefill(ids[:, :20]), []
    logits, routes, cache = session.start(ids[:, :20], np.ones((1, 20), np.int64), reads=reads)
    for position in range(20, MAX_LENGTH):
        np.testing.assert_array_equal(logits, want.logits)
        assert set(routes) == set(want.routes) == set(reads[-1]) == {0, 1}
        for layer, chosen in want.routes.items():
            np.testing.assert_array_equal(routes[layer], chosen)
            np.testing.assert_array_equal(reads[-1][layer], want.router_inputs[layer])
        token = ids[:, position : position + 1]
        want = engine.decode(token, want.cache)
        logits, routes, cache = session.step(token, cache, reads=reads)
    assert len(reads) == 1 + MAX_LENGTH - 20
    np.testing.assert_array_equal(logits, want.logits)
    with pytest.raises(moedge_trt.DeviceError, match=f"holds at most {MAX_LENGTH}"):
        session.step(ids[:, :1], cache)


def test_a_long_padded_prompt_is_read_in_pieces(bundle, session) -> None:
    """24 tokens, 24 more, then one by one: the prefill profile takes no longer past."""
    ids = np.random.default_rng(1).integers(0, 256, (2, 52))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    want = open_engine(bundle, taps=True, router_inputs=True).prefill(ids, mask)
    reads = []
    logits, routes, cache = session.start(ids, mask, reads=reads)
    # Sums over a past are taken in another order than those over one prompt: within the block limit of half precision.
    from moedge.export.lowering.trt.engine import block_limit

    error = np.abs(logits - want.logits)[mask.astype(bool)].max() / np.abs(want.logits).max()
    assert logits.shape == want.logits.shape
    assert error < 4 * block_limit(session.dtype)
    alive = mask.reshape(-1).astype(bool)
    for layer, chosen in want.routes.items():
        assert routes[layer].shape == chosen.shape
        same = (np.sort(routes[layer]) == np.sort(chosen)).all(axis=1)[alive]
        assert same.mean() > (0.95 if session.dtype == "float16" else 0.8)
        read, close = reads[0][layer], want.router_inputs[layer]
        assert np.abs(read - close)[alive].max() / np.abs(close).max() < 4 * block_limit(session.dtype)
    assert len(reads) == 1
    np.testing.assert_array_equal(cache.mask, mask)


def test_many_tokens_after_a_cache_are_read_in_pieces(bundle, session) -> None:
    """As :meth:`Engine.decode` promises: 30 tokens after 10, whatever one call takes, are the same as one by one."""
    from moedge.export.lowering.trt.engine import block_limit

    ids = np.random.default_rng(5).integers(0, 256, (2, 52))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    want, _, _ = session.start(ids, mask)
    _, _, cache = session.start(ids[:, :10], mask[:, :10])
    reads: list[Any] = []
    parts = []
    for start, end in ((10, 40), (40, 52)):  # more than one call takes; and beyond the past that a prefill takes
        logits, routes, cache = session.step(ids[:, start:end], cache, reads=reads)
        assert {len(found) for found in (*routes.values(), *reads[-1].values())} == {2 * (end - start)}
        parts.append(logits)
    assert len(reads) == 2
    got = np.concatenate(parts, axis=1)
    assert np.abs(got - want[:, 10:]).max() / np.abs(want).max() < 4 * block_limit(session.dtype)
    np.testing.assert_array_equal(cache.mask, mask)


def test_the_last_position_alone_is_copied_when_it_is_enough(session, cuda) -> None:
    ids = np.random.default_rng(2).integers(0, 256, (2, 20))
    mask = np.ones_like(ids)
    before = cuda.downloaded
    logits, _, _ = session.start(ids, mask)
    whole, before = cuda.downloaded - before, cuda.downloaded
    last, _, _ = session.start(ids, mask, last=True)
    np.testing.assert_array_equal(last, logits[:, -1:])
    assert whole - (cuda.downloaded - before) == 2 * 19 * logits.shape[2] * (2 if session.dtype == "float16" else 4)


@pytest.mark.parametrize("last", [False, True])
def test_the_engine_class_passes_on_what_is_wanted(bundle, session, tmp_path, monkeypatch, last) -> None:
    """Prefill, decode, a cache used twice; ``last_logits`` as generation and bench open engines."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (tmp_path / "engine.plan").write_bytes(b"plan")
    kept = {key: manifest[key] for key in ("target", "kind", "label", "model", "moe", "taps")}
    made = {"schema": "moedge.engine/1", "profiles": session.limits, "compute_capabilities": ["8.7"], "versions": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({**kept, **made, "files": hash_tree(tmp_path)}))
    monkeypatch.setattr(moedge_session, "Session", lambda plan, facts, library=None: session)
    monkeypatch.setattr(session.cuda, "capability", lambda: "8.7")
    engine = open_engine(tmp_path, taps=True, last_logits=last, router_inputs=not last)
    reference = open_engine(bundle, taps=True, router_inputs=True)
    ids = np.random.default_rng(4).integers(0, 256, (1, 20))
    want, got = reference.prefill(ids), engine.prefill(ids)
    np.testing.assert_array_equal(got.logits, want.logits[:, -1:] if last else want.logits)
    if last:
        assert got.router_inputs is None
    else:
        np.testing.assert_array_equal(got.router_inputs[1], want.router_inputs[1])
    token = ids[:, :1]
    want, after = reference.decode(token, want.cache), engine.decode(token, got.cache)
    np.testing.assert_array_equal(after.logits, want.logits)
    with pytest.raises(MoEdgeError, match="used before"):
        engine.decode(token, got.cache)
    older = {layer: {key: tap[key] for key in ("output", "kind", "top_k")} for layer, tap in manifest["taps"].items()}
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({**kept, **made, "taps": older, "files": hash_tree(tmp_path)}))
    with pytest.raises(MoEdgeError, match="build it again with --taps"):
        open_engine(tmp_path, taps=True, router_inputs=True)


def test_what_the_profiles_do_not_hold_is_refused(session) -> None:
    ids = np.zeros((3, 4), np.int64)
    with pytest.raises(moedge_trt.DeviceError, match="3 rows, but this engine was built for at most 2"):
        session.start(ids, np.ones_like(ids))
    with pytest.raises(moedge_trt.DeviceError, match="no token"):
        session.start(ids[:1, :0], ids[:1, :0])
    session.limits = {**session.limits, "max_length": 100}  # an engine whose description is not its own
    with pytest.raises(moedge_trt.DeviceError, match=r"does not take tensor .* of shape"):
        session.start(np.zeros((1, 90), np.int64), np.ones((1, 90), np.int64))


def test_an_engine_whose_types_are_not_those_of_its_description_is_refused(session, bundle) -> None:
    """Buffers are sized by them: float32 logits in a buffer for float16 would be written past its end."""
    facts = {**session.facts, "dtype": "float16" if session.dtype == "bfloat16" else "bfloat16"}
    with pytest.raises(moedge_trt.DeviceError, match=r"Tensor logits of this engine is float\d\d, not float\d\d"):
        moedge_session.Session(b"plan", facts)
    with pytest.raises(moedge_trt.DeviceError, match="of type float8; known: float16, bfloat16"):
        moedge_session.Session(b"plan", {**facts, "dtype": "float8"})
    told, tap = session._engine.get_tensor_dtype, session.facts["taps"]["0"]
    for name, other in (
        (tap["output"], "int64"),
        (tap["reads"], "float64"),
        ("present.1.value", "float32"),
    ):

        def changed(asked: str, name: str = name, other: str = other) -> str:
            return other if asked == name else told(asked)

        session._engine.get_tensor_dtype = changed
        with pytest.raises(moedge_trt.DeviceError, match=rf"Tensor {name} of this engine is {other}, not"):
            session._check_types(moedge_session.load_tensorrt("tensorrt"))


def test_why_a_plugin_failed_is_said(session, monkeypatch) -> None:
    """TensorRT reports that it failed, our library why; a library of an older engine does not tell."""
    ids = np.zeros((1, 4), np.int64)
    monkeypatch.setattr(moedge_session, "_loaded", "library.so")
    monkeypatch.setattr(session._contexts[0], "execute_async_v3", lambda stream: False)
    for library, said in (
        (SimpleNamespace(moedgeLaunchReason=lambda: b"Route has no kernel for SM121"), "Route has no kernel for SM121"),
        (SimpleNamespace(), "no reason given"),
    ):
        monkeypatch.setattr(moedge_session.ctypes, "CDLL", lambda path, library=library: library)
        with pytest.raises(moedge_trt.DeviceError, match=said):
            session.start(ids, np.ones_like(ids))


def test_a_text_is_read_again_where_longrope_changes_its_factors(bundle, session) -> None:
    """The step that passes the boundary gives the bits of one whole reading, of its own tokens only."""
    session.model["rope_boundary"] = limit = 21
    ids = np.random.default_rng(0).integers(0, 256, (2, 24))
    mask = np.ones((2, 20), np.int64)
    mask[:, 0] = mask[0, 1] = 0  # 19 tokens and 18: padding does not count
    logits, _, cache = session.start(ids[:, :20], mask)
    reads: list[Any] = []
    for position in range(20, 24):
        before = cache
        logits, routes, cache = session.step(ids[:, position : position + 1], cache, reads=reads)
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        crossed = mask.sum(axis=1).max() == limit + 1
        assert (before is not cache) == crossed
        assert logits.shape[:2] == (2, 1)
        assert {len(found) for found in (*routes.values(), *reads[-1].values())} == {2}
        if crossed:
            parts: list[Any] = []
            whole, chosen, _ = session.start(ids[:, : position + 1], mask, reads=parts)
            np.testing.assert_array_equal(logits, whole[:, -1:])
            for layer, found in chosen.items():
                np.testing.assert_array_equal(routes[layer], found.reshape(2, position + 1, -1)[:, -1])
                read = parts[0][layer].reshape(2, position + 1, -1)[:, -1]
                np.testing.assert_array_equal(reads[-1][layer], read)
    assert mask.sum(axis=1).max() == limit + 2


def test_a_prompt_that_would_be_read_with_two_kinds_of_factors_is_refused(session) -> None:
    session.model["rope_boundary"] = MAX_PROMPT
    ids = np.zeros((1, MAX_PROMPT + 1), np.int64)
    with pytest.raises(
        moedge_trt.DeviceError, match="25 tokens must be read at once, and this engine reads at most 24"
    ):
        session.start(ids, np.ones_like(ids))
    session.model["rope_boundary"] = MAX_PROMPT - 1  # the first piece is beyond it: long factors throughout
    assert session.start(ids, np.ones_like(ids))[0].shape[1] == MAX_PROMPT + 1


def test_a_runtime_that_is_newer_than_the_driver_takes_is_left_for_an_older_one(monkeypatch) -> None:
    libraries = {
        "libcudart.so.13": SimpleNamespace(cudaGetDeviceCount=lambda count: moedge_cuda.DRIVER_TOO_OLD),
        "libcudart.so.12": SimpleNamespace(cudaGetDeviceCount=lambda count: 0),
    }

    def load(name: str) -> Any:
        if name not in libraries:
            raise OSError
        return libraries[name]

    monkeypatch.setattr(moedge_cuda.ctypes, "CDLL", load)
    assert moedge_cuda._cudart() is libraries["libcudart.so.12"]
    too_new = libraries.pop("libcudart.so.12") and libraries["libcudart.so.13"]
    assert moedge_cuda._cudart() is too_new, "its error says what is wrong"
