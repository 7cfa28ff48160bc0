"""``moedge::gathered_glu`` and ``moedge::gathered_linear``: the products of a gathered FFN, for kernels that skip rows.

They read values that ``keep_large`` has been applied to, and weights that lie by channel: the weights of one input are
one row, which a kernel need not read where no token keeps the input. What they compute is what two plain products
compute; a model that is trained or traced has those (:mod:`moedge.convert.sparse_ffn`), and a lowering puts these in
their place. They have no gradient for that reason.

Shapes: T tokens, H hidden, I inner width, K inputs and N outputs of a product. Importing this module registers the
operators; it needs torch only.
"""

from __future__ import annotations

import torch

from moedge.convert.ops.activations import activate


def limits_of(threshold: torch.Tensor, ramp: float) -> torch.Tensor:
    """Return what :func:`gathered_glu` takes: the thresholds, and how wide their ramps are, float32 [2, I].

    A table and no attribute, for TensorRT's plugins would get a number with a fraction in a form that nobody has seen.
    """
    limit = threshold.float()
    return torch.stack([limit, limit * ramp])


@torch.library.custom_op("moedge::gathered_glu", mutates_args=())
def gathered_glu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, h_limits: torch.Tensor, activation: str
) -> torch.Tensor:
    """``act(x gate) * (x up)``, without its small values.

    Args:
        x: [T, H], zero where a value was left out.
        gate: [H, I]. up: [H, I]. Row i holds the weights of input i.
        h_limits: float32 [2, I], see :func:`limits_of`: a value is rounded to the type of x, and then left out as by
            ``keep_large``.
        activation: a name in ``activations.ACTIVATIONS``.

    Returns:
        [T, I] in the type of x.
    """
    h = activate(x @ gate, activation) * (x @ up)
    wide = h if h.dtype == torch.float64 else h.float()
    limits = h_limits.to(wide.dtype)
    return (wide * ((wide.abs() - limits[0]) / limits[1]).clamp(0.0, 1.0)).to(x.dtype)


@gathered_glu.register_fake
def _(x, gate, up, h_limits, activation):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], gate.shape[1]))


@torch.library.custom_op("moedge::gathered_linear", mutates_args=())
def gathered_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x weight``: [T, K], zero where a value was left out, times [K, N] -> [T, N]."""
    return x @ weight


@gathered_linear.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[1]))
