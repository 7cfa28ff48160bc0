"""Bounds of ``moedge estimate`` beside published measurements: the table of docs/estimate.md.

    python tests/benchmarks/published_rows.py

Measurements: TensorRT Edge-LLM 0.9.0's benchmark page (JetPack 7.2, batch as given, greedy). Shapes: config.json of the
Qwen3 checkpoints. INT4 there is GPTQ in groups of 128, which leaves embedding and output projection in float16; NVFP4
has an 8-bit scale for 16 weights. What the page does not say of a row (tokens of the answer, clocks) is not guessed:
the cache is taken as 128 tokens, 2048 where the row says so. Nothing is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from moedge.configs import devices
from moedge.export.device.outlook import step_bound
from moedge.export.manifest import LayerFacts, ModelFacts, MoEFacts
from moedge.export.needs import Needs, Part, of_model

INT4, NVFP4, HALF = 0.5 + 2 / 128, 0.5 + 1 / 16, 2.0
"""Bytes of a weight."""


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model: L layers, H hidden, I width, A heads of 128, G key/value heads, E experts with k chosen."""

    layers: int
    hidden: int
    width: int
    heads: int
    groups: int
    tied: bool
    experts: int = 0
    chosen: int = 0

    def needs(self, weight: float) -> Needs:
        """What a token needs if weights in the layers take ``weight`` bytes; head and embedding are float16."""
        vocabulary, head = 151936, 128
        attention = 2 * self.hidden * head * (self.heads + self.groups)
        ffn = 3 * self.hidden * self.width * max(self.experts, 1) + self.hidden * self.experts
        table = vocabulary * self.hidden
        model = ModelFacts(
            model_type="qwen3",
            hidden_size=self.hidden,
            vocab_size=vocabulary,
            num_layers=self.layers,
            num_attention_heads=self.heads,
            num_kv_heads=self.groups,
            head_dim=head,
            max_position_embeddings=40960,
            eos_token_ids=[],
            parameters=self.layers * (attention + ffn) + table * (1 if self.tied else 2),
            tied_embedding=self.tied,
        )
        layer = LayerFacts(num_experts=self.experts, top_k=self.chosen, shared_width=0, expert_width=self.width)
        moe = MoEFacts(layers=dict.fromkeys(range(self.layers), layer)) if self.experts else None
        found = of_model(model, moe, weight=weight, cached=HALF)
        parts = [
            Part(part.name, part.parameters, part.parameters * HALF, part.share) if part.name in ("head", "embedding")
            else part
            for part in found.parts
        ]  # fmt: skip
        return Needs(tuple(parts), found.cache_bytes, found.attention)


A3B = Shape(48, 2048, 768, 32, 4, tied=False, experts=128, chosen=8)
Q8B = Shape(36, 4096, 12288, 32, 8, tied=False)
Q4B = Shape(36, 2560, 9728, 32, 8, tied=True)
Q17B = Shape(28, 2048, 6144, 16, 8, tied=True)
Q06B = Shape(28, 1024, 3072, 16, 8, tied=True)
THOR, ORIN, NX = "jetson-agx-thor", "jetson-agx-orin", "jetson-orin-nx"
NANO, SUPER = "jetson-orin-nano", "jetson-orin-nano-super"  # which of the two its page does not say

DECODE = [
    ("Qwen3-30B-A3B", A3B, THOR, "INT4", INT4, 1, 128, 85.8),
    ("Qwen3-30B-A3B", A3B, THOR, "INT4", INT4, 8, 128, 232.1),
    ("Qwen3-30B-A3B", A3B, ORIN, "INT4", INT4, 1, 128, 56.7),
    ("Qwen3-30B-A3B", A3B, ORIN, "INT4", INT4, 8, 128, 163.3),
    ("Qwen3-30B-A3B", A3B, THOR, "NVFP4", NVFP4, 1, 128, 90.4),
    ("Qwen3-30B-A3B", A3B, THOR, "NVFP4", NVFP4, 8, 128, 252.8),
    ("Qwen3-30B-A3B", A3B, THOR, "NVFP4", NVFP4, 1, 2048, 84.8),
    ("Qwen3-8B", Q8B, ORIN, "INT4", INT4, 1, 128, 32.5),
    ("Qwen3-4B", Q4B, THOR, "NVFP4", NVFP4, 1, 128, 80.5),
    ("Qwen3-4B", Q4B, ORIN, "INT4", INT4, 1, 128, 53.1),
    ("Qwen3-1.7B", Q17B, ORIN, "INT4", INT4, 1, 128, 98.6),
    ("Qwen3-1.7B", Q17B, NX, "INT4", INT4, 1, 128, 60.4),
    ("Qwen3-1.7B", Q17B, NANO, "INT4", INT4, 1, 128, 37.4),
    ("Qwen3-1.7B", Q17B, SUPER, "INT4", INT4, 1, 128, 37.4),
    ("Qwen3-0.6B", Q06B, ORIN, "INT4", INT4, 1, 128, 186.4),
    ("Qwen3-0.6B", Q06B, NX, "INT4", INT4, 1, 128, 117.4),
    ("Qwen3-0.6B", Q06B, NANO, "INT4", INT4, 1, 128, 72.8),
    ("Qwen3-0.6B", Q06B, SUPER, "INT4", INT4, 1, 128, 72.8),
]
"""Model, shape, device, precision, bytes of a weight, batch, tokens in the cache, published tokens a second."""

PROMPTS = [
    ("Qwen3-30B-A3B", A3B, THOR, "INT4", INT4, 61, 64.1),
    ("Qwen3-30B-A3B", A3B, ORIN, "INT4", INT4, 61, 91.0),
    ("Qwen3-30B-A3B", A3B, THOR, "NVFP4", NVFP4, 61, 57.1),
    ("Qwen3-30B-A3B", A3B, THOR, "NVFP4", NVFP4, 2048, 137.0),
]
"""The same, with tokens of the prompt and published milliseconds."""


def main() -> None:
    """Print both tables in Markdown."""
    print("| model | device | weights | batch | cache | bound, tokens/s | published | published / bound |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape, device, kind, weight, batch, context, published in DECODE:
        needs = shape.needs(weight)
        least = step_bound(
            needs.decode_bytes(context, batch), needs.decode_products(context, batch), devices.load(device)
        )
        bound = 1e3 * batch / least.ms
        print(
            f"| {name} | {device} | {kind} | {batch} | {context} | {bound:.1f} | {published} | "
            f"{published / bound:.0%} |"
        )
    print("\n| model | device | weights | prompt | bound, ms | bound by | published, ms | bound / published |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape, device, kind, weight, tokens, published in PROMPTS:
        needs = shape.needs(weight)
        least = step_bound(needs.prompt_bytes(tokens), needs.prompt_products(tokens), devices.load(device))
        print(
            f"| {name} | {device} | {kind} | {tokens} | {least.ms:.1f} | {least.by} | {published} | "
            f"{least.ms / published:.0%} |"
        )


if __name__ == "__main__":
    main()
