"""``moedge export`` into a folder that already holds bundles."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import moedge as moedge_
from moedge import MoEdgeError
from moedge._files import hash_tree, write_json
from moedge.configs import tolerances
from moedge.export import bundle, pipeline, trace
from moedge.export.bundle import open_bundle
from moedge.export.manifest import ENGINE_SCHEMA
from moedge.runtime.cli import app
from moedge.runtime.commands import inspect


def moedge(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def out(tmp_path: Path, bundles: dict[str, Path]) -> Path:
    """What ``moedge export moe out`` leaves: portable and ort-cpu."""
    for target in ("portable", "ort-cpu"):
        shutil.copytree(bundles[f"moe/{target}"], tmp_path / "out" / target)
    return tmp_path / "out"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model was traced and a bundle opened, which reads all of its files."""
    found: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (found.update([name]), function(*given))[1])

    counted(trace, "trace")
    counted(bundle, "open_bundle")
    return found


@pytest.mark.parametrize("in_python", [False, True], ids=["command", "python"])
def test_another_target_joins_the_bundles_that_are_there(in_python, out, checkpoints, calls, monkeypatch) -> None:
    before, targets = hash_tree(out), ["openvino", "tensorrt-rtx"]
    monkeypatch.setattr(pipeline, "_versions", lambda: {"moedge": "1", "onnxruntime": "installed since"})
    if in_python:
        moedge_.export_model(checkpoints["moe"], out, targets)
    else:
        result = moedge("export", checkpoints["moe"], out, "--target", targets[0], "--target", targets[1])
        assert result.exit_code == 0, result.stderr
        assert "operators" not in result.stdout
    assert (calls["trace"], calls["open_bundle"]) == (0, 1)
    after = hash_tree(out)
    assert {name: after[name] for name in before} == before
    assert sorted(path.name for path in out.iterdir()) == ["openvino", "ort-cpu", "portable", "tensorrt-rtx"]
    assert open_bundle(out / "openvino").manifest.document()["parent"] == open_bundle(out / "portable").sha256


def test_a_portable_bundle_elsewhere_is_taken_only_if_it_is_of_this_export(tmp_path, bundles, checkpoints, calls):
    given = {"label": "moe", "portable": bundles["moe/portable"]}
    made = pipeline.export(checkpoints["moe"], tmp_path / "same", [], **given)
    assert hash_tree(made["portable"]) == hash_tree(bundles["moe/portable"])
    assert calls["trace"] == 0
    others = ({"label": "other"}, {"max_length": 64}, {"portable": bundles["dense/portable"]})
    for number, other in enumerate(others, 1):
        made = pipeline.export(checkpoints["moe"], tmp_path / str(number), [], **{**given, **other})
        assert calls["trace"] == number
        facts = open_bundle(made["portable"]).manifest
        assert facts.kind == "moe"
        assert facts.label == other.get("label", "moe")
        assert facts.model.max_position_embeddings == other.get("max_length", 256)


def test_a_text_is_measured_once_for_all_targets(bundles, monkeypatch):
    from moedge.export.quantize import moments

    asked: list[Any] = []
    monkeypatch.setattr(moments, "moments", lambda source, windows: asked.append(windows) or {"w": windows})
    measured = pipeline._measured_once(open_bundle(bundles["moe/portable"]), np.ones((1, 2)))
    assert asked == []
    assert measured() is measured()
    assert len(asked) == 1


