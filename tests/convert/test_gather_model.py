"""Models whose FFNs leave small values out: what they compute, how they are saved, what they read."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, gather, levels, modeling, reads
from moedge.convert.plan import SMALLEST_THRESHOLD, LayerPlan, MoEPlan, RouterPlan

IDS = torch.arange(2, 34).reshape(2, 16)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"mlp_bias": True}),
    "fused": ("phi3", {}),
    "post-norm, GELU": ("gemma2", {}),
    "uneven experts": ("llama", {"width": 67}),
}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def keep(x: torch.Tensor, threshold: np.ndarray | None, ramp: float) -> torch.Tensor:
    if threshold is None:
        return x
    limit = torch.from_numpy(threshold)
    return x * ((x.abs() - limit) / (ramp * limit)).clamp(0, 1)


def make(name: str, tiny_model: Any, make_plan: Any, gathered: Any, **more: Any) -> tuple[Any, MoEPlan]:
    """A dense model of a family and its S2A3E8 conversion with thresholds; of 67 neurons the experts are uneven."""
    family, options = FAMILIES[name]
    model = tiny_model(family, **options)
    plan, _ = make_plan(model, **({"padding": "uneven"} if "width" in options else {}))
    return model, gathered(plan, model, **more)


@pytest.mark.parametrize("kept", [{}, {"x": False}, {"h": False}], ids=["x and h", "h", "x"])
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_the_formula_and_the_router_reads_everything(
    name: str, kept: dict[str, bool], tiny_model: Any, make_plan: Any, gathered: Any
) -> None:
    model, plan = make(name, tiny_model, make_plan, gathered, **kept)
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(0))
    for block, layer in zip(adapters.ffns(model), plan.layers, strict=True):
        if name == "uneven experts":
            assert len({len(expert) for expert in layer.experts}) > 1
        ffn, plain = (
            modeling.build_ffn(block, one) for one in (layer, replace(layer, x_threshold=None, h_threshold=None))
        )
        ffn.record_routes = plain.record_routes = True
        got, dense = ffn(x), plain(x)
        assert torch.equal(ffn.last_routes, plain.last_routes), "the router read masked inputs"
        h = keep(block.hidden(keep(x, layer.x_threshold, layer.ramp)), layer.h_threshold, layer.ramp)
        want = h[:, layer.shared] @ block.down[:, layer.shared].T
        for t in range(len(x)):
            neurons = np.concatenate([layer.experts[e] for e in ffn.last_routes[t]])
            want[t] += h[t, neurons] @ block.down[:, neurons].T
        want = want if block.down_bias is None else want + block.down_bias
        # A chain of sums of at most 67 terms, 67 * 2^-24 each, steepened by a ramp of 0.1: 12 times.
        assert relative(got, want) < 12 * 67 * 2.0**-24
        assert relative(got, dense) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_smallest_thresholds_are_the_dense_parent(
    name: str, tiny_model: Any, make_plan: Any, gathered: Any
) -> None:
    """Bit for bit where nothing is cut, and to the order of sums with every expert selected."""
    model, plan = make(name, tiny_model, make_plan, gathered)
    width = len(adapters.ffns(model)[0].gate)
    smallest = {
        "x_threshold": np.full(32, SMALLEST_THRESHOLD, np.float32),
        "h_threshold": np.full(width, SMALLEST_THRESHOLD, np.float32),
    }
    dense = logits(model)
    whole = replace(plan, layers=[LayerPlan(np.arange(width, dtype=np.int32), [], 0, **smallest) for _ in plan.layers])
    family, options = FAMILIES[name]
    assert torch.equal(logits(modeling.apply(whole, tiny_model(family, **options))), dense)
    every = replace(plan, layers=[replace(layer, top_k=layer.num_experts, **smallest) for layer in plan.layers])
    assert relative(logits(modeling.apply(every, model)), dense) < 1e-5
    assert plan.differs_from_dense() == "small inputs are left out"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_reloads_with_identical_logits_and_tensors(
    name: str, tiny_model: Any, make_plan: Any, gathered: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, plan = make(name, tiny_model, make_plan, gathered, ramp=0.25)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    loaded, again, _ = modeling.load(tmp_path / "moe")
    assert again.sha256 == plan.sha256
    assert torch.equal(logits(loaded), logits(model))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for ffn, layer, old in zip(modeling.sparse_ffns(loaded), again.layers, plan.layers, strict=True):
        assert ffn.ramp == layer.ramp == 0.25
        np.testing.assert_array_equal(ffn.x_threshold, old.x_threshold)
        np.testing.assert_array_equal(ffn.shared_h_threshold, old.h_threshold[layer.shared])
        for row, expert in zip(ffn.h_threshold, layer.experts, strict=True):
            np.testing.assert_array_equal(row[: len(expert)], old.h_threshold[expert])
            assert (row[len(expert) :] == 1).all()
    section = json.loads((tmp_path / "moe" / "config.json").read_text())["moedge"]["layers"]
    assert [entry["gather"] for entry in section] == [{"x": True, "h": True, "ramp": 0.25}] * 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("how", ["load", "to"])
def test_thresholds_stay_float32_in_half_precision(
    how: str, dtype: str, tiny_llama: Any, make_plan: Any, gathered: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = gathered(make_plan(model)[0], model)
    modeling.apply(plan, model)
    before = {name: value.clone() for name, value in model.state_dict().items() if "threshold" in name}
    assert len(before) == 2 * 3
    if how == "load":
        modeling.save(model, plan, tiny_tokenizer, tmp_path / "out")
        model = modeling.load(tmp_path / "out", dtype=dtype)[0]
    else:
        model.to(getattr(torch, dtype))
    after = model.state_dict()
    for name, value in before.items():  # equal values, not only the type: a trip through half would have rounded them
        assert torch.equal(after[name], value), name
        assert after[name].dtype == torch.float32
    assert after["model.layers.0.mlp.gate"].dtype == getattr(torch, dtype)
    assert logits(model).isfinite().all()


def test_under_autocast_the_ffn_is_the_one_in_half_precision(tiny_llama: Any, make_plan: Any, gathered: Any) -> None:
    model = tiny_llama()
    plan = gathered(make_plan(model)[0], model)
    block, layer = adapters.ffns(model)[0], plan.layers[0]
    ffn = modeling.build_ffn(block, layer)
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = ffn(x)
    assert got.dtype == torch.bfloat16
    # Three stages of bfloat16 in a chain, each 2^-8 of its largest value, steepened by the ramp at the hidden values.
    assert relative(got.float(), ffn(x)) < 16 * 2.0**-8


def test_a_changed_ramp_in_the_config_is_refused(
    tiny_llama: Any, make_plan: Any, gathered: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = gathered(make_plan(model)[0], model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["moedge"]["layers"][0]["gather"]["ramp"] = 0.2
    path.write_text(json.dumps(config))
    with pytest.raises(MoEdgeError, match="not of the same conversion"):
        modeling.load(tmp_path / "out")


# --- plans ---


def by_hand(**more: Any) -> MoEPlan:
    """A plan of 8 neurons and 4 inputs; ``more`` goes into its first layer."""
    parts = [np.arange(4, 6, dtype=np.int32), np.arange(6, 8, dtype=np.int32)]
    router = RouterPlan("linear", {"weight": np.ones((2, 4), np.float32)})
    layers = [LayerPlan(np.arange(4, dtype=np.int32), parts, 1, router=router, **more)]
    layers.append(LayerPlan(np.arange(8, dtype=np.int32), [], 0))
    return MoEPlan("cmoe", {}, {"hidden_size": 4, "intermediate_size": 8}, layers)


def test_plans_without_thresholds_keep_the_hash_that_they_had_before_there_were_any() -> None:
    assert by_hand().sha256 == "d3d63e6d1bc0cbd7b476b1e646cde037f63ccde24cb12f7ef67434a529567a63"
    assert by_hand(ramp=0.5).sha256 == by_hand().sha256, "the ramp of no threshold is nothing"


def test_a_plan_is_saved_and_loaded_with_its_thresholds(tmp_path: Path) -> None:
    h = np.linspace(1, 2, 8).astype(np.float32)
    plan = by_hand(h_threshold=h, ramp=0.25)
    plan.save(tmp_path)
    loaded = MoEPlan.load(tmp_path)
    np.testing.assert_array_equal(loaded.layers[0].h_threshold, h)
    assert loaded.layers[0].x_threshold is None
    assert loaded.layers[0].ramp == 0.25
    assert not loaded.layers[1].gathers
    hashes = {
        by_hand(h_threshold=h, ramp=0.25).sha256,
        by_hand(h_threshold=h).sha256,
        by_hand(h_threshold=2 * h).sha256,
    }
    assert len(hashes | {by_hand().sha256, by_hand(h_threshold=h, x_threshold=h[:4]).sha256}) == 5


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            {"x_threshold": np.ones(5)},
            r"layer 0: x_threshold has shape \(5,\), not one value for each of 4 inputs",
        ),
        ({"h_threshold": np.ones((2, 4))}, r"h_threshold has shape \(2, 4\), not one value for each of 8 neurons"),
        ({"h_threshold": np.zeros(8)}, "h_threshold must be finite and at least 1e-30"),
        ({"x_threshold": np.full(4, np.nan)}, "x_threshold must be finite"),
        ({"x_threshold": np.full(4, np.inf)}, "x_threshold must be finite"),
        ({"x_threshold": np.ones(4), "ramp": 0.0}, r"ramp=0 must be at least 0.001 and at most 10"),
        ({"x_threshold": np.ones(4), "ramp": float("nan")}, "ramp=nan must be at least"),
        ({"x_threshold": np.ones(4), "ramp": 11.0}, "ramp=11 must be at least 0.001 and at most 10"),
    ],
)
def test_thresholds_that_cannot_be_are_refused_in_a_sentence(more: dict[str, Any], sentence: str) -> None:
    arrays = {
        name: value.astype(np.float32) if isinstance(value, np.ndarray) else value for name, value in more.items()
    }
    with pytest.raises(MoEdgeError, match=sentence):
        by_hand(**arrays).validate()


def test_experts_inside_experts_have_no_thresholds() -> None:
    child = LayerPlan(np.arange(8, dtype=np.int32), [], 0, x_threshold=np.ones(4, np.float32))
    plan = replace(by_hand(), layers=[LayerPlan(np.zeros(0, np.int32), [], 0, children=[child])])
    with pytest.raises(MoEdgeError, match="small values cannot be left out of experts inside experts"):
        plan.validate()


# --- what is read ---


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_are_what_a_count_by_hand_gives(name: str, tiny_model: Any, make_plan: Any, gathered: Any) -> None:
    model, plan = make(name, tiny_model, make_plan, gathered)
    width, hidden = len(adapters.ffns(model)[0].gate), 32
    modeling.apply(plan, model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for ffn in modeling.sparse_ffns(model):
        ffn.record_routes = True
        ffn.register_forward_hook(lambda ffn, args, _: seen.append((args[0].flatten(0, 1), ffn.last_routes)))
    with reads.counted(model) as counts:
        logits(model)
    shares = []
    for ffn, layer, (x, routes) in zip(modeling.sparse_ffns(model), plan.layers, seen, strict=True):
        total = 0
        for row, chosen in zip(x, routes, strict=True):
            inputs = int((row.abs() > ffn.x_threshold).sum())
            kept = torch.ops.moedge.keep_large(row, ffn.x_threshold, ffn.ramp)
            hidden_values = h_of(ffn, kept, "shared", None)
            total += 2 * inputs * len(layer.shared)
            total += hidden * int((hidden_values.abs() > ffn.shared_h_threshold).sum())
            for expert in chosen:
                values = h_of(ffn, kept, "", int(expert))[: len(layer.experts[expert])]
                total += 2 * inputs * len(values)
                total += hidden * int((values.abs() > ffn.h_threshold[expert][: len(values)]).sum())
        router = sum(parameter.numel() for parameter in ffn.router.parameters())
        shares.append((total / len(x) + router) / (3 * hidden * width))
        # Experts of different widths: the mean of a product is not the product of means, by a few neurons of 67.
        exact = 0.02 if name == "uneven experts" else 1e-12
        assert counts.of_layer(ffn.layer_index, width) == pytest.approx(shares[-1], rel=exact)
        assert all(0.2 < share < 0.95 for share in counts.kept(ffn.layer_index))
    assert counts.share(width) == pytest.approx(sum(shares) / len(shares), rel=exact)
    assert all(ffn.count is None for ffn in modeling.sparse_ffns(model))


def h_of(ffn: Any, x: torch.Tensor, prefix: str, expert: int | None) -> torch.Tensor:
    """h of one token for the shared block, or for one expert with its padding."""
    from moedge.convert.ops import activate

    if expert is None:
        gate, up = ((getattr(ffn, f"shared_{n}"), getattr(ffn, f"shared_{n}_bias")) for n in ("gate", "up"))
        g, u = (torch.nn.functional.linear(x, weight, bias) for weight, bias in (gate, up))
    else:
        inputs = torch.cat([x, torch.ones(1)]) if ffn.biased else x
        g, u = ffn.gate[expert] @ inputs, ffn.up[expert] @ inputs
    return activate(g, ffn.activation) * u


def test_a_converted_model_without_thresholds_reads_its_active_neurons(tiny_llama: Any, make_plan: Any) -> None:
    model = tiny_llama()
    plan, _ = make_plan(model)
    modeling.apply(plan, model)
    with reads.counted(model) as counts:
        logits(model)
    routers = sum(p.numel() for p in modeling.sparse_ffns(model)[0].router.parameters())
    assert counts.share(64) == pytest.approx(5 / 8 + routers / (3 * 32 * 64), rel=1e-12)
    assert counts.kept(0) == (1.0, 1.0)


# --- scores and levels ---


def shifted(block: Any, zero_x: torch.Tensor, zero_h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A SiLU FFN with something added to its inputs and to its hidden values."""
    x = x + zero_x
    h = torch.nn.functional.silu(x @ block.gate.T) * (x @ block.up.T) + zero_h
    return h @ block.down.T


