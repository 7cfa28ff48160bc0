"""What the tests of kernels share: bounds of rounding, random inputs, and how many examples hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

U = 2.0**-24
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
many = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def rounding(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of y in ``dtype``, subnormals included."""
    info = torch.finfo(dtype)
    return y.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2


def within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    actual = actual.double().cpu()
    assert actual.isfinite().all()
    worst = ((actual - expected).abs() / bound).max()
    assert worst <= 1, f"{worst:.3g} times the bound"


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