def test_a_lowering_that_fails_leaves_every_bundle_as_it_was(out, checkpoints, monkeypatch):
    from moedge.export.lowering.ort import cpu

    def fail(*_: Any, **__: Any) -> None:
        raise MoEdgeError("its self-test fails")

    monkeypatch.setattr(cpu, "lower", fail)
    before = hash_tree(out)
    with pytest.raises(MoEdgeError, match="its self-test fails"):
        moedge_.export_model(checkpoints["dense"], out, force=True)
    assert hash_tree(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_export_without_a_compiler_says_what_is_lost(out, checkpoints, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name == "g++" else which(name, *more))
    result = moedge("export", checkpoints["moe"], out, "--target", "ort-cpu", "--force")
    lines = [line for line in result.stdout.splitlines() if "operators" in line]
    assert lines == [
        "ort-cpu has none of MoEdge's operators: a gather skips no weights, experts are slower. The library of CPU "
        "operators is compiled with g++, which is not here: install it (Debian, Ubuntu: apt install g++)."
    ]


def test_more_tokens_than_the_model_has_positions_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    result = moedge("export", checkpoints["moe"], tmp_path / "out", "--max-length", 257)
    assert (result.exit_code, "--max-length 257 is beyond the model's 256" in result.stderr) == (2, True), result.stderr
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_self_tests_and_files_of_a_bundle(bundles: dict[str, Path]) -> None:
    manifest = open_bundle(bundles["moe/ort-cpu"]).manifest.document()
    facts = json.loads(moedge("inspect", bundles["moe/ort-cpu"], "--json").stdout)
    errors = [entry["self_test"] and entry["self_test"]["max_rel_error"] for entry in manifest["lowering"]]
    assert [row["self-test error"] for row in facts["lowering"]] == errors
    assert any(errors)
    assert {row["file"]: row["sha256"] for row in facts["files"]} == {
        name: entry["sha256"] for name, entry in manifest["files"].items()
    }
    assert (facts["kind"], facts["holds"], facts["target"]) == ("bundle", "moe", "ort-cpu")


def test_inspect_prints_layers_as_rows_and_facts_as_words(bundles: dict[str, Path]) -> None:
    said = moedge("inspect", bundles["moe/ort-cpu"]).stdout
    assert "{" not in said
    layers = open_bundle(bundles["moe/ort-cpu"]).manifest.layers
    header, row = said.partition("\nlayers\n")[2].splitlines()[:2]
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert shown == {"layer": f"0-{len(layers) - 1}", **{k: str(v) for k, v in layers[0].document().items()}}
    assert len({str(layer) for layer in layers.values()}) == 1, "else there are more rows"


def test_inspect_gives_layers_that_differ_rows_of_their_own() -> None:
    shapes = {"10": {"top_k": 3}, "8": {"top_k": 2}, "9": {"top_k": 2}, "12": {"top_k": 3}}
    rows = inspect._with_layers({"kind": "bundle", "moe": {"layers": shapes}})["layers"]
    assert [(row["layer"], row["top_k"]) for row in rows] == [("8-9", 2), ("10", 3), ("12", 3)]


def test_a_bundle_that_is_there_is_replaced_only_by_force(out: Path, checkpoints: dict[str, Path]) -> None:
    refused = moedge("export", checkpoints["moe"], out, "--target", "ort-cpu", "--target", "openvino")
    assert (refused.exit_code, "ort-cpu already exists" in refused.stderr) == (2, True)
    (out / "ort-cpu" / "model.onnx").write_bytes(b"damaged")
    assert moedge("export", checkpoints["moe"], out, "--target", "ort-cpu", "--force").exit_code == 0
    open_bundle(out / "ort-cpu")


def test_bundles_of_another_model_are_not_mixed(out: Path, checkpoints: dict[str, Path]) -> None:
    before = hash_tree(out)
    refused = moedge("export", checkpoints["dense"], out, "--target", "openvino")
    assert (refused.exit_code, "of another model" in refused.stderr) == (2, True)
    assert hash_tree(out) == before
    assert moedge("export", checkpoints["dense"], out, "--target", "openvino", "--force").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["openvino", "portable"], "stale bundles are dropped"


def test_a_folder_with_other_files_is_left_alone(out: Path, checkpoints: dict[str, Path]) -> None:
    (out / "mine.txt").write_text("keep")
    refused = moedge("export", checkpoints["moe"], out, "--target", "openvino")
    assert (refused.exit_code, "already exists and is not empty: mine.txt is no bundle" in refused.stderr) == (2, True)
    assert (out / "mine.txt").read_text() == "keep"


def as_engine(folder: Path, made: Path, **other: Any) -> Path:
    """An engine folder as ``moedge build`` writes it from the bundle in ``folder``."""
    facts = open_bundle(folder)
    taken = {
        name: facts.manifest.document()[name] for name in ("target", "kind", "label", "model", "moe", "checkpoint")
    }
    sizes = {"max_length": 64, "max_prompt": 32, "batch": 1}
    said = {"profiles": sizes, "compute_capabilities": [], "taps": {}, "versions": {}, "files": {}}
    write_json(made / "manifest.json", {"schema": ENGINE_SCHEMA, **taken, **said, "parent": facts.sha256, **other})
    return made


@pytest.mark.parametrize("force", [False, True])
def test_what_an_export_does_not_make_anew_stays_as_it_is(force, out, checkpoints, monkeypatch):
    """Also under --force, whatever else lies there: no byte is moved, copied or linked."""
    monkeypatch.setattr(pipeline, "_lower", lambda *_, **__: None)
    as_engine(out / "ort-cpu", out / "engine")
    as_engine(out / "ort-cpu", out / "engine-of-a-bundle-that-is-gone", parent="0" * 64)
    (out / ".DS_Store").write_text("made by the system")
    if force:
        as_engine(out / "ort-cpu", out / "engine-of-another-model", checkpoint="0" * 64)
        (out / "notes.txt").write_text("mine")
        (out / "old").mkdir()
        (out / "old" / "manifest.json").write_text('{"schema": "of another program"}')
    before = {path: path.stat().st_ino for path in out.rglob("*") if "another" not in str(path)}
    pipeline.export(checkpoints["moe"], out, ["openvino"], label="moe", force=force)
    after = {path: (path.stat().st_ino, path.stat().st_nlink) for path in out.rglob("*")}
    assert {path: number for path, (number, _) in after.items()} == {
        **before,
        out / "openvino": (out / "openvino").stat().st_ino,
    }
    assert all(links == 1 for path, (_, links) in after.items() if path.is_file())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"label": "new"}, "ort-cpu has the label 'moe', this export has 'new'; choose another output folder"),
        ({"max_length": 64}, "ort-cpu is for up to 256 tokens, this export for 64 (--max-length); choose"),
    ],
)
def test_bundles_of_another_graph_are_refused_before_anything_is_lowered(other, said, out, checkpoints, monkeypatch):
    monkeypatch.setattr(pipeline, "_lower", lambda *_, **__: pytest.fail("it took hours"))
    with pytest.raises(MoEdgeError) as refused:
        pipeline.export(checkpoints["moe"], out, ["openvino"], **{"label": "moe", **other})
    assert said in str(refused.value)


