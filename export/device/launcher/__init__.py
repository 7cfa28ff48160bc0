"""Experts as plugins of TensorRT for RTX: a C++ library of one plugin that launches the kernels' PTX.

TensorRT for RTX takes no plugins written in Python, but its parser and builder take an ``IPluginV3`` whose
``IPluginCreatorV3One`` is in the registry. ``launcher.cpp`` is one: ``moedge::Launch`` launches whatever PTX its node
carries. An engine is built with it on any machine, also one without a GPU; the library, compiled here with g++ and the
C++ headers of TensorRT, lies beside the engine, which needs it to run.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir

from moedge import MoEdgeError
from moedge._files import link_or_copy
from moedge.export.bundle import MODEL, Bundle
from moedge.export.device import plugins
from moedge.export.functions import DOMAIN
from moedge.export.graph.build import size
from moedge.export.lowering.trt import plugins as trt_plugins
from moedge.runtime.device.moedge_plugins import PLUGINS, Binary, Extent, Library, Plugin, Tensor

SOURCE = Path(__file__).with_name("launcher.cpp")
HEADER = "NvInferRuntime.h"
CUDA_HEADER = "#pragma once\ntypedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"
"""All that TensorRT's headers take of ``cuda_runtime_api.h``: two opaque pointers, here so that CUDA need not be."""

TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7}
"""``nvinfer1::DataType`` of the types that kernels take."""
UNLIMITED = 2**31 - 1


# ---- the library


def headers() -> Path:
    """Return the folder of TensorRT's C++ headers: an installed TensorRT's, or those in the package ``kernel-lens``.

    The interfaces that a plugin implements carry versions of their own and are the same in TensorRT 10 and TensorRT for
    RTX 1; the package has those of 10.14.

    Raises:
        MoEdgeError: there are none.
    """
    spec = find_spec("kernel_lens")
    packaged = [Path(root) / "include/tensorrt" for root in (spec.submodule_search_locations or [])] if spec else []
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (
        *packaged,
        Path("/usr/include") / triplet,
        Path("/usr/include"),
        Path("/usr/local/tensorrt/include"),
    ):
        if (folder / HEADER).is_file():
            return folder
    raise MoEdgeError(
        "The plugin library is compiled with the C++ headers of TensorRT, which are not here: pip install "
        "'moedge[rtx-plugins]', or export with --expert-form merged."
    )


def compile_library(target: Path) -> Path:
    """Compile the plugin library to the file ``target`` with g++; return its path.

    Raises:
        MoEdgeError: no g++, no headers, or it does not compile.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise MoEdgeError(
            "The plugin library is compiled with g++, which is not here: install it (Debian, Ubuntu: apt install g++), "
            "or export with --expert-form merged."
        )
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "cuda_runtime_api.h").write_text(CUDA_HEADER, encoding="utf-8")
        command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
        includes = ["-isystem", str(headers()), "-isystem", scratch]
        _run([*command, *includes, str(SOURCE), "-o", str(target), "-ldl"])
    return target


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise MoEdgeError(f"{Path(command[0]).name} cannot compile the plugin library: {reason}")


def load(trt: Any, library: Path) -> None:
    """Put the library's creator into the registry, once a process.

    Raises:
        MoEdgeError: TensorRT does not take it.
    """
    registry = trt.get_plugin_registry()
    if any((creator.name, creator.plugin_namespace) == ("Launch", DOMAIN) for creator in registry.all_creators):
        return
    _alias(library.parent)
    registry.load_library(str(library))
    if not any((creator.name, creator.plugin_namespace) == ("Launch", DOMAIN) for creator in registry.all_creators):
        raise MoEdgeError(f"{trt.__name__} {trt.__version__} does not load {library}.")


def _alias(scratch: Path) -> None:
    """Let ``dlopen("libtensorrt_rtx.so")`` find the library that Python has loaded.

    NVIDIA's parser adds a plugin to the network through a function that it looks up in that file. The Python package
    has ``libtensorrt_rtx.so.1`` only, and the parser ends the process when the name is not found. A library of that
    name which links to the loaded one is enough.
    """
    name = "libtensorrt_rtx.so"
    try:
        ctypes.CDLL(name)
    except OSError:
        loaded = next(
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if f"/{name}.1" in line
        )
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            link = [
                "-shared",
                f"-Wl,-soname,{name}",
                "-Wl,--no-as-needed",
                "-x",
                "c++",
                "/dev/null",
                "-x",
                "none",
                loaded,
            ]
            _run([shutil.which("g++") or "g++", *link, "-o", str(Path(folder, name))])
            ctypes.CDLL(str(Path(folder, name)), ctypes.RTLD_GLOBAL)


# ---- the graph


class _Dim:
    """``times`` times dimension ``axis`` of an input: what the plugins' rules make of a dynamic dimension."""

    def __init__(self, source: int, axis: int, times: int = 1) -> None:
        self.source, self.axis, self.times = source, axis, times

    def __mul__(self, other: int) -> _Dim:
        return _Dim(self.source, self.axis, self.times * other)

    __rmul__ = __mul__


