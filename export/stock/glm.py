"""A converted model as a plain Hugging Face checkpoint that stock transformers, vLLM and SGLang load: no custom code.

* A plan with experts becomes ``Glm4MoeForCausalLM`` (docs/methods.md 7): sigmoid scores of a linear router, a
  per-expert correction that is added for the selection only, weights normalised to sum 1 and times
  ``routed_scaling_factor``, an ungated shared expert.
* A plan without experts becomes a checkpoint of its dense family with a smaller ``intermediate_size``.

**The eps trick.** Our weights are 1; theirs are ``k sigma(z_e) / sum of sigma(z_j) over the selected``. Router rows are
multiplied by a power of two, eps, so that all z = eps s are near 0 and all sigma near 1/2. The order of z is exactly
that of the scores s, and sigma is monotonic, so the selection stays. For the weights: log sigma has the slope
sigma(-z), at most sigma(Z) for |z| <= Z, so two of a token's sigmas differ by a factor of at most exp(sigma(Z) R), R
being the spread of z over the token's selected experts. A weight is a sigma over the mean of the sigmas, hence

    |w - 1| <= exp(sigma(Z) R) - 1,   about eps (max s - min s) / 2.

A smaller eps would make that smaller still, but float32 keeps sigma(z) near 1/2 to 2^-24 only: scores closer than about
``4 * 2^-24 / eps`` become ties. :data:`TARGET_STD` balances the two. What it does to the logits is in
:mod:`moedge.export.stock.check`.

**Layers that share differently** (ExpertWeaver): the expert count and k are those of the whole model. What a layer
shares beyond the narrowest layer is stored as experts with zero router rows and a correction of +1: always selected,
sigma exactly 1/2. Missing experts are zeros, with a correction of -1 (never selected) or +1 (to fill up k).

T tokens, H hidden, I expert width, E experts, k active.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge import MoEdgeError
from moedge._files import atomic_dir, write_json
from moedge.convert import modeling
from moedge.convert.adapters import MOE_PREFIX
from moedge.convert.errors import quiet
from moedge.convert.kept_inputs import KeepsLarge
from moedge.convert.sources import tokenizer_files
from moedge.export.stock import check as hf_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Steps

EXPORT_SCHEMA = "moedge.export_hf/1"
RECORD = "moedge_export.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Dense families whose attention, norms and rotary embedding Glm4Moe also has."""
ALIGNED = 8
"""The width of experts is a multiple of it: PyTorch's grouped product, which stock transformers takes by default, wants
rows of a multiple of 16 bytes, in bfloat16, too. The neurons that fill it up are zeros."""
TARGET_STD = 2.0**-10
"""Largest standard deviation of eps * scores over a layer's tokens and experts; a power of two keeps it above half.

Measured on SmolLM2-135M by ExpertWeaver (24 of 32 experts, 1,024 tokens of C4 text), mean KL and tokens that change
experts anywhere: 2^-8 0.006, 21 %; 2^-9 0.009, 21 %; 2^-10 0.005, 15 %; 2^-11 0.016, 37 %; 2^-12 0.023, 49 %."""


@dataclass
class Layer:
    """One layer of the Glm4Moe layout, in experts of the model's common width I.

    Slots of the exported layer, in this order: ``routed`` ours, ``forced`` blocks of the shared FFN, ``filled`` zero
    experts that are always selected, and zero experts that never are.
    """

    routed: int
    top_k: int
    forced: int = 0
    filled: int = 0
    eps: float = 1.0
    std: float = 0.0


@dataclass
class Layout:
    """The uniform shape that every layer is written in."""

    experts: int
    top_k: int
    width: int
    shared_blocks: int
    layers: list[Layer] = field(default_factory=list)


