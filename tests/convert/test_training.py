"""The training loop: what is trained, what it sees, how it resumes, and the load of the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from moedge import MoEdgeError
from moedge.convert import methods, modeling, scoring
from moedge.convert.train import balance, trainable, training
from moedge.convert.train.settings import TrainSettings
from moedge.convert.train.trainable import GROUPS, LoRASettings

IDS = torch.arange(2, 34).reshape(2, 16)
LENGTH = 16


@pytest.fixture
def converted(tiny_llama: Callable[..., Any], make_plan: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a converted tiny Llama with u = 0, the same one each time."""

    def make(**optional: Any) -> Any:
        model = tiny_llama()
        plan = make_plan(model)[0]
        fill = {"combine": "scaled", "scale": np.zeros(6, np.float32), **optional}
        return modeling.apply(replace(plan, layers=[replace(layer, **fill) for layer in plan.layers]), model)

    return make


@pytest.fixture
def windows() -> np.ndarray:
    """24 windows of text with something to learn: a few ids in a fixed order, with noise."""
    generator = np.random.default_rng(3)
    ids = (np.arange(24 * LENGTH) * 7) % 40
    noise = generator.random(ids.size) < 0.1
    return np.where(noise, generator.integers(0, 256, ids.size), ids).reshape(24, LENGTH)


def settings(steps: int = 4, **more: Any) -> TrainSettings:
    base = {"tokens": steps * 2 * LENGTH, "length": LENGTH, "batch": 2, "lr": 1e-2, "router_lr": 1e-2, "eval_every": 2}
    return TrainSettings(**{**base, **more})


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_it_learns_and_gives_the_model_back_plain(converted: Any, windows: np.ndarray) -> None:
    model = converted()
    result = training.train(model, windows, settings(12, trainable="lora+scale+router+norms"), held_out={"a": windows})
    assert [entry["step"] for entry in result.curve] == [0, 2, 4, 6, 8, 10, 12]
    assert result.curve[-1]["ppl"]["a"] < 0.8 * result.curve[0]["ppl"]["a"]
    assert result.tokens == 12 * 2 * LENGTH
    assert result.model is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    # what is saved afterwards is what was saved before: the same names, shapes and kinds
    fresh = converted()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in fresh.named_buffers()}


@pytest.mark.parametrize("group", [*GROUPS, "router+norms+lora"])
def test_exactly_the_chosen_groups_change(group: str, converted: Any, windows: np.ndarray) -> None:
    # u is not 0 here: with weights of 1 whatever the scores, no gradient reaches the router.
    optional = {"scale": np.ones(6, np.float32), "compensation": np.ones((6, 32), np.float32)}
    optional["output_bias"] = np.ones(32, np.float32)
    before = {name: tensor.clone() for name, tensor in converted(**optional).state_dict().items()}
    model = converted(**optional)
    training.train(model, windows, settings(2, trainable=group))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts: dict[str, tuple[str, ...]] = {
        "router": (".router.",),
        "scale": ("mlp.scale",),
        "compensation": ("mlp.compensation", "mlp.output_bias"),
        "norms": ("norm.weight",),
        "experts": ("mlp.gate", "mlp.up", "mlp.down"),
        "shared": ("mlp.shared",),
        "attention": ("_proj.weight",),
        "embeddings": ("embed_tokens", "lm_head"),
    }
    parts["lora"] = (*parts["experts"], *parts["shared"], *parts["attention"])
    wanted = tuple(part for name in group.split("+") for part in parts[name])
    should = {name for name in before if any(part in name for part in wanted)}
    assert changed == should


