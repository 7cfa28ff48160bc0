"""Weight-only quantised matrices for TensorRT for RTX: ``DequantizeLinear`` in front of the product, nothing else.

4 bits: blocks along the inputs of a row share a float16 scale, ``w = q * scale``, q in -8 .. 7. 8 bits: one float16
scale a row. Both are what the builder fuses into the product, so that weights cross memory as integers
(docs/tensorrt.md): blocks of 8-bit weights, and 4-bit weights with one scale a row, build too, but a kernel of their
own then writes the whole float16 matrix to memory first.

Values keep the layout of the float16 matrix that they replace, [N, K] or [K, N]; ``axis`` says where K is. Merged
experts are two-dimensional matrices: gate and up [E*I, H], down [E*I, H] with K = E*I, so a block of down may hold
inputs of two experts that follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph.build import sizes
from moedge.export.graph.weights import Weight
from moedge.export.lowering import capabilities
from moedge.export.quantize.format import Quantized, quantize, quantize_rows, unpack

OPSET = 21
"""The first with blocks and 4-bit integers in DequantizeLinear."""
HALF = 2
"""Bytes of a scale."""
_SUFFIXES = (".float16", ".rows")  # what half.py and experts.py append to the name of a weight


@dataclass(frozen=True)
class MergedDown(Quantized):
    """Down of merged experts as rows [H, E*I]; de-quantised it is [E, H, I] again."""

    experts: int = 1

    def dequantized(self) -> np.ndarray:
        """Return float32 [E, H, I]."""
        rows = super().dequantized()
        return np.ascontiguousarray(rows.reshape(len(rows), self.experts, -1).swapaxes(0, 1))


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix of the lowered graph. ``rows`` holds it as [N, K] (or E of them, [E, I, H]).

    ``axis`` is that of K in the stored array: 1 for [N, K], 0 for [K, N].
    """

    weight: Weight
    rows: Quantized
    axis: int

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return int(self.rows.scales.shape[-1])

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.rows.columns // self.blocks

    def integers(self) -> np.ndarray:
        """The values as int8 in the stored layout."""
        bits, columns = self.rows.bits, self.rows.columns
        q = unpack(self.rows.packed, bits).reshape(-1, columns).astype(np.int16) - 2 ** (bits - 1)
        return np.ascontiguousarray((q if self.axis else q.T).astype(np.int8))

    def scales(self) -> np.ndarray:
        """The scales as float16: [N, K/B] or [K/B, N] like the values; [N] for one a row."""
        scales = self.rows.scales.reshape(-1, self.blocks).astype(np.float16)
        if self.rows.bits == 8:
            return scales.ravel()
        return np.ascontiguousarray(scales if self.axis else scales.T)


