"""What ``manifest.json`` says: the facts of a bundle and of an engine folder, as types.

A key that this version does not know (a newer one wrote it) is kept; one that an older version did not write yet has a
default that means "not said". :meth:`Facts.document` gives the JSON back as it was.
This module needs neither torch nor onnx.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moedge import MoEdgeError
from moedge._files import digest, refuse_pointer, safe_join

MANIFEST = "manifest.json"
BUNDLE_SCHEMA = "moedge.bundle/1"
ENGINE_SCHEMA = "moedge.engine/1"
ARCHIVE_SCHEMA = "moedge.device-archive/1"

Layer = Annotated[int, Field(strict=False, ge=0)]
"""Index of a layer; JSON has it as a string, for it is a key."""


class Facts(BaseModel):
    """Base of every section: strict about what is known, and the unknown is kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True, protected_namespaces=())

    def document(self) -> dict[str, Any]:
        """Return the JSON object: what was read or set, nothing that was only a default."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class ModelFacts(Facts):
    """The decoder: what its graph, its cache and a generation loop depend on."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest sequence of the graph, which an export may have made shorter than the model's."""
    eos_token_ids: list[int]
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    rope_boundary: int | None = None
    """Tokens after which the rotary factors change (:mod:`moedge.runtime.engines.longrope`)."""
    dtype: str = "float32"
    """Of the checkpoint's weights."""
    parameters: int | None = None
    """Numbers in its weights, a shared table once."""
    tied_embedding: bool | None = None
    """Whether the embedding's table is also the output projection."""


class LayerFacts(Facts):
    """One FFN layer of a MoE. A pruned layer has no experts."""

    num_experts: int
    top_k: int
    shared_width: int
    expert_width: int
    parents: int | None = None
    """Of experts inside experts: how many there are outside."""
    dense_parents: int | None = None


class MoEFacts(Facts):
    """The conversion: plan and layers."""

    plan_sha256: str | None = None
    layers: dict[Layer, LayerFacts]
    ffn_read_share: float | None = None
    """Of the dense parent's FFN weights, what a token reads (:mod:`moedge.convert.reads`)."""

    @property
    def nested(self) -> bool:
        """Whether a layer holds experts inside experts."""
        return any(layer.parents is not None for layer in self.layers.values())


class Tap(Facts):
    """Where the routing of one layer can be read in a graph, or among the outputs of an engine."""

    output: str
    kind: Literal["indices", "scores"]
    """``output`` holds the selected experts [T, k], or scores [T, E] whose ``top_k`` best are selected."""
    top_k: int
    reads: str | None = None
    """What the layer's router reads, where its choice depends on nothing else (bundles of older versions lack it)."""
    reads_dtype: str | None = None


Which = Literal["x", "h", "expert_h", "qkv", "o", "head"]
"""What a layer leaves small values out of: the inputs of gate and up, the hidden values of the shared block, or those
of the routed experts; the inputs of attention, and of its output projection; and the inputs of the model's output
projection, whose layer is the number of layers."""
GatherPlace = tuple[int, Which]


class Kept(Facts):
    """Where what a layer leaves out can be seen in a graph: the values before and after. None: nowhere."""

    reads: str | None = None
    output: str | None = None


class CacheFacts(Facts):
    """How a graph takes its keys and values."""

    kind: Literal["concat", "shared_buffer"]
    max_length: int | None = None
    """Tokens that it can hold; None: as many as the model."""
    dtype: str | None = None
    """Of the cache and of the graph's arithmetic; None: float32."""


class IOFacts(Facts):
    """The ONNX file, its inputs and its outputs."""

    model: str
    inputs: list[str]
    outputs: list[str]


class SelfTestFacts(Facts):
    """What the executed test of a rewrite found."""

    max_rel_error: float
    quantisation_error: float | None = None


class RewriteFacts(Facts):
    """One rewrite of a lowering, see :class:`moedge.export.lowering.Rewrite`."""

    rewrite: str
    nodes: int
    status: str
    reason: str = ""
    self_test: SelfTestFacts | None = None


class ClassSize(Facts):
    """Bytes of one class of tensors, as floats and as they are stored."""

    tensor_class: str
    parameters: int
    float_bytes: int
    bytes: int
    bits_per_weight: float


class Rows(Facts):
    """Rows [start, end) of a stored matrix."""

    tensor: str
    rows: tuple[int, int] = Field(strict=False)


class StackPlace(Facts):
    """A stack of experts, each of which is stored in a matrix of its own."""

    layout: str
    columns: int
    experts: list[Rows]


class RowsPlace(Rows):
    """A weight whose rows lie in a stored matrix, or in a stack (``ENK``) as ``part`` of it."""

    layout: str
    columns: int
    part: str | None = None


