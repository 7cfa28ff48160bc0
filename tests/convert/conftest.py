"""Statistics and plans of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moedge.convert import calibration
from moedge.convert.methods import cmoe
from moedge.convert.plan import MoEPlan


@pytest.fixture(scope="session")
def token_windows() -> np.ndarray:
    """Calibration ids, int64 [4, 48]."""
    return np.random.default_rng(0).integers(0, 256, size=(4, 48))


@pytest.fixture(scope="session")
def make_plan(token_windows: np.ndarray) -> Callable[..., tuple[MoEPlan, list[calibration.LayerStatistics]]]:
    """Return a function (model, **CMoE parameters) -> (plan, statistics); the layout is S2A3E8 unless given."""

    def make(model: Any, *, k_a: int = 6, **params: Any) -> tuple[MoEPlan, list[calibration.LayerStatistics]]:
        statistics = calibration.collect(model, token_windows, k_a=k_a, profile=params.get("profile", "raw"))
        layout = {"shared": 2, "active": 3, "experts": 8, "k_a": k_a, **params}
        return cmoe.plan(statistics, model, **layout), statistics

    return make
