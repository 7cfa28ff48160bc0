"""The default model and text: known-good numbers and the ordering that tests/README.md, item 11, asks for."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moedge.convert import calibration, evaluate, methods, sources
from moedge.convert.methods import baselines

pytestmark = [pytest.mark.slow, pytest.mark.network]


def test_smollm2_orders_the_controls_and_reports_a_losing_router() -> None:
    source = sources.resolve("asset:smollm2-135m-instruct")
    model, tokenizer = sources.load_model(source.folder), sources.load_tokenizer(source.folder)
    kept, held = calibration.split(calibration.read_text("asset:wiki"))
    calibration_ids = calibration.windows(tokenizer, kept, 2048, 4, bos=False, name="calibration")
    statistics = calibration.collect(model, calibration_ids, k_a=10)
    plan = methods.convert("cmoe", statistics, model, shared=6, active=6, experts=16)
    windows = calibration.windows(tokenizer, held, 512, 4, bos=True, name="evaluation")
    names = (*baselines.STANDARD, "LLaMA-MoE random", "neuron top-k")
    controls = {name: baselines.CONTROLS[name](plan, statistics, model, 0, calibration_ids) for name in names}
    result = evaluate.evaluate(model, {"cmoe": plan, **controls}, {"wiki": windows}, {})
    ppl = {row["label"]: row["ppl"]["wiki"] for row in result["rows"]}
    # docs/assets.md: about 23 over the whole held-out text; 2,044 tokens of it vary by a few points.
    assert 17 < ppl["dense"] < 30
    assert ppl["dense"] < ppl["neuron top-k"] < ppl["oracle router"] < ppl["cmoe"] < ppl["random partition"]
    assert ppl["oracle router"] < ppl["static mask"] < ppl["LLaMA-MoE random"]  # a split without shared experts
    for label, beaten in result["verdict"]["router_beats"].items():
        assert beaten == (ppl["cmoe"] < ppl[label])
        assert beaten or any(f"loses to the control '{label}'" in line for line in result["verdict"]["sentences"])


def test_the_default_models_tokenizer_gives_the_ids_of_the_original() -> None:
    """SmolLM2's own tokenizer.json: each digit alone, then GPT-2's words, then byte-level merges."""
    folder = sources.resolve("asset:smollm2-135m-instruct").folder
    tokenizer = sources.load_tokenizer(folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    original = Tokenizer(models.BPE(state["vocab"], [tuple(merge) for merge in state["merges"]]))
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    texts = [
        "  42",
        "a\n  1\n",
        "if x:\n    1",
        "\t\t7",
        " \u0661\u0662",
        "\uff11\uff12 \u00bd",
        "na\u00efve  caf\u00e9 \u4f60\u597d 1999",
    ]
    assert original.encode("  42").ids == [256, 36, 34]  # "\u0120\u0120", "4", "2"
    for name in ("wiki", "c4"):
        texts += [document.text for document in calibration.read_text(f"asset:{name}").documents]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text).ids, text[:80]
