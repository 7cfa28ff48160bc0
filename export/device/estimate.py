"""What an engine needs of a device's memory, and what a step reads of it, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from moedge import MoEdgeError
from moedge.configs.devices import Device
from moedge.export.manifest import Manifest, ModelFacts
from moedge.export.needs import of_manifest


def sizes(positions: int, max_length: int | None, max_prompt: int | None, batch: int) -> dict[str, int]:
    """Return the sizes of an engine, which has at most 2048 tokens where nobody says how many.

    Args:
        positions: of the model.
        max_length: longest sequence.
        max_prompt: most tokens of a prefill; half of the longest sequence by default.
        batch: most rows.

    Raises:
        MoEdgeError: lengths that contradict each other or the model.
    """
    longest = max_length or min(2048, positions)
    if longest > positions:
        raise MoEdgeError(f"--max-length {longest} is beyond the model's {positions} positions; make it smaller.")
    prompt = max_prompt or max(2, longest // 2)
    if prompt > longest:
        raise MoEdgeError(f"--max-prompt {prompt} is more than the longest sequence, --max-length {longest}.")
    return {"max_length": longest, "max_prompt": prompt, "batch": batch}


@dataclass(frozen=True)
class Fit:
    """What one engine needs of a device's memory, in bytes."""

    weights: int
    cache: int
    logits: int
    memory: int

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
    dtype: str = "float16",
) -> Fit:
    """Estimate what an engine takes of a device's memory.

    Args:
        model: the ``model`` section of a bundle's manifest.
        weight_bytes: of the lowered graph.
        device: the profile.
        max_length: tokens of the cache.
        max_prompt: most tokens of a prefill.
        batch: rows.
        dtype: of the engine; the logits of a bfloat16 one are float32.
    """
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    return Fit(
        weights=weight_bytes,
        cache=2 * per_token * max_length * batch,
        logits=batch * max_prompt * model.vocab_size * (4 if dtype == "bfloat16" else 2),
        memory=int(device.memory_gib * 2**30),
    )


def decode_read(manifest: Manifest, *, max_length: int, batch: int) -> float | None:
    """Bytes that one decode step of an engine of this bundle reads, its cache half full; as ``moedge estimate`` says.

    None where an older bundle does not tell its parameters, or experts lie inside experts.
    """
    try:
        needs = of_manifest(manifest)
    except MoEdgeError:
        return None
    routed = manifest.moe is not None and any(layer.num_experts for layer in manifest.moe.layers.values())
    # Merged experts are all computed, and so is everything where no kernel leaves values out.
    selects = manifest.experts in ("native", "plugins") if routed else manifest.plugins is not None
    return (needs if selects else needs.whole()).decode_bytes(max_length / 2, batch)


def too_large(fit: Fit, device: Device) -> str | None:
    """Return why an engine does not fit into a device's memory, or None."""
    if fit.needed <= fit.memory:
        return None
    return (
        f"The engine needs {fit.needed / 2**30:.1f} GiB (weights, cache, logits) and {device.label} has "
        f"{device.memory_gib:g}; lower --max-length, --max-prompt or --batch, or choose another device."
    )
