"""Route replay: a healthy quantised bundle passes although its choices flip; a broken router or kernel is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.calls import FORCED, forcing
from moedge.runtime.parity.given import pair
from moedge.runtime.parity.shapes import Asked
from moedge.runtime.report.checks import explained

HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS = 64, 256, 6, 2, 2
WINDOWS = np.random.default_rng(1).integers(0, 256, (3, 64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """A converted checkpoint and its bundles: CMoE's router, and a selection bias that matters."""
    from moedge.convert import calibration, methods, modeling

    root = tmp_path_factory.mktemp("replay")
    model = tiny_llama(layers=LAYERS, hidden=HIDDEN, width=WIDTH)
    model.model.norm.weight.data *= 2  # logits with a standard deviation of 3, which the limits are derived for
    for layer in model.model.layers:  # random weights of 0.2 make attention sharper than training does
        layer.self_attn.q_proj.weight.data *= 0.25
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    plan = methods.convert(
        "cmoe", calibration.collect(model, tokens, k_a=8), model, shared=2, active=TOP_K, experts=8, k_a=8
    )
    generator = np.random.default_rng(2)
    for layer in plan.layers:
        layer.selection_bias = generator.normal(0, 0.3, EXPERTS).astype(np.float32)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "checkpoint")
    made = export(root / "checkpoint", root / "bundles", ["ort-cpu-int8", "ort-cpu-int4", "ort-cpu"], label="tiny")
    return {"checkpoint": root / "checkpoint", **made}


def verified(reference: Path, test: Path) -> dict[str, dict[str, Any]]:
    """``float32`` (against the reference) and ``kernels`` (against its own de-quantised weights)."""
    found = pair(reference, test, "random", WINDOWS, 24, "float32", {"threads": 1}, lambda *_: None)["parity"]
    return dict(zip(("float32", "kernels"), found, strict=True))


def failed(entry: dict[str, Any]) -> set[str]:
    return {name for name, passed in entry["verdict"]["parts"].items() if not passed}


@pytest.mark.parametrize("target", ["ort-cpu-int8", "ort-cpu-int4"])
def test_a_healthy_bundle_passes_although_its_choices_flip(folders, target):
    result = verified(folders["portable"], folders[target])
    for kind, entry in result.items():
        assert list(entry["verdict"]["parts"]) == ["arithmetic", "router", "free"]
        assert entry["verdict"]["parts"]["router"]
        if (kind, target) != ("float32", "ort-cpu-int4"):  # what 4 bits cost a random model says nothing
            assert entry["verdict"]["passed"], [check for check in entry["verdict"]["checks"] if not check["passed"]]
    kernels = result["kernels"]
    assert kernels["routing"]["flips"] > 0  # else replay would prove nothing here
    assert kernels["replay"]["router"]["flips"] == 0
    free, forced = (found["overall"]["kl_ref_test"]["mean"] for found in (kernels, kernels["replay"]))
    assert 0 < forced < free / 3
    assert kernels["replay"]["router"]["decisions"] == LAYERS * WINDOWS.size
    assert "free-running KL" in explained(kernels, kernels["replay"])


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-int8", "ort-cpu-int4"])
def test_a_healthy_bundle_is_itself_in_every_shape(folders, target):
    """Under the limits of its kernels, not of what rounding the weights costs."""
    result = pair(
        folders["checkpoint"], folders[target], "random", WINDOWS, 24, "float32", {"threads": 1}, lambda *_: None,
        asked=Asked(thorough=True, long=WINDOWS.reshape(-1)[:100]),
    )  # fmt: skip
    (entry,) = result["shapes"]
    assert entry["verdict"]["passed"], [check for check in entry["verdict"]["checks"] if not check["passed"]]
    assert not entry["not_run"]
    limits = {check["name"]: check["limit"] for check in entry["verdict"]["checks"]}
    name = "float32/ort-cpu" if target == "ort-cpu" else f"dequantized/{target}"
    profile = tolerances.load().profiles[name]
    assert profile.max_kl in {limit for name, limit in limits.items() if name.startswith("alone.")}


