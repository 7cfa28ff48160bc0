"""How much of a device an engine takes, and how fast its memory lets it be."""

import pytest

from moedge.configs import devices
from moedge.export.device import estimate
from moedge.export.manifest import LayerFacts, ModelFacts, MoEFacts

MODEL = ModelFacts(
    model_type="llama",
    hidden_size=576,
    vocab_size=49152,
    num_layers=30,
    num_attention_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=2048,
    eos_token_ids=[],
)


def test_only_the_experts_that_are_not_selected_are_unread() -> None:
    layers = {
        0: LayerFacts(num_experts=10, top_k=6, shared_width=4, expert_width=8),
        1: LayerFacts(num_experts=0, top_k=0, shared_width=4, expert_width=0),
    }
    assert estimate.unread_bytes(MoEFacts(layers=layers), 16) == 4 * 3 * 8 * 16 * 2
    assert estimate.unread_bytes(None, 16) == 0


def test_fit_counts_weights_cache_and_logits_and_bounds_the_speed() -> None:
    device = devices.load("jetson-agx-orin")
    fit = estimate.fit(MODEL, 270_000_000, device, max_length=2048, max_prompt=1024, batch=1)
    cache = 2048 * 30 * 2 * 3 * 64 * 2  # tokens, layers, key and value, heads, size, bytes
    assert fit.cache == 2 * cache
    assert fit.needed == 270_000_000 + 2 * cache + 1024 * 49152 * 2
    assert fit.bound_tokens_per_s == pytest.approx(204.8e9 / (270_000_000 + cache / 2))
