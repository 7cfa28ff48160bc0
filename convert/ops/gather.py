"""``moedge::keep_large``: leave out the inputs of a linear layer that are small, token by token.

A linear layer reads the weights of an input only to multiply them by it. Where the input is small the product is, and
leaving it out is an error of known size; a kernel that multiplies one token then need not read those weights (TEAL,
arXiv 2408.14690; WINA, arXiv 2505.19427, counts an input by the norm of its weights too). What is small says a
calibrated threshold for each input, so a token with more large inputs keeps more.

A hard threshold is a decision: rounding turns it, and two runtimes then differ by a whole input. So the value grows
from 0 at the threshold t to its own at (1 + ramp) t, and the model stays a continuous function of its inputs::

    y_i = x_i * clamp((|x_i| - t_i) / (ramp * t_i), 0, 1)

What is below its threshold is exactly 0 and need not be read. A change of x moves y by at most 2 + 1 / ramp times as
much, which over the layers of a deep model is enough to make it chaotic, so parity replays what is kept
(:mod:`moedge.runtime.parity.replay`).

Shapes: T tokens, K inputs. Importing this module registers the operator; it needs torch only.
"""

from __future__ import annotations

from typing import Any

import torch


def factors(x: torch.Tensor, threshold: torch.Tensor, ramp: float) -> torch.Tensor:
    """Return what each value is multiplied by, 0 to 1, in the shape of x: float32, float64 where x is."""
    wide = _wide(x)
    limit = threshold.to(wide.dtype)
    return ((wide.abs() - limit) / (limit * ramp)).clamp(0.0, 1.0)


def kept(x: torch.Tensor, threshold: torch.Tensor, ramp: float) -> torch.Tensor:
    """Return what :func:`keep_large` does, for code that is inside an operator already: one rounding to x's type."""
    return (_wide(x) * factors(x, threshold, ramp)).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.library.custom_op("moedge::keep_large", mutates_args=())
def keep_large(x: torch.Tensor, threshold: torch.Tensor, ramp: float) -> torch.Tensor:
    """Return x with its small values left out; NaN stays NaN.

    Args:
        x: [..., K].
        threshold: float32, positive, in a shape that broadcasts against x: [K].
        ramp: width of the ramp, more than 0.
    """
    return kept(x, threshold, ramp)


@keep_large.register_fake
def _(x, threshold, ramp):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, threshold, ctx.ramp = inputs
    ctx.save_for_backward(x, threshold)


def _backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Plain masking: with the slope of the ramp itself, up to 2 + 1 / ramp, training ends worse (docs/gather.md).
    x, threshold = ctx.saved_tensors
    return (_wide(d_y) * factors(x, threshold, ctx.ramp)).to(d_y.dtype), None, None


keep_large.register_autograd(_backward, setup_context=_context)
