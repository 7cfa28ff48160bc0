"""Targets ``ort-cpu-int8`` and ``ort-cpu-int4``: ONNX Runtime's CPU kernels on block-quantised weights.

Norms and attention are rewritten as for ``ort-cpu``; then experts -> RoutedGLU of our own or QMoE (:func:`_form`),
every other matrix -> MatMulNBits, the embedding -> GatherBlockQuantized, all in one block format
(``export/quantize/format.py``). The router stays in float32:
a flipped expert costs more than a few kilobytes.

Two errors are kept apart. Kernel error: the rewritten block against the same block in float32 on the *de-quantised*
weights, once with float32 activations (layout and arithmetic, 2e-6) and once as it will run, with int8 activations.
Quantisation error: the block on de-quantised weights against the block on the original ones; it is reported, not
judged, because it is a property of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph import weights
from moedge.export.graph.build import remove_unused, size
from moedge.export.graph.nodes import layer_of, nodes_of, routed_directly
from moedge.export.lowering import Lowered, Rewrite, capabilities, gather
from moedge.export.lowering.accounting import account_for
from moedge.export.lowering.check import mistakes, selftest
from moedge.export.lowering.ort import cpu as ort_cpu
from moedge.export.lowering.ort import matmul as ort_matmul
from moedge.export.lowering.ort import nbits as ort_nbits
from moedge.export.lowering.ort import products as ort_products
from moedge.export.lowering.ort import qmoe as ort_qmoe
from moedge.export.lowering.ort.gathered import FuseGather, gathered_weights
from moedge.export.lowering.ort.gathered import stored_bytes as own_bytes
from moedge.export.lowering.ort.nbits import QuantizeProducts
from moedge.export.lowering.ort.products import ExpertProducts
from moedge.export.lowering.ort.qmoe import FuseQMoE
from moedge.export.lowering.ort.routed import FuseRouted, stack_weights
from moedge.export.lowering.ort.tied import LookUpColumns, held
from moedge.export.lowering.rule import Applied, Block, Rule, Work
from moedge.export.manifest import PackedPlace, Place, Quantization, Rows, RowsPlace, StackPlace
from moedge.export.ort_ops import library, pack
from moedge.export.quantize.format import BLOCK, QUANTISED, Quantized, quantize, stored_bytes

INT8_LIMIT = 4e-2
"""Largest relative error of a block that runs with int8 activations. A block of 32 is rounded in steps of max|x| / 127,
an error of max|x| / (127 * sqrt(12)) per element. For normal x, max|x| of 32 is about 2.1 standard deviations: 0.5 % of
each product's input. An FFN has three such inputs in a chain and SiLU's slope: about 1.2 % (measured 1.0 to 1.6 % of
the largest output, H 32 to 576). Two and a half times that; every known mistake gives more than 10 %.
Behind thresholds of hidden values errors grow (:func:`moedge.export.lowering.gather.growth`); such experts are judged
with float32 activations too."""


def lower(
    model: ir.Model,
    *,
    max_length: int,
    bits: int,
    method: str = "rtn",
    moments: Mapping[str, np.ndarray] | None = None,
) -> Lowered:
    """Rewrite ``model`` in place for ONNX Runtime's CPU provider with weights of ``bits`` bits.

    Args:
        moments: of the inputs by weight, for method ``gptq``; a weight without (the embedding) is rounded to the
            nearest.

    Raises:
        MoEdgeError: the model cannot be quantised (the message says why), a block does not compute what it replaced,
            or a tensor class that should be quantised is not.
    """
    target = f"ort-cpu-int{bits}"
    _check(model, target)
    work = Work(model, ort_cpu.block_limit(model), "Use --target ort-cpu and report the runtime version.")
    blocks = _Blocks.of(work.before, bits, method, moments or {})
    if method == "rtn-asymmetric" and FuseQMoE({}).refuse(model) is None:
        _check_zero_points(blocks.table, target)
    routed, gather = FuseRouted(blocks.packed), FuseGather(blocks.packed, class_of=blocks.class_of)
    experts = _form(work, routed, FuseQMoE(blocks.packed))
    if experts is routed:
        blocks.round_scales(stack_weights(model))
    if gather.refuse(model) is None:
        blocks.round_scales(gathered_weights(model))
    cache = ort_cpu.norms_and_attention(work, max_length)
    pending = _started(work, blocks, experts, gather)
    own = routed.stored | gather.stored
    # A table that our operators multiply by (a tied output projection), and that is looked up in, is stored twice.
    twice = {name for name in own if blocks.class_of(name) == "embedding" and not held(own[name], bits)}
    pending += [(rule, work.start(rule)) for rule in blocks.products(own.keys() - twice)]
    padded = isinstance(experts, FuseQMoE)
    wide = {own[name].tensor for name in own if not pack.fits_half(blocks.packed[name])}
    should = _stored(work.before, blocks.table, bits, method, padded=padded, own=own, twice=twice, wide=wide)
    sizes = account_for(work.before, model, blocks.table, bits, should=should)
    merged = len(ort_matmul.merge_siblings(model))
    remove_unused(model)
    judge = _Judge(work, blocks.packed, blocks.table, exact_experts=bits == 4 or isinstance(experts, ExpertProducts))
    for rule, done in pending:
        work.finish(rule, done, judge)
    if merged:
        work.rewrites.append(Rewrite("products of the router -> one MatMul + Split", merged, "applied"))
    limits = ort_cpu.limits(cache)
    if work.taps and isinstance(experts, FuseQMoE):
        limits.append("equal router scores go to the higher expert index, in PyTorch to the lower (QMoE)")
    tensors = _where(model, blocks.chosen, work.before, own)
    quantization = Quantization(bits=bits, block=BLOCK, method=method, classes=sizes, tensors=tensors)
    return Lowered(work.rewrites, work.taps, cache, limits, quantization)


@dataclass(frozen=True)
class _Blocks:
    """The weights of a graph, quantised in blocks."""

    bits: int
    table: dict[str, weights.Weight]
    """Every weight of the float graph, by name."""
    chosen: dict[str, weights.Weight]
    """Those that are quantised."""
    packed: dict[str, Quantized]
    """The rules of a lowering hold it too, and read it when they are applied."""

    @classmethod
    def of(cls, graph: ir.Model, bits: int, method: str, moments: Mapping[str, np.ndarray]) -> _Blocks:
        """Quantise the weights of a float graph; ``moments`` as in :func:`lower`."""
        table = weights.collect(graph)
        chosen = {name: weight for name, weight in table.items() if weight.tensor_class in QUANTISED}
        values = graph.graph.initializers
        packed = {
            name: quantize(weights.array(values[name], weight), bits, method, moments.get(name))
            for name, weight in chosen.items()
        }
        return cls(bits, table, chosen, packed)

    def class_of(self, name: str) -> str:
        """Tensor class of a quantised weight."""
        return self.chosen[name].tensor_class

    def round_scales(self, names: Iterable[str]) -> None:
        """Round the scales of some weights to what our own operators store, float16 where that loses nothing."""
        self.packed.update({name: pack.round_scales(self.packed[name]) for name in names})

    def experts(self) -> dict[str, Quantized]:
        """Each expert of the stacks, by the name of its matrix in ``products.py``."""
        return {
            ort_products.matrix_name(name, expert): self.packed[name].expert(expert)
            for name, weight in self.chosen.items()
            if weight.tensor_class == "experts"
            for expert in range(len(self.packed[name].packed))
        }

    def products(self, done: Set[str]) -> list[QuantizeProducts]:
        """One rule for each class of matrices that are not ``done``; experts have one of their own."""
        classes: dict[str, dict[str, Quantized]] = {"embedding": {}}
        for name, weight in self.chosen.items():
            if name not in done:
                classes.setdefault(weight.tensor_class, {})[name] = self.packed[name]
        return [QuantizeProducts(each, found) for each, found in classes.items() if found and each != "experts"]


def _started(
    work: Work, blocks: _Blocks, experts: FuseRouted | FuseQMoE | ExpertProducts | None, gather: FuseGather
) -> list[tuple[Rule, Applied | str]]:
    """Apply the rules for experts and for what leaves values out; what each did is judged when all are applied."""
    found: list[tuple[Rule, Applied | str]] = []
    if experts is not None:
        found.append((experts, work.start(experts)))
        if isinstance(experts, ExpertProducts):  # inside of an FFN, which is tested whole
            QuantizeProducts("experts", blocks.experts()).apply(work.model)
    if nodes_of(work.model, "KeepLarge"):
        found.append((gather, work.start(gather)))
    columns = LookUpColumns(gather.stored, blocks.bits)
    if columns.refuse(work.model) is None:
        found.append((columns, work.start(columns)))
    return found


def _form(work: Work, routed: FuseRouted, qmoe: FuseQMoE) -> FuseRouted | FuseQMoE | ExpertProducts | None:
    """Return the first rule for experts that is not refused, and record those that are; None without experts."""
    if not nodes_of(work.model, "SparseGLU"):
        return None
    for rule in (routed, qmoe):
        reason = rule.refuse(work.model)
        if reason is None:
            return rule
        work.rewrites.append(Rewrite(rule.name, 0, "refused", reason))
    return ExpertProducts()


def _check_zero_points(table: Mapping[str, weights.Weight], target: str) -> None:
    narrow = min((weight.columns for weight in table.values() if weight.tensor_class == "experts"), default=2 * BLOCK)
    if narrow <= BLOCK:
        raise MoEdgeError(
            f"Cannot lower for {target}: experts of {narrow} neurons are one block, whose zero points QMoE reads in "
            "another layout; use symmetric blocks (rtn)."
        )


OLDEST_ORT = (1, 31)
"""QMoE with ``router_weights`` and ``accuracy_level``: 1.23 refuses the first, 1.27 the second (docs/node-forms.md)."""


def refusal(*, dtypes: set[str], hidden_sizes: set[int]) -> str | None:
    """Say why block-quantised weights (``MatMulNBits``, ``QMoE``, blocks of 32) cannot be used, or None.

    Args:
        dtypes: dtypes of the float weights.
        hidden_sizes: H of the layers with experts.
    """
    installed = capabilities.onnxruntime_version()
    if installed is not None and installed < OLDEST_ORT:
        oldest, found = (".".join(map(str, version)) for version in (OLDEST_ORT, installed))
        return f"quantised experts need onnxruntime {oldest}, this is {found}; pip install -U onnxruntime"
    if dtypes - {"FLOAT"}:
        return f"weights are quantised from float32, the model holds {', '.join(sorted(dtypes)).lower()}"
    if odd := sorted(size for size in hidden_sizes if size % 32):
        return f"the hidden size {odd[0]} is not a multiple of the block of 32, which the QMoE kernel needs [R]"
    return None


def _check(model: ir.Model, target: str) -> None:
    """Refuse what the kernels cannot hold."""
    experts = nodes_of(model, "SparseGLU")
    if not all(map(routed_directly, experts)):
        raise MoEdgeError(f"Cannot lower experts inside experts for {target}; export a hierarchical model to ort-cpu.")
    dtypes = {value.dtype for value in model.graph.initializers.values() if value.dtype}
    floats = {dtype.name for dtype in dtypes if dtype.is_floating_point()}
    hidden_sizes = {size(node.inputs[5], 1) for node in experts}
    if reason := capabilities.runtime() or refusal(dtypes=floats, hidden_sizes=hidden_sizes):
        raise MoEdgeError(f"Cannot lower for {target}: {reason}.")


def dequantized_graph(model: ir.Model, packed: dict[str, Quantized], table: dict[str, weights.Weight]) -> ir.Model:
    """Return a copy of a float graph with the de-quantised values of ``packed``, made when they are read."""
    copy = model.clone()
    weights.set_dequantized(copy, packed, table)
    return copy


class _Judge:
    """Executes a block three times: kernel error with float32 activations and as it runs, and quantisation error."""

    def __init__(
        self, work: Work, packed: dict[str, Quantized], table: dict[str, weights.Weight], *, exact_experts: bool
    ) -> None:
        self._work, self._packed, self._exact_experts = work, packed, exact_experts
        self._reference = dequantized_graph(work.before, packed, table)
        self._exact = ort_nbits.with_accuracy(work.model, 0)
        # Operators of our own round activations to int8 in any case: no shared block can then be judged in float32.
        self._rounds = any(node.domain == library.DOMAIN for node in work.model.graph)

    def __call__(self, name: str, done: Applied) -> dict[str, Any]:
        """Return the manifest's entry.

        Raises:
            MoEdgeError: kernel error above its limit.
        """
        work, found = self._work, dict[str, list[selftest.SelfTest]](exact=[], int8=[], quantisation=[])
        label = name.rpartition("-> ")[2] if any(block.ffn for block in done.blocks) else name
        for block in done.blocks:
            growth = gather.growth(work.before) if block.ffn else block.growth
            for kind, one, two, limit in (
                ("exact", self._reference, self._exact, work.limit),
                ("int8", self._reference, work.model, INT8_LIMIT * growth),
                ("quantisation", work.before, self._reference, float("inf")),
            ):
                # 8-bit experts have no kernel with float32 activations (docs/quantization.md); products have.
                if kind == "exact" and (done.rounds or (block.ffn and not self._exact_experts)):
                    continue
                test = self._compared(label, block, one, two, limit, experts_alone=kind == "exact" and self._rounds)
                if not test.passed:
                    raise MoEdgeError(f"{test.failure()} {work.advice}")
                found[kind].append(test)
        int8 = max(found["int8"], key=lambda test: test.max_rel_error)
        entry = {**int8.to_json(), "quantisation_error": max(test.max_rel_error for test in found["quantisation"])}
        if found["exact"]:
            entry["float32_activations"] = max(test.max_rel_error for test in found["exact"])
        return entry

    def _compared(
        self, name: str, block: Block, one: ir.Model, two: ir.Model, limit: float, *, experts_alone: bool
    ) -> selftest.SelfTest:
        """``experts_alone``: of a whole FFN only what its experts give, without the shared block."""
        if not block.ffn:
            return selftest.compare(name, one, two, block.outputs, limit, inputs=block.inputs)
        routed = block.outputs[0]
        if experts_alone:
            x = mistakes.FFN.find(self._work.before, routed).x
            return selftest.compare(name, one, two, [routed], limit, inputs=[x])
        node = mistakes.FFN.find(self._work.before, routed).node
        stacks = [self._packed[str(value.name)] for value in node.inputs[3:6] if value is not None]
        return selftest.compare_ffn(name, one, two, routed, limit, stacks)


def _stored(
    model: ir.Model,
    table: Mapping[str, weights.Weight],
    bits: int,
    method: str,
    *,
    padded: bool,
    own: Mapping[str, PackedPlace],
    twice: Set[str],
    wide: Set[str],
) -> Callable[[str], int]:
    """Return the bytes that a weight of ``model`` takes in blocks.

    Args:
        padded: experts are as wide as QMoE needs.
        own: weights in the layout of our own operators. twice: those of them that are also stored as others are.
        wide: tensors of ours with float32 scales.
    """

    def should(name: str) -> int:
        weight = table[name]
        if name in own:
            again = stored_bytes(weight.rows, weight.columns, bits, method) if name in twice else 0
            return own_bytes(own[name], weight, bits, half_scales=own[name].tensor not in wide) + again
        # QMoE's expert widths are padded to whole blocks: rows of gate and up, inputs of down.
        grown = padded and _is_gate_or_up(model, name)
        extra = ort_qmoe.padded_width(weight.shape[1]) / weight.shape[1] if grown else 1
        return stored_bytes(round(weight.rows * extra), weight.columns, bits, method)

    return should


def _is_gate_or_up(model: ir.Model, name: str) -> bool:
    value = model.graph.initializers[name]
    return any(use.node.op_type == "SparseGLU" and use.idx in (3, 4) for use in value.uses())


def _where(
    model: ir.Model, chosen: dict[str, weights.Weight], before: ir.Model, own: Mapping[str, PackedPlace]
) -> dict[str, Place]:
    """Say for each weight of the portable graph where its quantised rows lie, so that a reader can de-quantise it."""
    made = [name.removesuffix(".q") for name in model.graph.initializers if name.endswith(".q")]
    places: dict[str, Place] = dict(own)
    stacks: dict[str, StackPlace] = {}
    divided = {  # matrix of one expert -> its stack
        ort_products.matrix_name(name, expert): name
        for name, weight in chosen.items()
        if weight.layout == "ENK"
        for expert in range(weight.shape[0])
    }
    for tensor in made:
        rest = tensor.split(".", 1)[1]
        row = 0
        for name in rest.split("+"):
            if name in divided:
                experts = chosen[divided[name]]
                rows = experts.shape[1]
                new = StackPlace(layout="ENK", columns=experts.columns, experts=[])
                stack = places[experts.name] = stacks.setdefault(experts.name, new)
                stack.experts.append(Rows(tensor=tensor, rows=(row, row + rows)))
                row += rows
            elif name in chosen and name not in own:
                weight = chosen[name]
                places[name] = RowsPlace(
                    tensor=tensor, rows=(row, row + weight.rows), layout=weight.layout, columns=weight.columns
                )
                row += weight.rows
    for node in nodes_of(before, "SparseGLU"):
        layer = layer_of(node)
        if str(getattr(node.inputs[3], "name", "")) in places:
            continue
        for part, value in zip(("gate", "up", "down"), node.inputs[3:6], strict=True):
            assert value is not None
            shape = chosen[str(value.name)].shape
            tensor = f"experts.layers.{layer}.{'down' if part == 'down' else 'gate_up'}"
            places[str(value.name)] = RowsPlace(
                tensor=tensor, part=part, layout="ENK", rows=(0, shape[1]), columns=shape[2]
            )
    if missing := set(chosen) - set(places):
        name = sorted(missing)[0]
        raise MoEdgeError(f"{name} was quantised but is not in the lowered graph. This is a bug; report it.")
    return places
