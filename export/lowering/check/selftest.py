"""Run a rewritten block beside the block it replaced: no lowering is believed because it loads.

Rewrites keep the names of the values at their edges, so a block is cut out of the graph before and after between the
same names, fed the same random numbers, and run in the target's runtime. Kernels fail silently (docs/node-forms.md 1);
this is where that shows.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import emulation
from moedge.export.graph.build import cut, size, upstream, values_by_name, weights_of
from moedge.export.graph.nodes import attention_kinds
from moedge.export.lowering.check import mistakes
from moedge.export.lowering.check.session import Session, open_part
from moedge.export.quantize.format import Quantized


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
    """What one executed comparison found. ``max_rel_error`` is max |after - before| / max |before|, over all cases.

    ``looks_like`` names the known mistakes that would give what a failed block computed.
    """

    block: str
    cases: int
    max_rel_error: float
    limit: float
    looks_like: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (NaN is not)."""
        return bool(self.max_rel_error <= self.limit)

    def to_json(self) -> dict[str, Any]:
        """Return the entry for the bundle's manifest."""
        entry = {name: value for name, value in asdict(self).items() if name != "looks_like"}
        return {**entry, "passed": self.passed, **({"looks_like": list(self.looks_like)} if self.looks_like else {})}

    def failure(self) -> str:
        """One sentence about a failed block."""
        known = f" It looks like: {' or: '.join(self.looks_like)}." if self.looks_like else ""
        error = f"relative error {self.max_rel_error:.1e}, limit {self.limit:.0e}"
        return f"Self-test of {self.block!r} failed: {error}.{known}"


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


def _feed(value: ir.Value, case: Case, generator: np.random.Generator, vocabulary: int = 1) -> np.ndarray:
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
        return generator.integers(0, vocabulary, shape).astype(value.dtype.numpy())
    return generator.standard_normal(shape).astype(value.dtype.numpy())


