"""The training loop: chosen groups of a converted model, on Accelerate, resumable to the bit.

N windows of L tokens. What a step sees depends on the seed and the number of the step alone (the order of the windows,
random numbers for dropout), so a run that was interrupted and resumed equals one that was not. State is safetensors
and JSON, never pickle.

One process, or many under ``accelerate launch`` (DDP, FSDP): ``batch`` is per process, and every process takes its own
part of a step's windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from moedge import MoEdgeError
from moedge._files import digest
from moedge.convert import adapters, modeling, processes
from moedge.convert.train import balance, saved, trainable
from moedge.convert.train.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from moedge._progress import Progress

_SLOW_GROUPS = ("router", "scale")
"""Groups that take ``router_lr``: new or nearly new parameters, for which a fine-tuning rate is too small."""


@dataclass
class TrainResult:
    """What a run leaves behind.

    ``curve``: one entry an evaluation: step, tokens, seconds, lr, loss (mean since the last entry; None at step 0),
    ppl by text and load_cv (mean over layers of the variation of the experts' load). ``model`` is the trained model,
    merged; None where it was sharded over processes, and then ``tensors`` holds what was trained, by name.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    trained: dict[str, int] = field(default_factory=dict)
    """Numbers trained in each group."""
    model: PreTrainedModel | None = None
    tensors: dict[str, torch.Tensor] | None = None


def train(
    model: PreTrainedModel,
    token_windows: np.ndarray,
    settings: TrainSettings,
    *,
    held_out: Mapping[str, np.ndarray] | None = None,
    teacher: PreTrainedModel | None = None,
    state: Path | None = None,
    identity: Any = None,
    accelerator: Accelerator | None = None,
    on_eval: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a converted model in place.

    Args:
        model: a converted model; back it comes with LoRA merged, frozen and in eval mode.
        token_windows: int64 [N, L] to train on, in an order that the seed decides; over again when they are used up.
        held_out: name -> windows int64 [n, L] whose perplexity is measured at step 0, every ``eval_every`` and last.
        teacher: the dense parent, for ``distill``.
        state: folder where the run is saved and from which it resumes; None: it cannot resume. It is left behind.
        identity: JSON that tells this model and teacher from others (hashes), so that nothing else resumes from
            ``state``.
        accelerator: None: one is made (reads what ``accelerate launch`` set).
        on_eval: called with each entry of the curve. progress: called with (tokens or seconds done, in all).

    Raises:
        MoEdgeError: no window, no teacher where one is needed, a state of another run, or a loss that is not finite.
    """
    if not len(token_windows):
        raise MoEdgeError("There is no window of text to train on; give more text or a shorter length.")
    for windows in (token_windows, *(held_out or {}).values()):
        adapters.check_ids(model, windows)
    if settings.distill != "none" and teacher is None:
        raise MoEdgeError(f"distill={settings.distill} needs the dense parent; give it, or set distill to none.")
    if settings.balance != "none" and not any(ffn.router is not None for ffn in modeling.sparse_ffns(model)):
        raise MoEdgeError("No layer of the model routes, so there is no load to balance; leave balance out.")
    chosen = accelerator or make(settings)
    run = _Run(model, token_windows, settings, held_out or {}, teacher, state, identity, chosen)
    try:
        run.train(on_eval, progress)
    finally:
        run.observer.close()
    return run.finish()


def make(settings: TrainSettings) -> Accelerator:
    """Make the Accelerator of a run; ``accelerate launch`` decides on processes, FSDP and DeepSpeed."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.mixed_precision:
        AcceleratorState._reset_state()  # a later stage may choose another precision; the processes stay
    accumulation = GradientAccumulationPlugin(num_steps=settings.accumulate, sync_with_dataloader=False)
    precision = None if settings.mixed_precision == "no" else settings.mixed_precision
    patience = InitProcessGroupKwargs(timeout=processes.PATIENCE)
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=accumulation, kwargs_handlers=[patience])


def order(seed: int, windows: int, start: int, count: int) -> np.ndarray:
    """Return which windows come at positions start..start+count-1 of the run, int64 [count].

    Each pass over the windows is a permutation of its own, drawn from the seed and the number of the pass.
    """
    positions = np.arange(start, start + count)
    result = np.empty(count, dtype=np.int64)
    for number in np.unique(positions // windows):
        here = positions // windows == number
        result[here] = np.random.default_rng([seed, int(number)]).permutation(windows)[positions[here] % windows]
    return result


class _Run:
    """One run: the prepared model and optimizer, the counters, and their saving."""

    def __init__(
        self,
        model: PreTrainedModel,
        token_windows: np.ndarray,
        settings: TrainSettings,
        held_out: Mapping[str, np.ndarray],
        teacher: PreTrainedModel | None,
        state: Path | None,
        identity: Any,
        accelerator: Accelerator,
    ) -> None:
        from accelerate.utils import set_seed

        set_seed(settings.seed)  # the first values of the LoRA factors
        self.settings, self.windows, self.held_out = settings, token_windows, held_out
        self.accelerator, self.state, self.teacher, self.bare = accelerator, state, teacher, model
        self.trainable = trainable.prepare(model, settings.groups, settings.lora)
        if settings.balance == "bias":
            balance.add_bias(model)
        self.observer = balance.LoadObserver(model, scores=settings.balance == "loss")
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        self.result = TrainResult(
            trained={group: sum(p.numel() for _, p in pairs) for group, pairs in self.trainable.groups.items()}
        )
        if teacher is not None:
            teacher.requires_grad_(False).eval().to(accelerator.device)
        rates = [settings.router_lr if group in _SLOW_GROUPS else settings.lr for group in self.trainable.groups]
        self.rates = rates
        self.optimizer: Any = torch.optim.AdamW(
            [
                {"params": [p for _, p in pairs], "lr": rate}
                for pairs, rate in zip(self.trainable.groups.values(), rates, strict=True)
            ],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        if plugin := getattr(accelerator.state, "deepspeed_plugin", None):
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch
        self.model, self.optimizer = accelerator.prepare(self.trainable.model, self.optimizer)
        self.step, self.losses = 0, 0.0
        self.since, self.seconds, self.clock = 0, 0.0, time.monotonic()
        self.per_step = settings.batch * settings.accumulate * accelerator.num_processes
        self.key = digest(
            {
                "settings": settings.model_dump(mode="json"),
                "windows": [list(token_windows.shape), _hash(token_windows)],
                "held_out": {name: _hash(ids) for name, ids in held_out.items()},
                "processes": accelerator.num_processes,
                "of": identity,
            }
        )

    @property
    def tokens(self) -> int:
        """Tokens seen by all processes, windows counted whole."""
        return self.step * self.per_step * self.windows.shape[1]

    def done(self) -> float:
        """Share of the budget that is used, 0..1; the same number in every process."""
        settings = self.settings
        if settings.tokens is not None:
            return min(self.tokens / settings.tokens, 1.0)
        assert settings.minutes is not None
        seconds = torch.tensor([self.elapsed()], dtype=torch.float64, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            seconds = broadcast(seconds)
        return min(float(seconds) / (60 * settings.minutes), 1.0)

    def elapsed(self) -> float:
        """Seconds since the start, interruptions not counted."""
        return self.seconds + time.monotonic() - self.clock

    def train(self, on_eval: Callable[[dict[str, Any]], None] | None, progress: Progress | None) -> None:
        """Run until the budget is used."""
        settings = self.settings
        if not self.load():
            self.evaluate(on_eval)
        while (done := self.done()) < 1.0:
            with self.routing():  # of the steps alone: what is measured is the model that is saved
                self.one_step(done)
            if self.step % settings.eval_every == 0:
                self.evaluate(on_eval)
            if self.step % (settings.save_every or settings.eval_every) == 0:
                self.save()
            if progress:
                total = settings.tokens or int(60 * (settings.minutes or 0))
                progress(min(self.tokens if settings.tokens else int(self.elapsed()), total), total)
        if not self.result.curve or self.result.curve[-1]["step"] != self.step:
            self.evaluate(on_eval)

    def routing(self) -> AbstractContextManager[None]:
        """How the model routes while it is trained."""
        if self.settings.routing != "dense-softmax":
            return nullcontext()
        return trainable.dense_softmax(self.bare, self.settings.router_temperature)

    def one_step(self, done: float) -> None:
        """Make one optimizer step."""
        settings, accelerator = self.settings, self.accelerator
        factor = settings.rate_factor(done)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        # Random numbers depend on the step, not on what ran before: a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, self.step]).generate_state(1)[0]))
        chosen = order(settings.seed, len(self.windows), self.step * self.per_step, self.per_step)
        own = chosen.reshape(settings.accumulate, accelerator.num_processes, settings.batch)
        self.model.train()
        total = 0.0
        for part in own[:, accelerator.process_index]:
            with accelerator.accumulate(self.model):
                ids = torch.from_numpy(self.windows[part]).to(accelerator.device)
                loss, shown = self.loss(ids)
                if settings.balance == "loss":
                    loss = loss + settings.balance_weight * self.observer.loss()
                self.observer.observe()
                accelerator.backward(loss)
                if accelerator.sync_gradients and settings.clip:
                    accelerator.clip_grad_norm_(list(self.model.parameters()), settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += float(shown)
        if not math.isfinite(total):
            raise MoEdgeError(f"The loss is not finite at step {self.step}; lower lr, or train without fp16.")
        if settings.balance == "bias":
            self.observer.step_bias(settings.bias_step, self.sum)
        self.step += 1
        self.losses += total / settings.accumulate
        self.since += 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")

    def loss(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of windows [b, L], and its value for the log (detached)."""
        settings = self.settings
        hidden = settings.distill == "hidden"
        out = self.model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        logits = out.logits[:, :-1].float().flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].reshape(-1))
        if settings.distill != "none":
            assert self.teacher is not None
            with torch.no_grad(), self.accelerator.autocast():
                wanted = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=hidden)
            if hidden:
                extra = hidden_distance(out.hidden_states[1:], wanted.hidden_states[1:])
            else:
                extra = divergence(logits, wanted.logits[:, :-1].float().flatten(0, 1), settings.temperature)
            loss = (1 - settings.distill_weight) * loss + settings.distill_weight * extra
        return loss, loss.detach()

    @torch.no_grad()
    def evaluate(self, on_eval: Callable[[dict[str, Any]], None] | None) -> None:
        """Measure held-out perplexity and add an entry to the curve."""
        self.model.eval()
        perplexities = {}
        for name, ids in self.held_out.items():
            sums = torch.zeros(2, dtype=torch.float64)
            world, batch = self.accelerator.num_processes, self.settings.batch
            # Every process makes the same number of passes (FSDP gathers in each); windows beyond the end repeat the
            # first one and are not counted.
            rounds = math.ceil(len(ids) / (batch * world))
            for number in range(rounds):
                first = (number * world + self.accelerator.process_index) * batch
                take = np.arange(first, first + batch)
                counted = take < len(ids)
                part = torch.from_numpy(ids[np.where(counted, take, 0)]).to(self.accelerator.device)
                logits = self.model(input_ids=part, use_cache=False).logits[:, :-1]
                for row, targets, used in zip(logits, part[:, 1:], counted, strict=True):
                    if used:
                        sums[0] += F.cross_entropy(row.float(), targets, reduction="sum").double().cpu()
                        sums[1] += targets.numel()
            sums = self.sum(sums)
            perplexities[name] = math.exp(min(float(sums[0] / sums[1]), 700.0))
        loads = [balance.variation(counts) for counts in self.observer.take(self.sum)] if self.since else []
        entry = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.elapsed(), 3),
            "lr": self.optimizer.param_groups[0]["lr"] if self.since else 0.0,
            "loss": self.mean_loss(),
            "ppl": perplexities,
            "load_cv": float(np.mean(loads)) if loads else None,
        }
        self.losses, self.since = 0.0, 0
        self.result.curve.append(entry)
        if on_eval and self.accelerator.is_main_process:
            on_eval(entry)

    def mean_loss(self) -> float | None:
        """Mean training loss since the last entry of the curve, over steps and processes."""
        if not self.since:
            return None
        total = self.sum(torch.tensor([self.losses], dtype=torch.float64))
        return float(total) / self.since / self.accelerator.num_processes

    def options(self) -> Any:
        """Whole tensors on the CPU of the first process, frozen ones left out."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        many = self.accelerator.num_processes > 1
        return StateDictOptions(full_state_dict=True, cpu_offload=many, ignore_frozen_params=True, strict=False)

    def save(self) -> None:
        """Write the state, in the first process: what is sharded or counted by process is gathered there."""
        # An optimizer that made no step must not be read: torch then makes one, with zeros, which Adam counts.
        if self.state is None or not self.optimizer.optimizer.state:
            return
        from torch.distributed.checkpoint.state_dict import get_state_dict

        tensors, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=self.options())
        loads = [self.sum(counts) for counts in self.observer.counts]
        losses = float(self.sum(torch.tensor([self.losses], dtype=torch.float64)))
        if not self.accelerator.is_main_process:
            return
        counters: dict[str, Any] = {"step": self.step, "losses": losses, "since": self.since}
        counters |= {"seconds": self.elapsed(), "curve": self.result.curve}
        trained: dict[str, Any] = dict(tensors)
        moments: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        saved.write(self.state, self.key, saved.State(trained, moments, loads, counters, scaler))

    def load(self) -> bool:
        """Take up a saved state; False when there is none.

        Raises:
            MoEdgeError: it belongs to a run with other settings or texts, or is damaged.
        """
        found = saved.read(self.state, self.key) if self.state else None
        if found is None:
            return False
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_state_dict

        optimizer, options = self.optimizer.optimizer, self.options()
        groups = get_optimizer_state_dict(self.model, optimizer, options=options)["param_groups"]
        set_state_dict(
            self.model,
            optimizer,
            model_state_dict=dict(found.model),
            optim_state_dict={"state": found.moments, "param_groups": groups},  # type: ignore[dict-item]
            options=options,
        )
        if self.accelerator.scaler and found.scaler:
            self.accelerator.scaler.load_state_dict(found.scaler)
        counters = found.counters
        self.step, self.since, self.result.curve = counters["step"], counters["since"], counters["curve"]
        self.seconds, self.clock = counters["seconds"], time.monotonic()
        if self.accelerator.is_main_process:  # sums over the processes go on in one of them
            self.losses, self.observer.counts = counters["losses"], found.loads
        return True

    def finish(self) -> TrainResult:
        """Merge LoRA and return the result; a sharded model's trained tensors are gathered instead."""
        from accelerate.utils import DistributedType
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        result = self.result
        result.steps, result.tokens, result.seconds = self.step, self.tokens, self.elapsed()
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            tensors: Any = get_model_state_dict(self.model, options=self.options())
            result.tensors = dict(tensors)
        else:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            if self.settings.gradient_checkpointing:
                self.trainable.inner.activation_checkpointing_disable()
            result.model = trainable.finish(self.trainable)
        self.accelerator.free_memory()  # it holds on to what it prepared
        return result


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) in nats a token of logits [T, V] at a temperature, times its square (Hinton 2015)."""
    p, q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="sum") / len(p) * temperature**2


def hidden_distance(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean over layers of ``|s - t|^2 / |t|^2``, hidden states [b, L, H] each."""
    terms = [
        (s.float() - t.float()).square().sum() / t.float().square().sum() for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def _hash(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
