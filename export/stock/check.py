"""Measure a stock checkpoint (:mod:`moedge.export.stock.glm`) against the converted model that it was made from.

**The bound on the logits.** For fixed expert sets a logit is a smooth function f of all expert weights W (one for each
layer, token and selected expert). Ours is f(1), theirs f(w). By the midpoint rule

    f(1) - f(w) = sum_i g_i (1 - w_i) + O(|1 - w|^3),   g = gradient of f at (1 + w) / 2,

so ``|f(1) - f(w)| <= sum_i |g_i| d_i`` with d_i the bound on ``|1 - w_i|`` that follows from eps, plus the rounding of
two float32 evaluations. g is one backward pass through the exported model, taken at the logit that differs most. The
sum without the absolute values predicts that difference, sign included: what was written is believed only when it does.

Sets change where two scores are closer than float32 keeps sigma apart. That token of the window and those after it are
not covered by the bound (another expert is a jump, not a small change); they are counted and their error shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge import MoEdgeError
from moedge.convert import modeling, sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.export.stock.glm import Layer, Layout

ROUNDING = 1e-5
"""Largest |difference| / max |logit| of two float32 evaluations of one model with the same kernels: the identity limit
of configs/tolerances.yaml, derived there."""
_CHUNK = 256


@dataclass
class Routing:
    """What a layer's router does on the windows, in the model as converted.

    ``scores`` float32 [T, E], without any bias; ``chosen`` int64 [T, k], sorted by expert.
    """

    scores: torch.Tensor
    chosen: torch.Tensor


@dataclass
class Reference:
    """The converted model on the windows: last hidden states [N, L, H], its head, and each routed layer's routing."""

    hidden: torch.Tensor
    head: torch.nn.Module
    routings: dict[int, Routing]


@torch.inference_mode()
def measure(model: PreTrainedModel, token_windows: np.ndarray) -> Reference:
    """Run the converted model, one window at a time."""
    ffns = [ffn for ffn in modeling.sparse_ffns(model) if ffn.num_experts]
    scores: dict[int, list[torch.Tensor]] = {ffn.layer_index: [] for ffn in ffns}
    chosen: dict[int, list[torch.Tensor]] = {ffn.layer_index: [] for ffn in ffns}
    handles = []
    for ffn in ffns:
        assert ffn.router is not None
        keep = scores[ffn.layer_index]
        bias = getattr(ffn.router, "bias", None)

        def record(module: Any, args: Any, out: torch.Tensor, keep: Any = keep, bias: Any = bias) -> None:
            keep.append(out if bias is None else out - bias)

        handles.append(ffn.router.register_forward_hook(record))
        ffn.record_routes = True
    hidden = []
    try:
        for window in torch.from_numpy(token_windows):
            hidden.append(model.base_model(input_ids=window[None], use_cache=False).last_hidden_state)
            for ffn in ffns:
                assert ffn.last_routes is not None
                chosen[ffn.layer_index].append(ffn.last_routes.long().sort(dim=1).values)
    finally:
        for handle in handles:
            handle.remove()
        for ffn in ffns:
            ffn.record_routes, ffn.last_routes = False, None
    routings = {index: Routing(torch.cat(scores[index]), torch.cat(chosen[index])) for index in scores}
    return Reference(torch.cat(hidden), model.get_output_embeddings(), routings)


@dataclass
class _Gates:
    """For one window, by layer: logits z float32 [T, E], weights float32 [T, k] and chosen slots int64 [T, k]."""

    logits: dict[int, torch.Tensor]
    weights: dict[int, torch.Tensor]
    slots: dict[int, torch.Tensor]

    def limits(self, index: int) -> torch.Tensor:
        """Return exp(sigma(Z) R) - 1 of each token, float64 [T]: the bound on ``|w - 1|`` (stock/glm.py)."""
        z = self.logits[index].double().gather(1, self.slots[index])
        spread = z.amax(dim=1) - z.amin(dim=1)
        return torch.expm1(torch.sigmoid(z.abs().amax(dim=1)) * spread)


