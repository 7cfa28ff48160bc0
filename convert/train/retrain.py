"""DIVE's efficient retraining: first the router alone, then router, norms and low-rank updates of the experts.

Stage 1 runs every expert, weighted by softmax(scores / temperature), so each score gets a gradient; only routers are
trained. Stage 2 routes as the checkpoint does. The paper (2025.acl-long.951; rates from the released code,
docs/methods.md 4.1): 0.5B and 5.0B tokens, 1e-4 constant and 1e-4 cosine to a tenth, LoRA rank 8 and alpha 16 on the
experts' projections, temperature 0.05 for one active expert and 0.5 for two. The loop is
:mod:`moedge.convert.train.training`.

Two readings differ from the released code and are settings (docs/methods.md 4.3):

* a top-1 weight is always 1, so its router learns nothing in stage 2; ``gradient: straight_through`` keeps the weight
  and gives it the gradient of a softmax over all experts;
* the temperature is used in stage 1 only, so later weights are flatter than those that were trained;
  ``fold_temperature`` divides the router by it after stage 1, which changes no choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from moedge import MoEdgeError
from moedge.convert import modeling, routers, scoring
from moedge.convert.train import training
from moedge.convert.train.settings import TrainSettings
from moedge.convert.train.trainable import LoRASettings
from moedge.convert.train.write_back import weights_hash, write_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.plan import MoEPlan

RETRAIN_SCHEMA = "moedge.retrain/1"
_PAPER_TEMPERATURE = {1: 0.05, 2: 0.5}


class RetrainSettings(BaseModel):
    """Budget and rates of both stages; the rates of the paper are for billions of tokens, short runs need more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=100_000, ge=1)
    """Of both stages together."""
    router_share: float = Field(default=1 / 11, ge=0, lt=1)
    """Share of the tokens that stage 1 gets; 0 leaves it out."""
    length: int = Field(default=256, ge=8)
    batch: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    router_lr: float = Field(default=1e-4, gt=0)
    lr: float = Field(default=1e-4, gt=0)
    temperature: float | None = Field(default=None, gt=0)
    """Of stage 1; null: the paper's, by the number of active experts."""
    fold_temperature: bool = True
    gradient: Literal["straight_through", "none"] = "straight_through"
    lora: LoRASettings = LoRASettings(rank=8, alpha=16, targets=("experts",))
    eval_every: int = Field(default=50, ge=1)
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, le=2**32 - 1)

    def stages(self, top_k: int) -> dict[str, TrainSettings]:
        """Return the settings of each stage for a model with ``top_k`` active experts."""
        names = ("length", "batch", "accumulate", "router_lr", "lr", "eval_every", "gradient_checkpointing", "seed")
        common: dict[str, Any] = {name: getattr(self, name) for name in names}
        first = round(self.tokens * self.router_share)
        found = {}
        if first:
            found["router"] = TrainSettings(
                **common,
                trainable="router",
                tokens=first,
                routing="dense-softmax",
                router_temperature=self.temperature or _PAPER_TEMPERATURE.get(top_k, _PAPER_TEMPERATURE[2]),
                schedule="constant",
                warmup=0.0,
            )
        if self.tokens > first:
            groups: dict[str, Any] = {"trainable": "router+norms+lora", "lora": self.lora}
            found["experts"] = TrainSettings(**common, **groups, tokens=self.tokens - first)
        return found


@dataclass
class RetrainResult:
    """What a run leaves behind, besides the model it changed.

    ``perplexity``: held-out perplexity by text before, and after each stage, routed as the checkpoint routes;
    ``curves``: :attr:`.training.TrainResult.curve` of each stage; that of ``router``, where every expert
    runs, has losses only.
    """

    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def plan(
        self, model: PreTrainedModel, plan: MoEPlan, settings: RetrainSettings, token_windows: np.ndarray
    ) -> MoEPlan:
        """Return ``plan`` with what was trained; see :func:`moedge.convert.train.write_back.write_back`."""
        stages = settings.stages(modeling.sparse_ffns(model)[0].top_k).values()
        groups = {group for stage in stages for group in stage.groups}
        note = {"settings": settings.model_dump(mode="json"), "tokens": self.tokens}
        return write_back(model, plan, groups, note, token_windows)

    def to_json(self, settings: RetrainSettings) -> dict[str, Any]:
        """Return plain JSON of schema ``moedge.retrain/1``."""
        return {"schema": RETRAIN_SCHEMA, "settings": settings.model_dump(mode="json"), **vars(self)}


