"""From checkpoint to checkpoint: what training changed is in the plan, the weights and the exported engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge._files import hash_tree, sha256_file
from moedge.convert import calibration, modeling, offload
from moedge.convert.plan import MoEPlan
from moedge.convert.train import finetune
from moedge.convert.train.settings import TrainSettings
from moedge.runtime.cli import app

LENGTH = 16
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run"]


@pytest.fixture
def checkpoint(
    tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any]
) -> Path:
    """A converted tiny Llama of unit weights, with mean compensation, and its dense parent beside it."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    plan = make_plan(model)[0]
    fill = np.full((6, 32), 0.01, np.float32)
    plan = replace(plan, layers=[replace(layer, compensation=fill) for layer in plan.layers])
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, 12)) for _ in range(60)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tune(checkpoint: Path, out: Path, text: Path, state: Path | None = None, **more: Any) -> dict[str, Any]:
    from transformers import AutoTokenizer

    options = {"tokens": 4 * 4 * LENGTH, "length": LENGTH, "batch": 4, "lr": 1e-2, "router_lr": 1e-2, "eval_every": 2}
    settings = TrainSettings(**{**options, **more})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    windows = finetune.all_windows(tokenizer, calibration.read_text(str(text)), LENGTH)
    out.mkdir()
    return finetune.finetune(checkpoint, out, windows[4:], settings, held_out={"t": windows[:4]}, state=state)


