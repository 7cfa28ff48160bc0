"""Run a rewritten block beside the block it replaced: no lowering is believed because it loads.

Rewrites keep the names of the values at their edges, so a block is cut out of the graph before and after between the
same names, fed the same random numbers, and run in the target's runtime. Kernels fail silently (peers.md 1, finding 7);
this is where that shows.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.lowering.graph import attention_kinds, cut, upstream, values_by_name


@dataclass(frozen=True)
class Case:
    """Sizes of one run: batch, new tokens, past tokens, and how many positions of row 0 are left padding."""

    batch: int
    new: int
    past: int
    padding: int = 0


# Prefill, one decoded token, a short chunk after a past, and a padded batch in both phases.
CASES = (Case(1, 7, 0), Case(1, 1, 9), Case(1, 3, 4), Case(2, 6, 0, 2), Case(2, 1, 6, 2))


def attention_cases(model: ir.Model) -> list[Case]:
    """Return the usual cases and, for each sliding window, one token and a chunk after a past that is longer."""
    cases = list(CASES)
    for window in sorted({node.attributes["window"].as_int() for node in attention_kinds(model)} - {0}):
        cases += [Case(1, 1, window + 2), Case(1, 3, window), Case(2, 1, window + 3, 2)]
    return cases


@dataclass(frozen=True)
class SelfTest:
    """What one executed comparison found. ``max_rel_error`` is max |after - before| / max |before|, over all cases."""

    block: str
    cases: int
    max_rel_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (NaN is not)."""
        return bool(self.max_rel_error <= self.limit)

    def to_json(self) -> dict[str, Any]:
        """Return the entry for the bundle's manifest."""
        return {**asdict(self), "passed": self.passed}


def _size(expression: str, sizes: dict[str, int]) -> int:
    """Evaluate a symbolic dimension such as ``past_sequence_length + sequence_length`` (names, +, -, *, // only)."""
    operators = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__, ast.FloorDiv: int.__floordiv__}

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        raise MoEdgeError(f"The graph has a dimension {expression!r} that a self-test cannot size.")

    return value(ast.parse(expression, mode="eval").body)


def _feed(value: ir.Value, case: Case, generator: np.random.Generator) -> np.ndarray:
    if value.name == "attention_mask":
        mask = np.ones((case.batch, case.past + case.new), np.int64)
        mask[0, : case.padding] = 0
        return mask
    if value.name == "position_ids":
        mask = np.ones((case.batch, case.past + case.new), np.int64)
        mask[0, : case.padding] = 0
        return np.clip(mask.cumsum(1) - 1, 0, None)[:, case.past :]
    sizes = {
        "batch_size": case.batch,
        "sequence_length": case.new,
        "past_sequence_length": case.past,
        "total_sequence_length": case.past + case.new,
    }
    assert value.shape is not None
    assert value.dtype is not None
    shape = [dim if isinstance(dim, int) else _size(str(dim.value), sizes) for dim in value.shape]
    if value.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return np.zeros(shape, value.dtype.numpy())
    return generator.standard_normal(shape).astype(value.dtype.numpy())


def dtype_of(ort_type: str) -> np.dtype[Any]:
    """Return the numpy dtype of an ONNX Runtime type such as ``tensor(float16)``."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def compare(
    block: str,
    before: ir.Model,
    after: ir.Model,
    names: Sequence[str],
    limit: float,
    cases: Sequence[Case] = CASES,
    inside: Collection[str] = (),
) -> SelfTest:
    """Cut the block that computes ``names`` out of both graphs, run both in ONNX Runtime, and compare.

    The edges of the block are the values that both graphs know by name, outputs of Route excepted: random numbers are
    no valid routing, so a block with a router starts at its scores. Values named in ``inside`` are no edges either.

    Raises:
        MoEdgeError: the rewritten block does not run at all (the message carries the runtime's own words).
    """
    import onnxruntime

    known = values_by_name(before)
    outputs_before = [known[name] for name in names]
    routes = {str(value.name) for node in before.graph if node.op_type == "Route" for value in node.outputs}
    routes |= set(inside)
    now = values_by_name(after)
    outputs_after = [now[name] for name in names]
    _, edges = upstream(outputs_after, lambda value: str(value.name) in known and str(value.name) not in routes)
    edge_names = {str(value.name) for value in edges}
    _, ends = upstream(outputs_before, lambda value: str(value.name) in edge_names)
    # The rewritten graph's types win: numbers made in half precision are the same numbers in float32.
    everything = {str(value.name): value for value in [*ends, *edges]}
    parts = [
        cut(before, outputs_before, lambda value: str(value.name) in everything),
        cut(after, outputs_after, lambda value: str(value.name) in everything),
    ]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    worst = 0.0
    try:
        sessions = [
            onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
            for part in parts
        ]
        for number, case in enumerate(cases):
            generator = np.random.default_rng(number)
            feeds = {name: _feed(everything[name], case, generator) for name in sorted(everything)}
            results = [
                session.run(None, {i.name: feeds[i.name].astype(dtype_of(i.type)) for i in session.get_inputs()})
                for session in sessions
            ]
            for value, want, got in zip(outputs_before, *results, strict=True):
                # Rows of padding tokens are undefined: what they see differs by design and nothing reads them.
                by_token = value.shape is not None and len(value.shape) > 1 and value.shape[1] == "sequence_length"
                if case.padding and not case.past and by_token:
                    want, got = want[:, case.padding :], got[:, case.padding :]
                want, got = want.astype(np.float64), got.astype(np.float64)
                scale = max(float(np.abs(want).max(initial=0.0)), float(np.finfo(np.float32).tiny))
                error = float(np.abs(got - want).max(initial=0.0)) / scale
                worst = error if not error <= worst else worst
    except Exception as error:  # onnxruntime raises its own untyped exceptions
        raise MoEdgeError(f"Self-test of {block} could not run: {error}") from error
    return SelfTest(block, len(cases), worst, limit)
