"""The operators as TensorRT plugins whose PTX is baked into the engine: rules, kernels from a folder, registration.

A plugin is described by plain Python: its inputs and attributes, the shape and type of its outputs, its tactics, and
how constant dimensions and attributes become a kernel. :func:`register` hands these to ``tensorrt.plugin`` (TensorRT
10.9 and newer); the finished engine needs no Python, PyTorch, Triton or plugin library. TensorRT does not store
attributes for such plugins, so they are compile-time constants of the kernel, as are all dimensions but one.

This file travels in a device archive: it needs Python's standard library, numpy and TensorRT. The PTX comes from a
folder that the export wrote (:class:`Library`); ``moedge.export.device.plugins`` writes it.

A node ``moedge::Name`` of an ONNX file becomes the plugin of that name; every other runtime takes the function body.
Two things are needed for that where the file also holds the body (found by driving NVIDIA's parser, TensorRT for RTX
1.7.1): the node must carry the attribute ``plugin_namespace``, or the body is taken although the plugin is registered;
and a string attribute arrives with a NUL at its end. Plugins have a fixed number of inputs, so nodes with an optional
one carry another name: :func:`node_type`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING or __package__:
    from moedge.runtime.device.moedge_trt import DeviceError
else:  # in an archive the files lie side by side
    from moedge_trt import DeviceError

DOMAIN = "moedge"
FOLDER = "plugins"
"""Where an archive keeps the kernels."""
OLDEST = (10, 9)
"""The first TensorRT with ``tensorrt.plugin.aot_impl`` for PTX."""

_TRT = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT8": "int8"}
"""TensorRT's name of a type -> ours."""
_COMBINATION = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32", "int8": "INT8"}

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int8": "i8"}
"""Triton's name of each element type that a kernel takes."""


@dataclass(frozen=True)
class Extent:
    """A grid dimension as a formula of the kernel's one dynamic size n: ``(times * n + plus) // over``.

    Only these three operations, so that TensorRT can evaluate it on a symbolic dimension.
    """

    times: int = 0
    plus: int = 1
    over: int = 1

    def __call__(self, n: Any) -> Any:
        """Evaluate for n >= 0: an int, or any object with ``*``, ``+`` and ``//``."""
        if not self.times:
            return self.plus // self.over
        scaled = n * self.times if self.times != 1 else n
        shifted = scaled + self.plus if self.plus else scaled
        return shifted // self.over if self.over != 1 else shifted


Dims = Sequence[Any]
Tensor = tuple[Dims, str]
"""Dimensions (ints, or TensorRT's symbolic ones) and type of a tensor."""


@dataclass(frozen=True)
class Plugin:
    """One plugin, as rules over the dimensions and types of its inputs.

    Attributes:
        name: operator name in the domain ``moedge``.
        inputs: input names.
        attributes: attribute name -> ``int`` or ``str``.
        outputs: (input tensors, attributes) -> output tensors; dimensions support ``*``, ``+``, ``//``.
        size: (input, dimension) of the one dynamic size n that grid and scalars depend on.
        options: (constant input dimensions, input types, attributes) -> the arguments of the kernel's ``launch``;
            the dynamic dimensions are None there.
        module: the kernel's module in ``moedge.convert.ops.kernels``.
        tactics: values of ``launch``'s ``path``; TensorRT measures them and takes the fastest. They are numbered
            from 1.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, type]
    outputs: Callable[[Sequence[Tensor], Mapping[str, Any]], list[Tensor]]
    size: tuple[int, int]
    options: Callable[[Sequence[Dims], Sequence[str], Mapping[str, Any]], dict[str, Any]]
    module: str
    tactics: tuple[str, ...] = ()

    @property
    def tactic_numbers(self) -> range:
        """The tactics' numbers, from 1."""
        return range(1, max(1, len(self.tactics)) + 1)


PATHS = ("gemv", "gemm16", "gemm32", "gemm64")
GATHERED_PATHS = ("gemv", "gemm16", "gemm64", "gemm128")


