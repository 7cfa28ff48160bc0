"""MoEPlan: the pure-data result of every conversion method.

A plan says, for each layer, which neurons are shared, which belong to which routed expert, how tokens are routed and
how expert outputs are combined. It holds no weights of the dense model except the few rows a router or a refit needs;
weights that become zero are bits.
It is saved as ``plan.json`` + ``plan.safetensors`` and named by a content hash: two runs compare by one line.

Semantics, for one token ``x`` with selected set ``K`` (``|K| = top_k``)::

    y = shared(x) + sum_{e in K} w_e(x) * (E_e(x) + expert_bias_e) + sum_{e not in K} compensation_e + output_bias

Experts share no neuron unless the layer says ``overlapping`` (DIVE: every expert is a pruned copy of the FFN). A neuron
that is in neither the shared set nor an expert is pruned (static methods prune, partitions do not).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moedge import MoEdgeError
from moedge._files import canonical_json, write_json
from moedge.convert import zeros as zero_bits
from moedge.convert.errors import translated
from moedge.convert.sources.folder_check import read_object

PLAN_SCHEMA = "moedge.plan/1"
RAMP = 0.1
"""Width of a threshold's ramp, in units of the threshold (:mod:`moedge.convert.ops.gather`; docs/gather.md)."""
SMALLEST_RAMP = 1e-3
"""A rounding of x may count 2 + 1 / ramp times; and the smallest threshold times it is still a normal float32."""
SMALLEST_THRESHOLD = 1e-30
"""Leaves nothing out but 0; a threshold of 0 would divide by it."""

THRESHOLDS = ("x_threshold", "h_threshold", "qkv_threshold", "o_threshold", "head_threshold")
"""Fields of :class:`LayerPlan` that leave small values out."""

CombineRule = Literal["unit", "scaled", "softmax", "probability", "normalised"]
"""Weight of a selected expert: ``unit`` 1; ``scaled`` 1 + scale_e * softmax(scores)_e (CMoE sec. 3.3); ``softmax``
softmax over the selected scores; ``probability`` softmax over all scores, not renormalised (ExpertWeaver sec. 4);
``normalised`` score over the sum of the selected scores, which only a sigmoid router may use."""


PROMPT_ROUTER = "prompt"
"""Kind of router of a plan whose experts each prompt chooses: for evaluation alone (:mod:`moedge.convert.prompted`)."""


@dataclass
class RouterPlan:
    """A router kind (a key of ``convert.routers.ROUTERS``) with its float32 tensors and options."""

    kind: str
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


_NUMBERS = ("selection_bias", "scale", "compensation", "expert_bias", "output_bias", "down")
"""Tensors of a layer's plan that hold weights."""


