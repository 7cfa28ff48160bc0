"""Decoder layers of a Llama with random weights in bfloat16: routed and gathered FFNs beside the dense ones.

Two scopes: ``layer``, attention and norms included, and ``ffn`` alone. T tokens in one call, no cache: T = 1 is a
decode step whose context is empty, so attention reads its weights and nothing else.

Every variant shares the dense parent's attention. Weights and routers are random: an even load, the worst case for
what several tokens share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import clock as timing
import torch
from torch import nn

import moedge.convert.ops  # noqa: F401  registers torch.ops.moedge
from moedge.convert.ops.gathered import limits_of
from moedge.convert.ops.kernels import gathered
from moedge.convert.plan import RAMP
from moedge.convert.sparse_ffn import SparseFFN


@dataclass(frozen=True)
class Shape:
    """H, I and heads of a model's layer, and how many layers are run."""

    hidden: int
    width: int
    heads: int
    kv_heads: int
    layers: int


SHAPES = {
    # Llama-3.2-1B and Llama-2-7B, by their config.json. Weights of the layers: 0.5 and 0.8 GB, beyond any cache.
    "1B": Shape(2048, 8192, 32, 8, 4),
    "7B": Shape(4096, 11008, 32, 32, 2),
}
TINY = {"1B": Shape(32, 128, 4, 2, 2), "7B": Shape(48, 192, 4, 4, 2)}
TOKENS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Layout:
    """Of an FFN of E equal experts ``shared`` always run, and ``active`` of the others."""

    shared: int
    active: int
    experts: int

    @property
    def name(self) -> str:
        """As papers write it."""
        return f"S{self.shared}A{self.active}E{self.experts}"

    @property
    def share(self) -> float:
        """Share of the neurons that a token runs."""
        return (self.shared + self.active) / self.experts


LAYOUTS = (Layout(2, 2, 8), Layout(1, 1, 8), Layout(8, 24, 64))
KEEPS = (0.5, 0.25)


