"""Every registered method through a whole run on a tiny model: new methods must not break what comes after them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from moedge._files import hash_tree
from moedge.convert.methods import METHODS
from moedge.runtime import report as reports
from moedge.runtime.bench import latency as bench
from moedge.runtime.bench.points import BATCHES
from moedge.runtime.cli import app

RECIPE = """
model: {{source: {home}/model}}
text: {{calibration: {home}/text.txt, held_out: [{home}/text.txt]}}
calibration: {{windows: 4, length: 64}}
convert: {convert}
export: {{targets: [ort-cpu], dense_parent: false, max_length: 256}}
evaluate: {{window: 64, tokens: 256, diagnostics: true}}
verify: {{tokens: 2048, window: 256, prefill: 253, threads: 1}}
bench: {{prompt: 8, decode: 2, repeats: 3, warmup: 0, threads: 1}}
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "expertweaver": {"experts": 16, "k": 12, "tau_percentile": 50},  # layers with different shared widths
    "mlpmoe": {"branches": 8},
    "moedge": {"shared": 2, "active": 3, "experts": 8},
    "llamamoe": {"split": "clustering", "experts": 8, "active": 6},
    "moefication": {"experts": 8, "active": 6, "compensation": "mean"},
    "atopk": {"keep": 0.8},
    "wanda": {"keep": 0.8},
    "flap": {"keep": 0.8, "refit": True},
    "dive": {"experts": 3, "samples": 8, "score_samples": 2, "length": 32},
    "gather": {"share": 0.6},
}
STATIC = ("mlpmoe", "atopk", "wanda", "flap", "gather")
DOMAINS = ("letters", "digits", "signs", "vowels")
EXPORTED = ("portable moe", "ort-cpu moe")
"""A lowered bundle is made from the portable one, which is kept."""
ROUTED = ["random router", "random partition", "oracle router"]