@dataclass
class LayerPlan:
    """What one FFN becomes.

    Shapes: H hidden size, E ``len(experts)``. Widths of experts may differ.
    ``shared`` int32 [S]; ``experts`` E arrays int32 [I_e]; ``selection_bias`` float32 [E] (added to the scores for
    selection only); ``scale`` float32 [E] (``scaled`` rule only); ``compensation`` float32 [E, H];
    ``expert_bias`` float32 [E, H], part of an expert's output, so it is weighted with it; ``output_bias`` float32 [H],
    added to what the dense FFN's down projection has of its own; ``down`` float32 [H, D], a refitted down projection
    in the dense neuron order; ``zeros`` uint8 [3, D, ceil(H / 8)], bits of the weights of gate, up and down that become
    zero, in the dense neuron order too (:mod:`moedge.convert.zeros`).
    ``overlapping`` allows a neuron in several experts (each keeps its own copy), but not twice in one of them.
    ``report`` is plain JSON for people (dead-neuron share, iterations); it is part of the content hash.

    ``x_threshold`` float32 [H] and ``h_threshold`` float32 [D], in the dense neuron order, leave out small inputs of
    gate and up and small hidden values, token by token (:mod:`moedge.convert.ops.gather`); the router reads all of x.
    ``qkv_threshold`` float32 [H] and ``o_threshold`` float32 [A] (query heads x their width) do so for the inputs of
    the layer's attention and of its output projection, and ``head_threshold`` float32 [H], in the last layer's plan
    alone, for the inputs of the model's output projection. ``ramp`` is the width of all these ramps.

    ``children`` nests: one plan for each expert of a parent that is a Mixture-of-Experts already, against the width of
    that expert. Such a layer has nothing else; a child without experts that shares every neuron stays dense, and
    ``children=[]`` leaves the whole layer as it is.
    """

    shared: np.ndarray
    experts: list[np.ndarray]
    top_k: int
    router: RouterPlan | None = None
    combine: CombineRule = "unit"
    selection_bias: np.ndarray | None = None
    scale: np.ndarray | None = None
    compensation: np.ndarray | None = None
    expert_bias: np.ndarray | None = None
    output_bias: np.ndarray | None = None
    down: np.ndarray | None = None
    zeros: np.ndarray | None = None
    x_threshold: np.ndarray | None = None
    h_threshold: np.ndarray | None = None
    qkv_threshold: np.ndarray | None = None
    o_threshold: np.ndarray | None = None
    head_threshold: np.ndarray | None = None
    ramp: float = RAMP
    report: dict[str, Any] = field(default_factory=dict)
    overlapping: bool = False
    children: list[LayerPlan] | None = None

    @property
    def gathers(self) -> bool:
        """Whether small values are left out anywhere."""
        return bool(self.thresholds)

    @property
    def thresholds(self) -> dict[str, np.ndarray]:
        """The thresholds that the layer has, by field name (one of :data:`THRESHOLDS`)."""
        values = ((name, getattr(self, name)) for name in THRESHOLDS)
        return {name: value for name, value in values if value is not None}

    def with_thresholds(self, values: Mapping[str, np.ndarray | None], ramp: float) -> LayerPlan:
        """Return a copy with other thresholds, by field name; those that are not named stay."""
        made = replace(self, ramp=ramp)
        for name, value in values.items():
            if name not in THRESHOLDS:
                raise KeyError(name)
            setattr(made, name, value)
        return made

    @property
    def num_experts(self) -> int:
        """Number of routed experts, E."""
        return len(self.experts)

    @property
    def expert_width(self) -> int:
        """Widest routed expert, I (narrower ones are zero-padded when the plan is applied)."""
        return max((len(expert) for expert in self.experts), default=0)

    @property
    def active_width(self) -> float:
        """Neurons that run for one token: shared plus top_k times the mean expert width (of a mean child)."""
        if self.children:
            return sum(child.active_width for child in self.children) / len(self.children)
        mean = sum(map(len, self.experts)) / self.num_experts if self.experts else 0.0
        return len(self.shared) + self.top_k * mean

    def stored_weights(self, hidden: int) -> tuple[int, int]:
        """Weights of gate, up and down that the layer stores, for ``hidden`` inputs, and how many the plan zeroes."""
        if self.children is not None:
            pairs = [child.stored_weights(hidden) for child in self.children]
            return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        neurons = np.concatenate([self.shared, *self.experts])
        zero = 0 if self.zeros is None else int(zero_bits.counts(self.zeros)[neurons].sum())
        return 3 * hidden * neurons.size, zero

    def differs_from_dense(self, width: int) -> str | None:
        """Say why this layer is not the dense FFN even with every expert selected, or return None when it is."""
        if self.children is not None:
            return next(filter(None, (child.differs_from_dense(width) for child in self.children)), None)
        if self.gathers:
            return "small inputs are left out"
        if self.overlapping:
            return "experts share neurons"
        if len(self.shared) + sum(map(len, self.experts)) < width:
            return "neurons are pruned"
        if self.zeros is not None:
            return "weights are set to zero"
        if self.down is not None:
            return "down projections are refitted"
        if self.output_bias is not None or self.expert_bias is not None:
            return "an output bias is added"
        return None if self.combine == "unit" or not self.experts else "experts are weighted"

    def validate(self, width: int, where: str, hidden: int | None = None) -> None:
        """Check the layer against a dense FFN of ``width`` neurons and, if it is known, ``hidden`` inputs.

        Raises:
            MoEdgeError: a neuron out of range or used twice, top_k out of range, experts without a router, a bias
                of another number of experts, zeros of another shape, or numbers that are not finite.
        """
        if self.zeros is not None:
            zero_bits.check(self.zeros, width, hidden, where)
        if self.children is not None:
            self._validate_children(width, where, hidden)
            return
        neurons = np.concatenate([self.shared, *self.experts]) if self.experts else self.shared
        if neurons.size and (neurons.min() < 0 or neurons.max() >= width):
            raise MoEdgeError(f"{where}: a neuron index is outside 0..{width - 1}; the plan is for another model.")
        sets = [np.concatenate([self.shared, expert]) for expert in self.experts] if self.overlapping else [neurons]
        if any(np.unique(part).size != part.size for part in sets):
            raise MoEdgeError(f"{where}: a neuron is assigned twice; every neuron belongs to at most one expert.")
        if not 0 <= self.top_k <= self.num_experts:
            raise MoEdgeError(f"{where}: top_k={self.top_k} must be between 0 and num_experts={self.num_experts}.")
        if self.combine == "normalised" and self.router is not None and self.router.kind != "sigmoid":
            raise MoEdgeError(
                f"{where}: the weight rule 'normalised' divides by the sum of the scores, which a {self.router.kind!r} "
                "router does not keep positive; use a 'sigmoid' router or another rule."
            )
        if self.top_k and self.router is None:
            raise MoEdgeError(f"{where}: {self.num_experts} experts but no router.")
        if self.expert_bias is not None and len(self.expert_bias) != self.num_experts:
            raise MoEdgeError(f"{where}: {len(self.expert_bias)} expert biases for {self.num_experts} experts.")
        if not neurons.size:
            raise MoEdgeError(f"{where}: no neuron is kept.")
        _check_finite(self, where)
        _check_thresholds(self, width, hidden, where)

    def _validate_children(self, width: int, where: str, hidden: int | None) -> None:
        assert self.children is not None
        if self.experts or self.shared.size:
            raise MoEdgeError(f"{where}: a layer with children has no neurons of its own.")
        if self.gathers or any(child.gathers for child in self.children):
            raise MoEdgeError(f"{where}: small values cannot be left out of experts inside experts.")
        for number, child in enumerate(self.children):
            child.validate(width, f"{where}, expert {number}", hidden)


