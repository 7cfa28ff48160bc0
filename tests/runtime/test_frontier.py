"""``moedge frontier`` on a tiny model: what it measures, what it keeps, and what its verdict says."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.configs.recipe import load_recipe, parse_recipe
from moedge.convert import evaluate, sources
from moedge.convert.plan import MoEPlan
from moedge.export import trace
from moedge.export.bundle import open_bundle
from moedge.runtime.cli import app
from moedge.runtime.frontier import schema, stages, variants
from moedge.runtime.frontier.bodies import groups
from moedge.runtime.frontier.join import Quality, Times, mean_kl, mean_ratio
from moedge.runtime.frontier.verdict import judge
from moedge.runtime.run.engine import Context

RECIPE = """
model: {{source: {home}/model}}
text: {{calibration: {home}/text.txt, held_out: [{home}/text.txt, {home}/other.txt]}}
calibration: {{windows: 4, length: 128}}
convert: {{shared: 2, active: 3, experts: 8, k_a: 6}}
export: {{targets: [ort-cpu], max_length: 256}}
evaluate: {{window: 64, tokens: 512}}
verify: {{tokens: 2048, window: 256, prefill: 250, threads: 1}}
bench: {{prompt: 32, decode: 3, repeats: 3, threads: 1}}
frontier:
  batches: [1, 2]
  targets: [ort-cpu]
  run: {run}
  variants:
    - {{label: half, convert: {{method: flap, keep: 0.5}}}}
    - {{label: "own | 5 of 8"}}
    - {{label: most, convert: {{method: gather, share: {share}, scores: norms}}}}
