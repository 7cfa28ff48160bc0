"""Every engine makes the tokens of transformers' generate() on the dense parent: settings, ends of text, longrope."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.configs.generation_config import GenerationConfig
from moedge.configs.tolerances import load as load_tolerances
from moedge.export import rope
from moedge.export.pipeline import export
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity import shapes
from moedge.runtime.parity.suite import ALL_EXPERTS
from moedge.runtime.text.generate import generate
from moedge.runtime.text.tokenizer import Tokenizer

PROMPT = "river stone light"
ENGINES = ("dense", "moe", "dense-ort-cpu", "moe-ort-cpu")
Made = dict[str, Path]


@pytest.fixture(scope="module")
def everywhere(convert_tiny: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: Any) -> Callable[..., Made]:
    """Return a function of a model and its generation_config.json: a folder for each of :data:`ENGINES`."""

    def make(model: Any, generation: dict[str, Any] | None, names: tuple[str, ...] = ENGINES) -> Made:
        from moedge.convert import modeling, sources

        root = tmp_path_factory.mktemp("everywhere")
        model.save_pretrained(root / "dense")
        tiny_tokenizer.save_pretrained(root / "dense")
        file = root / "dense" / "generation_config.json"
        file.unlink()
        if generation is not None:
            file.write_text(json.dumps(generation))
        made = {"dense": root / "dense"}
        if "moe" in names:
            loaded = sources.load_model(root / "dense")
            plan = convert_tiny(loaded, "cmoe")
            modeling.save(modeling.apply(plan, loaded), plan, tiny_tokenizer, root / "moe")
            made["moe"] = root / "moe"
        for kind in made.copy():
            if f"{kind}-ort-cpu" in names:
                made[f"{kind}-ort-cpu"] = export(made[kind], root / f"{kind}-b", ["ort-cpu"], label=kind)["ort-cpu"]
        return made

    return make


def opened(made: Made, name: str, **more: Any) -> Any:
    """The engine ``name`` with every expert selected: a Mixture-of-Experts is then its dense parent."""
    return open_engine(made[name], threads=1, **({"top_k": ALL_EXPERTS} if name.startswith("moe") else {}), **more)


def wanted(folder: Path, prompt: list[int], new: int, **more: Any) -> list[int]:
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **more)
    return list(made[0, len(prompt) :].tolist())


SETTINGS = {
    "eos_token_id": [257, 3], "do_sample": True, "top_p": 0.8, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2,
    "suppress_tokens": [10, 11, 12], "begin_suppress_tokens": [200, 201], "min_new_tokens": 12, "max_length": 20,
    "forced_eos_token_id": 257, "bad_words_ids": [[40], [41, 42]], "encoder_repetition_penalty": 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def settled(everywhere: Callable[..., Made], tiny_llama: Any) -> Made:
    return everywhere(tiny_llama(layers=1), SETTINGS)


@pytest.mark.parametrize("name", ENGINES)
def test_settings_of_the_file_are_obeyed_by_every_engine(name: str, settled: Made) -> None:
    tokenizer = Tokenizer(settled[name])
    want = wanted(settled["dense"], tokenizer.encode(PROMPT), 24)
    result = generate(opened(settled, name, last_logits=True), tokenizer, PROMPT, max_new_tokens=24)
    assert result.ids == want
    assert len(want) > 12, "neither min_new_tokens nor max_length is what ends it"
    assert "asks for sampling (top_p 0.8)" in result.notes[0]
    without = generate(opened(settled, name), tokenizer, PROMPT, max_new_tokens=24, generation=GenerationConfig())
    assert without.ids != want
    assert without.notes == ()


FREE = 24
CASES: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "several": (..., {"eos_token_id": [3, 6]}),
    "config-and-a-file-without": (3, {"temperature": 0.6}),
    "differ": (3, {"eos_token_id": 6}),
    "no-file": (3, None),
    "none": (None, {"do_sample": True}),
    "outside": (None, {"eos_token_id": [9999, 6]}),
}
"""``eos_token_id`` of config.json and generation_config.json; 3 and 6 are places in the text that is made without."""


@pytest.mark.parametrize("case", CASES)
def test_every_engine_ends_where_generate_does(
    case: str, everywhere: Callable[..., Made], tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    model, ids = tiny_llama(layers=1), tiny_tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        free = model.generate(torch.tensor([ids]), max_new_tokens=FREE, do_sample=False, eos_token_id=None)[
            0, len(ids) :
        ]

    def real(value: Any) -> Any:
        return (
            [real(item) for item in value]
            if isinstance(value, list)
            else int(free[value])
            if value in (3, 6)
            else value
        )

    in_config, generation = CASES[case]
    model.config.eos_token_id = None if in_config is ... else real(in_config)
    if generation and "eos_token_id" in generation:
        generation = {**generation, "eos_token_id": real(generation["eos_token_id"])}
    # Exporting takes seconds, and one case shows that bundles and genai have what the checkpoint has.
    names = ENGINES if case == "config-and-a-file-without" else ENGINES[:2]
    made = everywhere(model, generation, names)
    want = wanted(made["dense"], ids, FREE, pad_token_id=0)
    endless = case in ("config-and-a-file-without", "none")
    assert (len(want) == FREE) == endless
    for name in names:
        result = generate(opened(made, name), Tokenizer(made[name]), PROMPT, max_new_tokens=FREE)
        assert result.ids == want, name
        assert bool(result.notes) == endless
    if len(names) > 2:
        assert "eos_token_id" not in json.loads((made["moe-ort-cpu"] / "genai_config.json").read_text())["model"]


LIMIT = 24


@pytest.fixture(scope="module", params=["phi3", "llama"])
def long(request: Any, everywhere: Callable[..., Made], tiny_model: Any) -> Made:
    """A model whose rotary factors change after 24 tokens. transformers reads again for Phi-3 alone."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 7.0], "factor": 4.0,
    }  # fmt: skip
    more = {"original_max_position_embeddings": LIMIT} if request.param == "phi3" else {}
    names = ENGINES if request.param == "phi3" else ("dense", "moe", "moe-ort-cpu")
    return everywhere(tiny_model(request.param, layers=1, rope_parameters=rope, **more), {"eos_token_id": None}, names)


