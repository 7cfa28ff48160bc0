"""Run a chain of ``moedge::Launch`` nodes as an engine does: the C++ library enqueues, Triton's interpreter computes.

Arguments: folder of the graph and its kernels, plugin library, stand-in for libcuda, an .npz of values by name, where
each node finds its inputs and leaves its outputs. Prints one JSON line a launch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from moedge.convert.ops.kernels.cuda import kernel_of
from moedge.export.device.plugins import launch_of
from moedge.runtime.device.moedge_plugins import PLUGINS

TYPES = {0: torch.float32, 1: torch.float16, 3: torch.int32}
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


def main() -> None:
    folder, library, device, stored = (Path(argument) for argument in sys.argv[1:])
    asked = {
        entry["sha256"]: (json.loads(key), entry)
        for key, entry in json.loads((folder / "kernels/kernels.json").read_text())["kernels"].items()
    }
    values = {name: torch.from_numpy(array) for name, array in np.load(stored).items()}
    known: dict[int, torch.Tensor] = {}
    failures: list[str] = []

    def launched(ptx: bytes, name: bytes, grid: Any, threads: int, arguments: Any) -> int:
        try:
            key, entry = asked[hashlib.sha256(ptx).hexdigest()]
            launch = launch_of(PLUGINS[key["plugin"]], key["options"], key["tactic"])
            assert (name.decode(), threads) == (entry["name"], launch.warps * 32)
            before, scalars = len(launch.inputs), len(launch.scalars)
            places = [i for i in range(before + scalars + len(launch.outputs)) if not before <= i < before + scalars]
            pointers = [ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_void_p))[0] for i in places]
            numbers = [ctypes.cast(arguments[before + i], ctypes.POINTER(ctypes.c_int32))[0] for i in range(scalars)]
            tensors = [known[pointer] for pointer in pointers]
            sizes = tuple(grid[i] for i in range(3))
            kernel_of(launch)[sizes](
                *tensors[:before], *numbers, *tensors[before:], **launch.constants, num_warps=launch.warps
            )
            print(json.dumps({"plugin": key["plugin"], "tactic": key["tactic"], "grid": sizes}), flush=True)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            return 1
        return 0

    callback = CALLBACK(launched)
    cuda = ctypes.CDLL(str(device), ctypes.RTLD_GLOBAL)
    cuda.use(callback, 89)  # takes what was compiled for 8.6
    creators = ctypes.CDLL(str(library)).getCreators
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        if node.op_type != "Launch" or any(name not in values for name in node.input):
            continue
        spec = next(item.s for item in node.attribute if item.name == "spec")
        given = [values[name] for name in node.input]
        made = [torch.full(shape, -1, dtype=kind) for kind, shape in outputs_of(spec, given)]
        known = {tensor.data_ptr(): tensor for tensor in (*given, *made)}
        shapes = [number for tensor in given for number in (tensor.ndim, *tensor.shape)]
        pointers = [(ctypes.c_void_p * len(ts))(*(t.data_ptr() for t in ts)) for ts in (given, made)]
        status = cuda.run(
            creators, spec, len(spec), len(given), len(made), (ctypes.c_long * len(shapes))(*shapes), *pointers
        )
        assert status == 0, (node.name, status, failures)
        values.update(zip(node.output, made, strict=True))
    np.savez(stored, **{name: tensor.numpy() for name, tensor in values.items()})


def outputs_of(spec: bytes, given: list[torch.Tensor]) -> list[tuple[torch.dtype, list[int]]]:
    """Types and shapes of a node's outputs, as its spec says them."""
    lines = spec.decode().split("\n")
    inputs, outputs = (int(number) for number in lines[0].split()[4:6])
    found = []
    for line in lines[1 + inputs : 1 + inputs + outputs]:
        kind, rank, *numbers = map(int, line.split())
        parts = [numbers[3 * i : 3 * i + 3] for i in range(rank)]
        found.append((TYPES[kind], [n if s < 0 else n * given[s].shape[axis] for n, s, axis in parts]))
    return found


main()
