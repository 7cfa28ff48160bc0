"""Portable bundles that an older version of this package exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir, hash_tree
from moedge.export import bundle
from moedge.export.pipeline import lower
from moedge.runtime.engines import open_engine


def without(source: Path, folder: Path, dropped: Mapping[str, set[str]]) -> Path:
    """Copy a bundle whose nodes, and the functions that they call, do not know some attributes: operator -> names."""
    shutil.copytree(source, folder)
    manifest = bundle.open_bundle(folder).manifest.document()
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    found = 0
    for node in model.graph.node:
        if node.op_type in dropped:
            kept = [attribute for attribute in node.attribute if attribute.name not in dropped[node.op_type]]
            found += len(node.attribute) - len(kept)
            del node.attribute[:]
            node.attribute.extend(kept)
    for function in model.functions:
        kept_names = [name for name in function.attribute if name not in dropped.get(function.name, set())]
        del function.attribute[:]
        function.attribute.extend(kept_names)
    assert found, "the bundle has such attributes to drop"
    onnx.save(model, folder / "model.onnx")
    (folder / bundle.MANIFEST).unlink()
    bundle.seal(folder, bundle.Manifest.model_validate(manifest))
    return folder


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "tensorrt-rtx"])
def test_a_bundle_from_before_sliding_windows_is_lowered_as_before(
    bundles: dict[str, Path], tmp_path: Path, target: str
) -> None:
    """Models with a window or a soft cap were refused then, so their nodes mean what 0 means now."""
    dropped = {"CausalAttention": {"window", "softcap"}}
    old = without(bundles["moe/portable"], tmp_path / "old", dropped)
    made = {}
    for name, source in (("old", old), ("new", bundles["moe/portable"])):
        with atomic_dir(tmp_path / f"{name}-{target}") as partial:
            lower(target, source, partial)
        made[name] = tmp_path / f"{name}-{target}"
    hashes = {name: hash_tree(folder) for name, folder in made.items()}
    assert hashes["old"]["model.onnx"] == hashes["new"]["model.onnx"]
    assert hashes["old"]["model.onnx.data"] == hashes["new"]["model.onnx.data"]
    ids = np.arange(8)[None]
    logits: list[Any] = [open_engine(folder, threads=1).prefill(ids).logits for folder in (old, made["new"])]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-2 * np.abs(logits[0]).max())  # half precision, 2 layers


def test_what_cannot_be_known_any_more_says_what_to_export_again(bundles: dict[str, Path], tmp_path: Path) -> None:
    old = without(bundles["moe/portable"], tmp_path / "old", {"SparseGLU": {"activation"}})
    with (
        pytest.raises(
            MoEdgeError, match=r"old was exported by an older moedge: its SparseGLU nodes have no activation"
        ),
        atomic_dir(tmp_path / "ort-cpu") as partial,
    ):
        lower("ort-cpu", old, partial)
    assert not (tmp_path / "ort-cpu").exists()
