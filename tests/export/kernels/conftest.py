"""Kernels in Triton's interpreter, every access checked; with ``pytest -m gpu`` the same calls on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

NEVER = np.iinfo(np.int32).max


@dataclass
class Buffer:
    """What each program did to each element of one tensor during one launch."""

    name: str
    tensor: torch.Tensor
    output: bool
    writer: np.ndarray = field(init=False)
    first_reader: np.ndarray = field(init=False)
    last_reader: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n = self.tensor.numel()
        self.start, self.itemsize = self.tensor.data_ptr(), self.tensor.element_size()
        self.end = self.start + n * self.itemsize
        self.writer = np.full(n, -1, np.int32)
        self.first_reader = np.full(n, NEVER, np.int32)
        self.last_reader = np.full(n, -1, np.int32)


class Fault(AssertionError):
    """An access outside the launch's tensors, or one whose result depends on the order of programs or lanes."""


class Watch:
    """Checks each load and store of a launch in the interpreter, which runs its programs one after the other."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = buffers
        self.launched = False

    def _locate(self, pointers: np.ndarray, mask: np.ndarray, what: str) -> Iterator[tuple[Buffer, np.ndarray]]:
        from triton.runtime.interpreter import interpreter_builder

        self.launched = True
        grid, x = interpreter_builder.grid_dim, interpreter_builder.grid_idx
        self.program = (x[0] * grid[1] + x[1]) * grid[2] + x[2]
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(pointers.shape, mask.shape)).astype(bool)
        ].astype(np.int64)
        found = 0
        for buffer in self.buffers:
            inside = addresses[(addresses >= buffer.start) & (addresses < buffer.end)]
            found += inside.size
            if inside.size:
                element, rest = np.divmod(inside - buffer.start, buffer.itemsize)
                if rest.any():
                    raise Fault(f"{what} of {buffer.name} between its elements")
                yield buffer, element
        if found < addresses.size:
            outside = [a for a in addresses if not any(b.start <= a < b.end for b in self.buffers)]
            gap, near = min((min(abs(outside[0] - b.start), abs(outside[0] - b.end)), b.name) for b in self.buffers)
            raise Fault(f"{what} outside every tensor, {gap} bytes from {near}, program {x}")

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        for buffer, element in self._locate(pointers, mask, "load"):
            writer = buffer.writer[element]
            if buffer.output and (writer == -1).any():
                raise Fault(f"load of {buffer.name} before anything was stored there")
            if ((writer != -1) & (writer != self.program)).any():
                raise Fault(f"race: load of {buffer.name} that another program stores")
            np.minimum.at(buffer.first_reader, element, self.program)
            np.maximum.at(buffer.last_reader, element, self.program)

    def store(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        for buffer, element in self._locate(pointers, mask, "store"):
            if not buffer.output:
                raise Fault(f"store to the input {buffer.name}")
            if np.unique(element).size < element.size:
                raise Fault(f"race: two lanes store one element of {buffer.name}")
            writer = buffer.writer[element]
            if ((writer != -1) & (writer != self.program)).any():
                raise Fault(f"race: two programs store one element of {buffer.name}")
            read = buffer.first_reader[element] != NEVER
            alone = (buffer.first_reader[element] == self.program) & (buffer.last_reader[element] == self.program)
            if (read & ~alone).any():
                raise Fault(f"race: store to {buffer.name} that another program loads")
            buffer.writer[element] = self.program

    def check_complete(self) -> None:
        """Every element of every output was stored."""
        for buffer in self.buffers:
            if buffer.output and (buffer.writer == -1).any():
                raise Fault(f"{int((buffer.writer == -1).sum())} elements of {buffer.name} were never stored")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Buffer]], Watch]:
    """Hook the interpreter; the returned function starts watching a launch's buffers."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set before Triton is imported: see tests/conftest.py"
    import triton.language as tl
    from triton.runtime import interpreter as module

    builder = module.InterpreterBuilder
    current: list[Watch] = []

    def watched(name: str, access: str, mask_at: int) -> None:
        original = getattr(builder, name)

        def hooked(self: Any, pointers: Any, *rest: Any) -> Any:
            if current:
                getattr(current[-1], access)(pointers.data, rest[mask_at].data)
            return original(self, pointers, *rest)

        monkeypatch.setattr(builder, name, hooked)

    watched("create_masked_load", "load", 0)
    watched("create_masked_store", "store", 1)

    # The interpreter keeps bfloat16 as its bits: it multiplies the bits in a dot, takes an integer for the bits, and
    # its rounding loses the carry of a mantissa of ones. These three are done as the hardware does them.
    def as_float32(handle: Any) -> np.ndarray:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    plain_dot, plain_convert, plain_cast = builder.create_dot, module._convert_float, builder.cast_impl

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (module.TensorHandle(as_float32(h), tl.float32) for h in (a, b))
        return plain_dot(self, a, b, d, *rest)

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy().reshape(data.shape)
        return plain_convert(data, source, target, rounding)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = module.TensorHandle(source.data.astype(np.float32), tl.float32)
        return plain_cast(self, source, target)

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(module, "_convert_float", convert)

    # A call inside a kernel scans the whole language for built-ins to replace, though they are replaced already.
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        languages = [v for v in self.fn.__globals__.values() if v is tl or v is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            module._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    monkeypatch.setattr(module.InterpretedFunction, "__call__", call)

    def start(buffers: list[Buffer]) -> Watch:
        current[:] = [Watch(buffers)]
        return current[-1]

    return start


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels of a test run: ``cpu`` in the interpreter with every access checked, or ``cuda``."""
    if request.param == "cuda":
        from triton import knobs

        # It would take tensors of the device too, and the test would pass without running a compiled kernel.
        if knobs.runtime.interpret:
            pytest.fail("Triton's interpreter was chosen for this run; device tests need: pytest -m gpu", pytrace=False)
        return "cuda"
    start = request.getfixturevalue("interpreter")
    from moedge.convert.ops.kernels import cuda

    plain = cuda.run

    def run(launch: Any, inputs: Any, outputs: Any, n: int) -> None:
        names = [*launch.inputs, *launch.outputs]
        tensors = [*inputs, *outputs]
        assert len(names) == len(tensors)
        assert all(t.is_contiguous() for t in tensors)
        first_output = len(launch.inputs)
        seen: dict[int, Buffer] = {}
        for i, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
            seen.setdefault(tensor.data_ptr(), Buffer(name, tensor, i >= first_output))
        watch = start(list(seen.values()))
        plain(launch, inputs, outputs, n)
        if n:
            assert watch.launched
            watch.check_complete()

    monkeypatch.setattr(cuda, "run", run)
    return "cpu"
