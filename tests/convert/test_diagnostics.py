from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moedge import MoEdgeError
from moedge.convert import adapters, diagnostics, methods, modeling
from moedge.convert.methods import METHODS, baselines
from moedge.convert.plan import LayerPlan, MoEPlan

WINDOWS = np.random.default_rng(5).integers(0, 256, size=(3, 24))


@pytest.fixture
def case(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> tuple[Any, MoEPlan]:
    model = tiny_llama()
    return model, make_plan(model)[0]


def converted(plan: MoEPlan, tiny_llama: Callable[..., Any]) -> Any:
    return modeling.apply(plan, tiny_llama())


def ffn_inputs(model: Any, windows: np.ndarray) -> list[torch.Tensor]:
    """What each converted FFN sees."""
    seen: list[torch.Tensor] = []
    handles = [
        ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
        for ffn in modeling.sparse_ffns(model)
    ]
    with torch.no_grad():
        model(torch.from_numpy(windows))
    for handle in handles:
        handle.remove()
    return seen


def test_every_number_is_its_definition(case: tuple[Any, MoEPlan], tiny_llama: Callable[..., Any]) -> None:
    dense, plan = case
    compensation = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    plan = replace(plan, layers=[replace(layer, compensation=compensation) for layer in plan.layers])
    model = converted(plan, tiny_llama)
    result = diagnostics.diagnose(model, WINDOWS, dense_model=dense, k_a=4, batch_size=2)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["tokens"] == WINDOWS.size
    blocks = adapters.ffns(dense)
    for index, (x, layer, block) in enumerate(zip(ffn_inputs(model, WINDOWS), plan.layers, blocks, strict=True)):
        h = F.silu(x @ block.gate.T) * (x @ block.up.T)
        target, comp = h @ block.down.T, torch.from_numpy(compensation)
        ffn = modeling.sparse_ffns(model)[index]
        ffn.record_routes = True
        y = ffn(x)
        assert ffn.last_routes is not None
        chosen = [set(row) for row in ffn.last_routes.tolist()]
        delta = torch.stack([h[:, e] @ block.down[:, e].T for e in layer.experts], dim=1) - comp
        value = delta.square().sum(-1)
        oracle = [set(row) for row in value.topk(3, dim=1).indices.tolist()]

        def error(
            sets: list[set[int]],
            delta: Any = delta,
            h: Any = h,
            block: Any = block,
            layer: Any = layer,
            comp: Any = comp,
        ) -> Any:
            base = h[:, layer.shared] @ block.down[:, layer.shared].T + comp.sum(0)
            return base + torch.stack([delta[t, sorted(kept)].sum(0) for t, kept in enumerate(sets)])

        def rms(y: torch.Tensor, target: torch.Tensor = target) -> float:
            return float(((target - y).square().sum(1) / target.square().sum(1)).mean().sqrt())

        found = result["layers"][index]
        assert found["load"] == pytest.approx([np.mean([e in kept for kept in chosen]) for e in range(6)], abs=1e-6)
        assert found["agreement"] == pytest.approx(
            np.mean([len(a & b) / 3 for a, b in zip(chosen, oracle, strict=True)]), abs=1e-6
        )
        share = [
            float(value[t, sorted(a)].sum() / value[t, sorted(b)].sum())
            for t, (a, b) in enumerate(zip(chosen, oracle, strict=True))
        ]
        assert found["captured"] == pytest.approx(np.mean(share), rel=1e-4)
        weighted = (value / target.square().sum(1, keepdim=True)).sum(0)
        fixed = set(weighted.topk(3).indices.tolist())
        expected = {"router": rms(y), "oracle": rms(error(oracle)), "static": rms(error([fixed] * len(x)))}
        for name, wanted in expected.items():
            # Two ways of summing float32 squares of 32 entries, relative rounding 32 * 2^-24 = 2e-6 each.
            assert found["relative_error"][name] == pytest.approx(wanted, rel=1e-4)
        alive = h.abs().topk(4, dim=1).indices.unique()
        assert found["dead_neurons"] == pytest.approx(1 - len(alive) / 64, abs=1e-6)
        assert found["agreement_by_chance"] == 0.5
        assert found["relative_error"]["oracle"] < found["relative_error"]["random"]


@torch.no_grad()
def test_small_values_that_the_layer_leaves_out_are_left_out(
    case: tuple[Any, MoEPlan], tiny_llama: Callable[..., Any], gathered: Any
) -> None:
    dense, plan = case
    plan = gathered(plan, tiny_llama())
    model = converted(plan, tiny_llama)
    result = diagnostics.diagnose(model, WINDOWS)
    inputs = ffn_inputs(model, WINDOWS)
    for x, ffn, found in zip(inputs, modeling.sparse_ffns(model), result["layers"], strict=True):
        y, k, ffn.top_k = ffn(x), ffn.top_k, ffn.num_experts
        target, ffn.top_k = ffn(x), k
        wanted = ((target - y).square().sum(1) / target.square().sum(1)).mean().sqrt()
        assert found["relative_error"]["router"] == pytest.approx(float(wanted), rel=1e-4)
    # With every expert selected nobody has a choice, and all make the layer's own error.
    every = replace(plan, layers=[replace(layer, top_k=6) for layer in plan.layers])
    for layer in diagnostics.diagnose(converted(every, tiny_llama), WINDOWS, dense_model=dense)["layers"]:
        errors = layer["relative_error"]
        assert errors["router"] > 0.01
        assert [errors[name] for name in ("oracle", "random", "static")] == pytest.approx([errors["router"]] * 3, 1e-3)


def test_an_oracle_router_agrees_with_the_oracle(case: tuple[Any, MoEPlan], tiny_llama: Callable[..., Any]) -> None:
    _, plan = case
    result = diagnostics.diagnose(converted(baselines.oracle(plan), tiny_llama), WINDOWS)
    for layer in result["layers"]:
        assert layer["agreement"] == layer["captured"] == 1
        assert layer["relative_error"]["router"] == pytest.approx(layer["relative_error"]["oracle"], rel=1e-4)
    chance = diagnostics.diagnose(converted(baselines.random_router(plan, 0), tiny_llama), WINDOWS)
    assert all(layer["captured"] < 1 for layer in chance["layers"])


def test_without_the_parent_the_reference_is_the_layer_with_every_expert(
    case: tuple[Any, MoEPlan], tiny_llama: Callable[..., Any]
) -> None:
    dense, plan = case
    model = converted(plan, tiny_llama)
    own, parent = (diagnostics.diagnose(model, WINDOWS, dense_model=given) for given in (None, dense))
    assert own["reference"] != parent["reference"]
    for a, b in zip(own["layers"], parent["layers"], strict=True):
        assert a["relative_error"] == pytest.approx(b["relative_error"], rel=1e-3)


def test_static_layers_and_weights_that_sum_to_one_leave_out_what_does_not_apply(
    case: tuple[Any, MoEPlan], tiny_llama: Callable[..., Any]
) -> None:
    dense, plan = case
    layers = [replace(plan.layers[0], combine="softmax"), LayerPlan(np.arange(40, dtype=np.int32), [], 0)]
    model = converted(replace(plan, layers=layers), tiny_llama)
    mixed, static = diagnostics.diagnose(model, WINDOWS, dense_model=dense)["layers"]
    assert mixed["agreement"] is None
    assert mixed["relative_error"]["router"] > 0
    assert mixed["relative_error"]["oracle"] is None
    assert (static["experts"], static["load"], static["relative_error"]["router"]) == (0, [], None)
    assert 0 < static["relative_error"]["static"] < 1.5
    alone = diagnostics.diagnose(model, WINDOWS)["layers"][1]
    assert alone["relative_error"]["static"] is None


def test_biases_of_the_ffn_count(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    def biased() -> Any:
        model = tiny_llama(mlp_bias=True)
        generator = torch.Generator().manual_seed(1)
        for layer in model.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
        return model

    plan, _ = make_plan(biased())
    for given in (plan, baselines.oracle(plan)):
        own, parent = (
            diagnostics.diagnose(modeling.apply(given, biased()), WINDOWS, dense_model=dense)
            for dense in (None, biased())
        )
        for a, b in zip(own["layers"], parent["layers"], strict=True):
            assert a["relative_error"] == pytest.approx(b["relative_error"], rel=1e-3)
            assert (a["agreement"] == 1) == (given is not plan)
    ceiling = baselines.neuron_top_k(plan)
    every = replace(ceiling, layers=[replace(layer, top_k=64) for layer in ceiling.layers])
    ids = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        torch.testing.assert_close(
            modeling.apply(every, biased())(ids).logits, biased()(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_padding_is_not_counted_as_dead(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    model = tiny_llama(width=66)
    plan, _ = make_plan(model, padding="uneven")
    found = diagnostics.diagnose(modeling.apply(plan, tiny_llama(width=66)), WINDOWS, k_a=66)
    assert [layer["dead_neurons"] for layer in found["layers"]] == [0, 0]


def test_a_dense_model_is_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match="no converted FFN"):
        diagnostics.diagnose(tiny_llama(), WINDOWS)


@pytest.mark.parametrize("name", ["cmoe", "expertweaver", "moedge", "moefication"])
def test_plans_are_remade_from_other_windows(
    name: str, tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    layout = {"experts": 8} if name == "moefication" else {"shared": 2, "active": 3, "experts": 8}
    layout = {"experts": 8, "k": 5, "tau_percentile": 50} if name == "expertweaver" else layout
    settings = METHODS[name].params(**layout, **({"epochs": 1, "active": 5} if name == "moefication" else {}))
    plan = MoEPlan(name, settings.model_dump(mode="json"), adapters.describe(model), [])
    halves = {"first": token_windows[:2], "second": token_windows[2:]}
    plans = {half: diagnostics.replan(model, plan, windows) for half, windows in halves.items()}
    (entry,) = diagnostics.stability(plans)
    assert entry["between"] == ["first", "second"]
    # MoEfication's experts come from the weights alone: the same for any text.
    assert (entry["experts"]["mean"] == 1) == (name == "moefication")
    assert 0 < entry["experts"]["by_chance"] < 0.5


def test_stability_counts_overlap_whatever_the_order_of_experts(tiny_llama: Callable[..., Any]) -> None:
    facts = adapters.describe(tiny_llama())
    whole = np.arange(64, dtype=np.int32)
    one = LayerPlan(whole[:16], np.split(whole[16:], 3), 1)
    swapped = LayerPlan(whole[:16], np.split(whole[16:], 3)[::-1], 1)
    moved = LayerPlan(np.r_[whole[:8], whole[24:32]], [np.r_[whole[8:24]], *np.split(whole[32:], 2)], 1)
    plans = {name: MoEPlan("x", {}, facts, [layer]) for name, layer in (("a", one), ("b", swapped), ("c", moved))}
    found = {tuple(entry["between"]): entry for entry in diagnostics.stability(plans)}
    assert found["a", "b"]["shared"]["mean"] == found["a", "b"]["experts"]["mean"] == 1
    assert found["a", "c"]["shared"]["mean"] == pytest.approx(8 / 24)
    assert found["a", "c"]["experts"]["mean"] == pytest.approx((8 / 24 + 1 + 1) / 3)


def test_a_method_without_calibration_has_no_stability(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan = methods.convert("mlpmoe", None, model, branches=4)
    with pytest.raises(MoEdgeError, match="does not follow from token windows"):
        diagnostics.replan(model, plan, WINDOWS)
