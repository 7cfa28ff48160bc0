"""What known mistakes of MoE lowerings would compute, so that a failed self-test names the one that fits.

Every entry is a mistake that some exporter or kernel has made without an error message (docs/node-forms.md 1). From one
run of the block before the rewrite come its input, scores, routing and shared part; each mistake is then computed in
float64 and compared with what the rewritten block returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph.activations import ACTIVATIONS
from moedge.export.graph.build import array_of, cut, values_by_name
from moedge.export.graph.nodes import compensation_of, h_threshold_of, has_biases, nodes_of
from moedge.export.lowering.check.session import open_part
from moedge.export.quantize.format import Quantized

MATCH = 0.1
"""A mistake explains an output when it leaves less than this share of the error that correct arithmetic leaves."""


@dataclass(frozen=True)
class FFN:
    """One converted FFN in a graph: its SparseGLU node, and the names of its input and output."""

    node: ir.Node
    x: str
    output: str

    @classmethod
    def find(cls, model: ir.Model, routed: str) -> FFN:
        """Find the FFN whose routed part is called ``routed``; the shared part is what is added to it.

        Raises:
            MoEdgeError: the graph has no such SparseGLU.
        """
        for node in nodes_of(model, "SparseGLU"):
            if node.outputs[0].name == routed:
                adds = [use.node for use in node.outputs[0].uses() if use.node.op_type == "Add"]
                output = adds[0].outputs[0] if adds else node.outputs[0]
                x = node.inputs[0]
                assert x is not None
                pad = x.producer()
                if has_biases(node) and pad is not None:
                    x = pad.inputs[0]  # experts with biases read a further input, 1; the router does not
                kept = x.producer() if x is not None else None
                if kept is not None and kept.op_type == "KeepLarge":
                    x = kept.inputs[0]  # the experts read x without its small values, the router all of it
                assert x is not None
                return cls(node, str(x.name), str(output.name))
        raise MoEdgeError(f"The graph has no SparseGLU with output {routed!r}.")


@dataclass(frozen=True)
class _Run:
    """What one run of the block gave and holds: x [T, H], scores [T, E], indices and weights [T, k], shared [T, H]."""

    x: np.ndarray
    scores: np.ndarray
    bias: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    shared: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    compensation: np.ndarray | None
    rule: str
    activation: Callable[[np.ndarray], np.ndarray]
    everything: np.ndarray
    """x before its small values were left out."""
    h_threshold: np.ndarray | None = None
    """[E, I], with the width of its ramps."""
    ramp: float = 0.0
    x_threshold: np.ndarray | None = None
    """[H], with the width of its ramps."""
    x_ramp: float = 0.0

    def output(self) -> np.ndarray:
        """The FFN's output [T, H] by the definition."""
        y = self.shared.copy()
        omitted = np.ones((len(self.x), len(self.gate)))
        np.put_along_axis(omitted, self.indices, 0, 1)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            weight = np.where(self.indices == expert, self.weights, 0).sum(1, keepdims=True)
            h = self.activation(self.x @ gate.T) * (self.x @ up.T)
            if self.h_threshold is not None:
                h = _kept(h, self.h_threshold[expert], self.ramp)
            y += weight * (h @ down.T)
        return y if self.compensation is None else y + omitted @ self.compensation


def _kept(values: np.ndarray, threshold: np.ndarray, ramp: float) -> np.ndarray:
    """Values without the small ones; what lies beyond the thresholds (a column of ones) stays."""
    chosen = values[:, : len(threshold)]
    kept = chosen * np.clip((np.abs(chosen) - threshold) / (threshold * ramp), 0, 1)
    return np.concatenate([kept, values[:, len(threshold) :]], axis=1)


def _softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _transposed(stack: np.ndarray) -> np.ndarray:
    return stack.transpose(0, 2, 1)


def _split_wrongly(run: _Run) -> _Run:
    """Gate and up stacked, read by a kernel that expects row pairs."""
    rows = np.concatenate([run.gate, run.up], axis=1)
    return replace(run, gate=rows[:, 0::2], up=rows[:, 1::2])


Known = Iterator[tuple[str, Callable[[], "_Run | np.ndarray"]]]
"""Mistakes, each with what it gives: a changed run, or the output itself."""


def _known(run: _Run, weights: Sequence[Quantized] | None) -> Known:
    """Each known mistake that changes anything in this block."""
    yield from _of_activation(run)
    yield from _of_parts(run)
    yield from _of_gather(run)
    yield from _of_combination(run)
    yield from _of_selection(run)
    yield from _of_layout(run)
    yield from _of_blocks(run, weights)


