"""What the routers of a converted model do, layer by layer (docs/methods.md 6.1), and how stable its partition is.

The MoE itself runs on the text, so every layer is judged on the inputs that it really gets. Each layer is worked on
while it runs and leaves only sums behind: nothing grows with the tokens or holds two layers at once.

T tokens, H hidden, E routed experts, k selected. What an expert adds to a token when it is selected is
``d_e = E_e(x) - compensation_e``; its value is ``|d_e|^2``, and the oracle's choice is the k experts of largest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from moedge import MoEdgeError
from moedge.convert import adapters, calibration, modeling
from moedge.convert.ops import activate
from moedge.convert.plan import LayerPlan, MoEPlan
from moedge.convert.rounding import six

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress


DIAGNOSTICS_SCHEMA = "moedge.diagnostics/1"
ERRORS = ("router", "oracle", "random", "static")
"""Who chooses the experts of a token: the router; the largest value; chance; or one fixed set, that with the largest
mean value on this very text."""
_CHUNK_BYTES = 64 << 20
"""Size of [E, T, H] that exists at a time."""


def diagnose(
    model: PreTrainedModel,
    token_windows: np.ndarray,
    *,
    dense_model: PreTrainedModel | None = None,
    k_a: int = 10,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a converted model on windows int64 [N, L] and describe the routing of each layer.

    Args:
        dense_model: its dense parent, whose FFNs the errors are then measured against. Without it the reference is
            the layer's own sum with every expert selected, which is the dense FFN unless the plan prunes or refits.
        k_a: a neuron is dead when it is among the ``k_a`` largest ``|h|`` of no token.
        batch_size: windows in one forward pass.
        progress: called with (windows done, windows).

    Returns:
        ``{"tokens", "reference", "layers", "mean"}``. A layer has ``layer``, ``experts``, ``top_k``, and

        - ``load`` [E]: share of the tokens that select each expert, ``load_cv``, ``dead_experts``;
        - ``dead_neurons``: share of the kept neurons;
        - ``agreement``: mean share of a token's selected experts that the oracle selects too, and what chance gives;
        - ``captured``: mean over tokens of value selected / value that the oracle selects;
        - ``relative_error``: for each of :data:`ERRORS` the root of the mean over tokens of ``|F - y|^2 / |F|^2``.

        What does not apply is None: a layer without experts is ``static``; with weights that sum to one (softmax, or
        pruned copies of the FFN as DIVE makes) an expert has no value of its own. ``mean`` averages over the layers.

    Raises:
        MoEdgeError: the model is not converted, or the dense model is of another shape.
    """
    pairs = _with_parents(model, dense_model)
    adapters.check_ids(model, token_windows)
    generator = torch.Generator().manual_seed(0)
    watched = [_Layer(ffn, block, k_a, generator) for ffn, block in pairs]
    handles = [layer.ffn.register_forward_hook(layer.on_call) for layer in watched]
    try:
        with torch.inference_mode():
            for start in range(0, len(token_windows), batch_size):
                batch = torch.from_numpy(token_windows[start : start + batch_size]).to(model.device)
                model.base_model(input_ids=batch, use_cache=False)
                if progress:
                    progress(start + len(batch), len(token_windows))
    finally:
        for handle in handles:
            handle.remove()
    layers = [layer.result() for layer in watched]
    reference = "the dense parent's FFN" if dense_model is not None else "the layer with every expert selected"
    return {"tokens": int(token_windows.size), "reference": reference, "layers": layers, "mean": _mean(layers)}


def _with_parents(
    model: PreTrainedModel, dense_model: PreTrainedModel | None
) -> list[tuple[modeling.SparseFFN, adapters.FFN | None]]:
    """Return every converted FFN with its dense parent, None without a dense model."""
    ffns = modeling.sparse_ffns(model)
    if not ffns:
        raise MoEdgeError(
            "The model has no converted FFN to diagnose; give a checkpoint of `moedge convert` (routing inside the "
            "experts of cmoe-hierarchical is not diagnosed)."
        )
    if dense_model is None:
        return [(ffn, None) for ffn in ffns]
    blocks = adapters.ffns(dense_model)
    if len(blocks) != len(ffns) or dense_model.config.hidden_size != model.config.hidden_size:
        raise MoEdgeError("The dense model has other layers than the converted one; give its dense parent.")
    return list(zip(ffns, blocks, strict=True))