class PackedPlace(Facts):
    """A weight among the ``total`` outputs of a tensor in the layout of our own operators (``ort_ops/pack.py``)."""

    tensor: str
    outputs: tuple[int, int] = Field(strict=False)
    total: int
    layout: str
    interleaved_inputs: int = 0
    """K of weights that are stored interleaved; 0: rows."""


class LinearPlace(Facts):
    """A weight that a DequantizeLinear node of the graph makes."""

    tensor: str
    axis: int
    block: int
    shape: list[int]
    merged: bool


Place = StackPlace | RowsPlace | PackedPlace | LinearPlace


class Calibration(Facts):
    """The text that a quantisation was fitted to."""

    tokens: int
    sha256: str


class Quantization(Facts):
    """What a quantised bundle holds and where."""

    bits: int
    block: int | str
    method: str
    classes: list[ClassSize]
    tensors: dict[str, Place]
    """By name of the weight in the portable graph."""
    form: str | None = None
    calibration: Calibration | None = None


class Kernel(Facts):
    """A plugin kernel that a graph needs, see :class:`moedge.export.device.plugins.Request`."""

    plugin: str
    options: dict[str, Any]


class Plugins(Facts):
    """TensorRT plugins that a graph needs."""

    oldest_tensorrt: str
    kernels: list[Kernel]


class Operators(Facts):
    """A library of operators of our own, which ONNX Runtime loads before the graph."""

    domain: str
    library: str
    """File in the bundle."""
    machine: str
    """Processors that it is compiled for, as ``platform.machine()`` names them."""
    sources: str
    """Folder in the bundle with its sources: what another machine compiles."""


class FileEntry(Facts):
    """One file of a folder."""

    sha256: str
    size: int


class Sealed(Facts):
    """What every manifest says: of a bundle, of an engine folder and of a device archive."""

    schema_: str = Field(alias="schema")
    target: str
    kind: Literal["moe", "dense"]
    label: str
    model: ModelFacts
    moe: MoEFacts | None
    taps: dict[Layer, Tap]
    keeps: dict[Layer, dict[Which, Kept]] = {}
    """Layers that leave small values out: where that can be seen."""
    versions: dict[str, str]
    files: dict[str, FileEntry]
    parent: str | None = None
    """Content hash of the bundle that it was made from."""
    checkpoint: str | None = None
    """Hash of the checkpoint that it was exported from (:func:`moedge.convert.sources.identity`)."""

    @property
    def layers(self) -> dict[int, LayerFacts]:
        """FFN layers of a MoE; none of a dense model."""
        return self.moe.layers if self.moe and self.kind == "moe" else {}

    @property
    def routed_layers(self) -> list[int]:
        """Layers with experts, in order."""
        return sorted(layer for layer, facts in self.layers.items() if facts.num_experts)

    @property
    def shows_kept(self) -> bool:
        """Whether everything that is left out can be seen."""
        return all(place.reads and place.output for kept in self.keeps.values() for place in kept.values())

    @property
    def names_reads(self) -> bool:
        """Whether it names for each routed layer what its router reads."""
        return all(layer in self.taps and self.taps[layer].reads is not None for layer in self.routed_layers)


class Manifest(Sealed):
    """``manifest.json`` of a bundle."""

    io: IOFacts
    cache: CacheFacts
    lowering: list[RewriteFacts]
    limits: list[str] = []
    quantization: Quantization | None = None
    plugins: Plugins | None = None
    operators: Operators | None = None
    """Present where a graph needs them; without, it is ONNX Runtime's own operators alone."""
    experts: str | None = None
    """Of a TensorRT target: the form of the experts (:mod:`moedge.export.lowering.trt.experts`)."""

    @property
    def weight_files(self) -> list[str]:
        """Files with the graph's weights."""
        return [name for name in self.files if name.endswith(".data")]

    @property
    def weight_bytes(self) -> int:
        """Their bytes."""
        return sum(self.files[name].size for name in self.weight_files)


class Profiles(Facts):
    """Sizes that an engine was built for: tokens of the cache, most tokens of a prefill, most rows."""

    max_length: int
    max_prompt: int
    batch: int


class BuildFacts(Facts):
    """How an engine was built: seconds on the wall and of the CPU, layers and plugins among them, bytes."""

    build_s: float
    build_cpu_s: float
    layers: int
    plugins: int
    engine_bytes: int
    products_as_sums: int = 0


class FitFacts(Facts):
    """What an engine needs of one device, see :mod:`moedge.export.device.estimate`; bytes.

    ``active``: that a decode step reads, None where the bundle does not tell; with the device's bandwidth it bounds the
    tokens a second of all rows.
    """

    weights: int
    cache: int
    logits: int
    memory: int
    active: int | None
    bound_tokens_per_s: float | None
    needed: int


