"""The whole chain on a tiny model: one `moedge run`, then what must hold about the folder that it leaves."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from typer.testing import CliRunner

from moedge._files import hash_tree, sha256_file
from moedge.configs.recipe import load_recipe
from moedge.export import targets
from moedge.runtime import report as reports
from moedge.runtime.bench.machine import machine
from moedge.runtime.cli import INTERRUPTED, app
from moedge.runtime.progress import Reporter
from moedge.runtime.run import engine, run_folder, stages

RECIPE = """
model: {{source: {model}}}
text: {{calibration: {text}, held_out: [{text}]}}
calibration: {{windows: 4, length: 128}}
convert: {{shared: 2, active: 3, experts: 8, k_a: 6}}
export: {{max_length: 256}}
evaluate: {{window: 64, tokens: 512}}
verify: {{tokens: 2048, window: 256, prefill: 250, threads: 1}}
bench: {{prompt: 32, decode: 4, repeats: 3, threads: 1}}
"""
WORDS = (
    "cut",
    "the",
    "dense",
    "layer",
    "into",
    "experts",
    "and",
    "route",
    "each",
    "token",
    "to",
    "a",
    "few",
    "of",
    "them",
)


def moedge(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def stages_that_ran(root: Path) -> dict[str, int]:
    """When each stage folder was made: it changes exactly when the stage runs."""
    return {path.parent.name: path.stat().st_ino for path in root.glob("*/stage.json")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a model, a text, a recipe and the finished run."""
    home = tmp_path_factory.mktemp("home")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=24)) for _ in range(400)]
    (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (home / "tiny.yaml").write_text(RECIPE.format(model=home / "model", text=home / "text.txt"), encoding="utf-8")
    result = moedge("run", home / "tiny.yaml", "--out", home / "run")
    assert result.exit_code == 0, result.output
    return home


@pytest.fixture
def run(home: Path) -> Path:
    return home / "run"


def test_the_run_ends_with_a_passed_verdict_and_a_valid_report(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, json.loads(reports.SCHEMA_FILE.read_text(encoding="utf-8")))
    assert report["passed"] is True
    assert {entry["name"].split(" = ")[0] for entry in report["verification"]["identity"]} == {
        "torch moe",
        *(f"{target} moe" for target in targets.default()),
    }
    parity = {entry["name"]: entry for entry in report["verification"]["parity"]}
    assert set(parity) == {
        f"{target} {kind} vs torch {kind}" for target in targets.default() for kind in ("moe", "dense")
    }
    for target in targets.default():
        entry = parity[f"{target} moe vs torch moe"]
        assert entry["routing"]["compared"], "expert sets must have been compared, not skipped"
        assert entry["overall"]["tokens"] >= 2048
    everything = {f"{target} {kind}" for target in ("torch", *targets.default()) for kind in ("moe", "dense")}
    assert {row["label"] for row in report["speed"]["points"][0]["rows"]} == everything - {"portable dense"}
    assert (run / "report.html").is_file()
    assert (run / "report.md").is_file()


def test_an_unchanged_run_reuses_every_stage(home: Path, run: Path) -> None:
    before = stages_that_ran(run)
    assert set(before) >= {"source", "calibrate", "convert", "export", "export-dense", "evaluate", "verify", "bench"}
    result = moedge("run", home / "tiny.yaml", "--out", run)
    assert result.exit_code == 0
    assert stages_that_ran(run) == before
    assert result.stderr.count("reused, nothing changed") == len(before)
    assert "verdict: passed" in result.stdout


def test_dry_run_says_what_a_changed_recipe_would_redo(home: Path, run: Path, tmp_path: Path) -> None:
    text = (home / "tiny.yaml").read_text().replace("repeats: 3", "repeats: 4")
    (tmp_path / "tiny.yaml").write_text(text)
    todo = stages.build(load_recipe(tmp_path / "tiny.yaml"), machine())
    states = {stage.name: status.state for stage, status in engine.plan(todo, run)}
    assert states.pop("bench") == "run"
    assert states.pop("report") in ("run", "depends")
    assert set(states.values()) == {"cached"}
    result = moedge("run", tmp_path / "tiny.yaml", "--out", run, "--dry-run")
    assert "changed: repeats" in " ".join(result.stdout.split())
    assert "disk: about" in result.stdout


def test_a_recipe_gates_on_answers_too(
    home: Path, task_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 questions decide nothing at the packaged limits: so says the run, on every surface, and exits with 1."""
    from moedge.convert.sources import assets

    fetch = assets.fetch
    monkeypatch.setattr(assets, "fetch", lambda name: task_files.get(name.removeprefix("task-")) or fetch(name))
    shutil.copytree(home / "run", tmp_path / "run")
    text = (home / "tiny.yaml").read_text(encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(text.replace("threads: 1}", "threads: 1, tasks: [sciq, arc_easy]}", 1))
    result = moedge("run", tmp_path / "tiny.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "verdict: NOT DECIDED" in result.stdout
    report = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, json.loads(reports.SCHEMA_FILE.read_text(encoding="utf-8")))
    answers = {entry["name"]: entry for entry in report["verification"]["accuracy"]}
    bundles = [f"{target} {kind}" for target in targets.default() for kind in ("moe", "dense")]
    assert set(answers) == {f"{one} vs torch {one.split()[1]}, answers" for one in bundles}
    for entry in answers.values():
        assert (entry["overall"]["questions"], entry["overall"]["agreement"]) == (16, 1.0)
    for page in ("report.md", "report.html"):
        assert "16 answers are the same" in (tmp_path / "run" / page).read_text(encoding="utf-8"), page


def test_a_changed_model_is_noticed(home: Path, run: Path) -> None:
    todo = stages.build(load_recipe(home / "tiny.yaml"), machine())
    config = home / "model" / "generation_config.json"
    original = config.read_bytes()
    try:
        config.write_bytes(original + b"\n")
        status = engine.plan(todo, run)[0][1]
        assert status.state == "run"
    finally:
        config.write_bytes(original)


def test_an_interrupted_run_resumes_to_byte_identical_plan_and_checkpoint(
    home: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moedge.convert import modeling

    root, save = tmp_path / "run", modeling.save

    def stop(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)  # the checkpoint is there, the stage is not finished
        raise KeyboardInterrupt

    monkeypatch.setattr(modeling, "save", stop)
    result = moedge("run", home / "tiny.yaml", "--out", root)
    assert result.exit_code == INTERRUPTED
    assert "Resume with the same command" in result.stderr
    assert sorted(path.name for path in root.iterdir()) == [".lock", "calibrate", "run.json", "source"]
    monkeypatch.undo()
    todo = stages.build(load_recipe(home / "tiny.yaml"), machine())[:3]
    outcomes = engine.execute(todo, root, Reporter())
    assert [outcome.reused for outcome in outcomes] == [True, True, False]
    assert hash_tree(root / "convert" / "checkpoint") == hash_tree(run / "convert" / "checkpoint")


def test_a_damaged_bundle_is_refused_alone_and_rebuilt_by_the_run(home: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    model = copy / "export" / "ort-cpu" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    for command in (("generate", copy, "a"), ("inspect", model.parent)):
        result = moedge(*command)
        assert result.exit_code == 2
        assert "model.onnx" in result.stderr
    todo = stages.build(load_recipe(home / "tiny.yaml"), machine())
    (reason,) = [status.reason for stage, status in engine.plan(todo, copy) if stage.name == "export"]
    assert reason == "export/ort-cpu/model.onnx is missing, changed or damaged"


@pytest.mark.parametrize("options", [(), ("--model", "dense"), ("--engine", "portable"), ("--engine", "torch")])
def test_generate_streams_the_same_text_from_every_engine_of_a_model(run: Path, options: tuple[str, ...]) -> None:
    result = moedge("generate", run, "cut the dense", "--threads", 1, "--max-new-tokens", 4, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("cut the dense")
    assert "4 tokens" in result.stderr
    if "dense" not in options:
        assert result.stdout == moedge("generate", run, "cut the dense", "--threads", 1, "--max-new-tokens", 4).stdout


def test_verify_compares_two_engines_and_its_exit_code_tells(home: Path, run: Path, tmp_path: Path) -> None:
    arguments = ("--text", home / "text.txt", "--tokens", 128, "--window", 64, "--prefill", 56, "--threads", 1)
    engines = {str(ref): folder for ref, folder in run_folder.engines(run).items()}
    junit = tmp_path / "verify.xml"
    good = moedge("verify", engines["torch moe"], engines["ort-cpu moe"], *arguments, "--json", "--junit", junit)
    assert good.exit_code == 0, good.output
    result = json.loads(good.stdout)
    assert result["passed"]
    assert ElementTree.parse(junit).getroot().get("failures") == "0"
    bad = moedge("verify", engines["torch dense"], engines["ort-cpu moe"], *arguments)
    assert bad.exit_code == 1, "a quarter of the neurons is skipped: this is another model"
    assert "FAIL" in bad.stdout
    mine = tmp_path / "mine.yaml"
    mine.write_text("schema: moedge.tolerances/1\nprofiles: {float32/ort-cpu: {mean_kl: 1.0e-30}}\n")
    strict = moedge("verify", engines["torch moe"], engines["ort-cpu moe"], *arguments, "--tolerances", mine, "--json")
    assert strict.exit_code == 1, "no float32 engine is that close to another"
    result = json.loads(strict.stdout)
    assert (result["outcome"], result["tolerances"]["sha256"]) == ("failed", sha256_file(mine))
    failed = {check["name"] for check in result["parity"][0]["verdict"]["checks"] if not check["passed"]}
    assert failed
    assert all(name.endswith(("kl_ref_test.mean", "kl_test_ref.mean")) for name in failed), "the other limits stay"


def test_inspect_describes_every_artefact(run: Path) -> None:
    for path, kind in ((run, "run"), (run / "convert" / "checkpoint", "moe checkpoint")):
        assert json.loads(moedge("inspect", path, "--json").stdout)["kind"] == kind
    bundle = json.loads(moedge("inspect", run / "export" / "ort-cpu", "--json").stdout)
    assert (bundle["kind"], bundle["holds"], bundle["target"]) == ("bundle", "moe", "ort-cpu")
    assert moedge("inspect", run / "export" / "ort-cpu").exit_code == 0


def test_stage_commands_give_what_the_run_gives(home: Path, run: Path, tmp_path: Path) -> None:
    settings = ("--windows", 4, "--length", 128, "--shared", 2, "--active", 3, "--experts", 8, "--k-a", 6)
    result = moedge("convert", home / "model", tmp_path / "moe", "--text", home / "text.txt", *settings)
    assert result.exit_code == 0, result.output
    assert hash_tree(tmp_path / "moe") == hash_tree(run / "convert" / "checkpoint")
    assert moedge("convert", home / "model", tmp_path / "moe", "--text", home / "text.txt").exit_code == 2
    result = moedge("export", tmp_path / "moe", tmp_path / "bundles", "--target", "portable", "--max-length", 256)
    assert result.exit_code == 0, result.output
    one, two = (hash_tree(path) for path in (tmp_path / "bundles" / "portable", run / "export" / "portable"))
    assert {name for name in two if one.get(name) != two[name]} <= {"manifest.json"}, "the manifest holds the label"
