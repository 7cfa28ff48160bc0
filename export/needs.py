"""What a token needs of a model, whatever computes it: bytes of weights and cache that are read, multiplications.

At batch 1 a decode step takes at least as long as it takes to read the weights that its token needs and the keys and
values of the tokens before it; a prompt takes at least its multiplications. What a router does not select and what a
threshold leaves out is not needed, even where a runtime reads it. Thresholds, though, save something for few tokens at
a time only: a kernel reads a weight if any of the tokens that are computed together keeps its value, and multiplies it
for all of them; beyond :data:`FEW` tokens no kernel leaves anything out (docs/kernels-cpu.md, docs/kernels.md). So a
prompt of a gathered model needs what its dense parent's does. (What its output projection saves for the last token of a
prompt is not told apart from the FFNs, and not counted.) Activations, the logits and the writing of the cache are left
out: under a hundredth of the rest.

Symbols: V vocabulary, H hidden, L layers, A heads, G key/value heads, D head size, E experts, k chosen, I expert width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._files import read_json
from moedge.export import manifest as manifests
from moedge.export.manifest import ClassSize, EngineManifest, LayerFacts, Manifest, ModelFacts, MoEFacts

if TYPE_CHECKING:
    from moedge.convert.plan import MoEPlan

BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
"""Of a weight or a cached number by its type."""
_HEAD = "lm_head.weight"
FEW, FEW_FLOATS = 16, 20
"""Most tokens that are computed together for which a kernel leaves values out; float32 on a CPU
(``few_tokens`` in export/ort_ops/product.h; the tiles of :mod:`moedge.convert.ops.kernels.gathered` on a GPU)."""
FFN = ("ffn", "shared", "experts")
"""Classes of :data:`moedge.export.quantize.format.QUANTISED` that are FFNs."""


@dataclass(frozen=True)
class Part:
    """Weights of one kind."""

    name: str
    parameters: float
    bytes: float
    share: float = 1.0
    """That one token reads."""
    thresholds: Thresholds | None = None
    """Where a token reads less than what its router selects."""

    def read(self, tokens: int) -> float:
        """Bytes that ``tokens`` together read, if each takes its share of them at random."""
        return self.bytes * self._together(tokens)

    def multiplied(self, tokens: int) -> float:
        """Multiplications of ``tokens`` that are computed together."""
        share = self.share
        if self.thresholds is not None:  # a value that one of them keeps is multiplied for all of them
            share = min(self._together(tokens), self.thresholds.selected)
        return tokens * self.parameters * share

    def _together(self, tokens: int) -> float:
        """Share of the weights that at least one of the tokens reads."""
        many = self.thresholds is not None and tokens > self.thresholds.few
        share = self.thresholds.selected if self.thresholds and many else self.share
        return 1 - (1 - share) ** tokens


@dataclass(frozen=True)
class Thresholds:
    """What leaves small values out."""

    selected: float = 1.0
    """Share of the weights that a router selects for a token."""
    few: int = FEW
    """Most tokens that are computed together for which values are left out."""


@dataclass(frozen=True)
class Needs:
    """What a model needs."""

    parts: tuple[Part, ...]
    """The embedding's table (``embedding``) is looked up, the ``head`` read for the last token of a prompt alone."""
    cache_bytes: float
    """Of one position: keys and values of all layers."""
    attention: int
    """Multiplications of one token with one position before it: 2 L A D."""

    @property
    def stored(self) -> float:
        """Bytes of all weights."""
        return sum(part.bytes for part in self.parts)

    def whole(self) -> Needs:
        """The same model where every weight is read for every token, but for what is looked up."""
        looked_up = ("embedding", "other")
        parts = (part if part.name in looked_up else replace(part, share=1.0, thresholds=None) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def decode_bytes(self, context: float, batch: int = 1) -> float:
        """Bytes read by one decode step of ``batch`` rows after ``context`` tokens each."""
        return sum(part.read(batch) for part in self.parts) + batch * context * self.cache_bytes

    def decode_products(self, context: float, batch: int = 1) -> float:
        """Multiplications of the same step."""
        weights = sum(part.multiplied(batch) for part in self.parts if part.name != "embedding")
        return weights + batch * context * self.attention

    def prompt_bytes(self, tokens: int, batch: int = 1, past: int = 0) -> float:
        """Bytes read for prompts of ``tokens`` after ``past`` others: each weight once, however many tokens need it."""
        weights = sum(part.read(batch if part.name == "head" else batch * tokens) for part in self.parts)
        return weights + batch * past * self.cache_bytes

    def prompt_products(self, tokens: int, batch: int = 1, past: int = 0) -> float:
        """Multiplications of prompts of ``tokens`` after ``past`` others; the last token alone gives logits."""
        head = sum(part.multiplied(batch) for part in self.parts if part.name == "head")
        rest = sum(part.multiplied(batch * tokens) for part in self.parts if part.name not in ("head", "embedding"))
        seen = tokens * past + tokens * (tokens + 1) / 2  # each token sees itself and those before it
        return head + rest + batch * seen * self.attention


def facts(folder: Path) -> tuple[ModelFacts, MoEFacts | None, float | None]:
    """Return the model, its conversion, and the share of FFN weights that a token reads where values are left out.

    Raises:
        MoEdgeError: the folder holds no model, or does not say enough.
    """
    manifest = manifests.read(folder)
    if manifest is None:
        return facts_of_checkpoint(folder)
    told = with_tied(manifest, folder)
    return told.model, told.moe, _gathered(told)


def of_folder(folder: Path, dtype: str = "float32") -> Needs:
    """Return what the model in a folder needs: a bundle, an engine, or a checkpoint that PyTorch runs in ``dtype``.

    Raises:
        MoEdgeError: the folder does not say enough.
    """
    manifest = manifests.read(folder)
    if manifest is not None:
        return of_manifest(with_tied(manifest, folder))
    model, moe, share = facts(folder)
    few = FEW_FLOATS if dtype == "float32" else FEW
    return of_model(model, moe, weight=BYTES[dtype], cached=BYTES[dtype], share=share, few=few)


def of_manifest(manifest: Manifest | EngineManifest) -> Needs:
    """Return what the model of a bundle or an engine needs, in the precision that it is stored in.

    Raises:
        MoEdgeError: an older manifest does not say enough, or experts lie inside experts.
    """
    model, layers = manifest.model, manifest.moe
    dtype = manifest.cache.dtype if isinstance(manifest, Manifest) else manifest.dtype
    share = _gathered(manifest)
    sizes = manifest.quantization.classes if isinstance(manifest, Manifest) and manifest.quantization else None
    if sizes is None:
        wide, few = BYTES[dtype or "float32"], FEW_FLOATS if dtype in (None, "float32") else FEW
        return of_model(model, layers, weight=wide, cached=wide, share=share, few=few)
    parts = [_class_part(size, model, layers, share) for size in sizes]
    if not any(part.name == "head" for part in parts):  # one table that is looked up and multiplied by
        parts = [Part("head", part.parameters, part.bytes) if part.name == "embedding" else part for part in parts]
    return _needs(model, parts, BYTES[dtype or "float32"])


def of_model(
    model: ModelFacts,
    moe: MoEFacts | None,
    *,
    weight: float,
    cached: float,
    share: float | None = None,
    few: int = FEW,
) -> Needs:
    """Return what a model needs if each of its weights takes ``weight`` bytes and a cached number ``cached``.

    Args:
        model: of a manifest.
        moe: of a converted model.
        weight: bytes.
        cached: bytes.
        share: of the FFN weights that a token reads, where values are left out; see :mod:`moedge.convert.reads`.
        few: most tokens that are computed together for which they are.

    Raises:
        MoEdgeError: ``model`` does not say how many parameters it has, or whether its embedding is tied.
    """
    if model.parameters is None or model.tied_embedding is None:
        raise MoEdgeError("its manifest does not tell its parameters, or whether the embedding is tied: export again")
    table = model.vocab_size * model.hidden_size
    layers = _layers(moe)
    routed = [(3 * one.num_experts * one.expert_width * model.hidden_size, one) for one in layers if one.num_experts]
    shared = sum(3 * one.shared_width * model.hidden_size for one in layers)
    rest = model.parameters - table * (1 if model.tied_embedding else 2) - shared - sum(count for count, _ in routed)
    parts = [Part("head", table, table * weight), Part("attention and dense FFNs", rest, rest * weight)]
    if not model.tied_embedding:
        parts.append(Part("embedding", table, table * weight, 1 / model.vocab_size))
    if share is not None:
        whole = shared + sum(count for count, _ in routed)
        selected = shared + sum(count * one.top_k / one.num_experts for count, one in routed)
        parts.append(Part("gathered FFNs", whole, whole * weight, share, Thresholds(selected / whole, few)))
    else:
        if shared:
            parts.append(Part("shared experts", shared, shared * weight))
        parts += [Part("experts", count, count * weight, one.top_k / one.num_experts) for count, one in routed]
    return _needs(model, parts, cached)


def _needs(model: ModelFacts, parts: Sequence[Part], cached: float) -> Needs:
    return Needs(
        parts=tuple(parts),
        cache_bytes=2 * model.num_layers * model.num_kv_heads * model.head_dim * cached,
        attention=2 * model.num_layers * model.num_attention_heads * model.head_dim,
    )


def _layers(moe: MoEFacts | None) -> list[LayerFacts]:
    if moe is not None and moe.nested:
        raise MoEdgeError("what a token reads of experts inside experts is not known")
    return list(moe.layers.values()) if moe else []


def _gathered(manifest: Manifest | EngineManifest) -> float | None:
    """Share of the FFN weights that a token reads, of a model that leaves values out; None for any other."""
    if not manifest.keeps:
        return None
    share = manifest.moe.ffn_read_share if manifest.moe else None
    if share is None:
        raise MoEdgeError("its manifest does not tell how many weights its thresholds leave out: export again")
    return share


def _class_part(size: ClassSize, model: ModelFacts, moe: MoEFacts | None, gathered: float | None) -> Part:
    """One class of a quantised bundle."""
    name, share = size.tensor_class, 1.0
    if name == "other":  # tables of rotary factors, of which a token reads a row, and single numbers
        share = 0.0
    elif name == "experts":
        routed = [layer for layer in _layers(moe) if layer.num_experts]
        stored = sum(layer.num_experts * layer.expert_width for layer in routed)
        share = sum(layer.top_k * layer.expert_width for layer in routed) / stored if stored else 1.0
    elif name == "embedding":
        share = 1 / model.vocab_size
    if name in FFN and gathered is not None:
        return Part(name, size.parameters, size.bytes, gathered, Thresholds(share, FEW))
    return Part(name, size.parameters, size.bytes, share)


def with_tied(manifest: Manifest | EngineManifest, folder: Path) -> Manifest | EngineManifest:
    """Return a manifest that says whether the embedding is tied: of older ones, config.json beside them does."""
    if manifest.model.tied_embedding is not None or not (folder / "config.json").is_file():
        return manifest
    tied = read_json(folder / "config.json", "export again").get("tie_word_embeddings")
    model = manifest.model.model_copy(update={"tied_embedding": tied})
    return manifest.model_copy(update={"model": model})


def facts_of_checkpoint(folder: Path) -> tuple[ModelFacts, MoEFacts | None, float | None]:
    """Return the model, its conversion, and the share of FFN weights that is read, of a checkpoint's files.

    Weights are not read, only the headers of their files.

    Raises:
        MoEdgeError: no checkpoint or one that is not whole, a family whose config has other names, or experts that no
            plan describes.
    """
    from moedge.convert.sources import folder_check

    config = read_json(folder / "config.json", "download or save the model again")
    shapes = {name: shape for name, (_, shape) in folder_check.tensors(folder).items()}
    # Gemma's configs leave the key out, for theirs is tied by default: then no file holds the output projection.
    tied = bool(config.get("tie_word_embeddings")) or _HEAD not in shapes
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not (tied and name == _HEAD))
    plan = _plan(folder)
    if plan is None and (config.get("num_experts") or config.get("num_local_experts")):
        raise MoEdgeError("what a token reads of the experts that a model has by itself is not told by its files")
    try:
        model = _model_facts(config, parameters, tied)
    except KeyError as error:
        raise MoEdgeError(f"config.json of {folder} does not tell {error.args[0]}") from None
    if plan is None:
        return model, None, None
    from moedge.convert import reads

    share = reads.of_plan(plan) if any(layer.gathers for layer in plan.layers) else None
    if any(layer.children is not None for layer in plan.layers):
        raise MoEdgeError("what a token reads of experts inside experts is not known")
    layers = {
        index: LayerFacts(
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            shared_width=len(layer.shared),
            expert_width=layer.expert_width,
        )
        for index, layer in enumerate(plan.layers)
    }
    return model, MoEFacts(plan_sha256=plan.sha256, layers=layers), share


def _plan(folder: Path) -> MoEPlan | None:
    if not (folder / "plan.json").is_file():
        return None
    from moedge.convert.plan import MoEPlan

    return MoEPlan.load(folder)


def _model_facts(config: Mapping[str, Any], parameters: int, tied: bool) -> ModelFacts:
    heads = int(config["num_attention_heads"])
    return ModelFacts(
        model_type=str(config["model_type"]),
        hidden_size=int(config["hidden_size"]),
        vocab_size=int(config["vocab_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        max_position_embeddings=int(config["max_position_embeddings"]),
        eos_token_ids=[],
        parameters=parameters,
        tied_embedding=tied,
    )