def _route(scaled: bool) -> Plugin:
    def outputs(tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> list[Tensor]:
        tokens = tensors[0][0][0]
        return [((tokens, attributes["top_k"]), "int32"), ((tokens, attributes["top_k"]), "float32")]

    def options(dims: Sequence[Dims], types: Sequence[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
        return {"experts": dims[0][1], "top_k": attributes["top_k"], "rule": attributes["rule"]}

    names = ("scores", "selection_bias", "scale") if scaled else ("scores", "selection_bias")
    kind = {"top_k": int, "rule": str}
    return Plugin("RouteScaled" if scaled else "Route", names, kind, outputs, (0, 0), options, "route")


def _dispatch() -> Plugin:
    def outputs(tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> list[Tensor]:
        (x, kind), (indices, _) = tensors
        rows = indices[0] * indices[1]
        return [((rows, x[1]), kind), ((attributes["num_experts"] + 1,), "int32"), ((rows,), "int32")]

    def options(dims: Sequence[Dims], types: Sequence[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
        experts, top_k = attributes["num_experts"], dims[1][1]
        return {"hidden": dims[0][1], "experts": experts, "top_k": top_k, "dtype": DTYPES[types[0]]}

    return Plugin("Dispatch", ("x", "indices"), {"num_experts": int}, outputs, (1, 0), options, "dispatch")


def _grouped(glu: bool) -> Plugin:
    def outputs(tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> list[Tensor]:
        (rows, kind), _, (weight, _) = tensors[:3]
        return [((rows[0], weight[1]), kind)]

    def options(dims: Sequence[Dims], types: Sequence[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
        into, out = dims[0][1], dims[2][1]
        found = {"experts": dims[2][0], "dtype": DTYPES[types[0]], **attributes}
        return found | ({"hidden": into, "width": out} if glu else {"hidden": out, "width": into})

    weights: tuple[str, ...] = ("gate", "up") if glu else ("weight",)
    attributes: dict[str, type] = {"activation": str} if glu else {}
    name = "GroupedGLU" if glu else "GroupedLinear"
    return Plugin(
        name,
        ("rows", "offsets", *weights),
        attributes,
        outputs,
        (0, 0),
        options,
        "grouped_glu" if glu else "grouped_linear",
        PATHS,
    )


def _combine(compensated: bool) -> Plugin:
    def outputs(tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> list[Tensor]:
        (rows, kind), (weights, _) = tensors[0], tensors[3]
        return [((weights[0], rows[1]), kind)]

    def options(dims: Sequence[Dims], types: Sequence[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
        top_k = dims[3][1]
        experts = dims[4][0] if compensated else top_k
        found = {"hidden": dims[0][1], "experts": experts, "top_k": top_k, "dtype": DTYPES[types[0]]}
        return found | {"compensated": compensated}

    names = ("rows", "inverse", "indices", "weights") + (("compensation",) if compensated else ())
    return Plugin("CombineCompensated" if compensated else "Combine", names, {}, outputs, (3, 0), options, "combine")


def _gathered(glu: bool) -> Plugin:
    def outputs(tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> list[Tensor]:
        (x, kind), (weight, _) = tensors[:2]
        return [((x[0], weight[1]), kind)]

    def options(dims: Sequence[Dims], types: Sequence[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
        into, out = dims[1]
        names = ("hidden", "width") if glu else ("inputs", "outputs")
        return {**dict(zip(names, (into, out), strict=True)), "dtype": DTYPES[types[0]], **attributes}

    name, module = ("GatheredGLU", "gathered_glu") if glu else ("GatheredLinear", "gathered_linear")
    inputs = ("x", "gate", "up", "h_limits") if glu else ("x", "weight")
    attributes: dict[str, type] = {"activation": str} if glu else {}
    return Plugin(name, inputs, attributes, outputs, (0, 0), options, module, GATHERED_PATHS)


PLUGINS = {
    plugin.name: plugin
    for plugin in (
        _route(False),
        _route(True),
        _dispatch(),
        _grouped(True),
        _grouped(False),
        _combine(False),
        _combine(True),
        _gathered(True),
        _gathered(False),
    )
}


def node_type(operator: str, inputs: int) -> str:
    """Return the plugin that an operator's node becomes, by the number of its inputs: ``Route`` with 3: RouteScaled."""
    variant = {("Route", 3): "RouteScaled", ("Combine", 5): "CombineCompensated"}.get((operator, inputs), operator)
    if variant not in PLUGINS or len(PLUGINS[variant].inputs) != inputs:
        raise DeviceError(f"No plugin for moedge::{operator} with {inputs} inputs; known: {', '.join(PLUGINS)}.")
    return variant


def refusal(version: str) -> str | None:
    """Return why a TensorRT version cannot take the plugins, or None.

    Raises:
        DeviceError: ``version`` is no version.
    """
    found = re.match(r"(\d+)\.(\d+)(\.|$)", version)
    if found is None:
        raise DeviceError(f"{version!r} is no version of TensorRT; write it like 10.13.")
    if (int(found[1]), int(found[2])) >= OLDEST:
        return None
    return (
        f"TensorRT {version} cannot bake kernels into an engine, {'.'.join(map(str, OLDEST))} is the first that can "
        "(JetPack 6.2 ships 10.3)"
    )


# ---- kernels


@dataclass(frozen=True)
class Binary:
    """A kernel as TensorRT takes it."""

    name: str
    ptx: str
    threads: int
    shared: int
    grid: tuple[Extent, ...]
    takes_size: bool


class Kernels(Protocol):
    """Where a plugin's PTX comes from."""

    def get(self, plugin: Plugin, options: Mapping[str, Any], tactic: int, capability: int) -> Binary:
        """Return the kernel of a tactic for a compute capability."""


def key_of(plugin: Plugin, options: Mapping[str, Any], tactic: int, capability: int) -> str:
    """Return the name of a kernel in ``kernels.json``."""
    asked = {"plugin": plugin.name, "options": dict(options), "tactic": tactic, "capability": capability}
    return json.dumps(asked, sort_keys=True, separators=(",", ":"))


class Library:
    """Reads what :func:`write_library` wrote; needs neither Triton nor torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.index = json.loads((self.folder / "kernels.json").read_text(encoding="utf-8"))["kernels"]
        except FileNotFoundError:
            raise DeviceError(f"No kernels.json in {self.folder}; `moedge pack` writes it.") from None

    def get(self, plugin: Plugin, options: Mapping[str, Any], tactic: int, capability: int) -> Binary:
        """See :class:`Kernels`.

        Raises:
            DeviceError: the kernel is not in the library, or its file is not the one that was written.
        """
        entry = self.index.get(key_of(plugin, options, tactic, capability))
        if entry is None:
            raise DeviceError(
                f"{self.folder} has no {plugin.name} kernel for sm_{capability} with {dict(options)}; "
                "make the archive again for this device."
            )
        path = self.folder / f"{entry['sha256'][:16]}.ptx"
        ptx = path.read_bytes()
        if hashlib.sha256(ptx).hexdigest() != entry["sha256"]:
            raise DeviceError(f"{path} was changed after it was written; unpack the archive again.")
        grid = tuple(Extent(*numbers) for numbers in entry["grid"])
        text = ptx.decode()
        return Binary(entry["name"], text, entry["threads"], entry["shared"], grid, entry["takes_size"])


# ---- TensorRT


def register(kernels: Kernels, *, capability: int) -> None:
    """Register every plugin with ``tensorrt.plugin``, before the ONNX file is parsed.

    TensorRT takes a name once a process: a second call gives the plugins that are there its ``kernels``.

    Args:
        kernels: :class:`Library`, or ``moedge.export.device.plugins.Compiler``.
        capability: compute capability of the engine's device, major * 10 + minor.

    Raises:
        DeviceError: TensorRT is too old (see :func:`refusal`), or the plugins were registered for another GPU.
    """
    import tensorrt

    reason = refusal(tensorrt.__version__)
    if reason is not None:
        raise DeviceError(f"{reason}; make the archive or bundle again with --tensorrt {tensorrt.__version__}.")
    for plugin in PLUGINS.values():
        _register(tensorrt, plugin, kernels, capability)


_registered: dict[str, _Registered] = {}
"""What this process has registered, by name."""


class _Registered:
    """What TensorRT calls for one plugin: its output types, its tactics and its kernel."""

    def __init__(self, trt: Any, plugin: Plugin, kernels: Kernels, capability: int) -> None:
        import tensorrt.plugin as api

        self.api, self.plugin, self.kernels, self.capability = api, plugin, kernels, capability
        known = {name: getattr(trt.DataType, theirs, None) for theirs, name in _TRT.items()}
        self.theirs = {name: kind for name, kind in known.items() if kind is not None}
        self.ours = {kind: name for name, kind in self.theirs.items()}
        self.count = len(plugin.inputs)

    def describe(self, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Shapes and types of the outputs."""
        inputs = [(tuple(tensor.shape_expr), self.ours[tensor.dtype]) for tensor in given[: self.count]]
        found = [
            self.api.from_shape_expr(tuple(dims), self.theirs[kind])
            for dims, kind in self.plugin.outputs(inputs, self._values(given[self.count :], named))
        ]
        return tuple(found) if len(found) > 1 else found[0]

    def tune(self, given: Sequence[Any]) -> Any:
        """Types are the network's (strongly typed); only the tactic is open."""
        types = [_COMBINATION[self.ours[tensor.dtype]] for tensor in (*given[: self.count], *given[-1])]
        return [self.api.AutoTuneCombination(", ".join(types), "LINEAR", list(self.plugin.tactic_numbers))]

    def implement(self, given: Sequence[Any]) -> Any:
        """The kernel, and how it is launched."""
        plugin, inputs, tactic = self.plugin, given[: self.count], given[-1]
        dims = [[d.constant_value() if d.is_constant else None for d in tensor.shape_expr] for tensor in inputs]
        types = [self.ours[tensor.dtype] for tensor in inputs]
        options = plugin.options(dims, types, self._values(given[self.count : -2], {}))
        missing = [name for name, value in options.items() if value is None]
        if missing:
            raise DeviceError(f"{DOMAIN}::{plugin.name}: {', '.join(missing)} must be constant in the network.")
        binary = self.kernels.get(plugin, options, tactic, self.capability)
        size = inputs[plugin.size[0]].shape_expr[plugin.size[1]]
        launch = self.api.KernelLaunchParams()
        for axis, extent in zip("xyz", binary.grid, strict=False):
            setattr(launch, f"grid_{axis}", extent(size))
        launch.block_x, launch.shared_mem = binary.threads, binary.shared
        scalars = self.api.SymIntExprs(1 if binary.takes_size else 0)
        if binary.takes_size:
            scalars[0] = self.api.SymInt32(size)
        return binary.name, binary.ptx, launch, scalars

    def _values(self, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        # NVIDIA's layer passes attributes in the order in which they were declared. A string has its C terminator.
        found = dict(zip(self.plugin.attributes, given, strict=False)) | dict(named)
        return {key: value.rstrip("\0") if isinstance(value, str) else value for key, value in found.items()}


def _register(trt: Any, plugin: Plugin, kernels: Kernels, capability: int) -> None:
    import tensorrt.plugin as api

    identity = f"{DOMAIN}::{plugin.name}"
    known = _registered.get(identity)
    if known is not None and known.api is api:
        if known.capability != capability:
            raise DeviceError(
                f"{identity} is registered for sm_{known.capability}; build for sm_{capability} in another process."
            )
        known.kernels = kernels
        return
    called = _Registered(trt, plugin, kernels, capability)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    tensors = [inspect.Parameter(name, positional, annotation=api.TensorDesc) for name in plugin.inputs]
    attributes = [inspect.Parameter(name, positional, annotation=kind) for name, kind in plugin.attributes.items()]
    extra = [inspect.Parameter(name, positional) for name in ("outputs", "tactic")]

    def signed(function: Callable[..., Any], parameters: list[inspect.Parameter], returns: Any) -> Callable[..., Any]:
        # TensorRT reads the signature; one function serves every plugin, so it is stated here.
        function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        function.__name__ = plugin.name
        return function

    def describe(*given: Any, **named: Any) -> Any:
        return called.describe(given, named)

    def tune(*given: Any) -> Any:
        return called.tune(given)

    def implement(*given: Any) -> Any:
        return called.implement(given)

    outputs = len(plugin.outputs([((1,) * 3, "float32")] * called.count, dict.fromkeys(plugin.attributes, 1)))
    described = tuple.__class_getitem__((api.TensorDesc,) * outputs) if outputs > 1 else api.TensorDesc
    text = str | bytes
    implemented = tuple.__class_getitem__((text, text, api.KernelLaunchParams, api.SymIntExprs))
    api.register(identity)(signed(describe, [*tensors, *attributes], described))
    api.autotune(identity)(signed(tune, [*tensors, *attributes, extra[0]], inspect.Parameter.empty))
    api.aot_impl(identity)(signed(implement, [*tensors, *attributes, *extra], implemented))
    _registered[identity] = called
