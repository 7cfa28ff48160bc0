"""Build and run a TensorRT or TensorRT-RTX engine of a MoEdge graph. Needs numpy and the TensorRT Python package only.

This file is used by ``moedge build`` and the TensorRT engine class, and travels in a device archive beside
``build_engine.py``, ``verify.py`` and ``bench.py``. CUDA is reached through ``libcudart`` by ctypes: memory, copies and
one stream. Both TensorRT packages have the same Python interface; what differs is marked where it does.

Shapes: B batch, S new tokens, P past tokens, L = P + S, G key/value heads, D head size, V vocabulary, T = B*S.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PREFILL, DECODE = 0, 1
"""Optimisation profiles of an engine, by index."""
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python package of each target."""


class DeviceError(Exception):
    """A problem that the user can act on, in one sentence."""


# --- building -------------------------------------------------------------------------------------------------------


def load_tensorrt(target: str) -> Any:
    """Import the TensorRT package of ``target`` (``tensorrt`` or ``tensorrt-rtx``).

    Raises:
        DeviceError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module(PACKAGES[target])
    except (ImportError, OSError, FileNotFoundError) as error:
        raise DeviceError(
            f"The Python package {PACKAGES[target]} of target {target} cannot be imported ({error})."
        ) from None


def profile_shapes(model: dict[str, Any], *, max_length: int, max_prompt: int, batch: int = 1) -> list[dict[str, Any]]:
    """Return (min, opt, max) shapes of every input for the prefill and the decode profile.

    Prefill reads up to ``max_prompt`` tokens, also after a past (a long prompt in pieces), decode one token a row.
    TensorRT checks that the three kinds of shapes agree among the inputs: past + new = length.

    Args:
        model: the ``model`` section of a bundle's manifest.
        max_length: longest sequence, prompt and answer, in tokens.
        max_prompt: most tokens of one prefill call, at most ``max_length``.
        batch: most rows of a call.

    Raises:
        DeviceError: lengths that contradict each other or the model.
    """
    if not 2 <= max_prompt <= max_length <= model["max_position_embeddings"] or batch < 1:
        raise DeviceError(
            f"max_prompt={max_prompt} and max_length={max_length} must satisfy 2 <= max_prompt <= max_length <= "
            f"{model['max_position_embeddings']}, batch={batch} must be at least 1."
        )
    head = (model["num_kv_heads"], model["head_dim"])
    new = {PREFILL: (1, max(1, max_prompt // 2), max_prompt), DECODE: (1, 1, 1)}
    past = {PREFILL: (0, 0, max_length - max_prompt), DECODE: (1, max_length // 2, max_length - 1)}
    profiles = []
    for kind in (PREFILL, DECODE):
        rows = (1, 1, batch)
        shapes: dict[str, Any] = {}
        for name in ("input_ids", "position_ids"):
            shapes[name] = [(b, s) for b, s in zip(rows, new[kind], strict=True)]
        shapes["attention_mask"] = [(b, s + p) for b, s, p in zip(rows, new[kind], past[kind], strict=True)]
        cache = [(b, head[0], p, head[1]) for b, p in zip(rows, past[kind], strict=True)]
        for layer in range(model["num_layers"]):
            for part in ("key", "value"):
                shapes[f"past_key_values.{layer}.{part}"] = cache
        profiles.append(shapes)
    return profiles


def logger_class(trt: Any) -> Any:
    """Return a logger class that keeps errors and shows nothing: TensorRT reports the cause only there."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(str(message).split()))

    return Log


