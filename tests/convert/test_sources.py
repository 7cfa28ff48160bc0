from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.convert import modeling, sources
from moedge.convert.sources import assets


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    path = tmp_path / "dense"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_folder_is_identified_by_its_contents(folder: Path, tiny_llama: Callable[..., Any]) -> None:
    source = sources.resolve(str(folder))
    assert (source.kind, source.folder, source.label) == ("folder", folder, "dense")
    model = sources.load_model(source.folder)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (folder / "notes.txt").write_text("not part of the model")
    assert sources.resolve(str(folder)).sha256 == source.sha256
    tiny_llama(seed=1).save_pretrained(folder)
    assert sources.resolve(str(folder)).sha256 != source.sha256


@pytest.mark.parametrize("spec", ["nowhere/at/all", "./gone", "/gone/model.gguf", "gone.gguf", "gone"])
def test_missing_model(spec: str) -> None:
    with pytest.raises(MoEdgeError, match="does not exist"):
        sources.resolve(spec)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(MoEdgeError, match=r"neither a folder nor a \.gguf file"):
        sources.resolve(str(tmp_path / "model.onnx"))


def test_unknown_asset_names_the_known_ones() -> None:
    with pytest.raises(MoEdgeError, match=r"Unknown asset 'nope'; known: .*smollm2-135m-instruct"):
        sources.resolve("asset:nope")


def test_pickle_only_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MoEdgeError, match="pickle weights"):
        sources.resolve(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(MoEdgeError, match="holds no"):
        sources.resolve(str(folder))


def test_folder_without_a_readable_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(MoEdgeError, match=r"config\.json is damaged"):
        sources.resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(MoEdgeError, match=r"has no config\.json"):
        sources.resolve(str(folder))


def test_models_that_cannot_be_converted_are_refused_before_loading(folder: Path, tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MoEdgeError, match=r"no GLU FFN \(model type 'gpt2'"):
        sources.resolve(str(tmp_path / "gpt2"))
    for config, message in (
        ({"model_type": "martian"}, "unknown architecture, model type 'martian'"),
        ({"model_type": "glm4", "num_hidden_layers": 1}, "model type 'glm4' has no adapter yet"),
        (PhiConfig(num_hidden_layers=1).to_dict(), r"no GLU FFN \(model type 'phi'"),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(MoEdgeError, match=message):
            sources.resolve(str(folder))


def test_converted_checkpoint_is_refused(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    with pytest.raises(MoEdgeError, match="already a MoEdge Mixture-of-Experts"):
        sources.resolve(str(tmp_path / "moe"))


def test_unknown_activations_are_refused(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match="activation 'relu' is not supported"):
        make_plan(tiny_llama(hidden_act="relu"))


def test_damaged_weights_are_one_sentence(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-50])
    with pytest.raises(MoEdgeError, match=r"model\.safetensors is damaged: .* Download it again"):
        sources.load_model(folder)


def test_weights_that_transformers_would_make_up_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(MoEdgeError, match=rf"weight {name} is missing; download"):
        sources.load_model(folder)
    save_file({**weights, name: weights[name][:48].clone()}, path, {"format": "pt"})
    with pytest.raises(MoEdgeError, match=rf"weight {name} has shape \[48, 32\], config.json wants \[64, 32\]; down"):
        sources.load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", sources.DTYPES)
def test_weights_that_are_not_finite_are_refused(folder: Path, dtype: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoEdgeError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        sources.load_model(folder, dtype)


@pytest.mark.parametrize(("left", "share", "free"), [(None, "1", 1000), (600.0, "1", 600), (2000.0, "4", 250)])
def test_free_memory_is_that_of_the_container_and_of_one_process(
    left: float | None, share: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr("moedge.runtime.device.moedge_sensors.memory_left", lambda: left)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", share)
    assert sources._free("cpu") == free


@pytest.mark.parametrize("left", ["chat_template.jinja", "special_tokens_map.json"])
def test_a_folder_without_a_tokenizer_says_so(left: str, folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / left).write_text("{}")  # belongs to a tokenizer, but makes none
    with pytest.raises(MoEdgeError, match=r"has no tokenizer; copy tokenizer\.json"):
        sources.load_tokenizer(folder)


def test_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MoEdgeError, match="Cannot download no-such-org/no-such-model at revision v1 from the Hugging Face hub"
    ):
        sources.resolve("no-such-org/no-such-model", revision="v1")


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_not_read_is_neither_fetched_nor_part_of_the_identity(
    sharded: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Mistral's repositories hold the weights twice, others once more in a folder below."""
    shards = ("model-00001-of-00001.safetensors", "model.safetensors.index.json")
    if sharded:
        (folder / "model.safetensors").rename(folder / shards[0])
        write_json(folder / shards[1], {"weight_map": {"model.norm.weight": shards[0]}})
    before = sources.identity(folder)
    unread = ("consolidated.safetensors", "model.fp16.safetensors", "fp32/model.safetensors", "onnx/tokenizer.json")
    for name in unread:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    assert sources.identity(folder) == before
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    revisions = []

    def download(spec: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        revisions.append(revision)
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in filter_repo_objects(there, **patterns):
            (tmp_path / "commit" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / "commit" / name)
        return str(tmp_path / "commit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = sources._from_hub("org/name", "main")
    assert revisions == ["main", "commit"]
    names = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"} <= names
    assert set(shards if sharded else ["model.safetensors"]) <= names
    assert not names & set(unread)
    assert sources.identity(found) == sources.identity(folder)


def test_every_catalogue_entry_is_complete() -> None:
    for name, asset in assets.catalogue().items():
        assert asset.name == name
        assert len(asset.sha256) == len(asset.wheel_sha256) == 64
        assert asset.licence
        assert asset.what