def one_reading(folder: Path, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, V] after ``ids``, by transformers without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    with torch.no_grad():
        given = {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
        return model(input_ids=torch.from_numpy(ids), use_cache=False, **given).logits[:, -1].numpy()


@pytest.mark.parametrize("name", ENGINES)
def test_a_text_that_passes_the_boundary_is_read_again(name: str, long: Made) -> None:
    if name not in long:
        pytest.skip("the other family shows it")
    tokenizer = Tokenizer(long[name])
    ids = tokenizer.encode(PROMPT)
    result = generate(opened(long, name), tokenizer, PROMPT, max_new_tokens=20)
    if "phi3" in (long["dense"] / "config.json").read_text():
        assert result.ids == wanted(long["dense"], ids, 20)
    assert len(ids) < LIMIT < len(ids) + 19
    text = ids
    for token in result.ids:  # by the definition of the model, whatever its family's generate() does
        assert token == int(one_reading(long["dense"], np.array([text])).argmax())
        text = [*text, token]


@pytest.mark.parametrize("name", ["dense", "moe-ort-cpu"])
def test_the_longest_row_of_a_batch_decides_and_padding_does_not_count(name: str, long: Made) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 250, (2, 23))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0  # 21 tokens of 23 columns
    engine = opened(long, name, taps=name == "moe-ort-cpu")
    step = engine.prefill(ids, mask)
    for turn in range(6):
        more = rng.integers(0, 250, (2, 2 if turn == 1 else 1))
        ids = np.concatenate([ids, more], axis=1)
        mask = np.concatenate([mask, np.ones_like(more)], axis=1)
        step = engine.decode(more, step.cache)
        np.testing.assert_allclose(step.logits[:, -1], one_reading(long["dense"], ids, mask), atol=2e-4)
        assert step.logits.shape[1] == more.shape[1]
        for found in (step.routes or {}).values():
            assert len(found) == more.size
    assert mask.sum(axis=1).max() > LIMIT