def build(
    trt: Any,
    onnx_path: str | Path,
    profiles: list[dict[str, Any]],
    *,
    compute_capabilities: list[str] | None = None,
    taps: dict[str, str] | None = None,
    timing_cache: Path | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """Parse a graph and build a strongly typed engine with one optimisation profile for each entry of ``profiles``.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        onnx_path: the graph; its external data lies beside it.
        profiles: :func:`profile_shapes`.
        compute_capabilities: TensorRT-RTX only, e.g. ``["8.6", "8.9"]``: GPUs that the engine is for, which need not be
            here. TensorRT builds for the GPU that it runs on.
        taps: name of an inner int32 tensor -> name of the output that it becomes (selected experts of a layer).
        timing_cache: TensorRT only: file that is read when it exists and written when the build ends. It saves time; a
            damaged or foreign one is ignored by TensorRT.

    Returns:
        The serialized engine and facts about it: ``layers`` of the network, ``parse_s``, ``build_s``,
        ``build_cpu_s``, ``engine_bytes``.

    Raises:
        DeviceError: the parser or the builder refuses; the message holds its first error.
    """
    log = logger_class(trt)()
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(strongly_typed) if strongly_typed is not None else 0)
    parser = trt.OnnxParser(network, log)
    start = time.perf_counter()
    if not parser.parse_from_file(str(onnx_path)):
        reason = str(parser.get_error(0)) if parser.num_errors else "; ".join(log.errors[:1]) or "no reason given"
        raise DeviceError(f"{trt.__name__} {trt.__version__} cannot parse {onnx_path}: {' '.join(reason.split())}")
    parsed = time.perf_counter()
    if taps:
        _mark_outputs(network, taps, onnx_path)
    config = builder.create_builder_config()
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for index, capability in enumerate(compute_capabilities):
            member = "SM" + capability.replace(".", "")
            if not hasattr(trt.ComputeCapability, member):
                raise DeviceError(f"{trt.__name__} {trt.__version__} builds no engines for SM{capability}.")
            config.set_compute_capability(getattr(trt.ComputeCapability, member), index)
    cache = _load_timing_cache(config, timing_cache)
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    for shapes in profiles:
        if names != set(shapes):
            raise DeviceError(
                f"{onnx_path} has inputs {sorted(names ^ set(shapes))[:3]} that its manifest does not describe."
            )
        profile = builder.create_optimization_profile()
        for name, (low, middle, high) in shapes.items():
            profile.set_shape(name, low, middle, high)
        config.add_optimization_profile(profile)
    layers = network.num_layers
    begun, cpu = time.perf_counter(), time.process_time()
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} cannot build {onnx_path}: {(log.errors or ['no reason given'])[-1]}"
        )
    if cache is not None and timing_cache is not None:
        write_bytes(timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    plan = bytes(memoryview(serialized))
    return plan, {
        "layers": layers,
        "parse_s": round(parsed - start, 3),
        "build_s": round(time.perf_counter() - begun, 3),
        "build_cpu_s": round(time.process_time() - cpu, 3),
        "engine_bytes": len(plan),
    }


def _mark_outputs(network: Any, taps: dict[str, str], onnx_path: str | Path) -> None:
    missing = dict(taps)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None and tensor.name in missing:
                name = missing.pop(tensor.name)
                network.mark_output(tensor)
                tensor.name = name
    if missing:
        raise DeviceError(f"{onnx_path}: routing tap {next(iter(missing))!r} is not in the parsed network.")


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_checked(path: Path, expected_sha256: str) -> bytes:
    """Read a file and return it only when it is what ``expected_sha256`` says: an engine is code.

    Raises:
        DeviceError: missing, a link, or changed.
    """
    if path.is_symlink() or not path.is_file():
        raise DeviceError(f"{path} is missing or a link; build the engine again.")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected_sha256:
        raise DeviceError(f"{path} was changed or damaged (its sha256 is not the recorded one); build it again.")
    return content


# --- running --------------------------------------------------------------------------------------------------------


class Cuda:
    """The few calls of the CUDA runtime that an engine needs, on one stream of device 0.

    Raises:
        DeviceError: there is no CUDA runtime library, or no usable NVIDIA GPU.
    """

    def __init__(self) -> None:
        self._lib = _cudart()
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        status = self._lib.cudaGetDeviceCount(ctypes.byref(count))
        if status or not count.value:
            reason = self._lib.cudaGetErrorString(status).decode() if status else "none found"
            raise DeviceError(f"No NVIDIA GPU can be used here ({reason}).")
        self.stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(self.stream))

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._lib, name)(*args)
        if status:
            raise DeviceError(f"{name} failed: {self._lib.cudaGetErrorString(status).decode()}.")

    def capability(self) -> str:
        """Compute capability of device 0, e.g. ``"8.7"``."""
        values = []
        for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor, ...Minor
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            values.append(value.value)
        return f"{values[0]}.{values[1]}"

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> Buffer:
        """Allocate ``size`` bytes on the device."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return Buffer(self, int(pointer.value or 0), size)

    def free(self, address: int) -> None:
        """Free what :meth:`allocate` gave."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-ordered array to the device."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cudaMemcpyAsync", ctypes.c_void_p(address), ctypes.c_void_p(array.ctypes.data), size, 1, self.stream
        )

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy device memory into a C-ordered array, and wait for it."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cudaMemcpyAsync", ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(address), size, 2, self.stream
        )
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Destroy the stream."""
        if self.stream:
            self._call("cudaStreamDestroy", self.stream)
            self.stream = ctypes.c_void_p()


class Buffer:
    """Device memory that is freed with its last reference."""

    def __init__(self, cuda: Cuda, address: int, size: int) -> None:
        self.cuda, self.address, self.size = cuda, address, size

    def __del__(self) -> None:
        address, self.address = self.address, 0
        if address:
            # When the interpreter or the driver is shutting down, they free it themselves.
            with contextlib.suppress(DeviceError, AttributeError, TypeError):
                self.cuda.free(address)


def _cudart() -> Any:
    """Load libcudart: the system's (Jetson, CUDA toolkit), or the wheel nvidia-cuda-runtime."""
    names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    for folder in sys.path:
        for pattern in ("nvidia/cu1*/lib/libcudart.so.*", "nvidia/cuda_runtime/lib/libcudart.so.*"):
            names += sorted(glob.glob(os.path.join(folder, pattern)))  # noqa: PTH118, PTH207
    names += sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so*"))  # noqa: PTH207
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError("No CUDA runtime (libcudart) is here; this needs a machine with an NVIDIA GPU and its driver.")


