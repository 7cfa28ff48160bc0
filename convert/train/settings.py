"""What a training run can be told: typed, checked before anything is loaded."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moedge.convert.train import trainable
from moedge.convert.train.trainable import LoRASettings


class TrainSettings(BaseModel):
    """What is trained, how long and how.

    Defaults follow CMoE sec. 4.1 where it says: LoRA rank 8 and alpha 32, Adam with betas 0.9 and 0.95, 1e-3 for router
    scales, bias step 1e-3. Its LoRA rate, 5.95e-5, is for 2,048 samples on a 7B model; 2e-4 suits short runs.

    Attributes:
        trainable: groups of :data:`moedge.convert.train.trainable.GROUPS`, joined by ``+``.
        routing: ``sparse``, or ``dense-softmax``: every expert runs, weighted by softmax(scores / temperature).
        router_temperature: that temperature (DIVE: 0.05 for top-1, 0.5 for top-2).
        tokens, minutes: the budget, one of them. Tokens are exact and repeatable; minutes count this process's clock.
        length: tokens in a window. batch: windows in a forward pass of a process. accumulate: passes in a step.
        lr, router_lr: peak rates; ``router_lr`` is that of router and scale.
        schedule: ``cosine`` to ``final_lr`` times the peak, or ``constant``; ``warmup``: share of the budget that rises
            linearly.
        clip: largest norm of the gradient, 0: no clipping.
        distill: learn from the dense parent too: ``logits`` (KL at ``temperature``, times its square) or ``hidden``
            (squared distance of each layer's output relative to the parent's). ``distill_weight`` w: the loss is
            (1 - w) cross-entropy + w distillation.
        balance: ``bias`` (CMoE's rule after each step, ``bias_step``), ``loss`` (``balance_weight`` times the balance
            loss) or ``none``.
        eval_every: steps between evaluations. save_every: steps between saved states, 0: at evaluations.
        mixed_precision: ``bf16`` or ``fp16`` autocast; routers stay in float32.
        gradient_checkpointing: keep layer inputs only, and compute the rest again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trainable: str = "lora+scale+router"
    lora: LoRASettings = LoRASettings()
    routing: Literal["sparse", "dense-softmax"] = "sparse"
    router_temperature: float = Field(default=1.0, gt=0)
    tokens: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    length: int = Field(default=512, ge=8)
    batch: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    router_lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: float = Field(default=0.1, ge=0, le=1)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    distill: Literal["none", "logits", "hidden"] = "none"
    distill_weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    balance: Literal["none", "bias", "loss"] = "none"
    bias_step: float = Field(default=1e-3, gt=0)
    balance_weight: float = Field(default=0.01, gt=0)
    eval_every: int = Field(default=50, ge=1)
    save_every: int = Field(default=0, ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, le=2**32 - 1)

    @field_validator("trainable")
    @classmethod
    def _known(cls, value: str) -> str:
        trainable.parse_groups(value)
        return value

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.tokens is None and self.minutes is None:
            raise ValueError("give a budget, either tokens or minutes (--tokens, --minutes).")
        if self.tokens is not None and self.minutes is not None:
            raise ValueError("the budget is either tokens or minutes, not both (--tokens, --minutes).")
        return self

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of ``trainable``."""
        return trainable.parse_groups(self.trainable)

    def rate_factor(self, done: float) -> float:
        """Return the factor on the peak rate when the share ``done`` (0..1) of the budget is used."""
        if done < self.warmup:
            # Half a step up, so that the first step learns too.
            return max(done / self.warmup, 1e-2)
        if self.schedule == "constant":
            return 1.0
        progress = min((done - self.warmup) / (1 - self.warmup), 1.0)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
