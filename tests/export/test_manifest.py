"""The facts of a manifest: what is read is what was written, whatever version wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge._files import digest, write_json
from moedge.export import bundle, manifest
from moedge.runtime.engines import open_engine

KINDS = ("dense/portable", "dense/ort-cpu", "moe/portable", "moe/ort-cpu")


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(source, folder)
    document = json.loads((folder / manifest.MANIFEST).read_text())
    change(document)
    (folder / manifest.MANIFEST).unlink()
    write_json(folder / manifest.MANIFEST, document)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_of_a_bundle_is_its_file(bundles: dict[str, Path], kind: str) -> None:
    opened, stored = bundle.open_bundle(bundles[kind]), json.loads((bundles[kind] / manifest.MANIFEST).read_text())
    assert opened.manifest.document() == stored
    assert opened.sha256 == digest(stored) == manifest.content_hash(bundles[kind])


def test_what_a_newer_version_wrote_is_kept_at_every_level(bundles: dict[str, Path], tmp_path: Path) -> None:
    def add(document: dict[str, Any]) -> None:
        layer = document["moe"]["layers"]["0"]
        for section in (document, document["model"], layer, document["cache"], document["taps"]["0"], document["io"]):
            section["from_the_future"] = {"a": [1, 2.5, None]}

    folder = rewritten(bundles["moe/ort-cpu"], tmp_path / "new", add)
    stored = json.loads((folder / manifest.MANIFEST).read_text())
    assert bundle.open_bundle(folder).manifest.document() == stored
    engine = open_engine(folder, threads=1, taps=True)
    assert engine.info.as_json()["model"]["from_the_future"] == {"a": [1, 2.5, None]}


def test_what_an_older_version_did_not_write_yet_is_not_said(bundles: dict[str, Path], tmp_path: Path) -> None:
    def drop(document: dict[str, Any]) -> None:
        for key in ("limits", "parent"):
            del document[key]
        for key in ("rope_boundary", "bos_token_id", "pad_token_id"):
            del document["model"][key]
        for tap in document["taps"].values():
            del tap["reads"], tap["reads_dtype"]

    folder = rewritten(bundles["moe/portable"], tmp_path / "old", drop)
    facts = bundle.open_bundle(folder).manifest
    assert facts.document() == json.loads((folder / manifest.MANIFEST).read_text()), "defaults are not written back"
    assert (facts.model.rope_boundary, facts.parent, facts.limits) == (None, None, [])
    assert facts.routed_layers == [0, 1]
    assert not facts.names_reads
    ids = np.arange(8)[None]
    got, want = (open_engine(path, threads=1).prefill(ids).logits for path in (folder, bundles["moe/portable"]))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d["cache"].update(kind="ring"), "cache.kind"),
        (lambda d: d["model"].update(vocab_size="260"), "model.vocab_size"),
        (lambda d: d["taps"]["0"].update(kind="one-hot"), "taps.0.kind"),
        (lambda d: d["moe"]["layers"]["1"].pop("top_k"), "moe.layers.1.top_k"),
        (lambda d: d.update(kind="ghost"), "kind"),
    ],
)
def test_a_fact_that_cannot_be_is_named(
    bundles: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], Any], place: str
) -> None:
    folder = rewritten(bundles["moe/portable"], tmp_path / "damaged", change)
    for reader in (bundle.open_bundle, manifest.read):
        with pytest.raises(MoEdgeError, match=rf"damaged: {place} is not what it should be; export again"):
            reader(folder)


def test_a_folder_without_a_manifest_has_no_facts(checkpoints: dict[str, Path]) -> None:
    assert manifest.read(checkpoints["moe"]) is None


def test_programs_may_still_ask_an_engine_for_facts_by_name(bundles: dict[str, Path]) -> None:
    model = open_engine(bundles["moe/ort-cpu"], threads=1).info.model
    assert (model["routed"], model["target"], model.get("nothing", 7)) == (True, "ort-cpu", 7)
    assert model["hidden_size"] == model.document()["hidden_size"], "a fact without a field of its own"
    with pytest.raises(KeyError):
        model["nothing"]
