"""Conversion methods. Each is one file: statistics in, :class:`~moedge.convert.plan.MoEPlan` out.

``METHODS[name].function(statistics, model, **params)``, with ``params`` the fields of ``METHODS[name].params``, makes
the plan. A new method is one new file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from moedge.convert.methods import cmoe
from moedge.convert.plan import MoEPlan


@dataclass(frozen=True)
class Method:
    """An entry of the registry."""

    function: Callable[..., MoEPlan]
    params: type[BaseModel]
    """Typed parameters, with defaults."""
    needs: tuple[str, ...]
    """What it reads besides the model: ``statistics``."""
    source: str
    """Where it is published."""


METHODS: dict[str, Method] = {
    "cmoe": Method(cmoe.plan, cmoe.CMoEParams, ("statistics",), "CMoE, arXiv 2502.04416v3, ACL 2026"),
}