""".replace('"own | 5 of 8"', "own, convert: {{shared: 2, active: 3, experts: 8, k_a: 6}}")


def moedge(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_recipe(home: Path, *, share: float = 0.9, run: str = "false") -> Path:
    path = home / "tiny.yaml"
    path.write_text(RECIPE.format(home=home, share=share, run=run), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a model, two texts and a finished frontier."""
    home = tmp_path_factory.mktemp("frontier")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    letters = random.Random(0)
    for name, alphabet in (("text", "abcdefgh "), ("other", "mnopqrst ")):
        lines = ["".join(letters.choices(alphabet, k=120)) for _ in range(400)]
        (home / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    result = moedge("frontier", write_recipe(home), "--out", home / "run")
    assert result.exit_code == 0, result.output
    (home / "said.txt").write_text(result.stdout, encoding="utf-8")
    return home


@pytest.fixture
def found(home: Path) -> Any:
    return json.loads((home / "run/frontier.json").read_text(encoding="utf-8"))


def test_the_schema_is_made_from_the_types() -> None:
    kept = json.loads(schema.SCHEMA_FILE.read_text(encoding="utf-8"))
    assert kept == schema.generate(), "run `python -m moedge.runtime.frontier.schema`"


def test_every_variant_is_measured_on_every_target_beside_the_parent(home: Path, found: Any) -> None:
    jsonschema.validate(found, json.loads(schema.SCHEMA_FILE.read_text(encoding="utf-8")))
    assert [one["label"] for one in found["variants"]] == ["half", "own", "most"]
    assert [(one["target"], one["batch"]) for one in found["measured"]] == [("ort-cpu", 1), ("ort-cpu", 2)]
    for one in found["measured"]:
        assert [row["label"] for row in one["rows"]] == ["half", "own", "most", "dense ort-cpu"]
        assert one["rows"][-1]["decode_speedup"]["value"] == 1
        assert one["verdict"]["sentence"] in (home / "run/frontier.md").read_text().replace("\\", "")
        sizes = {row["label"]: row["bytes"] for row in one["rows"]}
        assert sizes["half"] < sizes["dense ort-cpu"]
    page = (home / "run/frontier.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(found["measured"])
    assert all(word in page for word in ("half", "time per decoded token", "time to first token"))


def test_quality_is_that_of_evaluate_and_reads_are_counted(home: Path, found: Any) -> None:
    from safetensors.torch import load_file

    rows = {one["label"]: one for one in found["variants"]}
    model = sources.load_model(home / "model")
    kept = load_file(home / "run/frontier/dense/quality/dense.safetensors")
    windows = {name: kept[f"ids.{name}"].numpy() for name in ("text", "other")}
    plan = MoEPlan.load(home / "run/convert/checkpoint")
    other = evaluate.evaluate(model, {"own": plan}, windows, {})["rows"][1]
    for name in windows:
        assert rows["own"]["texts"][name]["kl"]["value"] == pytest.approx(other["kl_to_dense"][name], rel=1e-4)
        assert rows["own"]["texts"][name]["ppl"] == pytest.approx(other["ppl"][name], rel=1e-5)
        low, high = rows["own"]["texts"][name]["kl"]["ci95"]
        assert low < rows["own"]["texts"][name]["kl"]["value"] < high
    assert rows["half"]["ffn_read_share"] == pytest.approx(0.5)
    assert rows["most"]["ffn_read_share"] == pytest.approx(0.9, abs=0.05)
    assert rows["own"]["ffn_read_share"] > 0.625, "the router is counted"
    mean = np.mean([rows["own"]["texts"][name]["kl"]["value"] for name in windows])
    assert rows["own"]["kl"]["value"] == pytest.approx(mean)


def test_the_terminal_holds_every_word_in_80_columns(home: Path) -> None:
    said = (home / "said.txt").read_text(encoding="utf-8")
    assert max(map(len, said.splitlines()[:-1])) <= 80, "all but the path in the end"
    assert all(word in said for word in ("weights", "ratio", "decode", "prompt", "ort-cpu", "KL", "beaten"))
    assert "…" not in said


def test_what_is_unchanged_is_kept_and_a_new_variant_converts_alone(home: Path) -> None:
    run = home / "run"

    def made() -> dict[str, int]:
        return {str(path.parent.relative_to(run)): path.stat().st_ino for path in run.rglob("stage.json")}

    before = made()
    assert moedge("frontier", write_recipe(home), "--out", run).exit_code == 0
    assert made() == before
    assert moedge("frontier", write_recipe(home, share=0.8), "--out", run).exit_code == 0
    redone = {name.rpartition("/")[2] for name, number in made().items() if before.get(name) != number}
    assert redone == {"convert", "quality", "export", "bench-ort-cpu", "table"}
    assert sum(before.get(name) != number for name, number in made().items()) == 5
    assert moedge("frontier", write_recipe(home), "--out", run).exit_code == 0


@pytest.mark.slow
def test_moedge_run_does_it_when_asked_and_shares_its_stages(home: Path) -> None:
    kept = (home / "run/convert/stage.json").stat().st_ino
    result = moedge("run", write_recipe(home, run="true"), "--out", home / "run")
    assert result.exit_code == 0, result.output
    assert (home / "run/convert/stage.json").stat().st_ino == kept
    report = json.loads((home / "run/report.json").read_text(encoding="utf-8"))
    assert [one["label"] for one in report["frontier"]["variants"]] == ["half", "own", "most"]
    assert "quality beside speed" in (home / "run/report.html").read_text(encoding="utf-8")


def test_defaults_are_chosen_from_the_recipe() -> None:
    gathers = [f"gather {share:.4g}" for share in variants.SHARES]
    others = ["FLAP refit 0.75", "TEAL 0.75"]
    recipe = load_recipe("smollm2-135m-cmoe")
    assert [one.label for one in variants.variants(recipe)] == [*gathers, "cmoe S6A6E16", *others]
    recipe = load_recipe("smollm2-135m")
    found = {one.label: one.convert for one in variants.variants(recipe)}
    own = recipe.convert.model_dump(mode="json")
    assert [label for label in found if not label.startswith("gather")] == others
    assert found[f"gather {own['share']:.4g}"] == own, "the recipe's own conversion is one of the line"
    assert list(found.values()).count(own) == 1
    assert {one["ramp"] for label, one in found.items() if label.startswith("gather")} == {own["ramp"]}
    assert variants.chosen_targets(recipe) == ["ort-cpu", "ort-cpu-int8", "ort-cpu-int4"]
    names = [stage.name for stage in stages.build(recipe, {})]
    assert len(names) == len(set(names))
    assert names[-1] == stages.TABLE


def test_without_being_asked_moedge_run_does_nothing_of_it() -> None:
    recipe = load_recipe("smollm2-135m")
    assert not any(stage.name.startswith("frontier") for stage in stages.with_run(recipe, {}))
    asked = recipe.model_copy(update={"frontier": recipe.frontier.model_copy(update={"run": True})})
    names = [stage.name for stage in stages.with_run(asked, {})]
    assert names[-2:] == [stages.TABLE, "report"]
    assert names.count("convert") == names.count("source") == 1


def test_further_targets_are_lowered_from_the_graph_that_is_there(bundles, checkpoints, tmp_path, monkeypatch) -> None:
    recipe = load_recipe("smollm2-135m")
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"targets": ["ort-cpu"]})})
    found = {stage.name: stage for stage in stages.build(recipe, {})}
    more = {name: stage for name, stage in found.items() if "portable" in stage.params}
    assert {stage.params["portable"]: stage.reads for stage in more.values()} == {
        "export/portable": ("source", "convert", "export"),
        "export-dense/portable": ("source", "export-dense"),
    }
    assert all(stage.params["targets"] == ["ort-cpu-int8", "ort-cpu-int4"] for stage in more.values())

    shutil.copytree(bundles["dense/portable"], tmp_path / "run/export-dense/portable")
    (tmp_path / "run/source").mkdir()
    about = {"label": "dense", "folder": str(checkpoints["dense"])}
    (tmp_path / "run/source/source.json").write_text(json.dumps(about))
    monkeypatch.setattr(trace, "trace", None)  # nothing that can be called
    stage = more["frontier/dense/export"]
    params = {**stage.params, "targets": ["openvino"], "max_length": None}
    stage.body(Context(tmp_path / "out", tmp_path / "run", params, lambda *_: None, lambda _: None))
    parent = open_bundle(bundles["dense/portable"]).sha256
    assert open_bundle(tmp_path / "out/openvino").manifest.parent == parent
    assert open_bundle(tmp_path / "out/portable").sha256 == parent


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("targets: [tensorrt]", "tensorrt runs on a device only"),
        ("targets: [ort-cpu, ort-cpu]", "names a target twice"),
        ("variants: [{label: dense 2, convert: {}}]", "begins with dense"),
        ("variants: [{label: a, convert: {}}, {label: a, convert: {}}]", "names a label twice"),
        ("prompt: 4000", "frontier.prompt: needs 4032 cache positions"),
        ("tokens: 100", "frontier.tokens: 100 is less than one window"),
    ],
)
def test_a_section_that_cannot_work_is_refused(section: str, said: str) -> None:
    with pytest.raises(MoEdgeError, match=said):
        parse_recipe(f"model: {{source: x}}\nfrontier: {{{section}}}")


