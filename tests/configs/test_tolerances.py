"""A user's limits: laid over the packaged ones, in the result with their hash, part of what makes a result stale."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.configs.recipe import parse_recipe

SCHEMA = "moedge.tolerances/1"


def write(path: Path, profiles: Any, **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"schema": SCHEMA, "profiles": profiles, **more}), encoding="utf-8")
    return path


def test_a_limit_that_the_file_does_not_name_stays(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", {"float32/ort-cpu": {"mean_kl": 2e-9, "expert_set_agreement": None}})
    packaged, mine = tolerances.load(), tolerances.load(file)
    before, after = (found.profile("float32", "ort-cpu").model_dump() for found in (packaged, mine))
    assert {key for key in before if before[key] != after[key]} == {"mean_kl", "expert_set_agreement"}
    assert after["mean_kl"] == 2e-9
    assert {**mine.profiles, "float32/ort-cpu": None} == {**packaged.profiles, "float32/ort-cpu": None}
    assert packaged.origin is None
    assert mine.origin is not None
    assert mine.origin.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert mine.origin.profiles == {"float32/ort-cpu": {"mean_kl": 2e-9, "expert_set_agreement": None}}


@pytest.mark.parametrize(
    ("profiles", "more", "says"),
    [
        ({"float32/ort-cpu": {"mean_kl": 0}}, {}, "profiles.float32/ort-cpu.mean_kl: must be more than 0, got 0."),
        ({"float32/ort-cpu": {"mean_kl": float("nan")}}, {}, "profiles.float32/ort-cpu.mean_kl: must be "),
        (
            {"float32/ort-cpu": {"mean_kl": "much"}},
            {},
            "profiles.float32/ort-cpu.mean_kl: must be a number, got 'much'",
        ),
        ({"float32/ort-cpu": 3}, {}, "profiles.float32/ort-cpu: must be a mapping of keys, got 3."),
        ({"float32/ort-cpuu": {"mean_kl": 1}}, {}, "has that name (nearest: float32/ort-cpu), so every limit must be"),
        ([], {}, "profiles: must be a mapping of keys, got a list."),
        ({}, {"schema": "other/1"}, "schema: unknown value 'other/1'; choose 'moedge.tolerances/1'."),
        ({}, {"profile": {}}, "profile: unknown key; known keys here: schema, profiles (nearest: profiles)."),
        (
            {"float32/ort-cpu": {"expert_set_agreement": None, "router_set_agreement": None}},
            {},
            "profiles.float32/ort-cpu: give expert_set_agreement, router_set_agreement or both.",
        ),
    ],
)
def test_what_is_unknown_or_impossible_is_refused_with_its_path(
    profiles: Any, more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "mine.yaml", profiles, **more)
    with pytest.raises(MoEdgeError) as refusal:
        tolerances.load(file)
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"{file}: ")
    assert says in line


def test_the_command_takes_a_profile_or_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", {"float32/ort-cpu": {"mean_kl": 2e-9}})
    assert tolerances.given_as("float32") == "float32"
    assert tolerances.given_as(file) == tolerances.Given(profile="float32", file=str(file))
    with pytest.raises(MoEdgeError, match="No tolerances file 'float23'; give the path of one, or float32 or "):
        tolerances.given_as("float23")


def test_a_recipe_names_a_profile_or_a_file_with_it() -> None:
    def given(text: str) -> Any:
        return parse_recipe(f"model: {{source: x}}\nverify: {{tolerances: {text}}}", where="r.yaml").verify.tolerances

    assert given("float32") == "float32"
    assert given("{file: my.yaml}") == tolerances.Given(profile="float32", file="my.yaml")
    for text, says in (
        ("{profile: float32}", "r.yaml: verify.tolerances.file: is required."),
        ("{file: 3}", "r.yaml: verify.tolerances.file: must be text, got 3."),
        ("{file: x, profil: y}", "verify.tolerances.profil: unknown key; known keys here: profile, file, sha256 (near"),
        ("3", "r.yaml: verify.tolerances: must be text, got 3."),
    ):
        with pytest.raises(MoEdgeError) as refusal:
            given(text)
        assert says in str(refusal.value)


def test_another_file_than_the_one_that_is_pinned_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", {"float32/ort-cpu": {"mean_kl": 2e-9}})
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = tolerances.Given(file=str(file), sha256=sha256)
    assert tolerances.chosen(pinned)[1].profile("float32", "ort-cpu").mean_kl == 2e-9
    write(file, {"float32/ort-cpu": {"mean_kl": 1.0}})
    with pytest.raises(MoEdgeError, match="it was changed"):
        tolerances.chosen(pinned)


def test_the_file_is_part_of_the_key_of_verify_alone(tmp_path: Path) -> None:
    from moedge.runtime.run import stages

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = tmp_path / "mine.yaml"

    def params(given: str) -> dict[str, Any]:
        text = f"model: {{source: {tmp_path / 'model'}}}\nverify: {{tolerances: {given}}}"
        return {stage.name: stage.params for stage in stages.build(parse_recipe(text), {})}

    plain = params("float32")
    assert plain["verify"]["tolerances"] == "float32"
    found = []
    for limit in (2e-9, 3e-9):
        write(file, {"float32/ort-cpu": {"mean_kl": limit}})
        found.append(params(f"{{file: {file}}}"))
    one, two = found
    assert {name for name in one if one[name] != two[name]} == {"verify"}
