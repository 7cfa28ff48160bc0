"""Recipes: the packaged ones are valid, everything else is refused with the key's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from moedge import MoEdgeError
from moedge.configs.files import packaged
from moedge.configs.recipe import ControlName, Recipe, conversion_from, load_recipe, parse_recipe, recipe_from
from moedge.convert.methods import METHODS
from moedge.export import targets

MINIMAL = "model: {source: asset:x}\n"


@pytest.mark.parametrize("name", packaged("recipe"))
def test_packaged_recipes_load_and_are_named_after_their_file(name: str) -> None:
    assert load_recipe(name).name == name
    assert load_recipe(packaged("recipe")[name]) == load_recipe(name)


def test_the_recipe_of_cmoe_writes_out_every_default() -> None:
    recipe = load_recipe("smollm2-135m-cmoe")
    assert recipe == parse_recipe("model: {source: asset:smollm2-135m-instruct}", name="smollm2-135m-cmoe")


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-cmoe"])
def test_the_first_recipes_write_out_every_key(name: str) -> None:
    """A reader of the file must see all there is: no hidden key, and a comment on every line that sets one."""
    text = packaged("recipe")[name].read_text(encoding="utf-8")
    assert yaml.safe_load(text) == load_recipe(name).model_dump()
    for line in text.splitlines():
        sets_a_value = ":" in line and not line.rstrip().endswith(":")
        assert not sets_a_value or "#" in line, line


def test_a_recipe_without_a_name_takes_its_file_name(tmp_path: Path) -> None:
    (tmp_path / "my try.yaml").write_text(MINIMAL)
    assert load_recipe(tmp_path / "my try.yaml").name == "my-try"


@pytest.mark.parametrize(
    ("text", "path", "sentence"),
    [
        ("model: {source: x}\ncolour: 1", "colour", "unknown key; known keys here: name, model"),
        ("model: {source: x, file: y}", "model.file", "unknown key; known keys here: source, revision"),
        ("convert: {k_a: 3}", "model", "is required"),
        ("model: {}", "model.source", "is required"),
        ("model: {source: ''}", "model.source", "must not be empty"),
        ("model: 3", "model", "must be a mapping of keys, got 3"),
        ("model: {source: x}\nexport: null", "export", "must be a mapping of keys, got nothing"),
        ("model: {source: x}\nconvert: {shared: '6'}", "convert.shared", "must be a whole number, got '6' (text)"),
        ("model: {source: x}\nconvert: {shared: 6.0}", "convert.shared", "must be a whole number, got 6.0"),
        ("model: {source: x}\nconvert: {shared: true}", "convert.shared", "must be a whole number, got True"),
        ("model: {source: x}\nconvert: {shared: [6]}", "convert.shared", "must be a whole number, got a list"),
        ("model: {source: x}\nconvert: {shared: -1}", "convert.shared", "must be at least 0, got -1"),
        ("model: {source: x}\nconvert: {k_a: 0}", "convert.k_a", "must be at least 1, got 0"),
        ("model: {source: x}\nconvert: {active: 0}", "convert.active", "must be at least 1, got 0"),
        ("model: {source: x}\nconvert: {method: magic}", "convert.method", "unknown value 'magic'; choose cmoe, "),
        ("model: {source: x}\nconvert: {method: [cmoe]}", "convert.method", "unknown value"),
        (
            "model: {source: x}\nconvert: {method: mlpmoe, shared: 3}",
            "convert.shared",
            "unknown key; known keys here: method, gather, br",
        ),
        ("model: {source: x}\nconvert: {method: mlpmoe, p_max: 1.1}", "convert.p_max", "must be at most 1"),
        ("model: {source: x}\nconvert: {method: mlpmoe, p_max: 1, fade: geometric}", "convert.p_max", "leaves nothing"),
        ("model: {source: x}\nconvert: {method: mlpmoe, block: [1]}", "convert.block", "at least 2 entries, got 1"),
        ("model: {source: x}\nconvert: {method: mlpmoe, block: [1, 2, 3]}", "convert.block", "at most 2 entries"),
        ("model: {source: x}\nconvert: {method: mlpmoe, structure: '2:5'}", "convert.structure", "'2:4'"),
        (
            "model: {source: x}\nconvert: {method: mlpmoe, structure: '2:4', order: neurons}",
            "convert.order",
            "scatters a branch",
        ),
        ("model: {source: x}\nconvert: {variant: code}", "convert.variant", "choose 'paper' or 'released'"),
        ("model: {source: x}\nconvert: {method: mlpmoe, p_max: .nan}", "convert.p_max", "must be a finite number"),
        ("model: {source: x}\nconvert: {method: mlpmoe, branches: 2, keep: 3}", "convert.keep", "3 exceeds branches"),
        ("model: {source: x}\nconvert: {method: expertweaver, eps: 0}", "convert.eps", "must be more than 0"),
        ("model: {source: x}\nconvert: {method: expertweaver, k: 65}", "convert.k", "65 exceeds experts = 64"),
        ("model: {source: x}\nconvert: {method: expertweaver, tasks: [a]}", "convert.tasks[0]", "must be a whole"),
        ("model: {source: x}\nconvert: {method: moedge, active: 11}", "convert.active", "leave 10 to route to"),
        ("model: {source: x}\nconvert: {method: moedge, refit: false, fit_to: stream}", "convert.fit_to", "needs"),
        (
            "model: {source: x}\nconvert: {method: moedge}\ncalibration: {windows: 1}",
            "calibration.windows",
            "moedge compares windows; it needs at least 2",
        ),
        (
            "model: {source: x}\nconvert: {method: expertweaver}\ncalibration: {windows: 1}",
            "calibration.windows",
            "expertweaver compares windows; it needs at least 2",
        ),
        ("model: {source: x}\nconvert: {active: 11}", "convert.active", "16 experts minus 6 shared leave 10"),
        ("model: {source: x}\nconvert: {shared: 16, active: 1}", "convert.active", "leave 0 to route to"),
        ("model: {source: x}\nconvert: {shared: 20, active: 1}", "convert.active", "leave 0 to route to"),
        (
            "model: {source: x}\nexport: {targets: [portable, tpu]}",
            "export.targets[1]",
            "unknown value 'tpu'; choose 'portable', 'ort-cpu', 'ort-cpu-int8', 'ort-cpu-int4', 'ort-cuda',",
        ),
        ("model: {source: x}\nexport: {targets: [ort-cuda-int4]}", "export.targets", "ort-cuda-int4 does not exist"),
        ("model: {source: x}\nexport: {targets: []}", "export.targets", "must not be empty"),
        ("model: {source: x}\nexport: {targets: [portable, portable]}", "export.targets", "names a target twice"),
        ("model: {source: x}\nexport: {targets: portable}", "export.targets", "must be a list, got 'portable'"),
        ("model: {source: x}\nexport: {dense_parent: 1}", "export.dense_parent", "must be true or false, got 1"),
        ("model: {source: x}\nverify: {tokens: 2047}", "verify.tokens", "must be at least 2048, got 2047"),
        ("model: {source: x}\nverify: {prefill: 256}", "verify.prefill", "leaves nothing to decode"),
        ("model: {source: x}\nbench: {repeats: 2}", "bench.repeats", "must be at least 3, got 2"),
        ("model: {source: x}\nbench: {prompt: 2020}", "bench.prompt", "needs 2052 cache positions"),
        ("model: {source: x}\nevaluate: {tokens: 100}", "evaluate.tokens", "less than one window"),
        ("model: {source: x}\nevaluate: {seeds: []}", "evaluate.seeds", "must not be empty"),
        ("model: {source: x}\nevaluate: {seeds: [0, -1]}", "evaluate.seeds[1]", "must be at least 0, got -1"),
        ("model: {source: x}\ntext: {held_out: [a, a]}", "text.held_out", "names a text twice"),
        ("model: {source: x}\ntext: {calibration: [a, a]}", "text.calibration", "names a text twice"),
        ("model: {source: x}\ntext: {calibration: []}", "text.calibration", "must not be empty"),
        (
            "model: {source: x}\ntext: {calibration: [a, b, c]}\ncalibration: {windows: 2}",
            "calibration.windows",
            "3 texts",
        ),
        ("name: ../../etc\nmodel: {source: x}", "name", "is not a plain name"),
        ("name: ''\nmodel: {source: x}", "name", "must not be empty"),
        ("model: {source: x, device: gpu}", "model.device", "'gpu' is not a device of PyTorch; give cpu, cuda or"),
    ],
)
def test_bad_values_are_refused_with_their_path(text: str, path: str, sentence: str) -> None:
    with pytest.raises(MoEdgeError) as refusal:
        parse_recipe(text, where="r.yaml")
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"r.yaml: {path}: "), line
    assert sentence in line
    assert line.endswith(".")


@pytest.mark.parametrize("method", ["gather", "cmoe", "mlpmoe"])
def test_methods_that_compare_no_windows_take_one(method: str) -> None:
    text = f"model: {{source: x}}\nconvert: {{method: {method}}}\ncalibration: {{windows: 1}}"
    assert parse_recipe(text, where="r.yaml").calibration.windows == 1


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(MoEdgeError) as refusal:
        parse_recipe("model: {source: x, a: 1}\nconvert: {k_a: x}\nb: 1", where="r.yaml")
    assert [line.split(": ")[1] for line in str(refusal.value).splitlines()] == ["model.a", "convert.k_a", "b"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {source: x}\nmodel: {source: y}", "line 2: the key 'model' is given twice"),
        ("model: {source: x, source: y}", "line 1: the key 'source' is given twice"),
        ("model: [", "line 1: "),
        ("[1, 2]", "this file holds a list"),
        ("", "this file holds nothing"),
        ("? [a]\n: 1", "not a readable YAML file"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_files_that_are_not_a_plain_yaml_mapping_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(MoEdgeError) as refusal:
        parse_recipe(text, where="r.yaml")
    assert str(refusal.value).startswith("r.yaml")
    assert sentence in str(refusal.value)


def test_a_missing_recipe_lists_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(MoEdgeError, match=r"one of: .*smollm2-135m"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(MoEdgeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def recipe(text: str = "") -> Recipe:
    return parse_recipe(MINIMAL + text)


@pytest.mark.parametrize(
    ("text", "config", "sentence"),
    [
        ("", {"intermediate_size": 1540}, "convert.experts: 16 does not divide the FFN width 1540; choose 14 or 20"),
        ("convert: {padding: uneven, k_a: 10}", {"intermediate_size": 9}, "convert.experts: 16 is more than"),
        (
            "convert: {method: mlpmoe}",
            {"intermediate_size": 8},
            "convert.branches: 16 is more than the FFN's 8 neurons",
        ),
        ("convert: {method: expertweaver}", {"intermediate_size": 96}, "convert.experts: 64 does not divide"),
        ("convert: {k_a: 65}", {"intermediate_size": 64}, "convert.k_a: 65 is more than the FFN's 64 neurons"),
        ("", {"max_position_embeddings": 1024}, "calibration.length: 2048 is beyond the model's 1024 positions"),
        ("calibration: {length: 64}", {"max_position_embeddings": 1024}, "export.max_length: 2048 is beyond"),
    ],
)
def test_what_only_the_model_can_tell_is_checked_against_its_config(
    text: str, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(MoEdgeError) as refusal:
        recipe(text).check_model(config, "r.yaml")
    assert sentence in str(refusal.value)
    assert all(line.startswith("r.yaml: ") for line in str(refusal.value).splitlines())


def test_models_that_fit_pass() -> None:
    fits = {"intermediate_size": 1536, "max_position_embeddings": 8192}
    recipe().check_model(fits, "r.yaml")
    recipe("convert: {padding: uneven}").check_model({**fits, "intermediate_size": 1540}, "r.yaml")


@pytest.mark.parametrize(
    ("export", "sentence"),
    [
        ("{build: [rtx-4090]}", "build needs the target tensorrt-rtx"),
        ("{targets: [tensorrt-rtx], build: [jetson-agx-orin]}", "TensorRT for RTX has no engines for"),
        ("{targets: [tensorrt-rtx], build: [rtx-9090]}", "No device 'rtx-9090'"),
        ("{targets: [tensorrt-rtx], build: [rtx-2080-ti], dtype: bfloat16}", "SM75.* has no bfloat16"),
        ("{targets: [tensorrt-rtx], dtype: float32}", "dtype"),
    ],
)
def test_engines_are_built_for_devices_that_take_them(export: str, sentence: str) -> None:
    with pytest.raises(MoEdgeError, match=sentence):
        recipe(f"export: {export}")
    made = recipe("export: {targets: [portable, tensorrt, tensorrt-rtx], build: [rtx-4090, rtx-3090]}")
    assert made.export.build == ["rtx-4090", "rtx-3090"]


def test_lists_of_choices_match_the_schema() -> None:
    everything = recipe(f"export: {{targets: [{', '.join(targets.names())}]}}")
    assert tuple(everything.export.targets) == targets.names()
    defaults = recipe()
    assert tuple(defaults.export.targets) == targets.default()
    assert set(defaults.evaluate.controls) < set(get_args(ControlName))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_recipe_of_its_own_parameters(name: str) -> None:
    made = recipe(f"convert: {{method: {name}}}")
    assert made.convert.model_dump() == {"method": name, "gather": None, **METHODS[name].params().model_dump()}
    assert recipe_from(made.model_dump(mode="json"), where="again") == made


def test_a_list_in_yaml_is_a_parameter_too() -> None:
    assert recipe("convert: {method: expertweaver, tasks: [0, 1]}").convert.model_dump()["tasks"] == (0, 1)


def test_a_surface_names_the_keys_in_a_refusal_as_its_users_write_them() -> None:
    value = {"name": "x", "model": {"source": "a"}, "convert": {"experts": 7, "active": 1, "shared": 1}}
    conversion = conversion_from(value, where="test")
    with pytest.raises(MoEdgeError) as caught:
        conversion.check_model({"intermediate_size": 1536}, "here", called=lambda key: f"<{key}>")
    assert str(caught.value).startswith("here: <convert.experts>: 7 does not divide the FFN width 1536;")
    assert str(caught.value).endswith("or set <convert.padding: uneven>.")
    value["convert"] = {"experts": "7"}
    with pytest.raises(MoEdgeError, match=r"^here: <convert\.experts>: must be a whole number"):
        conversion_from(value, where="here", called=lambda key: f"<{key}>")
    value |= {"convert": {"method": "moedge"}, "calibration": {"windows": 1}}
    with pytest.raises(MoEdgeError, match=r"^here: <calibration\.windows>: moedge compares windows"):
        conversion_from(value, where="here", called=lambda key: f"<{key}>")


def test_one_calibration_text_or_several_may_be_named() -> None:
    one, two = recipe("text: {calibration: a.txt}"), recipe("text: {calibration: [a.txt, b.txt]}")
    assert (one.text.calibration, two.text.calibration) == (["a.txt"], ["a.txt", "b.txt"])
    assert one.text.model_dump()["calibration"] == "a.txt", "keys of stages and old files stay as they are"
    for made in (one, two):
        assert recipe_from(made.model_dump(mode="json"), where="again") == made
