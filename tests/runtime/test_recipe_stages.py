"""The stages of a recipe: which setting belongs to which stage, and agreement with the registries of the packages."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

import moedge as package
from moedge import MoEdgeError
from moedge.configs.recipe import ControlName, EvaluateSection, Recipe, conversion_from, load_recipe, recipe_from
from moedge.configs.study import load_study
from moedge.convert import sources
from moedge.runtime.bench import machine as bench_machine
from moedge.runtime.bench.machine import machine
from moedge.runtime.device import moedge_nvml
from moedge.runtime.frontier import stages as frontier
from moedge.runtime.run import engine, held_out, run_folder, stages, study
from moedge.runtime.run.engine import Context, Stage, parts, source_digests
from moedge.runtime.run.fingerprint import fingerprint
from moedge.runtime.run.refs import EngineRef

MACHINE = {"processor": "toy"}


def params(recipe: Recipe, machine: dict[str, Any] = MACHINE) -> dict[str, Any]:
    return {stage.name: stage.params for stage in stages.build(recipe, machine)}


def changed(**sections: dict[str, Any]) -> Recipe:
    value = load_recipe("smollm2-135m-cmoe").model_dump()
    for name, update in sections.items():
        value[name] = {**value[name], **update}
    return recipe_from(value, where="test")


@pytest.mark.parametrize(
    ("sections", "own"),
    [
        ({"calibration": {"windows": 4}}, {"calibrate"}),
        ({"convert": {"k_a": 20}}, {"calibrate", "convert"}),
        ({"convert": {"profile": "normalised"}}, {"calibrate", "convert"}),
        ({"convert": {"max_iters": 1}}, {"convert"}),
        ({"convert": {"active": 4}}, {"convert", "export"}),
        ({"export": {"targets": ["portable"]}}, {"export", "export-dense"}),
        ({"evaluate": {"tokens": 1024}}, {"evaluate"}),
        ({"verify": {"prefill": 128}}, {"verify"}),
        ({"bench": {"repeats": 4}}, {"bench"}),
        ({"text": {"held_out": ["asset:wiki"]}}, {"evaluate"}),
        ({"text": {"held_out": ["asset:c4", "asset:wiki"]}}, {"evaluate", "verify", "bench"}),
        ({"text": {"holdout_every": 5}}, {"calibrate", "evaluate", "verify", "bench"}),
    ],
)
def test_a_setting_changes_the_key_of_its_own_stages_only(sections: dict[str, Any], own: set[str]) -> None:
    """Stages that read these see the change through the content of what they read."""
    before, after = params(load_recipe("smollm2-135m-cmoe")), params(changed(**sections))
    differ = {name for name in before if before[name] != after[name]}
    assert differ - {"report"} == own
    assert "report" in differ, "the report prints the recipe"


VALUES = {"linears": "all", "scores": "fisher", "score_tokens": 4096}


@pytest.mark.parametrize(
    ("convert", "reads", "measured"),
    [
        ({"method": "cmoe", "k_a": 5}, ("source", "calibrate"), (5, None)),
        ({"method": "expertweaver", "signal": "signed"}, ("source", "calibrate"), (10, "signed")),
        ({"method": "mlpmoe"}, ("source",), (10, None)),
        ({"method": "mlpmoe", "gather": {"share": 0.6}}, ("source", "calibrate"), (10, None)),
        ({"method": "moedge"}, ("source", "calibrate"), (10, None)),
        ({"method": "gather"}, ("source", "calibrate"), (10, None)),
    ],
)
def test_calibration_keeps_what_the_method_and_the_controls_read(
    convert: dict[str, Any], reads: tuple[str, ...], measured: tuple[Any, ...]
) -> None:
    recipe = recipe_from({"name": "x", "model": {"source": "asset:wiki"}, "convert": convert}, where="test")
    todo = {stage.name: stage for stage in stages.build(recipe, MACHINE)}
    assert todo["convert"].reads == reads
    assert tuple(todo["calibrate"].params[name] for name in ("k_a", "gate_signal")) == measured
    gathers = convert["method"] == "gather" or "gather" in convert
    assert todo["calibrate"].params["values"] == (VALUES if gathers else None)
    assert "calibrate" in todo["evaluate"].reads


def test_an_engine_is_a_stage_of_its_own_and_nothing_here_pretends_to_run_it(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = changed(export={"targets": ["portable", "tensorrt-rtx"], "build": ["rtx-4090"]})
    todo = {stage.name: stage for stage in stages.build(recipe, MACHINE)}
    assert todo["build"].reads == ("export",)
    assert todo["build"].params["profiles"][0]["compute_capability"] == "8.9"
    assert "build" not in todo["export"].params, "another device does not export again"
    assert "build" not in params(changed(export={"targets": ["portable", "tensorrt-rtx"]}))

    asked: list[Any] = []

    def build(bundle: Path, out: Path, devices: list[str]) -> SimpleNamespace:
        asked.append((bundle, out, devices))
        return SimpleNamespace(build=SimpleNamespace(engine_bytes=1 << 20, layers=7))

    monkeypatch.setattr("moedge.runtime.engines.build.build", build)
    (tmp_path / "export" / "tensorrt-rtx").mkdir(parents=True)
    (tmp_path / "export" / "tensorrt-rtx" / "manifest.json").write_text("{}")
    said: list[str] = []
    context = Context(tmp_path / "build", tmp_path, todo["build"].params, lambda *_: None, said.append)
    todo["build"].body(context)
    assert asked == [(tmp_path / "export" / "tensorrt-rtx", tmp_path / "build" / "tensorrt-rtx", ["rtx-4090"])]
    assert said == ["1 MiB, 7 layers; not executed here"]
    portable = EngineRef("portable", "moe")
    found = {
        portable: Path("a"),
        EngineRef("tensorrt-rtx", "moe"): Path("b"),
        EngineRef("tensorrt", "dense"): Path("c"),
    }
    here, not_executed = run_folder.executable(found)
    assert set(here) == {portable}
    assert set(not_executed) == {"tensorrt-rtx moe", "tensorrt dense"}
    assert all(reason.startswith("not executed here") for reason in not_executed.values())


@pytest.mark.parametrize(
    ("method", "wanted"), [("cmoe", ["source", "calibrate", "convert"]), ("mlpmoe", ["source", "convert"])]
)
def test_a_conversion_alone_makes_the_same_stages_and_no_others(
    method: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"name": "x", "model": {"source": "asset:wiki"}, "convert": {"method": method}}
    whole = stages.build(recipe_from(value, where="test"), MACHINE)
    monkeypatch.setattr(stages, "STAGES", {})
    found = stages.to_convert(conversion_from(value, where="test"))
    assert [stage.name for stage in found] == wanted
    keys = {stage.name: parts(stage, dict.fromkeys(stage.reads, "0")) for stage in whole}
    assert all(parts(stage, dict.fromkeys(stage.reads, "0")) == keys[stage.name] for stage in found)


def test_what_is_measured_on_a_machine_is_redone_on_another() -> None:
    recipe = load_recipe("smollm2-135m-cmoe")
    before, after = params(recipe), params(recipe, {"processor": "another"})
    assert {name for name in before if before[name] != after[name]} == {"verify", "bench"}


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_what_ran_under_another_onnxruntime_is_redone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA machines have ``onnxruntime-gpu`` in place of ``onnxruntime``."""

    def keys(version: str) -> dict[str, Any]:
        others = {"onnxruntime": None, "onnxruntime-gpu": None, name: version}
        monkeypatch.setattr(engine, "installed", lambda asked: others.get(asked, "1"))
        todo = stages.build(load_recipe("smollm2-135m-cmoe"), MACHINE)
        return {stage.name: parts(stage, dict.fromkeys(stage.reads, "0"))["versions"] for stage in todo}

    before, after = keys("1.31.0"), keys("1.32.0")
    redone = {"export", "export-dense", "verify", "bench"}
    assert {stage for stage in before if before[stage] != after[stage]} == redone
    assert all(after[stage][name] == "1.32.0" for stage in redone)
    assert all("absent" not in versions.values() for versions in after.values())


