from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.runtime.cli import app


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    tiny_llama(layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    letters = random.Random(0)
    for name, alphabet in {"a": "abcdef ", "b": "0123456789", "c": "abcdeg "}.items():
        lines = ["".join(letters.choices(alphabet, k=60)) for _ in range(40)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def command(home: Path, *settings: str) -> Any:
    texts = json.dumps({name: str(home / f"{name}.txt") for name in "abc"})
    options = [f"--set={part}" for part in (f"domains={texts}", "experts=2", "samples=4", "length=32", *settings)]
    return CliRunner().invoke(app, ["domains", str(home / "model"), str(home / "out"), *options])


def test_it_writes_the_affinity_as_json_page_and_picture(home: Path) -> None:
    result = command(home)
    assert result.exit_code == 0, result.output
    found = json.loads((home / "out" / "affinity.json").read_text(encoding="utf-8"))
    assert found["names"] == ["a", "b", "c"]
    assert sorted(sum(found["groups"], [])) == ["a", "b", "c"]  # noqa: RUF017 - two lists
    assert f"group 1: {', '.join(found['groups'][0])}" in result.output
    assert [fact["tokens"] for fact in found["domains"]] == [4 * 32] * 3
    assert "<svg" in (home / "out" / "affinity.html").read_text(encoding="utf-8")
    assert (home / "out" / "affinity.png").read_bytes().startswith(b"\x89PNG")
    assert "already exists" in command(home).output


def test_a_bad_setting_is_one_sentence_and_leaves_nothing(home: Path) -> None:
    for setting, said in (
        ("nothing=1", "nothing: unknown key; known keys here: domains,"),
        ("linkage=ward", "linkage: unknown value 'ward'; choose 'average',"),
    ):
        result = command(home, setting)
        assert result.exit_code != 0
        assert said in result.output
        assert not (home / "out").exists()


def test_a_checkpoint_is_retrained_on_its_domains(home: Path) -> None:
    texts = json.dumps({name: str(home / f"{name}.txt") for name in "abc"})
    options = [f"--set={part}" for part in (f"domains={texts}", "experts=2", "samples=4", "length=32")]
    options += ["--method", "dive", "--text", str(home / "a.txt"), "--windows", "2", "--length", "32"]
    made = CliRunner().invoke(app, ["convert", str(home / "model"), str(home / "moe"), *options])
    assert made.exit_code == 0, made.output
    settings = ["--set=length=16", "--set=batch=2", "--set=lr=0.01", "--set=router_lr=0.01", "--set=router_share=0.5"]
    command = ["retrain", str(home / "moe"), str(home / "out"), "--tokens", "256", *settings]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads((home / "out" / "retrain.json").read_text(encoding="utf-8"))
    assert set(found["perplexity"]) == {"before", "after stage 1, router", "after stage 2, experts"}
    assert set(found["perplexity"]["before"]) == {"a", "b", "c"}
    assert found["tokens"] == found["settings"]["tokens"] == 256
    assert not list(home.glob(".out.*"))
    # The result is a checkpoint like the one before: it loads, and measures what the run said.
    import torch
    from safetensors.torch import load_file

    from moedge.convert import domains, modeling, offload, scoring, sources
    from moedge.convert.plan import MoEPlan
    from moedge.convert.train.retrain import folded

    model, plan, tokenizer = modeling.load(home / "out")
    entries = [{"name": fact["name"], "spec": fact["text"], "every": 10} for fact in plan.provenance["domains"]]
    _, held = domains.training_windows(tokenizer, entries, length=16, count=16, seed=0)
    for name, ids in held.items():
        said = found["perplexity"]["after stage 2, experts"][name]
        assert scoring.perplexity(model, ids)["ppl"] == pytest.approx(said, rel=1e-5)
    # Its plan is that of what was trained, not of the checkpoint before.
    _, parent, _ = modeling.load(home / "moe")
    note = plan.provenance["finetune"]
    assert note["parent_plan_sha256"] == parent.sha256 != plan.sha256
    assert plan.sha256 in result.output
    assert plan.trained_weights
    for layer, ffn in zip(plan.layers, modeling.sparse_ffns(model), strict=True):
        for key, tensor in ffn.router.state_dict().items():
            assert np.array_equal(layer.router.tensors[key], tensor.numpy())
    dense = sources.load_model(home / "model")
    with pytest.raises(MoEdgeError, match="belongs to fine-tuned weights"):
        modeling.apply(plan, dense)
    # Where routers alone were trained, the plan still makes the model of its dense parent.
    alone = [
        "retrain",
        str(home / "moe"),
        str(home / "routers"),
        "--tokens",
        "16",
        *settings[:-1],
        "--set=router_share=.99",
    ]
    assert CliRunner().invoke(app, alone).exit_code == 0
    trained, plan, _ = modeling.load(home / "routers")
    assert not plan.trained_weights
    applied = modeling.apply(plan, dense)
    ids = torch.arange(2, 18)[None]
    assert torch.equal(applied(ids).logits, trained(ids).logits)
    assert not torch.equal(modeling.load(home / "moe")[0](ids).logits, trained(ids).logits)
    # The temperature is in its routers: a third stage, as the paper has one, does not put it in again.
    assert not folded(parent)
    assert folded(plan)
    command[1:3] = [str(home / "out"), str(home / "third")]
    assert CliRunner().invoke(app, command).exit_code == 0
    size = [
        np.mean([abs(layer.router.tensors["weight"]).mean() for layer in made.layers])
        for made in (parent, MoEPlan.load(home / "out"), MoEPlan.load(home / "third"))
    ]
    assert size[1] > 10 * size[0]  # 1 / 0.05
    assert size[2] < 2 * size[1]
    command[1:3] = [str(home / "moe"), str(home / "out")]
    again = CliRunner().invoke(app, command)
    assert "already exists" in again.output
    # Of a text that changed nobody knows the held-out documents.
    kept = (home / "a.txt").read_text(encoding="utf-8")
    (home / "a.txt").write_text("one more line\n" + kept, encoding="utf-8")
    changed = CliRunner().invoke(app, [*command[:2], str(home / "changed"), "--tokens", "32", *settings])
    assert "is not the text that" in " ".join(changed.output.split())
    (home / "a.txt").write_text(kept, encoding="utf-8")
    # It has the dtype of the one before.
    model, plan, tokenizer = modeling.load(home / "moe")
    modeling.save(offload.cast(model, torch.bfloat16), plan, tokenizer, home / "half")
    command[1:3] = [str(home / "half"), str(home / "half-out")]
    result = CliRunner().invoke(app, [*command[:3], "--tokens", "32", *settings[:2], "--set=router_share=0"])
    assert result.exit_code == 0, result.output
    kinds = {n: t.dtype for n, t in load_file(home / "half-out" / "model.safetensors").items()}
    wide = [name for name in kinds if ".router." in name or name.endswith("selection_bias")]
    assert {kinds.pop(name) for name in wide} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    # Where the state of another output would be lies the checkpoint itself: it is deleted in the end, so not begun.
    kept = (home / "moe").rename(home / ".new.training")
    again = CliRunner().invoke(app, ["retrain", str(kept), str(home / "new"), "--tokens", "256", *settings])
    assert f"{kept} is or holds {kept}, which would be deleted" in again.stderr
    assert (kept / "plan.json").is_file()


def test_a_checkpoint_of_another_method_is_refused(home: Path) -> None:
    options = ["--text", str(home / "a.txt"), "--windows", "2", "--length", "32"]
    options += ["--method", "mlpmoe", "--set", "branches=8"]
    made = CliRunner().invoke(app, ["convert", str(home / "model"), str(home / "moe"), *options])
    assert made.exit_code == 0, made.output
    result = CliRunner().invoke(app, ["retrain", str(home / "moe"), str(home / "out")])
    assert "was made by mlpmoe, not by dive" in result.output
    assert not (home / "out").exists()
