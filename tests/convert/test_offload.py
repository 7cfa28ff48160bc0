"""Models whose layers stay on disk: what is made of them is what the same model in memory gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moedge
from moedge import MoEdgeError
from moedge.convert import adapters, calibration, domains, methods, modeling, offload, sources, streaming

IDS = np.random.default_rng(0).integers(0, 256, size=(6, 24))
LAYOUT = {"shared": 2, "active": 2, "experts": 8}


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Set whether this machine has memory for a whole model."""

    def choose(no_memory: bool) -> None:
        monkeypatch.setattr(sources, "_free", lambda device: 0 if no_memory else 1 << 40)

    return choose


def saved(model: Any, folder: Path, tokenizer: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A dense model in several files."""
    model.to(dtype).save_pretrained(folder, max_shard_size="16KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def converted(folder: Path, out: Path, tokenizer: Any, method: str, **params: Any) -> dict[str, bytes]:
    """The files that a conversion writes."""
    data: Any = IDS
    if "statistics" in methods.METHODS[method].needs:
        gate = calibration.GateSampling() if "gate_profile" in methods.METHODS[method].needs else None
        data = calibration.collect(sources.open_model(folder), IDS, k_a=5, batch_size=4, gate=gate)
    model = sources.open_model(folder)
    plan = methods.convert(method, data, model, **params)
    offload.cast(modeling.apply(plan, model), getattr(torch, sources.own_dtype(folder)))
    modeling.save(model, plan, tokenizer, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


METHODS: dict[str, dict[str, Any]] = {
    "cmoe": {**LAYOUT, "k_a": 5},
    "moedge": LAYOUT,
    "expertweaver": {"experts": 8, "k": 4},
    "flap": {"keep": 0.5, "refit": True, "sequential": True},
    "mlpmoe": {"branches": 4},
    "llamamoe": {"active": 2, "experts": 8},
    "gather": {"share": 0.6},
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gather, norms": ("gather", {"share": 0.6, "scores": "norms"}),
    "gather, FFN alone": ("gather", {"share": 0.6, "linears": "ffn"}),
    "moedge, gather on top": ("moedge", {**LAYOUT, "gather": {"share": 0.4}}),
    "moedge, every layer alike": ("moedge", {**LAYOUT, "budget": "uniform"}),
    "flap, budget": ("flap", {"keep": 0.5, "budget": "measured", "budget_tokens": 48}),
}


@pytest.mark.parametrize("case", [*METHODS, *MORE])
def test_a_model_on_disk_is_converted_to_the_same_bytes(
    case: str,
    scarce: Callable[[bool], None],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modeling, "_SHARD", "24KB")
    folder = saved(tiny_model("llama", layers=3), tmp_path / "dense", tiny_tokenizer)
    method, params = MORE.get(case) or (case, METHODS[case])
    files = []
    for on_disk in (False, True):
        scarce(on_disk)
        files.append(converted(folder, tmp_path / str(on_disk), tiny_tokenizer, method, **params))
    assert sum(name.endswith(".safetensors") for name in files[0]) > 3
    assert files[0].keys() == files[1].keys()
    for name, content in files[0].items():
        assert content == files[1][name], name


def test_dive_is_refused_before_any_work(
    scarce: Callable[[bool], None],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(tiny_model("llama", layers=3), tmp_path / "dense", tiny_tokenizer)
    scarce(True)
    monkeypatch.setattr(domains, "moments", None)
    texts = {name: domains.DomainText(IDS, IDS) for name in "ab"}
    settings = {"domains": dict.fromkeys(texts, "x"), "experts": 2}
    with pytest.raises(MoEdgeError, match="larger than half of the free memory"):
        methods.convert("dive", texts, sources.open_model(folder), **settings)


@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_is_read_from_disk(
    family: str,
    tied: bool,
    scarce: Callable[[bool], None],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    dense = tiny_model(family, layers=3, tie_word_embeddings=tied)
    folder = saved(dense, tmp_path / "dense", tiny_tokenizer, torch.float32)
    files = []
    for on_disk in (False, True):
        scarce(on_disk)
        assert offload.is_offloaded(sources.open_model(folder)) == on_disk
        out = tmp_path / str(on_disk)
        settings = {"keep": 0.5, "sequential": True, "gather": {"share": 0.4}}
        files.append(converted(folder, out, tiny_tokenizer, "flap", **settings))
    assert files[0] == files[1]


def bytes_held(model: Any) -> int:
    tensors = {id(p): p for p in (*model.parameters(), *model.buffers()) if not p.is_meta}
    return sum(p.numel() * p.element_size() for p in tensors.values())


def test_one_layer_is_in_memory_at_a_time(
    scarce: Callable[[bool], None],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(tiny_model("llama", layers=4), tmp_path / "dense", tiny_tokenizer)
    whole = sources.open_model(folder)
    layer = sum(p.numel() * 4 for p in whole.model.layers[0].parameters())
    scarce(True)
    model = sources.open_model(folder)
    rest = bytes_held(model)
    assert rest < bytes_held(whole) - 4 * layer + 1
    held: list[int] = []
    run = streaming.Runner.forward

    def watched(self: Any, *args: Any) -> Any:
        after = run(self, *args)
        held.append(bytes_held(model))
        return after

    monkeypatch.setattr(streaming.Runner, "forward", watched)
    statistics = calibration.collect(model, IDS, k_a=5)
    plan = methods.convert("moedge", IDS, model, **LAYOUT, budget="uniform")
    assert len(statistics) == len(plan.layers) == 4
    assert len(held) == 4 + 2 * 4, "every layer once for statistics, and twice in a sequential method"
    assert max(held) == rest + layer
    assert bytes_held(model) == rest
    held.clear()
    methods.convert("gather", IDS, model, share=0.6)
    assert len(held) % 4 == 0
    thresholds = 4 * (32 + 64)
    assert max(held) == rest + layer + thresholds, "the FFN that is tried stands in the place of the dense one"
    assert bytes_held(model) == rest


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_weights_that_are_not_finite_are_named(
    name: str, scarce: Callable[[bool], None], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    dense = tiny_model("llama", layers=3)
    dense.get_parameter(name).data[1, 1] = float("nan")
    folder = saved(dense, tmp_path / "dense", tiny_tokenizer)
    scarce(True)
    with pytest.raises(MoEdgeError, match=f"Weight {name} holds NaN or infinity"):
        converted(folder, tmp_path / "out", tiny_tokenizer, "cmoe", **METHODS["cmoe"])
    assert not (tmp_path / "out").exists()


def test_the_public_function_gives_the_same_folder(
    scarce: Callable[[bool], None], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = saved(tiny_model("llama", layers=3), tmp_path / "dense", tiny_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of {i * i % 97}" for i in range(200)), encoding="utf-8")
    files = []
    for on_disk in (False, True):
        scarce(on_disk)
        out = tmp_path / str(on_disk)
        moedge.convert_model(folder, out, method="cmoe", text=text, windows=3, length=32, batch_size=2, k_a=5, **LAYOUT)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]
    assert "model.safetensors" in files[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
        (lambda tensors: tensors.update({"extra.weight": torch.ones(2)}), "extra.weight has no place in the model"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight has shape \[3\]"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(260, 32)}),
            "lm_head.weight differs from",
        ),
    ],
)
def test_files_of_another_model_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    scarce: Callable[[bool], None],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    tiny_model("llama", layers=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for on_disk in (False, True):
        scarce(on_disk)
        with pytest.raises(MoEdgeError, match=message):
            sources.open_model(tmp_path)
