"""Text that cannot serve is named before any model runs."""

import pytest

from moedge import MoEdgeError
from moedge.runtime import held_out
from moedge.runtime.text import Tokenizer


def test_a_text_of_one_document_is_all_held_out(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a single line is a single document\n", encoding="utf-8")
    with pytest.raises(MoEdgeError, match="no document left to calibrate on"):
        held_out.calibration_text({"spec": str(path), "every": 10})
    path.write_text("first\nsecond\n", encoding="utf-8")
    assert [
        document.text.strip() for document in held_out.calibration_text({"spec": str(path), "every": 10}).documents
    ] == ["second"]


def test_a_folder_that_does_not_exist_is_not_called_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(MoEdgeError, match="does not exist"):
        Tokenizer(tmp_path / "nowhere")