def test_the_result_is_a_checkpoint_that_holds_what_was_trained(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    groups = "lora+scale+router+compensation"
    record = tune(checkpoint, tmp_path / "tuned", text, trainable=groups, balance="bias")
    assert record["curve"][-1]["ppl"]["t"] < record["curve"][0]["ppl"]["t"]
    assert json.loads((tmp_path / "tuned" / "finetune.json").read_text()) == record
    model, plan, _ = modeling.load(tmp_path / "tuned")
    before = MoEPlan.load(checkpoint)
    assert plan.sha256 == record["plan_sha256"] != before.sha256 == record["parent_plan_sha256"]
    for layer, old, ffn in zip(plan.layers, before.layers, modeling.sparse_ffns(model), strict=True):
        assert layer.combine == ffn.combine == "scaled"
        assert old.combine == "unit"
        for name in ("scale", "selection_bias", "compensation"):
            assert np.array_equal(getattr(layer, name), getattr(ffn, name).numpy())
            assert getattr(layer, name).any()
        for name, value in layer.router.tensors.items():
            assert np.array_equal(value, ffn.router.state_dict()[name].numpy())
            assert not np.array_equal(value, old.router.tensors[name])
    # the weights changed too, so the plan alone is no longer the model
    assert plan.differs_from_dense() == "weights are trained"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(MoEdgeError, match="fine-tuned weights"):
        modeling.apply(plan, dense)


def test_a_run_that_trains_what_the_plan_holds_leaves_a_plan_for_the_dense_model(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    tune(checkpoint, tmp_path / "tuned", text, trainable="scale+router+compensation")
    model, plan, _ = modeling.load(tmp_path / "tuned")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again = modeling.apply(plan, dense)
    ids = torch.arange(2, 34).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_checkpoint_in_half_precision_stays_one(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    model, plan, tokenizer = modeling.load(checkpoint)
    modeling.save(offload.cast(model, torch.bfloat16), plan, tokenizer, tmp_path / "half")
    tune(tmp_path / "half", tmp_path / "tuned", text, trainable="lora+router+compensation")
    saved = load_file(tmp_path / "tuned" / "model.safetensors")
    wide = {name for name, tensor in saved.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in saved if ".router." in name or name.endswith("selection_bias")}
    assert {tensor.dtype for name, tensor in saved.items() if name not in wide} == {torch.bfloat16}
    model, plan, _ = modeling.load(tmp_path / "tuned", "auto")
    assert model.dtype == torch.bfloat16
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert plan.provenance["finetune"]["weights"] == found.hexdigest()
    for layer, ffn in zip(plan.layers, modeling.sparse_ffns(model), strict=True):
        np.testing.assert_array_equal(layer.compensation, ffn.compensation.float())


def test_a_text_is_not_measured_on_what_was_trained_however_it_is_spelled(text: Path, tiny_tokenizer: Any) -> None:
    from moedge.runtime.commands.finetune import _Texts, _texts, settings_from

    settings, other = settings_from({"tokens": 64, "length": 16}), f"{text.parent}/../{text.parent.name}/{text.name}"
    plan = MoEPlan("cmoe", {}, {}, [])
    one, two = (_texts(tiny_tokenizer, plan, _Texts([str(text)], given, 10, 2), settings) for given in (None, [other]))
    assert (one[1]["text"] == two[1]["text"]).all()
    assert one[2]["text_sha256"] == [sha256_file(text)]


def test_a_text_is_not_measured_on_what_the_model_was_made_with(text: Path, tiny_tokenizer: Any) -> None:
    """By the conversion or by an earlier training, on another text."""
    from moedge.runtime.commands.finetune import _Texts, _texts, settings_from

    used = {"text_sha256": sha256_file(text), "held_out_every": 10}
    (text.parent / "new.txt").write_text("a dog ran on the mat\n" * 60, encoding="utf-8")
    given = _Texts([str(text.parent / "new.txt")], [str(text)], 10, 2)
    settings = settings_from({"tokens": 64, "length": 16})
    held = calibration.split(calibration.read_text(str(text)), 10)[1]
    expected = calibration.windows(tiny_tokenizer, held, 16, 2, bos=False, name="held-out")
    for provenance in ({"calibration_texts": [used]}, {"finetune": {**used, "text_sha256": [used["text_sha256"]]}}):
        plan = MoEPlan("cmoe", {}, {}, [], provenance)
        assert np.array_equal(_texts(tiny_tokenizer, plan, given, settings)[1]["text"], expected)
        with pytest.raises(MoEdgeError, match="give --holdout-every 10 or a multiple of it"):
            _texts(tiny_tokenizer, plan, replace(given, every=7), settings)


def test_a_saved_training_goes_on_with_its_own_model_alone(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, tokenizer = modeling.load(checkpoint)
    model.model.norm.weight.data *= 2
    modeling.save(model, plan, tokenizer, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_back", lambda *_: 1 / 0)  # stopped before anything is written
        with pytest.raises(ZeroDivisionError):
            tune(checkpoint, tmp_path / "out", text, state=tmp_path / "state")
    with pytest.raises(MoEdgeError, match="holds a run of another model"):
        tune(tmp_path / "other", tmp_path / "new", text, state=tmp_path / "state")
    tune(checkpoint, tmp_path / "again", text, state=tmp_path / "state")


def test_texts_of_one_file_name_are_all_measured(text: Path, tiny_tokenizer: Any) -> None:
    from moedge.runtime.commands.finetune import _Texts, _texts, settings_from

    for folder in "ab":
        (text.parent / folder).mkdir()
        (text.parent / folder / "text.txt").write_text(f"the cat {folder} " * 40, encoding="utf-8")
    given = [str(text), *(str(text.parent / folder / "text.txt") for folder in "ab")]
    settings = settings_from({"tokens": 64, "length": 16})
    plan = MoEPlan("cmoe", {}, {}, [])
    _, measured, about = _texts(tiny_tokenizer, plan, _Texts([str(text)], given, 10, 1), settings)
    assert list(about["held_out"].items()) == list(zip(["text", "text (2)", "text (3)"], given, strict=True))
    assert len({ids.tobytes() for ids in measured.values()}) == 3


def test_two_runs_of_one_seed_are_one_checkpoint(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tune(checkpoint, tmp_path / name, text, balance="bias")
    one, two = (hash_tree(tmp_path / name) for name in ("one", "two"))
    one.pop("finetune.json")  # holds seconds
    two.pop("finetune.json")
    assert one == two
    tune(checkpoint, tmp_path / "three", text, balance="bias", seed=1)
    assert MoEPlan.load(tmp_path / "one").sha256 != MoEPlan.load(tmp_path / "three").sha256


def test_the_command_writes_checkpoint_record_and_picture(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    options = ["--length", "16", "--batch-size", "2", "--eval-windows", "2", "--set", "eval_every=2"]
    options += ["--set", "lr=0.01", "--tokens", "128", "--distill", "logits", "--dense", str(tmp_path / "dense")]
    result = CliRunner().invoke(app, ["finetune", str(checkpoint), str(out), "--text", str(text), *options])
    assert result.exit_code == 0, result.output
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "finetune.json").read_text())
    assert [entry["step"] for entry in record["curve"]] == [0, 2, 4]
    assert record["about"]["held_out_tokens"] == {"text": 30}
    assert record["settings"]["distill"] == "logits"
    assert not (tmp_path / ".tuned.training").exists()
    modeling.load(out)
    again = CliRunner().invoke(app, ["finetune", str(checkpoint), str(out), "--text", str(text), *options])
    assert again.exit_code != 0
    assert "--force" in again.output


def test_another_parent_than_the_one_that_was_converted_is_noted(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise MoEdgeError("trained")

    monkeypatch.setattr(finetune, "finetune", stop)
    plan = MoEPlan.load(checkpoint)
    options = ["--text", text, "--tokens", 64, "--length", 16, "--distill", "logits", "--dense", tmp_path / "dense"]
    for sha256, noted in (("", False), ("0" * 64, True)):
        replace(plan, model={**plan.model, "sha256": sha256}).save(checkpoint)
        result = CliRunner().invoke(app, ["finetune", str(checkpoint), str(tmp_path / "out"), *map(str, options)])
        assert "trained" in result.stderr
        said = " ".join(result.stderr.split())  # lines break where the path ends
        assert ("is not the folder that was converted (its files differ)" in said) == noted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokens", "64", "--distill", "logits"], "--dense"),
        (["--tokens", "64", "--dense", "{dense}"], "--dense is learnt from with --distill"),
        ([], "give a budget, either tokens or minutes"),
        (["--tokens", "64", "--minutes", "1"], "either tokens or minutes, not both"),
        (["--tokens", "64", "--train", "everything"], "--train: unknown group"),
        (["--tokens", "64", "--precision", "fp8"], "--precision: unknown value 'fp8'; choose 'no',"),
        (["--tokens", "64", "--set", "clip=-1"], "--set clip: must be at least 0, got -1"),
        (["--tokens", "64", "--set", "learning=1"], "--set learning: unknown key; known keys here: "),
        (["--tokens", "64", "--length", "257"], "--length 257 is beyond the model's 256 positions; make it smaller."),
        (["--tokens", "64", "--length", "16", "--text", "{text}", "--state", "{dense}"], "holds other files, which"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    checkpoint: Path, text: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    options = [option.format(text=text, dense=tmp_path / "dense") for option in options]
    result = CliRunner().invoke(app, ["finetune", str(checkpoint), str(tmp_path / "no"), *options])
    assert result.exit_code not in (0, 1) or result.output.startswith("error: ")
    assert says in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("new", "lie in one another"),  # and the checkpoint would go with it
        ("new/model", "lie in one another"),
        ("new/model/state", "lie in one another"),
        ("new/../new", "lie in one another"),
        ("text.txt", "--state {state}/state.json cannot be written: Not a directory"),
        ("text.txt/state", "--state {state}/state.json cannot be written: Not a directory"),
        ("kept", "--state {state} is or holds {text}, which would be deleted"),
    ],
)
def test_a_place_of_saved_training_that_costs_something_is_refused_before_training(
    checkpoint: Path, tmp_path: Path, text: Path, state: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "finetune", lambda *_, **__: pytest.fail("trained"))
    kept = tmp_path / "kept" / "text.txt"
    kept.parent.mkdir()
    kept.write_bytes(text.read_bytes())
    (tmp_path / "kept" / "state.json").write_text("{}")
    before = hash_tree(tmp_path)
    options = ["--tokens", "64", "--length", "16", "--text", str(kept), "--state", str(tmp_path / state)]
    result = CliRunner().invoke(app, ["finetune", str(checkpoint), str(tmp_path / "new" / "model"), *options])
    assert result.exit_code == 2
    said = says.format(state=tmp_path / state, text=kept)
    assert said in result.stderr
    assert hash_tree(tmp_path) == before


def test_a_tuned_checkpoint_exports_and_computes_the_same(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    from moedge.export.pipeline import export
    from moedge.runtime.engines import open_engine

    tune(checkpoint, tmp_path / "tuned", text, trainable="lora+scale+router", balance="bias")
    model, _, _ = modeling.load(tmp_path / "tuned")
    folder = export(tmp_path / "tuned", tmp_path / "bundles", ["ort-cpu"], label="tuned")["ort-cpu"]
    ids = np.arange(2, 18, dtype=np.int64).reshape(1, 16)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    engine = open_engine(folder)
    got = engine.prefill(ids).logits
    engine.close()
    # float32 sums of some hundred terms in another order, through two layers
    assert np.abs(got.reshape(-1) - wanted[:, -got.shape[1] :].reshape(-1)).max() < 1e-4 * np.abs(wanted).max()