def refusal(model: PreTrainedModel) -> str | None:
    """Say why a converted model cannot be a stock checkpoint and what to do, or return None when it can."""
    config = model.config
    family = str(config.model_type).removeprefix(MOE_PREFIX)
    ffns = modeling.sparse_ffns(model)
    if family not in FAMILIES or not ffns:
        return (
            f"a converted model of type {family!r} has no stock equivalent; supported: {', '.join(FAMILIES)}. "
            "Serve it with `moedge export` or with transformers after `import moedge.convert.modeling`"
        )
    if any(isinstance(part, KeepsLarge) and part.thresholds() for part in model.modules()):
        return "it leaves out small inputs, which no stock checkpoint does; convert without gather"
    routed = any(ffn.num_experts for ffn in ffns)  # else it becomes a model of its own family
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if routed and window and window < config.max_position_embeddings:
        return f"Glm4Moe has no sliding window, the model has one of {window}; choose a model without"
    for index, layer in enumerate(model.model.layers):
        bias = getattr(layer.self_attn.o_proj, "bias", None)
        if routed and bias is not None and bool(bias.any()):
            return f"layer {index} has a bias on its attention output, which Glm4Moe lacks; choose a model without"
    for ffn in ffns:
        router = config.moedge["layers"][ffn.layer_index]["router"] if ffn.num_experts else None
        said = _of_weights(ffn, routed or family != "llama") or (router and _of_routing(ffn, router["kind"]))
        if said:
            return f"layer {ffn.layer_index} {said}"
    return None


def _of_weights(ffn: modeling.SparseFFN, unbiased: bool) -> str | None:
    """What a layer has that a stock FFN has no place for; ``unbiased``: not even for an output bias."""
    if ffn.biased:
        return "has biases on its gate or up projection, which Glm4Moe lacks; choose a model without"
    if ffn.output_bias is not None and bool(ffn.output_bias.any()) and unbiased:
        return "adds an output bias, for which stock FFNs have no place; convert with refit=false"
    return None


def _of_routing(ffn: modeling.SparseFFN, kind: str) -> str | None:
    """What a layer with experts does that Glm4Moe does not."""
    if kind not in ("linear", "random"):
        return (
            f"has a {kind!r} router, stock routers are linear; convert with --method expertweaver, or with "
            "--method moedge --set compensation=none --set refit=false"
        )
    if ffn.combine != "unit" and not (ffn.scale is not None and ffn.combine == "scaled" and not ffn.scale.any()):
        return f"weights its experts ({ffn.combine}); only weight 1 fits. Convert with unit weights"
    if ffn.expert_bias is not None and bool(ffn.expert_bias.any()):
        return "has experts with an output bias of their own, which no stock MoE has; convert without"
    if ffn.compensation is not None and bool(ffn.compensation.any()):
        return (
            "adds what left-out experts contribute on average (compensation), which no stock MoE does; "
            "convert with compensation=none and refit=false"
        )
    return None


def layout_of(ffns: list[modeling.SparseFFN]) -> Layout:
    """Find the uniform shape (module docstring)."""
    width = max(ffn.get_parameter("gate").shape[1] for ffn in ffns if ffn.num_experts)
    width = ALIGNED * math.ceil(width / ALIGNED)
    shared = [ffn.shared_gate.shape[0] for ffn in ffns]
    blocks = max(1, math.ceil(min(shared) / width))
    layers = [
        Layer(ffn.num_experts, ffn.top_k if ffn.num_experts else 0, max(0, math.ceil(size / width) - blocks))
        for ffn, size in zip(ffns, shared, strict=True)
    ]
    top_k = max(layer.top_k + layer.forced for layer in layers)
    for layer in layers:
        layer.filled = top_k - layer.top_k - layer.forced
    experts = max(2, *(layer.routed + layer.forced + layer.filled for layer in layers))
    return Layout(experts, top_k, width, blocks, layers)


def choose_eps(layout: Layout, routings: dict[int, hf_check.Routing]) -> None:
    """Set eps of each layer: the largest power of two with a standard deviation of at most TARGET_STD."""
    for index, routing in routings.items():
        layer = layout.layers[index]
        layer.std = float(routing.scores.double().std()) if routing.scores.numel() > 1 else 0.0
        if layer.std > 0:
            layer.eps = 2.0 ** math.floor(math.log2(TARGET_STD / layer.std))
        layer.std *= layer.eps


