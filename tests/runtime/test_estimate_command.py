"""``moedge estimate`` as it is called: tables, sentences, JSON, and bad input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moedge.export.manifest import CacheFacts, IOFacts, LayerFacts, Manifest, ModelFacts, MoEFacts
from moedge.runtime.cli import app


def estimate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["estimate", *arguments], env={"COLUMNS": "250"})


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    """The manifest of a MoE of 1.2 billion parameters, which is all that the command reads."""
    layer = LayerFacts(num_experts=6, top_k=2, shared_width=2048, expert_width=1024)
    model = ModelFacts(
        model_type="llama",
        hidden_size=2048,
        vocab_size=128256,
        num_layers=16,
        num_attention_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        eos_token_ids=[],
        parameters=1_235_814_400,
        tied_embedding=True,
    )
    manifest = Manifest(
        schema="moedge.bundle/1",
        target="portable",
        kind="moe",
        label="moe",
        model=model,
        moe=MoEFacts(layers=dict.fromkeys(range(16), layer)),
        io=IOFacts(model="model.onnx", inputs=[], outputs=[]),
        cache=CacheFacts(kind="concat"),
        **{"taps": {}, "versions": {}, "files": {}, "lowering": []},
    )
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.document()))
    return str(tmp_path)


def test_a_table_and_what_to_take_for_each_device(bundle: str) -> None:
    found = estimate(bundle, "--for", "jetson-agx-orin", "--for", "rtx-4090", "--batch", "2")
    assert found.exit_code == 0, found.output
    orin, card = found.output.split("GeForce RTX 4090")
    assert "No engine there leaves weights out: the conversion gains nothing." in orin
    assert "shared with the CPU" in orin
    assert "Fastest that fits: tensorrt-rtx-int4" in card
    assert "The conversion is worth there (tensorrt or tensorrt-rtx (--expert-form plugins)): at most 1." in card
    assert "Not confirmed at the vendor's page" in card


def test_the_whole_result_as_json(bundle: str) -> None:
    found = estimate(bundle, "--for", "h100", "--json", "--context", "1000", "--max-prompt", "10")
    assert found.exit_code == 0, found.output
    result = json.loads(found.output)
    assert result["work"] == {"batch": 1, "context": 1000, "prompt": 10}
    device = result["devices"]["h100"]
    assert {row["model"] for row in device["outlooks"]} == {"moe", "dense"}
    assert device["best"]["precision"] == "float16", "the only one with an engine"
    assert device["profile"]["sources"]["bandwidth_gb_s"].startswith("https://")


def test_a_model_that_does_not_fit_says_so(bundle: str) -> None:
    found = estimate(bundle, "--for", "jetson-orin-nano-4gb", "--batch", "64")
    assert found.exit_code == 0, found.output
    assert "too large" in found.output
    assert "None of these both fits and has an engine" in found.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--for", "nothing"), "No device 'nothing'"),
        (
            ("--for", "t4", "--context", "100", "--max-prompt", "200"),
            "A prompt of 200 tokens does not fit",
        ),
    ],
)
def test_bad_input_is_one_sentence(bundle: str, arguments: tuple[str, ...], said: str) -> None:
    found = estimate(bundle, *arguments)
    assert found.exit_code != 0
    assert said in " ".join(found.output.split())
    assert "Traceback" not in found.output


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    found = estimate(str(tmp_path / "nowhere"), "--for", "t4")
    assert found.exit_code != 0
    assert "does not exist" in " ".join(found.output.split())


def test_a_folder_of_bundles_names_them(bundle: str) -> None:
    Path(bundle, "portable").mkdir()
    Path(bundle, "manifest.json").rename(Path(bundle, "portable", "manifest.json"))
    found = estimate(bundle, "--for", "t4")
    assert "It holds the bundles portable; give one of them." in " ".join(found.output.split())


def test_a_context_beyond_the_model_is_noted(bundle: str) -> None:
    said = "--context 9000 is beyond the model's 8192 positions"
    assert said in " ".join(estimate(bundle, "--for", "h100", "--context", "9000").output.split())
    assert said in json.loads(estimate(bundle, "--for", "h100", "--context", "9000", "--json").output)["notes"][0]
    assert json.loads(estimate(bundle, "--for", "h100", "--json").output)["notes"] == []
