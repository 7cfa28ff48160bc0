"""How much of a device an engine takes, and how fast its memory lets it be."""

from moedge.configs import devices
from moedge.export.device import estimate
from moedge.export.manifest import ModelFacts

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


def test_fit_counts_weights_cache_and_logits() -> None:
    device = devices.load("jetson-agx-orin")
    fit = estimate.fit(MODEL, 270_000_000, device, max_length=2048, max_prompt=1024, batch=1)
    cache = 2048 * 30 * 2 * 3 * 64 * 2  # tokens, layers, key and value, heads, size, bytes
    assert fit.cache == 2 * cache
    assert fit.needed == 270_000_000 + 2 * cache + 1024 * 49152 * 2