def export_hf(
    checkpoint: Path,
    out: Path,
    token_windows: np.ndarray,
    *,
    force: bool = False,
    keep: bool = True,
    progress: Steps | None = None,
) -> dict[str, Any]:
    """Write ``out`` and measure it against the checkpoint that it was made from.

    Args:
        checkpoint: folder that ``moedge convert`` wrote.
        token_windows: int64 [N, L], ids to measure scores and logits on.
        keep: False: measure only, in a temporary folder.
        progress: called with what is being done, and how many of how many steps are finished.

    Returns:
        The record that is also written as ``moedge_export.json``: architecture, layout, eps of each layer, padding,
        and what :func:`moedge.export.stock.check.compare` measured.

    Raises:
        MoEdgeError: the model cannot be represented (with the reason), ``out`` is in use, or what was written differs
            from the model by more than the derived bound.
    """
    report = progress or (lambda *_: None)
    steps = 4
    report("opening the converted model", 0, steps)
    model, plan, tokenizer = modeling.load(checkpoint)
    if reason := refusal(model):
        raise MoEdgeError(f"{checkpoint} cannot be written as a stock checkpoint: {reason}.")
    if token_windows.max() >= model.config.vocab_size:
        raise MoEdgeError(f"The text was tokenized for another model than {checkpoint}.")
    report("measuring its router", 1, steps)
    reference = hf_check.measure(model, token_windows)
    record: dict[str, Any] = {"schema": EXPORT_SCHEMA, "plan_sha256": plan.sha256, "method": plan.method}
    with atomic_dir(out, force=force, inputs=[checkpoint]) if keep else _temporary() as partial, quiet():
        report("writing the stock checkpoint", 2, steps)
        stock, layout, filled = _stock(model, reference.routings)
        del model
        stock.save_pretrained(partial)
        tokenizer_files.save(tokenizer, partial)
        config = stock.config
        del stock
        report("comparing it with the converted model", 3, steps)
        record |= {
            "architecture": config.architectures[0],
            "zero_share_of_ffn_weights": round(1 - filled * (1 - plan.zero_share), 6),
            "notes": _notes(config, layout is not None),
        }
        if layout is not None:
            shape = {"experts": layout.experts, "top_k": layout.top_k, "width": layout.width}
            record["layout"] = {**shape, "shared_width": layout.shared_blocks * layout.width}
        record["measured"] = hf_check.compare(partial, reference, token_windows, layout)
        write_json(partial / RECORD, record)
        hf_check.judge(record["measured"])
    report("done", steps, steps)
    return record


def _stock(
    model: PreTrainedModel, routings: dict[int, hf_check.Routing]
) -> tuple[PreTrainedModel, Layout | None, float]:
    """Return the stock model, its layout (None: no experts) and the share of its FFN weights that are not padding."""
    ffns = modeling.sparse_ffns(model)
    layout = None
    if any(ffn.num_experts for ffn in ffns):
        layout = layout_of(ffns)
        choose_eps(layout, routings)
        _check_biases(ffns, layout)
        stock, stored, used = _glm(model, ffns, layout)
    else:
        stock, stored, used = _dense(model, ffns)
    stock.generation_config = model.generation_config
    return stock, layout, used / stored


@contextmanager
def _temporary() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


def _check_biases(ffns: list[modeling.SparseFFN], layout: Layout) -> None:
    """Refuse biases that would outrank an always-selected block (its score is 1.5, a routed one's about 0.5 + bias)."""
    for ffn, layer in zip(ffns, layout.layers, strict=True):
        if layer.routed and float(_correction(ffn, layer).abs().max()) > 0.25:
            raise MoEdgeError(
                f"Layer {ffn.layer_index}: a router bias is more than 64 standard deviations of the scores, which "
                "leaves no room beside the always-selected blocks; convert again."
            )