def moedge(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a model and a text."""
    home = tmp_path_factory.mktemp("methods")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    letters = random.Random(0)
    lines = ["".join(letters.choices("abcdefgh ", k=120)) for _ in range(300)]
    (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    for name, alphabet in zip(DOMAINS, ("abcdefgh ", "0123456789", "+-*/=()", "aeiou "), strict=True):
        lines = ["".join(letters.choices(alphabet, k=60)) for _ in range(60)]
        (home / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return home


# CMoE's run is the one that test_recipe_run.py examines. The slow ones take the same way through export and runtime as
# one that is not slow: a static plan, or the router of MoEfication.
SLOW = ("llamamoe", "atopk", "wanda", "flap")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name, method in METHODS.items()
        if name != "cmoe" and method.parents == "dense"
    ],
)
def test_a_run_of_every_method_passes_and_its_report_is_complete(
    home: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory, measured in a process for each engine, and steps of many rows have nothing to do with the method.
    monkeypatch.setattr(bench, "BATCHES", BATCHES[:1])
    unknown = {"peak_rss_mib": None, "load_s": None, "reason": "not measured in this test"}
    monkeypatch.setattr(bench, "footprint", lambda *_: unknown)
    settings = dict(SETTINGS[name])
    if "domains" in METHODS[name].needs:
        settings["domains"] = {domain: f"{home}/{domain}.txt" for domain in DOMAINS}
    convert = json.dumps({"method": name, **settings})
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(home=home, convert=convert), encoding="utf-8")
    run = tmp_path / "run"
    printed = moedge("run", tmp_path / "tiny.yaml", "--out", run).stdout
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, json.loads(reports.SCHEMA_FILE.read_text(encoding="utf-8")))
    assert report["passed"] is True
    conversion, verification = report["conversion"], report["verification"]
    assert conversion["method"] == name
    label = METHODS[name].layout(conversion["params"])
    assert conversion["notation"] == label
    assert label in printed
    assert label in (run / "report.md").read_text(encoding="utf-8")
    assert label in (run / "report.html").read_text(encoding="utf-8")
    assert {entry["name"] for entry in verification["parity"]} == {f"{label} vs torch moe" for label in EXPORTED}
    rows = {row["label"]: row for row in report["quality"]["rows"]}
    # Each layer keeps a whole number of neurons, so a control's width is within half a neuron of 64 of the method's.
    kept = 0.6 if name == "gather" else rows[name]["active_width_fraction"]
    for row in rows.values():
        if row["kind"] == "control":
            assert row["active_width_fraction"] == pytest.approx(kept, abs=0.002 + 0.5 / 64)
    assert conversion["ffn_read_share"] == rows[name]["ffn_read_share"]
    assert f"{conversion['ffn_read_share']:.1%} of the FFN weights read for a token" in printed
    assert set(report["quality"]["where"]) <= set(report["sentences"])

    static = not any(layer["experts"] for layer in conversion["layers"])
    assert static == (name in STATIC)
    overlapping = name == "dive"
    skipped = ROUTED if static else ["random partition", "oracle router"] if overlapping else []
    if zeros := name == "mlpmoe":  # it runs every neuron: nothing static of that width but the parent itself
        skipped = [*skipped, "static mask", "FLAP-MLP"]
    assert sorted(report["quality"]["skipped"]) == sorted(skipped)
    assert set(rows) >= {"dense", name, "static mask", "FLAP-MLP", *ROUTED} - set(skipped)
    assert ("zero_fraction" in conversion) == zeros
    if zeros:
        assert conversion["active_fraction"] == 1
        assert conversion["zero_fraction"] == pytest.approx(0.2, abs=0.01)
        assert rows[name]["zero_weight_fraction"] == conversion["zero_fraction"]
    for text in (printed, (run / "report.md").read_text("utf-8"), (run / "report.html").read_text("utf-8")):
        assert ("% zeros" in text) == zeros
    assert ("affinity" in conversion) == overlapping
    assert ("<h3>Domains</h3>" in (run / "report.html").read_text(encoding="utf-8")) == overlapping
    assert {entry["routing"]["compared"] for entry in verification["parity"]} == {not static}
    compared = {entry["name"] for entry in verification["identity"]}
    if static:
        assert compared == set()
        assert "parity with PyTorch is the whole check" in " ".join(report["sentences"])
    elif name in ("moedge", "dive"):
        assert compared == {f"{label} = torch moe" for label in EXPORTED}
        assert ("refitted" if name == "moedge" else "experts share neurons") in verification["identity_note"]
    else:
        assert compared == {f"{label} = torch dense" for label in ("torch moe", *EXPORTED)}
        assert verification["identity_note"] is None

    (routing,) = report["diagnostics"]["texts"].values()
    assert [layer["experts"] for layer in routing["layers"]] == [row["experts"] for row in conversion["layers"]]
    # Experts that share neurons have no oracle set: what one adds depends on the others.
    assert (routing["mean"]["agreement"] is None) == (static or overlapping)
    assert "<h2>Routing</h2>" in (run / "report.html").read_text(encoding="utf-8")

    facts = json.loads(moedge("inspect", run / "convert" / "checkpoint", "--json").stdout)
    assert facts["method"] == name
    assert "layers" in moedge("inspect", run / "convert" / "checkpoint").stdout
    assert moedge("generate", run, "abc", "--threads", 1, "--max-new-tokens", 2).stdout.startswith("abc")
    options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    options += ["--method", name, "--text", home / "text.txt", "--windows", 4, "--length", 64]
    assert label in moedge("convert", home / "model", tmp_path / "moe", *options).stdout
    assert hash_tree(tmp_path / "moe") == hash_tree(run / "convert" / "checkpoint")


def test_a_gather_on_top_goes_through_convert_evaluate_and_inspect(home: Path, tmp_path: Path) -> None:
    model, out = home / "model", tmp_path / "moe"
    arguments = ["--text", home / "text.txt", "--windows", 4, "--length", 64, "--shared", 2, "--active", 4]
    settings = ["--experts", 8, "--set", "gather.share=.5", "--set", "gather.scores=norms"]
    said = moedge("convert", model, out, *arguments, *settings).stdout
    measured = re.search(r"cmoe S2A4E8, gather 0\.5, measured to read (\d+\.\d)%, plan [0-9a-f]{64}", said)
    assert measured
    assert float(measured[1]) == pytest.approx(50, abs=0.3)
    facts = json.loads(moedge("inspect", out, "--json").stdout)
    expected = {"share": 0.5, "linears": "all", "scores": "norms", "score_tokens": 4096, "costs": [], "ramp": 0.1}
    assert facts["params"]["gather"] == expected
    assert facts["ffn_read_share"] == pytest.approx(0.5, abs=0.003)
    *others, last = (layer["thresholds of"] for layer in facts["layers"])
    assert (set(others), last) == ({"x, h, qkv, o"}, "x, h, qkv, o, head")
    options = ["--text", home / "text.txt", "--window", 64, "--tokens", 256]
    scores = json.loads(moedge("evaluate", model, out, *options, "--json").stdout)
    read = [row["perplexity"]["text"]["ffn_read_share"] for row in scores["rows"]]
    assert read[0] == 1
    assert read[1] == pytest.approx(0.5, abs=0.05)  # other documents than those that it was measured on
    assert f"{read[1]:.1%}" in moedge("evaluate", model, out, *options).stdout


def test_a_key_inside_a_setting_is_given_once_and_by_its_path(home: Path, tmp_path: Path) -> None:
    for given, words in (
        (["gather.share=2"], "--set gather.share: must be at most 1, got 2"),
        (["gather.share=.5", "gather.share=.6"], "gather.share is given twice"),
        (["gather=1", "gather.share=.5"], "gather has a value of its own"),
        (["gather.=1"], "write KEY=VALUE"),
    ):
        options = [part for one in given for part in ("--set", one)]
        result = CliRunner().invoke(app, ["convert", str(home / "model"), str(tmp_path / "moe"), *options])
        assert result.exit_code == 2, given
        assert words in " ".join(result.output.split()), result.output
    assert not (tmp_path / "moe").exists()


def test_several_texts_calibrate_one_conversion(home: Path, tmp_path: Path) -> None:
    texts = [home / "text.txt", home / "digits.txt"]
    options = [part for text in texts for part in ("--text", text)]
    layout = ["--windows", 4, "--length", 64, "--shared", 2, "--active", 4, "--experts", 8]
    moedge("convert", home / "model", tmp_path / "moe", *options, *layout)
    provenance = json.loads(moedge("inspect", tmp_path / "moe", "--json").stdout)["provenance"]
    assert [entry["text"] for entry in provenance["calibration_texts"]] == list(map(str, texts))
    scores = moedge("evaluate", tmp_path / "moe", "--text", texts[1], "--window", 64, "--tokens", 128).stdout
    assert "of the calibration text that were held out" in " ".join(scores.split())
