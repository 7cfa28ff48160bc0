"""Build a TensorRT or TensorRT-RTX engine of a MoEdge graph. Needs the TensorRT Python package only.

This file is used by ``moedge build`` and travels in a device archive beside ``build_engine.py``; ``moedge_session.py``
runs what it built. Both TensorRT packages have the same Python interface; what differs is marked where it does.

Shapes: B batch, S new tokens, P past tokens, L = P + S, G key/value heads, D head size, V vocabulary, T = B*S.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

PREFILL, DECODE = 0, 1
"""Optimisation profiles of an engine, by index."""
PACKAGES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "tensorrt-rtx-int8": "tensorrt_rtx",
    "tensorrt-rtx-int4": "tensorrt_rtx",
}
"""Python package of each target. The registry of targets is not on a device; a test compares both."""
OLDEST = 10
"""The first major version of TensorRT with strongly typed networks and int64 inputs (JetPack 6)."""


MOE_CAPABILITIES = ("10.0", "10.3", "11.0")
"""Where TensorRT has an MoE layer of its own (NVIDIA's documentation; elsewhere the build fails)."""


def moe_refusal(label: str, capability: str) -> str | None:
    """Return why a device cannot run a graph with TensorRT's own MoE layer, or None."""
    if capability in MOE_CAPABILITIES:
        return None
    known = ", ".join("SM" + each.replace(".", "") for each in MOE_CAPABILITIES)
    return (
        f"{label} (SM{capability.replace('.', '')}) does not have TensorRT's own MoE layer, only {known} do; leave "
        "--expert-form out to get the best form that the device takes."
    )


class DeviceError(Exception):
    """A problem that the user can act on, in one sentence."""


def load_tensorrt(target: str) -> Any:
    """Import the TensorRT package of ``target``, a key of :data:`PACKAGES`.

    Raises:
        DeviceError: it is not installed, its libraries cannot be loaded, or it is older than :data:`OLDEST`.
    """
    package = PACKAGES[target]
    try:
        trt = importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise DeviceError(f"The Python package {package} of target {target} cannot be imported ({error}).") from None
    version = str(trt.__version__)
    if target == "tensorrt" and int(version.partition(".")[0]) < OLDEST:
        raise DeviceError(f"TensorRT {version} is too old for these graphs; {OLDEST}.0 or newer is needed (JetPack 6).")
    return trt


def profile_shapes(model: dict[str, Any], *, max_length: int, max_prompt: int, batch: int = 1) -> list[dict[str, Any]]:
    """Return (min, opt, max) shapes of every input for the prefill and the decode profile.

    Prefill reads up to ``max_prompt`` tokens, also after a past (a long prompt in pieces), decode one token a row.
    TensorRT checks that the three kinds of shapes agree among the inputs: past + new = length.

    Args:
        model: the ``model`` section of a bundle's manifest.
        max_length: longest sequence, prompt and answer, in tokens.
        max_prompt: most tokens of one prefill call, at most ``max_length``.
        batch: most rows of a call, and what both profiles are tuned for: TensorRT times its tactics at the middle
            shape, and the fastest for one row (a plugin's gemv) is far from it for 64.

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
        rows = (1, batch, batch)
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
        taps: name of an inner tensor -> name of the output that it becomes, see :func:`tap_outputs`.
        timing_cache: TensorRT only: file that is read when it exists and written when the build ends. It saves time; a
            damaged one, or one of another device or version, is replaced.

    Returns:
        The serialized engine and facts about it: ``layers`` of the network, ``plugins`` among them, ``parse_s``,
        ``build_s``, ``build_cpu_s``, ``engine_bytes``.

    Raises:
        DeviceError: the parser or the builder refuses; the message holds its reason.
    """
    if timing_cache is not None:
        check_writable(timing_cache, "The timing cache")
    log = logger_class(trt)()
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(strongly_typed) if strongly_typed is not None else 0)
    parser = trt.OnnxParser(network, log)  # lives until the engine is built: it holds the network's weights
    start = time.perf_counter()
    _parse(trt, parser, log, onnx_path)
    parsed = time.perf_counter()
    check_moe_layers(trt, network, onnx_path)
    _mark_outputs(network, taps or {}, onnx_path)
    config = builder.create_builder_config()
    # On by default: products of float32, the routers', would round what they read to 11 bits, as many as float16 has.
    config.clear_flag(trt.BuilderFlag.TF32)
    _set_capabilities(trt, config, compute_capabilities or [])
    cache = _load_timing_cache(config, timing_cache)
    log.errors.clear()  # of a timing cache that was replaced
    for shapes in profiles:
        _add_profile(trt, builder, network, config, log, shapes, onnx_path)
    layers = network.num_layers
    begun, cpu = time.perf_counter(), time.process_time()
    plan = _serialized(trt, builder, network, config, log, onnx_path)
    if timing_cache is not None and cache is not None:
        _keep_timing_cache(config, timing_cache)
    return plan, {
        "layers": layers,
        "plugins": _count(trt, network, "PLUGIN_V3"),
        "parse_s": round(parsed - start, 3),
        "build_s": round(time.perf_counter() - begun, 3),
        "build_cpu_s": round(time.process_time() - cpu, 3),
        "engine_bytes": len(plan),
    }