def retrain(
    model: PreTrainedModel,
    token_windows: np.ndarray,
    settings: RetrainSettings,
    *,
    held_out: Mapping[str, np.ndarray] | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> RetrainResult:
    """Train a converted model in place, in two stages.

    Args:
        model: a converted model whose layers all route.
        token_windows: int64 [N, L] of the domains' text, to train on.
        held_out: name -> windows int64 [n, L] of text that nothing was fitted to.
        state: folder from which an interrupted run resumes.
        progress: called with (tokens done, in all). note: called with a sentence after each stage.

    Raises:
        MoEdgeError: a layer has no router, or what :func:`moedge.convert.train.training.train` raises.
    """
    ffns = modeling.sparse_ffns(model)
    if not ffns or any(ffn.router is None for ffn in ffns):
        raise MoEdgeError("Retraining in stages needs a converted model with a router in every layer.")
    result = RetrainResult()
    stages = settings.stages(ffns[0].top_k)

    def keep(when: str, found: dict[str, float]) -> None:
        result.perplexity[when] = found
        if note and found:
            mean = math.exp(np.mean(np.log(list(found.values()))))
            note(f"{when}: held-out perplexity {mean:.4g} (geometric mean of {len(found)} texts)")

    def measure(when: str) -> None:
        keep(when, {name: scoring.perplexity(model, ids)["ppl"] for name, ids in (held_out or {}).items()})

    # Both stages are one run: what the first one makes depends on settings that the second has not.
    whole = [weights_hash(model), settings.model_dump(mode="json")] if state else None
    if "router" in stages:
        measure("before")
        stage = stages["router"]
        trained = _train(model, token_windows, stage, result, settings, state, progress, identity=whole)
        if settings.fold_temperature:
            fold_temperature(model, stage.router_temperature)
        if "experts" not in stages:
            measure("after stage 1, router")
    if "experts" in stages:
        # Its first evaluation, of low-rank updates that are still zero, is that of the model as stage 1 left it.
        when = "after stage 1, router" if "router" in stages else "before"

        def first(entry: dict[str, Any]) -> None:
            if entry["step"] == 0:
                keep(when, entry["ppl"])

        with straight_through(model) if settings.gradient != "none" else nullcontext():
            more: dict[str, Any] = {"held_out": held_out, "on_eval": first, "identity": whole}
            trained = _train(model, token_windows, stages["experts"], result, settings, state, progress, **more)
        # A resumed run made that evaluation before it was interrupted.
        result.perplexity.setdefault(when, trained.curve[0]["ppl"])
        keep("after stage 2, experts", trained.curve[-1]["ppl"])
    return result


def _train(
    model: PreTrainedModel,
    token_windows: np.ndarray,
    stage: TrainSettings,
    result: RetrainResult,
    settings: RetrainSettings,
    state: Path | None,
    progress: Progress | None,
    **more: Any,
) -> training.TrainResult:
    """Run one stage and add it to the result."""
    name = "router" if stage.routing == "dense-softmax" else "experts"
    first = result.tokens
    trained = training.train(
        model,
        token_windows,
        stage,
        state=state / name if state else None,
        progress=(lambda done, _: progress(min(first + done, settings.tokens), settings.tokens)) if progress else None,
        **more,
    )
    result.curves[name] = trained.curve
    result.tokens += trained.tokens
    result.seconds += trained.seconds
    return trained


@contextmanager
def straight_through(model: torch.nn.Module) -> Iterator[None]:
    """Give routers whose weights are constant (top-1 softmax, unit) a gradient while the block runs."""
    changed = [
        ffn
        for ffn in modeling.sparse_ffns(model)
        if ffn.combine == "unit" or (ffn.combine, ffn.top_k) == ("softmax", 1)
    ]
    for ffn in changed:
        ffn.straight_through = True
    try:
        yield
    finally:
        for ffn in changed:
            ffn.straight_through = False


def folded(plan: MoEPlan) -> bool:
    """Whether an earlier retraining divided the routers of a plan by its temperature."""
    note = plan.provenance.get("finetune")
    while note:
        if note["settings"].get("fold_temperature") and note["settings"].get("router_share"):
            return True
        note = note.get("before")
    return False


@torch.no_grad()
def fold_temperature(model: torch.nn.Module, temperature: float) -> None:
    """Divide the scores of every router by ``temperature``: sparse weights become those of stage 1.

    Raises:
        MoEdgeError: a router whose scores are not linear in its tensors.
    """
    for ffn in modeling.sparse_ffns(model):
        if not isinstance(ffn.router, routers.LinearRouter):
            raise MoEdgeError("Only a linear router can take the temperature in; set fold_temperature: false.")
        for parameter in ffn.router.parameters():
            parameter.div_(temperature)
