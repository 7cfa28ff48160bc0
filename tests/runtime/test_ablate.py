"""``moedge ablate``: rows of a study, what is kept between two runs, and studies that are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from moedge.configs.files import packaged
from moedge.convert import calibration, evaluate, methods, sources
from moedge.runtime.cli import app
from moedge.runtime.run import study as bodies
from moedge.runtime.run.engine import Context

STUDY = """
name: tiny
model: {{source: {home}/model}}
texts:
  - {{source: {home}/text.txt, holdout_every: 4, calibration: 3, held_out: 2}}
  - {{source: {home}/other.txt, holdout_every: 4, calibration: 2, held_out: 2}}
window: 64
bos: false
seeds: [0, 1]
sparsities:
  - name: 25 %
    methods: {{cmoe: {{shared: 3, active: 3, experts: 8}}, moedge: {{shared: 3, active: 3, experts: 8}}}}
  - name: 50 %
    methods: {{cmoe: {{shared: 2, active: 2, experts: 8}}, moedge: {{shared: 2, active: 2, experts: 8}}}}
rows:
  - {{label: CMoE, method: cmoe}}
  - {{label: own, method: moedge, set: {{refit: {refit}}}}}
  - {{label: random, control: random router, of: CMoE}}
  - {{label: FLAP, control: FLAP-MLP}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a model and two texts."""
    home = tmp_path_factory.mktemp("ablate")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    letters = random.Random(0)
    for name, alphabet in (("text", "abcdefgh "), ("other", "mnopqrst ")):
        lines = ["".join(letters.choices(alphabet, k=120)) for _ in range(60)]
        (home / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return home


def ablate(home: Path, text: str) -> Any:
    (home / "study.yaml").write_text(text, encoding="utf-8")
    return CliRunner().invoke(app, ["ablate", str(home / "study.yaml"), "--out", str(home / "run")])


def test_rows_are_measured_on_one_protocol_and_kept(home: Path) -> None:
    first = ablate(home, STUDY.format(home=home, refit="true"))
    assert first.exit_code == 0, first.output
    results = json.loads((home / "run/table/results.json").read_text())
    rows = {(row["sparsity"], row["label"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 8
    assert rows["25 %", "random"]["seeds"] == [0, 1]
    assert rows["25 %", "random"]["ppl_std"]["text"] > 0
    assert {row["active_width_fraction"] for row in rows.values()} == {0.75, 0.5}
    table = (home / "run/table/results.md").read_text()
    assert f"{rows['50 %', 'own']['ppl']['other']:.2f}" in table

    # The same numbers as the functions that the rows are made of.
    folder = home / "model"
    model, tokenizer = sources.load_model(folder), sources.load_tokenizer(folder)
    statistics = calibration.load(home / "run/calibrate/statistics-10-raw.safetensors")
    plan = methods.convert("cmoe", statistics, model, shared=3, active=3, experts=8)
    held = calibration.split(calibration.read_text(str(home / "text.txt")), 4)[1]
    windows = {"text": calibration.windows(tokenizer, held, 64, 2, bos=False, name="check")}
    alone = evaluate.evaluate(model, {"CMoE": plan}, windows, {})["rows"][1]
    assert rows["25 %", "CMoE"]["ppl"]["text"] == pytest.approx(alone["ppl"]["text"], rel=1e-6)
    assert rows["25 %", "CMoE"]["kl_to_dense"]["text"] == pytest.approx(alone["kl_to_dense"]["text"], rel=1e-4)

    second = ablate(home, STUDY.format(home=home, refit="false"))
    assert second.exit_code == 0, second.output
    redone = [line for line in second.output.splitlines() if "done in" in line]
    assert len(redone) == 3, second.output  # `own` at both sparsities, and the table


def test_texts_of_one_file_name_are_all_read(home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((home / "other.txt").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "source.json").write_text(json.dumps({"folder": str(home / "model")}), encoding="utf-8")
    paths = {"text": home / "text.txt", "text (2)": tmp_path / "text.txt"}
    counts = [{"calibration": 1, "held_out": 0}, {"calibration": 1, "held_out": 2}]
    texts = [
        {"source": str(path), "holdout_every": 4, **count} for path, count in zip(paths.values(), counts, strict=True)
    ]
    params = {"texts": texts, "window": 64, "bos": False}
    context = Context(tmp_path, tmp_path, params, lambda *_: None, lambda _: None)
    found = bodies._windows(context, "calibration")
    tokenizer = sources.load_tokenizer(home / "model")
    for name, path in paths.items():
        kept = calibration.split(calibration.read_text(str(path)), 4)[0]
        np.testing.assert_array_equal(found[name], calibration.windows(tokenizer, kept, 64, 1, bos=False, name="check"))
    assert found.keys() == paths.keys()
    assert bodies._windows(context, "held_out").keys() == {"text (2)"}, "one text has one name"


def test_every_row_reads_the_statistics_of_its_own_profile(home: Path, tmp_path: Path) -> None:
    rows = """
  - {label: released, method: cmoe, set: {variant: released}}
  - {label: paper, method: cmoe}
  - {label: few marks, method: cmoe, set: {k_a: 4}}
  - {label: mask, control: static mask, of: paper}
  - {label: mask of released, control: static mask}
"""
    text = STUDY.format(home=home, refit="true")
    text = text[: text.index("rows:")] + "rows:" + rows
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    kept = {path.name for path in (tmp_path / "run/calibrate").glob("statistics*")}
    assert kept == {f"statistics-{marks}.safetensors" for marks in ("10-raw", "10-normalised", "4-raw")}
    found = json.loads((tmp_path / "run/table/results.json").read_text())["rows"]
    rows_at = {row["label"]: row for row in found if row["sparsity"] == "25 %"}
    assert rows_at["released"]["params"]["score"] == "abs"
    model = sources.load_model(home / "model")
    for label, marks, settings in (
        ("released", "10-normalised", {"variant": "released"}),
        ("paper", "10-raw", {}),
        ("few marks", "4-raw", {"k_a": 4}),
    ):
        statistics = calibration.load(tmp_path / f"run/calibrate/statistics-{marks}.safetensors")
        about = json.loads((tmp_path / "run/calibrate/calibration.json").read_text())
        plan = methods.convert("cmoe", statistics, model, shared=3, active=3, experts=8, **settings, provenance=about)
        assert rows_at[label]["plans"] == [plan.sha256]
    assert rows_at["mask"]["plans"] != rows_at["mask of released"]["plans"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "phi3"])
def test_the_packaged_study_runs_on_another_family(
    family: str, tmp_path: Path, home: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Mechanics: every method and control of the published table, at its layouts, on texts of 64-token windows."""
    tiny_model(family, width=128).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    study = yaml.safe_load(packaged("study")["smollm2-135m-methods"].read_text(encoding="utf-8"))
    study |= {"model": {"source": str(tmp_path / "model")}, "window": 64, "seeds": [0]}
    for text, name in zip(study["texts"], ("text", "other"), strict=True):
        text |= {"source": f"{home}/{name}.txt", "holdout_every": 4, "calibration": 8, "held_out": 2}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "run/table/results.json").read_text())["rows"]
    assert len(rows) == len(study["rows"]) * len(study["sparsities"])
    assert {row["sparsity"] for row in rows} == {"12.5 %", "25 %", "50 %"}
    for row in rows:
        kept = 1 - float(row["sparsity"].split()[0]) / 100
        if zero := row.get("zero_weight_fraction"):  # weights, not neurons
            assert zero == pytest.approx(1 - kept, abs=0.01)
            kept = 1
        # Every layer keeps a whole number of the 128 neurons.
        assert row["active_width_fraction"] == pytest.approx(kept, abs=0.5 / 128), row["label"]
        assert all(value > 1 for value in row["ppl"].values()), row["label"]


