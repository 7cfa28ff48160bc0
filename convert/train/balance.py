"""Load of the experts while a model is trained: counts, CMoE's bias rule and the usual balance loss.

f_e: share of a layer's choices that fell on expert e. P_e: mean router probability of expert e over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moedge.convert.modeling import SparseFFN


class LoadObserver:
    """Watches which experts are chosen in the forward passes of a model.

    Counting happens in :meth:`observe`, which the training loop calls after a forward pass, and not in the forward
    pass: one that is repeated for gradient checkpointing, or made for an evaluation, counts nothing.
    """

    def __init__(self, model: nn.Module, *, scores: bool = False) -> None:
        """Watch every SparseFFN of ``model``; ``scores`` also keeps the router's output for :meth:`loss`."""
        self.ffns = [m for m in model.modules() if isinstance(m, SparseFFN) and m.router is not None]
        self._before = [ffn.record_routes for ffn in self.ffns]
        self._scores: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        for index, ffn in enumerate(self.ffns):
            ffn.record_routes = True
            if scores:
                assert ffn.router is not None
                self._handles.append(ffn.router.register_forward_hook(self._keep(index)))
        self.counts = [torch.zeros(ffn.num_experts, dtype=torch.int64) for ffn in self.ffns]
        self._since_step = [counts.clone() for counts in self.counts]

    def _keep(self, index: int) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(module: Any, inputs: Any, scores: torch.Tensor) -> None:
            self._scores[index] = scores

        return hook

    def observe(self) -> None:
        """Add the choices of the latest forward pass to the counts."""
        for index, ffn in enumerate(self.ffns):
            if ffn.last_routes is not None:
                chosen = torch.bincount(ffn.last_routes.reshape(-1), minlength=ffn.num_experts)
                for counts in (self.counts, self._since_step):
                    counts[index] = counts[index].to(chosen.device) + chosen
                ffn.last_routes = None

    def loss(self) -> torch.Tensor:
        """Return the balance loss of the latest forward pass, the mean over layers of ``E * sum_e f_e P_e``.

        ExpertWeaver sec. 4 (and Switch): 1 when the load is even; the gradient goes through P. Call it before
        :meth:`observe`.
        """
        terms = []
        for index, ffn in enumerate(self.ffns):
            scores, routes = self._scores.pop(index), ffn.last_routes
            assert routes is not None
            share = torch.bincount(routes.reshape(-1), minlength=ffn.num_experts) / routes.numel()
            terms.append(ffn.num_experts * (share * torch.softmax(scores, dim=-1).mean(0)).sum())
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

    def step_bias(self, step: float, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> None:
        """Move each selection bias by ``step`` against the load since its last step (CMoE sec. 3.3, gamma).

        ``b_e -= step`` for an expert that was chosen more often than the mean, ``+= step`` for one chosen less often.
        Counts are whole numbers, so no rounding hides a difference.

        Args:
            reduce: sums a tensor over the processes.
        """
        with torch.no_grad():
            for index, ffn in enumerate(self.ffns):
                counts = reduce(self._since_step[index])
                self._since_step[index] = torch.zeros_like(counts)
                if ffn.selection_bias is not None and counts.any():
                    above = counts * ffn.num_experts - counts.sum()
                    ffn.selection_bias -= step * torch.sign(above).to(ffn.selection_bias)

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> list[torch.Tensor]:
        """Return the counts since the last call of this method, int64 [E] a layer, and start again from zero."""
        taken = [reduce(counts) for counts in self.counts]
        self.counts = [torch.zeros_like(counts) for counts in self.counts]
        return taken

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        for ffn, before in zip(self.ffns, self._before, strict=True):
            ffn.record_routes, ffn.last_routes = before, None


def variation(counts: torch.Tensor) -> float:
    """Coefficient of variation of the load: standard deviation over mean (0: even)."""
    load = counts.double()
    return float(load.std(correction=0) / load.mean()) if load.any() else 0.0


def add_bias(model: nn.Module) -> None:
    """Give every routed FFN without a selection bias one of zeros."""
    for ffn in model.modules():
        if isinstance(ffn, SparseFFN) and ffn.router is not None and ffn.selection_bias is None:
            device = next(ffn.parameters()).device
            ffn.selection_bias = torch.zeros(ffn.num_experts, dtype=torch.float32, device=device)
