"""Where an engine is wanted, a dense model may be given by its name; what is a path stays one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moedge import MoEdgeError
from moedge.runtime.engines.given import local


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """The hub's cache, offline, with ``tiny/llama`` in it: a snapshot is a folder of links."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--tiny--llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    plain = repository / "blobs"
    tiny_llama().save_pretrained(plain)
    tiny_tokenizer.save_pretrained(plain)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file in plain.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_hub_id_is_its_snapshot(hub: Path) -> None:
    assert local(Path("tiny/llama")).resolve() == hub
    assert local(hub) == hub


def test_paths_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("build", "build/gone", "/gone/model", "../gone", "gone", "gone/a/b", "model.onnx", "gone.gguf"):
        assert local(Path(path)) == Path(path)


def test_a_hub_id_that_cannot_be_had_is_one_sentence(hub: Path) -> None:
    with pytest.raises(MoEdgeError, match="Cannot download tiny/other from the Hugging Face hub"):
        local(Path("tiny/other"))


def test_a_model_of_the_hub_is_exported_under_its_id(hub: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from moedge.export.bundle import open_bundle
    from moedge.runtime.cli import app

    result = CliRunner().invoke(app, ["export", "tiny/llama", str(tmp_path / "out"), "--target", "portable"])
    assert result.exit_code == 0, result.output
    bundle = open_bundle(tmp_path / "out" / "portable")
    assert bundle.manifest["label"] == "tiny/llama"
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(bundle.manifest["files"])
