"""Every file and setting of a user is refused in the same words: where, what is wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from moedge import MoEdgeError
from moedge.configs import devices, study, tolerances
from moedge.configs.errors import checked, matching
from moedge.configs.files import packaged
from moedge.configs.recipe import recipe_from
from moedge.convert import methods


def as_recipe(key: str, folder: Path) -> None:
    recipe_from({"name": "x", "model": {"source": "x"}, "verify": {key: 1}}, where="r.yaml")


def as_parameter(key: str, folder: Path) -> None:
    recipe_from({"name": "x", "model": {"source": "x"}, "convert": {"method": "mlpmoe", key: 1}}, where="r.yaml")


def as_argument_of_a_method(key: str, folder: Path) -> None:
    model: Any = None  # parameters are checked before anything else
    methods.convert("mlpmoe", None, model, **{key: 1})


def changed(kind: Any, folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """The path of a packaged file after a change of its content."""
    content = yaml.safe_load(next(iter(packaged(kind).values())).read_text(encoding="utf-8"))
    change(content)
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "mine.yaml")


def as_study(key: str, folder: Path) -> None:
    study.load_study(changed("study", folder, lambda content: content["texts"][0].update({key: 1})))


def as_row_of_a_study(key: str, folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        next(row for row in content["rows"] if "method" in row)["set"] = {key: 1}

    study.load_study(changed("study", folder, change))


def as_device(key: str, folder: Path) -> None:
    devices.load(changed("device", folder, lambda content: content.update({key: 1})))


def as_tolerances(key: str, folder: Path) -> None:
    content = {"schema": "moedge.tolerances/1", "profiles": {"float32/ort-cpu": {key: 1}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    tolerances.load(folder / "mine.yaml")


def as_training(key: str, folder: Path) -> None:
    from moedge.runtime.commands.finetune import settings_from

    settings_from({"tokens": 64, key: 1})


def as_domains(key: str, folder: Path) -> None:
    from moedge.convert.methods.dive import DiveParams

    checked(DiveParams, {key: 1})


@pytest.mark.parametrize(
    ("refuse", "key", "path", "known", "near"),
    [
        (as_recipe, "windw", "r.yaml: verify.windw", "tokens, window", "window"),
        (as_parameter, "branchs", "r.yaml: convert.branchs", "method, gather, branches", "branches"),
        (as_argument_of_a_method, "branchs", "mlpmoe: branchs", "branches", "branches"),
        (as_study, "held_ot", "mine.yaml: texts[0].held_ot", "source, holdout_every", "held_out"),
        (as_row_of_a_study, "activ", "mine.yaml: rows: ", "method, ", "active"),
        (as_device, "memory_gb", "mine.yaml: memory_gb", "schema, name, label", "memory_gib"),
        (as_tolerances, "mean_kll", "mine.yaml: profiles.float32/ort-cpu.mean_kll", "near_tie_margin", "mean_kl"),
        (as_training, "lora_rnk", "--set lora_rnk", "rank, alpha", "rank"),
        (as_domains, "linkge", "linkge", "domains, ", "linkage"),
    ],
)
def test_an_unknown_key_names_the_known_ones_and_the_nearest(
    refuse: Callable[[str, Path], None], key: str, path: str, known: str, near: str, tmp_path: Path
) -> None:
    with pytest.raises(MoEdgeError) as refusal:
        refuse(key, tmp_path)
    (line,) = [line for line in str(refusal.value).splitlines() if key in line][:1]
    assert path in line
    assert f"{key}: unknown key; known keys here: {known}" in line
    assert line.endswith(f" (nearest: {near}).")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(default=1, gt=0)
    word: Literal["a", "b"] = "a"


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    parts: list[Part] = []
    by_name: dict[str, Part | None] = {}
    pair: tuple[float, Part] | None = None
    version: str | None = Field(default=None, alias="format")
    sm: Annotated[str, matching(r"^\d\.\d\Z", "a capability, such as 8.9")] = "8.9"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"parts": [{}, {"sise": 1}]}, "parts[1].sise: unknown key; known keys here: size, word (nearest: size)."),
        (
            {"by_name": {"x/y": {"siz": 1}}},
            "by_name.x/y.siz: unknown key; known keys here: size, word (nearest: size).",
        ),
        ({"pair": [1, {"wird": 1}]}, "pair[1].wird: unknown key; known keys here: size, word (nearest: word)."),
        ({"zzz": 1}, "zzz: unknown key; known keys here: parts, by_name, pair, format, sm."),
        ({"parts": [{"size": 0}]}, "parts[0].size: must be more than 0, got 0."),
        ({"parts": [{"size": "x"}]}, "parts[0].size: must be a whole number, got 'x' (text)."),
        ({"parts": [{"word": "c"}]}, "parts[0].word: unknown value 'c'; choose 'a' or 'b'."),
        ({"parts": 3}, "parts: must be a list, got 3."),
        ({"sm": "x"}, "sm: 'x' is not a capability, such as 8.9."),
    ],
)
def test_the_path_leads_through_lists_mappings_and_pairs(value: dict[str, Any], line: str) -> None:
    with pytest.raises(MoEdgeError) as refusal:
        checked(Whole, value, where="f.yaml")
    assert str(refusal.value) == f"f.yaml: {line}"


def test_every_problem_has_its_own_line_and_the_users_own_names() -> None:
    with pytest.raises(MoEdgeError) as refusal:
        checked(Part, {"size": 0, "word": "c"}, called=lambda path: f"--set {path}")
    assert [line.split(":")[0] for line in str(refusal.value).splitlines()] == ["--set size", "--set word"]
