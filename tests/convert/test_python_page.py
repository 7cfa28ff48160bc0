"""docs/python.md is one program, and it does what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moedge
from moedge.runtime.bench import latency

PAGE = Path(moedge.__file__).parent / "docs" / "python.md"
LIMITS = PAGE.with_name("tolerances.md")


def test_the_page_runs_as_it_stands(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    tiny_llama().save_pretrained(tmp_path / "my-llama")
    tiny_tokenizer.save_pretrained(tmp_path / "my-llama")
    (tmp_path / "my-text.txt").write_text("\n".join(f"Line {n} of a small text." for n in range(300)), encoding="utf-8")
    (limits,) = re.findall(r"```yaml\n(# my-limits.*?)```", LIMITS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my-limits.yaml").write_text(limits, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # In a process of its own for each engine, which tests/runtime/test_bench.py measures.
    monkeypatch.setattr(latency, "footprint", lambda *_: {"peak_rss_mib": None, "load_s": None, "reason": "a test"})
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
    assert names["plan"].sha256 in capsys.readouterr().out
    assert names["plan"].differs_from_dense() == "down projections are refitted"
    assert names["model"].dtype == torch.bfloat16
    assert len(names["result"].ids) <= 8
    assert [row["model"] for row in names["scores"]["rows"]] == ["./my-llama", "build/moe"]
    assert names["verdict"]["tolerances"]["profiles"]["float32/ort-cpu"]["mean_kl"] == 1e-8
    limits = {check["name"]: check["limit"] for check in names["verdict"]["parity"][0]["verdict"]["checks"]}
    assert 1e-8 in limits.values()
    assert [row["label"] for row in names["times"]["points"][0]["rows"]] == ["dense", "moe"]


def test_the_page_names_the_whole_api() -> None:
    text = PAGE.read_text(encoding="utf-8")
    public = [name for name in moedge.__all__ if not name.startswith("__")]
    assert [name for name in public if f"`{name}`" not in text] == []
    used = set(re.findall(r"\bmoedge\.(\w+)\(", text)) | {"MoEPlan", "MoEdgeError"}
    assert used == set(public)
