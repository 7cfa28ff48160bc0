"""The command line: quick help without heavy packages, and one clear line instead of a traceback for bad input."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from moedge._files import hash_tree, write_json
from moedge.convert.methods import METHODS
from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan
from moedge.runtime import commands
from moedge.runtime.cli import COMMANDS, INTERRUPTED, app, load
from moedge.runtime.report.checks import junit_xml

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "scipy", "matplotlib", "accelerate", "gguf", "huggingface_hub")
BLOCKED = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"blocked by the test: {{name}}")

sys.meta_path.insert(0, Block())
from moedge.runtime.cli import main
sys.argv[0] = "moedge"
main()
"""


def moedge(*arguments: str) -> Any:
    """Run the command in this process; an exception that is not a clean exit fails the test."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def without_heavy_packages(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_works_without_torch_and_lists_every_command() -> None:
    result = without_heavy_packages("--help")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^│ ([a-z][a-z-]*)  ", result.stdout, re.MULTILINE) == list(COMMANDS)


def test_every_file_of_a_command_is_registered() -> None:
    files = {module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")}
    assert files == {name.replace("-", "_") for name in COMMANDS}


def imported(*arguments: str) -> set[str]:
    """The files of commands that a call imports."""
    code = (
        "import sys\nfrom moedge.runtime.cli import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    names = re.findall(r"^moedge\.runtime\.commands\.(\w+)$", result.stderr, re.MULTILINE)
    return {name for name in names if not name.startswith("_")}


def test_a_command_is_imported_when_it_is_called() -> None:
    """So `moedge --help` is quick however many commands there are, and whatever they import."""
    assert imported("--help") == set()
    assert imported("export-hf", "--help") == {"export_hf"}


def test_the_block_of_heavy_packages_works() -> None:
    """Otherwise the tests around this one could not fail."""
    code = BLOCKED.split("from moedge")[0] + "import torch"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "blocked by the test: torch" in result.stderr


def test_every_runtime_module_imports_without_heavy_packages() -> None:
    """A device has none of them; what needs one imports it when it is called."""
    code = BLOCKED.split("from moedge")[0] + (
        "import importlib, pkgutil, moedge.runtime\n"
        "for module in pkgutil.walk_packages(moedge.runtime.__path__, 'moedge.runtime.'):\n"
        "    importlib.import_module(module.name); print(module.name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 20


def test_python_m_works_and_prints_the_version() -> None:
    command = [sys.executable, "-m", "moedge.runtime.cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split()[0]) == (0, "moedge")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(command: str) -> None:
    result = moedge(command, "--help")
    assert result.exit_code == 0
    assert f"moedge {command}" in result.output.split("Example")[1]
    summary = str(load(command).help).split("\n\n")[0]
    assert COMMANDS[command].summary == " ".join(summary.split()), "the list of commands says what the command says"


def test_dry_run_and_recipe_errors_need_no_torch(tmp_path: Path) -> None:
    result = without_heavy_packages("run", "smollm2-135m", "--dry-run", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    for stage in ("source", "calibrate", "convert", "export", "evaluate", "verify", "bench", "report"):
        assert stage in result.stdout
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.yaml").write_text("model: {source: asset:wiki}\nconvert: {active: 99}\n")
    result = without_heavy_packages("run", str(tmp_path / "bad.yaml"))
    assert result.returncode == 2
    assert "convert.active: 99 active experts cannot be chosen" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_works_without_torch() -> None:
    result = without_heavy_packages("doctor", "--json")
    assert result.returncode == 0, result.stderr
    assert {"portable", "ort-cpu"} <= {target["target"] for target in json.loads(result.stdout)["targets"]}


def test_methods_lists_every_parameter_without_torch() -> None:
    result = without_heavy_packages("methods", "--json")
    assert result.returncode == 0, result.stderr
    listed = json.loads(result.stdout)
    assert set(listed) == set(METHODS)
    for name, entry in listed.items():
        fields = METHODS[name].params.model_fields
        assert [row["name"] for row in entry["params"]] == list(fields)
        assert (
            METHODS[name].params(**{row["name"]: row["default"] for row in entry["params"]}) == METHODS[name].params()
        )
    assert listed["moedge"]["needs"] == ["tokens"]
    words = {row["name"]: row["values"] for row in listed["expertweaver"]["params"]}
    assert words["tau_percentile"] == "number | null, at least 0, at most 100"
    assert words["signal"] == "abs | signed"
    assert words["tasks"] == "list of whole number | null"
    silent = [(name, row["name"]) for name, entry in listed.items() for row in entry["params"] if not row["meaning"]]
    assert not silent, "every parameter has a docstring"
    meanings = {row["name"]: row["meaning"] for row in listed["moedge"]["params"]}
    assert meanings["token_weight"].endswith("residual stream (moedge.convert.streaming.LayerTokens.weight).")
    assert "meaning" in moedge("methods", "moedge").stdout
    table = moedge("methods", "mlpmoe").stdout
    assert "2511.21089" in table
    assert "geometric" in table
    assert "reconstruction" in table
    assert "dense storage" in " ".join(table.replace("│", " ").split())
    assert "needs nothing besides the model" in table


def folder_with(path: Path, **config: Any) -> Path:
    write_json(path / "config.json", config)
    return path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "no-such-recipe"], "No recipe 'no-such-recipe'"),
        (["run", "{tmp}/latin.yaml"], "not UTF-8"),
        (["run", "smollm2-135m", "--redo", "magic", "--dry-run"], "--redo magic: no such stage; stages: source"),
        (["run", "smollm2-135m", "--from", "magic", "--dry-run"], "--from magic: no such stage"),
        (["run", "smollm2-135m", "--out", "{tmp}/file"], "exists and is not a folder"),
        (["run", "smollm2-135m", "--out", "{tmp}/used"], "is not empty and not a run folder"),
        (["run", "smollm2-135m", "--out", "{tmp}/file/run"], "choose a writable folder"),
        (["run", "{tmp}/missing-model.yaml"], "{tmp}/nothing does not exist"),
        (["run", "{tmp}/unknown-asset.yaml"], "Unknown asset 'nothing'; known: "),
        (["run", "{tmp}/indivisible.yaml"], "convert.experts: 16 does not divide the FFN width 100"),
        (["run", "{tmp}/tolerances.yaml"], "verify.tolerances: No tolerance profile 'int3/torch'"),
        (["convert", "{tmp}/nothing", "{tmp}/out"], "{tmp}/nothing does not exist"),
        (
            ["convert", "{tmp}/model", "{tmp}/out", "--shared", "16"],
            ": --active: 6 active experts cannot",
        ),
        (["convert", "{tmp}/model", "{tmp}/out"], ": --experts: 16 does not divide the FFN width 100"),
        (["convert", "asset:smollm2-135m-instruct", "{tmp}/used"], "pass --force to replace it"),
        (["convert", "asset:smollm2-135m-instruct", "{tmp}/out", "--method", "magic"], "unknown value 'magic'"),
        (
            ["convert", "{tmp}/model", "{tmp}/out", "--set", "kA=3"],
            "--set kA: unknown key; known keys here: method, gather, s",
        ),
        (
            ["convert", "{tmp}/model", "{tmp}/out", "--set", "k_a=x"],
            ": --set k_a: must be a whole number, got 'x'",
        ),
        (["convert", "{tmp}/model", "{tmp}/out", "--set", "k_a"], "--set k_a: write KEY=VALUE"),
        (["convert", "{tmp}/model", "{tmp}/out", "--set", "k_a=["], "--set k_a=[: the value is not readable as YAML"),
        (["convert", "{tmp}/model", "{tmp}/out", "--k-a", "3", "--set", "k_a=3"], "k_a is given twice"),
        (
            ["convert", "{tmp}/model", "{tmp}/out", "--method", "mlpmoe", "--shared", "1"],
            ": --shared: unknown key",
        ),
        (["methods", "magic"], "Unknown method 'magic'; known: cmoe, "),
        (["export", "{tmp}/nothing", "{tmp}/out"], "Model {tmp}/nothing does not exist"),
        (["export", "{tmp}/used", "{tmp}/out"], "is not a checkpoint folder: it has no config.json"),
        (["finetune", "{tmp}/nothing", "{tmp}/out", "--tokens", "9"], "{tmp}/nothing does not exist"),
        (["estimate", "{tmp}/nothing", "--for", "a100"], "{tmp}/nothing does not exist"),
        (["convert", "{tmp}/model", "{tmp}/out", "--experts", "20", "--text", "{tmp}/used"], "/used is a folder"),
        (["export", "{tmp}/model", "{tmp}/out", "--target", "tpu"], "Unknown target 'tpu'; known: portable, ort-cpu"),
        (
            ["export", "{tmp}/model", "{tmp}/used"],
            "mine.txt is no bundle; choose another output folder, or pass --force",
        ),
        (["verify", "{tmp}/used"], "is not a run folder"),
        (["verify", "{tmp}/used", "{tmp}/used", "--prefill", "256"], "leaves nothing to decode"),
        (["verify", "{tmp}/used", "{tmp}/used"], "tokenizer.json is missing"),
        (["bench", "{tmp}/used"], "tokenizer.json is missing"),
        (["bench", "{tmp}/used", "{tmp}/bundles", "{tmp}/used"], "/used is given twice; name each engine once."),
        (["bench", "{tmp}/used", "--csv", "{tmp}/file/x.csv"], "--csv {tmp}/file/x.csv cannot be written"),
        (["verify", "{tmp}/used", "--markdown", "{tmp}/used"], "--markdown {tmp}/used is a folder"),
        (["verify", "{tmp}/used", "--save-reference", "{tmp}/file/x"], "--save-reference {tmp}/file/x cannot be"),
        (["evaluate", "{tmp}/used", "--save", "{tmp}/used"], "--save {tmp}/used is a folder"),
        (["diagnose", "{tmp}/used", "--save", "{tmp}/used"], "--save {tmp}/used is a folder"),
        (["diagnose", "{tmp}/used", "--plot", "{tmp}/file/x.svg"], "--plot {tmp}/file/x.svg cannot be written"),
        (["history", "{tmp}/used", "--html", "{tmp}/used"], "--html {tmp}/used is a folder"),
        (["generate", "{tmp}/nothing", "hi"], "{tmp}/nothing"),
        (
            ["generate", "{tmp}/used", "hi", "--engine", "tpu"],
            "--engine tpu: unknown; choose portable or ort-cpu or ort-cpu-int8",
        ),
        (["generate", "{tmp}/used", "hi", "--model", "big"], "--model big: unknown; choose moe or dense"),
        (["inspect", "{tmp}/nothing"], "{tmp}/nothing does not exist"),
        (["inspect", "{tmp}/used"], "is not a run folder, a checkpoint, a bundle, an engine or a model"),
        (["inspect", "{tmp}/bundles"], "It holds the bundles ort-cpu, portable; give one of them."),
        (["generate", "{tmp}/bundles", "hi"], "is missing. It holds the bundles ort-cpu, portable; give one of them."),
    ],
)
def test_bad_input_is_one_line_on_stderr(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    folder_with(tmp_path / "model", model_type="llama", intermediate_size=100)
    for target in ("portable", "ort-cpu"):
        write_json(tmp_path / "bundles" / target / "manifest.json", {})
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    recipes = {
        "missing-model": f"model: {{source: {tmp_path}/nothing}}",
        "unknown-asset": "model: {source: asset:nothing}",
        "indivisible": f"model: {{source: {tmp_path}/model}}",
        "tolerances": "model: {source: asset:smollm2-135m-instruct}\nverify: {tolerances: int3}",
    }
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    before = sorted(path for path in tmp_path.rglob("*"))
    result = moedge(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert sentence.format(tmp=tmp_path) in lines[0]
    assert sorted(path for path in tmp_path.rglob("*")) == before, "a refused command leaves nothing behind"


@pytest.mark.parametrize("key", ["model.source", "text.calibration", "text.held_out"])
def test_a_run_never_deletes_what_it_reads(tmp_path: Path, key: str) -> None:
    """A stage replaces its folder: a model or text in there would be gone before it is read."""
    model = folder_with(tmp_path / "run" / "convert" / "checkpoint", model_type="llama", intermediate_size=96)
    text = model / "text.txt"
    text.write_text("a\nb\n")
    (tmp_path / "run" / "run.json").write_text("{}")
    values: dict[str, Any] = {"model.source": str(model), "text.calibration": str(text), "text.held_out": [str(text)]}
    recipe: dict[str, Any] = {"model": {"source": "asset:smollm2-135m-instruct"}}
    section, name = key.split(".")
    recipe.setdefault(section, {})[name] = values[key]
    write_json(tmp_path / "recipe.yaml", recipe)  # JSON is YAML
    before = hash_tree(tmp_path)
    result = moedge("run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))
    assert (result.exit_code, "would be deleted" in result.stderr) == (2, True), result.stderr
    assert hash_tree(tmp_path) == before


@pytest.mark.parametrize("arguments", [["run"], ["bench", "x", "--repeats", "2"], ["frobnicate"], ["run", "x", "--no"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    assert moedge(*arguments).exit_code == 2


def test_a_mass_of_nothing_is_refused_as_the_help_says() -> None:
    assert "0 is not above 0 and at most 1" in moedge("generate", "nothing", "hi", "--top-p", "0").stderr


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from moedge.runtime.commands import inspect, run

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "execute", interrupted)
    result = moedge("run", "smollm2-135m", "--out", "/tmp/never-made")
    assert result.exit_code == INTERRUPTED
    assert "Resume with the same command" in result.stderr
    monkeypatch.setattr(inspect, "local", interrupted)
    result = moedge("inspect", "anything")  # has nothing to go on from
    assert (result.exit_code, "Interrupted" in result.stderr, "Resume" in result.stderr) == (INTERRUPTED, True, False)


def test_sigterm_leaves_no_partial_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from moedge._files import atomic_dir\n"
        "from moedge.runtime import cli\n"
        "def app():\n"
        "    with atomic_dir(pathlib.Path(sys.argv[1])):\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        child.terminate()
        assert child.wait(30) == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/model"), "No space left on device (/x/model);"),
        (
            SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
            "No space left on device;",
        ),
        (OSError("8192 requested and 4600 written"), "No space left on device;"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "Is a directory (/x);"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"), "Not a directory (/x/y);"),
        (FileExistsError(errno.EEXIST, "File exists", "/x"), "File exists (/x);"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "File name too long (/x);"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"), "Too many levels of symbolic links (/x);"),
        (MemoryError(), "Out of memory"),
    ],
)
def test_a_full_disk_or_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    from moedge.runtime.commands import run

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run, "execute", fail)
    result = moedge("run", "smollm2-135m", "--out", "/tmp/never-made")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 2, "what runs where, and one error line"
    assert f"error: {said}" in result.stderr


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from moedge.runtime.commands import run

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(run, "execute", fail)
    with pytest.raises(ValueError, match="a mistake of ours"):
        moedge("run", "smollm2-135m", "--out", "/tmp/never-made")


def test_estimate_counts_the_parameters_of_the_default_model() -> None:
    from moedge.configs.recipe import load_recipe
    from moedge.runtime.commands.run import estimate

    config = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    recipe = load_recipe("smollm2-135m")
    copies = 2 + 2 * len(recipe.export.targets)
    # 134.5 M parameters (docs/assets.md), in float32; norms are left out of the estimate.
    assert estimate(config, recipe)["disk"] == pytest.approx(copies * 4 * 134.5e6, rel=1e-3)
    assert 1.5e9 < estimate(config, recipe)["memory"] < 8 * 2**30


def toy_plan() -> MoEPlan:
    layer = LayerPlan(
        shared=np.arange(4, dtype=np.int32),
        experts=[np.arange(4, 8, dtype=np.int32), np.arange(8, 12, dtype=np.int32)],
        top_k=1,
        router=RouterPlan("linear", {"weight": np.ones((2, 3), dtype=np.float32)}),
        report={"dead_share": 0.25},
    )
    model = {"model_type": "llama", "hidden_size": 3, "intermediate_size": 12, "num_layers": 2, "hidden_act": "silu"}
    return MoEPlan("cmoe", {"shared": 1, "active": 1, "experts": 3}, model, [layer, layer])


def test_device_profiles_are_listed_as_json() -> None:
    (first, *_) = json.loads(moedge("build", "--list", "--json").stdout)
    assert (first["schema"], first["name"]) == ("moedge.device/1", "a100")


def test_inspect_shows_a_plan_and_refuses_a_changed_one(tmp_path: Path) -> None:
    toy_plan().save(tmp_path)
    facts = json.loads(moedge("inspect", str(tmp_path), "--json").stdout)
    assert facts["plan"] == toy_plan().sha256
    assert json.loads(moedge("inspect", str(tmp_path / "plan.json"), "--json").stdout) == facts
    assert [layer["active"] for layer in facts["layers"]] == pytest.approx([8 / 12, 8 / 12])
    assert "linear" in moedge("inspect", str(tmp_path)).stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["layers"][0]["top_k"] = 2
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = moedge("inspect", str(tmp_path))
    assert (result.exit_code, "does not match its own hash" in result.stderr) == (2, True)


def test_inspect_shows_a_run(tmp_path: Path) -> None:
    from moedge.configs.recipe import load_recipe

    write_json(tmp_path / "run.json", {"schema": "moedge.run/1", "recipe": load_recipe("smollm2-135m").model_dump()})
    write_json(tmp_path / "evaluate" / "evaluation.json", {"a": 1})
    record = {"stage": "evaluate", "seconds": 2.5, "key": "0" * 64, "outputs": hash_tree(tmp_path / "evaluate")}
    write_json(tmp_path / "evaluate" / "stage.json", record)
    facts = json.loads(moedge("inspect", str(tmp_path), "--json").stdout)
    assert [stage["stage"] for stage in facts["stages"]] == ["evaluate"]
    assert facts["model"] == "asset:smollm2-135m-instruct"
    assert "passed" not in facts, "there is no report yet"
    for verdict in (True, False):
        write_json(tmp_path / "report.json", {"passed": verdict})
        assert json.loads(moedge("inspect", str(tmp_path), "--json").stdout)["passed"] is verdict


def test_inspect_shows_a_study_and_the_stages_of_a_frontier(tmp_path: Path) -> None:
    from moedge.configs.study import load_study

    study = load_study("smollm2-135m-methods").model_dump(mode="json")
    write_json(tmp_path / "run.json", {"schema": "moedge.study/1", "study": study})
    names = ["calibrate", "frontier/gather/convert"]
    for number, name in enumerate(names):
        write_json(tmp_path / name / "stage.json", {"stage": name, "seconds": 1.0, "key": "0" * 64, "outputs": {}})
        os.utime(tmp_path / name / "stage.json", (number, number))
    write_json(tmp_path / "frontier" / ".gather.1.partial" / "stage.json", {})
    facts = json.loads(moedge("inspect", str(tmp_path), "--json").stdout)
    assert (facts["kind"], facts["name"], facts["model"]) == ("study", study["name"], "asset:smollm2-135m-instruct")
    assert [stage["stage"] for stage in facts["stages"]] == names
    write_json(tmp_path / "run.json", {"schema": "moedge.run/1"})
    result = moedge("inspect", str(tmp_path))
    assert (result.exit_code, "run.json is damaged: it does not say what was run" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate"],
        ["diagnose"],
        ["verify"],
        ["estimate", "--for", "rtx-4090"],
        ["verify", "--save-reference", "{tmp}/ref.safetensors"],
    ],
)
def test_a_run_whose_checkpoints_are_elsewhere_names_them(tmp_path: Path, command: list[str]) -> None:
    """Such as of `moedge tune`."""
    run, other = tmp_path / "run", tmp_path / "run" / "tuned" / "checkpoint"
    write_json(run / "run.json", {})
    write_json(run / "source" / "source.json", {"folder": str(folder_with(tmp_path / "model", model_type="llama"))})
    arguments = [argument.format(tmp=tmp_path) for argument in command]
    assert f"Run {run} has no convert/checkpoint; finish it with" in moedge(*arguments, str(run)).stderr
    toy_plan().save(folder_with(other, model_type="llama"))
    assert f"Run {run} has no convert/checkpoint; give one of its checkpoints: {other}." in (
        moedge(*arguments, str(run)).stderr
    )


def test_junit_counts_every_check_and_names_the_failed_ones() -> None:
    checks = [
        {"name": "decode.kl", "value": 1e-9, "relation": "<=", "limit": 1e-6, "passed": True},
        {"name": "decode.top1 <&>", "value": None, "relation": ">=", "limit": 1.0, "passed": False},
    ]
    identity = {"name": "a = b", "max_rel_error": 1e-6, "limit": 1e-5, "passed": True}
    result = {"identity": [identity], "parity": [{"name": "a vs b", "verdict": {"passed": False, "checks": checks}}]}
    suite = ElementTree.fromstring(junit_xml(result))
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed == ["decode.top1 <&>"]
    checks[1]["decided"] = False  # no pass, and a CI server says why
    suite = ElementTree.fromstring(junit_xml(result))
    (failure,) = suite.iter("failure")
    assert (failure.get("message") or "").startswith("not decided: decode.top1 <&> is None")


def test_junit_holds_what_was_not_run_as_skipped(sample_runs: Any) -> None:
    result = sample_runs("no <padding> here").verification()
    suite = ElementTree.fromstring(junit_xml(result))
    (one, _) = (case for case in suite.iter("testcase") if case.find("skipped") is not None)
    assert (one.get("classname"), one.get("name")) == ("ort-cpu moe in other shapes", "batch.chunked")
    assert [skipped.get("message") for skipped in suite.iter("skipped")] == ["no <padding> here"] * 2
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names.count("batch.padding.prefill.rel_error.mean") == 2
    assert (suite.get("tests"), suite.get("skipped"), suite.get("failures")) == (str(len(names)), "2", "0")