# --- engines that do not fit into memory together -------------------------------------------------------------------


def test_groups_hold_every_variant_once_beside_all_parents_and_fit() -> None:
    sizes = {"a": 4, "b": 4, "c": 2, "d": 2, "dense x": 4, "dense y": 1}
    parents = ["dense x", "dense y"]
    assert groups(sizes, parents, 1000) == [["a", "b", "c", "d", *parents]]
    memory = 26  # half of it, 13, is for engines, 5 of them the parents
    found = groups(sizes, parents, memory)
    assert found == [["a", "b", *parents], ["c", "d", *parents]]
    assert all(sum(sizes[label] for label in one) <= memory / 2 for one in found)
    assert groups(sizes, parents, 1) == [[label, *parents] for label in "abcd"], "one at a time is always tried"


def bench_run(times: dict[str, float]) -> dict[str, Any]:
    """A benchmark in which every engine takes the same time in each round."""
    rows = [{"label": label, "rounds": {"tpot_ms": [value] * 5}} for label, value in times.items()]
    ratios = [
        {
            **{"metric": "tpot_ms", "label": one, "baseline": other, "speedup": times[other] / times[one]},
            **{"ci95": [0.0, 9.0], "verdict": "slower" if times[one] > times[other] else "no difference shown"},
        }
        for one in times
        for other in times
        if one != other
    ]
    return {"rows": rows, "ratios": ratios}


def test_variants_of_two_groups_are_compared_through_the_parent() -> None:
    runs = [bench_run({"a": 5.0, "dense t": 10.0}), bench_run({"b": 8.0, "dense t": 20.0})]  # the machine got slower
    times = Times(runs, "dense t")
    assert list(times.rows) == ["a", "b", "dense t"]
    assert times.speedup("tpot_ms", "a")["value"] == 2
    assert times.speedup("tpot_ms", "b")["value"] == 2.5
    assert times.as_fast("b", "a")
    assert not times.as_fast("a", "b"), "it took less time, beside a parent that took less yet"


# --- what few windows and rounds tell -------------------------------------------------------------------------------