def _check_finite(layer: LayerPlan, where: str) -> None:
    own = {name: getattr(layer, name) for name in _NUMBERS}
    for name, value in {**own, **(layer.router.tensors if layer.router else {})}.items():
        if value is not None and not np.isfinite(value).all():
            raise MoEdgeError(f"{where}: {name} has values that are not finite.")


def _check_thresholds(layer: LayerPlan, width: int, hidden: int | None, where: str) -> None:
    sizes = {"h_threshold": width, "o_threshold": None}  # how wide attention is, a plan does not know
    for name, value in layer.thresholds.items():
        size = sizes.get(name, hidden)
        what = "neurons" if name == "h_threshold" else "inputs"
        if value.ndim != 1 or (size is not None and len(value) != size):
            raise MoEdgeError(f"{where}: {name} has shape {value.shape}, not one value for each of {size} {what}.")
        if not (np.isfinite(value).all() and (value >= SMALLEST_THRESHOLD).all()):
            raise MoEdgeError(f"{where}: {name} must be finite and at least {SMALLEST_THRESHOLD:g}.")
    if layer.gathers and not SMALLEST_RAMP <= layer.ramp <= 10:
        raise MoEdgeError(f"{where}: ramp={layer.ramp:g} must be at least {SMALLEST_RAMP:g} and at most 10.")


def zero_share(layers: list[LayerPlan], hidden_size: int) -> float:
    """Return the share of the FFN weights in the checkpoint that layers set to zero."""
    pairs = [layer.stored_weights(hidden_size) for layer in layers]
    stored = sum(pair[0] for pair in pairs)
    return sum(pair[1] for pair in pairs) / stored if stored else 0.0