def test_fisher_scores_are_the_gradients_that_autograd_gives(tiny_llama: Any) -> None:
    """By hand: a model whose FFN adds a zero to its input and to its hidden values, and the gradient of that zero."""
    from moedge.convert import backward

    model = tiny_llama()
    windows = np.random.default_rng(4).integers(0, 256, size=(3, 20))
    got = gather.fisher(model, windows)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    squares = [[torch.zeros(32, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)] for _ in range(2)]
    for number, window in enumerate(torch.from_numpy(windows)):
        zeros = [[torch.zeros(20, 32, requires_grad=True), torch.zeros(20, 64, requires_grad=True)] for _ in range(2)]
        for block, (zero_x, zero_h) in zip(adapters.ffns(model), zeros, strict=True):
            block.module.forward = partial(shifted, block, zero_x, zero_h)
        with torch.enable_grad():
            score = backward.drawn_score(model(window[None]).logits[0], backward.generator(number))
            grads = torch.autograd.grad(score, [zero for pair in zeros for zero in pair])
        for block in adapters.ffns(model):
            del block.module.forward
        for index, grad in enumerate(grads):
            squares[index // 2][index % 2] += grad.double().square().sum(0)
    assert [(one.place.layer, one.place.place) for one in got] == [(0, "x"), (0, "h"), (1, "x"), (1, "h")]
    for one, square in zip(got, [one for pair in squares for one in pair], strict=True):
        np.testing.assert_allclose(one.score, (square / 60).sqrt().numpy(), rtol=1e-3)


@pytest.mark.parametrize("linears", ["ffn", "all"])
def test_one_level_decides_by_loss_over_weights_read(tiny_llama: Any, linears: Any) -> None:
    generator, model = np.random.default_rng(0), tiny_llama()
    places = gather.places(model, linears)
    steps = np.linspace(0, 1, 1001)
    scores = [gather.Ladder(place, generator.random(place.inputs).astype(np.float32), steps) for place in places]
    read_by = {"x": 2 * 64, "h": 32, "qkv": 32 + 2 * 16, "o": 32, "head": 260}
    scores[0].score[3] = 0.0  # nobody reads it
    every = [LayerPlan(np.arange(64, dtype=np.int32), [], 0)] * 2
    layers = gather.with_cuts(every, scores, gather.cuts(scores, 0.01), 0.1)
    for place, score in ((one.place, one.score) for one in scores):
        whole, value = score > 0, layers[place.layer].thresholds[place.threshold]
        np.testing.assert_allclose((score * value)[whole] ** 2 / read_by[place.place], 1e-4, rtol=1e-5)
    for layer in layers:
        layer.validate(64, "x", 32)
    place = scores[0].place
    assert layers[0].thresholds[place.threshold][3] == np.float32(1e30)
    expected = {"x", "h"} | ({"qkv", "o"} if linears == "all" else set())
    assert set(layers[0].thresholds) == {f"{name}_threshold" for name in expected}
    assert ("head_threshold" in layers[1].thresholds) == (linears == "all")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("scores", ["fisher", "norms", "magnitude"])
def test_the_method_reads_the_share_that_was_asked_for(scores: str, share: float, tiny_llama: Any) -> None:
    from moedge.convert import methods

    model = tiny_llama()
    windows = np.random.default_rng(4).integers(0, 256, size=(3, 20))
    plan = methods.convert("gather", windows, model, share=share, scores=scores)
    found = levels.read_share(model, plan.layers, windows)
    assert abs(found - share) <= 0.004
    assert plan.provenance["gather"]["share"] == pytest.approx(found, abs=1e-4)


def test_a_share_below_what_the_router_reads_is_refused(tiny_llama: Any, make_plan: Any) -> None:
    from moedge.convert.methods.gather import GatherParams, on_top

    model = tiny_llama()
    windows = np.random.default_rng(4).integers(0, 256, size=(3, 20))
    with pytest.raises(MoEdgeError, match=r"No thresholds read 0.9 of the FFN weights"):
        on_top(make_plan(model)[0].layers, windows, model, GatherParams(share=0.9))


@pytest.mark.parametrize("scores", ["fisher", "magnitude"])
def test_what_was_measured_before_gives_the_same_plan_and_is_not_measured_again(
    scores: Any, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moedge.convert import methods
    from moedge.convert.methods import gather as method

    model, windows = tiny_llama(), np.random.default_rng(4).integers(0, 256, size=(3, 20))
    settings = method.GatherParams(scores=scores)
    gather.save(method.measure(windows, model, settings), tmp_path / "values", settings.measured())
    for change in ({"linears": "ffn"}, {"score_tokens": 20}, {"scores": "norms"}):
        other = settings.model_copy(update=change)
        assert gather.load(tmp_path / "values", model, other.measured()) is None
    assert gather.load(tmp_path / "none", model, settings.measured()) is None
    measured = [methods.convert("gather", windows, model, share=share, scores=scores) for share in (0.5, 0.8)]
    monkeypatch.setattr(method, "measure", None)
    for plan in measured:
        share = plan.params["share"]
        kept = gather.load(tmp_path / "values", model, settings.model_copy(update={"share": share}).measured())
        again = methods.convert("gather", windows, model, share=share, scores=scores, ladders=kept)
        assert again.sha256 == plan.sha256


def test_a_good_first_guess_needs_few_tries(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution of the dense model's values says almost what is read; one try or two correct it."""
    from moedge.convert import methods

    tries: list[float] = []
    share_of = levels.read_share
    monkeypatch.setattr(levels, "read_share", lambda *given: tries.append(share_of(*given)) or tries[-1])
    windows = np.random.default_rng(4).integers(0, 256, size=(6, 40))
    methods.convert("gather", windows, tiny_llama(layers=4), share=0.7)
    assert len(tries) <= 4
    assert abs(tries[0] - 0.7) < 0.05