def stored_bytes(weight: Weight, bits: int, down: bool) -> int:
    """Bytes of a matrix: values and float16 scales. ``down``: of merged experts."""
    experts = weight.shape[0] if down else 1
    rows, columns = weight.rows // experts, weight.columns * experts
    blocks = 1 if bits == 8 else columns // capabilities.weight_block(columns)
    return rows * (columns * bits // 8 + blocks * HALF)


def quantized(
    weight: Weight, array: np.ndarray, bits: int, method: str, moments: np.ndarray | None, down: bool
) -> Matrix:
    """Quantise one weight.

    Args:
        weight: what the table says of it.
        array: float32 rows [N, K] or [E, N, K].
        bits: 4 or 8.
        method: ``rtn``, or for 4 bits ``gptq``.
        moments: of the inputs, float32 [K, K], or [E, I, I] for the down of experts.
        down: whether it is the down of experts, [E, H, I].

    Raises:
        MoEdgeError: no block divides the inputs, or a value is not finite.
    """
    experts = 1
    if down:
        experts = len(array)
        array = array.swapaxes(0, 1).reshape(array.shape[1], -1)
        if moments is not None and moments.ndim == 3:
            moments = _on_the_diagonal(moments)
    flat = array.reshape(-1, array.shape[-1])
    if bits == 8:
        made = quantize_rows(flat)
    else:
        if reason := capabilities.weights_rtx(columns=flat.shape[1]):
            raise MoEdgeError(f"Cannot quantise {weight.name}: {reason}.")
        made = quantize(flat, bits, method, moments, capabilities.weight_block(flat.shape[1]))
        with np.errstate(over="ignore"):
            half = made.scales.astype(np.float16).astype(np.float32)
        made = Quantized(made.packed, half, None, bits, made.columns)
    if not np.isfinite(made.scales).all():
        raise MoEdgeError(
            f"A scale of {weight.name} does not fit float16 (largest weight {np.abs(flat).max():.3g}); export ort-cpu "
            "or portable, which keep float32."
        )
    if down:
        made = MergedDown(made.packed, made.scales, None, bits, made.columns, experts)
    elif array.ndim == 3:
        shape = array.shape[:2]
        made = Quantized(
            made.packed.reshape(*shape, *made.packed.shape[1:]),
            made.scales.reshape(*shape, -1),
            None,
            bits,
            made.columns,
        )
    return Matrix(weight, made, 0 if down or weight.layout == "KN" else 1)


def _on_the_diagonal(moments: np.ndarray) -> np.ndarray:
    """[E, I, I] -> [E*I, E*I] for the merged hidden units; what two experts have in common is not known."""
    experts, width, _ = moments.shape
    whole = np.zeros((experts, width, experts, width), moments.dtype)
    for number, block in enumerate(moments):
        whole[number, :, number] = block
    return whole.reshape(experts * width, experts * width)


def write(model: ir.Model, matrices: Mapping[str, Matrix]) -> dict[str, list[str]]:
    """Put ``DequantizeLinear`` of stored integers in the place of every float16 weight of ``matrices``, in place.

    Every reader gets a node of its own: a builder that shares one between lookup and product has to keep the matrix.

    Args:
        model: half-precision graph.
        matrices: by the name of the initializer of the portable graph.

    Returns:
        Names of the new nodes' outputs by weight.
    """
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    made: dict[str, list[str]] = {}
    for value in list(model.graph.initializers.values()):
        name = base_name(str(value.name))
        if name not in matrices or value.dtype != ir.DataType.FLOAT16:
            continue
        matrix = matrices[name]
        tensor = f"{matrix.weight.tensor_class}.{name}"
        inputs = _initializers(model, tensor, matrix)
        attributes = {"axis": matrix.axis, "block_size": matrix.block}
        if matrix.rows.bits == 8:
            attributes = {"axis": 1 - matrix.axis}
        for number, use in enumerate(list(value.uses())):
            node = ir.node("DequantizeLinear", inputs, attributes=attributes)
            output = node.outputs[0]
            output.name = f"{tensor}.{number}"
            output.type, output.shape = ir.TensorType(ir.DataType.FLOAT16), value.shape
            model.graph.insert_before(use.node, node)
            use.node.replace_input_with(use.idx, output)
            made.setdefault(name, []).append(str(output.name))
        del model.graph.initializers[str(value.name)]
    return made


def base_name(name: str) -> str:
    """Name of the portable graph's weight from which an initializer of the half-precision graph was made."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _initializers(model: ir.Model, name: str, matrix: Matrix) -> list[ir.Value]:
    """Add values and scales of a matrix; the integers are laid out when they are written, one matrix at a time."""
    shape = (matrix.rows.scales.size // matrix.blocks, matrix.rows.columns)
    dtype = ir.DataType.INT8 if matrix.rows.bits == 8 else ir.DataType.INT4

    def integers() -> ir.TensorProtocol:
        q = matrix.integers()
        return ir.tensor(q if matrix.rows.bits == 8 else q.astype(ml_dtypes.int4), name=f"{name}.q")

    tensors: list[ir.TensorProtocol] = [
        ir.LazyTensor(integers, dtype=dtype, shape=ir.Shape(shape if matrix.axis else shape[::-1]), name=f"{name}.q"),
        ir.tensor(matrix.scales(), name=f"{name}.scales"),
    ]
    made = []
    for tensor in tensors:
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(sizes(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(value)
        made.append(value)
    return made
