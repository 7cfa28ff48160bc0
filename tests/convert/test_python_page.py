"""docs/python.md is one program, and it does what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moedge

PAGE = Path(moedge.__file__).parent / "docs" / "python.md"


def test_the_page_runs_as_it_stands(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    tiny_llama().save_pretrained(tmp_path / "my-llama")
    tiny_tokenizer.save_pretrained(tmp_path / "my-llama")
    (tmp_path / "my-text.txt").write_text("\n".join(f"Line {n} of a small text." for n in range(60)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
    assert names["cmoe"].sha256 in capsys.readouterr().out
    assert names["cmoe"].differs_from_dense() is None
    assert names["plan"].differs_from_dense() == "down projections are refitted"
    assert names["model"].dtype == torch.bfloat16
    assert names["ffn"].last_routes.shape == (names["batch"]["input_ids"].numel(), 6)
    assert len(names["result"].ids) <= 8
