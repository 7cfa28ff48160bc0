"""What ``import moedge`` promises: the names, that they are lazy, and that they refuse in sentences."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moedge
from moedge import MoEdgeError

FUNCTIONS = {"bench", "convert_model", "evaluate", "export_model", "generate", "load", "open_engine", "verify"}
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich", "torch", "transformers", "yaml")


def test_the_list_is_the_promise() -> None:
    """A name that goes or comes is a change of the public API: mend docs/python.md and CHANGELOG.md with it."""
    assert set(moedge.__all__) == FUNCTIONS | {"MoEPlan", "MoEdgeError", "__version__"}
    assert set(moedge.__all__) <= set(dir(moedge))
    for name in sorted(FUNCTIONS):
        function = getattr(moedge, name)
        assert inspect.isfunction(function)
        assert "Raises:\n" in inspect.getdoc(function)  # type: ignore[operator]
        assert all(
            parameter.annotation is not parameter.empty for parameter in inspect.signature(function).parameters.values()
        )
    with pytest.raises(AttributeError, match="no attribute 'convert_modle'"):
        moedge.convert_modle  # type: ignore[attr-defined] # noqa: B018


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(f"import sys, moedge, moedge._files; moedge.MoEdgeError, dir(moedge); {loaded}") == "[]"


@pytest.mark.parametrize("name", ["generate", "open_engine", "verify", "bench"])
def test_what_a_device_calls_loads_no_torch(name: str) -> None:
    heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime")
    assert run(f"import sys, moedge; moedge.{name}; print([n for n in {heavy!r} if n in sys.modules])") == "[]"


def test_a_name_is_found_whatever_was_imported_before() -> None:
    """A sub-package takes the attribute of its name, so none may be called as a function is."""
    packages = {path.parent.name for path in Path(moedge.__file__).parent.glob("*/__init__.py")}
    assert packages & set(moedge.__all__) == set()
    before = "import moedge.export.targets, moedge.convert.plan, moedge.runtime.bench.latency"
    assert run(f"{before}; from moedge import bench, export_model; print(bench is moedge.runtime.api.bench)") == "True"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: moedge.convert_model("asset:x", "out", method="magic"),
            "convert_model: method: unknown value 'magic'",
        ),
        (
            lambda: moedge.convert_model("asset:x", "out", expert=3),
            r"convert_model: expert: unknown key; known keys here: method, .* \(nearest: experts\)",
        ),
        (
            lambda: moedge.convert_model("asset:x", "out", windows=0),
            "windows: must be at least 1, got 0",
        ),
        (lambda: moedge.export_model("nothing", "out"), "Model nothing does not exist; give a folder"),
        (lambda: moedge.export_model("nothing", "out", ["tpu"], half="float16"), "Unknown target 'tpu'; known: port"),
        (lambda: moedge.export_model("nothing", "out", half="bfloat16"), "half='bfloat16' is for target tensorrt or"),
        (lambda: moedge.export_model("nothing", "out", expert_form="plugin"), "No form of experts is called 'plugin'"),
        (
            lambda: moedge.export_model("nothing", "out", ["tensorrt"], tensorrt="new"),
            "'new' is no version of TensorRT",
        ),
        (lambda: moedge.open_engine("nothing"), "No model at nothing: the folder does not exist"),
        (lambda: moedge.generate("nothing", "hi"), "nothing"),
        (lambda: moedge.verify("nothing"), "nothing is not a run folder"),
        (lambda: moedge.verify("a", "b", tolerances="mine.yaml"), "No tolerances file 'mine.yaml'"),
        (lambda: moedge.verify("a", "b", prefill=256), "leaves nothing to decode"),
        (lambda: moedge.verify("a", "b", window=0, prefill=-1), "window is 0; it must be 2 or more"),
        (lambda: moedge.verify("a", "b", prefill=-1), "prefill is -1; it must be 1 or more"),
        (lambda: moedge.evaluate("a", window=1), "window is 1; it must be 2 or more"),
        (lambda: moedge.evaluate("a", tokens=0), "tokens is 0; it must be 2 or more"),
        (lambda: moedge.evaluate("a", tasks="magic"), "magic"),
        (lambda: moedge.bench([]), "bench needs at least one model, and each one once"),
        (lambda: moedge.bench(["a", "a"]), "bench needs at least one model, and each one once"),
        (lambda: moedge.evaluate([]), "evaluate needs at least one model"),
        (lambda: moedge.load("./nothing"), "nothing does not exist"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    call: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoEdgeError, match=says):
        call()
    assert list(tmp_path.iterdir()) == []


def test_an_open_engine_needs_a_tokenizer() -> None:
    engine: Any = object()
    with pytest.raises(MoEdgeError, match="pass tokenizer"):
        moedge.generate(engine, "hi")