def test_a_machine_is_its_gpu_and_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decide what is measured, and so the keys of what was."""
    assert "gpu" not in machine() or moedge_nvml.found() is not None

    class Board:
        name, driver, close = (lambda _: "NVIDIA L4"), (lambda _: "550.54"), (lambda _: None)

    monkeypatch.setattr(moedge_nvml, "found", Board)
    monkeypatch.setattr(bench_machine, "default_threads", lambda: 7)
    assert (machine()["gpu"], machine()["usable_cores"]) == ("NVIDIA L4, driver 550.54", 7)


def test_what_pytorch_computes_is_redone_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "check_device", lambda device: None)
    recipe = load_recipe("smollm2-135m-cmoe")
    before, after = params(recipe), params(changed(model={"device": "cuda"}))
    redone = {"calibrate", "convert", "evaluate", "verify", "bench", "report"}  # a report holds its recipe
    assert {name for name in before if before[name] != after[name]} == redone


def test_a_device_that_is_not_here_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MoEdgeError, match=r"Device cuda: PyTorch .* finds no CUDA device here"):
        stages.build(changed(model={"device": "cuda"}), MACHINE)


def test_without_dense_parent_there_is_no_dense_export_and_nothing_reads_it() -> None:
    todo = {stage.name: stage for stage in stages.build(changed(export={"dense_parent": False}), MACHINE)}
    assert "export-dense" not in todo
    assert all("export-dense" not in stage.reads for stage in todo.values())
    assert todo["bench"].params["dense_parent"] is False


def test_stages_read_only_earlier_ones_and_their_sources_exist() -> None:
    seen: set[str] = set()
    for stage in stages.build(load_recipe("smollm2-135m-cmoe"), MACHINE):
        assert set(stage.reads) <= seen
        seen.add(stage.name)
        key = parts(stage, dict.fromkeys(stage.reads, "0"))
        assert "absent" not in key["versions"].values(), f"{stage.name} names a library that does not exist: {key}"
        assert stage.sources


PACKAGE = Path(package.__file__).parent
ENGINE_OF_STAGES = {"runtime/__init__.py", "runtime/run/engine.py", "runtime/progress.py"}
"""What runs the stages; a change of it says nothing about what a stage wrote."""
PEERS = {"runtime/peers/__init__.py"}
"""Behind ``open_engine(..., peer=...)``: other programs, which no stage opens."""
NOT_RUN = {
    *("configs/__init__.py", "configs/devices.py", "configs/errors.py", "configs/files.py"),
    *("export/device/plugins.py", "runtime/engines/build.py", "export/device/estimate.py"),
}
"""Behind the engine of TensorRT, which no stage opens."""


def imported(node: ast.AST) -> set[Path]:
    """Files of moedge that an import statement names."""
    names: list[str] = []
    if isinstance(node, ast.ImportFrom):
        names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    paths = [PACKAGE.joinpath(*name.split(".")[1:]) for name in names if name.split(".")[0] == "moedge"]
    found = {file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()}
    return found - {PACKAGE / "__init__.py"}


def imports(tree: ast.AST, *, lazy: bool) -> set[Path]:
    """What a module imports when it is loaded, with ``lazy`` also what its functions import."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return set()
    if isinstance(tree, ast.FunctionDef) and not lazy:
        return set()
    return imported(tree).union(*(imports(child, lazy=lazy) for child in ast.iter_child_nodes(tree)))