Shape = Annotated[tuple[int, ...], Field(strict=False)]


class EngineManifest(Sealed):
    """``manifest.json`` of an engine folder, which ``moedge build`` wrote."""

    profiles: Profiles
    compute_capabilities: list[str]
    dtype: str | None = None
    devices: list[str] = []
    profile_shapes: dict[str, dict[str, list[Shape]]] = {}
    """Phase -> input -> its smallest, usual and largest shape."""
    weight_bytes: int | None = None
    build: BuildFacts | None = None
    estimate: dict[str, FitFacts] = {}
    """By device."""


class ArchiveManifest(Sealed):
    """``manifest.json`` of a device archive, which ``moedge pack`` writes and the scripts in it read."""

    target: str = "tensorrt"
    """Not written: there are archives for no other."""
    lowering: list[RewriteFacts]
    plugins: Plugins | None = None
    experts: str | None
    """Form of the experts, as in :class:`Manifest`."""
    dtype: str | None
    device: dict[str, Any]
    """The profile, see :class:`moedge.configs.devices.Device`."""
    tensorrt: str
    """Version on the device."""
    profiles: Profiles
    limits: dict[str, float]
    """What the device judges by, see :func:`moedge.export.device.archive.limits`."""
    tolerances: dict[str, Any] | None = None
    """The user's file of limits, where there is one."""
    content_sha256: str


AnySealed = TypeVar("AnySealed", bound=Sealed)
_SCHEMAS: dict[type[Sealed], str] = {Manifest: BUNDLE_SCHEMA, EngineManifest: ENGINE_SCHEMA}
_MEND: dict[type[Sealed], str] = {Manifest: "export again", EngineManifest: "build the engine again"}


def load(folder: Path, mend: str = "export again") -> object:
    """Return the JSON value of a folder's manifest, whatever it is; ``mend`` says what to do about a damaged one.

    Raises:
        FileNotFoundError: there is none.
        MoEdgeError: a link, a Git LFS pointer, or no JSON: no number is NaN or infinite.
    """
    path = safe_join(folder, MANIFEST)
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
        if _deeper(value, _DEEPEST):
            raise ValueError(f"its values are nested more than {_DEEPEST} deep")
        return value
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise MoEdgeError(f"{path} cannot be read ({error}); {mend}.") from error
    except (ValueError, RecursionError) as error:
        raise MoEdgeError(f"{path} cannot be read: it is not valid JSON ({error}); {mend}.") from error


def _finite(text: str) -> float:
    """A number of JSON, which has no NaN and no infinity; 1e999 would be one."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


_DEEPEST = 100
"""No manifest is as deep as 10. pydantic writes 255 levels, Python's JSON about 1000, and each fails in its own way."""


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than ``levels`` deep."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inside is not None and (levels == 0 or any(_deeper(each, levels - 1) for each in inside))


def parse(kind: type[AnySealed], document: object, path: Path, mend: str | None = None) -> AnySealed:
    """Check the JSON value of the manifest at ``path``; ``mend`` as in :func:`load`.

    Raises:
        MoEdgeError: another schema, a missing key, or a value of another shape.
    """
    schema, mend = _SCHEMAS[kind], mend or _MEND[kind]
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise MoEdgeError(f"{path} is not of schema {schema}; {mend} with this version.")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = error.errors()
        if missing := [str(p["loc"][0]) for p in problems if p["type"] == "missing" and len(p["loc"]) == 1]:
            raise MoEdgeError(f"{path} lacks {', '.join(missing)}; {mend}.") from error
        place = problems[0]["loc"]
        name = f"the entry of {place[1]}" if place[0] == "files" and len(place) > 1 else ".".join(map(str, place))
        raise MoEdgeError(f"{path} is damaged: {name} is not what it should be; {mend}.") from error


def content_hash(folder: Path) -> str:
    """Content hash of a bundle or an engine folder: that of its manifest, which holds the hash of every file.

    Raises:
        FileNotFoundError: it has no manifest.
        MoEdgeError: the manifest cannot be read.
    """
    return digest(load(folder))


def read(folder: Path, mend: str | None = None) -> Manifest | EngineManifest | None:
    """Read the manifest of a bundle or an engine folder; None where there is none, as in a checkpoint.

    The folder's files are not verified: this is for facts about it without opening it.

    Raises:
        MoEdgeError: it cannot be read, or is no manifest of this version.
    """
    try:
        document = load(folder, mend or "export again")
    except FileNotFoundError:
        return None
    if isinstance(document, dict) and document.get("schema") == ENGINE_SCHEMA:
        return parse(EngineManifest, document, folder / MANIFEST, mend)
    return parse(Manifest, document, folder / MANIFEST, mend)
