"""Text that cannot serve is named before any model runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge._files import sha256_file
from moedge.convert import streaming
from moedge.convert.plan import MoEPlan
from moedge.runtime.run import held_out, scores
from moedge.runtime.text.tokenizer import Tokenizer


def test_a_text_of_one_document_is_all_held_out(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a single line is a single document\n", encoding="utf-8")
    with pytest.raises(MoEdgeError, match="no document left to calibrate on"):
        held_out.calibration_text({"spec": str(path), "every": 10})
    path.write_text("first\nsecond\n", encoding="utf-8")
    assert [
        document.text.strip() for document in held_out.calibration_text({"spec": str(path), "every": 10})[0].documents
    ] == ["second"]


def test_one_long_document_is_calibrated_on_whole_where_it_is_measured_nowhere(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "a long document"}\n', encoding="utf-8")
    text, every = held_out.calibration_text({"spec": str(path), "every": 10, "alone": True})
    assert [document.text for document in text.documents] == ["a long document"]
    made = plan(text_sha256=text.sha256, held_out_every=every)
    with pytest.raises(MoEdgeError, match="has seen all of the text"):
        held_out.beside([made], str(path), 10)
    path = tmp_path / "two.txt"
    path.write_text("first\nsecond\n", encoding="utf-8")
    text, every = held_out.calibration_text({"spec": str(path), "every": 10, "alone": True})
    assert ([document.text for document in text.documents], every) == (["second"], 10)


def test_a_folder_that_does_not_exist_is_not_called_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(MoEdgeError, match="does not exist"):
        Tokenizer(tmp_path / "nowhere")


def test_a_name_of_its_own():
    assert held_out.own_name("text", []) == "text"
    assert held_out.own_name("text", ["other", "text"]) == "text (2)"
    assert held_out.own_name("my text", ["my text", "my text (2)"]) == "my text (3)"


def test_evaluate_reads_both_texts_of_one_file_name(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my text.txt").write_text(f"document of {folder}\n", encoding="utf-8")
    found = scores._texts([], scores.Evaluation(texts=[str(tmp_path / folder / "my text.txt") for folder in "ab"]))
    assert [(text.name, text.documents[0].text) for text, _ in found] == [
        ("my text", "document of a"),
        ("my text (2)", "document of b"),
    ]


@pytest.fixture
def text(tmp_path):
    """Forty documents; numbers 0, 10, 20, 30 are held out of everything."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"document {number}" for number in range(40)), encoding="utf-8")
    return path


def plan(**provenance):
    return MoEPlan("cmoe", {}, {}, [], provenance)


def documents(plans, path, every=10):
    return [int(document.id) for document in held_out.beside(plans, str(path), every)[0].documents]


def test_no_model_is_measured_on_what_it_was_made_with(text, tmp_path):
    other = plan(text_sha256="0" * 64)
    calibrated = plan(text_sha256=sha256_file(text))
    pruned = plan(text_sha256="0" * 64, domains=[{"text_sha256": sha256_file(text), "every": 10}])
    trained = plan(text_sha256="0" * 64, finetune={"text_sha256": [sha256_file(text)], "held_out_every": 10})
    twice = plan(finetune={"text_sha256": [], "held_out_every": 10, "before": trained.provenance["finetune"]})
    assert documents([], text) == documents([other], text) == list(range(40))
    for seen in (calibrated, pruned, trained, twice):
        assert documents([seen], text) == [0, 10, 20, 30]
        assert documents([other, seen], text) == [0, 10, 20, 30], "every model of a table sees the same documents"


def test_another_share_than_was_held_out_is_refused(text):
    trained = plan(finetune={"text_sha256": [sha256_file(text)], "held_out_every": 10})
    assert documents([trained], text, every=20) == [0, 20]
    with pytest.raises(
        MoEdgeError, match="every 10th document was held out when the model was made; give --holdout-ev"
    ):
        documents([trained], text, every=5)


def test_the_share_that_calibration_held_out_is_known(text):
    calibrated = plan(text_sha256=sha256_file(text), held_out_every=8)
    assert documents([calibrated], text, every=16) == [0, 16, 32]
    assert "of the calibration text" in held_out.beside([calibrated], str(text), 8)[1]
    with pytest.raises(MoEdgeError, match="every 8th document was held out when the model was made"):
        documents([calibrated], text)  # 10: document 10 was calibrated on
    assert documents([plan(text_sha256=sha256_file(text))], text) == [0, 10, 20, 30]  # an older plan does not say


def test_windows_beyond_the_models_positions_are_refused(tiny_llama):
    held_out.check_window(tiny_llama(), 256, "--window")
    with pytest.raises(MoEdgeError, match="--window 257 is beyond the model's 256 positions"):
        held_out.check_window(tiny_llama(), 257, "--window")


@pytest.mark.parametrize("texts", range(1, 16))
def test_windows_that_are_held_out_are_of_every_text(texts: int) -> None:
    """Five texts that simply take turns would have every fifth window from the last one."""
    parts = [np.full((20, 3), number) for number in range(texts)]
    mixed = held_out.interleaved(parts)[:, 0]
    apart = streaming.held_out(len(mixed))
    for some in (mixed[apart], mixed[~apart]):
        assert set(some) == set(range(texts))
    held = np.bincount(mixed[apart])
    assert held.max() - held.min() <= 1
    for start in range(0, len(mixed), texts):  # every round has all of them
        assert set(mixed[start : start + texts]) == set(range(texts))


def test_several_calibration_texts_share_the_windows_and_take_turns(tmp_path: Path, tiny_tokenizer: Any) -> None:
    paths = [tmp_path / f"{letter}.txt" for letter in "abc"]
    for path in paths:
        path.write_text("\n".join(path.stem * 40 for _ in range(40)), encoding="utf-8")
    entries = {"texts": [{"spec": str(path)} for path in paths], "every": 4}
    ids, facts = held_out.calibration_windows(tiny_tokenizer, entries, 32, 8, bos=False)
    texts = [tiny_tokenizer.decode(window).strip("\n")[0] for window in ids]
    assert "".join(texts) == "abcabcab"
    assert facts["text"] == ", ".join(map(str, paths))
    assert facts["documents"] == 90
    alone, own = held_out.calibration_windows(
        tiny_tokenizer, {**entries, "texts": entries["texts"][1:2]}, 32, 8, bos=False
    )
    assert len(alone) == 8
    assert (own["text"], own["text_sha256"]) == (str(paths[1]), sha256_file(paths[1]))
    assert "calibration_texts" not in own

    # Each of them is known to have been seen, and none of its calibration documents is measured on.
    made = plan(**facts)
    for path in paths:
        kept, words = held_out.beside([made], str(path), 4)
        assert len(kept.documents) == 10
        assert "of the calibration text" in words
    held = [{"spec": str(path), "is": str(path)} for path in paths]
    calibration = {"texts": [{"is": str(paths[0])}, {"is": str(paths[2])}], "every": 4}
    found = held_out.texts({"calibration": calibration, "held_out": held})
    assert [len(text.documents) for text in found] == [10, 40, 10]
