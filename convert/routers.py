"""Router kinds, one class each: scores of the routed experts for every token, in float32.

A router is made from shapes and options alone, so that a checkpoint can be loaded into it; :func:`from_plan` then fills
in a plan's tensors. T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from moedge import MoEdgeError
from moedge.convert.ops import activate

if TYPE_CHECKING:
    from moedge.convert.plan import RouterPlan


class RepresentativeRouter(nn.Module):
    """Score of expert e = hidden activation of its representative neuron, ``act(gate_e x) * (up_e x)`` (CMoE sec. 3.3).

    ``options["score"]`` is ``signed`` (the paper) or ``abs`` (CMoE's released code). Tensors gate and up are [E, H],
    and with ``options["bias"]`` gate_bias and up_bias [E].
    """

    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(self, num_experts: int, hidden_size: int, activation: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.activation = activation
        self.absolute = options.get("score", "signed") == "abs"
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        for name in ("gate_bias", "up_bias"):
            bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if options.get("bias") else None
            self.register_parameter(name, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [T, E] for x [T, H], both float32."""
        gate = F.linear(x, self.gate, self.gate_bias)
        scores = activate(gate, self.activation) * F.linear(x, self.up, self.up_bias)
        return scores.abs() if self.absolute else scores


class LinearRouter(nn.Module):
    """Scores ``weight x + bias`` with weight [E, H] and, if ``options["bias"]``, bias [E]."""

    bias: nn.Parameter | None

    def __init__(self, num_experts: int, hidden_size: int, activation: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if options.get("bias") else None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [T, E] for x [T, H], both float32."""
        return F.linear(x, self.weight, self.bias)


class SigmoidRouter(LinearRouter):
    """Scores ``sigmoid(weight x + bias)``, between 0 and 1: the gate of DeepSeek-V3 and GLM-4-MoE.

    Those add a selection bias to these scores and weigh by the rule ``normalised``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [T, E] for x [T, H], both float32."""
        return torch.sigmoid(super().forward(x))


class MLPRouter(nn.Module):
    """Scores ``second tanh(first x)`` with first [E, H] and second [E, E], no biases.

    The gate of LLaMA-MoE; with ``options["normalise"]``, x scaled to length 1, the router of MoEfication.
    """

    def __init__(self, num_experts: int, hidden_size: int, activation: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.normalise = bool(options.get("normalise"))
        self.first = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.second = nn.Parameter(torch.empty(num_experts, num_experts, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [T, E] for x [T, H], both float32."""
        x = F.normalize(x, dim=-1) if self.normalise else x
        return F.linear(torch.tanh(F.linear(x, self.first)), self.second)


class RandomRouter(LinearRouter):
    """A fixed random projection, ``options["seed"]``: the control that shows what a router's choice is worth."""


class OracleRouter(nn.Module):
    """Scores ``|E_e(x)|_2`` by running every expert: the best choice by norm, for evaluation only.

    It reads the experts of the FFN that it is bound to.
    """

    def __init__(self, num_experts: int, hidden_size: int, activation: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.activation = activation
        self._experts: tuple[nn.Module, ...] = ()  # a tuple, so that the FFN is not registered as a child of its router

    def bind(self, ffn: nn.Module) -> None:
        """Use the gate, up [E, I, H] (H + 1 with biases) and down [E, H, I] of this FFN."""
        self._experts = (ffn,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [T, E] for x [T, H], both float32."""
        (ffn,) = self._experts
        if ffn.gate.shape[-1] > x.shape[-1]:  # type: ignore[index]
            x = F.pad(x, (0, 1), value=1.0)  # the column of the biases
        if ffn.gate.shape[1] == 1:  # type: ignore[index]
            # Experts of one neuron: |h_e| |down_e|, without a loop over neurons.
            gate, up, down = (getattr(ffn, name).float().flatten(1) for name in ("gate", "up", "down"))
            return (activate(F.linear(x, gate), self.activation) * F.linear(x, up)).abs() * down.norm(dim=-1)
        columns = []
        for gate, up, down in zip(ffn.gate, ffn.up, ffn.down, strict=True):  # type: ignore[arg-type]
            hidden = activate(F.linear(x, gate.float()), self.activation) * F.linear(x, up.float())
            columns.append(F.linear(hidden, down.float()).norm(dim=-1))
        return torch.stack(columns, dim=-1)


ROUTERS: dict[str, type[nn.Module]] = {
    "representative": RepresentativeRouter,
    "linear": LinearRouter,
    "sigmoid": SigmoidRouter,
    "mlp": MLPRouter,
    "random": RandomRouter,
    "oracle": OracleRouter,
}


def build(kind: str, num_experts: int, hidden_size: int, activation: str, options: dict[str, Any]) -> nn.Module:
    """Make an empty router of a kind.

    Raises:
        MoEdgeError: there is no such kind.
    """
    if kind not in ROUTERS:
        raise MoEdgeError(f"Unknown router kind {kind!r}; known: {', '.join(ROUTERS)}.")
    return ROUTERS[kind](num_experts, hidden_size, activation, options)


def from_plan(plan: RouterPlan, num_experts: int, hidden_size: int, activation: str) -> nn.Module:
    """Make a router and fill in a plan's tensors.

    Raises:
        MoEdgeError: unknown kind, or tensors that do not fit it.
    """
    router = build(plan.kind, num_experts, hidden_size, activation, plan.options)
    try:
        router.load_state_dict({name: torch.from_numpy(value).float() for name, value in plan.tensors.items()})
    except RuntimeError as error:
        raise MoEdgeError(f"The tensors of a {plan.kind!r} router in the plan do not fit: {error}") from error
    return router