def code_of(body: Callable[..., None]) -> set[str]:
    """Files of moedge that a stage's body runs, by its imports and those of what it imports.

    What a function imports is followed in ``runtime`` only: ``convert`` and ``export`` import by method and by target.
    """
    function = ast.parse(inspect.getsource(body)).body[0]
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - {"Context"}
    todo = imports(function, lazy=True)
    for node in ast.parse(Path(inspect.getsourcefile(body) or "").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            todo |= imported(node) if node.names else set()
    seen: set[Path] = set()
    while todo:
        path = todo.pop()
        seen.add(path)
        lazy = path.is_relative_to(PACKAGE / "runtime")
        todo |= imports(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy) - seen
    return {path.relative_to(PACKAGE).as_posix() for path in seen}


EVERY_BODY = {
    stage.body: stage
    for stage in [
        *stages.build(changed(export={"targets": ["portable", "tensorrt-rtx"], "build": ["rtx-4090"]}), MACHINE),
        *study.build(load_study("smollm2-135m-methods")),
        *frontier.build(load_recipe("smollm2-135m"), MACHINE),
    ]
}


@pytest.mark.parametrize("stage", EVERY_BODY.values(), ids=lambda stage: stage.name)
def test_a_change_of_any_code_that_a_stage_runs_makes_it_stale(stage: Stage) -> None:
    keyed = {path for path, _ in source_digests(stage.sources)}
    unkeyed = code_of(stage.body) - keyed - ENGINE_OF_STAGES - PEERS - (set() if stage.name == "build" else NOT_RUN)
    assert unkeyed == set()


def test_the_recipe_knows_what_the_packages_offer() -> None:
    from moedge.convert.methods import baselines

    assert tuple(baselines.CONTROLS) == get_args(ControlName)
    assert tuple(EvaluateSection().controls) == baselines.STANDARD


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = fingerprint(str(text))
    text.write_text("two!")
    second = fingerprint(str(text))
    assert first != second
    folder = fingerprint(str(tmp_path))
    (tmp_path / "b.txt").write_text("new")
    assert fingerprint(str(tmp_path)) != folder
    assert fingerprint("asset:wiki") != fingerprint("asset:c4")


@pytest.mark.parametrize("spec", ["/no/such/folder", "./missing", "missing.gguf", "a/b/c", "asset:nope", "plain"])
def test_specs_that_name_nothing_are_refused_before_any_work(spec: str) -> None:
    for text in (False, True):
        with pytest.raises(MoEdgeError, match=r"does not exist|Unknown asset"):
            fingerprint(spec, text=text)


def test_hub_ids_are_models_but_not_texts() -> None:
    assert fingerprint("Qwen/Qwen2.5-0.5B") == "hub"
    with pytest.raises(MoEdgeError, match=r"The text Qwen/Qwen2.5-0.5B does not exist"):
        fingerprint("Qwen/Qwen2.5-0.5B", text=True)


def test_held_out_documents_are_those_that_calibration_does_not_see(tmp_path: Path) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    for path in (own, other):
        path.write_text("\n".join(f"{path.stem} {number}" for number in range(40)))
    calibration = {"texts": [{"spec": str(own), "is": fingerprint(str(own))}], "every": 4}
    entries = [{"spec": str(path), "is": fingerprint(str(path))} for path in (own, other)]
    seen = {document.text for document in held_out.calibration_text({"spec": str(own), "every": 4})[0].documents}
    first, second = held_out.texts({"calibration": calibration, "held_out": entries})
    assert len(seen) == 30
    assert len(first.documents) == 10
    assert not seen & {document.text for document in first.documents}
    assert len(second.documents) == 40, "all of a text that calibration never saw is held out"


@pytest.mark.parametrize("stem", ["text", "my text"])
def test_texts_of_the_same_name_stay_apart(tmp_path: Path, stem: str) -> None:
    paths = [tmp_path / name / f"{stem}.txt" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"{path}\n" * 20)
    calibration = {"texts": [{"spec": str(paths[0]), "is": "x"}], "every": 4}
    entries = [{"spec": str(path), "is": str(path)} for path in paths]
    found = held_out.texts({"calibration": calibration, "held_out": entries})
    assert [text.name for text in found] == [stem, f"{stem} (2)"]


def test_statistics_are_measured_where_somebody_reads_them() -> None:
    def measured(name: str, controls: list[ControlName]) -> bool:
        recipe = load_recipe(name)
        chosen = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"controls": controls})})
        stage = stages.calibrate(chosen, stages.Facts(chosen, MACHINE))
        return bool(stage.params["statistics"])

    assert measured("smollm2-135m", ["TEAL", "FLAP-MLP"])
    assert not measured("smollm2-135m", ["TEAL", "GRIFFIN"])
    assert measured("smollm2-135m-cmoe", [])
    alone = conversion_from(
        {"name": "x", "model": {"source": "asset:wiki"}, "convert": {"method": "gather"}}, where="test"
    )
    (kept,) = (stage for stage in stages.to_convert(alone) if stage.name == "calibrate")
    assert not kept.params["statistics"]


def test_variants_of_a_frontier_measure_once_what_values_are_worth() -> None:
    every = {stage.name: stage for stage in frontier.build(load_recipe("smollm2-135m"), MACHINE)}
    reads = {name: stage.reads for name, stage in every.items() if name.endswith("/convert")}
    assert len(reads) == 6
    assert {read for names in reads.values() for read in names} == {"source", "calibrate"}
    routed = {stage.name: stage for stage in frontier.build(load_recipe("smollm2-135m-cmoe"), MACHINE)}
    measured = {name: stage.params["values"] for name, stage in routed.items() if "calibrate" in name}
    assert measured.pop("calibrate") is None
    assert list(measured.values()) == [VALUES], "one more for all that gather"