@dataclass
class MoEPlan:
    """A whole conversion: ``layers[i]`` for the i-th FFN of the model, and what it was made from.

    ``model`` names the dense parent (model_type, hidden_size, intermediate_size, num_layers, hidden_act, sha256).
    ``provenance`` is JSON: calibration text hashes, token counts, protocol. No clock times: equal inputs
    give equal hashes.
    """

    method: str
    params: dict[str, Any]
    model: dict[str, Any]
    layers: list[LayerPlan]
    provenance: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Check every layer; see :meth:`LayerPlan.validate`."""
        for index, layer in enumerate(self.layers):
            layer.validate(int(self.model["intermediate_size"]), f"plan layer {index}", int(self.model["hidden_size"]))

    def made_of(self, sha256: str) -> bool:
        """Whether the dense parent is the folder with this hash, as far as the plan says."""
        return self.model.get("sha256") in ("", None, sha256)

    @property
    def zero_share(self) -> float:
        """Share of the FFN weights in the checkpoint that the plan sets to zero; 0 when training came afterwards."""
        return zero_share(self.layers, int(self.model["hidden_size"]))

    @property
    def trained_weights(self) -> bool:
        """Whether weights outside the plan were trained, so that it cannot be applied to its dense parent any more."""
        return bool(self.provenance.get("finetune", {}).get("weights"))

    def differs_from_dense(self) -> str | None:
        """Say why the model is not its dense parent even with every expert selected, or return None when it is."""
        if self.trained_weights:
            return "weights are trained"
        width = int(self.model["intermediate_size"])
        return next(filter(None, (layer.differs_from_dense(width) for layer in self.layers)), None)

    def _split(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        tensors: dict[str, np.ndarray] = {}
        layers = [_split_layer(layer, f"layers.{i}.", tensors) for i, layer in enumerate(self.layers)]
        head = {
            "schema": PLAN_SCHEMA,
            "method": self.method,
            "params": self.params,
            "model": self.model,
            "provenance": self.provenance,
            "layers": layers,
        }
        return head, tensors

    @property
    def sha256(self) -> str:
        """Content hash over the JSON part and every tensor's name, dtype, shape and bytes."""
        head, tensors = self._split()
        digest = hashlib.sha256(canonical_json(head))
        for name in sorted(tensors):
            value = np.ascontiguousarray(tensors[name])
            digest.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` into an existing ``folder``."""
        from safetensors.numpy import save_file

        self.validate()
        head, tensors = self._split()
        write_json(folder / "plan.json", {**head, "sha256": self.sha256})
        save_file(tensors, folder / "plan.safetensors")

    @classmethod
    def load(cls, folder: Path) -> MoEPlan:
        """Read a plan and verify its content hash.

        Raises:
            MoEdgeError: a file is missing, of another schema, damaged, or does not match its hash.
        """
        from safetensors.numpy import load_file

        for name in ("plan.json", "plan.safetensors"):
            if not (folder / name).is_file():
                raise MoEdgeError(f"No plan in {folder}: {name} is missing.")
        head = read_object(folder / "plan.json")
        with translated(f"{folder / 'plan.safetensors'} is damaged", "Convert again."):
            tensors = load_file(folder / "plan.safetensors")
        if head.get("schema") != PLAN_SCHEMA:
            raise MoEdgeError(f"{folder / 'plan.json'} is not a {PLAN_SCHEMA} file; convert again with this version.")
        with translated(f"Plan in {folder} is incomplete", "Convert again."):  # a damaged one lacks anything
            plan = cls._join(head, tensors)
            sha256 = plan.sha256
        if sha256 != head.get("sha256"):
            raise MoEdgeError(f"Plan in {folder} does not match its own hash; it was changed. Convert again.")
        plan.validate()
        return plan

    @classmethod
    def _join(cls, head: dict[str, Any], tensors: dict[str, np.ndarray]) -> MoEPlan:
        routers: dict[str, dict[str, np.ndarray]] = {}
        for key, value in tensors.items():
            prefix, _, name = key.rpartition(".router.")
            if prefix:
                routers.setdefault(f"{prefix}.", {})[name] = value
        layers = [_join_layer(entry, f"layers.{i}.", tensors, routers) for i, entry in enumerate(head["layers"])]
        return cls(head["method"], head["params"], head["model"], layers, head["provenance"])


_OPTIONAL = (
    "selection_bias",
    "scale",
    "compensation",
    "expert_bias",
    "output_bias",
    "down",
    *THRESHOLDS,
)


def _split_layer(layer: LayerPlan, prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the JSON part of a layer; its tensors go into ``tensors`` under names that start with ``prefix``."""
    if layer.children is not None:
        children = [_split_layer(child, f"{prefix}children.{c}.", tensors) for c, child in enumerate(layer.children)]
        return {"children": children, "report": layer.report}
    tensors[f"{prefix}shared"] = layer.shared.astype(np.int32)
    routed = np.concatenate(layer.experts) if layer.experts else np.zeros(0)
    tensors[f"{prefix}experts"] = routed.astype(np.int32)
    for name in _OPTIONAL:
        value = getattr(layer, name)
        if value is not None:
            tensors[f"{prefix}{name}"] = np.ascontiguousarray(value, dtype=np.float32)
    if layer.zeros is not None:
        tensors[f"{prefix}zeros"] = np.ascontiguousarray(layer.zeros, dtype=np.uint8)
    router = None
    if layer.router is not None:
        router = {"kind": layer.router.kind, "options": layer.router.options}
        for name, value in layer.router.tensors.items():
            tensors[f"{prefix}router.{name}"] = np.ascontiguousarray(value)
    return {
        "expert_widths": [len(expert) for expert in layer.experts],
        "top_k": layer.top_k,
        "combine": layer.combine,
        "router": router,
        "report": layer.report,
        # Only when set, so that plans without it keep their hash.
        **({"overlapping": True} if layer.overlapping else {}),
        **({"ramp": layer.ramp} if layer.gathers else {}),
    }


def _join_layer(
    entry: dict[str, Any],
    prefix: str,
    tensors: dict[str, np.ndarray],
    routers: dict[str, dict[str, np.ndarray]],
) -> LayerPlan:
    """Undo :func:`_split_layer`; ``routers`` holds the router tensors of each prefix."""
    if "children" in entry:
        children = [
            _join_layer(child, f"{prefix}children.{c}.", tensors, routers) for c, child in enumerate(entry["children"])
        ]
        return LayerPlan(np.zeros(0, np.int32), [], 0, report=entry["report"], children=children)
    widths = entry["expert_widths"]
    routed = tensors[f"{prefix}experts"]
    if sum(widths) != routed.size:
        raise ValueError(f"{prefix.rstrip('.')}: expert widths do not add up")
    router = None
    if entry["router"] is not None:
        router = RouterPlan(entry["router"]["kind"], routers.get(prefix, {}), entry["router"]["options"])
    layer = LayerPlan(
        shared=tensors[f"{prefix}shared"],
        experts=np.split(routed, np.cumsum(widths)[:-1]) if widths else [],
        top_k=entry["top_k"],
        router=router,
        combine=entry["combine"],
        report=entry["report"],
        selection_bias=tensors.get(f"{prefix}selection_bias"),
        scale=tensors.get(f"{prefix}scale"),
        compensation=tensors.get(f"{prefix}compensation"),
        expert_bias=tensors.get(f"{prefix}expert_bias"),
        output_bias=tensors.get(f"{prefix}output_bias"),
        down=tensors.get(f"{prefix}down"),
        zeros=tensors.get(f"{prefix}zeros"),
        overlapping=entry.get("overlapping", False),
    )
    thresholds = {name: tensors.get(f"{prefix}{name}") for name in THRESHOLDS}
    return layer.with_thresholds(thresholds, entry.get("ramp", RAMP))