def _of_activation(run: _Run) -> Known:
    yield "gate and up are swapped", lambda: replace(run, gate=run.up, up=run.gate)
    yield "gate and up are stacked where the kernel reads row pairs (wrong interleave)", lambda: _split_wrongly(run)
    yield "the activation is dropped", lambda: replace(run, activation=lambda x: x)
    yield "the gate is activated by a bare sigmoid", lambda: replace(run, activation=lambda x: 1 / (1 + np.exp(-x)))


def _of_parts(run: _Run) -> Known:
    if run.shared.any():
        yield "the shared expert is dropped", lambda: replace(run, shared=np.zeros_like(run.shared))
    yield "the routed experts are dropped", lambda: run.shared
    yield "the block returns zeros", lambda: np.zeros_like(run.shared)
    if run.compensation is not None:
        yield "the compensation of unselected experts is dropped", lambda: replace(run, compensation=None)


def _of_gather(run: _Run) -> Known:
    if not np.array_equal(run.x, run.everything):
        yield "the experts read the small inputs too", lambda: replace(run, x=run.everything)
    if run.x_threshold is not None:
        for what, wrong in (
            ("the thresholds of inputs are in another order", run.x_threshold[::-1]),
            ("each input has the threshold of its neighbour", np.roll(run.x_threshold, 1)),
            ("each input has the threshold of its other neighbour", np.roll(run.x_threshold, -1)),
        ):
            yield what, lambda wrong=wrong: replace(run, x=_kept(run.everything, wrong, run.x_ramp))  # type: ignore[misc]
    if run.h_threshold is None:
        return
    yield "the small hidden values are kept", lambda: replace(run, h_threshold=None)
    for what, wrong in (
        ("the thresholds of hidden values are in another order", run.h_threshold[:, ::-1]),
        ("each hidden value has the threshold of its neighbour", np.roll(run.h_threshold, 1, axis=1)),
        ("each hidden value has the threshold of its other neighbour", np.roll(run.h_threshold, -1, axis=1)),
        ("each expert has the thresholds of another", np.roll(run.h_threshold, 1, axis=0)),
    ):
        yield what, lambda wrong=wrong: replace(run, h_threshold=wrong)  # type: ignore[misc]


def _of_combination(run: _Run) -> Known:
    total = run.weights.sum(1, keepdims=True)
    chosen = np.take_along_axis(run.scores, run.indices, 1)
    share = np.take_along_axis(_softmax(run.scores), run.indices, 1)
    if not np.allclose(total, 1):
        yield (
            "the combination weights are renormalised to sum 1 (norm flag ignored, or the factor sum(w) missing)",
            lambda: replace(run, weights=run.weights / total),
        )
        yield "the factor sum(w) is applied twice", lambda: replace(run, weights=run.weights * total)
    yield (
        "the combination weights are the softmax over all experts (missing renormalisation)",
        lambda: replace(run, weights=share),
    )
    yield (
        "the combination weights are the softmax over the selected scores",
        lambda: replace(run, weights=_softmax(chosen)),
    )
    if not np.allclose(run.weights, 1):
        yield "the combination weights are dropped (all 1)", lambda: replace(run, weights=np.ones_like(run.weights))
    if run.rule == "normalised":
        yield (
            "the combination weights are the bare scores (missing renormalisation)",
            lambda: replace(run, weights=chosen),
        )
    if run.rule == "scaled":
        yield "the scale of the router is dropped (1 + softmax)", lambda: replace(run, weights=1 + share)


def _of_selection(run: _Run) -> Known:
    k, experts = run.indices.shape[1], len(run.gate)
    if run.bias.any():
        yield "the selection bias is ignored", lambda: replace(run, indices=_top(run.scores, k))
    for end in (np.arange(k), np.arange(experts - k, experts)):
        everywhere = np.broadcast_to(end, run.indices.shape)
        yield (
            "the same experts run for every token (unselected ones are not hidden)",
            lambda everywhere=everywhere: replace(run, indices=everywhere),  # type: ignore[misc]
        )
    everyone = np.broadcast_to(np.arange(experts), (len(run.x), experts))
    if k < experts:
        yield (
            "every expert runs for every token, with weight 1",
            lambda: replace(run, indices=everyone, weights=np.ones(everyone.shape)),
        )
    yield "the worst experts are selected instead of the best", lambda: replace(run, indices=_top(-run.scores, k))
    if experts > 1:
        yield "the experts are in reverse order", lambda: replace(run, indices=experts - 1 - run.indices)


