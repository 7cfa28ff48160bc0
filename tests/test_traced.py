"""``tests/traced.py``: a trace that is reused is the trace that would have been made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from moedge.convert import modeling
from moedge.export.trace import _WithFlatCache, trace
from moedge.tests import traced


@pytest.fixture
def converted(tiny_model: Any, convert_tiny: Any, gathered: Any) -> Callable[[int], Any]:
    """Return a function (seed) -> a model of one layer with experts and thresholds: all kinds of buffers."""

    def make(seed: int) -> Any:
        model = tiny_model("llama", layers=1, seed=seed)
        return modeling.apply(gathered(convert_tiny(model, "cmoe"), model), model)

    return make


def written(model: Any) -> bytes:
    content: bytes = ir.to_proto(trace(model)).SerializeToString(deterministic=True)
    return content


def test_another_model_of_the_form_gets_the_graph_and_its_own_weights(
    converted: Callable[[int], Any], tmp_path: Path, traced_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, exporter, traces = written(converted(1)), torch.onnx.export, []
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **options: traces.append(1) or exporter(*given, **options))
    with traced.reused(tmp_path):
        first, second = written(converted(0)), written(converted(1))
    assert second == want != first
    assert len(traces) == 1


def form(model: Any) -> str:
    return traced.form(_WithFlatCache(model).eval())


def test_what_changes_a_trace_is_another_form(tiny_model: Any, convert_tiny: Any, gathered: Any) -> None:
    def moe(**settings: Any) -> Any:
        model = tiny_model("llama", layers=1)
        return modeling.apply(convert_tiny(model, "cmoe", **settings), model)

    dense, gather = tiny_model("llama", layers=1), tiny_model("llama", layers=1)
    shifted = moe()
    next(part for part in shifted.modules() if hasattr(part, "top_k")).top_k = 2
    models = [
        dense, tiny_model("llama", layers=2), tiny_model("llama", layers=1, width=32), tiny_model("qwen2", layers=1),
        tiny_model("llama", layers=1, tie_word_embeddings=False), tiny_model("llama", layers=1, rope_theta=5e5),
        tiny_model("llama", layers=1, hidden_act="gelu"), tiny_model("llama", layers=1).half(), moe(), moe(active=2),
        shifted, modeling.apply(gathered(convert_tiny(gather, "cmoe"), gather), gather),
        modeling.apply(gathered(convert_tiny(tied := tiny_model("llama", layers=1), "cmoe"), tied, ramp=0.2), tied),
    ]  # fmt: skip
    assert len({form(model) for model in models}) == len(models)
    assert form(tiny_model("llama", layers=1, seed=9)) == form(dense)


def test_what_is_not_known_is_traced_as_always(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(traced._UnknownError, match="_forward_hooks"):
        form(model)
    other = tiny_model("llama", layers=1)
    other.model.layers[0].mlp.act_fn.forward = lambda x: x
    with pytest.raises(traced._UnknownError, match="lambda"):
        form(other)