@contextmanager
def _gates(stock: PreTrainedModel, layers: list[int], replace: _Gates | None = None) -> Iterator[_Gates]:
    """Record what the routers of the exported model return, or put ``replace`` in its place."""
    seen = _Gates({}, {}, {})
    handles = []
    for index in layers:

        def hook(module: Any, args: Any, out: tuple[torch.Tensor, ...], index: int = index) -> Any:
            if replace is not None:
                return out[0], replace.weights[index], replace.slots[index]
            seen.logits[index], seen.weights[index], seen.slots[index] = out
            return out

        handles.append(stock.model.layers[index].mlp.gate.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare(folder: Path, reference: Reference, token_windows: np.ndarray, layout: Layout | None) -> dict[str, Any]:
    """Load the exported folder with stock transformers and compare it with the converted model.

    Returns:
        tokens; ``logits``: covered (share of tokens at and before which no set of the window changed), over these
        max_difference and, at the logit that differs most, its ``signed`` difference, the ``prediction`` and the
        ``bound``; over all max_difference_all, max_logit, mean_kl, top1_agreement; ``changed``: shares of (token,
        layer) pairs and of tokens whose expert set differs; ``layers``: eps, std of eps * scores, bound and measured
        ``|w - 1|``, resolution (scores closer than this may tie), changed (tokens).
    """
    stock = sources.load_model(folder)
    count, length = token_windows.shape
    layers = sorted(reference.routings)
    facts = {index: _LayerFacts() for index in layers}
    changed_tokens = torch.zeros(count, length, dtype=torch.bool)
    totals = _Totals()
    kept: tuple[float, int, int, _Gates] | None = None  # signed difference, window, where, gates
    for number in range(count):
        ids = torch.from_numpy(token_windows[number : number + 1])
        with torch.inference_mode(), _gates(stock, layers) as seen:
            hidden = stock.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        for index in layers:
            assert layout is not None
            chosen = reference.routings[index].chosen[number * length : (number + 1) * length]
            changed_tokens[number] |= facts[index].add(layout.layers[index], chosen, seen, index)
        marks = changed_tokens[number].nonzero()
        covered = int(marks[0]) if len(marks) else length
        worst, at = totals.add(stock, hidden, reference, number, covered)
        if covered and (kept is None or abs(worst) > abs(kept[0])):
            kept = worst, number, at, seen
    result: dict[str, Any] = {"tokens": int(token_windows.size), "logits": totals.result()}
    if kept is not None:
        bound = {"bound": ROUNDING * totals.largest, "prediction": 0.0}
        if layout is not None:
            bound = _bound(stock, token_windows[kept[1]], kept[2], kept[3])
            bound["bound"] += ROUNDING * totals.largest
        result["logits"] |= {**bound, "signed": kept[0]}
    pairs = [facts[index].changed / token_windows.size for index in layers]
    result["changed"] = {
        "pairs": float(np.mean(pairs)) if pairs else 0.0,
        "tokens": float(changed_tokens.float().mean()),
    }
    result["layers"] = [{"layer": index, **facts[index].result(layout, index)} for index in layers]
    return result


def judge(measured: dict[str, Any]) -> None:
    """Raise when the written checkpoint is further from the converted model than the bound allows.

    Raises:
        MoEdgeError: the logits, or a layer's weights, exceed their bound; or every window starts with a changed set.
    """
    logits = measured["logits"]
    for layer in measured["layers"]:
        # Weights come from float32 divisions: a few units of 2^-24 beside the derived bound.
        if layer["max_weight_error"] > layer["weight_bound"] + 2.0**-20:
            raise MoEdgeError(
                f"Layer {layer['layer']} of the exported checkpoint weights an expert {layer['max_weight_error']:.2e} "
                f"away from 1, the bound is {layer['weight_bound']:.2e}; nothing was written. Report this model."
            )
    if "bound" in logits:
        # The midpoint rule leaves out what is smaller than the bound by the square of the weights' errors; one power
        # of them is allowed.
        largest = max((layer["weight_bound"] for layer in measured["layers"]), default=0.0)
        slack = largest * logits["bound"] + ROUNDING * logits["max_logit"]
        if logits["max_difference"] > logits["bound"] or abs(logits["signed"] - logits["prediction"]) > slack:
            raise MoEdgeError(
                f"Logits of the exported checkpoint differ by {logits['signed']:.3g}; its expert weights explain "
                f"{logits['prediction']:.3g} and {logits['bound']:.3g} at most; nothing was written. Report this model."
            )
    else:
        raise MoEdgeError(
            "The first token of every window chooses other experts in the exported checkpoint; nothing was written. Its"
            " router scores are too close together for sigmoid routing: convert with another method."
        )


class _LayerFacts:
    """Collects one layer over the windows."""

    def __init__(self) -> None:
        self.changed, self.weight_bound, self.weight_error = 0, 0.0, 0.0

    def add(self, layer: Layer, chosen: torch.Tensor, seen: _Gates, index: int) -> torch.Tensor:
        """Add one window; return which of its tokens have another expert set, bool [L]."""
        weights, slots = seen.weights[index], seen.slots[index]
        ours = slots < layer.routed
        # Routed slots first, in order; the number of the others is the same for every token.
        found = torch.where(ours, slots, torch.iinfo(torch.int64).max).sort(dim=1).values[:, : layer.top_k]
        changed = (found != chosen).any(dim=1)
        self.changed += int(changed.sum())
        self.weight_error = max(self.weight_error, float((weights - 1).abs().max()))
        self.weight_bound = max(self.weight_bound, float(seen.limits(index).max()))
        return changed

    def result(self, layout: Layout | None, index: int) -> dict[str, float]:
        """Return the facts as JSON."""
        assert layout is not None
        layer = layout.layers[index]
        return {
            "eps": layer.eps,
            "std": layer.std,
            "weight_bound": self.weight_bound,
            "max_weight_error": self.weight_error,
            "resolution": 4 * 2.0**-24 / layer.eps,
            "changed": self.changed,
        }


class _Totals:
    """Sums over all windows."""

    def __init__(self) -> None:
        self.largest, self.worst, self.worst_covered = 0.0, 0.0, 0.0
        self.kl, self.same, self.tokens, self.covered = 0.0, 0, 0, 0

    @torch.inference_mode()
    def add(
        self, stock: PreTrainedModel, hidden: torch.Tensor, reference: Reference, number: int, covered: int
    ) -> tuple[float, int]:
        """Add one window, of which the first tokens are ``covered``.

        Returns:
            Among them the largest difference, ours less theirs, and where: position * V + token id.
        """
        worst, at = 0.0, 0
        head = stock.get_output_embeddings()
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            want, got = reference.head(reference.hidden[number, part]).float(), head(hidden[part]).float()
            error = want - got
            self.worst = max(self.worst, float(error.abs().max()))
            error = error[: max(0, covered - start)].flatten()
            top = int(error.abs().argmax()) if len(error) else 0
            if len(error) and abs(float(error[top])) > abs(worst):
                worst, at = float(error[top]), start * want.shape[1] + top
            self.largest = max(self.largest, float(want.abs().max()))
            p, q = want.log_softmax(dim=-1), got.log_softmax(dim=-1)
            self.kl += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
            self.same += int((want.argmax(dim=-1) == got.argmax(dim=-1)).sum())
            self.tokens += len(want)
        self.covered += covered
        self.worst_covered = max(self.worst_covered, abs(worst))
        return worst, at

    def result(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {
            "covered": self.covered / self.tokens,
            "max_difference": self.worst_covered,
            "max_difference_all": self.worst,
            "max_logit": self.largest,
            "mean_kl": self.kl / self.tokens,
            "top1_agreement": self.same / self.tokens,
        }


def _bound(stock: PreTrainedModel, window: np.ndarray, at: int, seen: _Gates) -> dict[str, float]:
    """Return the prediction and the bound (module docstring) for one logit of one window."""
    position, token = divmod(at, stock.config.vocab_size)
    part = slice(position + 1)  # later tokens cannot change this logit
    # Copies: what was recorded in inference mode cannot take part in a backward pass.
    leaves = {index: ((1 + value[part].clone()) / 2).requires_grad_() for index, value in seen.weights.items()}
    middle = _Gates(
        {index: value[part].clone() for index, value in seen.logits.items()},
        leaves,
        {index: value[part].clone() for index, value in seen.slots.items()},
    )
    with torch.enable_grad(), _gates(stock, list(leaves), middle):
        ids = torch.from_numpy(window[None, part])
        hidden = stock.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        logit = hidden.float() @ stock.get_output_embeddings().weight[token].float()
        gradients = torch.autograd.grad(logit, list(leaves.values()))
    prediction, bound = 0.0, 0.0
    for index, gradient in zip(leaves, gradients, strict=True):
        prediction += float((gradient.double() * (1 - seen.weights[index][part].double())).sum())
        bound += float((gradient.double().abs() * seen.limits(index)[part, None]).sum())
    return {"prediction": prediction, "bound": bound}
