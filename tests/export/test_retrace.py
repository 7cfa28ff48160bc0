"""The exporter's second trace is spared where it changes nothing, and made everywhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import ExportedProgram

from moedge.export import retrace, trace

X = torch.linspace(-2, 2, 24).reshape(2, 3, 4)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.fixture
def second_traces(monkeypatch: pytest.MonkeyPatch, traced_anew: None) -> Iterator[list[ExportedProgram]]:
    """Programs that were traced again."""
    made: list[ExportedProgram] = []
    again = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *args: Any, **options: Any) -> ExportedProgram:
        made.append(program)
        return again(program, *args, **options)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    yield made
    assert ExportedProgram.run_decompositions is counted  # put back by everything that changed it


def exported(function: Callable[[torch.Tensor], Any], spared: bool = True) -> ir.Model:
    with trace._quiet(), retrace.spared() if spared else nullcontext():
        return torch.onnx.export(Function(function), (X,), dynamo=True, verbose=False, optimize=False).model


def close(model: ir.Model, function: Callable[[torch.Tensor], Any]) -> bool:
    (got,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {model.graph.inputs[0].name: X.numpy()})
    want = function(X).numpy()
    return got.dtype == want.dtype and np.allclose(got, want, atol=1e-6)


def plain(x: torch.Tensor) -> torch.Tensor:
    """What a decoder does: products, shapes, types that change, and types that were so before."""
    wide = x.to(torch.float64).reshape(6, 4).to("cpu")
    same = nn.functional.dropout(wide, 0.5, training=False).type_as(wide)
    return (wide * same.to(torch.float64)).to(torch.float32).reshape(8, 3).transpose(0, 1) + 1.5


def test_shapes_and_types_need_no_second_trace(second_traces: list[ExportedProgram]) -> None:
    once = exported(plain)
    assert not second_traces
    twice = exported(plain, spared=False)
    assert len(second_traces) == 1
    assert close(once, plain)
    kinds = [Counter(node.op_type for node in model.graph) - Counter(Identity=9, CastLike=9) for model in (once, twice)]
    assert kinds[0] == kinds[1]
    assert kinds[0]["Cast"] == 2


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.add_(1)
    return y


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: torch.special.xlog1py(x, x + 3), id="an operator to take apart"),
        pytest.param(lambda x: x.transpose(1, 2).reshape(6, 4), id="rows that lie elsewhere"),
        pytest.param(in_place, id="an input that is changed"),
        pytest.param(lambda x: x.to(torch.float64), id="a cast that is returned"),
        pytest.param(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), id="a constant"),
    ],
)
def test_all_else_is_traced_again(
    function: Callable[[torch.Tensor], Any], second_traces: list[ExportedProgram]
) -> None:
    assert close(exported(function), function)
    assert len(second_traces) == 1


def test_an_error_inside_leaves_torch_as_it_was(second_traces: list[ExportedProgram]) -> None:
    with pytest.raises(ZeroDivisionError), retrace.spared():
        raise ZeroDivisionError
    assert not second_traces
