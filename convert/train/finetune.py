"""Recovery: a converted checkpoint is trained and becomes a checkpoint again.

What the training loop does is in :mod:`.training`; here is what surrounds it: a plan of unit weights
gets CMoE's scale u (weights stay 1 at u = 0), the trained routers, scales, biases and compensations go back into the
plan, and a plan whose weights were trained says so, because it no longer describes its dense parent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.convert import calibration, modeling, offload, sources
from moedge.convert.plan import MoEPlan
from moedge.convert.train import balance, trainable, training
from moedge.convert.train.settings import TrainSettings
from moedge.convert.train.write_back import weights_hash, write_back

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moedge._progress import Progress
    from moedge.convert.calibration import TextSet

FINETUNE_SCHEMA = "moedge.finetune/1"


def finetune(
    checkpoint: Path,
    out: Path,
    token_windows: np.ndarray,
    settings: TrainSettings,
    *,
    held_out: Mapping[str, np.ndarray] | None = None,
    parent: Path | None = None,
    state: Path | None = None,
    about: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    on_eval: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a checkpoint in float32 and write the result in the checkpoint's own dtype.

    Args:
        checkpoint: folder of ``moedge convert``. out: empty folder; the first process fills it with a checkpoint and
            ``finetune.json``.
        token_windows: int64 [N, L]; held_out: name -> windows int64 [n, L] for the curve.
        parent: folder of the dense parent, for ``settings.distill``.
        state: folder for saving and resuming; see :func:`moedge.convert.train.training.train`.
        about: JSON about texts and protocol, kept in ``finetune.json`` and in the plan's provenance.

    Returns:
        ``moedge.finetune/1``: settings, counts, the curve, and the plans' hashes.

    Raises:
        MoEdgeError: not a checkpoint, a parent of another shape, or what training itself refuses.
    """
    model, plan, tokenizer = modeling.load(checkpoint)
    if any(layer.children is not None for layer in plan.layers):
        raise MoEdgeError(f"{checkpoint} has experts inside of experts ({plan.method}); these cannot be fine-tuned.")
    teacher = _parent(parent, model) if parent is not None and settings.distill != "none" else None
    known = [None if one is None else weights_hash(one) for one in (model, teacher)] if state else None
    start_scale(model, settings.groups)
    accelerator = accelerator or training.make(settings)
    result = training.train(
        model,
        token_windows,
        settings,
        held_out=held_out,
        teacher=teacher,
        state=state,
        identity=known,
        accelerator=accelerator,
        on_eval=on_eval,
        progress=progress,
    )
    record = _record(result, settings, plan, accelerator, about or {})
    if accelerator.is_main_process:
        trained = result.model if result.tensors is None else _rebuild(checkpoint, settings, result.tensors)
        assert trained is not None
        offload.cast(trained, getattr(torch, sources.own_dtype(checkpoint)))  # before the weights are hashed
        counts = {"steps": result.steps, "tokens": result.tokens}
        note = {"settings": settings.model_dump(mode="json"), **counts, **(about or {})}
        updated = write_back(trained, plan, settings.groups, note, token_windows)
        modeling.save(trained, updated, tokenizer, out)
        record["plan_sha256"] = updated.sha256
        write_json(out / "finetune.json", record)
    accelerator.wait_for_everyone()
    return record


def _record(
    result: training.TrainResult,
    settings: TrainSettings,
    plan: MoEPlan,
    accelerator: Accelerator,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what ``finetune.json`` says of a training of ``plan``, without the plan that it made."""
    return {
        "schema": FINETUNE_SCHEMA,
        "settings": settings.model_dump(mode="json"),
        "about": dict(about),
        "parent_plan_sha256": plan.sha256,
        "trained": result.trained,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "curve": result.curve,
    }


def start_scale(model: PreTrainedModel, groups: tuple[str, ...]) -> None:
    """Give every layer of unit weights a scale u = 0, when ``scale`` is trained: weights ``1 + u softmax(scores)``."""
    if "scale" not in groups:
        return
    for ffn in modeling.sparse_ffns(model):
        if ffn.router is not None and ffn.combine == "unit":
            ffn.combine = "scaled"
            device = ffn.get_parameter("gate").device
            ffn.scale = torch.zeros(ffn.num_experts, dtype=torch.float32, device=device)


def recommended(plan: MoEPlan) -> dict[str, Any]:
    """Settings that a conversion asks for when it is trained, e.g. the balance loss of a downcycled model."""
    found: dict[str, Any] = plan.provenance.get(plan.method, {}).get("training", {})
    return dict(found)


def all_windows(
    tokenizer: PreTrainedTokenizerBase, text: TextSet, length: int, *, limit: int | None = None
) -> np.ndarray:
    """Cut all documents, joined, into windows int64 [N, length]; the rest that fills no window is left out.

    Windows start with the BOS token where the tokenizer starts every text with it.

    Args:
        limit: stop when this many tokens are there (rounded up to a window).

    Raises:
        MoEdgeError: the text does not fill one window.
    """
    bos = calibration.starts_with_bos(tokenizer)
    body = length - bos
    wanted = None if limit is None else -(-limit // length) * body
    ids = calibration.joined(tokenizer, text, wanted)[:wanted]
    count = len(ids) // body
    if not count:
        raise MoEdgeError(f"The text {text.name!r} has {len(ids):,} tokens, less than one window of {body}; give more.")
    return calibration.cut(ids, count, length, tokenizer.bos_token_id if bos else None)


def _rebuild(checkpoint: Path, settings: TrainSettings, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Load the checkpoint again and put trained tensors, gathered from a sharded model, into it."""
    model, _, _ = modeling.load(checkpoint)
    start_scale(model, settings.groups)
    if settings.balance == "bias":
        balance.add_bias(model)
    ready = trainable.prepare(model, settings.groups, settings.lora)
    missing = {name for pairs in ready.groups.values() for name, _ in pairs} - set(tensors)
    found = ready.model.load_state_dict(tensors, strict=False)
    if missing or found.unexpected_keys:
        raise MoEdgeError(f"The sharded model gave back other tensors than it trained: {sorted(missing)[:3]}.")
    return trainable.finish(ready)


def _parent(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    teacher = sources.load_model(folder)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        found, wanted = getattr(teacher.config, key), getattr(model.config, key)
        if found != wanted:
            raise MoEdgeError(f"{folder} is not the dense parent: its {key} is {found}, the checkpoint's {wanted}.")
    return teacher