class Cache:
    """Keys and values of one sequence batch: two halves that take turns as past and present."""

    def __init__(self, buffer: Buffer, slot: int, mask: np.ndarray) -> None:
        self.buffer, self.slot, self.mask = buffer, slot, mask
        self.turn = 0
        self.used = False

    def past(self, index: int, count: int) -> int:
        """Address of tensor ``index`` of ``count`` in the half that holds the past."""
        return self.buffer.address + (self.turn * count + index) * self.slot

    def present(self, index: int, count: int) -> int:
        """Address of the same tensor in the other half."""
        return self.buffer.address + ((1 - self.turn) * count + index) * self.slot


class Session:
    """A deserialized engine with its two execution contexts.

    Args:
        plan: serialized engine, its hash already checked (deserializing is running code).
        facts: what ``moedge build`` or ``build_engine.py`` recorded beside it: ``target``, ``model``, ``profiles``
            (``max_length``, ``max_prompt``, ``batch``), ``taps``.

    Raises:
        DeviceError: no GPU, no TensorRT, or the engine was built for another device or version.
    """

    def __init__(self, plan: bytes, facts: dict[str, Any]) -> None:
        self.cuda = Cuda()
        self.facts, self.model, self.limits = facts, facts["model"], facts["profiles"]
        trt = load_tensorrt(facts["target"])
        self.version = f"{facts['target']} {trt.__version__}"
        self._log = logger_class(trt)()
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DeviceError(
                f"{self.version} cannot load this engine on a GPU of compute capability {self.cuda.capability()}: "
                f"{(self._log.errors or ['no reason given'])[-1]}"
            )
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._past = [name for name in self._names if name.startswith("past_key_values.")]
        self._half = np.dtype(np.float16)
        self._contexts = []
        for profile in (PREFILL, DECODE):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream.value or 0):
                raise DeviceError(
                    f"{self.version}: no execution context for profile {profile}; is there enough memory?"
                )
            self._contexts.append(context)
        self.cuda.synchronize()
        rows = self.limits["batch"] * self.limits["max_prompt"]
        self._logits = self.cuda.allocate(rows * self.model["vocab_size"] * self._half.itemsize)
        self._taps = {int(layer): tap for layer, tap in facts["taps"].items()}
        self._indices = {layer: self.cuda.allocate(rows * tap["top_k"] * 4) for layer, tap in self._taps.items()}
        self._inputs = {
            name: self.cuda.allocate(self.limits["batch"] * self.limits["max_length"] * 8)
            for name in ("input_ids", "attention_mask", "position_ids")
        }

    def start(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray], Cache]:
        """Read a prompt int64 [B, S] with its mask [B, S]; see :meth:`step`."""
        per_row = self.model["num_kv_heads"] * self.limits["max_length"] * self.model["head_dim"] * self._half.itemsize
        slot = len(ids) * per_row
        return self.step(ids, Cache(self.cuda.allocate(2 * len(self._past) * slot), slot, mask[:, :0]), mask)

    def step(
        self, ids: np.ndarray, cache: Cache, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[int, np.ndarray], Cache]:
        """Run ``ids`` int64 [B, S] after ``cache``.

        Returns:
            Logits float32 [B, S, V], selected experts int32 [T, k] by layer (engines built with taps), the cache.

        Raises:
            DeviceError: more rows or tokens than the profiles allow, or the engine fails.
        """
        batch, new = ids.shape
        mask = np.ones((batch, new), np.int64) if mask is None else mask
        mask = np.concatenate([cache.mask, mask], axis=1)
        length = mask.shape[1]
        past = length - new
        profile = DECODE if new == 1 and past else PREFILL
        self._check(batch, new, length, profile)
        positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)[:, -new:]
        context, count = self._contexts[profile], len(self._past)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        # Kept until the end of this call: the copies below are asynchronous.
        arrays = {name: np.ascontiguousarray(array, dtype=np.int64) for name, array in feeds.items()}
        for name, array in arrays.items():
            self.cuda.upload(self._inputs[name].address, array)
            context.set_input_shape(name, array.shape)
            context.set_tensor_address(name, self._inputs[name].address)
        shape = (batch, self.model["num_kv_heads"], past, self.model["head_dim"])
        for index, name in enumerate(self._past):
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, cache.past(index, count))
            context.set_tensor_address(name.replace("past_key_values.", "present."), cache.present(index, count))
        context.set_tensor_address("logits", self._logits.address)
        for layer, tap in self._taps.items():
            context.set_tensor_address(tap["output"], self._indices[layer].address)
        if not context.execute_async_v3(self.cuda.stream.value or 0):
            raise DeviceError(f"{self.version} failed to run: {(self._log.errors or ['no reason given'])[-1]}")
        half = np.empty((batch, new, self.model["vocab_size"]), self._half)
        self.cuda.download(half, self._logits.address)
        routes = {}
        for layer, tap in self._taps.items():
            routes[layer] = np.empty((batch * new, tap["top_k"]), np.int32)
            self.cuda.download(routes[layer], self._indices[layer].address)
        cache.turn, cache.mask = 1 - cache.turn, mask
        return half.astype(np.float32), routes, cache

    def _check(self, batch: int, new: int, length: int, profile: int) -> None:
        limits = self.limits
        if batch > limits["batch"]:
            raise DeviceError(f"{batch} rows, but this engine was built for at most {limits['batch']} (--batch).")
        if length > limits["max_length"]:
            raise DeviceError(f"{length} tokens do not fit: this engine holds at most {limits['max_length']}.")
        if profile == PREFILL and new > limits["max_prompt"]:
            raise DeviceError(
                f"{new} tokens at once, but this engine reads at most {limits['max_prompt']} (--max-prompt)."
            )
        if profile == PREFILL and length - new > limits["max_length"] - limits["max_prompt"]:
            raise DeviceError(
                f"{new} tokens after {length - new}: beyond {limits['max_length'] - limits['max_prompt']} past tokens "
                "this engine takes one token at a time."
            )

    def close(self) -> None:
        """Free the engine and its buffers."""
        self._contexts, self._engine, self._runtime = [], None, None
        self._inputs, self._indices = {}, {}
        del self._logits
        self.cuda.close()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DeviceError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path} cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise DeviceError(f"{path} does not hold a JSON object.")
    return value
