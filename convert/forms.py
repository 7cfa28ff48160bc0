"""What kind of FFNs a variant has, and who can run it faster than its dense parent: one sentence a kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from moedge.convert.plan import PROMPT_ROUTER

if TYPE_CHECKING:
    from moedge.convert.plan import MoEPlan

Form = Literal["dense", "static", "routed", "gathered", "routed and gathered", "prompted", "ceiling"]

WHERE: dict[str, str] = {
    "static": "narrower dense FFNs; prompts, batches and decoding gain alike, in every runtime.",
    "routed": (
        "a gain in decoding, and in prompts and batches where the runtime has a kernel for experts (ONNX Runtime, "
        "TensorRT); others run them by standard operators, without that gain."
    ),
    "gathered": (
        "a gain only in decoding few tokens at a time, by a kernel that skips weights; prompts, large batches and "
        "stock runtimes compute the same numbers and read all weights."
    ),
    "routed and gathered": (
        "a gain by experts wherever routed FFNs have one; the gathered part adds to it only in decoding few tokens at "
        "a time, by a kernel that skips weights."
    ),
    "prompted": (
        "a gain in decoding alone, and only where the runtime can cut the FFNs' weights anew for each prompt, for "
        "every row of a batch apart; prompts read all weights, and no exported bundle of ours holds such a model. "
        "Scored are the second halves of the windows, for which the first halves choose."
    ),
    "ceiling": "everything is computed in order to choose; a bound, nothing to deploy.",
}
"""Form -> what is true of rows of that form; it follows their names and a colon. A dense model needs no sentence."""


def form(plan: MoEPlan) -> Form:
    """Return the kind of FFNs that a plan makes."""
    layers = [part for layer in plan.layers for part in (layer.children or [layer])]
    if any(layer.router is not None and layer.router.kind == "oracle" for layer in layers):
        return "ceiling"
    if any(layer.router is not None and layer.router.kind == PROMPT_ROUTER for layer in layers):
        return "prompted"
    routed, gathered = any(layer.experts for layer in layers), any(layer.gathers for layer in layers)
    if routed:
        return "routed and gathered" if gathered else "routed"
    return "gathered" if gathered else "static"


def sentences(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one sentence for each form among the rows (``label``, ``form``) of an evaluation."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(str(row["form"]), []).append(str(row["label"]))
    return [f"{', '.join(labels[form])}: {said}" for form, said in WHERE.items() if form in labels]


def prompted(quality: Mapping[str, Any]) -> list[str]:
    """Return the labels of an evaluation's rows that are scored on second halves of windows alone."""
    rows = quality.get("second_half", {}).get("rows", [])
    return [str(row["label"]) for row in rows if row["form"] == "prompted"]
