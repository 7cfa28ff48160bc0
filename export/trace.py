"""Trace a Hugging Face causal LM, dense or converted, into one ONNX graph with a KV cache.

One graph serves prefill and decode. Inputs and outputs are those of optimum's decoder-with-past export:
``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.N.key/value`` -> ``logits``,
``present.N.key/value``. Batch, sequence and past lengths are dynamic. Attention and the routed FFN are ``moedge::``
nodes with model-local function bodies in standard operators (:mod:`moedge.export.functions`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from moedge import MoEdgeError
from moedge.convert import ops as _ops  # noqa: F401 - registers torch.ops.moedge
from moedge.convert.adapters import MOE_PREFIX
from moedge.convert.compat import cache_argument
from moedge.convert.errors import errors_alone
from moedge.export import attention, functions, retrace
from moedge.export.graph import nodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONNX_IR_VERSION = 10
_SAME_NAMES = {"olmoe": "qwen3_moe"}
"""Families that optimum does not know, and one whose config uses the same names."""
BASE_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Architecture:
    """The facts of a decoder that its graph and its cache depend on (read through optimum's normalised config)."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Read a config, dense (``llama``) or converted (``moedge_llama``)."""
        model_type = config.model_type.removeprefix(MOE_PREFIX)
        normalized = _normalized(config, model_type)
        heads = normalized.num_attention_heads
        return cls(
            model_type=model_type,
            hidden_size=normalized.hidden_size,
            vocab_size=normalized.vocab_size,
            num_layers=normalized.num_layers,
            num_attention_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or normalized.hidden_size // heads,
        )


def _normalized(config: Any, model_type: str) -> Any:
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

    model_type = _SAME_NAMES.get(model_type, model_type)
    try:
        return NormalizedConfigManager.get_normalized_config_class(model_type)(config)
    except KeyError:
        return NormalizedTextConfig(config)  # optimum lists no Gemma 2 and 3; their configs use the common names


class _WithFlatCache(torch.nn.Module):
    """The model as a function of plain tensors: past keys and values in, present ones out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.argument = cache_argument(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        cache.layers = []
        for key, value in past_key_values:
            # Filled by hand: DynamicCache.update would concatenate with an empty tensor and leave a node for it.
            layer = DynamicLayer()
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.argument: cache},
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """``prefix.N.key`` and ``prefix.N.value`` for every layer, in graph order."""
    return [f"{prefix}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def _dummy_inputs(config: Any, facts: Architecture) -> tuple[Any, ...]:
    """Example inputs: batch 2, 3 new tokens, 4 past (all different, so that no dimension is taken for another)."""
    from optimum.utils.input_generators import MistralDummyPastKeyValuesGenerator

    batch, new, past = 2, 3, 4
    generator = MistralDummyPastKeyValuesGenerator(
        "text-generation", _normalized(config, facts.model_type), batch_size=batch, sequence_length=past
    )
    dtype = "fp32" if config.dtype in (None, torch.float32) else "fp16" if config.dtype == torch.float16 else "bf16"
    return (
        torch.arange(batch * new).reshape(batch, new) % facts.vocab_size,
        torch.ones(batch, past + new, dtype=torch.int64),
        torch.arange(past, past + new).expand(batch, new).contiguous(),
        generator.generate("past_key_values", framework="pt", float_dtype=dtype),
    )


def _translations() -> dict[Any, Any]:
    """How each torch operator becomes a node. Tensor arguments map to inputs, the rest to attributes."""
    from onnxscript.values import Opset

    functions.register_schemas()
    moedge = Opset(functions.DOMAIN, functions.VERSION)

    def route(scores, selection_bias, scale, top_k, rule):  # type: ignore[no-untyped-def]
        inputs = [scores, selection_bias] if scale is None else [scores, selection_bias, scale]
        return moedge.Route(*inputs, top_k=top_k, rule=rule)

    def sparse_glu(  # type: ignore[no-untyped-def]
        x, indices, weights, gate, up, down, compensation, activation, h_threshold=None, ramp=0.0
    ):
        # Layers differ in E, which a body cannot read from gate's shape into the attribute that Dispatch takes.
        facts = {"activation": activation, "num_experts": int(gate.shape[0])}
        inputs = [x, indices, weights, gate, up, down]
        if h_threshold is not None:
            return moedge.SparseGLU(*inputs, compensation, h_threshold, **facts, ramp=ramp)
        return moedge.SparseGLU(*inputs, *([] if compensation is None else [compensation]), **facts)

    def keep_large(x, threshold, ramp):  # type: ignore[no-untyped-def]
        return moedge.KeepLarge(x, threshold, ramp=ramp)

    def causal_attention(query, key, value, attention_mask, scale, window, softcap):  # type: ignore[no-untyped-def]
        return moedge.CausalAttention(query, key, value, attention_mask, scale=scale, window=window, softcap=softcap)

    return {
        torch.ops.moedge.route.default: route,
        torch.ops.moedge.sparse_glu.default: sparse_glu,
        torch.ops.moedge.attention.default: causal_attention,
        torch.ops.moedge.keep_large.default: keep_large,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about its own registry and deprecations away from the user."""
    with errors_alone("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _LongRope(torch.nn.Module):
    """Phi-3's longrope as one expression: transformers' own writes into a buffer, which no graph can hold.

    Above the length of the original training every frequency of a call is a long one, else a short one.
    """

    short: torch.Tensor
    long: torch.Tensor

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        self.original = rotary.config.rope_parameters["original_max_position_embeddings"]
        self.scaling = rotary.attention_scaling
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, "cpu", seq_len=self.original + 1)
        self.register_buffer("short", rotary.original_inv_freq.float().cpu(), persistent=False)
        self.register_buffer("long", long.float(), persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin) [B, S, rotated dimensions]."""
        inverse = torch.where(position_ids.max() + 1 > self.original, self.long, self.short)
        frequencies = position_ids[..., None].float() * inverse
        angles = torch.cat((frequencies, frequencies), dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


@contextmanager
def _traceable_rotary(model: PreTrainedModel) -> Iterator[None]:
    """Put a form that can be traced in place of a rotary embedding that changes itself while it runs.

    Raises:
        MoEdgeError: dynamic NTK scaling, whose frequencies depend on every length seen before.
    """
    decoder = model.base_model
    rotary = decoder.rotary_emb
    kinds = set(rotary.rope_type.values()) if isinstance(rotary.rope_type, dict) else {rotary.rope_type}
    if "dynamic" in kinds or ("longrope" in kinds and isinstance(rotary.rope_type, dict)):
        raise MoEdgeError(
            f"rope_type {', '.join(sorted(kinds))!r} cannot be exported: its frequencies depend on the lengths of "
            "earlier calls. Set rope_type to default, linear, llama3, yarn or longrope in config.json."
        )
    try:
        if "longrope" in kinds:
            decoder.rotary_emb = _LongRope(rotary)
        yield
    finally:
        decoder.rotary_emb = rotary


def trace(model: PreTrainedModel) -> ir.Model:
    """Trace ``model`` and attach the function bodies.

    The weights of the result are the model's own tensors, not copies; keep the model alive until the result is saved.

    Raises:
        MoEdgeError: the model's attention is not causal, its rotary embedding cannot be traced, or its layers mix
            weight rules or activations.
    """
    config = model.config
    facts = Architecture.of(config)
    layers = facts.num_layers
    if kept := [name for name, module in model.named_modules() if name.endswith(".mlp") and hasattr(module, "experts")]:
        raise MoEdgeError(
            f"Layer {kept[0].split('.')[-2]} keeps the experts of its parent ({facts.model_type}), which cannot be "
            "exported; convert with --method cmoe-hierarchical on more text, or with a lower min_tokens, to split it."
        )
    for module in model.modules():
        # A plan may have no selection bias, but Route's is a required input, and what a lowering or replay adds to.
        if getattr(module, "num_experts", 0) and module._buffers.get("selection_bias", module) is None:
            module.selection_bias = torch.zeros(module.num_experts, device=model.device)
    batch, new = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    past, total = torch.export.Dim("past_sequence_length"), torch.export.Dim("total_sequence_length")
    token_dims, cache_dims = {0: batch, 1: new}, {0: batch, 2: past}
    attention.register()
    previous = config._attn_implementation
    model.set_attn_implementation(attention.IMPLEMENTATION)
    try:
        with _quiet(), torch.no_grad(), _traceable_rotary(model), retrace.spared():
            program = torch.onnx.export(
                _WithFlatCache(model).eval(),
                _dummy_inputs(config, facts),
                dynamic_shapes=(token_dims, {0: batch, 1: total}, token_dims, [(cache_dims, cache_dims)] * layers),
                input_names=[*BASE_INPUTS, *cache_names("past_key_values", layers)],
                output_names=["logits", *cache_names("present", layers)],
                custom_translation_table=_translations(),
                opset_version=functions.OPSET,
                dynamo=True,
                verbose=False,
                optimize=False,  # see _simplify
            )
    finally:
        model.set_attn_implementation(previous)
    assert program is not None
    graph_model = program.model
    graph_model.ir_version = ONNX_IR_VERSION
    _drop_debug_metadata(graph_model)
    _simplify(graph_model)
    nodes.attach(graph_model, form="chain")
    return graph_model


def _simplify(model: ir.Model) -> None:
    """Fold constants and drop what does nothing: torch.onnx's own optimizer but for one rule.

    The rule for pairs of slices compares each node with all others, so its time grows with the square of the depth (40%
    of the time of an export of 30 layers, profiled), and no decoder here has what it looks for.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    chosen = rewriter.RewriteRuleSet(
        [
            rules.no_op_cast_rule,
            rules.no_op_expand_rule,
            rules.no_op_transpose_rule,
            rules.cast_cast_rule,
            rules.reshape_reshape_rule,
            rules.squeeze_reshape_1d_rule,
            rules.transpose_transpose_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.materialize_reshape_shape_rule,
            rules.mul_by_1_rule,
            rules.add_0_rule,
        ]
    )
    optimizer.inline(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)  # lowerings need the types of all values
        rewriter.rewrite(model, chosen)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _drop_debug_metadata(model: ir.Model) -> None:
    """Remove stack traces and module paths: they hold this machine's file names and triple the file's size."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
