"""Weights of the CPU operators are copied into large pages: same numbers, one copy, gone with its session."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moedge.export.ort_ops import library, pack
from moedge.export.quantize.format import quantize
from moedge.tests.export.cpu_nodes import glu, linear, random, run, session

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
copies_are_made = pytest.mark.skipif(
    not ENABLED.is_file() or "[never]" in ENABLED.read_text(encoding="ascii"), reason="this system has no large pages"
)


def chunks() -> list[float]:
    """MiB that are in use of each 64 MiB of addresses that this process has asked large pages for."""
    gc.collect()
    found, used, size = [], 0, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            size = int(value.split()[0])
        elif name == "Rss":
            used = int(value.split()[0])
        elif name == "VmFlags" and "hg" in value.split() and size == 64 * 1024:
            found.append(used / 1024)
    return found


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_numbers_are_those_of_weights_where_they_are_mapped(
    cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    mapped = shutil.copyfile(cpu_library, tmp_path / "mapped.so")  # a library of its own, which reads the variable anew
    packed = [
        pack.pack_floats(weight) if bits == 32 else pack.pack(quantize(weight, bits))
        for weight in (random(1, 1024, 256), random(2, 256, 512))
    ]
    x, half = random(3, 3, 256), np.full(256, 0.7, np.float32)
    copied = run(glu(cpu_library, packed[0], packed[1], half, None), x)
    monkeypatch.setenv("MOEDGE_CPU_PAGES", "mapped")
    assert np.array_equal(run(glu(mapped, packed[0], packed[1], half, None), x), copied)


def test_weights_that_a_graph_computes_are_read_anew(cpu_library: Path) -> None:
    """Nothing is copied of an input that may change: the same memory holds other weights in the next call."""
    node = helper.make_node("GatherLinear", ["x", "", "w"], ["y"], domain=library.DOMAIN, K=256, N=512, bits=32)
    given = helper.make_tensor_value_info("w", TensorProto.FLOAT, [256, 512])
    made = session(cpu_library, [node], {}, 256, 512, more=[given])
    x, weight = random(1, 1, 256), random(2, 256, 512)
    for _ in range(2):
        y = np.asarray(made.run(None, {"x": x, "w": weight})[0])
        assert np.allclose(y, x @ weight, atol=1e-4)
        weight *= -2


@copies_are_made
def test_nodes_with_one_weight_have_one_copy_until_the_session_ends(
    cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["x", "a", "b", "c", "y"]
    nodes = [
        helper.make_node("GatherLinear", [given, "", "w"], [out], domain=library.DOMAIN, K=2048, N=2048, bits=32)
        for given, out in pairwise(names)
    ]

    def made(built: Path, seed: int) -> onnxruntime.InferenceSession:
        return session(built, nodes, {"w": random(seed, 2048, 2048)}, 2048, 2048)  # 16 MiB

    before = chunks()
    own = shutil.copyfile(cpu_library, tmp_path / "own.so")  # with chunks of its own
    first = made(own, 1)
    assert sorted(chunks()) == sorted([*before, 16])
    second = made(own, 2)
    assert sorted(chunks()) == sorted([*before, 32])
    del first
    assert sorted(chunks()) == sorted([*before, 32])  # what is left of a chunk is not given back
    del second
    assert sorted(chunks()) == sorted(before)
    monkeypatch.setenv("MOEDGE_CPU_PAGES", "mapped")
    mapped = made(shutil.copyfile(cpu_library, tmp_path / "mapped.so"), 1)
    assert sorted(chunks()) == sorted(before)
    assert np.isfinite(run(mapped, np.ones((1, 2048), np.float32))).all()


@copies_are_made
def test_sessions_with_equal_weights_do_not_end_each_other(cpu_library: Path) -> None:
    weight = pack.pack_floats(random(1, 512, 256))
    x = random(2, 1, 256)
    first, second = (linear(cpu_library, weight, None) for _ in range(2))
    wanted = run(first, x)
    del first
    gc.collect()
    assert np.array_equal(run(second, x), wanted)


@copies_are_made
def test_what_was_copied_of_a_file_is_given_back(cpu_library: Path, tmp_path: Path) -> None:
    """Also where another node reads the same weight: it gets it from the file again."""
    path, weight = tmp_path / "model.onnx", random(1, 2048, 1024)  # 8 MiB
    nodes = [
        helper.make_node("GatherLinear", ["x", "", "w"], ["gathered"], domain=library.DOMAIN, K=2048, N=1024, bits=32),
        helper.make_node("ReduceSum", ["w"], ["sum"], keepdims=0),
        helper.make_node("Add", ["gathered", "sum"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(library.DOMAIN, 1)]
    graph = helper.make_graph(nodes, "test", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location="model.data")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # or the sum is folded
    options.register_custom_ops_library(str(cpu_library))
    made = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.endswith("model.data"))
    assert int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1]) < 1024
    given = np.ones((1, 2048), np.float32)
    assert np.allclose(run(made, given), given @ weight + weight.sum(), atol=1e-2)


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, onnxruntime
from moedge.export.ort_ops import pack
from moedge.tests.export.cpu_nodes import linear, random, run

weight, x = random(1, 512, 256), random(2, 1, 512)
packed = pack.Packed(weight, None, 32, 256)
onnxruntime.SessionOptions().register_custom_ops_library(sys.argv[1])  # loads it
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 40 * 2**20,) * 2)  # less than a chunk has
assert np.allclose(run(linear(Path(sys.argv[1]), packed, None), x), x @ weight, atol=1e-4)
"""


@copies_are_made
def test_where_addresses_are_short_weights_stay_in_their_place(cpu_library: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(cpu_library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_where_weights_lie_is_named_as_it_is_known(
    cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEDGE_CPU_PAGES", "huge")
    own = shutil.copyfile(cpu_library, tmp_path / "own.so")
    with pytest.raises(Exception, match=r"MOEDGE_CPU_PAGES is 'huge'; it has to be large \(the default\) or mapped"):
        onnxruntime.SessionOptions().register_custom_ops_library(str(own))