class GatheredFFN(nn.Module):
    """A gathered FFN by the kernels: small inputs made zero, then products that do not read the weights of zeros."""

    def __init__(self, weights: tuple[torch.Tensor, ...], limits: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (weight.T.contiguous() for weight in weights)
        self.x_limit, h_limit = limits
        self.h_limits = limits_of(h_limit, RAMP)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        flat = torch.ops.moedge.keep_large(x.reshape(-1, x.shape[-1]), self.x_limit, RAMP)
        hidden = torch.ops.moedge.gathered_glu(flat, self.gate, self.up, self.h_limits, "silu")
        return torch.ops.moedge.gathered_linear(hidden, self.down).reshape(x.shape)


@dataclass(frozen=True)
class Variant:
    """FFNs of one kind, one a layer, and the share of the dense FFN's weights that a call of T tokens reads."""

    name: str
    ffns: list[nn.Module]
    reads: Callable[[int], float]


def dense_model(shape: Shape, device: str) -> Any:
    """Return a Llama of random bfloat16 weights without vocabulary to speak of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=32,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def routed(shape: Shape, layout: Layout, device: str, number: int) -> SparseFFN:
    """Return one routed FFN with random weights and a random router."""
    each = shape.width // layout.experts
    routed_experts = layout.experts - layout.shared
    spec = {
        "num_experts": routed_experts,
        "top_k": layout.active,
        "shared_width": layout.shared * each,
        "expert_width": each,
        "combine": "softmax",
        "activation": "silu",
        "router": {"kind": "linear", "options": {}},
        "tensors": [],
    }
    with torch.device(device):
        ffn = SparseFFN(number, shape.hidden, spec)
    for name, parameter in ffn.named_parameters():
        inputs = each if name.endswith("down") else shape.hidden
        parameter.data = torch.randn(parameter.shape, device=device) / inputs**0.5
    return ffn.to(torch.bfloat16).eval().requires_grad_(False)


def experts_read(layout: Layout) -> Callable[[int], float]:
    """Return the share of the FFN's weights that T tokens read when each chooses by itself."""
    others = layout.experts - layout.shared

    def reads(tokens: int) -> float:
        missed = (1 - layout.active / others) ** tokens
        return (layout.shared + others * (1 - missed)) / layout.experts

    return reads


def gathered_read(keep: float) -> Callable[[int], float]:
    """Return the share of the FFN's weights that T tokens read when each keeps a share by itself.

    By the kernels' paths: prompts skip nothing.
    """

    def reads(tokens: int) -> float:
        return gathered.reads(keep=keep, tokens=tokens) if tokens <= 16 else 1.0

    return reads


def thresholds(dense: nn.Module, keep: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return thresholds of inputs [H] and hidden values [I] that keep a share of them, of inputs of variance 1.

    A value counts as kept above its threshold, on the ramp too.
    """
    inputs = dense.gate_proj.weight.shape[1]
    x = torch.randn(256, inputs, device=dense.gate_proj.weight.device)
    x_limit = x.abs().flatten()[: 1 << 20].quantile(1 - keep)
    kept = torch.ops.moedge.keep_large(x.to(torch.bfloat16), x_limit.expand(inputs).contiguous(), RAMP)
    hidden = nn.functional.silu(dense.gate_proj(kept)) * dense.up_proj(kept)
    h_limit = hidden.float().abs().flatten()[: 1 << 20].quantile(1 - keep)
    return x_limit.expand(inputs).contiguous(), h_limit.expand(hidden.shape[-1]).contiguous()


def variants(model: Any, shape: Shape, device: str) -> list[Variant]:
    """Return the dense FFNs, then everything that is compared with them."""
    dense = [layer.mlp for layer in model.model.layers]
    made = [Variant("dense", dense, lambda tokens: 1.0)]
    for layout in LAYOUTS:
        ffns: list[nn.Module] = [routed(shape, layout, device, number) for number in range(shape.layers)]
        made.append(Variant(f"moe {layout.name}, {layout.share:.0%} of the neurons", ffns, experts_read(layout)))
    for keep in KEEPS:
        ffns = []
        for ffn in dense:
            weights = (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
            ffns.append(GatheredFFN(weights, thresholds(ffn, keep)))
        made.append(Variant(f"gather, {keep:.0%} of the values", ffns, gathered_read(keep)))
    return made


def chain(model: Any, ffns: list[nn.Module], tokens: int, scope: str, device: str) -> timing.Work:
    """Return the layers with these FFNs, or the FFNs alone, one after the other on T tokens."""
    x = torch.randn(1, tokens, model.config.hidden_size, device=device).to(torch.bfloat16)
    if scope == "ffn":

        def run() -> torch.Tensor:
            for ffn in ffns:
                y = ffn(x)
            return y

        return run
    positions = torch.arange(tokens, device=device)[None]
    embeddings = model.model.rotary_emb(x, positions)
    # Given, so that no layer makes one: that would wait for the host.
    mask = torch.full((tokens, tokens), torch.finfo(x.dtype).min, device=device, dtype=x.dtype).triu(1)[None, None]

    def run_layers() -> torch.Tensor:
        y = x
        for layer, ffn in zip(model.model.layers, ffns, strict=True):
            layer.mlp = ffn
            y = layer(y, attention_mask=mask, position_ids=positions, position_embeddings=embeddings)
            y = y[0] if isinstance(y, tuple) else y
        return y

    return run_layers


def error_of(ffn: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Return the relative error of an FFN's kernels on x and its limit; the reference: PyTorch's bodies in float32.

    A routed FFN rounds hidden values, each expert's output, the shared block's three products and two sums to bfloat16
    (unit 2^-9 relative); eight of them in a row are 2^-6 at most. A gathered one rounds inputs, hidden values and the
    output; a value on the ramp moves by 2 + 1 / RAMP times its rounding.
    """
    from copy import deepcopy

    reference = deepcopy(ffn).float().cpu()
    for name, value in vars(ffn).items():  # tensors that are no parameters
        if isinstance(value, torch.Tensor):
            setattr(reference, name, value.float().cpu())
    got, want = ffn(x).float().cpu(), reference(x.float().cpu())
    limit = 2.0**-6 if isinstance(ffn, SparseFFN) else (2 + 2 + 1 / RAMP) * 2.0**-9
    return float((got - want).norm() / want.norm()), limit


def measure(name: str, clock: timing.Clock, *, rehearsal: bool) -> Iterator[dict[str, Any]]:
    """Yield one row a variant, scope and number of tokens; first whether each variant computes what it should."""
    shape, device = (TINY if rehearsal else SHAPES)[name], clock.device
    model = dense_model(shape, device)
    made = variants(model, shape, device)
    for variant in made[1:]:
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, shape.hidden, device=device).to(torch.bfloat16)
            error, limit = error_of(variant.ffns[0], x)
            row = {"kind": "error", "shape": name, "variant": variant.name, "tokens": tokens, "error": error}
            yield row | {"limit": limit, "passed": error <= limit}
    for tokens in (1, 8) if rehearsal else TOKENS:
        for scope in ("ffn", "layer"):
            works = {v.name: clock.captured(chain(model, v.ffns, tokens, scope, device)) for v in made}
            times = clock.in_turns({key: work for key, (work, _) in works.items()})
            for variant in made:
                found = times[variant.name]
                yield {
                    "kind": "layer",
                    "shape": name,
                    "scope": scope,
                    "variant": variant.name,
                    "tokens": tokens,
                    "us": round(float(torch.tensor(found).median()) / shape.layers, 2),
                    "captured": works[variant.name][1],
                    "reads": round(variant.reads(tokens), 4),
                    **timing.ratio(times["dense"], found),
                }
