"""The library of CPU operators: compiled once, by any g++, showing nothing; its interface and its Arm table."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from moedge import MoEdgeError
from moedge.export.ort_ops import library, pack
from moedge.runtime.engines import ort_session
from moedge.tests.export.cpu_nodes import linear, run, session


def test_a_library_is_compiled_once(cpu_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "compile_library", lambda *_: pytest.fail("compiled again"))
    assert library.cached_library(cpu_library.parent) == cpu_library
    for name, path in library.sources().items():
        shutil.copy(path, tmp_path / name)
    assert library.key(library.sources(tmp_path)) in (key := library.key(library.sources()))
    (tmp_path / "ops.cc").write_text("// another\n", encoding="utf-8")
    assert library.key(library.sources(tmp_path)) != key


NAMED_BY_GCC_9 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}
"""Of gcc 9's manual, "X86 Built-in Functions", what is asked for; another name is an error there, such as f16c."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
def test_an_older_compiler_is_not_asked_for_what_it_does_not_know(cpu_library: Path) -> None:
    """g++ 10 knows no AVX-VNNI: neither as a target nor to ask the processor for."""
    for version, known in ((10, False), (11, True)):
        for name in ("isa_avx_vnni.cc", "kernels.cc"):
            command = ["g++", "-w", "-E", "-std=c++17", "-U__GNUC__", f"-D__GNUC__={version}", library.FOLDER / name]
            seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert ("avxvnni" in seen, "AVX_VNNI, avx2" in seen) == (known, known and name == "kernels.cc")
            assert set(re.findall(r'__builtin_cpu_supports\("(\w+)"', seen)) <= NAMED_BY_GCC_9 | {"avxvnni"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
@pytest.mark.parametrize(("name", "used"), [("isa_avx_vnni.cc", True), ("isa_avx2.cc", False)])
def test_each_table_has_the_instructions_of_its_name(cpu_library: Path, name: str, used: bool) -> None:
    """No processor here may run them, so ask the preprocessor: macros of a target that a pragma names are not set."""
    command = ["g++", "-w", "-E", "-P", "-std=c++17", library.FOLDER / name]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    vectors = seen[seen.index("struct V {") :]
    assert ("_mm256_dpbusd_avx_epi32(sum, weights, x)" in vectors) == used
    assert ("_mm256_maddubs_epi16(weights, x)" in vectors) == (not used)


def test_the_library_shows_nothing_and_needs_no_libstdcxx(cpu_library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-D", cpu_library], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[-1] for line in symbols if " T " in line] == ["RegisterCustomOps"]
    archive = subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True, check=True)
    if Path(archive.stdout.strip()).is_absolute():  # g++ has it
        assert not any("GLIBCXX" in line for line in symbols)


def test_a_library_that_does_not_load_is_compiled_from_its_sources(
    cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = library.write(tmp_path)
    (tmp_path / facts.library).write_bytes(b"made for another C library")
    node = helper.make_node("GatherLinear", ["x", "", "w"], ["y"], domain=library.DOMAIN, K=8, N=8, bits=32)
    options = onnxruntime.SessionOptions()
    ort_session._register(options, tmp_path, facts)
    made = session(None, [node], {"w": np.eye(8, dtype=np.float32)}, 8, 8, options=options)
    assert np.array_equal(run(made, np.ones((1, 8), np.float32)), np.ones((1, 8)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoEdgeError, match=r"cannot load the operators of .*, nor compiled here .*: .* install it"):
        ort_session._register(onnxruntime.SessionOptions(), tmp_path, facts)


def test_what_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops.cc").write_text("int nothing = ;\n", encoding="utf-8")
    if shutil.which("g++"):
        with pytest.raises(MoEdgeError, match=r"cannot compile the library of CPU operators in .*error"):
            library.compile_library(tmp_path / "ops.so", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoEdgeError, match="compiled with g\\+\\+, which is not here: install it"):
        library.compile_library(tmp_path / "ops.so")


def test_the_interface_is_the_one_that_was_declared(cpu_library: Path) -> None:
    """``abi.h`` is right for this release of ONNX Runtime: version 17 of the table is there, and a small model runs."""
    (extension,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*")
    loaded = ctypes.CDLL(str(extension))
    if hasattr(loaded, "OrtGetApiBase"):
        loaded.OrtGetApiBase.restype = ctypes.POINTER(ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32))
        assert loaded.OrtGetApiBase()[0](17)
    made = linear(cpu_library, pack.pack_floats(np.array([[1, 2], [3, 4]], np.float32)), np.array([0, 2], np.float32))
    assert run(made, np.array([[1, 1], [1, 2]], np.float32)).tolist() == [[1, 3], [5, 11]]


@pytest.mark.slow
def test_the_arm_table_agrees_with_the_portable_one(tmp_path: Path) -> None:
    """Compiled for 64-bit Arm and run under an emulator (Debian: apt install g++-aarch64-linux-gnu qemu-user)."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if any(shutil.which(program) is None for program in (compiler, emulator)):
        pytest.skip(f"needs {compiler} and {emulator}")
    files = [str(path) for path in library.FOLDER.glob("*.cc") if path.stem.startswith(("isa_", "kernels"))]
    files.append(str(Path(__file__).with_name("ort_ops_tables.cc")))
    flags = [flag for flag in library.FLAGS if flag != "-shared" and not flag.startswith("-Wl")]
    program = str(tmp_path / "tables")
    subprocess.run([compiler, *flags, "-static", f"-I{library.FOLDER}", *files, "-o", program], check=True, timeout=600)
    done = subprocess.run([emulator, "-cpu", "max", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("neon-dot")
