"""Register the plugins with the real ``tensorrt.plugin`` and walk them as TensorRT's builder does; prints JSON.

Run by ``test_plugins.py`` with: folder of ``tensorrt_bindings``, folder of stand-ins for TensorRT's C++ libraries. The
Python side of ``tensorrt.plugin`` (signature checks, symbolic shapes, tactics, launch parameters) is NVIDIA's own; the
C++ side is not here, so dimension expressions are evaluated by the two classes below.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

bindings, stand_ins = sys.argv[1:3]
for library in sorted(Path(stand_ins).glob("*.so*")):
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
sys.path.insert(0, bindings)
import tensorrt_bindings as trt  # noqa: E402

sys.modules["tensorrt"] = trt
import tensorrt.plugin as api  # noqa: E402
from tensorrt.plugin._lib import QDP_REGISTRY  # noqa: E402
from tensorrt.plugin._tensor import ShapeExprs, SymIntExpr  # noqa: E402

from moedge.export.device.plugins import launch_of  # noqa: E402
from moedge.runtime.device import moedge_plugins as plugins  # noqa: E402


class Expression:
    """A dimension: a number, and whether the builder knows it."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant, "the value of a dynamic dimension was asked for"
        return self.value


class Builder:
    """What TensorRT's IExprBuilder does."""

    def constant(self, value: int) -> Expression:
        return Expression(value, True)

    def operation(self, operation: Any, a: Expression, b: Expression) -> Expression:
        kinds = trt.DimensionOperation
        value = {
            kinds.SUM: lambda: a.value + b.value,
            kinds.PROD: lambda: a.value * b.value,
            kinds.FLOOR_DIV: lambda: a.value // b.value,
        }[operation]()
        return Expression(value, a.constant and b.constant)


class Rules:
    """Kernels without their PTX."""

    def get(self, plugin: Any, options: Any, tactic: int, capability: int) -> plugins.Binary:
        launch = launch_of(plugin, options, tactic)
        return plugins.Binary("kernel", "ptx", launch.warps * 32, 0, launch.grid, bool(launch.scalars))


TYPES = {"float32": trt.float32, "float16": trt.float16, "int32": trt.int32, "int8": trt.int8}


def desc(dims: list[Any], kind: str) -> Any:
    made = api.TensorDesc()
    made.dtype = TYPES[kind]
    made.shape_expr = ShapeExprs(len(dims))
    for i, (value, constant) in enumerate(dims):
        made.shape_expr[i] = api.ShapeExpr(Expression(value, constant))
    return made


def walk(case: dict[str, Any]) -> dict[str, Any]:
    name, attributes = case["plugin"], case["attributes"]
    found = QDP_REGISTRY[f"moedge::{name}"]
    # 1: output types, before any shape is known
    SymIntExpr._exprBuilder = None
    unknown = []
    for dims, kind in case["inputs"]:
        made = api.TensorDesc()
        made.dtype, made.shape_expr = TYPES[kind], ShapeExprs(len(dims), _is_dummy=True)
        unknown.append(made)
    outputs = found.register_func(*unknown, **attributes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    types = [str(output.dtype) for output in outputs]
    # 2: output shapes, 3: tactics, 4: the kernel and its launch
    SymIntExpr._exprBuilder = Builder()
    inputs = [desc(dims, kind) for dims, kind in case["inputs"]]
    outputs = found.register_func(*inputs, **attributes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [str(output.dtype) for output in outputs] == types
    assert len(outputs) == found.num_outputs
    tuned = found.autotune_func(*inputs, *attributes.values(), outputs)
    combinations = [c for t in tuned for c in t._get_combinations()]
    assert len(combinations) == 1
    assert [str(t) for t in combinations[0].types] == [str(t.dtype) for t in (*inputs, *outputs)]
    launches = {}
    for tactic in combinations[0].tactics:
        kernel, ptx, launch, scalars = found.aot_impl_func(*inputs, *attributes.values(), outputs, tactic)
        assert (kernel, ptx) == ("kernel", "ptx")
        launches[tactic] = {
            "grid": [launch.grid_x._expr.value, launch.grid_y._expr.value, launch.grid_z._expr.value],
            "threads": launch.block_x._expr.value,
            "scalars": [scalars[i]._expr.value for i in range(len(scalars))],
        }
    return {
        "types": types,
        "shapes": [[dim._expr.value for dim in output.shape_expr] for output in outputs],
        "launches": launches,
    }


trt.IDimensionExpr = Expression
# The registry is C++; registering there is put off until a plugin is instantiated.
eager = api.register
api.register = lambda identity: eager(identity, lazy_register=True)
plugins.register(Rules(), capability=87)
print(json.dumps({"version": trt.__version__, "cases": [walk(case) for case in json.load(sys.stdin)]}))
