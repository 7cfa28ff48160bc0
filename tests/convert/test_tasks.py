"""lm-eval tasks on a tiny model and tiny local data, against scores computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from moedge import MoEdgeError
from moedge.convert import modeling, tasks
from moedge.convert.tasks import Questions

pytestmark = pytest.mark.usefixtures("no_survey")


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[list[float], list[float], list[int]]:
    """Whether the likeliest choice is right: by log-likelihood, and by log-likelihood over bytes (acc_norm); which."""
    plain, normed, chosen = [], [], []
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
        chosen.append(int(np.argmax(scores)))
        plain.append(float(chosen[-1] == 3))
        normed.append(float(np.argmax([score / len(c) for score, c in zip(scores, choices, strict=True)]) == 3))
    return plain, normed, chosen


@pytest.mark.parametrize("converted", [False, True])
def test_accuracy_is_what_the_log_likelihoods_say(
    converted: bool,
    task_files: dict[str, Path],
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    make_plan: Callable[..., Any],
    moedge_cache: Path,
) -> None:
    model = tiny_llama()
    if converted:
        model = modeling.apply(make_plan(model)[0], model)
    lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer, backend="causal", batch_size=2)
    (score,) = tasks.run(lm, Questions(("sciq",), {"sciq": task_files["sciq"]}))
    questions = [json.loads(line) for line in task_files["sciq"].read_text(encoding="utf-8").splitlines()]
    plain, normed, chosen = by_hand(model, tiny_tokenizer, questions)
    assert (score.questions, score.available, score.shots, score.data) == (8, 8, 0, "sciq.jsonl")
    for name, right in (("acc", plain), ("acc_norm", normed)):
        assert score.metrics[name]["value"] == pytest.approx(np.mean(right))
        # The standard error of a mean: sample deviation over the root of the number of questions.
        assert score.metrics[name]["stderr"] == pytest.approx(np.std(right, ddof=1) / 8**0.5)
    assert score.answers is not None
    assert score.answers.metric == "acc"
    assert list(score.answers.chosen) == chosen
    assert score.answers.right.tolist() == [bool(right) for right in plain]


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["lambada"], {}, "has no packaged data"),
        (["sciq"], {"sciq": Path("missing.jsonl")}, "must be an existing"),
        (["sciq"], {"piqa": Path("piqa.jsonl")}, "--task-data names piqa, which --tasks does not"),
    ],
)
def test_refusals(names: list[str], data: dict[str, Path], sentence: str) -> None:
    with pytest.raises(MoEdgeError, match=sentence):
        tasks.run(object(), Questions(tuple(names), data))  # type: ignore[arg-type]  # refused before it is asked


class Unasked(LM):
    """A model that no question reaches."""

    loglikelihood = loglikelihood_rolling = generate_until = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("content", "more", "sentence"),
    [
        ('{"foo": 1}\n', {}, r"cannot run arc_easy \(data\.jsonl\): 'question' is undefined\. Does each file have its"),
        ("not json\n", {}, r"arc_easy, .*data\.jsonl, cannot be read: JSON parse error"),
        ("", {}, "holds 0 questions, so there is nothing to ask"),
        ('{"question": "a"}\n' * 2, {"shots": 2}, "holds 2 questions, which is too few for 2 shots"),
        ("", {"limit": 0}, "a limit is 1 or more"),
        ("", {"shots": -1}, "shots are 0 or more"),
    ],
)
def test_data_that_does_not_fit_its_task_is_one_sentence(
    content: str, more: dict[str, int], sentence: str, tmp_path: Path, moedge_cache: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(MoEdgeError, match=sentence):
        tasks.run(Unasked(), Questions(("arc_easy",), {"arc_easy": tmp_path / "data.jsonl"}, **more))


def sample(metrics: dict[str, Any], *given: Any, filter: str = "none", doc_id: int = 0) -> dict[str, Any]:
    facts = {"filter": filter, "doc_id": doc_id, "metrics": list(metrics), "filtered_resps": list(given)}
    return {**facts, "doc_hash": str(doc_id), "prompt_hash": "p", **metrics}


def test_the_answer_is_what_the_metric_judges() -> None:
    one, two, three = (-3.0, False), (-1.0, False), (-2.0, True)

    def found(*samples: dict[str, Any]) -> Any:
        answers = tasks._answers(samples)
        return answers and (answers.metric, answers.chosen, answers.right.tolist())

    assert found(sample({"acc_norm": 0.0, "acc": 1.0}, one, two, three)) == ("acc", (1,), [True])
    # Half of the likelihoods are of the choices without the question.
    assert found(sample({"acc": 0.0, "acc_mutual_info": 1.0}, one, three, two, two)) == ("acc", (1,), [False])
    assert found(sample({"perplexity": -1.0, "acc": 1}, three)) == ("acc", (1,), [True])
    assert found(sample({"exact_match": 0.0}, "42")) == ("exact_match", ("42",), [False])
    # Of two filters the first counts; the order is that of the data.
    several = [sample({"acc": i % 2}, one, two, filter=name, doc_id=i) for name in ("b", "a") for i in (1, 0)]
    assert found(*several) == ("acc", (1, 1), [False, True])
    assert found(sample({"bleu": 0.3}, "text")) is None
    assert found(sample({}, "text")) is None


def test_the_questions_have_a_hash() -> None:
    def asked(*ids: int) -> str:
        answers = tasks._answers([sample({"acc": 1}, (-1.0, True), doc_id=i) for i in ids])
        assert answers is not None
        return answers.asked

    assert asked(0, 1) == asked(1, 0) != asked(0, 2)


def test_every_known_task_has_an_asset_and_an_lm_eval_task() -> None:
    import lm_eval.tasks

    from moedge.convert.sources import assets

    folder = Path(lm_eval.tasks.__file__).parent
    for task, path in tasks.KNOWN.items():
        assert assets.find(f"task-{task}").member.endswith(".arrow")
        assert f"task: {task}\n" in (folder / path).read_text(encoding="utf-8")