def test_force_never_deletes_the_checkpoint_or_the_text(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    shutil.copytree(checkpoints["moe"], tmp_path / "all" / "portable")
    (tmp_path / "all" / "text.txt").write_text("a\nb\n" * 3000)
    before = hash_tree(tmp_path)
    with pytest.raises(MoEdgeError, match="would be deleted"):
        pipeline.export(tmp_path / "all" / "portable", tmp_path / "all", ["ort-cpu"], label="x", force=True)
    on_text = ["--target", "ort-cpu-int4", "--gptq", tmp_path / "all" / "text.txt", "--gptq-tokens", 64]
    refused = moedge("export", checkpoints["moe"], tmp_path / "all", "--force", *on_text)
    assert (refused.exit_code, "would be deleted" in refused.stderr) == (2, True)
    assert hash_tree(tmp_path) == before


def test_a_form_of_experts_is_for_the_target_that_has_forms(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    refused = moedge("export", checkpoints["moe"], tmp_path / "out", "--target", "ort-cpu", "--expert-form", "native")
    assert (refused.exit_code, "--expert-form native is for target tensorrt, not" in refused.stderr) == (2, True)


def test_bfloat16_is_for_the_targets_that_have_a_choice(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for target, dtype, sentence in (
        ("ort-cpu", "bfloat16", "--half is for target tensorrt or tensorrt-rtx, not among ort-cpu"),
        ("tensorrt-rtx", "float32", "float16 or bfloat16, not 'float32'"),
    ):
        refused = moedge("export", checkpoints["moe"], tmp_path / "out", "--target", target, "--half", dtype)
        assert (refused.exit_code, sentence in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_bundle_in_bfloat16_is_verified_by_limits_of_its_own(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    made = moedge("export", checkpoints["moe"], tmp_path / "out", "--target", "tensorrt-rtx", "--half", "bfloat16")
    assert made.exit_code == 0, made.stderr
    (tmp_path / "text.txt").write_text("Once upon a time there was a village near the sea. " * 20)
    on_text = ["--text", tmp_path / "text.txt", "--tokens", 64, "--window", 64, "--prefill", 56]
    done = moedge("verify", checkpoints["moe"], tmp_path / "out" / "tensorrt-rtx", *on_text, "--json")
    (entry,) = json.loads(done.stdout)["parity"]
    limits = tolerances.load().profile("float32", "tensorrt-rtx", "bfloat16")
    assert entry["tolerances"] == limits.model_dump()
    assert entry["test"]["dtype"] == "bfloat16"
    error = (entry["replay"] or entry)["overall"]["rel_error"]["p50"]
    float16 = tolerances.load().profile("float32", "tensorrt-rtx", "float16")
    assert float16.median_rel_error / 8 < error < limits.median_rel_error


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("ort-cpu", ("--tensorrt", "10.13"), "--tensorrt is for target tensorrt, not among ort-cpu"),
        ("openvino", ("--stock-operators",), "--stock-operators is for target ort-cpu or ort-cpu-int8 or ort-cpu-int4"),
        ("ort-cpu-int4", ("--gptq-tokens", 128), "name it with --gptq TEXT"),
    ],
)
def test_options_without_effect_are_refused(target, options, said, checkpoints, tmp_path):
    refused = moedge("export", checkpoints["moe"], tmp_path / "out", "--target", target, *options)
    assert (refused.exit_code, said in " ".join(refused.stderr.split())) == (2, True), refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--expert-form", "sparse"), "No form of experts is called 'sparse'; known: plugins, native, merged."),
        (("--tensorrt", "ten"), "'ten' is no version of TensorRT; write it like 10.13."),
    ],
)
def test_names_that_do_not_exist_are_refused_before_the_model_is_traced(options, said, checkpoints, tmp_path):
    refused = moedge("export", checkpoints["moe"], tmp_path / "out", "--target", "tensorrt", *options)
    assert refused.exit_code == 2
    assert said in " ".join(refused.stderr.split())
    assert "tracing" not in refused.stderr