@pytest.mark.parametrize("name", ENGINES)
def test_every_shape_is_held_to_one_reading_of_the_text(name: str, long: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are compared from the boundary on; rows of a batch end before it, for the longest decides for all."""
    if name not in long:
        pytest.skip("the other family shows it")
    monkeypatch.setattr(shapes, "LONG_PIECE", 17)
    text = np.random.default_rng(0).integers(0, 250, (1, 40))
    profile = load_tolerances().profile("float32", "ort-cpu")
    engine, reference = opened(long, name, taps=name.startswith("moe")), opened(long, "dense")
    rules = shapes.Rules(profile, profile, reference)
    entry = shapes.check(engine, text, shapes.Asked(long=text[0]), rules)
    assert entry["verdict"]["passed"], entry["verdict"]
    assert entry["prompts"][0] + 5 == LIMIT
    assert entry["cases"]["length.40.decode"]["tokens"] == shapes.LONG_STEPS
    if name.startswith("moe"):  # what was chosen before the boundary is no choice of the long text
        assert set(entry["not_run"]) == {"length.40.chunked"}
        return
    assert entry["cases"]["length.40.chunked"]["tokens"] == 40 - LIMIT
    if name == "dense-ort-cpu":
        engine._loaded = replace(engine._loaded, rope_boundary=None)  # it does not read again
        entry = shapes.check(engine, text, shapes.Asked(long=text[0]), rules)
        assert [part for part, passed in entry["verdict"]["parts"].items() if not passed] == ["length.40.chunked"]


def test_an_older_bundle_takes_the_boundary_from_its_config(long: Made, tmp_path: Path) -> None:
    import shutil

    from moedge._files import write_json

    shutil.copytree(long["moe-ort-cpu"], tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    assert manifest["model"].pop(rope.FACT) == LIMIT
    write_json(tmp_path / "old" / "manifest.json", manifest)
    assert OrtEngine(tmp_path / "old").info.model.rope_boundary == LIMIT


def test_verify_compares_both_sides_of_the_boundary(long: Made) -> None:
    """Routes are replayed across it, and a bundle that does not read again fails."""
    windows = np.random.default_rng(0).integers(0, 250, (1, 32))
    limits = {"median_rel_error": 1e-4, "mean_rel_error": 1e-4, "mean_kl": 1e-5, "max_kl": 1e-4, "top1_agreement": 1.0}
    portable = long["moe-ort-cpu"].parent / "portable"
    reference = open_engine(portable, taps=True, replay=True, threads=1)
    test = open_engine(long["moe-ort-cpu"], taps=True, router_inputs=True, threads=1)
    profile = _profile(router_set_agreement=1.0, expert_set_agreement=None, **limits)  # every window is replayed
    result = parity.compare(reference, test, windows, prefill=8, tolerances=profile)
    assert result["verdict"]["passed"], result["verdict"]["checks"]
    assert result["phases"]["prefill"]["tokens"] == 8 + LIMIT + 1
    assert result["replay"]["phases"]["prefill"]["tokens"] == 8 + LIMIT + 1
    assert not result["verdict"]["notes"]
    (note,) = parity.compare(reference, test, windows[:, :LIMIT], prefill=8, tolerances=profile)["verdict"]["notes"]
    assert f"Beyond {LIMIT} tokens" in note
    reference, test = opened(long, "dense"), opened(long, "moe-ort-cpu")
    assert parity.identity_all(reference, {"": (test, 1e-4)}, windows, prefill=8)[""]["passed"]
    test._loaded = replace(test._loaded, rope_boundary=None)
    real = test.prefill

    def stale(ids: np.ndarray, *more: Any) -> Any:
        """As if the cache from before had been kept."""
        if ids.shape[1] <= LIMIT:
            return real(ids, *more)
        step = real(ids[:, :LIMIT], *more)
        late = test.decode(ids[:, LIMIT:], step.cache)
        late.logits = np.concatenate([step.logits, late.logits], axis=1)
        return late

    test.prefill = stale
    assert not parity.identity_all(reference, {"": (test, 1e-4)}, windows, prefill=8)[""]["passed"]


def _profile(**more: Any) -> Any:
    from moedge.configs import tolerances

    return tolerances.load().profile("float32", "ort-cpu").model_copy(update=more)


def test_experts_cannot_be_forced_where_the_text_is_read_again(long: Made) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (1, LIMIT + 1))
    for path in (long["moe"], long["moe-ort-cpu"].parent / "portable"):
        engine = open_engine(path, taps=True, replay=True, threads=1)
        step = engine.prefill(ids[:, :LIMIT])
        forced = {
            layer: np.zeros((1, found.shape[1]), np.int64) + np.arange(found.shape[1])
            for layer, found in step.routes.items()
        }
        with pytest.raises(MoEdgeError, match=f"Beyond {LIMIT} tokens .* is read again"):
            engine.decode(ids[:, LIMIT:], step.cache, experts=forced)
