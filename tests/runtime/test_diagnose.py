"""``moedge diagnose`` on a checkpoint: table, JSON, plot, stability, refusals."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moedge.convert import calibration, methods, modeling, sources
from moedge.runtime.cli import app


def moedge(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A dense model, its conversion, and two texts, the first of which it was calibrated on."""
    home = tmp_path_factory.mktemp("diagnose")
    letters = random.Random(0)
    for name in ("text", "other"):
        lines = ["".join(letters.choices("abcdefgh ", k=60)) for _ in range(200)]
        (home / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    model = tiny_llama()
    model.save_pretrained(home / "dense")
    tiny_tokenizer.save_pretrained(home / "dense")
    text = calibration.read_text(str(home / "text.txt"))
    windows = calibration.windows(tiny_tokenizer, text, 64, 4, bos=False, name="calibration")
    plan = methods.convert(
        "cmoe",
        calibration.collect(model, windows, k_a=6),
        model,
        **{"shared": 2, "active": 3, "experts": 8, "k_a": 6},
        source_sha256=sources.identity(home / "dense"),
        provenance={"text": str(home / "text.txt"), "text_sha256": text.sha256},
    )
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, home / "moe")
    return home


def test_diagnose_prints_writes_and_draws(home: Path, tmp_path: Path) -> None:
    options = ["--text", home / "text.txt", "--text", home / "other.txt", "--dense", home / "dense", "--stability"]
    options += ["--tokens", 256, "--window", 64]
    plot, out = tmp_path / "routing.svg", tmp_path / "found.json"
    printed = moedge("diagnose", home / "moe", *options, "--plot", plot, "--save", out).stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert plot.read_bytes().startswith(b"<?xml")
    assert set(result["texts"]) == {"text", "other"}
    # Only the documents that calibration left out are used of its own text.
    assert "20 documents of the calibration text that were held out" in result["texts"]["text"]["documents"]
    assert result["texts"]["other"]["documents"] == "200 documents"
    assert [entry["between"] for entry in result["stability"]] == [["text 1/2", "text 2/2"], ["text", "other"]]
    for entry in result["stability"]:
        assert 0 < entry["experts"]["mean"] <= 1
    for text in result["texts"].values():
        assert f"{text['mean']['captured']:.1%}" in printed
        errors = text["mean"]["relative_error"]
        assert errors["oracle"] <= min(errors["router"], errors["random"])
    assert "Jaccard text 1/2 / text 2/2" in printed
    assert json.loads(moedge("diagnose", home / "moe", *options, "--json").stdout) == result


def test_a_png_and_no_parent(home: Path, tmp_path: Path) -> None:
    plot = tmp_path / "routing.png"
    options = ["--text", home / "other.txt", "--tokens", 64, "--window", 64, "--plot", plot]
    assert "the layer with every expert" in moedge("diagnose", home / "moe", *options).stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_texts_of_one_file_name_are_all_read(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "other.txt", tmp_path / "text.txt")
    options = ["--text", home / "text.txt", "--text", tmp_path / "text.txt", "--tokens", 64, "--window", 64, "--json"]
    found = json.loads(moedge("diagnose", home / "moe", *options).stdout)["texts"]
    assert {name: text["documents"][:3] for name, text in found.items()} == {"text": "20 ", "text (2)": "200"}


def test_another_parent_is_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dense", tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text("{}")
    options = ["--text", home / "other.txt", "--tokens", 64, "--window", 64, "--dense"]
    said = [moedge("diagnose", home / "moe", *options, home / "dense").stderr]
    said.append(moedge("diagnose", home / "moe", *options, tmp_path / "other").stderr)
    assert ["is not the folder that was converted" in " ".join(text.split()) for text in said] == [False, True]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--plot", "x.pdf"], "write a .svg or .png file"),
        (["--stability"], "needs the dense parent"),
        (["--window", "257"], "--window 257 is beyond the model's 256 positions"),
        (["--text", "missing.txt"], "Cannot read the text file"),
    ],
)
def test_refusals(home: Path, options: list[str], sentence: str) -> None:
    text = [] if "--text" in options else ["--text", str(home / "other.txt")]
    assert sentence in " ".join(moedge("diagnose", home / "moe", *text, *options, code=2).output.split())


def test_a_checkpoint_without_routers_is_refused(home: Path, tmp_path: Path, gather_only: Callable[..., Any]) -> None:
    gather_only(sources.load_model(home / "dense")).save(tmp_path)
    said = " ".join(moedge("diagnose", tmp_path, "--text", home / "other.txt", code=2).output.split())
    assert "has no routers to diagnose (method gather)" in said


def test_a_dense_folder_is_refused(home: Path) -> None:
    assert "neither a run folder nor a MoE checkpoint" in moedge("diagnose", home / "dense", code=2).output
