"""4-bit weights chosen on a text: the same format and size, less error where the inputs are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.export import bundle
from moedge.export.pipeline import export
from moedge.export.quantize import format as quantize
from moedge.export.quantize import moments as calibrate
from moedge.export.quantize.stored import dequantized_weights

EXPERTS, TOP_K = 5, 2
WINDOWS = np.random.default_rng(3).integers(0, 256, (8, 32))


def lost(weight: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """Squared error of the outputs of [N, K] over the tokens that the moments are of."""
    difference = (rounded - weight).astype(np.float64)
    return float(((difference @ moments) * difference).sum())


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """512 correlated inputs of 70 numbers: a last block that is not full."""
    generator = np.random.default_rng(0)
    return (generator.standard_normal((512, 12)) @ generator.standard_normal((12, 70))).astype(np.float32)


def test_gptq_loses_less_at_the_same_size(inputs):
    weight = np.random.default_rng(1).standard_normal((48, 70)).astype(np.float32)
    moments = inputs.T @ inputs
    nearest, chosen = quantize.quantize(weight, 4), quantize.quantize(weight, 4, "gptq", moments)
    assert (chosen.nbytes, chosen.packed.shape, chosen.zero_points) == (nearest.nbytes, nearest.packed.shape, None)
    one, two = (lost(weight, value.dequantized(), moments) for value in (nearest, chosen))
    assert two < one / 4  # 12 directions of 70: most of the error can be put where no input is
    # One step of the grid at most, whatever was moved where: no weight is lost.
    assert np.abs(chosen.dequantized() - weight).max() < np.abs(weight).max()


def test_a_stack_takes_moments_for_all_or_for_each(inputs):
    stack = np.random.default_rng(1).standard_normal((3, 8, 70)).astype(np.float32)
    moments = inputs.T @ inputs
    same = quantize.quantize(stack, 4, "gptq", moments)
    each = quantize.quantize(stack, 4, "gptq", np.stack([moments, moments, moments * 0]))
    np.testing.assert_array_equal(same.dequantized()[:2], each.dequantized()[:2])
    alone = quantize.quantize(stack[2], 4).dequantized()  # no token chose the last expert: nothing to weigh errors by
    error = np.linalg.norm(each.dequantized()[2] - stack[2])
    assert 0 < error < 1.5 * np.linalg.norm(alone - stack[2])


def test_inputs_that_were_never_seen_keep_their_weights(inputs):
    weight = np.random.default_rng(1).standard_normal((8, 70)).astype(np.float32)
    unseen = inputs.copy()
    unseen[:, 5] = 0
    rounded = quantize.quantize(weight, 4, "gptq", unseen.T @ unseen).dequantized()
    assert np.abs(rounded[:, 5]).min() > 0 or np.abs(weight[:, 5]).min() < 0.2
    assert np.abs(rounded[:, 5] - weight[:, 5]).max() < 0.3


def test_eight_bits_are_refused(inputs):
    with pytest.raises(MoEdgeError, match="GPTQ is for 4 bits"):
        quantize.quantize(np.ones((2, 70), np.float32), 8, "gptq", inputs.T @ inputs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    from moedge.convert import calibration, methods, modeling

    root = tmp_path_factory.mktemp("gptq")
    model = tiny_llama(hidden=64, width=160, layers=1)
    plan = methods.convert(
        "cmoe", calibration.collect(model, WINDOWS, k_a=8), model, shared=3, active=TOP_K, experts=8, k_a=8
    )
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    found = export(root / "moe", root / "bundles", ["ort-cpu-int4"], label="tiny", calibration=WINDOWS)
    return {"checkpoint": root / "moe", **found}


def _gate(graph, activation):
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "SparseGLU" and attribute.name == "activation":
                attribute.s = activation.encode()


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moments_are_those_of_pytorch(made, activation, broken_copy, tmp_path):
    """With one layer nothing that is looked at follows the experts, so another activation is another attribute."""

    from moedge.convert import modeling

    model = modeling.load(made["checkpoint"])[0]
    (ffn,) = [module for module in model.modules() if isinstance(module, modeling.SparseFFN)]
    ffn.record_routes = True
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    ffn.register_forward_hook(lambda module, args, _: seen.append((args[0].reshape(-1, 64), module.last_routes)))
    with torch.inference_mode():
        for window in WINDOWS:
            model(torch.from_numpy(window[None]))
        x, routes = (torch.cat(parts) for parts in zip(*seen, strict=True))
        expert = 1
        rows = x[(routes == expert).any(1)]
        hidden = ACTIVATIONS[activation](rows @ ffn.gate[expert].T) * (rows @ ffn.up[expert].T)
    folder = made["portable"]
    if activation != "silu":
        folder = broken_copy(folder, tmp_path / "other", lambda graph: _gate(graph, activation))
    found = calibrate.moments(bundle.open_bundle(folder), WINDOWS)
    name = next(name for name in found if name.endswith("mlp.gate"))
    for value, want in ((found[name], x.T @ x), (found[name.replace("gate", "down")][expert], hidden.T @ hidden)):
        scale = float(want.abs().max())
        np.testing.assert_allclose(value, want.numpy(), atol=1e-4 * scale)  # sums of 256 float32 products, two orders


def test_an_export_on_a_text_is_a_bundle_of_the_same_size_with_less_error(made):
    opened = bundle.open_bundle(made["ort-cpu-int4"])
    section = opened.manifest.document()["quantization"]
    assert (section["method"], section["calibration"]["tokens"]) == ("gptq", WINDOWS.size)
    assert {entry["tensor_class"] for entry in section["classes"]} >= {"attention", "shared", "experts"}
    import onnx_ir as ir

    from moedge.export.graph import weights

    portable = bundle.open_bundle(made["portable"])
    graph = ir.load(portable.model_path)
    table, moments = weights.collect(graph), calibrate.moments(portable, WINDOWS)
    stored = dict(dequantized_weights(opened))
    assert set(stored) - set(moments) == {n for n, w in table.items() if w.tensor_class == "embedding"}
    for name, inputs in moments.items():
        weight = table[name]
        original = weights.array(graph.graph.initializers[name], weight)
        nearest, chosen = quantize.quantize(original, 4).dequantized(), weight.as_rows(stored[name])
        if weight.layout == "ENK":
            pairs = [
                [lost(original[e], one[e], inputs if inputs.ndim == 2 else inputs[e]) for e in range(EXPERTS)]
                for one in (nearest, chosen)
            ]
        else:
            pairs = [[lost(original, one, inputs)] for one in (nearest, chosen)]
        assert sum(pairs[1]) < 0.9 * sum(pairs[0]), name


def test_a_text_of_another_tokenizer_is_refused(made):
    with pytest.raises(MoEdgeError, match="outside the vocabulary"):
        calibrate.moments(bundle.open_bundle(made["portable"]), np.full((1, 8), 10**6))