def _of_layout(run: _Run) -> Known:
    """Weights read as if transposed, where their shape allows it."""
    if run.gate.shape[1] != run.x.shape[1]:
        return
    for names in (("gate",), ("up",), ("down",), ("gate", "up"), ("gate", "up", "down")):
        turned: dict[str, Any] = {name: _transposed(getattr(run, name)) for name in names}
        what = "all expert" if len(names) == 3 else f"the {' and '.join(names)}"
        yield f"{what} weights are transposed", lambda turned=turned: replace(run, **turned)  # type: ignore[misc]


def _of_blocks(run: _Run, weights: Sequence[Quantized] | None) -> Known:
    """Quantised weights that are unpacked wrongly."""
    for names, stacks in _parts(weights):
        for what, wrong in _WRONG_BLOCKS.items():

            def changed(stacks: dict[str, Quantized] = stacks, wrong: _Wrong = wrong) -> _Run:
                arrays: dict[str, Any] = {name: wrong(stack).dequantized() for name, stack in stacks.items()}
                return replace(run, **arrays)

            yield f"{what} ({names})", changed


def _parts(weights: Sequence[Quantized] | None) -> Iterator[tuple[str, dict[str, Quantized]]]:
    if weights is None:
        return
    gate, up, down = weights
    yield "gate, up and down", {"gate": gate, "up": up, "down": down}
    yield "gate and up", {"gate": gate, "up": up}
    yield "down", {"down": down}


_Wrong = Callable[[Quantized], Quantized]


def _swap_nibbles(value: Quantized) -> Quantized:
    return replace(value, packed=(value.packed << 4) | (value.packed >> 4)) if value.bits == 4 else value