@dataclass(frozen=True)
class _Block:
    """One block cut out of two graphs, ready to run."""

    edges: dict[str, ir.Value]
    outputs: list[ir.Value]
    sessions: tuple[Session, Session]
    vocabulary: int

    def feeds(self, case: Case, number: int) -> dict[str, np.ndarray]:
        """Random inputs, the same for both graphs."""
        generator = np.random.default_rng(number)
        return {
            name: _feed(self.edges[name], case, generator, self.vocabulary if name == "input_ids" else 1)
            for name in sorted(self.edges)
        }

    def run(self, feeds: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Outputs before and after."""
        before, after = (session.run(feeds) for session in self.sessions)
        return before, after


def _cut_both(
    before: ir.Model,
    after: ir.Model,
    names: Sequence[str],
    inputs: Sequence[str] | None,
    inside: Collection[str] = (),
) -> _Block:
    known = values_by_name(before)
    outputs_before = [known[name] for name in names]
    routes = {str(value.name) for node in before.graph if node.op_type == "Route" for value in node.outputs}
    now = values_by_name(after)
    outputs_after = [now[name] for name in names]
    borders = set(inputs) if inputs is not None else set(known) - routes - set(inside)
    _, edges = upstream(outputs_after, lambda value: str(value.name) in borders)
    edge_names = {str(value.name) for value in edges}
    _, ends = upstream(outputs_before, lambda value: str(value.name) in edge_names)
    # The rewritten graph's types win: numbers made in half precision are the same numbers in float32.
    everything = {str(value.name): value for value in [*ends, *edges]}

    def edge(value: ir.Value) -> bool:
        return str(value.name) in everything

    if _content(outputs_before, edge) == _content(outputs_after, edge):
        raise MoEdgeError(f"nothing that gives {', '.join(names)} was rewritten; this is a bug, report it.")
    parts = [cut(before, outputs_before, edge), cut(after, outputs_after, edge)]
    # ONNX Runtime's own kernels (ort-cuda) run as they are; standard operators in half precision with every rounding.
    one, two = (
        open_part(replace(part, model=emulation.emulated(part.model)) if emulation.needed(part.model) else part)
        for part in parts
    )
    tables = [n.inputs[0] for n in before.graph if n.op_type == "Gather" and n.inputs[1] is known.get("input_ids")]
    rows = [size(value.const_value, 0) for value in tables if value is not None and value.const_value is not None]
    return _Block(everything, outputs_before, (one, two), rows[0] if rows else 1)


def _content(outputs: Sequence[ir.Value], edge: Callable[[ir.Value], bool]) -> tuple[Any, ...]:
    """What tells one block from another: its nodes, the weights that they read, and the types at its edges."""
    nodes, ends = upstream(outputs, edge)
    protos = [ir.serde.serialize_node(node) for node in nodes]
    for proto in protos:
        for field in ("name", "doc_string", "metadata_props"):
            proto.ClearField(field)
    weights = {name: id(tensor) for name, tensor in weights_of(nodes).items()}
    return [proto.SerializeToString(deterministic=True) for proto in protos], weights, {v.name: v.dtype for v in ends}


def compare(
    block: str,
    before: ir.Model,
    after: ir.Model,
    names: Sequence[str],
    limit: float,
    cases: Sequence[Case] = CASES,
    inside: Collection[str] = (),
    inputs: Sequence[str] | None = None,
) -> SelfTest:
    """Cut the block that computes ``names`` out of both graphs, run both in ONNX Runtime, and compare.

    The block starts at the values called ``inputs``; without them at whatever values both graphs know by name, outputs
    of Route excepted: random numbers are no valid routing, so a block with a router starts at its scores. Values named
    in ``inside`` are no edges either.

    Raises:
        MoEdgeError: the rewritten block does not run at all (the message carries the runtime's own words), or is as it
            was before: a test of it would pass whatever was rewritten elsewhere.
    """
    worst = 0.0
    try:
        both = _cut_both(before, after, names, inputs, inside)
        for number, case in enumerate(cases):
            for value, want, got in zip(both.outputs, *both.run(both.feeds(case, number)), strict=True):
                # Rows of padding tokens are undefined: what they see differs by design and nothing reads them.
                by_token = value.shape is not None and len(value.shape) > 1 and value.shape[1] == "sequence_length"
                if case.padding and not case.past and by_token:
                    want, got = want[:, case.padding :], got[:, case.padding :]
                error = relative_error(got, want)
                worst = error if not error <= worst else worst
    except Exception as error:  # onnxruntime raises its own untyped exceptions
        raise MoEdgeError(f"Self-test of {block} could not run: {error}") from error
    return SelfTest(block, len(cases), worst, limit)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|."""
    want, got = want.astype(np.float64), got.astype(np.float64)
    scale = max(float(np.abs(want).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(got - want).max(initial=0.0)) / scale


def compare_ffn(
    block: str,
    before: ir.Model,
    after: ir.Model,
    routed: str,
    limit: float,
    weights: Sequence[Quantized] | None = None,
) -> SelfTest:
    """Compare one whole converted FFN: router, routed experts and shared expert, from its input to its output.

    When it fails, the numbers are compared with what known mistakes would give (:mod:`mistakes`), and
    ``SelfTest.looks_like`` names those that fit.

    Args:
        routed: name of the output of the layer's SparseGLU in ``before``.
        weights: the quantised gate, up and down of the layer, where ``before`` holds their de-quantised values.
    """
    ffn = mistakes.FFN.find(before, routed)
    test = compare(block, before, after, [ffn.output], limit, inputs=[ffn.x])
    if test.passed:
        return test
    try:
        both = _cut_both(before, after, [ffn.output], [ffn.x])
        feeds = both.feeds(CASES[0], 0)
        names = mistakes.explain(before, ffn, feeds[ffn.x], both.run(feeds)[1][0], weights)
    except Exception as error:  # an explanation must not hide the failure
        names = [f"nothing known ({error})"]
    return replace(test, looks_like=tuple(names))


def compare_product(
    block: str, before: ir.Model, after: ir.Model, output: str, source: str, limit: float, weight: Quantized
) -> SelfTest:
    """Compare one product with, or lookup in, a quantised weight: from value ``source`` to value ``output``.

    Args:
        weight: [N, K]; ``before`` holds its de-quantised values. A failed test is explained by what was done to it.
    """
    test = compare(block, before, after, [output], limit, inputs=[source])
    if test.passed:
        return test
    try:
        both = _cut_both(before, after, [output], [source])
        feeds = both.feeds(CASES[0], 0)
        (want,), (got,) = both.run(feeds)
        names = mistakes.explain_product(feeds[source], want, got, weight)
    except Exception as error:  # an explanation must not hide the failure
        names = [f"nothing known ({error})"]
    return replace(test, looks_like=tuple(names))
