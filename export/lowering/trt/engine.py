"""Targets ``tensorrt`` and ``tensorrt-rtx``: one strongly typed half-precision graph with a concatenated KV cache.

Rewrites, in order: attention with one mask for the graph, products of kept values and experts in the form that the
device's TensorRT can take (``experts.choose``: plugins from 10.9 on), half-precision types. One layer of each kind
is executed in ONNX Runtime's CPU provider beside the float32 block it replaced: that proves the graph, not the engine,
which only its device can run (``verify.py`` in the bundle, or ``moedge verify``). Plugins are executed there as their
function bodies.

``tensorrt`` stays at opset 18, which every parser since TensorRT 8.6 reads (JetPack 6 has 10.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.functions import DOMAIN
from moedge.export.graph import half
from moedge.export.graph.build import remove_unused
from moedge.export.graph.nodes import layer_of, nodes_of, routed_directly
from moedge.export.lowering import Lowered, Rewrite, capabilities, gather
from moedge.export.lowering.check import selftest
from moedge.export.lowering.rule import Applied, Rule, Work
from moedge.export.lowering.trt import attention as trt_attention
from moedge.export.lowering.trt import experts as trt_experts
from moedge.export.lowering.trt import native as trt_native
from moedge.export.lowering.trt import plugins as trt_plugins
from moedge.export.lowering.trt.attention import RewriteAttention, TurnRotary
from moedge.export.lowering.trt.experts import RewriteExperts
from moedge.export.lowering.trt.gathered import GatherProducts
from moedge.export.manifest import CacheFacts, Kernel, Plugins, Tap
from moedge.runtime.device.moedge_plugins import OLDEST

NEWEST = "11.0"
"""What a bundle that names no device is for."""
ROUNDINGS = 16
"""No path through an attention or an FFN block rounds more often (weights and input included)."""
HALF_LIMIT = ROUNDINGS * half.UNIT["float16"]
"""Limit of a block's relative error in float16; see :func:`block_limit`."""


def block_limit(dtype: str) -> float:
    """Limit of a block's relative error: as many roundings as a path through it can have, one after the other."""
    return ROUNDINGS * half.UNIT[dtype]


def lower(
    model: ir.Model, *, max_length: int, tensorrt: str = NEWEST, experts: str | None = None, dtype: str = "float16"
) -> Lowered:
    """Rewrite ``model`` in place for TensorRT; ``tensorrt`` is the version on the device. See :func:`lower_half`."""
    return lower_half(
        model, max_length=max_length, attention="products", tensorrt=tensorrt, experts=experts, dtype=dtype
    )


def lower_half(
    model: ir.Model,
    *,
    max_length: int,
    attention: trt_attention.Form,
    tensorrt: str | None = None,
    experts: str | None = None,
    dtype: str = "float16",
) -> Lowered:
    """Rewrite a portable float32 graph in place.

    Args:
        model: the graph.
        max_length: longest sequence.
        attention: form of attention and rotary embedding.
        tensorrt: version of TensorRT on the device, None for TensorRT for RTX.
        experts: form of the experts; by default the best that is possible, see ``experts.choose``.
        dtype: ``float16``, or ``bfloat16``: the range of float32 with 8 bits of significand instead of 11.

    Raises:
        MoEdgeError: another ``dtype``, the weights are not float32, no runtime is here to execute the self-tests, or
            one of them fails.
    """
    _check(model, dtype)
    sparse, taps = nodes_of(model, "SparseGLU"), _taps(model)
    form, why = trt_experts.choose(model, tensorrt, experts)
    plugins = form == "plugins" and bool(sparse)
    work = Work(model, block_limit(dtype), f"The {dtype} graph does not compute what it replaced.")
    routed, gathers = RewriteExperts(form, why), bool(nodes_of(model, "KeepLarge"))
    rules: list[Rule] = [TurnRotary(attention), RewriteAttention(attention, dtype)]
    if gathers:
        rules.append(GatherProducts(trt_experts.gather_refusal(tensorrt, experts)))
    done = [(rule, work.start(rule)) for rule in rules]
    kept = gather.outputs(model)
    if not plugins:
        done.append((routed, work.start(routed)))
    typed = half.convert(model, ir.DataType[dtype.upper()])
    if nodes_of(model, "KeepLarge"):
        expand = gather.ExpandKeepLarge(kept)
        done.append((expand, work.start(expand)))
    if plugins:  # they need a graph whose types are known
        done.append((routed, work.start(routed)))
    else:
        _inline(model)
        if form == "native" and sparse:
            trt_native.attach(model)
        trt_plugins.attach(model)
    _finish(work, done, dtype)
    name = f"float32 -> {dtype}; router, norm sums, rotary and softmax stay float32"
    work.rewrites.append(Rewrite(name, typed, "applied"))
    cache = CacheFacts(kind="concat", max_length=max_length, dtype=dtype)
    lowered = Lowered(work.rewrites, taps, cache, experts=form if sparse else None)
    kernels = [Kernel(**asdict(request)) for request in trt_plugins.requests(model)]
    if kernels:
        lowered.plugins = Plugins(oldest_tensorrt=".".join(map(str, OLDEST)), kernels=kernels)
    forms: set[str] = {form} if sparse else set()
    forms |= {"plugins" if kernels else "masked"} if gathers else set()
    lowered.limits = [_LIMITS["launcher" if each == "plugins" and tensorrt is None else each] for each in sorted(forms)]
    return lowered