def windows(kl: np.ndarray) -> Quality:
    """A variant with this KL [texts, windows]."""
    texts = {f"t{i}": {"kl": one, "nll": one + 3.0, "ffn_read_share": 0.5} for i, one in enumerate(kl)}
    return Quality(texts, {name: np.full(kl.shape[1], 3.0) for name in texts})


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_equal_variants_are_called_better_at_the_rate_that_is_said(count: int) -> None:
    """Nominal: 2.5 % to one side. A percentile bootstrap of windows has 50, 25, 13 and 8 %."""
    kl = np.random.default_rng(count).lognormal(sigma=0.5, size=(2, 2000, 2, count))
    wrong = sum(windows(one).lower_kl(windows(other)) for one, other in zip(*kl, strict=True))
    # Three standard deviations of a binomial(2000, 0.025) around 50.
    assert wrong == 0 if count == 1 else 29 <= wrong <= 71


def test_intervals_of_quality_are_students_over_windows() -> None:
    kl = np.random.default_rng(0).exponential(0.1, (2, 6))
    known = scipy.stats.ttest_1samp(kl.mean(axis=0), 0).confidence_interval(0.95)
    assert mean_kl(windows(kl)) == {
        "value": pytest.approx(kl.mean()),
        "ci95": [pytest.approx(max(known.low, 0), rel=1e-4), pytest.approx(known.high, rel=1e-4)],
    }
    ratio = mean_ratio(windows(kl))
    assert ratio["value"] == pytest.approx(np.exp(kl.mean()))
    assert ratio["ci95"] == pytest.approx(np.exp([known.low, known.high]), rel=1e-4)
    assert mean_kl(windows(kl[:, :1]))["ci95"] == [None, None]
    assert mean_kl(windows(np.array([[0.0, 0.0, 0.3]])))["ci95"][0] == 0, "no KL is negative"


def test_variants_of_two_groups_with_few_rounds_are_not_told_apart() -> None:
    def run(label: str, times: list[float]) -> Any:
        found = bench_run({label: 1.0, "dense t": 10.0})
        found["rows"][0]["rounds"]["tpot_ms"] = times
        found["rows"][1]["rounds"]["tpot_ms"] = [10.0] * len(times)
        return found

    assert Times([run("a", [5.0]), run("b", [4.0])], "dense t").as_fast("a", "b"), "of one round nothing is known"
    assert Times([run("a", [5.0, 5.4]), run("b", [4.6, 4.9])], "dense t").as_fast("a", "b")
    assert not Times([run("a", [5.0, 5.01, 5.0]), run("b", [4.0, 4.01, 4.0])], "dense t").as_fast("a", "b")


# --- the verdict ----------------------------------------------------------------------------------------------------


def verdict(kl: dict[str, float], speed: dict[str, float], *, equal: frozenset[str] = frozenset()) -> Any:
    def estimates(values: dict[str, float]) -> Any:
        return {label: {"value": value, "ci95": [value - 0.01, value + 0.01]} for label, value in values.items()}

    return judge(
        "ort-cpu",
        1.25,
        estimates(kl),
        estimates(speed),
        as_fast=lambda one, other: speed[one] >= speed[other] - 0.02,
        lower=lambda one, other: kl[one] < kl[other] and not {one, other} <= equal,
    )


def test_the_lowest_kl_among_those_that_are_fast_enough_wins() -> None:
    found = verdict({"a": 0.1, "b": 0.2, "slow": 0.01}, {"a": 1.3, "b": 1.5, "slow": 1.1})
    assert (found["winner"], found["candidates"]) == ("a", ["a", "b"])
    assert "lowest KL has a with 0.100 (0.090 to 0.110) at 1.30 (1.29 to 1.31) times; next is b" in found["sentence"]


def test_no_winner_is_named_where_intervals_do_not_tell() -> None:
    kl, speed = {"a": 0.1, "b": 0.11, "c": 0.3}, {"a": 1.3, "b": 1.3, "c": 1.4}
    found = verdict(kl, speed, equal=frozenset("ab"))
    assert found["winner"] is None
    assert "cannot be told" in found["sentence"]
    assert "b with" in found["sentence"]
    assert "c with" not in found["sentence"]


def test_where_nothing_is_fast_enough_the_fastest_are_compared_and_it_is_said() -> None:
    found = verdict({"a": 0.1, "b": 0.05, "slow": 0.01}, {"a": 1.10, "b": 1.09, "slow": 0.9})
    assert (found["reached"], found["winner"], found["candidates"]) == (False, "b", ["b", "a"])
    assert "nothing decodes 1.25 times as fast as the dense parent, the fastest is a at 1.10" in found["sentence"]