def _parse(trt: Any, parser: Any, log: Any, onnx_path: str | Path) -> None:
    if not parser.parse_from_file(str(onnx_path)):
        reason = str(parser.get_error(0)) if parser.num_errors else "; ".join(log.errors[:1]) or "no reason given"
        raise DeviceError(f"{trt.__name__} {trt.__version__} cannot parse {onnx_path}: {' '.join(reason.split())}")


def _serialized(trt: Any, builder: Any, network: Any, config: Any, log: Any, onnx_path: str | Path) -> bytes:
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise DeviceError(f"{trt.__name__} {trt.__version__} cannot build {onnx_path}: {_reason(log)}")
    return bytes(memoryview(serialized))


def _add_profile(
    trt: Any, builder: Any, network: Any, config: Any, log: Any, shapes: dict[str, Any], onnx_path: str | Path
) -> None:
    """Add an optimisation profile, once its names are those of the graph's inputs."""
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    if names != set(shapes):
        raise DeviceError(
            f"{onnx_path} has inputs {sorted(names ^ set(shapes))[:3]} that its manifest does not describe."
        )
    profile = builder.create_optimization_profile()
    try:
        for name, (low, middle, high) in shapes.items():
            profile.set_shape(name, low, middle, high)
    except ValueError as error:
        raise DeviceError(f"{onnx_path}: input {name} cannot have the shapes {low} to {high} ({error}).") from None
    if config.add_optimization_profile(profile) < 0:
        raise DeviceError(f"{onnx_path}: {trt.__name__} refuses an optimisation profile: {_reason(log)}")


def _set_capabilities(trt: Any, config: Any, capabilities: list[str]) -> None:
    """Name the GPUs that the engine is for; without any it is for the one that is here."""
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        member = "SM" + capability.replace(".", "")
        if not hasattr(trt.ComputeCapability, member):
            raise DeviceError(f"{trt.__name__} {trt.__version__} builds no engines for SM{capability}.")
        config.set_compute_capability(getattr(trt.ComputeCapability, member), index)


def tap_outputs(taps: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Name the outputs of an engine that shows its routing.

    Args:
        taps: those of a bundle's manifest, by layer: ``output`` is the tensor with the selected experts, ``reads`` the
            one that the layer's router read (bundles of older versions lack it).

    Returns:
        Inner tensor -> output, as :func:`build` takes it, and the same taps with the outputs' names.
    """
    outputs, found = {}, {}
    for layer, tap in taps.items():
        found[layer] = dict(tap)
        for key, name in (("output", f"routes.{layer}"), ("reads", f"router_inputs.{layer}")):
            if key in tap:
                outputs[tap[key]] = found[layer][key] = name
    return outputs, found


def check_moe_layers(trt: Any, network: Any, onnx_path: str | Path) -> int:
    """Count TensorRT's own MoE layers and refuse one without SiLU: the parser drops the activation without a word.

    Raises:
        DeviceError: a layer would multiply gate and up without activation.
    """
    kind = getattr(trt.LayerType, "MOE", None) if hasattr(trt, "LayerType") else None
    count = 0
    for index in range(network.num_layers) if kind is not None else ():
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IMoELayer
            if layer.activation_type != trt.MoEActType.SILU:
                raise DeviceError(
                    f"{onnx_path}: {trt.__name__} {trt.__version__} took {layer.name} without its activation (its "
                    "attribute activation_type is missing or is no integer); export the bundle again."
                )
            count += 1
    return count


def _count(trt: Any, network: Any, kind: str) -> int:
    wanted = getattr(getattr(trt, "LayerType", None), kind, None)
    return sum(network.get_layer(i).type == wanted for i in range(network.num_layers)) if wanted is not None else 0


def _mark_outputs(network: Any, taps: dict[str, str], onnx_path: str | Path) -> None:
    missing = dict(taps)
    for index in range(network.num_layers if taps else 0):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None and tensor.name in missing:
                name = missing.pop(tensor.name)
                network.mark_output(tensor)
                tensor.name = name
    if missing:
        raise DeviceError(f"{onnx_path}: routing tap {next(iter(missing))!r} is not in the parsed network.")


def _reason(log: Any) -> str:
    """The first error that TensorRT reported, and the last, which is often only its consequence."""
    return "; ".join(dict.fromkeys([*log.errors[:1], *log.errors[-1:]])) or "no reason given"


def check_writable(path: Path, what: str) -> None:
    """Refuse a file that :func:`write_bytes` could not write, before the work whose result it is to hold.

    Raises:
        DeviceError: a folder is there, or there is none to write it to; ``what`` begins the sentence.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DeviceError(f"{what} {path} cannot be written: {path.parent} is no folder.")
    if path.is_dir():
        raise DeviceError(f"{what} {path} cannot be written: it is a folder; name a file.")
    if not os.access(folder, os.W_OK):
        raise DeviceError(f"{what} {path} cannot be written: {path.parent} does not allow it.")


def _keep_timing_cache(config: Any, path: Path) -> None:
    used = config.get_timing_cache()
    if used is not None:
        write_bytes(path, bytes(memoryview(used.serialize())))


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Give the build the stored timing cache, or an empty one where TensorRT does not take it; return what it took."""
    if path is None or not hasattr(config, "create_timing_cache"):  # TensorRT for RTX measures nothing
        return None
    for content in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


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