def test_pytorch_and_the_portable_graph_replay_the_same(folders):
    one = verified(folders["checkpoint"], folders["ort-cpu-int8"])["float32"]
    two = verified(folders["portable"], folders["ort-cpu-int8"])["float32"]
    for result in (one, two):
        assert result["replay"]["router"]["flips"] == 0
    values = [result["replay"]["overall"]["kl_ref_test"]["mean"] for result in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def no_selection_bias(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.name.endswith("selection_bias"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))


def permuted_router(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.name.startswith("merged.") and len(tensor.dims) == 2:  # [H, gate of every expert, up of every expert]
            halves = numpy_helper.to_array(tensor).reshape(HIDDEN, 2, EXPERTS)[:, :, ::-1]
            tensor.CopyFrom(numpy_helper.from_array(halves.reshape(HIDDEN, -1).copy(), tensor.name))


def wrong_scale(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.name.startswith("experts.") and tensor.name.endswith("down.scales"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))


def exchanged_experts(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.name.startswith("experts."):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))


def renormalised_weights(graph: onnx.GraphProto) -> None:
    for node in [node for node in graph.node if node.op_type == "RoutedGLU"]:
        total, share = f"{node.input[2]}.total", f"{node.input[2]}.share"
        place = list(graph.node).index(node)
        graph.node.insert(place, helper.make_node("Div", [node.input[2], total], [share]))
        graph.node.insert(place, helper.make_node("ReduceSum", [node.input[2], "last_axis"], [total], keepdims=1))
        node.input[2] = share
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))


# What is wrong with the stored weights is also in the weights that the kernels are judged by.
MUTATIONS: dict[Callable[[onnx.GraphProto], None], tuple[set[str], set[str]]] = {
    no_selection_bias: ({"router"}, {"router"}),
    permuted_router: ({"router"}, {"router"}),
    wrong_scale: ({"arithmetic"}, set()),
    exchanged_experts: ({"arithmetic"}, set()),
    renormalised_weights: ({"arithmetic"}, {"arithmetic"}),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mistake_fails_the_part_that_it_is_in(folders, tmp_path, broken_copy, mutation):
    (tmp_path / "portable").symlink_to(folders["portable"])
    broken = broken_copy(folders["ort-cpu-int8"], tmp_path / "ort-cpu-int8", mutation)
    result = verified(folders["portable"], broken)
    assert {name: failed(entry) - {"free"} for name, entry in result.items()} == dict(
        zip(("float32", "kernels"), MUTATIONS[mutation], strict=True)
    )


def test_forced_experts_are_run_and_weighed_by_the_own_scores(folders):
    ids = WINDOWS[:1, :8]
    for name in ("checkpoint", "portable"):
        engine: Any = open_engine(folders[name], taps=True, replay=True, threads=1)
        free = engine.prefill(ids)
        again = engine.prefill(ids, experts=free.routes)
        assert np.abs(again.logits - free.logits).max() <= 1e-5 * np.abs(free.logits).max()  # the order of a sum
        other = {layer: (chosen + 1) % EXPERTS for layer, chosen in free.routes.items()}
        forced = engine.prefill(ids, experts=other)
        for layer, chosen in forced.routes.items():
            np.testing.assert_array_equal(np.sort(chosen), np.sort(other[layer]))
        assert np.abs(forced.logits - free.logits).max() > 1e-2 * np.abs(free.logits).max()
        after = engine.decode(WINDOWS[:1, 8:9], forced.cache)  # and nothing is forced any more
        assert after.routes.keys() == other.keys()


def test_what_cannot_be_replayed_is_refused(folders):
    with pytest.raises(MoEdgeError, match="portable bundle or the checkpoint"):
        verified(folders["ort-cpu"], folders["ort-cpu-int8"])
    with pytest.raises(MoEdgeError, match="portable bundle whose layers"):
        open_engine(folders["ort-cpu"], replay=True)
    plain: Any = open_engine(folders["portable"], taps=True)
    with pytest.raises(MoEdgeError, match="not opened with replay"):
        plain.prefill(WINDOWS[:1], experts={})
    with pytest.raises(MoEdgeError, match="not the same model"):
        forcing(np.array([[0, 7]]), 1, EXPERTS, TOP_K)
    np.testing.assert_array_equal(forcing(np.array([[2, 0]]), 1, 3, 2), [[FORCED, 0, FORCED]])


def test_a_plan_without_selection_bias_is_exported_with_a_bias_of_zero(tiny_llama):
    from moedge.convert import adapters, modeling
    from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan
    from moedge.export.trace import trace

    model = tiny_llama(layers=1)
    shared, *experts = np.split(np.arange(64, dtype=np.int32), 4)
    router = RouterPlan(
        "random", {"weight": np.random.default_rng(0).standard_normal((3, 32), np.float32)}, {"seed": 0}
    )
    plan = MoEPlan("test", {}, adapters.describe(model), [LayerPlan(shared, experts, 1, router)])
    graph = trace(modeling.apply(plan, model))
    (route,) = [node for node in graph.graph if node.op_type == "Route"]
    np.testing.assert_array_equal(route.inputs[1].const_value.numpy(), np.zeros(3))