def test_u_learns_after_lora_wrapping_and_starts_at_weight_one(converted: Any, windows: np.ndarray) -> None:
    """PEFT freezes what is not its own; CMoE's released code trains no u for that reason (docs/methods.md 1.3)."""
    model = converted()
    ready = trainable.prepare(model, ("lora", "scale"), LoRASettings(rank=2))
    assert set(ready.groups) == {"lora", "scale"}
    ffn = modeling.sparse_ffns(ready.inner)[0]
    assert isinstance(ffn.scale, nn.Parameter)
    scores = torch.randn(5, 6)
    assert torch.equal(torch.ops.moedge.route(scores, None, ffn.scale, 3, "scaled")[1], torch.ones(5, 3))
    ids = torch.from_numpy(windows[:2])
    out = ready.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(out, ids[:, 1:].reshape(-1)).backward()
    for parameter in ready.parameters:
        assert parameter.grad is not None
    assert all(float(p.grad.abs().max()) > 0 for name, p in ready.groups["scale"] if p.grad is not None)
    frozen = [p for p in ready.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("width", [64, 67])
def test_merging_changes_no_logit(
    width: int, tiny_llama: Callable[..., Any], make_plan: Callable[..., Any], windows: np.ndarray
) -> None:
    model = tiny_llama(width=width)
    plan, _ = make_plan(model, padding="uneven")
    modeling.apply(plan, model)
    ready = trainable.prepare(model, ("lora",), LoRASettings(rank=3))
    generator = torch.Generator().manual_seed(0)
    padding = [(ffn.gate == 0).all(-1) for ffn in modeling.sparse_ffns(model)]
    with torch.no_grad():
        for _, parameter in ready.groups["lora"]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for module in ready.model.modules():  # rows of the padding get no gradient: their factor stays zero
            if getattr(module, "parameter_name", None) in ("gate", "up"):
                ffn, rank = module.get_base_layer(), 3
                b = module.lora_B["default"].weight.view(-1, rank, ffn.num_experts)
                b.masked_fill_((ffn.gate == 0).all(-1).T.unsqueeze(1), 0)
    ready.model.eval()
    before = logits(ready.model)
    merged = trainable.finish(ready)
    assert any(mask.any() for mask in padding) == (width == 67)
    for ffn, mask in zip(modeling.sparse_ffns(merged), padding, strict=True):
        for tensor in (ffn.gate, ffn.up, ffn.down.transpose(1, 2)):
            assert not tensor[mask].any()
    after = logits(merged)
    # W + BA is rounded once on merging and once in the wrapped forward pass: a few units of float32's last place.
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def test_interrupted_and_resumed_equals_uninterrupted(converted: Any, windows: np.ndarray, tmp_path: Path) -> None:
    options = {"trainable": "lora+scale+router+norms", "balance": "bias", "accumulate": 2, "save_every": 3}
    options["lora"] = LoRASettings(rank=2, dropout=0.2, targets=("attention",))
    chosen = settings(14, **options)
    whole = training.train(converted(), windows, chosen, held_out={"a": windows[:4]})

    class Stop(Exception):
        pass

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 4:
            raise Stop

    model = converted()
    state = tmp_path / "state"
    with pytest.raises(Stop):
        training.train(model, windows, chosen, held_out={"a": windows[:4]}, state=state, on_eval=stop)
    seen: list[int] = []
    result = training.train(
        converted(), windows, chosen, held_out={"a": windows[:4]}, state=state, on_eval=lambda e: seen.append(e["step"])
    )
    assert seen == [4, 6, 7]  # it went on from the state of step 3
    assert result.model is not None
    assert whole.model is not None
    for (name, tensor), other in zip(result.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    timeless = [[{k: v for k, v in e.items() if k != "seconds"} for e in r.curve] for r in (whole, result)]
    assert timeless[0] == timeless[1]


def test_a_resumed_run_scales_its_loss_as_the_whole_one_does(
    converted: Any, windows: np.ndarray, tmp_path: Path
) -> None:
    """float16's gradient scaler is part of the state; here it runs on the CPU, in float32."""

    def run(steps: int, **options: Any) -> float:
        chosen = settings(steps, trainable="norms", save_every=2)
        accelerator = training.make(chosen)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
        training.train(converted(), windows, chosen, accelerator=accelerator, **options)
        return accelerator.scaler.get_scale()

    class Stop(Exception):
        pass

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 4:
            raise Stop

    whole, state = run(16), tmp_path / "state"
    with pytest.raises(Stop):
        run(16, state=state, on_eval=stop)
    resumed = run(16, state=state)
    assert whole == resumed == 2.0 * 2 ** (16 // 3)  # doubled after every third step


def test_a_state_of_another_run_is_refused(converted: Any, windows: np.ndarray, tmp_path: Path) -> None:
    training.train(converted(), windows, settings(2), state=tmp_path / "state")
    with pytest.raises(MoEdgeError, match="other settings"):
        training.train(converted(), windows, settings(2, lr=1e-3), state=tmp_path / "state")
    (tmp_path / "state" / "state.safetensors").write_bytes(b"no")
    with pytest.raises(MoEdgeError, match="damaged"):
        training.train(converted(), windows, settings(2), state=tmp_path / "state")


def test_accumulation_is_a_larger_batch(converted: Any, windows: np.ndarray) -> None:
    results = []
    for batch, accumulate in ((4, 1), (2, 2)):
        options = {"batch": batch, "accumulate": accumulate, "tokens": 2 * 4 * LENGTH, "trainable": "norms"}
        model = training.train(converted(), windows, settings(**options)).model
        results.append(torch.cat([t.flatten() for n, t in model.state_dict().items() if "norm" in n]))
    # Adam divides by the gradient's own size, so rounding shows relative to one step of 1e-2.
    assert float((results[0] - results[1]).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_distillation_pulls_towards_the_dense_parent(
    kind: str, converted: Any, tiny_llama: Callable[..., Any], windows: np.ndarray
) -> None:
    teacher, model = tiny_llama(), converted()
    ids = torch.from_numpy(windows)
    wanted = logits(teacher, ids)

    def distance(model: Any) -> float:
        return float(training.divergence(logits(model, ids).flatten(0, 1), wanted.flatten(0, 1), 1.0))

    before = distance(model)
    chosen = settings(12, distill=kind, distill_weight=1.0, trainable="lora+norms", lr=3e-3)
    training.train(model, windows, chosen, teacher=teacher)
    assert distance(model) < 0.8 * before
    with pytest.raises(MoEdgeError, match="dense parent"):
        training.train(converted(), windows, chosen)


def test_gradient_checkpointing_gives_the_same_step(converted: Any, windows: np.ndarray) -> None:
    models = []
    for again in (False, True):
        options = {"gradient_checkpointing": again, "balance": "loss", "balance_weight": 0.1}
        models.append(training.train(converted(), windows, settings(2, **options)).model)
    for (name, one), two in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


def test_bfloat16_autocast_leaves_the_router_in_float32(converted: Any, windows: np.ndarray) -> None:
    model = converted()
    ffn = modeling.sparse_ffns(model)[0]
    seen: list[tuple[torch.dtype, ...]] = []
    ffn.router.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    result = training.train(model, windows, settings(8, mixed_precision="bf16"), held_out={"a": windows})
    assert set(seen) == {(torch.float32, torch.float32)}
    assert result.curve[-1]["ppl"]["a"] < result.curve[0]["ppl"]["a"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def skewed(biased: bool = True) -> tuple[modeling.SparseFFN, torch.Tensor]:
    """An FFN whose router prefers low experts strongly, and tokens."""
    spec: dict[str, Any] = {"num_experts": 8, "top_k": 2, "activation": "silu", "combine": "scaled", "expert_width": 4}
    spec |= {"shared_width": 4, "router": {"kind": "linear", "options": {}}}
    spec["tensors"] = ["scale", *(["selection_bias"] if biased else [])]
    ffn = modeling.SparseFFN(0, 16, spec)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*ffn.parameters(), *ffn.buffers()):
        tensor.data.normal_(0, 0.3, generator=generator)
    if ffn.selection_bias is not None:
        ffn.selection_bias.zero_()
    x = torch.randn(512, 16, generator=generator)
    x[:, 0] = 1.0
    ffn.router.weight.data[:, 0] = -torch.arange(8) * 0.25
    return ffn, x


def test_the_bias_rule_evens_the_load_and_touches_no_weight() -> None:
    ffn, x = skewed()
    observer = balance.LoadObserver(ffn)
    variations = []
    for _ in range(60):
        with torch.no_grad():
            ffn(x)
        observer.observe()
        variations.append(balance.variation(observer.take()[0]))
        observer.step_bias(0.02)
    observer.close()
    tenths = np.asarray(variations).reshape(6, 10).mean(axis=1)
    assert tenths[0] > 0.5
    assert (np.diff(tenths[:4]) < 0).all()  # falls monotonically on average, then stays
    assert tenths[-1] < 0.1
    scores = ffn.router(x)
    indices, weights = torch.ops.moedge.route(scores, ffn.selection_bias, ffn.scale, 2, "scaled")
    free, _ = torch.ops.moedge.route(scores, None, ffn.scale, 2, "scaled")
    assert not torch.equal(indices, free)
    expected = 1 + (torch.softmax(scores, -1) * ffn.scale).gather(1, indices.long())
    assert torch.equal(weights, expected)


def test_the_bias_steps_by_the_sign_of_the_load() -> None:
    ffn, x = skewed()
    observer = balance.LoadObserver(ffn)
    ffn(x)
    counts = torch.bincount(ffn.last_routes.flatten(), minlength=8)
    observer.observe()
    ffn(x)  # an evaluation: seen, never counted
    observer.step_bias(1e-3)
    assert torch.equal(ffn.selection_bias, -1e-3 * torch.sign(counts - counts.sum() / 8))
    before = ffn.selection_bias.clone()
    observer.step_bias(1e-3)
    assert torch.equal(ffn.selection_bias, before)


def test_the_balance_loss_is_one_when_even_and_its_descent_evens_the_load() -> None:
    ffn, x = skewed(biased=False)
    observer = balance.LoadObserver(ffn, scores=True)
    optimizer = torch.optim.SGD(ffn.router.parameters(), lr=0.5)
    losses, variations = [], []
    for _ in range(60):
        ffn(x)
        loss = observer.loss()
        observer.observe()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        variations.append(balance.variation(observer.take()[0]))
    assert losses[0] > 1.2
    assert abs(losses[-1] - 1) < 0.05
    assert variations[-1] < 0.5 * variations[0]


def test_dense_softmax_stage_gives_every_score_a_gradient(converted: Any, windows: np.ndarray) -> None:
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ffn = modeling.sparse_ffns(model)[0]
    with trainable.dense_softmax(model, temperature=0.5):
        ffn.record_routes = True
        logits(model)
        assert ffn.last_routes.shape[1] == ffn.num_experts
    assert (ffn.top_k, ffn.combine) == (3, "scaled")
    chosen = settings(4, trainable="router", routing="dense-softmax", router_temperature=0.5)
    training.train(model, windows, chosen)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {name for name in before if ".router." in name}
    # What is measured is the model as it is saved and routes, not as it was trained.
    again = converted()
    held = {"t": windows[:4]}
    curve = training.train(again, windows, chosen, held_out=held).curve
    assert curve[0]["ppl"]["t"] == pytest.approx(scoring.perplexity(converted(), held["t"])["ppl"], rel=1e-5)
    assert curve[-1]["ppl"]["t"] == pytest.approx(scoring.perplexity(again, held["t"])["ppl"], rel=1e-5)
    assert (ffn.top_k, ffn.combine) == (3, "scaled")


@pytest.mark.parametrize("rule", ["loss", "bias"])
def test_no_load_is_balanced_where_nothing_routes(
    rule: str, tiny_llama: Callable[..., Any], windows: np.ndarray
) -> None:
    model = tiny_llama()
    modeling.apply(methods.convert("mlpmoe", None, model, branches=8), model)
    with pytest.raises(MoEdgeError, match="no load to balance"):
        training.train(model, windows, settings(trainable="lora", balance=rule))


def test_every_pass_over_the_text_is_a_permutation() -> None:
    seen = np.concatenate([training.order(0, 10, start, 4) for start in range(0, 40, 4)]).reshape(4, 10)
    assert all(sorted(row) == list(range(10)) for row in seen)
    assert len({tuple(row) for row in seen}) == 4
    assert not np.array_equal(seen[0], training.order(1, 10, 0, 10))


def test_schedule_rises_peaks_and_ends() -> None:
    chosen = TrainSettings(tokens=100, warmup=0.1, final_lr=0.2)
    rates = [chosen.rate_factor(done) for done in (0.0, 0.05, 0.1, 0.55, 1.0)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1.0, 0.6, 0.2], atol=1e-12)
    assert TrainSettings(minutes=1, schedule="constant").rate_factor(0.9) == 1.0


def test_a_budget_of_minutes_ends_in_time(converted: Any, windows: np.ndarray) -> None:
    result = training.train(converted(), windows, settings(tokens=None, minutes=0.02, trainable="norms"))
    assert result.steps >= 1
    assert result.seconds >= 1.2


def test_lora_needs_nothing_of_transformers_own_adapter_code(
    converted: Any, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That code asks for peft 0.22 since transformers 5.24, which is newer than the peft of pyproject.toml."""
    from transformers.integrations import peft as adapters

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers' adapter code was called")

    for name in ("load_adapter", "add_adapter", "set_adapter", "active_adapters", "get_adapter_state_dict"):
        monkeypatch.setattr(adapters.PeftAdapterMixin, name, refuse)
    monkeypatch.setattr(adapters, "check_peft_version", refuse)
    training.train(converted(), windows, settings(2, trainable="lora"))


def test_lora_is_made_without_warnings_of_libraries(converted: Any, recwarn: pytest.WarningsRecorder) -> None:
    trainable.prepare(converted(), ("lora",), LoRASettings(rank=2))
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "either tokens or minutes"),
        ({"tokens": 5, "minutes": 1}, "either tokens or minutes"),
        ({"tokens": 5, "trainable": "router+rooter"}, "unknown group 'rooter'"),
        ({"tokens": 5, "trainable": "router+router"}, "named twice"),
        ({"tokens": 5, "seed": 2**32}, "less than or equal to 4294967295"),
        ({"tokens": 5, "lora": {"dropout": 0.1}}, "attention only"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TrainSettings(**given)
