from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moedge import MoEdgeError
from moedge.convert import adapters, methods, modeling, zeros
from moedge.convert.methods import METHODS, mlpmoe
from moedge.convert.methods.mlpmoe import MLPMoEParams
from moedge.convert.plan import LayerPlan, MoEPlan
from moedge.convert.train.write_back import write_back

IDS = torch.arange(2, 34).reshape(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("order", ["branches", "rising", "neurons", "none"])
@pytest.mark.parametrize("width", [64, 67])
def test_nothing_faded_and_every_branch_kept_is_the_dense_model(
    order: str, width: int, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(width=width)
    dense = logits(model)
    plan = methods.convert("mlpmoe", None, model, branches=8, p_max=0, keep=8, order=order)
    assert plan.provenance["mlpmoe"]["saved_share"] == 0
    assert torch.equal(logits(modeling.apply(plan, model)), dense)  # the same neurons in the same order


@pytest.mark.parametrize("fade", ["linear", "geometric"])
@pytest.mark.parametrize("branches", [1, 2, 5])
def test_schedule_rises_from_zero_to_p_max(fade: str, branches: int) -> None:
    shares = mlpmoe.schedule(MLPMoEParams(branches=branches, fade=fade))  # p_max is 0.4
    assert shares[0] == 0
    if branches > 1:
        assert shares[-1] == pytest.approx(0.4)
        assert (np.diff(shares) > 0).all()
    if fade == "linear":
        assert np.diff(shares, n=2) == pytest.approx(np.zeros(max(branches - 2, 0)))
    else:  # equal steps of log2(1 - p): every branch keeps the same share of what the one before it keeps
        assert np.diff(np.log2(1 - shares), n=2) == pytest.approx(np.zeros(max(branches - 2, 0)))


@pytest.mark.parametrize("fade", ["linear", "geometric"])
def test_kept_shares_equal_the_schedule_and_weak_neurons_go_first(fade: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(width=80)
    settings = MLPMoEParams(structure="neurons", order="branches", branches=5, fade=fade, p_max=0.5)
    plan = methods.convert("mlpmoe", None, model, **settings.model_dump())
    shares = mlpmoe.schedule(settings)
    for layer, block in zip(plan.layers, adapters.ffns(model), strict=True):
        score = mlpmoe.scores(block)
        means = score.reshape(5, 16).mean(axis=1)
        rows = layer.report["branches"]
        assert [row["kept"] for row in rows] == [16 - round(share * 16) for share in shares]
        assert [row["score"] for row in rows] == pytest.approx(sorted(means, reverse=True), rel=1e-5)
        for row, branch in zip(rows, np.argsort(-means), strict=True):
            members = np.arange(branch * 16, branch * 16 + 16)
            kept = np.intersect1d(layer.shared, members)
            assert len(kept) == row["kept"]
            assert score[kept].min() > score[np.setdiff1d(members, kept)].max(initial=0)
        assert (layer.num_experts, layer.top_k, layer.router, layer.down, layer.zeros) == (0, 0, None, None, None)


def test_score_is_the_product_of_norms(tiny_llama: Callable[..., Any]) -> None:
    block = adapters.ffns(tiny_llama(layers=1))[0]
    expected = [
        np.linalg.norm(block.gate[j]) * np.linalg.norm(block.up[j]) * np.linalg.norm(block.down[:, j])
        for j in range(64)
    ]
    assert mlpmoe.scores(block) == pytest.approx(expected, rel=1e-5)


def test_order_by_neurons_drops_the_weakest_of_all(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    score = mlpmoe.scores(adapters.ffns(model)[0])
    (layer,) = methods.convert("mlpmoe", None, model, branches=4, p_max=0, keep=3, order="neurons").layers
    np.testing.assert_array_equal(layer.shared, np.sort(np.argsort(-score)[:48]))


@pytest.mark.parametrize(("rule", "variance"), [("sqrt", 1.0), ("mean", 2.0), ("none", 0.5)])
def test_sqrt_compensation_keeps_the_variance(rule: str, variance: float, tiny_llama: Callable[..., Any]) -> None:
    """Half of 8 branches of a random FFN: independent zero-mean contributions, so variances add up.

    A neuron's variance scatters by about 100% (lengths of 32-dimensional rows and the activation), so half of 4096
    neurons scatter by 2% / sqrt(2) of the total; outputs of one FFN share neurons, hence no smaller error from tokens.
    """
    model = tiny_llama(layers=1, width=4096)
    block = adapters.ffns(model)[0]
    (layer,) = methods.convert(
        "mlpmoe", None, model, branches=8, p_max=0, keep=4, order="none", compensation=rule
    ).layers
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, half = block.module(x), modeling.build_ffn(block, layer)(x)
    assert float(half.var() / whole.var()) == pytest.approx(variance, rel=0.1)
    assert layer.report["factor"] == pytest.approx({"sqrt": 2**0.5, "mean": 2.0, "none": 1.0}[rule])
    assert (layer.down is None) == (rule == "none")


def test_what_is_dropped_is_really_saved(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(width=320)
    before = sum(p.numel() for block in adapters.ffns(model) for p in block.module.parameters())
    plan = methods.convert("mlpmoe", None, model, structure="neurons")  # the defaults fade 16 branches linearly to 0.4
    modeling.apply(plan, model)
    after = sum(p.numel() for ffn in modeling.sparse_ffns(model) for p in ffn.parameters())
    saved = plan.provenance["mlpmoe"]
    assert saved["ffn_parameters"] == [before, after]
    assert saved["ffn_flops_per_token"] == [2 * before, 2 * after]
    assert saved["saved_share"] == pytest.approx(1 - after / before, abs=1e-6)
    assert saved["saved_share"] == pytest.approx(0.2, abs=0.025)  # rounding: half a neuron of each branch of 20
    modeling.save(model, plan, tiny_tokenizer, tmp_path / "moe")
    loaded, _, _ = modeling.load(tmp_path / "moe")
    assert [ffn.shared_gate.shape[0] for ffn in modeling.sparse_ffns(loaded)] == [len(p.shared) for p in plan.layers]


def test_saved_and_loaded_it_gives_identical_logits(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = methods.convert("mlpmoe", None, model, branches=8, keep=6)
    assert plan.sha256 == methods.convert("mlpmoe", None, tiny_llama(), branches=8, keep=6).sha256
    assert plan.sha256 != methods.convert("mlpmoe", None, tiny_llama(), branches=8, keep=6, compensation="mean").sha256
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    loaded, same, _ = modeling.load(tmp_path / "moe")
    assert torch.equal(logits(loaded), logits(model))
    assert same.sha256 == plan.sha256


def test_the_registry_says_that_it_is_a_reconstruction_and_needs_nothing(tiny_llama: Callable[..., Any]) -> None:
    method = METHODS["mlpmoe"]
    assert method.needs == ()
    assert "reconstruction" in method.source
    params = method.params(branches=4).model_dump()
    plan = methods.convert("mlpmoe", None, tiny_llama(), **params, source_sha256="ab", provenance={"text": "none"})
    assert (plan.method, plan.model["sha256"], plan.provenance["text"]) == ("mlpmoe", "ab", "none")
    said = {"reconstruction": mlpmoe.RECONSTRUCTION, "reading": mlpmoe.READINGS["unstructured"]}
    assert plan.params == {**params, **said}
    with pytest.raises(ValidationError, match="keep: 9 exceeds branches = 8"):
        method.params(branches=8, keep=9)
    with pytest.raises(ValidationError, match="leaves nothing"):
        method.params(p_max=1, fade="geometric")
    with pytest.raises(MoEdgeError, match="64 neurons; 65 branches are too many"):
        methods.convert("mlpmoe", None, tiny_llama(), branches=65)


# --- branches that lose weights, not neurons -------------------------------------------------------------------------

MATRICES = ("gate", "up", "down")


def whole(block: adapters.FFN) -> dict[str, np.ndarray]:
    """Gate, up and down of a dense FFN as they are stored, float32."""
    return {name: getattr(block, name).float().numpy().copy() for name in MATRICES}


def of_branch(weights: dict[str, np.ndarray], members: np.ndarray) -> dict[str, np.ndarray]:
    return {name: weight[:, members] if name == "down" else weight[members] for name, weight in weights.items()}


def pruned(model: Any, plan: MoEPlan) -> list[dict[str, np.ndarray]]:
    """The same of every converted FFN: no neuron may have moved."""
    assert all(np.array_equal(layer.shared, np.arange(64)) for layer in plan.layers)
    ffns = modeling.sparse_ffns(modeling.apply(plan, model))
    return [{name: getattr(ffn, f"shared_{name}").detach().numpy() for name in MATRICES} for ffn in ffns]


@pytest.mark.parametrize(
    ("fade", "order"), [("linear", "branches"), ("geometric", "rising"), ("flat", "none"), ("linear", "none")]
)
def test_every_branch_loses_its_share_of_each_matrix_smallest_first(
    fade: str, order: str, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama()
    settings = MLPMoEParams(branches=4, fade=fade, p_max=0.5, order=order)
    places = {"branches": lambda mean: np.argsort(-mean), "rising": np.argsort, "none": lambda mean: np.arange(4)}
    dense = [whole(block) for block in adapters.ffns(model)]
    means = [mlpmoe.scores(block).reshape(4, 16).mean(axis=1) for block in adapters.ffns(model)]
    plan = methods.convert("mlpmoe", None, model, **settings.model_dump())
    for before, after, mean, layer in zip(dense, pruned(model, plan), means, plan.layers, strict=True):
        for share, number, row in zip(
            mlpmoe.schedule(settings), places[order](mean), layer.report["branches"], strict=True
        ):
            members = np.arange(number * 16, number * 16 + 16)
            for old, new in zip(of_branch(before, members).values(), of_branch(after, members).values(), strict=True):
                gone = (new == 0) & (old != 0)
                assert gone.sum() == round(share * old.size)
                assert np.array_equal(new[~gone], old[~gone])
                if gone.any():
                    assert np.abs(old[gone]).max() <= np.abs(old[~gone]).min()
            assert row["zero_share"] == pytest.approx(share, abs=0.5 / 512)


@pytest.mark.parametrize(("p_max", "wanted"), [(0.25, 1), (0.4, 2), (0.5, 2), (1.0, 4), (0.1, 0)])
def test_2_4_prunes_the_last_branches_so_that_the_mean_share_is_met(
    p_max: float, wanted: int, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama()
    dense = [whole(block) for block in adapters.ffns(model)]
    means = [mlpmoe.scores(block).reshape(4, 16).mean(axis=1) for block in adapters.ffns(model)]
    plan = methods.convert("mlpmoe", None, model, structure="2:4", order="branches", branches=4, p_max=p_max)
    assert plan.zero_share == pytest.approx(wanted / 8)
    assert (plan.layers[0].zeros is None) == (wanted == 0)
    for before, after, mean in zip(dense, pruned(model, plan), means, strict=True):
        for place, number in enumerate(np.argsort(-mean)):
            members = np.arange(number * 16, number * 16 + 16)
            for old, new in zip(of_branch(before, members).values(), of_branch(after, members).values(), strict=True):
                fours = new.reshape(len(new), -1, 4)  # along the inputs, as sparse tensor cores read them
                assert ((fours == 0).sum(axis=2) == (2 if place >= 4 - wanted else 0)).all()
                olds, gone = np.abs(old.reshape(fours.shape)), fours == 0
                if place >= 4 - wanted:
                    assert (np.where(gone, olds, 0).max(axis=2) <= np.where(gone, np.inf, olds).min(axis=2)).all()


@pytest.mark.parametrize("shape", [[1, 4], [4, 1], [4, 8]])
def test_blocks_are_zero_as_a_whole_and_the_weakest_go_first(shape: list[int], tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    (before,) = [whole(block) for block in adapters.ffns(model)]
    plan = methods.convert("mlpmoe", None, model, structure="block", block=shape, branches=2, order="none", p_max=0.5)
    (after,) = pruned(model, plan)
    for name, new in after.items():
        old = before[name]
        tiles = [
            np.abs(weight).reshape(len(weight) // shape[0], shape[0], -1, shape[1]).sum(axis=(1, 3))
            for weight in (old, new)
        ]
        last = (slice(None), slice(tiles[0].shape[1] // 2, None)) if name == "down" else slice(len(tiles[0]) // 2, None)
        gone = tiles[1] == 0
        assert gone.sum() == round(0.5 * tiles[0][last].size)
        assert gone[last].sum() == gone.sum()  # the first branch of the fade loses nothing
        assert tiles[0][gone].max() <= tiles[0][last][~gone[last]].min()
        assert np.array_equal(new != 0, ~np.kron(gone, np.ones(shape, bool)))


def test_equal_magnitudes_never_take_more_than_the_share(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    for weight in adapters.ffns(model)[0].module.parameters():
        weight.data.fill_(0.5)  # a quantised file has few distinct magnitudes
    for structure in ("unstructured", "2:4", "block"):
        plan = methods.convert("mlpmoe", None, model, structure=structure, block=[1, 4], branches=2, p_max=0.5)
        assert plan.zero_share == 0.25


def test_zeros_survive_checkpoint_and_half_precision_and_are_reported(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from moedge.runtime.commands.inspect import describe

    model = tiny_llama()
    plan = methods.convert("mlpmoe", None, model, branches=8)
    assert plan.differs_from_dense() == "weights are set to zero"
    assert plan.provenance["mlpmoe"]["saved_share"] == 0
    assert plan.layers[0].active_width == 64
    modeling.save(modeling.apply(plan, model).to(torch.bfloat16), plan, tiny_tokenizer, tmp_path / "moe")
    loaded, same, _ = modeling.load(tmp_path / "moe", dtype="auto")
    assert same.sha256 == plan.sha256
    weights = [getattr(ffn, f"shared_{name}") for ffn in modeling.sparse_ffns(loaded) for name in MATRICES]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert share == pytest.approx(same.zero_share, abs=1e-9)
    facts = describe(tmp_path / "moe")
    assert facts["zeros"] == f"{share:.1%} of the FFN's weights are zero; nothing is saved in dense storage"
    shares = [layer.report["zero_share"] for layer in plan.layers]
    assert [row["zeros"] for row in facts["layers"]] == pytest.approx(shares, abs=1e-6)
    assert facts["layers"][0]["active"] == 1


@pytest.mark.parametrize("rule", ["sqrt", "mean", "none"])
def test_weights_and_branches_can_be_dropped_together(rule: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=1)
    block = adapters.ffns(model)[0]
    before = whole(block)
    (layer,) = methods.convert("mlpmoe", None, model, branches=8, keep=6, compensation=rule, order="none").layers
    assert np.array_equal(layer.shared, np.arange(48))
    ffn = modeling.build_ffn(block, layer)
    gain = {"sqrt": (8 / 6) ** 0.5, "mean": 8 / 6, "none": 1.0}[rule]
    down = ffn.shared_down.numpy()
    assert np.allclose(down[down != 0], gain * before["down"][:, :48][down != 0], rtol=1e-6)
    assert (down == 0).sum() == sum(round(0.4 * b / 7 * 256) for b in range(6))
    assert layer.report["zero_share"] == pytest.approx(float((down == 0).mean()), abs=1e-6)


def test_training_that_fills_zeros_again_takes_them_out_of_the_plan(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plan = methods.convert("mlpmoe", None, model, branches=8)
    modeling.apply(plan, model)
    updated = write_back(model, plan, ("lora",), {}, np.zeros((1, 8), np.int64))
    assert updated.trained_weights
    assert updated.zero_share == 0 < plan.zero_share


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"structure": "2:4", "branches": 7}, r"7 branches are not made of blocks of 1 x 4: choose 4 branches"),
        ({"structure": "block", "block": [1, 24]}, "choose other blocks"),
        ({"structure": "2:4", "branches": 8, "fade": "geometric", "p_max": 0.99}, "2:4 at most half"),
    ],
)
def test_what_no_pattern_fits_is_refused(settings: dict[str, Any], said: str, tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(MoEdgeError, match=said):
        methods.convert("mlpmoe", None, tiny_llama(), **settings)


def test_a_fade_over_one_branch_is_refused() -> None:
    with pytest.raises(ValidationError, match="p_max: a linear fade over one branch takes nothing; set fade: flat"):
        MLPMoEParams(branches=1, p_max=0.5)
    assert mlpmoe.schedule(MLPMoEParams(branches=1, p_max=0.5, fade="flat")) == 0.25


def test_damaged_zeros_are_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    plan = methods.convert("mlpmoe", None, model, branches=8)
    for bits in (plan.layers[0].zeros[:2], plan.layers[0].zeros[:, :-1], plan.layers[0].zeros.astype(np.int32)):
        plan.layers[0].zeros = bits
        with pytest.raises(MoEdgeError, match=r"plan layer 0: zeros are .* not uint8 \[3, 64, 4\]"):
            modeling.apply(plan, model)


def test_bits_are_the_masks_whatever_the_number_of_inputs() -> None:
    masks = np.random.default_rng(0).random((3, 5, 13)) < 0.3
    bits = zeros.pack(masks)
    assert bits is not None
    assert bits.shape == (3, 5, 2)
    assert np.array_equal(zeros.unpack(bits, 13), masks)
    assert np.array_equal(zeros.counts(bits), masks.sum(axis=(0, 2)))
    zeros.check(bits, 5, 13, "here")
    bits[0, 0, 1] |= 1
    with pytest.raises(MoEdgeError, match="behind the last of 13"):
        zeros.check(bits, 5, 13, "here")
    assert zeros.pack(np.zeros((3, 5, 13), bool)) is None


def test_experts_lose_the_weights_that_the_plan_names(tiny_llama: Callable[..., Any]) -> None:
    """The plan is not MLPMoE's alone: shared block and experts follow one mask, in the dense order of neurons."""
    from moedge.convert.plan import RouterPlan

    model = tiny_llama(layers=1)
    block = adapters.ffns(model)[0]
    masks = np.random.default_rng(0).random((3, 64, 32)) < 0.4
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    router = RouterPlan("linear", {"weight": np.zeros((4, 32), np.float32)})
    layer = LayerPlan(order[:16], np.split(order[16:], 4), 4, router, zeros=zeros.pack(masks))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    got = modeling.build_ffn(block, layer)(x)
    gate, up, down = (torch.from_numpy(weight.copy()) for weight in whole(block).values())
    gate[torch.from_numpy(masks[0])] = 0
    up[torch.from_numpy(masks[1])] = 0
    down.T[torch.from_numpy(masks[2])] = 0
    want = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert layer.stored_weights(32) == (3 * 64 * 32, int(masks.sum()))