def _correction(ffn: modeling.SparseFFN, layer: Layer) -> torch.Tensor:
    """Biases of the scores as ``e_score_correction_bias`` float32 [E]: sigma(eps s) has the slope eps / 4 at 0."""
    total = torch.zeros(layer.routed, dtype=torch.float64)
    for bias in (getattr(ffn.router, "bias", None), ffn.selection_bias):
        if bias is not None:
            total += bias.detach().double().cpu()
    return (total * (layer.eps / 4)).float()


@torch.no_grad()
def _glm(model: PreTrainedModel, ffns: list[modeling.SparseFFN], layout: Layout) -> tuple[PreTrainedModel, int, int]:
    """Return the Glm4Moe model, how many FFN weights it stores, and how many of them are ours."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    dense = model.config
    rope = {**dense.rope_parameters, "partial_rotary_factor": 1.0}
    attention = model.model.layers[0].self_attn
    config = Glm4MoeConfig(
        **_common(dense),
        intermediate_size=layout.shared_blocks * layout.width,
        head_dim=attention.head_dim,
        attention_bias=attention.q_proj.bias is not None,
        use_qk_norm=hasattr(attention, "q_norm"),
        rope_parameters=rope,
        moe_intermediate_size=layout.width,
        n_shared_experts=layout.shared_blocks,
        n_routed_experts=layout.experts,
        num_experts_per_tok=layout.top_k,
        routed_scaling_factor=float(layout.top_k),
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
    )
    state = _without_ffns(model)
    hidden, experts, width = dense.hidden_size, layout.experts, layout.width
    used = sum(_ours(ffn) for ffn in ffns)
    stored = len(ffns) * 3 * hidden * (experts * width + layout.shared_blocks * width)
    for ffn, layer in zip(ffns, layout.layers, strict=True):
        prefix = f"model.layers.{ffn.layer_index}.mlp."
        gate, up, down = _routed_blocks(ffn, layer, layout)
        state[f"{prefix}experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{prefix}experts.down_proj"] = down
        for name in ("gate", "up", "down"):
            state[f"{prefix}shared_experts.{name}_proj.weight"] = _shared(ffn, name, 0, layout.shared_blocks * width)
        rows = torch.zeros(experts, hidden)
        bias = torch.full((experts,), -1.0)
        if layer.routed:
            assert ffn.router is not None
            rows[: layer.routed] = ffn.router.get_parameter("weight").float().cpu() * layer.eps
            bias[: layer.routed] = _correction(ffn, layer)
        bias[layer.routed : layer.routed + layer.forced + layer.filled] = 1.0
        state[f"{prefix}gate.weight"], state[f"{prefix}gate.e_score_correction_bias"] = rows, bias
        model.model.layers[ffn.layer_index].mlp = torch.nn.Identity()  # frees the FFN once the caller drops its list
    with torch.device("meta"):
        stock = Glm4MoeForCausalLM(config)
    stock.load_state_dict(state, assign=True)
    return stock.to(dtype=torch.float32), stored, used


def _routed_blocks(
    ffn: modeling.SparseFFN, layer: Layer, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gate, up [E, I, H] and down [E, H, I] of one exported layer."""
    hidden, width = ffn.shared_gate.shape[1], layout.width
    gate, up = (torch.zeros(layout.experts, width, hidden) for _ in range(2))
    down = torch.zeros(layout.experts, hidden, width)
    if layer.routed:
        own = ffn.get_parameter("gate").shape[1]
        gate[: layer.routed, :own], up[: layer.routed, :own] = ffn.get_parameter("gate"), ffn.get_parameter("up")
        down[: layer.routed, :, :own] = ffn.get_parameter("down")
    for number in range(layer.forced):
        start = (layout.shared_blocks + number) * width
        slot = layer.routed + number
        gate[slot], up[slot] = (_shared(ffn, name, start, width) for name in ("gate", "up"))
        down[slot] = _shared(ffn, "down", start, width)
    return gate, up, down


