"""Where every byte of a quantised graph went: no class of tensors is skipped, stored twice or lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import weights
from moedge.export.lowering.ort import nbits
from moedge.export.manifest import ClassSize
from moedge.export.quantize.format import QUANTISED, account


def account_for(
    before: ir.Model,
    model: ir.Model,
    table: Mapping[str, weights.Weight],
    bits: int,
    *,
    should: Callable[[str], int],
    base_name: Callable[[str], str] = str,
) -> list[ClassSize]:
    """Account for every initializer of a float graph and of the quantised one that was made of it.

    Args:
        before: the float graph.
        model: the quantised graph.
        table: its weights by name.
        bits: of the integers, for the message.
        should: bytes that a weight of a quantised class takes after, by its name in ``before``.
        base_name: name in ``before`` of a float initializer of ``model``.

    Raises:
        MoEdgeError: a class that should be quantised is not, or not as it should be.
    """

    def kept(name: str) -> str:
        if name in table:
            return table[name].tensor_class
        if ".router" in name or name.endswith("selection_bias"):
            return "router"
        if "_threshold" in name:
            return "thresholds"
        return "norms" if "norm" in name else "other"

    rows = []
    for name, value in before.graph.initializers.items():
        assert value.const_value is not None
        size = int(value.const_value.nbytes)
        wanted = should(name) if kept(name) in QUANTISED else size
        rows.append((kept(name), int(value.const_value.size), size, wanted))
    after = [
        (nbits.tensor_class(name) or kept(base_name(name)), int(value.const_value.nbytes))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    ]
    sizes, wrong = account(rows, after)
    if wrong:
        raise MoEdgeError(f"Quantisation to {bits} bits is incomplete: {'; '.join(wrong)}. This is a bug; report it.")
    return sizes