def _finish(work: Work, done: Sequence[tuple[Rule, Applied | str]], dtype: str) -> None:
    """Execute and record what the rules did."""
    # The rotary table is no edge of any block.
    inside = next(each.inside for _, each in done if isinstance(each, Applied))
    for rule, each in done:
        if isinstance(each, Applied) and each.count:
            each.inside = inside
        elif not isinstance(rule, GatherProducts):  # that a dense model has no experts says nothing
            continue
        work.finish(rule, each, _Judge(work, dtype, experts=isinstance(rule, RewriteExperts)))


def _check(model: ir.Model, dtype: str) -> None:
    if dtype not in half.UNIT:
        raise MoEdgeError(f"TensorRT graphs are float16 or bfloat16, not {dtype!r}; give --half one of them.")
    if not all(map(routed_directly, nodes_of(model, "SparseGLU"))):
        raise MoEdgeError(
            "Cannot lower experts inside experts to half precision; export a hierarchical model to portable or ort-cpu."
        )
    stored = {value.dtype.name.lower() for value in model.graph.initializers.values() if value.dtype is not None}
    if reason := capabilities.runtime() or capabilities.half_source(stored):
        raise MoEdgeError(f"Cannot lower to half precision: {reason}.")


def _taps(model: ir.Model) -> dict[int, Tap]:
    """The experts that each layer selects."""
    taps = {}
    for node, route in zip(nodes_of(model, "SparseGLU"), nodes_of(model, "Route"), strict=True):
        top_k = route.attributes["top_k"].as_int()
        taps[layer_of(node)] = Tap(output=str(route.outputs[0].name), kind="indices", top_k=top_k)
    return taps


_LIMITS = {
    "plugins": "engines are built by TensorRT 10.9 or newer; elsewhere the plugins' function bodies run, slowly",
    "launcher": "engines are built and run with a plugin library, libmoedge_launch.so, which lies beside them",
    "native": "engines are built by TensorRT 11.0 or newer on SM100, SM103 and SM110 only",
    "merged": "every expert's weights are read for every token: the engine is no faster than its dense parent",
    "masked": "the weights of values that are left out are read and multiplied by zeros, as the dense parent's are",
}


class _Judge:
    """Executes a rewrite's blocks; a failed one is told from a value that left the type's range."""

    def __init__(self, work: Work, dtype: str, *, experts: bool) -> None:
        self._work, self._dtype, self._experts = work, dtype, experts

    def __call__(self, name: str, done: Applied) -> dict[str, object] | None:
        """Return the manifest's entry.

        Raises:
            MoEdgeError: a block is not within the limit; known mistakes of a whole FFN are named.
        """
        if not done.blocks:  # a step inside of the blocks of another rule
            return None
        work, (block,) = self._work, done.blocks
        limit = work.limit * block.growth
        test = selftest.compare(name, work.before, work.model, block.outputs, limit, done.cases, inside=done.inside)
        if not math.isfinite(test.max_rel_error) and self._dtype == "float16":
            raise MoEdgeError(f"{test.failure()} {RANGE}")
        if not test.passed:
            if self._experts:  # once more as whole FFNs, whose known mistakes have names
                ffns = (selftest.compare_ffn(name, work.before, work.model, each, work.limit) for each in block.outputs)
                test = next((found for found in ffns if not found.passed), test)
            raise MoEdgeError(f"{test.failure()} {work.advice}")
        return test.to_json()


RANGE = (
    "A value left float16's range (65,504): take --half bfloat16, which has float32's range at an eighth of float16's "
    "precision."
)


def _inline(model: ir.Model) -> None:
    """Write the functions that are left (Route) into the graph: no parser has to know them."""
    import onnx_ir.passes.common as passes

    for function in model.functions.values():
        # Route's operators (Add, TopK, Cast, Unsqueeze, Softmax, GatherElements) mean the same in opset 18 and 23.
        function.opset_imports[""] = model.opset_imports[""]
    passes.InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
    remove_unused(model)
