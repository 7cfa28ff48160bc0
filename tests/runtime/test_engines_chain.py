"""PyTorch and both ONNX targets of one converted model, through the real export: the same model in every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.runtime.engines import Engine, open_engine
from moedge.runtime.parity.compare import compare, identity_all

LAYERS, WIDTH, EXPERTS, TOP_K, ALL = 2, 48, 4, 2, 1 << 16
WINDOWS = np.random.default_rng(0).integers(0, 256, (2, 60))
ENGINES = ["torch", "portable", "ort-cpu"]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> dict[str, Path]:
    """``dense`` and ``torch`` checkpoints, and the bundles ``portable`` and ``ort-cpu`` of the latter."""
    from moedge.convert import adapters, modeling
    from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan
    from moedge.export.pipeline import export

    root = tmp_path_factory.mktemp("chain")
    model = tiny_model(layers=LAYERS, width=WIDTH)
    model.save_pretrained(root / "dense")
    tiny_tokenizer.save_pretrained(root / "dense")
    generator = np.random.default_rng(0)
    layers = []
    for _ in range(LAYERS):
        shared, *experts = np.split(generator.permutation(WIDTH).astype(np.int32), [16, 24, 32, 40])
        weight = generator.standard_normal((EXPERTS, 32), dtype=np.float32)
        bias = generator.normal(0, 0.1, EXPERTS).astype(np.float32)
        layers.append(
            LayerPlan(
                shared, experts, TOP_K, RouterPlan("random", {"weight": weight}, {"seed": 0}), selection_bias=bias
            )
        )
    plan = MoEPlan("test", {}, adapters.describe(model), layers)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    bundles = export(root / "moe", root / "bundles", ["portable", "ort-cpu"], label="tiny")
    return {"dense": root / "dense", "torch": root / "moe", **bundles}


def limits(engine: Engine) -> tolerances.Profile:
    return tolerances.load().profile(engine.info.dtype, engine.info.model.target)


@pytest.mark.parametrize("name", ENGINES)
def test_with_every_expert_the_model_is_its_dense_parent(name: str, folders: dict[str, Path]) -> None:
    dense = open_engine(folders["dense"], threads=1)
    test = open_engine(folders[name], threads=1, top_k=ALL)
    limit = limits(test).identity_rel_error
    result = identity_all(dense, {name: (test, limit)}, WINDOWS)[name]
    assert result["passed"], result["max_rel_error"]
    # The same check must be able to fail: the sparse model is not the dense one.
    sparse = open_engine(folders[name], threads=1)
    assert not identity_all(dense, {name: (sparse, limit)}, WINDOWS)[name]["passed"]


@pytest.mark.parametrize("name", ["portable", "ort-cpu"])
def test_the_sparse_model_passes_parity_with_its_routing(name: str, folders: dict[str, Path]) -> None:
    reference = open_engine(folders["torch"], threads=1, taps=True)
    test = open_engine(folders[name], threads=1, taps=True)
    result = compare(reference, test, WINDOWS, prefill=20, tolerances=limits(test))
    assert result["verdict"]["passed"], [check for check in result["verdict"]["checks"] if not check["passed"]]
    assert result["routing"]["decisions"] == LAYERS * 60 * len(WINDOWS)


@pytest.mark.parametrize("name", ENGINES)
def test_a_padded_batch_equals_its_rows(name: str, folders: dict[str, Path]) -> None:
    engine = open_engine(folders[name], threads=1)
    mask = np.ones((3, 12), dtype=np.int64)
    mask[1, :7] = mask[2, :11] = 0
    ids = np.random.default_rng(1).integers(0, 256, mask.shape)
    step = engine.prefill(ids, mask)
    batch = [step.logits[:, -1]]
    for token in range(3):
        step = engine.decode(ids[:, token : token + 1], step.cache)
        batch.append(step.logits[:, -1])
    for row in range(3):
        step = engine.prefill(ids[row : row + 1, mask[row].argmax() :])
        alone = [step.logits[0, -1]]
        for token in range(3):
            step = engine.decode(ids[row : row + 1, token : token + 1], step.cache)
            alone.append(step.logits[0, -1])
        # Other sizes of the same sums: a few float32 ulp of logits below 10.
        np.testing.assert_allclose([logits[row] for logits in batch], alone, atol=1e-5)


def test_torch_engine_says_what_it_is_and_refuses_what_it_cannot(folders: dict[str, Path]) -> None:
    engine = open_engine(folders["torch"], threads=1, taps=True)
    assert engine.info.name == "torch moe"
    assert engine.info.model.eos_token_ids == [257]
    step = engine.prefill(WINDOWS[:1])
    assert step.routes is not None
    assert {layer: chosen.shape for layer, chosen in step.routes.items()} == {0: (60, TOP_K), 1: (60, TOP_K)}
    engine.decode(WINDOWS[:1, :1], step.cache)
    with pytest.raises(MoEdgeError, match="prefill again"):
        engine.decode(WINDOWS[:1, :1], step.cache)
    with pytest.raises(MoEdgeError, match="257 tokens do not fit: this model holds at most 256"):
        engine.prefill(np.ones((1, 257), dtype=np.int64))
    engine.close()
    with pytest.raises(MoEdgeError, match="closed"):
        engine.prefill(WINDOWS[:1])
    with pytest.raises(MoEdgeError, match="needs k >= 1 and a routed model"):
        open_engine(folders["dense"], top_k=2)