def _read_as_unsigned(value: Quantized) -> Quantized:
    """Two's complement read as unsigned: the top bit counts as positive."""
    top = 0x88 if value.bits == 4 else 0x80
    zeros = np.zeros((*value.scales.shape[:-1], -(-value.scales.shape[-1] * value.bits // 8)), np.uint8)
    return replace(value, packed=value.packed ^ np.uint8(top), zero_points=zeros)


def _neighbours_exchanged(value: Quantized) -> Quantized:
    rows = value.packed.shape[-3]
    return replace(value, packed=value.packed[..., np.arange(rows - rows % 2) ^ 1, :, :]) if rows % 2 == 0 else value


def _half_blocks(value: Quantized) -> Quantized:
    """Blocks half as long, and the row of scales twice instead of every scale twice."""
    *outer, blocks, size = value.packed.shape
    if size % 2 or blocks < 2:
        return value
    packed = value.packed.reshape(*outer, 2 * blocks, size // 2)
    return replace(value, packed=packed, scales=np.concatenate([value.scales, value.scales], axis=-1))


def _scales_by_input(value: Quantized) -> Quantized:
    """One scale a row taken for one scale a column; only square matrices hold that."""
    *outer, rows, blocks, size = value.packed.shape
    if blocks != 1 or rows != size or value.bits != 8:
        return value
    scales = np.broadcast_to(value.scales.swapaxes(-1, -2), (*outer, rows, size))
    return replace(value, packed=value.packed.reshape(*outer, rows, size, 1), scales=scales)


_WRONG_BLOCKS: dict[str, _Wrong] = {
    "the sign of the block scales is lost (abs)": lambda q: replace(q, scales=np.abs(q.scales)),
    "the block scales are dropped": lambda q: replace(q, scales=np.ones_like(q.scales)),
    "the nibbles of each byte are swapped": _swap_nibbles,
    "the nibbles of each byte are swapped (values of neighbouring outputs)": _neighbours_exchanged,
    "the zero point is ignored (values taken as unsigned)": lambda q: replace(
        q, zero_points=np.zeros((*q.scales.shape[:-1], -(-q.scales.shape[-1] * q.bits // 8)), np.uint8)
    ),
    "signed values are read as unsigned": _read_as_unsigned,
    "the block scales are transposed": lambda q: replace(
        q, scales=np.ascontiguousarray(q.scales.swapaxes(-1, -2)).reshape(q.scales.shape)
    ),
    "the scales run along the inputs instead of the outputs": _scales_by_input,
    "each block has the scale of the one before it": lambda q: replace(q, scales=np.roll(q.scales, 1, axis=-1)),
    "each row has the scales of the row before it": lambda q: replace(q, scales=np.roll(q.scales, 1, axis=-2)),
    "the block size is wrong (half of it, the scales of a row repeated)": _half_blocks,
}


def explain_product(x: np.ndarray, want: np.ndarray, got: np.ndarray, weight: Quantized) -> list[str]:
    """Name the mistakes with a quantised weight [N, K] that would turn ``want`` into ``got``, the best fit first.

    Args:
        x: float [..., K], what the product read, or int [...], the rows that a lookup took.
        want: [..., N] (a lookup: [..., K]) from the right weight; other terms, such as a bias, cancel.
        got: the same from the rewritten graph.
        weight: the right weight.
    """
    right = weight.dequantized().astype(np.float64)

    def change(wrong: np.ndarray) -> np.ndarray:
        difference = wrong.astype(np.float64) - right
        return difference[x] if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64) @ difference.T

    error = _distance(want.astype(np.float64), got)
    found = []
    with np.errstate(all="ignore"):
        for name, wrong in _WRONG_BLOCKS.items():
            distance = _distance(want + change(wrong(weight).dequantized()), got)
            if distance <= MATCH * error:
                found.append((distance, name))
    best = min((distance for distance, _ in found), default=0.0)
    return [name for distance, name in sorted(found) if distance <= 2 * best + 1e-12] or ["no known mistake"]


def explain(
    before: ir.Model, ffn: FFN, x: np.ndarray, got: np.ndarray, weights: Sequence[Quantized] | None = None
) -> list[str]:
    """Name the known mistakes that would turn ``x`` into ``got``, the best fit first.

    Args:
        before: the graph that is right.
        ffn: the block in it.
        x: float32 [T, H], what the block was fed.
        got: float32 [T, H], what the rewritten block returned.
        weights: quantised gate, up and down, for the mistakes that are made with them.
    """
    run = _observe(before, ffn, x)
    right = _distance(run.output(), got)
    found = []
    with np.errstate(all="ignore"):
        for name, mistake in _known(run, weights):
            result = mistake()
            distance = _distance(result.output() if isinstance(result, _Run) else result, got)
            if distance <= MATCH * right:
                found.append((distance, name))
    best = min((distance for distance, _ in found), default=0.0)
    # Several names for one set of numbers (unit weights: sum(w) missing = flag ignored) are all given.
    return [name for distance, name in sorted(found) if distance <= 2 * best + 1e-12] or ["no known mistake"]


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    value = float(np.sqrt(np.mean((one - two.reshape(one.shape).astype(np.float64)) ** 2)))
    return value if np.isfinite(value) else float("inf")


def _observe(before: ir.Model, ffn: FFN, x: np.ndarray) -> _Run:
    node = ffn.node
    assert node.inputs[1] is not None
    assert node.inputs[2] is not None
    route = node.inputs[1].producer()
    assert route is not None
    assert route.inputs[0] is not None
    scores, indices, weights, routed = route.inputs[0], node.inputs[1], node.inputs[2], node.outputs[0]
    output = values_by_name(before)[ffn.output]
    tokens = node.inputs[0]
    assert tokens is not None
    wanted = [scores, indices, weights, routed, output]
    wanted += [tokens] if tokens.name != ffn.x else []
    part = cut(before, wanted, lambda value: value.name == ffn.x)
    values = [np.asarray(value, np.float64) for value in open_part(part).run({ffn.x: x})]
    score, index, weight, expert, whole, *padded = values
    ones = [(0, 0)] * (x.ndim - 1) + [(0, int(has_biases(node)))]
    everything = np.pad(x, ones, constant_values=1)
    x = padded[0] if padded else x
    gate, up, down = (array_of(node.inputs[position]).astype(np.float64) for position in (3, 4, 5))
    added = compensation_of(node)
    compensation = None if added is None else array_of(added).astype(np.float64)
    limits, keep = h_threshold_of(node), _keep_before(node)
    shared = whole.reshape(expert.shape) - expert if ffn.output != str(routed.name) else np.zeros_like(expert)
    return _Run(
        x.reshape(-1, x.shape[-1]).astype(np.float64), score, array_of(route.inputs[1]).astype(np.float64),
        index.astype(np.int64), weight, shared, gate, up, down, compensation,
        route.attributes["rule"].as_string(), ACTIVATIONS[node.attributes["activation"].as_string()],
        everything.reshape(-1, everything.shape[-1]).astype(np.float64),
        None if limits is None else array_of(limits).astype(np.float64),
        0.0 if limits is None else node.attributes["ramp"].as_float(),
        None if keep is None else array_of(keep.inputs[1]).astype(np.float64),
        0.0 if keep is None else keep.attributes["ramp"].as_float(),
    )  # fmt: skip


def _keep_before(node: ir.Node) -> ir.Node | None:
    """Return the KeepLarge that leaves inputs of a SparseGLU out, if there is one; a column of ones may follow it."""
    for _ in range(2):
        value = node.inputs[0]
        source = value.producer() if value is not None else None
        if source is None or source.op_type == "KeepLarge":
            return source
        node = source
    return None
