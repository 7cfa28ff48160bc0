"""lm-eval tasks on a tiny model and tiny local data, against scores computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.convert import modeling, tasks
from moedge.runtime.cli import app

WORDS = ("cat", "hat", "dog", "fog", "sun", "run", "sea", "tea")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SciQ and ARC with eight short questions each."""
    folder = tmp_path_factory.mktemp("tasks")
    sciq = [
        {
            "support": "",
            "question": f"what is {word}",
            "distractor1": WORDS[i - 1] * 3,
            "distractor2": WORDS[i - 2],
            "distractor3": WORDS[i - 3] + " s",
            "correct_answer": word,
        }
        for i, word in enumerate(WORDS)
    ]
    arc = [
        {
            "question": f"which is {word}?",
            "choices": {"text": [word, WORDS[i - 1] * 2], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }
        for i, word in enumerate(WORDS)
    ]
    for name, rows in (("sciq", sciq), ("arc_easy", arc)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in ("sciq", "arc_easy")}


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Whether the likeliest choice is right: by log-likelihood, and by log-likelihood over bytes (acc_norm)."""
    plain, normed = [], []
    for row in rows:
        choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
        scores = []
        for choice in choices:
            context = tokenizer(f"\nQuestion: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
            target = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([context + target])).logits[0].float().log_softmax(-1)
            places = range(len(context) - 1, len(context) + len(target) - 1)
            scores.append(sum(float(logits[at, token]) for at, token in zip(places, target, strict=True)))
        plain.append(float(np.argmax(scores) == 3))
        normed.append(float(np.argmax([score / len(c) for score, c in zip(scores, choices, strict=True)]) == 3))
    return plain, normed


@pytest.mark.parametrize("converted", [False, True])
def test_accuracy_is_what_the_log_likelihoods_say(
    converted: bool,
    data: dict[str, Path],
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    make_plan: Callable[..., Any],
    moedge_cache: Path,
) -> None:
    model = tiny_llama()
    if converted:
        model = modeling.apply(make_plan(model)[0], model)
    (row,) = tasks.run(model, tiny_tokenizer, ["sciq"], data=data, batch_size=2)
    questions = [json.loads(line) for line in data["sciq"].read_text(encoding="utf-8").splitlines()]
    plain, normed = by_hand(model, tiny_tokenizer, questions)
    assert (row["questions"], row["shots"], row["data"]) == (8, 0, "sciq.jsonl")
    for name, right in (("acc", plain), ("acc_norm", normed)):
        assert row["metrics"][name]["value"] == pytest.approx(np.mean(right))
        # The standard error of a mean: sample deviation over the root of the number of questions.
        assert row["metrics"][name]["stderr"] == pytest.approx(np.std(right, ddof=1) / 8**0.5)


def test_the_command_compares_models_and_prints_the_protocol(
    data: dict[str, Path],
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    make_plan: Callable[..., Any],
    moedge_cache: Path,
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "dense")
    plan = make_plan(model)[0]
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, tmp_path / "moe")
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the cat sat on the mat" for _ in range(40)), encoding="utf-8")
    options = [str(tmp_path / "dense"), str(tmp_path / "moe"), "--tasks", "sciq,arc_easy", "--shots", "2"]
    options += [f"--task-data={name}={path}" for name, path in data.items()]
    options += ["--limit", "4", "--text", str(text), "--tokens", "256", "--window", "64"]
    options += ["--save", str(tmp_path / "scores.json")]
    printed = CliRunner().invoke(app, ["evaluate", *options], catch_exceptions=False)
    assert printed.exit_code == 0, printed.output
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["protocol"]["documents"] == {"text": "40 documents"}
    assert [row["model"] for row in result["rows"]] == [str(tmp_path / "dense"), str(tmp_path / "moe")]
    dense, moe = result["rows"]
    assert dense["perplexity"]["text"]["tokens"] == moe["perplexity"]["text"]["tokens"] == 4 * 63
    assert dense["perplexity"]["text"]["ppl"] != moe["perplexity"]["text"]["ppl"]
    for row in result["rows"]:
        assert [(task["task"], task["questions"], task["shots"]) for task in row["tasks"]] == [
            ("sciq", 4, 2),
            ("arc_easy", 4, 2),
        ]
        assert set(row["tasks"][1]["metrics"]) == {"acc", "acc_norm"}
    assert "2 shots" in printed.output
    assert "40 documents" in printed.output


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["lambada"], {}, "has no packaged data"),
        (["sciq"], {"sciq": Path("missing.jsonl")}, "must be an existing"),
    ],
)
def test_refusals(
    names: list[str], data: dict[str, Path], sentence: str, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    with pytest.raises(MoEdgeError, match=sentence):
        tasks.run(tiny_llama(), tiny_tokenizer, names, data=data)


def test_every_known_task_has_an_asset_and_an_lm_eval_task() -> None:
    import lm_eval.tasks

    from moedge.convert.sources import assets

    folder = Path(lm_eval.tasks.__file__).parent
    for task, path in tasks.KNOWN.items():
        assert assets.find(f"task-{task}").member.endswith(".arrow")
        assert f"task: {task}\n" in (folder / path).read_text(encoding="utf-8")
