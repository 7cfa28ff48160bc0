"""What an engine needs of a device's memory, and how fast it can decode at best, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from moedge.configs.devices import Device
from moedge.export.manifest import ModelFacts, MoEFacts


@dataclass(frozen=True)
class Fit:
    """What one engine needs of a device, in bytes, and its bandwidth bound."""

    weights: int
    cache: int
    logits: int
    memory: int
    active: int
    bound_tokens_per_s: float

    @property
    def needed(self) -> int:
        """Bytes for weights, both halves of the cache and one prefill's logits; work space is not counted."""
        return self.weights + self.cache + self.logits


def fit(
    model: ModelFacts,
    weight_bytes: int,
    device: Device,
    *,
    max_length: int,
    max_prompt: int,
    batch: int,
    unread: int = 0,
    dtype: str = "float16",
) -> Fit:
    """Estimate memory, and the decode speed that bandwidth allows: the bytes of weights read, and a cache half full.

    Args:
        model: the ``model`` section of a bundle's manifest.
        weight_bytes: of the lowered graph. Its engine reads all of them for each token but ``unread``.
        device: the profile.
        max_length: tokens of the cache.
        max_prompt: most tokens of a prefill.
        batch: rows.
        unread: bytes of the experts that one token does not select, where they are plugins; 0 where every expert is
            computed (:mod:`moedge.export.lowering.trt.experts`).
        dtype: of the engine; the logits of a bfloat16 one are float32.
    """
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    cache = per_token * max_length * batch
    # A tied embedding is read whole, as the output projection. The cache is half full on average.
    active = weight_bytes - unread + cache // 2
    return Fit(
        weights=weight_bytes,
        cache=2 * cache,
        logits=batch * max_prompt * model.vocab_size * (4 if dtype == "bfloat16" else 2),
        memory=int(device.memory_gib * 2**30),
        active=active,
        bound_tokens_per_s=batch * device.bandwidth_gb_s * 1e9 / active,
    )


def too_large(fit: Fit, device: Device) -> str | None:
    """Return why an engine does not fit into a device's memory, or None."""
    if fit.needed <= fit.memory:
        return None
    return (
        f"The engine needs {fit.needed / 2**30:.1f} GiB (weights, cache, logits) and {device.label} has "
        f"{device.memory_gib:g}; lower --max-length, --max-prompt or --batch, or choose another device."
    )


def unread_bytes(moe: MoEFacts | None, hidden: int) -> int:
    """Bytes of half-precision experts that one token does not select: (E - k) * 3 * I * H * 2 in each layer.

    Args:
        moe: the ``moe`` section of a bundle's manifest; None for a dense model.
        hidden: H.
    """
    layers = moe.layers.values() if moe else ()
    return sum((layer.num_experts - layer.top_k) * 3 * layer.expert_width * hidden * 2 for layer in layers)