class _Layer:
    """Sums over the tokens of one layer."""

    def __init__(
        self, module: modeling.SparseFFN, block: adapters.FFN | None, k_a: int, generator: torch.Generator
    ) -> None:
        self.ffn: Any = module  # its tensors are set by name
        self.block, self.k_a, self.generator = block, k_a, generator
        ffn: Any = self.ffn
        experts = ffn.num_experts
        self.tokens = 0
        self.load = torch.zeros(experts, dtype=torch.int64)
        self.agreed = self.captured = 0.0
        self.errors = dict.fromkeys(ERRORS, 0.0)
        # |r - sum over a fixed set of d_e|^2 for any set, from r.r, r.d_e and d_e.d_f
        self.square = 0.0
        self.cross = torch.zeros(experts, dtype=torch.float64)
        self.gram = torch.zeros(experts, experts, dtype=torch.float64)
        inner = ffn.gate.shape[0] * ffn.gate.shape[1] if experts else 0
        self.alive = torch.zeros(ffn.shared_gate.shape[0] + inner, dtype=torch.bool)
        kept = int(ffn.shared_gate.abs().sum(dim=1).count_nonzero())
        if experts:
            kept += int(ffn.gate.abs().sum(dim=2).count_nonzero())  # a narrower expert is padded with zero rows
        self.neurons = kept

    @property
    def valued(self) -> bool:
        """Whether an expert's output counts by itself: not where the weights of the selected ones sum to one.

        Experts with biases of their own are such copies of the whole FFN too (DIVE).
        """
        ffn = self.ffn
        return ffn.num_experts > 0 and ffn.combine in ("unit", "scaled") and ffn.expert_bias is None

    def on_call(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Hook: count what this call of the FFN did."""
        x, y = (value.reshape(-1, value.shape[-1]) for value in (args[0], output))
        rows = max(1, _CHUNK_BYTES // (4 * x.shape[1] * max(1, self.ffn.num_experts)))
        for start in range(0, len(x), rows):
            self._count(x[start : start + rows], y[start : start + rows].float())

    def _count(self, x: torch.Tensor, y: torch.Tensor) -> None:
        ffn: Any = self.ffn
        self.tokens += len(x)
        read = self._kept(x, ffn.x_threshold)
        gate = F.linear(read, ffn.shared_gate, ffn.shared_gate_bias)
        h = [activate(gate, ffn.activation) * F.linear(read, ffn.shared_up, ffn.shared_up_bias)]
        base = F.linear(self._kept(h[0], ffn.shared_h_threshold), ffn.shared_down, ffn.output_bias).float()
        deltas = x.new_zeros(0, len(x), x.shape[1])
        if ffn.num_experts:
            inputs = F.pad(read, (0, 1), value=1.0) if ffn.biased else read  # as in SparseFFN
            inner = inputs @ ffn.up.transpose(1, 2)  # [E, T, I]
            inner = activate(inputs @ ffn.gate.transpose(1, 2), ffn.activation) * inner
            limit = None if ffn.h_threshold is None else ffn.h_threshold.unsqueeze(1)
            deltas = (self._kept(inner, limit) @ ffn.down.transpose(1, 2)).float()
            h.append(inner.transpose(0, 1).flatten(1))
        hidden = torch.cat(h, dim=1).abs()
        largest = hidden.topk(min(self.k_a, hidden.shape[1]), dim=1).indices.unique()
        self.alive[largest.cpu()] = True
        target = self._target(x, base, deltas)
        if target is None:  # a layer without experts and nothing to compare it with
            return
        if not ffn.num_experts:
            self.errors["static"] += float(((target - y).square().sum(1) * _weight(target)).sum(dtype=torch.float64))
            return
        chosen = self._route(x)
        self.load += chosen.sum(dim=0).long().cpu()
        self.errors["router"] += float(((target - y).square().sum(1) * _weight(target)).sum(dtype=torch.float64))
        if not self.valued:
            return
        if ffn.compensation is not None:
            base = base + ffn.compensation.float().sum(dim=0)
            deltas = deltas - ffn.compensation.float().unsqueeze(1)
        self._compare(chosen, target - base, deltas, _weight(target))

    def _kept(self, values: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
        """Return the values that the layer reads."""
        if threshold is None:
            return values
        found: torch.Tensor = torch.ops.moedge.keep_large(values, threshold, self.ffn.ramp)
        return found

    def _target(self, x: torch.Tensor, base: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor | None:
        if self.block is not None:
            dense: torch.Tensor = self.block.module(x).float()
            return dense
        return base + outputs.sum(dim=0) if self.ffn.num_experts else None

    def _route(self, x: torch.Tensor) -> torch.Tensor:
        """Return the router's choice as a float32 mask [T, E]."""
        ffn: Any = self.ffn
        assert ffn.router is not None
        scores = ffn.router(x.float())
        indices, _ = torch.ops.moedge.route(scores, ffn.selection_bias, ffn.scale, ffn.top_k, ffn.combine)
        return torch.zeros_like(scores).scatter_(1, indices.long(), 1)

    def _compare(
        self, chosen: torch.Tensor, residual: torch.Tensor, deltas: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Count the choices of the oracle and of chance, and what any fixed set needs.

        Args:
            chosen: the router's mask [T, E]. residual: what the experts should add [T, H]. deltas: [E, T, H].
            weight: 1 / |F|^2 of each token [T].
        """
        value = deltas.square().sum(dim=2).T
        best = _top(value, self.ffn.top_k)
        self.agreed += float((chosen * best).sum(dtype=torch.float64)) / self.ffn.top_k
        most = (value * best).sum(dim=1)
        ratio = torch.where(most > 0, (value * chosen).sum(dim=1) / most.clamp_min(1e-30), torch.ones_like(most))
        self.captured += float(ratio.sum(dtype=torch.float64))
        dice = torch.rand(value.shape, generator=self.generator).to(value.device)
        for name, mask in (("oracle", best), ("random", _top(dice, self.ffn.top_k))):
            added = torch.bmm(mask.unsqueeze(1), deltas.transpose(0, 1)).squeeze(1)
            self.errors[name] += float(((residual - added).square().sum(1) * weight).sum(dtype=torch.float64))
        root = weight.sqrt().unsqueeze(1)
        flat, wanted = (deltas * root).flatten(1), (residual * root).flatten()
        self.square += float(wanted.square().sum(dtype=torch.float64))
        self.cross += (flat @ wanted).double().cpu()
        self.gram += (flat @ flat.T).double().cpu()

    def result(self) -> dict[str, Any]:
        """Return the layer's entry of ``diagnose``."""
        ffn: Any = self.ffn
        errors: dict[str, float | None] = dict.fromkeys(ERRORS)
        load: list[float] = []
        if ffn.num_experts:
            load = (self.load.double() / self.tokens).tolist()
            errors["router"] = self._rms(self.errors["router"])
        elif self.block is not None:
            errors["static"] = self._rms(self.errors["static"])
        if self.valued:
            fixed = self.gram.diagonal().topk(ffn.top_k).indices
            missed = self.square - 2 * float(self.cross[fixed].sum()) + float(self.gram[fixed][:, fixed].sum())
            errors |= {name: self._rms(self.errors[name]) for name in ("oracle", "random")}
            errors["static"] = self._rms(max(missed, 0.0))
        return {
            "layer": ffn.layer_index,
            "experts": ffn.num_experts,
            "top_k": ffn.top_k,
            "load": [six(share) for share in load],
            "load_cv": six(float(np.std(load) / np.mean(load))) if load else None,
            "dead_experts": int((self.load == 0).sum()),
            "dead_neurons": six(1 - int(self.alive.sum()) / self.neurons),
            "agreement": six(self.agreed / self.tokens) if self.valued else None,
            "agreement_by_chance": six(ffn.top_k / ffn.num_experts) if self.valued else None,
            "captured": six(self.captured / self.tokens) if self.valued else None,
            "relative_error": errors,
        }

    def _rms(self, total: float) -> float:
        return six((total / self.tokens) ** 0.5)


def _weight(target: torch.Tensor) -> torch.Tensor:
    return 1 / target.square().sum(dim=1).clamp_min(1e-20)


def _top(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(scores).scatter_(1, scores.topk(k, dim=1).indices, 1)


def _mean(layers: list[dict[str, Any]]) -> dict[str, Any]:
    def over(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return six(float(np.mean(known))) if known else None

    names = ("load_cv", "dead_neurons", "agreement", "agreement_by_chance", "captured")
    found: dict[str, Any] = {name: over([layer[name] for layer in layers]) for name in names}
    found["relative_error"] = {name: over([layer["relative_error"][name] for layer in layers]) for name in ERRORS}
    return found


# --- partition stability --------------------------------------------------------------------------------------------


def replan(dense_model: PreTrainedModel, plan: MoEPlan, token_windows: np.ndarray) -> MoEPlan:
    """Make the plan again, by its own method and parameters, from other calibration windows int64 [N, L].

    Raises:
        MoEdgeError: the method reads no calibration text, or needs more than windows.
    """
    from moedge.convert import methods

    method = methods.METHODS.get(plan.method)
    if method is None or not method.needs or not set(method.needs) <= {"tokens", "statistics", "gate_profile"}:
        raise MoEdgeError(f"A plan of {plan.method!r} does not follow from token windows; its stability is undefined.")
    settings = {name: plan.params[name] for name in method.params.model_fields if name in plan.params}
    data: Any = token_windows
    if "tokens" not in method.needs:
        gate = calibration.GateSampling(signal=settings["signal"]) if "gate_profile" in method.needs else None
        marks = {"k_a": settings.get("k_a", 10), "profile": settings.get("profile", "raw")}
        data = calibration.collect(dense_model, token_windows, **marks, gate=gate)
    return methods.convert(
        plan.method,
        data,
        dense_model,
        source_sha256=plan.model.get("sha256", ""),
        gather=plan.params.get("gather"),
        token_windows=token_windows,
        **settings,
    )


def stability(plans: Mapping[str, MoEPlan]) -> list[dict[str, Any]]:
    """Compare every two plans, e.g. of two halves of the calibration text or of two domains.

    Returns:
        For each pair ``between`` and the means over layers of ``shared``, the Jaccard index of the shared sets, and of
        ``experts``, the mean Jaccard index of experts matched one to one for the largest sum; None where there is
        nothing to compare. ``by_chance`` is what the second plan gives with its neurons renamed at random.
    """
    found = []
    for one, two in combinations(plans, 2):
        pairs = list(zip(plans[one].layers, plans[two].layers, strict=True))
        width = int(plans[one].model["intermediate_size"])
        renamed = [(a, _renamed(b, width, np.random.default_rng(i))) for i, (a, b) in enumerate(pairs)]
        entry: dict[str, Any] = {"between": [one, two]}
        for name, compare in (("shared", _shared_jaccard), ("experts", _experts_jaccard)):
            values = [(compare(*pair), compare(*chance)) for pair, chance in zip(pairs, renamed, strict=True)]
            known = [(value, chance) for value, chance in values if value is not None and chance is not None]
            entry[name] = None
            if known:
                value, chance = np.mean(known, axis=0)
                per_layer = [value if value is None else six(value) for value, _ in values]
                entry[name] = {"mean": six(value), "by_chance": six(chance), "layers": per_layer}
        found.append(entry)
    return found


def _renamed(layer: LayerPlan, width: int, generator: np.random.Generator) -> LayerPlan:
    order = generator.permutation(width)
    return LayerPlan(order[layer.shared], [order[expert] for expert in layer.experts], layer.top_k)


def _shared_jaccard(one: LayerPlan, two: LayerPlan) -> float | None:
    union = len(np.union1d(one.shared, two.shared))
    return len(np.intersect1d(one.shared, two.shared)) / union if union else None


def _experts_jaccard(one: LayerPlan, two: LayerPlan) -> float | None:
    from scipy.optimize import linear_sum_assignment

    if not one.experts or not two.experts:
        return None
    size = 1 + max(int(expert.max()) for layer in (one, two) for expert in layer.experts)
    member = [np.zeros((len(layer.experts), size)) for layer in (one, two)]
    for matrix, layer in zip(member, (one, two), strict=True):
        for row, expert in zip(matrix, layer.experts, strict=True):
            row[expert] = 1
    both = member[0] @ member[1].T
    jaccard = both / (member[0].sum(axis=1)[:, None] + member[1].sum(axis=1) - both)
    rows, columns = linear_sum_assignment(-jaccard)
    return float(jaccard[rows, columns].sum() / max(jaccard.shape))
