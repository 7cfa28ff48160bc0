"""Experts with biases of their own (DIVE) through both targets, with unit and with softmax weights."""

import numpy as np
import onnx
import pytest

from moedge.convert import methods, modeling
from moedge.convert.domains import DomainText
from moedge.export.bundle import open_bundle
from moedge.export.pipeline import export
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine

# Two fp32 evaluations of a 2-layer model: some twenty products of at most 64 terms in another order, each 64 * 2^-24.
RELATIVE = 8e-5
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def made(request, tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A DIVE checkpoint of 4 domains in 3 groups, and its bundles."""
    root = tmp_path_factory.mktemp("dive")
    generator = np.random.default_rng(0)
    texts = {name: DomainText(*generator.integers(low, low + 60, (2, 4, 24))) for low, name in enumerate("wxyz")}
    model = tiny_llama()
    names = dict.fromkeys(texts, "none")
    plan = methods.convert("dive", texts, model, domains=names, experts=3, active=request.param)
    for layer in plan.layers:  # large, so that an export without them would show
        layer.expert_bias = layer.expert_bias * 10
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    return root / "moe", export(root / "moe", root / "out", ["portable", "ort-cpu"], label="dive"), request.param


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_engines_agree_with_pytorch(made, target, top_k):
    checkpoint, bundles, _ = made
    torch_engine, ort_engine = (
        engine(path, threads=1, taps=True, top_k=top_k)
        for engine, path in ((TorchEngine, checkpoint), (OrtEngine, bundles[target]))
    )
    try:
        expected, actual = torch_engine.prefill(IDS), ort_engine.prefill(IDS)
        assert np.abs(actual.logits - expected.logits).max() < RELATIVE * np.abs(expected.logits).max()
        for layer, chosen in expected.routes.items():
            np.testing.assert_array_equal(np.sort(actual.routes[layer]), np.sort(chosen))
        step = np.array([[5]])
        one, other = torch_engine.decode(step, expected.cache), ort_engine.decode(step, actual.cache)
        assert np.abs(other.logits - one.logits).max() < RELATIVE * np.abs(one.logits).max()
    finally:
        torch_engine.close()
        ort_engine.close()


def test_the_fused_graph_keeps_the_kernel_and_no_second_routing(made):
    _, bundles, active = made
    graph = onnx.load(open_bundle(bundles["ort-cpu"]).model_path, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("RoutedGLU") == 2
    assert kinds.count("Route") == (0 if active == 1 else 2)  # softmax weights are read from it
    assert len([value for value in graph.initializer if value.name.endswith("expert_bias")]) == 2