def _shared(ffn: modeling.SparseFFN, name: str, start: int, width: int) -> torch.Tensor:
    """Return ``width`` neurons of the shared block from ``start`` on, zeros beyond its end (down: as columns)."""
    block = getattr(ffn, f"shared_{name}").detach()
    if name == "down":
        return _shared_rows(block.T, start, width).T.contiguous()
    return _shared_rows(block, start, width)


def _shared_rows(rows: torch.Tensor, start: int, width: int) -> torch.Tensor:
    result = torch.zeros(width, rows.shape[1])
    part = rows[start : start + width]
    result[: len(part)] = part
    return result


@torch.no_grad()
def _dense(model: PreTrainedModel, ffns: list[modeling.SparseFFN]) -> tuple[PreTrainedModel, int, int]:
    """Return a model of the dense family as narrow as the widest layer, its FFN weights, and how many are ours."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family = model.config.model_type.removeprefix(MOE_PREFIX)
    given = {key: value for key, value in model.config.to_dict().items() if key not in ("moedge", "architectures")}
    widest = max(ffn.shared_gate.shape[0] for ffn in ffns)
    biased = any(ffn.output_bias is not None and bool(ffn.output_bias.any()) for ffn in ffns)
    given |= {"model_type": family, "intermediate_size": widest} | ({"mlp_bias": biased} if family == "llama" else {})
    config = CONFIG_MAPPING[family].from_dict(given)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [model_class.__name__]
    state = _without_ffns(model, untie=False)
    for ffn in ffns:
        prefix = f"model.layers.{ffn.layer_index}.mlp."
        for name in ("gate", "up", "down"):
            state[f"{prefix}{name}_proj.weight"] = _shared(ffn, name, 0, widest)
        if biased:
            none = torch.zeros(config.hidden_size)
            state[f"{prefix}down_proj.bias"] = none if ffn.output_bias is None else ffn.output_bias.float()
            state |= {f"{prefix}{name}_proj.bias": torch.zeros(widest) for name in ("gate", "up")}
    with torch.device("meta"):
        stock = model_class(config)
    missing = stock.load_state_dict(state, strict=False, assign=True)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise MoEdgeError(f"The {family} checkpoint would lack {missing.missing_keys}; report this model.")
    stock.tie_weights()
    stored = len(ffns) * 3 * config.hidden_size * widest
    return stock.to(dtype=torch.float32), stored, sum(_ours(ffn) for ffn in ffns)


def _common(dense: Any) -> dict[str, Any]:
    names = [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ]
    # vLLM's Glm4Moe always loads an output projection of its own, so a tied one is written out.
    return {name: getattr(dense, name) for name in names} | {
        "tie_word_embeddings": False,
        "architectures": ["Glm4MoeForCausalLM"],
        "dtype": "float32",
    }


def _without_ffns(model: PreTrainedModel, *, untie: bool = True) -> dict[str, torch.Tensor]:
    """Every parameter but those of the FFNs, float32; names are those of all families here and of Glm4Moe."""
    state = {name: value.detach() for name, value in model.named_parameters() if ".mlp." not in name}
    # A bias on the attention output that is all zeros (refusal) has no place in Glm4Moe.
    state = {name: value for name, value in state.items() if not (untie and name.endswith("o_proj.bias"))}
    if untie and "lm_head.weight" not in state:
        state["lm_head.weight"] = model.get_output_embeddings().weight.detach().clone()
    return state


def _ours(ffn: modeling.SparseFFN) -> int:
    hidden = ffn.shared_gate.shape[1]
    neurons = ffn.shared_gate.shape[0] + (math.prod(ffn.get_parameter("gate").shape[:2]) if ffn.num_experts else 0)
    return 3 * hidden * neurons


def _notes(config: Any, routed: bool) -> list[str]:
    if not routed:
        return []
    notes = [
        "vLLM keeps the router in float32 whatever --dtype says; SGLang and transformers round it to the model's "
        "dtype, so serve in float32 there or expect more tokens to change experts."
    ]
    if config.hidden_act != "silu":
        notes.append(f"vLLM and SGLang serve Glm4Moe with SiLU only, this model gates with {config.hidden_act}.")
    return notes