def test_rows_of_a_study_at_equal_weights_read(home: Path, tmp_path: Path) -> None:
    study = f"""
name: reads
model: {{source: {home}/model}}
texts:
  - {{source: {home}/text.txt, holdout_every: 4, calibration: 4, held_out: 2}}
  - {{source: {home}/other.txt, calibration: 0, held_out: 40}}
window: 64
bos: false
axis: read
sparsities:
  - name: 50 %
    methods:
      gather: {{share: .5}}
      cmoe: {{shared: 2, active: 4, experts: 8, gather: {{share: .5}}}}
      flap: {{keep: .5}}
rows:
  - {{label: gather, method: gather}}
  - {{label: both, method: cmoe, set: {{k_a: 6}}}}
  - {{label: TEAL, control: TEAL}}
  - {{label: WINA, control: WINA, of: both}}
  - {{label: mask, control: static mask}}
  - {{label: GRIFFIN, control: GRIFFIN}}
  - {{label: FLAP, method: flap}}
"""
    (tmp_path / "study.yaml").write_text(study, encoding="utf-8")
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run/table/results.json").read_text())["rows"]
    rows = {row["label"]: row for row in found}
    for row in found:
        assert row["ffn_read_shares"]["text"] == pytest.approx(0.5, abs=0.05), row["label"]
        assert set(row["ffn_read_shares"]) == {"text", "other"}
    assert rows["both"]["form"] == "routed and gathered"
    assert rows["FLAP"]["ffn_read_share"] == rows["mask"]["ffn_read_share"] == 0.5
    table = (tmp_path / "run/table/results.md").read_text()
    assert "### 50 % of the FFN weights read for a token" in table
    assert "- mask, FLAP: narrower dense FFNs" in table
    behind = json.loads((tmp_path / "run/table/results.json").read_text())["second_half"]["rows"]
    assert {row["label"] for row in behind} == {*rows, "GRIFFIN"}
    assert "GRIFFIN" not in rows, "nothing of it is known before half of a window"
    (griffin,) = (row for row in behind if row["label"] == "GRIFFIN")
    assert (griffin["form"], griffin["ffn_read_share"]) == ("prompted", 0.5)
    # Windows of 64: the tokens behind the first 32 are scored but the first of them, which the prompt predicts.
    assert "Second halves of the windows (1,240 of other, 62 of text tokens), as GRIFFIN needs the first:" in table
    assert "- GRIFFIN: a gain in decoding alone" in table
    # 40 windows of 64 are more than a split's quarter of the 60 lines holds: nothing is kept back for calibration.
    assert "2,520 of other, 126 of text predicted tokens" in table


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("method: moedge, set", "method: moe, set", "unknown method 'moe'"),
        ("{{refit: {refit}}}", "{{refits: 1}}", "own at 25 %: refits"),
        ("control: random router", "control: luck", "unknown control 'luck'"),
        ("of: CMoE", "of: DIVE", "no method row is called 'DIVE'"),
        ("label: own", "label: CMoE", "a label is used twice"),
        ("window: 64", "window: 4", "window"),
        ("{home}/other.txt", "{home}/missing.txt", "missing.txt does not exist"),
        ("shared: 2, active: 2", "shared: 2, active: 9", "CMoE at 50 %"),
        ("methods: {{cmoe:", "methods: {{cmo:", "sparsities: 25 %: unknown method 'cmo'; known: cmoe,"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(home: Path, old: str, new: str, said: str) -> None:
    assert old in STUDY
    result = ablate(home, STUDY.replace(old, new, 1).format(home=home, refit="true"))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_packaged_studies_are_valid() -> None:
    from moedge.configs.study import load_study

    for name, path in packaged("study").items():
        assert load_study(name).name == path.stem
