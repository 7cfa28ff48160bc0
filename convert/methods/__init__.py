"""Conversion methods. Each is one file: ``plan(data, model, params, progress)`` returns the layers of a plan.

:func:`convert` does what is the same for all: it checks the parameters and makes a plan
(:class:`~moedge.convert.plan.MoEPlan`) of the layers. A new method is one new file and one entry in :data:`METHODS`;
recipes and commands know it from that entry. Importing this package needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from moedge import MoEdgeError
from moedge.configs.errors import checked
from moedge.convert import adapters, moe_adapters, processes
from moedge.convert.methods import cmoe, cmoe_hierarchical, dive, expertweaver, mlpmoe, moedge
from moedge.convert.methods import gather as gathered
from moedge.convert.methods.baselines import splits, static
from moedge.convert.methods.gather import GatherParams as GatherParams
from moedge.convert.methods.layers import Layers
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.gather import Ladder


@dataclass(frozen=True)
class Method:
    """An entry of the registry."""

    plan: Callable[[Any, PreTrainedModel, Any, Progress | None], Layers]
    """Makes the layers from (what it reads, the model, its parameters, progress); call it through :func:`convert`."""
    params: type[BaseModel]
    """Typed parameters, with defaults."""
    needs: tuple[str, ...]
    """What it reads besides the model: ``statistics``, ``gate_profile`` (statistics made with a gate sampling),
    ``tokens``: the calibration windows themselves, passed in place of the statistics; ``domains``: windows of the texts
    that its parameter ``domains`` names, likewise. None of them: pass None."""
    source: str
    """Where it is published."""
    label: str
    """Format string over the parameters: the layout in a few words."""
    parents: Literal["dense", "moe"] = "dense"
    """What it converts: dense models, or the experts of a Mixture-of-Experts (``moe_adapters.FAMILIES``)."""
    one_process: bool = False
    """It reads all tokens at once; the others split the windows over processes (:mod:`moedge.convert.processes`)."""
    fewest_windows: int = 1
    """Of calibration text; those that need two hold some out, or compare them."""
    no_gather: str = ""
    """Why its layers take no thresholds on top (``gather``); empty where they do."""

    def layout(self, params: dict[str, Any]) -> str:
        """Return the layout of a conversion for people, e.g. ``S6A6E16`` or ``S6A6E16, gather 0.6``."""
        gathered = params.get("gather")
        return self.label.format(**params) + (f", gather {gathered['share']:.4g}" if gathered else "")


_SHARED_ACTIVE = "S{shared}A{active}E{experts}"
_ALL_ROUTED = "A{active}E{experts}"
_KEPT = "{keep:.4g} of the neurons"

METHODS: dict[str, Method] = {
    "cmoe": Method(cmoe.plan, cmoe.CMoEParams, ("statistics",), "CMoE, arXiv 2502.04416v3, ACL 2026", _SHARED_ACTIVE),
    "cmoe-hierarchical": Method(
        cmoe_hierarchical.plan,
        cmoe_hierarchical.HierarchicalParams,
        ("tokens",),
        "CMoE on the experts of a Mixture-of-Experts, arXiv 2502.04416v3",
        _SHARED_ACTIVE,
        parents="moe",
        one_process=True,
        no_gather="cmoe-hierarchical has experts inside experts, whose small values cannot be left out.",
    ),
    "expertweaver": Method(
        expertweaver.plan,
        expertweaver.ExpertWeaverParams,
        ("statistics", "gate_profile"),
        "ExpertWeaver, arXiv 2602.15521v1",
        "{experts} experts, {k} active",
        fewest_windows=2,
    ),
    "mlpmoe": Method(
        mlpmoe.plan,
        mlpmoe.MLPMoEParams,
        (),
        "reconstruction of MLPMoE, arXiv 2511.21089 (abstract only)",
        "{branches} branches, {structure}, {fade} to {p_max:g}",
    ),
    "dive": Method(
        dive.plan,
        dive.DiveParams,
        ("domains",),
        "DIVE, ACL 2025, 2025.acl-long.951",
        "{active} of {experts} domain experts of {keep:.0%}",
        one_process=True,
        no_gather="dive is trained after it is converted, which moves the values that thresholds are measured on.",
    ),
    "moedge": Method(moedge.plan, moedge.MoEdgeParams, ("tokens",), "this project", _SHARED_ACTIVE, fewest_windows=2),
    "gather": Method(
        gathered.plan,
        GatherParams,
        ("tokens",),
        "this project; as TEAL, arXiv 2408.14690, or WINA, arXiv 2505.19427, by its scores",
        "{share:.4g} of the weights read, by {scores}",
        no_gather="gather leaves out small values already; give share and scores to the method itself.",
    ),
    "llamamoe": Method(
        splits.llamamoe_plan, splits.LlamaMoEParams, (), "LLaMA-MoE, arXiv 2406.16554, before training", _ALL_ROUTED
    ),
    "moefication": Method(
        splits.moefication_plan,
        splits.MoEficationParams,
        ("tokens",),
        "MoEfication, arXiv 2110.01786",
        _ALL_ROUTED,
        one_process=True,
        fewest_windows=2,
    ),
    "atopk": Method(
        static.atopk_plan, static.ATopKParams, ("statistics",), "CMoE's activation rates as a static mask", _KEPT
    ),
    "wanda": Method(
        static.wanda_plan, static.KeepParams, ("statistics",), "structured Wanda as in FLAP, arXiv 2312.11983", _KEPT
    ),
    "flap": Method(
        static.flap_plan,
        static.FlapParams,
        ("tokens",),
        "FLAP on the FFN, arXiv 2312.11983",
        _KEPT,
        fewest_windows=2,
    ),
}


def convert(
    name: str,
    data: Any,
    model: PreTrainedModel,
    /,
    *,
    source_sha256: str = "",
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    gather: Mapping[str, Any] | None = None,
    token_windows: np.ndarray | None = None,
    ladders: list[Ladder] | None = None,
    **params: Any,
) -> MoEPlan:
    """Make a plan by a method.

    With ``gather`` its layers then leave out small values too, so that the whole model reads the share of the dense
    parent's FFN weights that ``gather`` asks for (:func:`moedge.convert.methods.gather.on_top`).

    Args:
        name: a key of :data:`METHODS`.
        data: what the method reads besides the model (:attr:`Method.needs`).
        model: the parent; it is not changed.
        params: the fields of ``METHODS[name].params``; the others have their defaults.
        source_sha256: identity of the parent; ``provenance``: JSON about the calibration. Both are stored in the plan.
        progress: called with (done, in all), in layers or windows.
        gather: fields of :class:`moedge.convert.methods.gather.GatherParams`, or None: all values are read.
        token_windows: calibration ids, int64 [N, L], that ``gather`` measures on; what the method reads, if that is
            token windows.
        ladders: what :func:`moedge.convert.methods.gather.measure` found for the settings :func:`gather_settings`, on
            these windows; None: a gather measures it. It is the same for every share.

    Raises:
        MoEdgeError: an unknown method, parameters that it does not take, or what the method itself refuses.
    """
    method = METHODS.get(name)
    if method is None:
        raise MoEdgeError(f"Unknown method {name!r}; known: {', '.join(METHODS)}.")
    if method.one_process and processes.count() > 1:
        raise MoEdgeError(f"{name} runs in one process; start it without torchrun.")
    settings = checked(method.params, params, where=name)
    wanted = _checked_gather(name, method, gather)
    if isinstance(settings, GatherParams):
        made = gathered.plan(data, model, settings, progress, ladders=ladders)
    else:
        made = method.plan(data, model, settings, progress)
    if wanted is not None:
        windows = data if "tokens" in method.needs else token_windows
        made = _on_top(made, windows, model, wanted, progress, ladders)
    describe = moe_adapters.describe if method.parents == "moe" else adapters.describe
    return MoEPlan(
        name,
        {**settings.model_dump(mode="json"), **made.params},
        describe(model, source_sha256),
        made.layers,
        {**(provenance or {}), **made.provenance},
    )


def gather_settings(section: Mapping[str, Any]) -> GatherParams | None:
    """Return how a ``convert`` section leaves small values out: as its method, on top of it, or not at all."""
    if METHODS[section["method"]].params is GatherParams:
        return GatherParams(**{name: section[name] for name in GatherParams.model_fields})
    return GatherParams(**section["gather"]) if section.get("gather") else None


def _checked_gather(name: str, method: Method, given: Mapping[str, Any] | None) -> GatherParams | None:
    """Check what ``gather`` asks for, before the method does its work."""
    if given is None:
        return None
    if method.no_gather:
        raise MoEdgeError(f"{name}: gather: {method.no_gather}")
    wanted = checked(GatherParams, given, where=f"{name}: gather")
    if wanted.costs:
        raise MoEdgeError(f"{name}: gather.costs are of the whole model's products, which method gather alone has.")
    return wanted


def _on_top(
    made: Layers,
    token_windows: Any,
    model: PreTrainedModel,
    wanted: GatherParams,
    progress: Progress | None,
    ladders: list[Ladder] | None,
) -> Layers:
    """Give a method's layers thresholds; the plan then says what was asked for and what was measured."""
    if token_windows is None:
        raise MoEdgeError("gather measures how large values are; pass token_windows, the calibration windows.")
    done = gathered.on_top(made.layers, token_windows, model, wanted, progress, ladders=ladders)
    params = {**made.params, "gather": wanted.model_dump(mode="json")}
    return Layers(done.layers, {**made.provenance, **done.provenance}, params)
