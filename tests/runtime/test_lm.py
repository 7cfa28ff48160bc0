"""An engine answers lm-eval as lm-eval's own Hugging Face model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from moedge import MoEdgeError
from moedge.convert.tasks import Questions
from moedge.runtime.accuracy.ask import ask
from moedge.runtime.accuracy.lm import EngineLM
from moedge.runtime.engines import open_engine
from moedge.runtime.text.tokenizer import open_tokenizer

# Float32 in another order of summation moves a token's log-likelihood by 1.4e-3 at most (configs/tolerances.yaml).
ABS = 1e-3


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lms(checkpoints: dict[str, Path], bundles: dict[str, Path]) -> dict[str, Any]:
    """lm-eval's own of the converted model, and ours over the checkpoint and its bundle."""
    from moedge.convert import modeling

    model, _, tokenizer = modeling.load(checkpoints["moe"])
    found: dict[str, Any] = {"own": HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)}
    for name, folder in (("torch", checkpoints["moe"]), ("ort-cpu", bundles["moe/ort-cpu"])):
        found[name] = EngineLM(open_engine(folder), open_tokenizer(folder), batch_size=3)
    return found


@pytest.mark.parametrize("name", ["torch", "ort-cpu"])
def test_log_likelihoods(name: str, lms: dict[str, Any]) -> None:
    given = requests(
        "loglikelihood",
        ("What is a cat?", " an animal"),
        ("What is a cat?", " a thing that"),
        ("What is a cat?", " a thing thus"),
        ("no space at the end ", "then"),
        ("", "a text without context"),
        ("", "<s>a text that begins with BOS"),
        ("<s>a context that does", " too"),
        ("long " * 60, "cut"),
    )
    want, found = lms["own"].loglikelihood(given), lms[name].loglikelihood(given)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in want], abs=ABS)
    assert [best for _, best in found] == [best for _, best in want]


@pytest.mark.parametrize("name", ["torch", "ort-cpu"])
def test_whole_texts_in_windows(name: str, lms: dict[str, Any]) -> None:
    given = requests("loglikelihood_rolling", ("one short text",), ("a text longer than the model " * 20,))
    want, found = lms["own"].loglikelihood_rolling(given), lms[name].loglikelihood_rolling(given)
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["torch", "ort-cpu"])
def test_generated_answers(name: str, lms: dict[str, Any]) -> None:
    given = requests(
        "generate_until",
        ("The cat", {"until": ["e"], "max_gen_toks": 12}),
        ("A dog and", {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}),
    )
    long = requests("generate_until", ("many words before the question " * 20, {"until": [], "max_gen_toks": 9}))
    for asked in (given, long):
        assert lms[name].generate_until(asked) == lms["own"].generate_until(asked)
    with pytest.raises(MoEdgeError, match="answers may have 5000 tokens"):
        lms[name].generate_until(requests("generate_until", ("The cat", {"max_gen_toks": 5000})))
    with pytest.raises(MoEdgeError, match="samples its answers"):
        lms[name].generate_until(requests("generate_until", ("The cat", {"temperature": 0.7})))


def test_tasks_end_to_end(lms: dict[str, Any], checkpoints: dict[str, Path], task_files: dict[str, Path],
                          moedge_cache: Path) -> None:  # fmt: skip
    from moedge.convert import tasks

    questions = Questions(("sciq", "arc_easy"), task_files, shots=1, limit=6)
    engine = open_engine(checkpoints["moe"])
    seen: list[tuple[int, int]] = []
    found = ask(
        engine, open_tokenizer(checkpoints["moe"]), questions, progress=lambda done, total: seen.append((done, total))
    )
    want = tasks.run(lms["own"], questions)
    assert [json.dumps(score.as_json()) for score in found] == [json.dumps(score.as_json()) for score in want]
    for one, two in zip(found, want, strict=True):
        assert one.answers is not None
        assert two.answers is not None
        assert one.answers.chosen == two.answers.chosen
        assert one.answers.asked == two.answers.asked
    assert seen[-1] == (6 * 4 + 6 * 2,) * 2


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, lms: dict[str, Any]) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "moedge.runtime.accuracy.lm")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MoEdgeError, match="install moedge"):
        ask(lms["torch"]._engine, lms["torch"]._tokenizer, Questions(("sciq",)))