def write_launches(bundle: Bundle, folder: Path, capabilities: Sequence[str]) -> Path:
    """Write the bundle's graph to ``folder`` with every plugin node as ``moedge::Launch``; return its path.

    Args:
        bundle: a bundle of target ``tensorrt-rtx`` with experts as plugins.
        folder: an empty folder.
        capabilities: compute capabilities of the engine, such as 8.6; each gets kernels of its own.

    Raises:
        MoEdgeError: a kernel does not compile.
    """
    model = ir.load(bundle.model_path)
    kernels, numbers = folder / "kernels", [int(capability.replace(".", "")) for capability in capabilities]
    plugins.compile_library(kernels, trt_plugins.requests(model), numbers)
    library = Library(kernels)
    specs = {node: "".join(_spec(node, library, numbers)) for node in model.graph if node.domain == DOMAIN}
    for node, spec in specs.items():
        for name in PLUGINS[node.op_type].attributes:
            del node.attributes[name]
        node.op_type = "Launch"
        node.attributes["spec"] = ir.AttrString("spec", spec)
    model.functions.clear()  # the parser would take a body and say nothing
    for name in bundle.manifest.weight_files:
        link_or_copy(bundle.path / name, folder / name)
    ir.save(model, folder / MODEL)
    return folder / MODEL


def _spec(node: ir.Node, library: Library, capabilities: Sequence[int]) -> Iterator[str]:
    plugin = PLUGINS[node.op_type]
    given = [value for value in node.inputs if value is not None]
    dims = [[size if isinstance(size, int) else None for size in value.shape or ()] for value in given]
    types = [value.dtype.numpy().name for value in given if value.dtype is not None]
    attributes = {name: node.attributes[name].value for name in plugin.attributes}
    options = plugin.options(dims, types, attributes)
    symbolic: list[Tensor] = [
        ([_Dim(i, axis) if size is None else size for axis, size in enumerate(sizes)], kind)
        for i, (sizes, kind) in enumerate(zip(dims, types, strict=True))
    ]
    outputs = plugin.outputs(symbolic, attributes)
    tactics = _tactics(node, plugin, options)
    yield f"moedge.launch/1 {plugin.name} {plugin.size[0]} {plugin.size[1]} {len(given)} {len(outputs)} "
    yield f"{len(tactics) * len(capabilities)}\n"
    for sizes, kind in zip(dims, types, strict=True):
        yield " ".join(map(str, [TYPES[kind], len(sizes), *(-1 if size is None else size for size in sizes)])) + "\n"
    for made, kind in outputs:
        numbers = [TYPES[kind], len(made)]
        for dim in made:
            numbers += [dim.times, dim.source, dim.axis] if isinstance(dim, _Dim) else [dim, -1, 0]
        yield " ".join(map(str, numbers)) + "\n"
    for capability in capabilities:
        for tactic, most in tactics:
            yield from _kernel(library.get(plugin, options, tactic, capability), capability, most)


def _kernel(binary: Binary, capability: int, most: int) -> Iterator[str]:
    grid = [*binary.grid, *[Extent()] * (3 - len(binary.grid))]
    numbers = [capability, most, binary.threads, binary.shared, int(binary.takes_size)]
    for extent in grid:
        numbers += [extent.times, extent.plus, extent.over]
    yield f"{' '.join(map(str, numbers))} {binary.name} {len(binary.ptx.encode())}\n{binary.ptx}\n"


def _tactics(node: ir.Node, plugin: Plugin, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Return (tactic, most rows that it is taken for), for n rows the rule of the kernels' ``path_for``.

    TensorRT for RTX builds without a GPU and so cannot measure tactics.
    """
    if not plugin.tactics:
        return [(1, UNLIMITED)]
    from moedge.convert.ops.kernels import gathered, grouped

    if plugin.name.startswith("Gathered"):
        most = dict(gathered.MOST_TOKENS)
    else:
        top_k, experts = _routed(node), int(options["experts"])
        most = {path: rows * experts if rows else grouped.GEMV_TOKENS * top_k for path, rows in grouped.PATHS.items()}
    *first, last = zip(plugin.tactic_numbers, plugin.tactics, strict=True)
    return [*((tactic, most[path]) for tactic, path in first), (last[0], UNLIMITED)]


def _routed(node: ir.Node) -> int:
    """Return how many experts a token has that a grouped product is for."""
    dispatch = node
    while dispatch.op_type != "Dispatch":
        producer = dispatch.inputs[0].producer() if dispatch.inputs[0] is not None else None
        assert producer is not None
        dispatch = producer
    return size(dispatch.inputs[1], 1)
