"""The activations of a GLU's gate, by the names that plans, graphs and kernels use."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply the gate activation by its name in :data:`ACTIVATIONS`."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def activate_backward(d_out: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    """Return the gradient of the activation's input ``x`` from that of its output."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(d_out, x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(d_out, x, approximate=approximate)
